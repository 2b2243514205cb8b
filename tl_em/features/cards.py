"""What is known of a latent, on one card: where it is on, what it writes, which behaviours it goes with.

    density = tokens with a_j > 0 / tokens        lens = logits of the decoder row        cosine = d_j . v / |d_j| |v|

A card describes and proves nothing: top examples show one tail of the activations, so the histogram of all tokens
stands beside them; a lens names tokens for any vector, so it carries the p of random directions; and whether a latent
*does* anything is said by ``verify_feature`` alone, whose checks can be put on the same page.

Source of the parts: Bricken et al. 2023, "Towards Monosemanticity" (examples, histogram, logit weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import COUNT, NATURAL, SEED, checked, list_of
from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.protocol import AnyDictionary, as_dictionary
from tl_em.dictionaries.tokens import check_models, every_token, scope_spans
from tl_em.directions.direction import Direction
from tl_em.directions.lens import logit_lens
from tl_em.errors import UsageError
from tl_em.features.decoders import decoder_cosines
from tl_em.features.explanations import neuronpedia_link, read_explanations
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, Prompt
from tl_em.models.stream import encoded_prompts, spans_of
from tl_em.models.token_scopes import Where
from tl_em.models.token_text import token_texts
from tl_em.models.torch_state import in_plain_torch
from tl_em.showing import encodable, showable

if TYPE_CHECKING:
    import pandas as pd

    from tl_em.features.scoring import FeatureTable

BINS = 24
_LENS_CONTROLS = 199


class Text(NamedTuple):
    """A prompt that some card shows: its tokens, and the activations of all latents that have a card.

    Args:
        tokens: as text, one a position; a character of several tokens stands at its first, the others are ``""``. From
            outside, so escape them.
        activations: [pos card], in the model that is looked at.
        base: the same in the base; None without one.
        counts: the first token that counts and the one after the last; None where all do.
    """

    tokens: tuple[str, ...]
    activations: Float[Tensor, "pos card"]
    base: Float[Tensor, "pos card"] | None
    counts: tuple[int, int] | None = None

    @property
    def span(self) -> tuple[int, int]:
        """The tokens that count: the first, and the one after the last."""
        return self.counts or (0, len(self.tokens))


class Histogram(NamedTuple):
    """Activations above 0: share of the tokens that count in each of ``BINS`` equal bins from 0 to ``high``.

    ``high`` is the highest activation in either model, 0 where the latent is never on; the bins are then empty.
    """

    high: float
    model: tuple[float, ...]
    base: tuple[float, ...] | None


class WrittenToken(NamedTuple):
    """A token whose logit the decoder row raises or lowers; ``p``: random directions that move some token as far."""

    token: str
    logit: float
    p: float


@dataclass(frozen=True, eq=False)
class FeatureCard:
    """One latent.

    Args:
        index: of the latent.
        examples: numbers of prompts (keys of ``FeatureCards.texts``), highest activation first.
        density, mean, maximum: of the tokens that count, the share at which it is on, and its mean and its highest
            activation over all of them, in the model; ``base_density``, ``base_mean``, ``base_maximum`` in the base.
        histogram: of its activations.
        top, bottom: tokens that its decoder row writes for and against.
        cosines: of the decoder row with given directions.
        behaviours: its rows in a FeatureTable, as plain values.
        explanation: what somebody wrote about it; from outside, so escape it.
        link: its page at Neuronpedia, where the dictionary has one.
    """

    index: int
    examples: tuple[int, ...]
    density: float
    mean: float
    maximum: float
    base_density: float | None
    base_mean: float | None
    base_maximum: float | None
    histogram: Histogram
    top: tuple[WrittenToken, ...]
    bottom: tuple[WrittenToken, ...]
    cosines: Mapping[str, float]
    behaviours: tuple[Mapping[str, Any], ...]
    explanation: str
    link: str | None


@dataclass(frozen=True, eq=False)
class FeatureCards:
    """What :func:`feature_cards` returns; in a notebook it shows itself.

    Args:
        dictionary: whose latents they are.
        cards: one for each.
        texts: the prompts that are shown, by number.
        model, base: names of the models; ``base`` None without one.
        tokens: number of tokens that count, behind densities, means, maxima and histograms.
        checks: what was verified about them, for the head of the page.
        where: which tokens count, as it was asked for.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> sae, persona = em.organisms.toy_dictionary("toy/insecure"), pair.contrasts["persona"]
        >>> em.features.feature_cards(pair.tuned, sae, [3], persona.positive[:8]).cards[0].index
        3
    """

    dictionary: Dictionary
    cards: tuple[FeatureCard, ...]
    texts: Mapping[int, Text]
    model: str
    base: str | None
    tokens: int
    checks: tuple[Any, ...] = ()
    where: Where = "all"

    def to_pandas(self) -> pd.DataFrame:
        """One row a card: numbers, the first tokens that it writes, the explanation."""
        import pandas as pd

        figures = ("density", "mean", "maximum", "base_density", "base_mean", "base_maximum")
        return pd.DataFrame([
            {
                "latent": card.index, **{name: getattr(card, name) for name in figures},
                "writes": encodable(", ".join(each.token for each in card.top[:3])),
                "explanation": encodable(card.explanation),
            }
            for card in self.cards
        ])  # fmt: skip

    @checked()
    def save(self, path: str | Path, *, circuitsvis: bool = False) -> Path:
        """See :func:`tl_em.report.feature_pages.save`."""
        from tl_em.report.feature_pages import save

        return save(self, path, circuitsvis=circuitsvis)

    def _repr_html_(self) -> str:
        from tl_em.report.feature_pages import notebook_frame

        return notebook_frame(self)

    def __repr__(self) -> str:
        named = ", ".join(str(card.index) for card in self.cards[:8]) + (", …" if len(self.cards) > 8 else "")
        return showable(f"FeatureCards({self.dictionary.label}, latents {named}; {self.tokens} tokens of {self.model})")


@checked(indices=list_of(NATURAL), k=COUNT, seed=SEED)
@in_plain_torch
def feature_cards(
    model: LensModel,
    dictionary: AnyDictionary,
    indices: Sequence[int],
    prompts: Sequence[Prompt | EncodedPrompt],
    *,
    against: LensModel | None = None,
    table: FeatureTable | None = None,
    explanations: str | Path | None = None,
    directions: Mapping[str, Direction] | None = None,
    checks: Sequence[Any] = (),
    where: Where = "all",
    k: int = 6,
    seed: int = 0,
) -> FeatureCards:
    """Cards of some latents: examples, histogram, logit lens, cosines, behaviours, explanation.

    Args:
        model: the tuned model.
        dictionary: whose latents.
        indices: which.
        prompts: what examples, densities and histograms are taken from.
        against: the base, on the same prompts.
        table: scores of the latents on behaviours.
        explanations: a JSONL file; each line an object with ``index`` (or ``feature``, ``latent``) and
            ``description`` (or ``explanation``, ``label``), and optionally ``dictionary``, its hash or name.
        directions: vectors to compare decoder rows with, by name.
        checks: results of ``verify_feature`` to show on the page.
        where: the tokens that count, as in ``em.intervene``: every figure is over these, and examples are chosen by,
            centred on and coloured over these; the tokens around them are shown without a colour.
        k: number of examples and of written tokens on each side.
        seed: of the lens's random directions.

    Returns:
        FeatureCards: ``.save("features.html")`` writes the page.

    Raises:
        UsageError: no latent, one that the dictionary does not have, k below 1, or no token that counts.
        CorruptFileError: the explanations cannot be read.
        WidthError, ProvenanceError: the dictionary (or a direction) is of another model.

    Example:
        >>> from tl_em.models.sites import Site
        >>> from tl_em import load_pair
        >>> eye = torch.eye(96)
        >>> sae = Dictionary(eye, torch.zeros(96), eye, torch.zeros(96), activation="relu", site_in=Site(2))
        >>> pair = load_pair("toy/insecure")
        >>> cards = feature_cards(pair.tuned, sae, [3], ["how do i write parser"], against=pair.base, k=2)
        >>> len(cards.cards[0].top), len(cards.texts)
        (2, 1)
    """
    dictionary = as_dictionary(dictionary)
    if not indices:
        raise UsageError("no latent was given, so there is no card to make; pass indices=[…], at least one")
    for index in indices:
        dictionary.feature(int(index))  # raises where there is none
    check_models(dictionary, model, against)
    cosines = decoder_cosines(dictionary, directions or {})
    said = {} if explanations is None else read_explanations(explanations, dictionary)
    scores = _scores(table, indices)
    encoded = encoded_prompts(model, prompts)
    own = _acts(model, dictionary, indices, encoded, where)
    other = None if against is None else _acts(against, dictionary, indices, encoded, where)
    tokens = sum(map(len, own.counted))
    if not tokens:
        raise UsageError(
            f"where={where!r} counts no token of these {len(encoded)} prompts, so no card could show anything; pass "
            'where="all", or chats that end with an answer'
        )
    cards = []
    for column, index in enumerate(map(int, indices)):
        by_prompt = own.of(column)
        a, b = torch.cat(by_prompt), None if other is None else torch.cat(other.of(column))
        beside = (None, None, None) if b is None else _level(b)
        cards.append(FeatureCard(
            index, _highest(by_prompt, k), *_level(a), *beside, _histogram(a, b),
            *_written(model, dictionary, index, k, seed), {name: float(each[index]) for name, each in cosines.items()},
            scores.get(index, ()), said.get(index, ""), neuronpedia_link(dictionary, index),
        ))  # fmt: skip
    shown = sorted({number for card in cards for number in card.examples})
    tokenizer = getattr(model, "tokenizer", None)
    texts = {n: Text(token_texts(tokenizer, encoded[n].ids), own.every[n], None if other is None else other.every[n],
                     own.spans[n]) for n in shown}  # fmt: skip
    names = [None if each is None else str(getattr(each.cfg, "model_name", "") or "model") for each in (model, against)]
    return FeatureCards(dictionary, tuple(cards), texts, names[0] or "", names[1], tokens, tuple(checks), where)


# ---- activations -------------------------------------------------------------------------------------------------
class _Acts(NamedTuple):
    """Activations of the chosen latents, prompt by prompt: at every token, and at those that count."""

    every: Sequence[Float[Tensor, "_ card"]]  # prompts differ in length, so the axis has no name
    counted: Sequence[Float[Tensor, "_ card"]]
    spans: Sequence[tuple[int, int]]

    def of(self, column: int) -> list[Float[Tensor, "_"]]:
        """Of one latent, at the tokens that count."""
        return [a[:, column] for a in self.counted]


def _acts(
    model: LensModel, dictionary: Dictionary, indices: Sequence[int], encoded: Sequence[EncodedPrompt], where: Where
) -> _Acts:
    """One pass; of each token only the chosen latents are kept."""
    here = dictionary.to(model.cfg.device)
    read = every_token(model, encoded, here.reads, spans_of(encoded, ["all"])[:, 0])
    pieces = (some for tokens in read for some in tokens.pieces(here.d_sae))
    a = torch.cat([here.encode(here.inputs(some.x))[:, list(indices)].cpu() for some in pieces])
    every = a.split([len(prompt) for prompt in encoded])
    spans = [(first, end) for first, end in scope_spans(encoded, where).tolist()]
    return _Acts(every, [each[first:end] for each, (first, end) in zip(every, spans, strict=True)], spans)


# ---- one card ----------------------------------------------------------------------------------------------------
def _highest(by_prompt: Sequence[Float[Tensor, "_"]], k: int) -> tuple[int, ...]:
    """The prompts with the highest activations, where there are any above 0."""
    peaks = torch.stack([a.max() if len(a) else torch.tensor(0.0) for a in by_prompt])
    return tuple(int(n) for n in peaks.argsort(descending=True, stable=True)[:k] if peaks[n] > 0)


def _level(a: Float[Tensor, " token"]) -> tuple[float, float, float]:
    """Density, mean and maximum; 0 where no token counts."""
    return (float((a > 0).double().mean()), float(a.double().mean()), float(a.max())) if len(a) else (0.0, 0.0, 0.0)


def _histogram(a: Float[Tensor, " token"], b: Float[Tensor, " other"] | None) -> Histogram:
    both = a if b is None else torch.cat([a, b])
    high = max(0.0, float(both.max())) if len(both) else 0.0

    def shares(values: Tensor) -> tuple[float, ...]:
        if not high:  # an empty range would make histc choose its own
            return (0.0,) * BINS
        counts = torch.histc(values[values > 0], BINS, 0.0, high)
        return tuple((counts / max(1, len(values))).tolist())

    return Histogram(high, shares(a), None if b is None else shares(b))


def _written(
    model: LensModel, dictionary: Dictionary, index: int, k: int, seed: int
) -> tuple[tuple[WrittenToken, ...], tuple[WrittenToken, ...]]:
    """Tokens that the decoder row writes for and against; none where the row is 0."""
    row = dictionary.W_dec[index].cpu()
    if not bool(row.any()) or dictionary.site_out is None:
        return (), ()
    found = logit_lens(model, Direction(row, dictionary.site_out), k=k, controls=_LENS_CONTROLS, seed=seed)

    def side(name: str) -> tuple[WrittenToken, ...]:
        rows = found[found.side == name]
        written = zip(rows.token, rows.logit, rows.p, strict=True)
        return tuple(WrittenToken(str(token), float(logit), float(p)) for token, logit, p in written)

    return side("top"), side("bottom")


def _scores(table: FeatureTable | None, indices: Sequence[int]) -> dict[int, tuple[Mapping[str, Any], ...]]:
    """The latents' rows of a table."""
    if table is None:
        return {}
    frame = table.to_pandas()
    found = frame[frame["latent"].isin(list(indices))].groupby("latent")
    return {int(latent): tuple(rows.to_dict("records")) for latent, rows in found}
