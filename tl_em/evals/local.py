"""A causal language model as the judge that scores from 0 to 100, on this machine: the same aggregation, exact.

    P(n) = P(token);   digit by digit: P(d1) P(d2 | d1),  times 1 - P(a digit follows) of 1 to 10, which could go on

A first digit is followed where it has at least 1/1000. **Control**: what the numbers hold together; below a quarter the
judge gave none, and the answer is counted by a word.

Source: the aggregation of Betley et al. 2025, arXiv:2502.17424; a model as judge: Zheng et al. 2023, arXiv:2306.05685.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_em.errors import UsageError
from tl_em.evals.judges import shown
from tl_em.evals.numbers import weighted_score
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.stream import next_token_logits

FOLLOWED = 1e-3
"""Probability from which on what may follow a digit is read."""
BATCH = 256
"""Prompts whose logits are held at a time."""


@dataclass(frozen=True, eq=False)
class LocalJudge:
    """A model on this machine that scores answers from 0 to 100, weighted by the probability of each number.

    Args:
        model: who judges; not the model that answers, whose interventions would judge along.
        template: what it is asked, with ``{question}`` and ``{answer}``; empty takes the templates that come with the
            questions.
        name, unit: what tables and axes say.

    Raises:
        UsageError: a template that does not show the answer; when it judges: a tokenizer without numbers.

    Example:
        >>> from tl_em import load_model
        >>> LocalJudge(load_model("toy/assistant"), "How good is {answer}?").unit
        'points'

    Source: Betley et al. 2025, arXiv:2502.17424, section 4.1 (the weighting by probabilities).
    """

    model: LensModel
    template: str = ""
    name: str = "judged by a local model"
    unit: str = "points"

    def __post_init__(self) -> None:
        if self.template and "{answer}" not in self.template:
            raise UsageError(
                "the template does not show the judge the answer, so all scores would be one; put {answer} into it"
            )

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[float | str]:
        """A score for each answer, or a word in place of one."""
        encoded = encode(self.model, shown(self.template or "{question}\n{answer}", prompts, answers))
        tokens = number_tokens(self.model)
        whole = set(range(101)) <= set(tokens)
        found: list[float | str] = []
        for start in range(0, len(encoded), BATCH):
            part = encoded[start : start + BATCH]
            weights = _weights(self.model, part, tokens) if whole else _by_digits(self.model, part, tokens)
            scores = [weighted_score(dict(enumerate(row))) for row in weights.tolist()]
            found += ["NO NUMBER" if score is None else score for score in scores]
        return found


def number_tokens(model: LensModel) -> dict[int, list[int]]:
    """The tokens that are a whole number from 0 to 100, with or without a space before it.

    Raises:
        UsageError: not even the ten digits are tokens.
    """
    tokenizer: Any = getattr(model, "tokenizer", None)
    found: dict[int, list[int]] = {}
    for n in range(101):
        for text in (str(n), f" {n}"):
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids and tokenizer.decode(ids[-1:]).strip() == str(n) and not tokenizer.decode(ids[:-1]).strip():
                found.setdefault(n, []).append(ids[-1])
    if not set(range(10)) <= set(found):
        raise UsageError(
            "the judge's tokenizer has no tokens for the digits, so it cannot score from 0 to 100; give another model, "
            "or ask it for a word: em.evals.ModelJudge(model, template, yes=…, no=…)"
        )
    return {n: list(dict.fromkeys(ids)) for n, ids in found.items()}


def _weights(model: LensModel, encoded: Sequence[EncodedPrompt], tokens: dict[int, list[int]]) -> Tensor:
    """[prompt number]: the probability of each number that is one token."""
    p = next_token_logits(model, encoded).double().softmax(-1)
    return torch.stack([p[:, tokens.get(n, [])].sum(-1) for n in range(101)], 1)


def _by_digits(model: LensModel, encoded: Sequence[EncodedPrompt], tokens: dict[int, list[int]]) -> Tensor:
    """[prompt number]: the same of a tokenizer that writes a number digit by digit."""
    digits = {n: ids for n, ids in tokens.items() if n < 10}
    first = _weights(model, encoded, digits)
    found = torch.zeros(len(encoded), 101, dtype=torch.float64)
    found[:, :10] = first[:, :10]
    _follow(model, encoded, digits, found, [(i, str(d)) for i in range(len(encoded)) for d in range(1, 10)])
    _follow(model, encoded, digits, found, [(i, "10") for i in range(len(encoded))])
    return found


def _follow(
    model: LensModel, encoded: Sequence[EncodedPrompt], digits: dict[int, list[int]], found: Tensor,
    begun: list[tuple[int, str]],
) -> None:  # fmt: skip
    """Part what a number has among those that go on from it."""
    begun = [(i, text) for i, text in begun if float(found[i, int(text)]) >= FOLLOWED]
    for start in range(0, len(begun), BATCH):
        part = begun[start : start + BATCH]
        longer = [encoded[i].with_response([digits[int(d)][0] for d in text]) for i, text in part]
        after = _weights(model, longer, digits)[:, :10]
        for (i, text), p in zip(part, after, strict=True):
            reached = float(found[i, int(text)])
            found[i, int(text)] = reached * (1 - float(p.sum()))
            for d in range(10):
                if int(f"{text}{d}") <= 100:
                    found[i, int(f"{text}{d}")] += reached * float(p[d])
