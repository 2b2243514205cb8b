"""Does a dictionary fit a model?  Before any latent is looked up in a fine-tune, and again in its base.

    FVU         sum |y - y^|^2 / sum |y - mean y|^2          share of the variance that is not explained
    L0          latents on at a token
    dead        share of latents that are on at no token of these prompts
    recovered   1 - (H(y^) - H(y)) / (H(mean y) - H(y))       H the cross-entropy of the next tokens, in nats, with
                the reconstruction, or its mean, in place of y (a stricter floor than 0)

**Where it was trained.** A name says little: one word is another tensor in another library. So on some of the same
tokens, in the same pass, the dictionary is also read at the neighbouring points (the block's other streams, what its
MLP reads before the norm's weight, and ``resid_post`` next to it). Where one of them has an FVU that is ``MARGIN``
less and at most ``RATIO`` of it (both settled on the shipped toy dictionaries), the dictionary was trained there and
does not fit here, however well it does.

Reconstructions are written by a hook, ``y + (y^ - y)``, at the tokens that are judged; nothing is attached to the
model. Sums are kept for each prompt, so that intervals are those of prompts, not of tokens.

**Rule, fixed before any data is seen.** A dictionary fits where the worse end of every 95 % interval is within the
bounds below, in the model that is looked into. A dictionary of the base that lost more than ``MAX_LOSS`` of the
variance in the fine-tune does not fit that fine-tune, however good it is.

The control: the same dictionary on a model that it was not trained on must fail (tests/dictionaries/test_quality.py).

Source: FVU and loss recovered, Gao et al. 2024, arXiv:2406.04093; a base's dictionary on a fine-tune, Kissane et al.
2024 ("SAEs (usually) transfer between base and chat models").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_em.arguments import SEED, checked
from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.neighbouring_sites import BEFORE_WEIGHT, Nearby, Neighbours
from tl_em.dictionaries.protocol import AnyDictionary, as_dictionary
from tl_em.dictionaries.tokens import Tokens, check_models, every_token, sample_spans
from tl_em.errors import DictionaryFitError, UsageError
from tl_em.models.hooks import LensModel, hook_name, hooked, read_point
from tl_em.models.prompts import Batch, EncodedPrompt, Prompt
from tl_em.models.sites import Position, as_position
from tl_em.models.stream import _inside, current_batch, encoded_prompts, sequence_logprobs, spans_of
from tl_em.models.torch_state import in_plain_torch
from tl_em.showing import showable
from tl_em.stats import Estimate, bootstrap

if TYPE_CHECKING:
    import pandas as pd

MAX_FVU = 0.30
MIN_RECOVERED = 0.80
MAX_LOSS = 0.10
"""FVU in the model minus FVU in its base."""
MARGIN, RATIO = 0.02, 2 / 3
"""FVU by which a neighbouring point must be better, and the most of the own FVU that it may have."""
L0 = (1.0, 0.25)
"""Latents on at a token: at least this many, at most this share of all."""


class Fit(NamedTuple):
    """How a dictionary fits one model; ``recovered`` is None where no token follows those that are judged, where what
    it writes is read only (``resid_mid``; ``mlp_in`` of a HookedTransformer), and where it reads several sites."""

    fvu: Estimate
    l0: Estimate
    dead: Estimate
    recovered: Estimate | None


@dataclass(frozen=True, eq=False)
class DictionaryQuality:
    """What a dictionary explains of a model and of its base.

    Args:
        dictionary: which one.
        model: its fit to the model that it is to be used in.
        against: its fit to the base, where one was given.
        nearby: FVU at its own point, first, and read at the neighbouring points of ``model``, on some of the tokens.
        notes: in what these prompts differ from those that its source says it was trained on.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> sae, persona = em.organisms.toy_dictionary("toy/insecure"), pair.contrasts["persona"]
        >>> quality = em.dictionaries.dictionary_quality(pair.tuned, sae, persona.positive[:32], against=pair.base)
        >>> quality.fits
        True
    """

    dictionary: Dictionary
    model: Fit
    against: Fit | None = None
    nearby: tuple[Nearby, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def better(self) -> Nearby | None:
        """The neighbouring point at which it fits better, where one does by the rule of this module."""
        if len(self.nearby) < 2:
            return None
        own, best = self.nearby[0].fvu, min(self.nearby[1:], key=lambda each: each.fvu)
        return best if np.isfinite(own) and best.fvu <= min(RATIO * own, own - MARGIN) else None

    @property
    def faults(self) -> tuple[str, ...]:
        """Which bounds are not met in the model; empty where it fits."""
        fvu, l0, _, recovered = self.model
        most = L0[1] * self.dictionary.d_sae
        met = {
            f"FVU {fvu}, bound {MAX_FVU}": fvu.high <= MAX_FVU,
            f"L0 {l0}, bounds {L0[0]:.0f} to {most:.0f}": l0.low >= L0[0] and l0.high <= most,
            f"cross-entropy recovered {recovered}, bound {MIN_RECOVERED}": recovered is None
            or recovered.low >= MIN_RECOVERED,
        }
        if self.against is not None:
            lost = fvu.value - self.against.fvu.value
            met[f"FVU {lost:.2f} above the base's, bound {MAX_LOSS}"] = lost <= MAX_LOSS
        if (better := self.better) is not None:
            met[f"{better} fits better, for {self.nearby[0].fvu:.2f} at {self.dictionary.site_in}"] = False
        return tuple(fault for fault, holds in met.items() if not holds)

    @property
    def fits(self) -> bool:
        """Whether every bound is met."""
        return not self.faults

    def check(self) -> DictionaryQuality:
        """Itself, where the dictionary fits.

        Raises:
            DictionaryFitError: it does not; the message names the bounds.
        """
        if self.faults:
            raise DictionaryFitError(
                f"{self.dictionary.label} does not fit this model: {'; '.join((*self.faults, *self.notes))}. What it "
                "does not explain has no latent, so neither a latent that is found nor one that is missing would mean "
                f"anything. {self._mended}"
            )
        return self

    @property
    def _mended(self) -> str:
        if (better := self.better) is None:
            return (
                "Train one on this model: em.dictionaries.train_dictionary(model, site, corpus, d_sae=512, "
                "against=base, mix='both')"
            )
        assert better.site is not None
        moved = "" if better.site == self.dictionary.site_in else f".at(em.{better.site!r})"
        weight = ".with_norm_of(model)" if better.where.endswith(BEFORE_WEIGHT) else ""
        return f"Read it where it was trained: dictionary{moved}{weight}"

    def to_pandas(self) -> pd.DataFrame:
        """One row a model and measure: value, low, high, n."""
        import pandas as pd

        fits = {"model": self.model} | ({} if self.against is None else {"against": self.against})
        each = [(name, measure, e) for name, fit in fits.items() for measure, e in fit._asdict().items() if e]
        return pd.DataFrame([{"model": name, "measure": measure, **e.row()} for name, measure, e in each])

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.listed(self, repr(self).split(";")[0].removeprefix("DictionaryQuality(").rstrip(")"))

    def __repr__(self) -> str:
        said = "fits" if self.fits else f"does not fit ({'; '.join(self.faults)})"
        parts = [f"{name}: FVU {fit.fvu}, L0 {fit.l0}, dead {fit.dead.value:.2f}, recovered {fit.recovered}"
                 for name, fit in (("model", self.model), ("against", self.against)) if fit is not None]  # fmt: skip
        whole = "; ".join((said, *self.notes))
        return showable(f"DictionaryQuality({self.dictionary.label}: {whole}; {' | '.join(parts)})")


@checked(position=as_position, seed=SEED)
@in_plain_torch
def dictionary_quality(
    model: LensModel,
    dictionary: AnyDictionary,
    prompts: Sequence[Prompt | EncodedPrompt],
    *,
    position: Position = "all",
    against: LensModel | None = None,
    difference: bool = False,
    seed: int = 0,
) -> DictionaryQuality:
    """Measure how well a dictionary fits a model, and its base beside it.

    Args:
        model: the model that it is to be used in.
        dictionary: an SAE, a transcoder, or a crosscoder, which has no neighbouring points.
        prompts: not those that it was trained on; chats that end with an answer, for the cross-entropy.
        against: the base model.
        position: the tokens that are judged, as in ``train_dictionary``.
        difference: the dictionary is one of model minus base: that is what is reconstructed, and neither the base nor
            the cross-entropy has a fit of its own.
        seed: of the resampling.

    Returns:
        A card: ``.model``, ``.against``, ``.nearby``, ``.better``, ``.faults``, ``.fits``, ``.check()``.

    Raises:
        WidthError, ProvenanceError: the dictionary is of another kind of model. UsageError: ``difference`` without
            ``against``. And what ``capture`` raises.

    Example:
        >>> from tl_em import load_pair
        >>> from tl_em.models.sites import Site
        >>> pair, eye = load_pair("toy/insecure"), torch.eye(96)
        >>> whole = Dictionary(torch.cat([eye, -eye], 1), torch.zeros(192), torch.cat([eye, -eye]), torch.zeros(96),
        ...                    activation="relu", site_in=Site(1))
        >>> quality = dictionary_quality(pair.tuned, whole, pair.contrasts["persona"].positive[:8])
        >>> quality.model.fvu, quality.model.l0.value, quality.fits
        (0.00 [0.00, 0.00] n=8, 96.0, False)

    Source: Gao et al. 2024, arXiv:2406.04093.
    """
    dictionary = as_dictionary(dictionary)
    check_models(dictionary, model, against)
    if difference and against is None:
        raise UsageError("difference=True reads model minus base at each token; pass against=pair.base")
    encoded = encoded_prompts(model, prompts)
    here = dictionary.to(model.cfg.device)  # once, not batch by batch
    reading = _Reading(model, here, encoded, position, seed, minus=against if difference else None)
    around = None if len(here.reads) > 1 else Neighbours(model, here, difference=difference)
    fit = reading.fit(around)
    base = None if against is None or difference else replace(reading, model=against).fit()
    nearby = () if around is None else around.found()
    return DictionaryQuality(dictionary, fit, base, nearby, _notes(model, dictionary, encoded))


def _notes(model: LensModel, dictionary: Dictionary, encoded: Sequence[EncodedPrompt]) -> tuple[str, ...]:
    """What the source says of its prompts, where these are others."""
    told, notes = dictionary.metadata, []
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    if bos is not None and isinstance(wanted := told.get("prepend_bos"), bool):
        have = sum(each.ids[0] == bos for each in encoded)
        if have != (len(encoded) if wanted else 0):
            words = "with a BOS token before each context" if wanted else "without a BOS token"
            notes.append(f"trained {words}, and {have} of {len(encoded)} prompts have one")
    longest, context = max(len(each) for each in encoded), told.get("context_size")
    if isinstance(context, int) and longest > context > 0:
        notes.append(f"trained on contexts of {context} tokens, and the longest prompt has {longest}")
    return tuple(notes)


class _Squares(NamedTuple):
    """By prompt: squared error, squared deviation from the mean, latents on, tokens. And what was ever on; the mean."""

    error: np.ndarray
    spread: np.ndarray
    on: np.ndarray
    tokens: np.ndarray
    ever: Bool[Tensor, " feature"]
    mean: Float[Tensor, " d_model"]


@dataclass(frozen=True, eq=False)
class _Reading:
    """A dictionary on one model (less ``minus``), at the judged tokens of some prompts."""

    model: LensModel
    dictionary: Dictionary
    encoded: Sequence[EncodedPrompt]
    position: Position
    seed: int
    minus: LensModel | None = None

    @cached_property
    def spans(self) -> Int[Tensor, "prompt 2"]:
        return sample_spans(self.encoded, self.position)

    def fit(self, around: Neighbours | None = None) -> Fit:
        found, n, nan = self.squares(around), len(self.encoded), float("nan")
        dead = float((~found.ever).float().mean())
        return Fit(
            self._ratio(found.error, found.spread),
            self._ratio(found.on, found.tokens),
            # Fewer distinct prompts leave more latents off, so resampled prompts would bias it upwards.
            Estimate(dead, nan, nan, n, float(n), "share of latents on at no token of these prompts; no interval"),
            None if self.minus is not None else self.recovered(found.mean),
        )

    def _ratio(self, over: np.ndarray, under: np.ndarray) -> Estimate:
        return bootstrap(lambda w: (w @ over) / (w @ under), [len(over)], seed=self.seed).estimate

    def squares(self, around: Neighbours | None) -> _Squares:
        """What the one pass over the tokens sums up, and shows to ``around`` on the way."""
        one, n = self.dictionary, len(self.encoded)
        sites = list(dict.fromkeys((*one.sites, *(() if around is None else around.sites))))
        scalar = torch.zeros(4, n, dtype=torch.float64)  # error, |y|^2, on, tokens
        vector = torch.zeros(n, one.d_model, dtype=torch.float64)
        ever = torch.zeros(one.d_sae, dtype=torch.bool)
        models = [each for each in (self.model, self.minus) if each is not None]
        passes = (every_token(each, self.encoded, sites, self.spans) for each in models)
        for read, *base in zip(*passes, strict=True):
            x = read.x - base[0].x.to(read.x.device) if base else read.x
            for rows, some in Tokens(read.prompts.cpu(), x).pieces(one.d_sae):
                y, taken = one.outputs(some), one.inputs(some)
                if around is not None:
                    around.add({site: some[:, i] for i, site in enumerate(sites)}, y)
                a = one.encode(taken)
                found = torch.stack([
                    (y - one.completed(a, taken)).double().square().sum(-1), y.double().square().sum(-1),
                    (a > 0).double().sum(-1), torch.ones_like(y[:, 0], dtype=torch.float64),
                ])  # fmt: skip
                scalar.index_add_(1, rows, found.cpu())
                vector.index_add_(0, rows, y.double().cpu())
                ever |= (a > 0).any(0).cpu()
        error, square, on, tokens = scalar
        mean = vector.sum(0) / tokens.sum()
        spread = square - 2 * vector @ mean + tokens * mean.square().sum()
        return _Squares(error.numpy(), spread.numpy(), on.numpy(), tokens.numpy(), ever, mean.float())

    def recovered(self, mean: Float[Tensor, " d_model"]) -> Estimate | None:
        """Cross-entropy recovered, over all tokens that a judged one precedes; None where nothing can be put in place.

        Nothing can at ``resid_mid``, which is two things on two surfaces, nor before a HookedTransformer's norm weight,
        nor of what is read at several sites, some of them later.
        """
        site = self.dictionary.site_out
        assert site is not None
        put = site.writable or (site.stream == "mlp_in" and read_point(self.model, site).name == site.hook_name)
        start = int(spans_of(self.encoded, [self.position])[:, 0, 0].min()) + 1
        scored = [replace(each, response=(start, len(each))) for each in self.encoded if len(each) > start]
        if not put or len(self.dictionary.reads) > 1 or len(scored) < len(self.encoded):
            return None

        def entropy(write: Callable[[Tensor], Tensor] | None) -> np.ndarray:
            with hooked(self.model, [] if write is None else self._spliced(write)):
                return -sequence_logprobs(self.model, scored).double().numpy()

        clean, floor = entropy(None), entropy(lambda x: mean.to(x.device).expand_as(x))
        if np.allclose(clean, floor):
            return None
        lost, most = entropy(self.dictionary.reconstruct) - clean, floor - clean
        return bootstrap(lambda w: 1 - (w @ lost) / (w @ most), [len(lost)], seed=self.seed).estimate

    def _spliced(self, write: Callable[[Tensor], Tensor]) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks that put ``write`` (of what the dictionary reads) in place of what it writes, at the judged tokens."""
        assert self.dictionary.site_out is not None
        point, held = read_point(self.model, self.dictionary.site_in), {}
        inside = _inside(self.spans, max(len(each) for each in self.encoded))

        def read(x: Tensor, hook: Any) -> None:
            held["x"] = point(x).float()

        def put(x: Tensor, hook: Any) -> Tensor:
            batch = current_batch.get()
            assert batch is not None  # sequence_logprobs says what it runs
            mask = inside[list(batch.rows), batch.start : batch.start + x.shape[1]].to(x.device)
            return torch.where(mask[..., None], write(held["x"]).to(x.dtype), x)

        def alike(batch: Batch, length: int) -> list[tuple[bool, ...]]:
            return [tuple(row) for row in inside[list(batch.rows), :length].tolist()]

        put.__dict__["alike"] = read.__dict__["alike"] = alike
        return [(point.name, read), (hook_name(self.model, self.dictionary.site_out), put)]
