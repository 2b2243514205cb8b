"""The words and numbers of a report, in one place: the five questions, their units, how an estimate is written."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

MINUS = "\u2212"


class Question(NamedTuple):
    """One of the five questions: what it asks, what is measured, the words of its verdict."""

    asks: str
    measured: str
    words: str


QUESTIONS = {
    "level": Question(
        "Is the direction more, or less, present after the fine-tune?",
        "Class-balanced mean projection on the direction, tuned minus base, in units of the direction's own gap "
        "(the base model's projection gap between the two classes of its contrast set).",
        "exaggerated or diminished",
    ),
    "separation": Question(
        "Does the tuned model tell the two classes apart more, or less, sharply?",
        "Projection gap between the classes, tuned minus base, in own gaps.",
        "sharper or blurred",
    ),
    "rotation": Question(
        "Does the tuned model represent the same thing along another direction?",
        "Cosine of the direction extracted again from the tuned model with the base's, against the cosine that two "
        "halves of the same data reach.",
        "rotated",
    ),
    "use": Question(
        "Does the direction drive the behaviour?",
        "Change of the behaviour when the direction is ablated in the tuned model and when it is added in the base, "
        "at the same site.",
        "causal",
    ),
    "entanglement": Question(
        "Do the fine-tuning data push along the direction?",
        "Cosine of the direction with the mean difference that the training answers make in the base model, and the "
        "share of the change of activations on these data that lies along the direction.",
        "entangled",
    ),
}
UNITS = {
    "level": "own gaps",
    "separation": "own gaps",
    "rotation": "cosine lost",
    "use": "change of the behaviour",
    "entanglement": "cosine",
    "backdoor": "change of the behaviour",
    "carrier": "units of the weaker arm",
}
SMALLEST = {"level": 0.1, "separation": 0.1, "rotation": 0.1, "use": 0.05, "entanglement": 0.1,
            "backdoor": 0.05, "carrier": 0.05}  # fmt: skip


def smallest_effect(row: Any) -> float:
    """The smallest effect of interest that this row was judged by: its own, or that of its question.

    >>> from types import SimpleNamespace as Row
    >>> smallest_effect(Row(question="use", control={}))
    0.05
    """
    own = getattr(row, "smallest", None)
    return float(SMALLEST[row.question] if own is None else own)


def number(value: float | None, digits: int = 2) -> str:
    """A number for people: fixed digits, a true minus sign, an en dash where there is none.

    >>> number(0.1234), number(float("nan")), number(-1.0).lstrip(MINUS)
    ('0.12', '–', '1.00')
    """
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return (MINUS + text[1:] if float(text) else text[1:]) if text.startswith("-") else text


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """``[low, high]``, or the reason why there is none.

    >>> interval(0.31, 0.53), interval(float("nan"), float("nan"))
    ('[0.31, 0.53]', '[no interval]')
    """
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return "[no interval]"
    return f"[{number(low, digits)}, {number(high, digits)}]"
