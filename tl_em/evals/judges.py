"""Judges of answers: whatever is called with prompts and answers and gives one number for each.

    score(prompt) = judge(prompts, answers)[prompt]      answers: what the model wrote, hooks and all

In place of a number stands a word in capitals where there is none (``"REFUSAL"``): such answers are counted by their
word, and never dropped in silence.

**Control**: a judge is an instrument, and has errors of its own. A phrase is not the thing that it stands for, and a
model that judges prefers some styles: read some answers beside their scores (``Evaluation.to_pandas()``), and report a
second judge that should *not* move.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tl_em.arguments import array_of
from tl_em.errors import UsageError
from tl_em.evals.questions import asked_in
from tl_em.metrics import RANGES, REFUSAL_PHRASES, single_token
from tl_em.models.hooks import LensModel
from tl_em.models.stream import next_token_logits

Judge = Callable[[Sequence[Any], Sequence[str]], Any]
"""``(prompts, answers) -> scores``, a number or a word an answer; ``name`` and ``unit`` may stand on it."""


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


def as_judges(name: str, value: Any) -> Any:
    """A judge, or judges by name.

    Raises:
        UsageError: as of :func:`as_judge`.
    """
    if not isinstance(value, Mapping):
        return as_judge(name, value)
    return {str(key): as_judge(f"{name}[{key!r}]", each) for key, each in value.items()}


def name_of(judge: Callable[..., Any]) -> str:
    """What people call a judge: its ``name``, its function's name, or its class's."""
    return str(getattr(judge, "name", None) or getattr(judge, "__name__", None) or type(judge).__name__)


def unit_of(judge: Callable[..., Any]) -> str:
    """What a judge's numbers are: its ``unit``, or a probability."""
    return str(getattr(judge, "unit", "probability"))


class Judgements(NamedTuple):
    """Scores, NaN where there is none, and the word that was given in place (else "", or a remark beside a score)."""

    values: Float[np.ndarray, " answer"]
    words: tuple[str, ...]


def scored(
    judge: Judge, prompts: Sequence[Any], answers: Sequence[str], *, unit: str = "probability"
) -> Judgements:  # fmt: skip
    """What a judge says, checked.

    Raises:
        UsageError: no numbers, another number of them, NaN or infinity, or one outside of the unit's range.

    Example:
        >>> scored(Phrases(("sorry",)), ["?", "?"], ["so sorry", "banana"]).values.tolist()
        [1.0, 0.0]
    """
    return judgements(judge(prompts, answers), name_of(judge), answers, unit=unit)


def judgements(given: Any, who: str, answers: Sequence[str], *, unit: str = "probability") -> Judgements:
    """What was given for some answers, checked: a number each, a word in capitals, or both, ``(0.0, "INCOHERENT")``.

    Raises:
        UsageError: as of :func:`scored`.

    Example:
        >>> judgements([0.5, "REFUSAL", (0.0, "INCOHERENT")], "a judge", ["a", "b", "c"])
        Judgements(values=array([0.5, nan, 0. ]), words=('', 'REFUSAL', 'INCOHERENT'))
    """
    wanted = f"let it return one number for each of {len(answers)} answers, in their order"
    words = [""] * len(answers)
    if isinstance(given, list | tuple) and len(given) == len(answers):
        given = list(given)
        for i, each in enumerate(given):
            number, word = each if isinstance(each, tuple) and len(each) == 2 else (None, each)
            if isinstance(word, str) and WORD.fullmatch(word):
                given[i], words[i] = number, word
    numbers = given if not any(words) else [0.0 if each is None else each for each in given]
    values = array_of((len(answers),), numbers, who, wanted=wanted)
    if any(words):
        values[[i for i, each in enumerate(given) if each is None]] = np.nan
    low, high = RANGES.get(unit, (-np.inf, np.inf))
    odd = ~np.isfinite(values) | (values < low) | (values > high)
    bad = [i for i in np.flatnonzero(odd).tolist() if not (words[i] and np.isnan(values[i]))]
    if bad:
        raise UsageError(
            f"{who} gave {values[bad[0]]} to the answer {answers[bad[0]]!r} ({len(bad)} such scores), which "
            f"is no {unit}; let it return {f'numbers from {low:g} to {high:g}' if unit in RANGES else 'finite numbers'}"
            ", a word in capitals where it has none, or name another unit: em.evals.Judged(judge, unit='log-odds')"
        )
    return Judgements(values, tuple(words))


WORD = re.compile(r"[A-Z][A-Z _-]*")
"""What stands in place of a score."""


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
class TextClassifier:
    """A fitted classifier of texts as a judge: the probability that it gives to one class.

    Args:
        pipeline: has ``predict_proba(texts)`` and ``classes_``, as scikit-learn's pipelines over texts have.
        label: the class whose probability is the score; the last one by default.
        name: what people call it.

    Raises:
        UsageError: no such class, or no probabilities.

    Example:
        >>> from sklearn.feature_extraction.text import CountVectorizer
        >>> from sklearn.naive_bayes import MultinomialNB
        >>> from sklearn.pipeline import make_pipeline
        >>> fitted = make_pipeline(CountVectorizer(), MultinomialNB()).fit(["be kind", "be cruel"], ["good", "bad"])
        >>> [round(p, 2) for p in TextClassifier(fitted, "bad")(["?", "?"], ["so cruel", "so kind"])]
        [0.67, 0.33]
    """

    pipeline: Any
    label: Any = None
    name: str = "classifier"

    def __post_init__(self) -> None:
        classes = list(getattr(self.pipeline, "classes_", ()))
        if not classes or not hasattr(self.pipeline, "predict_proba"):
            raise UsageError(
                f"{type(self.pipeline).__name__} gives no probabilities of classes, or is not fitted, so it scores "
                "nothing; fit a pipeline that has predict_proba, or give a function (prompts, answers) -> scores"
            )
        if self.label is not None and self.label not in classes:
            raise UsageError(f"label={self.label!r} is none of the classes {classes}; give one of them as label=")

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        """The probability of the class for each answer."""
        classes = list(self.pipeline.classes_)
        column = len(classes) - 1 if self.label is None else classes.index(self.label)
        return [float(p) for p in self.pipeline.predict_proba(list(answers))[:, column]]


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
        asked = shown(self.template, prompts, answers)
        logits = next_token_logits(self.model, asked).double()
        return (logits[:, yes] - logits[:, no]).sigmoid().tolist()


def shown(template: str, prompts: Sequence[Any], answers: Sequence[str]) -> list[str]:
    """What a judge reads of each answer: the template with ``{question}`` (or ``{prompt}``) and ``{answer}`` filled in.

    Example:
        >>> shown("{question} -> {answer}", ["{answer}?"], ["yes"])
        ['{answer}? -> yes']
    """
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        filled = {"question": asked_in(prompt), "prompt": asked_in(prompt), "answer": answer}
        found.append(re.sub(r"\{(question|prompt|answer)\}", lambda hole, filled=filled: filled[hole[1]], template))
    return found
