"""What components are compared with, position by position.

    prompt      what another prompt writes there: one of equal length token by token, another one span by span
    other words the default: the same prompt with other words in the places of its question, every third word in turn
                (where the model has no word of ours, as toys have not: its own words, each one place on)
    mean        over some prompts, place by place; over this prompt's tokens;     zero

In turns, because a node is ablated alone: an effect and its estimate are means over the turns, in each of which most of
the prompt is as it was. With all words replaced at once the way to the reference leads through prompts that say
nothing, far from the one in which a node's effect is asked for (``docs/results/graph-size.md``).

A *sink* is a token whose stream is far longer than the others' (the first one, in most models). It says nothing about
the text, but a mean that it takes part in is mostly it. So it is in no mean, and is compared with itself.

Control: exact ablation with the same references, in every graph (``validation``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.errors import UsageError
from tl_em.graph.gradients import linearise
from tl_em.graph.inputs import ids_of, is_chat, is_ids
from tl_em.graph.rules.plain import Plain
from tl_em.metrics import token_ids
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.token_text import text_of_tokens

SINK = 10.0
"""Times the median length of a stream. Sinks of real models are 50 to 200 times as long, other tokens below 5."""
SHOWN = 60
"""Characters of a prompt in a title."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """What every component is replaced by.

    Args:
        turns: [pos width] or [1 width] by hook point; where there are several, effects are means over them.
        kind: for the settings.
        said: for people, after "compared with".
        sinks: positions that are compared with themselves.
    """

    turns: tuple[dict[str, Float[Tensor, "pos width"]], ...]
    kind: str
    said: str
    sinks: tuple[int, ...] = ()

    @property
    def values(self) -> dict[str, Float[Tensor, "pos width"]]:
        """The mean over the turns, by hook point."""
        first, *others = self.turns
        return {name: torch.stack([x, *(each[name] for each in others)]).mean(0) for name, x in first.items()}


def reference_of(model: LensModel, encoded: EncodedPrompt, clean: Mapping[str, Tensor], against: Any) -> Replacement:
    """What ``against=`` stands for.

    Raises:
        UsageError: nothing that is a reference. And what ``encode`` raises.
    """
    if against is None:
        return _other_words(model, encoded, clean)
    if isinstance(against, str) and against == "zero":
        return Replacement(({name: torch.zeros_like(x[:1]) for name, x in clean.items()},), "zero", "zero")
    if isinstance(against, str) and against == "mean":
        return _mean_of_tokens(model, encoded, clean)
    several = _several(against)
    others = [_encoded(model, each) for each in (against if several else [against])]
    each = [_beside(model, encoded, other, list(clean)) for other in others]
    found = {name: torch.stack([one[name] for one in each]).mean(0) for name in clean}
    if several:
        return Replacement((found,), "mean of prompts", f"the mean of {len(others)} prompts, place by place")
    spans = "" if len(others[0]) == len(encoded) else ", span by span"
    return Replacement((found,), "prompt", f"“{_shown(model, encoded, others[0])}”{spans}")


def _several(against: Any) -> bool:
    if not isinstance(against, list | tuple) or not against or is_chat(against):
        return False
    return not is_ids(against) or all(is_ids(each) for each in against)  # rows, not the numbers of one


def _encoded(model: LensModel, prompt: Any) -> EncodedPrompt:
    """A reference in any form that a prompt may have."""
    if isinstance(prompt, EncodedPrompt):
        ids_of(prompt.ids, int(model.cfg.d_vocab))
    elif is_ids(prompt):
        prompt = EncodedPrompt.from_ids(ids_of(prompt, int(model.cfg.d_vocab)))
    if not isinstance(prompt, str | EncodedPrompt) and not is_chat(prompt):
        raise UsageError(f"against={prompt!r:.40} is no reference; give a prompt, a tuple of prompts, 'mean' or 'zero'")
    return encode(model, [prompt])[0]


def values(model: LensModel, encoded: EncodedPrompt, points: Sequence[str]) -> dict[str, Float[Tensor, "pos width"]]:
    """What runs through some points, one vector a position."""
    run = linearise(model, torch.tensor(encoded.ids), reads=points, rule=Plain())
    return {name: run.value(name) for name in points}


# --- Another prompt ---------------------------------------------------------------------------------------------------


def _beside(
    model: LensModel, encoded: EncodedPrompt, other: EncodedPrompt, points: Sequence[str]
) -> dict[str, Float[Tensor, "pos width"]]:
    found = values(model, other, points)
    at = aligned(encoded.ids, other.ids)
    return found if at == list(range(len(other))) else {name: x[at] for name, x in found.items()}


def aligned(ids: Sequence[int], other: Sequence[int]) -> list[int]:
    """For each token of a prompt the place in another one that it is compared with.

    Of equal length: its own. Else what both have in common stays together, and what differs between is stretched;
    where the other one has nothing, its token before stands.

    Example:
        >>> aligned([1, 2, 3], [1, 7, 3]), aligned([1, 2, 3, 4], [1, 7, 8, 9, 4]), aligned([1, 2, 3], [1, 3])
        ([0, 1, 2], [0, 1, 3, 4], [0, 0, 1])
    """
    if len(ids) == len(other):
        return list(range(len(ids)))
    found = []
    for _, start, end, first, last in SequenceMatcher(a=ids, b=other, autojunk=False).get_opcodes():
        n, m = end - start, last - first
        for at in range(n):
            step = at * (m - 1) / (n - 1) if n > 1 else m - 1
            found.append(first + round(step) if m else max(first - 1, 0))
    return found


def _shown(model: LensModel, encoded: EncodedPrompt, other: EncodedPrompt) -> str:
    """What another prompt says where it differs: its own words, without what both begin and end with."""
    alike = [len(_common(encoded.ids, other.ids)), len(_common(encoded.ids[::-1], other.ids[::-1]))]
    start, end = other.instruction
    if start <= alike[0] and len(other) - alike[1] <= end:
        alike = [start, len(other) - end]
    part = other.ids[alike[0] : max(len(other) - alike[1], alike[0] + 1)]
    text = text_of_tokens(getattr(model, "tokenizer", None), list(part)).strip()
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _common(a: Sequence[int], b: Sequence[int]) -> Sequence[int]:
    return a[: next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


# --- Without one ------------------------------------------------------------------------------------------------------

OTHER_WORDS = (
    " What should I cook for dinner tonight? How does a bicycle stay upright? Which book would you read on a long "
    "train journey? Tell me about the weather in the mountains. How long does it take to learn to swim? What is a "
    "good name for a small boat?"
)
"""Of no consequence; what the default puts where a question stood."""
SAID = {"other words": "other words in the same places", "own words": "its own words, each one place on"}
TURNS = 3
"""In each turn every so many-th word is another one. Four agree a little better, and take a third longer."""


def _other_words(model: LensModel, encoded: EncodedPrompt, clean: Mapping[str, Tensor]) -> Replacement:
    """The same prompt with other words where the question stands; the mean where there is but one word to move."""
    start, end = encoded.instruction
    end = max(min(end, len(encoded) - 1), start)  # the word that the target is read from stays
    own, kind = encoded.ids[start:end], "other words"
    others = _borrowed(model, len(own))
    if others is None:
        others, kind = [*own[1:], *own[:1]], "own words"
    if all(a == b for a, b in zip(own, others, strict=True)):
        return _mean_of_tokens(model, encoded, clean)
    text = text_of_tokens(getattr(model, "tokenizer", None), others).strip()
    text = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
    prompts = [EncodedPrompt.from_ids(ids) for ids in in_turns(encoded.ids, others, start)]
    each = tuple(values(model, one, list(clean)) for one in prompts)
    return Replacement(each, kind, f"{SAID[kind]}, every third in turn, “{text}”")


def in_turns(ids: Sequence[int], others: Sequence[int], start: int, *, turns: int = TURNS) -> list[list[int]]:
    """A prompt with other tokens from a place on: every so many-th of them, then those beside, and so on.

    Example:
        >>> in_turns([1, 2, 3, 4, 5, 6], [7, 8, 9, 10], 1)
        [[1, 7, 3, 4, 10, 6], [1, 2, 8, 4, 5, 6], [1, 2, 3, 9, 5, 6]]
    """
    found = []
    for turn in range(min(turns, len(others))):
        found.append(list(ids))
        for at in range(turn, len(others), turns):
            found[-1][start + at] = others[at]
    return found


def _borrowed(model: LensModel, length: int) -> list[int] | None:
    """So many tokens of ``OTHER_WORDS``; None where the model has no words for them."""
    if getattr(model, "tokenizer", None) is None:
        return None
    ids = token_ids(model, OTHER_WORDS)
    if not ids or getattr(model.tokenizer, "unk_token_id", None) in ids:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    return (ids * (1 + length // len(ids)))[:length]


def _mean_of_tokens(model: LensModel, encoded: EncodedPrompt, clean: Mapping[str, Tensor]) -> Replacement:
    """The mean over this prompt's tokens, without its sinks, which stay as they are."""
    alone = sinks(model, encoded)
    found = {}
    for name, x in clean.items():
        rest = [at for at in range(len(x)) if at not in alone]
        found[name] = x.mean(0, keepdim=True) if not alone else x[rest].mean(0, keepdim=True).repeat(len(x), 1)
        if alone:
            found[name][list(alone)] = x[list(alone)]
    left = f", sinks ({', '.join(map(str, alone))}) left alone" if alone else ""
    return Replacement((found,), "mean", f"the mean over this prompt's tokens{left}", alone)


def sinks(model: LensModel, encoded: EncodedPrompt) -> tuple[int, ...]:
    """Positions whose stream is ``SINK`` times as long as the median at some layer; none among fewer than three.

    Example:
        >>> from tl_em import load_pair
        >>> sinks(load_pair("toy/insecure").base, EncodedPrompt.from_ids([5, 7, 9, 11]))
        ()
    """
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(int(model.cfg.n_layers))]
    if len(encoded) < 3:
        return ()
    lengths = torch.stack([x.norm(dim=-1) for x in values(model, encoded, streams).values()])
    far = lengths / lengths.median(-1, keepdim=True).values.clamp(min=1e-30)
    return tuple((far.amax(0) > SINK).nonzero().flatten().tolist())
