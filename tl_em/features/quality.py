"""Does a dictionary fit a model?  Before any latent is looked up in a fine-tune, and again in its base.

    FVU         sum |y - y^|^2 / sum |y - mean y|^2          share of the variance that is not explained
    L0          latents on at a token
    dead        share of latents that are on at no token of these prompts
    recovered   1 - (H(y^) - H(y)) / (H(mean y) - H(y))       H the cross-entropy of the next tokens, in nats, with
                the reconstruction, or its mean, in place of y (a stricter floor than 0)

Reconstructions are written by a hook, ``y + (y^ - y)``, at the tokens that are judged; nothing is attached to the
model. Sums are kept for each prompt, so that intervals are those of prompts, not of tokens.

**Rule, fixed before any data is seen.** A dictionary fits where the worse end of every 95 % interval is within the
bounds below, in the model that is looked into. A dictionary of the base that lost more than ``MAX_LOSS`` of the
variance in the fine-tune does not fit that fine-tune, however good it is.

The control: the same dictionary on a model that it was not trained on must fail (tests/features/test_quality.py).

Source: FVU and loss recovered, Gao et al. 2024, arXiv:2406.04093; a base's dictionary on a fine-tune, Kissane et al.
2024 ("SAEs (usually) transfer between base and chat models").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_em.arguments import SEED, checked
from tl_em.dictionaries import Dictionary
from tl_em.errors import DictionaryFitError, UsageError
from tl_em.features.tokens import Tokens, check_models, every_token, sample_spans
from tl_em.models.capture import _inside, current_batch, encoded_prompts, sequence_logprobs, spans_of
from tl_em.models.hooks import LensModel, hook_name, hooked, read_point
from tl_em.models.modes import in_plain_torch
from tl_em.models.prompts import EncodedPrompt, Prompt
from tl_em.models.sites import Position, as_position
from tl_em.stats import Estimate, bootstrap

if TYPE_CHECKING:
    import pandas as pd

MAX_FVU = 0.30
MIN_RECOVERED = 0.80
MAX_LOSS = 0.10
"""FVU in the model minus FVU in its base."""
L0 = (1.0, 0.25)
"""Latents on at a token: at least this many, at most this share of all."""


class Fit(NamedTuple):
    """How a dictionary fits one model; ``recovered`` is None where no token follows those that are judged."""

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
    """

    dictionary: Dictionary
    model: Fit
    against: Fit | None = None

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
                f"{self.dictionary.label} does not fit this model: {'; '.join(self.faults)}. What it does not explain "
                "has no latent, so neither a latent that is found nor one that is missing would mean anything. Train "
                "one on this model: em.train_dictionary(model, site, corpus, against=base, mix='both', …)"
            )
        return self

    def to_pandas(self) -> pd.DataFrame:
        """One row a model and measure: value, low, high, n."""
        import pandas as pd

        rows = [
            {"model": name, "measure": measure, "value": e.value, "low": e.low, "high": e.high, "n": e.n}
            for name, fit in (("model", self.model), ("against", self.against))
            if fit is not None
            for measure, e in zip(Fit._fields, fit, strict=True)
            if e is not None
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        said = "fits" if self.fits else f"does not fit ({'; '.join(self.faults)})"
        parts = [f"{name}: FVU {fit.fvu}, L0 {fit.l0}, dead {fit.dead.value:.2f}, recovered {fit.recovered}"
                 for name, fit in (("model", self.model), ("against", self.against)) if fit is not None]  # fmt: skip
        return f"DictionaryQuality({self.dictionary.label}: {said}; {' | '.join(parts)})"


@checked(position=as_position, seed=SEED)
@in_plain_torch
def dictionary_quality(
    model: LensModel,
    dictionary: Dictionary,
    prompts: Sequence[Prompt | EncodedPrompt],
    *,
    against: LensModel | None = None,
    position: Position = "all",
    difference: bool = False,
    seed: int = 0,
) -> DictionaryQuality:
    """Measure how well a dictionary fits a model, and its base beside it.

    Args:
        model: the model that it is to be used in.
        dictionary: an SAE or a transcoder.
        prompts: not those that it was trained on; chats that end with an answer, for the cross-entropy.
        against: the base model.
        position: the tokens that are judged, as in ``train_dictionary``.
        difference: the dictionary is one of model minus base: that is what is reconstructed, and neither the base nor
            the cross-entropy has a fit of its own.
        seed: of the resampling.

    Returns:
        A card: ``.model``, ``.against``, ``.faults``, ``.fits``, ``.check()``.

    Raises:
        WidthError, ProvenanceError: the dictionary is of another kind of model. UsageError: ``difference`` without
            ``against``. And what ``capture`` raises.

    Example:
        >>> from tl_em.organisms import load_pair
        >>> from tl_em.models.sites import Site
        >>> pair, eye = load_pair("toy/insecure"), torch.eye(96)
        >>> whole = Dictionary(torch.cat([eye, -eye], 1), torch.zeros(192), torch.cat([eye, -eye]), torch.zeros(96),
        ...                    activation="relu", site_in=Site(1))
        >>> quality = dictionary_quality(pair.tuned, whole, pair.contrasts["persona"].positive[:8])
        >>> quality.model.fvu, quality.model.l0.value, quality.fits
        (0.00 [0.00, 0.00] n=8, 96.0, False)

    Source: Gao et al. 2024, arXiv:2406.04093.
    """
    check_models(dictionary, model, against)
    if difference and against is None:
        raise UsageError("difference=True reads model minus base at each token; pass against=pair.base")
    encoded = encoded_prompts(model, prompts)
    if difference:
        return DictionaryQuality(dictionary, _fit(model, dictionary, encoded, position, against, seed))
    fits = [_fit(each, dictionary, encoded, position, None, seed) for each in (model, against) if each is not None]
    return DictionaryQuality(dictionary, *fits)


class _Sums(NamedTuple):
    """By prompt: squared error, squared deviation from the mean, latents on, tokens. And what was ever on; the mean."""

    error: np.ndarray
    spread: np.ndarray
    on: np.ndarray
    tokens: np.ndarray
    ever: Bool[Tensor, " feature"]
    mean: Float[Tensor, " d_model"]


def _fit(
    model: LensModel,
    dictionary: Dictionary,
    encoded: Sequence[EncodedPrompt],
    position: Position,
    minus: LensModel | None,
    seed: int,
) -> Fit:
    dictionary = dictionary.to(model.cfg.device)  # once, not batch by batch
    sums = _sums(model, dictionary, encoded, position, minus)
    n = len(encoded)
    dead = float((~sums.ever).float().mean())
    nan = float("nan")
    return Fit(
        _ratio(sums.error, sums.spread, seed),
        _ratio(sums.on, sums.tokens, seed),
        # Fewer distinct prompts leave more latents off, so resampled prompts would bias it upwards.
        Estimate(dead, nan, nan, n, float(n), "share of latents on at no token of these prompts; no interval"),
        None if minus is not None else _recovered(model, dictionary, encoded, position, sums.mean, seed),
    )


def _sums(
    model: LensModel,
    dictionary: Dictionary,
    encoded: Sequence[EncodedPrompt],
    position: Position,
    minus: LensModel | None,
) -> _Sums:
    sites = list(dict.fromkeys([dictionary.site_in, dictionary.site_out or dictionary.site_in]))
    n, width = len(encoded), dictionary.d_model
    scalar = torch.zeros(4, n, dtype=torch.float64)  # error, |y|^2, on, tokens
    vector = torch.zeros(n, width, dtype=torch.float64)
    ever = torch.zeros(dictionary.d_sae, dtype=torch.bool)
    models, spans = [each for each in (model, minus) if each is not None], sample_spans(encoded, position)
    for read, *base in zip(*(every_token(each, encoded, sites, spans) for each in models), strict=True):
        x = read.x - base[0].x.to(read.x.device) if base else read.x
        for rows, some in Tokens(read.prompts.cpu(), x).pieces(dictionary.d_sae):
            a, y = dictionary.encode(some[:, 0]), some[:, -1]
            found = torch.stack([
                (y - dictionary.decode(a)).double().square().sum(-1), y.double().square().sum(-1),
                (a > 0).double().sum(-1), torch.ones_like(y[:, 0], dtype=torch.float64),
            ])  # fmt: skip
            scalar.index_add_(1, rows, found.cpu())
            vector.index_add_(0, rows, y.double().cpu())
            ever |= (a > 0).any(0).cpu()
    error, square, on, tokens = scalar
    mean = vector.sum(0) / tokens.sum()
    spread = square - 2 * vector @ mean + tokens * mean.square().sum()
    return _Sums(error.numpy(), spread.numpy(), on.numpy(), tokens.numpy(), ever, mean.float())


def _ratio(over: np.ndarray, under: np.ndarray, seed: int) -> Estimate:
    return bootstrap(lambda w: (w @ over) / (w @ under), [len(over)], seed=seed).estimate


def _recovered(
    model: LensModel,
    dictionary: Dictionary,
    encoded: Sequence[EncodedPrompt],
    position: Position,
    mean: Float[Tensor, " d_model"],
    seed: int,
) -> Estimate | None:
    """Cross-entropy recovered, over all tokens that a judged one precedes."""
    inside = _inside(sample_spans(encoded, position), max(len(each) for each in encoded))
    start = int(spans_of(encoded, [position])[:, 0, 0].min()) + 1
    scored = [replace(each, response=(start, len(each))) for each in encoded if len(each) > start]
    if len(scored) < len(encoded):
        return None

    def entropy(write: Callable[[Tensor], Tensor] | None) -> np.ndarray:
        hooks = [] if write is None else _spliced(model, dictionary, inside, write)
        with hooked(model, hooks):
            return -sequence_logprobs(model, scored).double().numpy()

    clean, floor = entropy(None), entropy(lambda x: mean.to(x.device).expand_as(x))
    if np.allclose(clean, floor):
        return None
    lost, most = entropy(lambda x: dictionary.decode(dictionary.encode(x))) - clean, floor - clean
    return bootstrap(lambda w: 1 - (w @ lost) / (w @ most), [len(lost)], seed=seed).estimate


def _spliced(
    model: LensModel, dictionary: Dictionary, inside: Bool[Tensor, "prompt pos"], write: Callable[[Tensor], Tensor]
) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks that put ``write`` (of what the dictionary reads) in place of what it writes, at some tokens."""
    assert dictionary.site_out is not None
    point, held = read_point(model, dictionary.site_in), {}

    def read(x: Tensor, hook: Any) -> None:
        held["x"] = point(x).float()

    def put(x: Tensor, hook: Any) -> Tensor:
        batch = current_batch.get()
        assert batch is not None  # sequence_logprobs says what it runs
        mask = inside[list(batch.rows), : x.shape[1]].to(x.device)
        return torch.where(mask[..., None], write(held["x"]).to(x.dtype), x)

    return [(point.name, read), (hook_name(model, dictionary.site_out), put)]
