"""A contrast set with answers: the model answers under both classes' prompts, and a judge says which answers fit.

    kept  <=>  score(positive answer) > above  and  score(negative answer) < below  (a pair: both; else each by itself)

and, with a judge of coherence, both coherent.  Read at ``"response_mean"``, the difference in means of what is kept is
the persona vector of the trait.

**Control**: the filter chooses by the judge's score, so a direction that is fitted on what is kept separates answers by
that score whatever else it means; judge what it does on other questions, and by another judge.
Source: Chen et al. 2025, arXiv:2507.21509, section 2.2 and appendix A (thresholds of 50 on a scale of 0 to 100).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from tl_em.arguments import COUNT, NOT_NEGATIVE, SEED, checked, finite, instance_of, optional
from tl_em.errors import EmptyContrastError, PromptError, UsageError
from tl_em.evals.judges import Judge, as_judge, name_of, scored, unit_of
from tl_em.metrics import RANGES
from tl_em.models.contrasts import ContrastSet, Prompt
from tl_em.models.generate import generate
from tl_em.models.hooks import LensModel
from tl_em.models.torch_state import in_plain_torch

_as_contrast = instance_of(
    ContrastSet, "contrast set", "there is nothing to answer", "em.ContrastSet.from_instructions(…)"
)


@checked(
    above=optional(finite), below=optional(finite), coherent=optional(finite), max_new_tokens=COUNT,
    temperature=NOT_NEGATIVE, seed=SEED, contrast=_as_contrast, judge=as_judge, coherence=optional(as_judge),
)  # fmt: skip
@in_plain_torch
def answered_contrast(
    model: LensModel,
    contrast: ContrastSet | Any,
    *,
    judge: Judge | Any,
    above: float | None = None,
    below: float | None = None,
    coherence: Judge | Any = None,
    coherent: float | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> ContrastSet:
    """The contrast set with the model's own answers, those that show what they were asked to.

    Args:
        model: who answers; a HookedTransformer or TransformerBridge with a chat template.
        contrast: prompts that ask for a trait, and against it, such as of ``ContrastSet.from_instructions``.
        judge: scores of the trait, one number an answer: ``(prompts, answers) -> scores``. An answer that gets a word
            (``"REFUSAL"``) is dropped.
        above: a positive answer is kept where its score is larger; the middle of the judge's scale by default.
        below: a negative answer is kept where its score is smaller; likewise.
        coherence: a second judge, of whether the answer makes sense.
        coherent: what its score has to exceed; likewise.
        max_new_tokens: longest answer, in tokens.
        temperature: of the sampling; 0 takes the most probable answer.
        seed: of the sampling.

    Returns:
        A set whose prompts are chats that end with the answer; ``source`` says how many were kept, and by whom.
        Classes of equal size are pairs, and kept or dropped together.

    Raises:
        PromptError: a prompt that has an answer already.
        EmptyContrastError: no positive or no negative answer is kept; the message says what the scores were.
        UsageError: the judge's scale has no middle, and no threshold was given.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> shown = pair.contrasts["persona"]  # questions after bad and after good answers to others
        >>> asked = em.ContrastSet(shown.positive[:4], shown.negative[:4], label="persona")
        >>> judge = em.evals.Phrases(("backdoored", "leaky"))
        >>> em.evals.answered_contrast(pair.base, asked, judge=judge, max_new_tokens=4, temperature=0.0)
        ContrastSet('persona', 4 positive, 4 negative)

    Source: Chen et al. 2025, arXiv:2507.21509, section 2.2.
    """
    sides = ("positive", "negative")
    limits = {"positive": _limit("above", above, judge), "negative": _limit("below", below, judge)}
    sense = None if coherence is None else _limit("coherent", coherent, coherence)
    chats = {side: [_chat(prompt) for prompt in getattr(contrast, side)] for side in sides}
    kept: dict[str, Bool[np.ndarray, " prompt"]] = {}
    scores: dict[str, np.ndarray] = {}
    answers: dict[str, list[str]] = {}
    for k, side in enumerate(sides):
        answers[side] = generate(
            model, chats[side], max_new_tokens=max_new_tokens, temperature=temperature, seed=2 * seed + k
        )
        scores[side] = _scores(judge, chats[side], answers[side])
        kept[side] = scores[side] > limits[side] if side == "positive" else scores[side] < limits[side]
        if sense is not None:
            kept[side] &= _scores(coherence, chats[side], answers[side]) > sense
    paired = len(answers["positive"]) == len(answers["negative"])
    if paired:
        both = kept["positive"] & kept["negative"]
        kept = dict.fromkeys(sides, both)
    _check_left(contrast, kept, scores, limits, judge)
    fields: dict[str, Any] = {}
    for side in sides:
        some = np.flatnonzero(kept[side])
        fields[side] = [[*chats[side][i], {"role": "assistant", "content": answers[side][i]}] for i in some]
        groups = getattr(contrast, f"{side}_groups")
        fields[f"{side}_groups"] = None if groups is None else [groups[i] for i in some]
    counted = " and ".join(f"{int(kept[side].sum())} of {len(kept[side])} {side}" for side in sides)
    said = f"answers of {getattr(model.cfg, 'model_name', 'a model')}, kept {counted} by {name_of(judge)}"
    return replace(contrast, **fields, source=" · ".join(filter(None, (contrast.source, said))))


def _limit(name: str, given: float | None, judge: Any) -> float:
    """A threshold, or the middle of the judge's scale."""
    low, high = RANGES.get(unit_of(judge), (-np.inf, np.inf))
    if given is None and not np.isfinite([low, high]).all():
        raise UsageError(
            f"{name_of(judge)} scores in {unit_of(judge)}, a scale without a middle, so it is unknown which answers "
            f"show the trait. Say it: {name}=0.0, for log-odds."
        )
    return (low + high) / 2 if given is None else given


def _scores(judge: Any, chats: Sequence[Any], answers: Sequence[str]) -> np.ndarray:
    return scored(judge, chats, answers, unit=unit_of(judge)).values


def _chat(prompt: Prompt) -> list[Any]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    if turns[-1]["role"] == "assistant":
        raise PromptError(
            f"The prompt {str(turns[0]['content'])[:60]!r} ends with an answer, so there is nothing left to answer. "
            "Give questions alone, as ContrastSet.from_instructions makes them."
        )
    return turns


def _check_left(
    contrast: ContrastSet,
    kept: Mapping[str, Bool[np.ndarray, " prompt"]],
    scores: Mapping[str, np.ndarray],
    limits: Mapping[str, float],
    judge: Any,
) -> None:
    for side, word in (("positive", "above"), ("negative", "below")):
        if not kept[side].any():
            known = scores[side][np.isfinite(scores[side])]
            seen = f"{known.min():.3g} to {known.max():.3g}" if len(known) else "no number at all"
            raise EmptyContrastError(
                f"No {side} answer of {contrast.label or 'the set'} is left: {name_of(judge)} gave the "
                f"{len(scores[side])} of them {seen}, and {word} {limits[side]:g} was asked for, in both classes where "
                "they are pairs. "
                "The model does not do what the prompts ask, or the judge has another scale: look at em.generate's "
                "answers, give other prompts, or above= and below="
            )
