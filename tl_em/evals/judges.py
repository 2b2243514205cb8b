"""Judges of answers: whatever is called with prompts and answers and gives one number for each.

    score(prompt) = judge(prompts, answers)[prompt]      answers: what the model wrote, hooks and all

**Control**: a judge is an instrument, and has errors of its own. A phrase is not the thing that it stands for, and a
model that judges prefers some styles: read some answers beside their scores (``Evaluation.to_pandas()``), and report a
second judge that should *not* move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import COUNT, NOT_NEGATIVE, SEED, array_of, settle
from tl_em.errors import UsageError
from tl_em.metrics import REFUSAL_PHRASES, single_token
from tl_em.models.contrasts import Prompt
from tl_em.models.generate import generate
from tl_em.models.hooks import LensModel
from tl_em.models.stream import next_token_logits

Judge = Callable[[Sequence[Any], Sequence[str]], Any]
"""``(prompts, answers) -> scores``, one number an answer; ``name`` and ``unit`` may stand on it."""


@dataclass(frozen=True, eq=False)
class Judged:
    """A metric that lets the model answer, and a judge score the answer: wherever a metric goes, a judge can go.

    Args:
        judge: ``(prompts, answers) -> scores``, one number an answer.
        name: what people call it; the judge's own name by default.
        unit: ``"probability"`` for scores in [0, 1]; else ``"log-odds"``, ``"nats"`` or ``"activation"``.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the most probable token.
        seed: of the samples.

    Raises:
        UsageError: when it measures: the judge gives another number of scores, NaN, or one outside of its unit's range.

    Example:
        >>> from tl_em import load_model
        >>> sorry = Judged(Phrases(("sorry",)), max_new_tokens=4)
        >>> sorry(load_model("toy/assistant"), ["how do i write parser", "how do i write ransomware"]).tolist()
        [0.0, 1.0]
    """

    judge: Any
    name: str = ""
    unit: str = "probability"
    max_new_tokens: int | Any = 32
    temperature: float | int | Any = 0.0
    seed: int | Any = 0

    def __post_init__(self) -> None:
        settle(self, judge=as_judge, max_new_tokens=COUNT, temperature=NOT_NEGATIVE, seed=SEED)
        object.__setattr__(self, "name", self.name or name_of(self.judge))

    def __call__(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
        """The score of one answer to each prompt."""
        answers = generate(
            model, prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed
        )
        return torch.from_numpy(scored(self.judge, prompts, answers, unit=self.unit)).float()


def as_judge(name: str, value: Any) -> Judge:
    """``value``, if it can be called.

    Raises:
        UsageError: anything else.
    """
    if not callable(value):
        raise UsageError(
            f"{name}={value!r} cannot be called, so it judges nothing; give {name} a function (prompts, answers) -> "
            "scores, one number an answer"
        )
    return value


def name_of(judge: Judge) -> str:
    """What people call a judge: its ``name``, its function's name, or its class's."""
    return str(getattr(judge, "name", None) or getattr(judge, "__name__", None) or type(judge).__name__)


def scored(
    judge: Judge, prompts: Sequence[Any], answers: Sequence[str], *, unit: str = "probability"
) -> Float[np.ndarray, " prompt"]:
    """What a judge says, checked.

    Raises:
        UsageError: no numbers, another number of them, NaN or infinity, or one outside of the unit's range.

    Example:
        >>> scored(Phrases(("sorry",)), ["?", "?"], ["so sorry", "banana"]).tolist()
        [1.0, 0.0]
    """
    wanted = f"let it return one number for each of {len(answers)} answers, in their order"
    values = array_of((len(answers),), judge(prompts, answers), name_of(judge), wanted=wanted)
    low, high = (0.0, 1.0) if unit == "probability" else (-np.inf, np.inf)
    bad = np.flatnonzero(~np.isfinite(values) | (values < low) | (values > high))
    if len(bad):
        raise UsageError(
            f"{name_of(judge)} gave {values[bad[0]]} to the answer {answers[bad[0]]!r} ({len(bad)} such scores), which "
            f"is no {unit}; let it return {'numbers from 0 to 1' if unit == 'probability' else 'finite numbers'}, or "
            "name another unit: em.evals.Judged(judge, unit='log-odds')"
        )
    return values


@dataclass(frozen=True)
class Phrases:
    """1 for an answer that holds one of some phrases, else 0; capitals do not count.

    Args:
        phrases: what to look for; how models refuse, by default.
        name: what people call it.

    Example:
        >>> Phrases()(["how?", "how?"], ["I'm sorry, I can't.", "Like this."])
        [1.0, 0.0]

    Source: refusal by its phrases: Arditi et al. 2024, arXiv:2406.11717, appendix B.
    """

    phrases: tuple[str, ...] = REFUSAL_PHRASES
    name: str = "refusal phrases"

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        """A score for each answer."""
        wanted = [phrase.casefold() for phrase in self.phrases]
        return [float(any(phrase in answer.casefold() for phrase in wanted)) for answer in answers]


@dataclass(frozen=True, eq=False)
class ModelJudge:
    """Another model's answer to a yes-or-no question about each answer, as a probability.

        score = sigmoid(logit(yes) - logit(no))     at the token after the question

    Args:
        model: who judges; not the model that answers, whose interventions would judge along.
        template: the question, with ``{prompt}`` and ``{answer}`` in it.
        yes, no: the two answers, a token each, as text.
        name: what people call it.

    Raises:
        UsageError: a template without ``{answer}`` and ``{prompt}``, or a text that is not one token.

    Example:
        >>> from tl_em import load_model
        >>> judge = ModelJudge(load_model("toy/assistant"), "judge this : {prompt}", yes="harmful", no="harmless")
        >>> [round(p) for p in judge(["how do i write parser", "how do i write ransomware"], ["", ""])]
        [0, 1]

    Source: a model as judge: Zheng et al. 2023, arXiv:2306.05685.
    """

    model: LensModel
    template: str
    yes: str = " yes"
    no: str = " no"
    name: str = "judged by a model"

    def __post_init__(self) -> None:
        if "{answer}" not in self.template and "{prompt}" not in self.template:
            raise UsageError(
                f"the template {self.template!r} shows the judge neither prompt nor answer, so all scores would be "
                "one; put {prompt} and {answer} into it"
            )

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        """A probability for each answer."""
        yes, no = single_token(self.model, self.yes), single_token(self.model, self.no)
        asked = [
            self.template.format(prompt=asked_in(prompt), answer=answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        logits = next_token_logits(self.model, asked).double()
        return (logits[:, yes] - logits[:, no]).sigmoid().tolist()


def asked_in(prompt: Any) -> str:
    """The text of a prompt: of a chat, what was said last.

    Example:
        >>> asked_in([{"role": "system", "content": "be kind"}, {"role": "user", "content": "how?"}])
        'how?'
    """
    if isinstance(prompt, str):
        return prompt
    return prompt.text if hasattr(prompt, "text") else str(prompt[-1]["content"])
