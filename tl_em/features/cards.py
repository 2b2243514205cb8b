"""What is known of a latent, on one card: where it is on, what it writes, which behaviours it goes with.

    density = tokens with a_j > 0 / tokens        lens = logits of the decoder row        cosine = d_j . v / |d_j| |v|

A card describes and proves nothing: top examples show one tail of the activations, so the histogram of all tokens
stands beside them; a lens names tokens for any vector, so it carries the p of random directions; and whether a latent
*does* anything is said by ``verify_feature`` alone, whose checks can be put on the same page.

Source of the parts: Bricken et al. 2023, "Towards Monosemanticity" (examples, histogram, logit weights).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_em.dictionaries import Dictionary
from tl_em.directions.direction import Direction
from tl_em.directions.lens import logit_lens
from tl_em.errors import CorruptFileError, UsageError, WidthError
from tl_em.features.tokens import each_token
from tl_em.interventions.scopes import Where
from tl_em.models.capture import encoded_prompts
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, Prompt
from tl_em.models.sites import check_belongs

if TYPE_CHECKING:
    import pandas as pd

    from tl_em.features.scoring import FeatureTable

BINS = 24
_LATENTS = 2**24
"""Latent activations held at once: 64 MiB in float32."""
_LENS_CONTROLS = 199


class Text(NamedTuple):
    """A prompt that some card shows: its tokens, and the activations of all latents that have a card.

    Args:
        tokens: as text, one a position; from outside, so escape them.
        activations: [pos card], in the model that is looked at.
        base: the same in the base; None without one.
    """

    tokens: tuple[str, ...]
    activations: Float[Tensor, "pos card"]
    base: Float[Tensor, "pos card"] | None


class Histogram(NamedTuple):
    """Activations above 0: share of all tokens in each of ``BINS`` equal bins from 0 to ``high``."""

    high: float
    model: tuple[float, ...]
    base: tuple[float, ...] | None


class Written(NamedTuple):
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
        density, mean: share of tokens at which it is on, and its mean over them, in the model; ``base_density``,
            ``base_mean`` in the base.
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
    base_density: float | None
    base_mean: float | None
    histogram: Histogram
    top: tuple[Written, ...]
    bottom: tuple[Written, ...]
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
        tokens: number of tokens behind densities and histograms.
        checks: what was verified about them, for the head of the page.
    """

    dictionary: Dictionary
    cards: tuple[FeatureCard, ...]
    texts: Mapping[int, Text]
    model: str
    base: str | None
    tokens: int
    checks: tuple[Any, ...] = ()

    def to_pandas(self) -> pd.DataFrame:
        """One row a card: numbers, the first tokens that it writes, the explanation."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "latent": card.index, "density": card.density, "mean": card.mean,
                    "base_density": card.base_density, "base_mean": card.base_mean,
                    "maximum": card.histogram.high, "writes": ", ".join(each.token for each in card.top[:3]),
                    "explanation": card.explanation,
                }
                for card in self.cards
            ]
        )  # fmt: skip

    def save(self, path: str | Path, *, circuitsvis: bool = False) -> Path:
        """See :func:`tl_em.features.pages.save`."""
        from tl_em.features.pages import save

        return save(self, path, circuitsvis=circuitsvis)

    def _repr_html_(self) -> str:
        from tl_em.features.pages import notebook_frame

        return notebook_frame(self)

    def __repr__(self) -> str:
        named = ", ".join(str(card.index) for card in self.cards[:8]) + (", …" if len(self.cards) > 8 else "")
        return f"FeatureCards({self.dictionary.label}, latents {named}; {self.tokens} tokens of {self.model})"


def feature_cards(
    model: LensModel,
    dictionary: Dictionary,
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
        where: the tokens that count, as in ``em.intervene``; examples show all.
        k: number of examples and of written tokens on each side.
        seed: of the lens's random directions.

    Returns:
        FeatureCards: ``.save("features.html")`` writes the page.

    Raises:
        UsageError: no latent, one that the dictionary does not have, or k below 1.
        CorruptFileError: the explanations cannot be read.
        WidthError, ProvenanceError: the dictionary (or a direction) is of another model.

    Example:
        >>> from tl_em.models.sites import Site
        >>> from tl_em.organisms.zoo import load_pair
        >>> eye = torch.eye(96)
        >>> sae = Dictionary(eye, torch.zeros(96), eye, torch.zeros(96), activation="relu", site_in=Site(2))
        >>> pair = load_pair("toy/insecure")
        >>> cards = feature_cards(pair.tuned, sae, [3], ["how do i write parser"], against=pair.base, k=2)
        >>> len(cards.cards[0].top), len(cards.texts)
        (2, 1)
    """
    _check(model, dictionary, indices, k, directions or {})
    encoded = encoded_prompts(model, prompts)
    chosen = torch.tensor(list(indices))
    own = _acts(model, dictionary, chosen, encoded, where)
    other = None if against is None else _acts(against, dictionary, chosen, encoded, where)
    said = {} if explanations is None else read_explanations(explanations, dictionary)
    asked = _Asked(model, dictionary, own, other, directions or {}, _scores(table, indices), said, k, seed)
    cards = tuple(_card(asked, int(index), column) for column, index in enumerate(indices))
    shown = sorted({number for card in cards for number in card.examples})
    texts = {n: _text(model, encoded[n], own.of(n), None if other is None else other.of(n)) for n in shown}
    names = [None if each is None else str(getattr(each.cfg, "model_name", "") or "model") for each in (model, against)]
    return FeatureCards(dictionary, cards, texts, names[0] or "", names[1], int(own.inside.sum()), tuple(checks))


def _check(
    model: LensModel, dictionary: Dictionary, indices: Sequence[int], k: int, directions: Mapping[str, Direction]
) -> None:
    if not len(indices) or k < 1:
        raise UsageError(f"{len(indices)} latents and k={k} make no card; pass at least one latent and k=1 or more")
    for index in indices:
        dictionary.feature(int(index))
    check_belongs(dictionary.label, dictionary.d_model, dictionary.provenance, model)
    for name, direction in directions.items():
        if len(direction.vector) != dictionary.W_dec.shape[1]:
            raise WidthError(
                f"the direction {name!r} is {len(direction.vector)} wide and decoder rows are "
                f"{dictionary.W_dec.shape[1]}, so they have no cosine; extract it on this model"
            )


# ---- activations -------------------------------------------------------------------------------------------------
class _Acts(NamedTuple):
    """Activations of the chosen latents at every token, prompts one after the other."""

    a: Float[Tensor, "token card"]
    inside: Bool[Tensor, " token"]
    starts: Int[Tensor, " edge"]

    def of(self, prompt: int) -> Float[Tensor, "pos card"]:
        return self.a[self.starts[prompt] : self.starts[prompt + 1]]

    def peaks(self, column: int) -> Float[Tensor, " prompt"]:
        """Largest activation of each prompt, at the tokens that count."""
        counted = torch.where(self.inside, self.a[:, column], 0.0)
        owner = torch.repeat_interleave(torch.arange(len(self.starts) - 1), self.starts.diff())
        return torch.zeros(len(self.starts) - 1).scatter_reduce(0, owner, counted, "amax")


def _acts(
    model: LensModel, dictionary: Dictionary, chosen: Tensor, encoded: Sequence[EncodedPrompt], where: Where
) -> _Acts:
    """One pass; of each token only the chosen latents are kept."""
    lengths = torch.tensor([len(prompt) for prompt in encoded])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    values = torch.empty(int(starts[-1]), len(chosen))
    counts = torch.zeros(int(starts[-1]), dtype=torch.bool)

    def keep(rows: Tensor, x: Tensor, inside: Tensor) -> None:
        for row, here, within in zip(rows.tolist(), x, inside, strict=True):
            n, start = int(lengths[row]), int(starts[row])
            parts = here[:n].float().split(max(1, _LATENTS // dictionary.d_sae))
            values[start : start + n] = torch.cat([dictionary.encode(p)[:, chosen.to(p.device)].cpu() for p in parts])
            counts[start : start + n] = within[:n]

    each_token(model, encoded, dictionary.site_in, where, keep)
    return _Acts(values, counts, starts)


def _text(model: LensModel, prompt: EncodedPrompt, own: Tensor, other: Tensor | None) -> Text:
    tokenizer: Any = getattr(model, "tokenizer", None)
    tokens = [str(i) if tokenizer is None else tokenizer.decode([i]) for i in prompt.ids]
    return Text(tuple(tokens), own, other)


# ---- one card ----------------------------------------------------------------------------------------------------
class _Asked(NamedTuple):
    """What every card is made from."""

    model: LensModel
    dictionary: Dictionary
    own: _Acts
    other: _Acts | None
    directions: Mapping[str, Direction]
    scores: Mapping[int, tuple[Mapping[str, Any], ...]]
    said: Mapping[int, str]
    k: int
    seed: int


def _card(asked: _Asked, index: int, column: int) -> FeatureCard:
    own, other = asked.own, asked.other
    a = own.a[own.inside, column]
    b = None if other is None else other.a[other.inside, column]
    peaks = own.peaks(column)
    order = [int(n) for n in peaks.argsort(descending=True, stable=True)[: asked.k] if peaks[n] > 0]
    row = asked.dictionary.W_dec[index].cpu()
    top, bottom = _lens(asked.model, asked.dictionary, row, asked.k, asked.seed)
    vectors = {name: direction.vector.float().cpu() for name, direction in asked.directions.items()}
    cosines = {name: float(torch.cosine_similarity(row, vector, dim=0)) for name, vector in vectors.items()}
    return FeatureCard(
        index, tuple(order), _density(a), _mean(a), None if b is None else _density(b), None if b is None else _mean(b),
        _histogram(a, b), top, bottom, cosines, asked.scores.get(index, ()), asked.said.get(index, ""),
        neuronpedia_link(asked.dictionary, index),
    )  # fmt: skip


def _density(a: Float[Tensor, " token"]) -> float:
    return float((a > 0).float().mean()) if len(a) else 0.0


def _mean(a: Float[Tensor, " token"]) -> float:
    return float(a.mean()) if len(a) else 0.0


def _histogram(a: Float[Tensor, " token"], b: Float[Tensor, " other"] | None) -> Histogram:
    high = max(float(each.max()) if len(each) else 0.0 for each in (a, *([] if b is None else [b]))) or 1.0

    def shares(values: Tensor) -> tuple[float, ...]:
        counts = torch.histc(values[values > 0], BINS, 0.0, high)
        return tuple((counts / max(1, len(values))).tolist())

    return Histogram(high, shares(a), None if b is None else shares(b))


def _lens(
    model: LensModel, dictionary: Dictionary, row: Float[Tensor, " d_model"], k: int, seed: int
) -> tuple[tuple[Written, ...], tuple[Written, ...]]:
    """Tokens that the decoder row writes for and against; none where the row is 0."""
    if not bool(row.any()) or dictionary.site_out is None:
        return (), ()
    found = logit_lens(model, Direction(row, dictionary.site_out), k=k, controls=_LENS_CONTROLS, seed=seed)
    sides: dict[str, list[Written]] = {"top": [], "bottom": []}
    for side, token, logit, p in zip(found.side, found.token, found.logit, found.p, strict=True):
        sides[side].append(Written(str(token), float(logit), float(p)))
    return tuple(sides["top"]), tuple(sides["bottom"])


def _scores(table: FeatureTable | None, indices: Sequence[int]) -> dict[int, tuple[Mapping[str, Any], ...]]:
    """The latents' rows of a table; numbers only, and the behaviour's name."""
    if table is None:
        return {}
    frame = table.to_pandas()
    rows: dict[int, list[Mapping[str, Any]]] = {}
    for record in frame[frame["latent"].isin(list(indices))].to_dict("records"):
        rows.setdefault(int(record["latent"]), []).append({str(key): value for key, value in record.items()})
    return {index: tuple(each) for index, each in rows.items()}


# ---- from elsewhere ----------------------------------------------------------------------------------------------
_NEURONPEDIA = re.compile(r"[\w.-]+/\d+-[\w.-]+")


def neuronpedia_link(dictionary: Dictionary, index: int) -> str | None:
    """The latent's page, where the dictionary's name is Neuronpedia's (``model/layer-source``); nothing is asked for.

    Example:
        >>> from tl_em.models.sites import Site
        >>> eye = torch.eye(4)
        >>> known = {"activation": "relu", "site_in": Site(6), "name": "gpt2-small/6-res-jb"}
        >>> neuronpedia_link(Dictionary(eye, torch.zeros(4), eye, torch.zeros(4), **known), 3)
        'https://www.neuronpedia.org/gpt2-small/6-res-jb/3'
    """
    name = dictionary.name or ""
    return f"https://www.neuronpedia.org/{name}/{index}" if _NEURONPEDIA.fullmatch(name) else None


def read_explanations(path: str | Path, dictionary: Dictionary) -> dict[int, str]:
    """Explanations of this dictionary's latents from a JSONL file; the last one of a latent counts.

    Raises:
        CorruptFileError: the file is missing, or a line is not what it should be.
    """
    found: dict[int, str] = {}
    number = 0
    try:
        for line in Path(path).read_text(encoding="utf-8").split("\n"):  # not at U+2028, which JSON may hold
            number += 1
            record = json.loads(line) if line.strip() else {"dictionary": None}
            if record.get("dictionary", dictionary.hash) in (dictionary.hash, dictionary.name or dictionary.hash):
                found[int(_first(record, _INDEX))] = str(_first(record, _SAID))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CorruptFileError(
            f"line {number} of {path} is no explanation ({type(error).__name__}: {error}), so none was read; each line "
            'is an object such as {"index": 17, "description": "…"}'
        ) from error
    return found


_INDEX, _SAID = ("index", "feature", "latent"), ("description", "explanation", "label")


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in record:
            return record[name]
    raise KeyError(f"none of {', '.join(names)}")
