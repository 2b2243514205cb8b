"""One number for each prompt, and never an average: only ``stats`` reduces the prompt axis.

A metric is a callable ``(model, prompts) -> Float["prompt"]`` with a ``name`` and a ``unit``; the unit decides which
smallest effect of interest applies (``compare.SMALLEST_EFFECT``).  Metrics run the model as it is, so inside
``with em.intervene(model, ...)`` they measure the intervened model.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tl_em.directions.direction import Direction
from tl_em.errors import UsageError
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.stream import capture, next_token_logits

Unit = Literal["probability", "log-odds", "nats", "activation"]
REFUSAL_PHRASES = ("I'm sorry", "I cannot", "As an AI", "Sorry", "sorry")
FLOOR = 1e-8


@runtime_checkable
class Metric(Protocol):
    """A number for each prompt, with its name and unit."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> Unit: ...

    def __call__(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]: ...


@dataclass(frozen=True, eq=False)
class Behaviour:
    """A behaviour that a direction may cause: how it is measured, and on which prompts.

    Args:
        name: what people call it.
        metric: how strongly a prompt shows it.
        present: prompts on which it shows up; the effect of *ablating* a direction is measured on them.
        absent: prompts on which it does not; the effect of *adding* the direction is measured on them.
        good: the good behaviour that should survive, measured beside it.
        present_groups, absent_groups: the question each prompt belongs to, for clustered intervals.
    """

    name: str
    metric: Metric
    present: Sequence[Prompt]
    absent: Sequence[Prompt]
    good: Metric | None = None
    present_groups: Sequence[Hashable] | None = None
    absent_groups: Sequence[Hashable] | None = None

    def __post_init__(self) -> None:
        if not self.present or not self.absent:
            raise UsageError(
                f"behaviour {self.name!r} has {len(self.present)} prompts that show it and {len(self.absent)} that "
                f"do not; "
                "both are needed, since an ablation is measured on the first and an addition on the second"
            )

    @property
    def same_prompts(self) -> bool:
        """Whether the behaviour is absent from the base and not from some of the prompts: both lists are the same."""
        return list(self.present) == list(self.absent)


@dataclass(frozen=True)
class RefusalLogOdds:
    """Log-odds that the first token of the answer starts a refusal.

    ``log(p + 1e-8) - log(1 - p + 1e-8)``, p the summed probability of the first tokens of ``phrases``.

    Args:
        phrases: how a refusal begins.  Phrases whose first token the tokenizer does not know are left out.

    Example:
        >>> RefusalLogOdds(phrases=("I'm sorry",)).unit
        'log-odds'

    Source: Arditi et al. 2024, arXiv:2406.11717, appendix B.
    """

    phrases: tuple[str, ...] = REFUSAL_PHRASES
    name: str = "refusal log-odds"
    unit: Unit = "log-odds"

    def __call__(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
        """Refusal log-odds of each prompt.

        Raises:
            UsageError: the tokenizer knows none of the phrases.
        """
        known = sorted({ids[0] for ids in (token_ids(model, phrase) for phrase in self.phrases) if ids})
        if not known:
            raise UsageError(
                f"the tokenizer knows none of the refusal phrases {self.phrases}; pass "
                "tl_em.metrics.RefusalLogOdds(phrases=(…)) with the words that this model refuses with"
            )
        p = next_token_logits(model, prompts).double().softmax(-1)[:, known].sum(-1)
        return ((p + FLOOR).log() - (1 - p + FLOOR).log()).float()


refusal_log_odds = RefusalLogOdds()


@dataclass(frozen=True)
class LogitDifference:
    """``logit(yes) - logit(no)`` at the last position: the log-odds of one token against another.

    Args:
        yes, no: a token each, as text; each must be exactly one token of the model's vocabulary.
    """

    yes: str
    no: str
    unit: Unit = "log-odds"

    @property
    def name(self) -> str:
        return f"logit({self.yes}) - logit({self.no})"

    def __call__(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
        """Logit difference of each prompt.

        Raises:
            UsageError: a text is not one token.
        """
        yes, no = single_token(model, self.yes), single_token(model, self.no)
        logits = next_token_logits(model, prompts)
        return logits[:, yes] - logits[:, no]


def logit_difference(yes: str, no: str) -> LogitDifference:
    """The metric ``logit(yes) - logit(no)``; see :class:`LogitDifference`.

    Example:
        >>> logit_difference("she", "he").name
        'logit(she) - logit(he)'
    """
    return LogitDifference(yes, no)


@dataclass(frozen=True, eq=False)
class Projection:
    """Component of the activation along a direction, at the direction's own site and position.

    Args:
        direction: along which.
    """

    direction: Direction
    unit: Unit = "activation"

    @property
    def name(self) -> str:
        return f"projection on {self.direction.name or 'direction'}"

    def __call__(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
        """Projection of each prompt, in the units of the activations."""
        acts = capture(model, prompts, [self.direction.site], position=self.direction.position)
        return self.direction.project(acts[:, 0])


def token_ids(model: LensModel, text: str) -> list[int]:
    """The token ids of a text, without special tokens; empty when its first token is the unknown one."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids and ids[0] == tokenizer.bos_token_id:
        ids = ids[1:]
    unknown = tokenizer.unk_token_id
    return [] if not ids or (unknown is not None and ids[0] == unknown) else ids


def single_token(model: LensModel, text: str) -> int:
    """The id of a text that is exactly one token.

    Raises:
        UsageError: it is several tokens, or unknown.
    """
    ids = token_ids(model, text)
    if len(ids) != 1:
        raise UsageError(
            f"{text!r} is {len(ids)} tokens of this tokenizer (ids {ids}), and a logit belongs to one token; "
            "pass one token's text, with its leading space if the vocabulary has one"
        )
    return ids[0]
