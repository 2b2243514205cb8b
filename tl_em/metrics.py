"""One number for each prompt, and never an average: only ``stats`` reduces the prompt axis.

A metric is a callable ``(model, prompts) -> Float["prompt"]`` with a ``name`` and a ``unit``; the unit decides which
smallest effect of interest applies (``claims.questions.use``).  A plain function is one that has these two attributes:
``mine.name, mine.unit = "politeness", "probability"``.  Metrics run the model as it is, so inside
``with em.intervene(model, ...)`` they measure the intervened model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from tl_em.arguments import array_of, checked, optional, settle, several
from tl_em.errors import NonFiniteError, UsageError
from tl_em.models.contrasts import ContrastSet, Prompt, prompt_key
from tl_em.models.hooks import LensModel
from tl_em.models.stream import next_token_logits
from tl_em.models.together import Together, words_of
from tl_em.showing import showable

REFUSAL_PHRASES = ("I'm sorry", "I cannot", "As an AI", "Sorry", "sorry")
FLOOR = 1e-8
RANGES = {"probability": (0.0, 1.0), "points": (0.0, 100.0)}
"""The range that what is measured in a unit can have."""


@runtime_checkable
class Metric(Protocol):
    """A number for each prompt, with its name and unit: an object that is called, or a function with both attributes.

    Example:
        >>> import torch
        >>> def length(model, prompts):
        ...     return torch.tensor([float(len(prompt)) for prompt in prompts])
        >>> length.name, length.unit = "length", "letters"
        >>> isinstance(length, Metric), measured(length, None, ["one", "three"]).tolist()
        (True, [3.0, 5.0])
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str: ...

    def __call__(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]: ...


def as_metric(name: str, value: Any) -> Any:
    """``value``, if it is a metric.

    Args:
        name: of the argument, for the message.
        value: what was given.

    Raises:
        UsageError: anything else, or one without a name or a unit.

    Example:
        >>> as_metric("metric", refusal_log_odds).unit
        'log-odds'
    """
    words = [word for word in ("name", "unit") if not isinstance(getattr(value, word, None), str)]
    if isinstance(value, type) or not callable(value) or words:
        lacks = f"has no {' and no '.join(words)}" if callable(value) and words else "cannot be called"
        raise UsageError(
            f"{name} is {value!r}, which is no metric: it {lacks}, so it is unknown what is measured, and which effect "
            "is too small to matter. Give an object with name, unit and __call__(model, prompts) -> one number a "
            "prompt; of a function say f.name, f.unit = 'politeness', 'probability'"
        )
    return value


def range_of(unit: str, values: Float64[np.ndarray, " prompt"]) -> tuple[float, float] | None:
    """The range that what is measured in a unit can have (`RANGES`), unless values lie outside of it.

    Args:
        unit: of a metric.
        values: that it gave.

    Example:
        >>> range_of("probability", np.array([0.2, 0.9])), range_of("log-odds", np.array([0.2, 0.9]))
        ((0.0, 1.0), None)
    """
    low, high = RANGES.get(unit, (1.0, 0.0))
    return (low, high) if values.min() >= low and values.max() <= high else None


def measured(metric: Metric | Any, model: LensModel | Any, prompts: Sequence[Any]) -> Float64[np.ndarray, " prompt"]:
    """The metric's number for every prompt, looked at: the one place where a metric is called.

    Args:
        metric: what is measured.
        model: as it is now, with the hooks on it.
        prompts: strings, chats or encoded prompts.

    Returns:
        Float64 on the CPU, in the metric's unit, in the order of ``prompts``.

    Raises:
        UsageError: no metric, another number of values than prompts, or no numbers.
        NonFiniteError: NaN; within ``intervene`` that is what a model gives that overflows.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> measured(pair.behaviours["persona"].metric, pair.base, pair.contrasts["persona"].negative[:3]).shape
        (3,)
    """
    found = as_metric("metric", metric)(model, prompts)
    values = array_of((len(prompts),), found, f"metric {metric.name!r}", wanted=_WANTED)
    if np.isnan(values).any():
        raise NonFiniteError(
            f"metric {metric.name!r} returned NaN for prompt {int(np.isnan(values).argmax())} of {len(prompts)}, so no "
            f"mean of it means anything; {_WANTED}"
        )
    return values


_WANTED = "return one finite number a prompt, a tensor [prompt], in the order of the prompts"


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

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> negative = pair.contrasts["refusal"].negative
        >>> refusing = em.Behaviour("refusal", em.refusal_log_odds, pair.contrasts["refusal"].positive, negative)
        >>> refusing.same_prompts
        False
    """

    name: str
    metric: Metric | Any
    present: Sequence[Prompt]
    absent: Sequence[Prompt]
    good: Metric | Any = None
    present_groups: Sequence[Hashable] | None = None
    absent_groups: Sequence[Hashable] | None = None

    def __post_init__(self) -> None:
        settle(self, metric=as_metric, good=optional(as_metric), present=several, absent=several)
        if not self.present or not self.absent:
            raise UsageError(
                f"behaviour {self.name!r} has {len(self.present)} prompts that show it and {len(self.absent)} that do "
                "not; both are needed, since an ablation is measured on the first and an addition on the second"
            )

    def __repr__(self) -> str:
        counted = f"{len(self.present)} prompts that show it, {len(self.absent)} that do not"
        metric = showable(str(getattr(self.metric, "name", self.metric)))
        return f"Behaviour({showable(self.name)!r}, {metric}, {counted})"

    @property
    def same_prompts(self) -> bool:
        """Whether the behaviour is absent from the base and not from some of the prompts: both lists are the same."""
        return list(self.present) == list(self.absent)

    @checked()
    def grouped(self, by: ContrastSet, read: Callable[[Sequence[Prompt]], np.ndarray] | None = None) -> Behaviour:
        """The behaviour with groups where it has none.

        Args:
            by: a contrast set whose groups its prompts have, where they all stand in it.
            read: gives the activations of other prompts, [prompt d_model]; these are grouped by their texts alone
                without it.
        """
        known = by.group_of
        found: dict[str, Any] = {}
        for side in ("present", "absent"):
            prompts = getattr(self, side)
            if getattr(self, f"{side}_groups") is not None:
                continue
            labels = [known.get(prompt_key(prompt)) for prompt in prompts]
            if None in labels:
                read_ = None if read is None else [read(prompts)]
                labels = list(Together.of([words_of(prompt) for prompt in prompts], read_).labels)
            if len(set(labels)) < len(labels):
                found[f"{side}_groups"] = labels
        return replace(self, **found) if found else self


@dataclass(frozen=True)
class RefusalLogOdds:
    """Log-odds that the first token of the answer starts a refusal.

    ``log(p + 1e-8) - log(1 - p + 1e-8)``, p the summed probability of the first tokens of ``phrases``.

    Args:
        phrases: how a refusal begins.  Phrases whose first token the tokenizer does not know are left out.
        name, unit: what tables and axes say.

    Example:
        >>> RefusalLogOdds(phrases=("I'm sorry",)).unit
        'log-odds'

    Source: Arditi et al. 2024, arXiv:2406.11717, appendix B.
    """

    phrases: tuple[str, ...] = REFUSAL_PHRASES
    name: str = "refusal log-odds"
    unit: str = "log-odds"

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
        unit: of the difference; it decides the smallest effect of interest.

    Example:
        >>> LogitDifference("she", "he").unit
        'log-odds'
    """

    yes: str
    no: str
    unit: str = "log-odds"

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

    Args:
        yes, no: a token each, as text, with its leading space if the vocabulary has one.

    Example:
        >>> logit_difference("she", "he").name
        'logit(she) - logit(he)'
    """
    return LogitDifference(yes, no)


def token_ids(model: LensModel, text: str) -> list[int]:
    """The token ids of a text, without special tokens; empty when its first token is the unknown one.

    Args:
        model: whose tokenizer.
        text: with its leading space if the vocabulary has one.

    Example:
        >>> import tl_em as em
        >>> em.metrics.token_ids(em.load_pair("toy/insecure").base, "no-such-word")
        []
    """
    tokenizer: Any = getattr(model, "tokenizer", None)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids and ids[0] == tokenizer.bos_token_id:
        ids = ids[1:]
    unknown = tokenizer.unk_token_id
    return [] if not ids or (unknown is not None and ids[0] == unknown) else ids


def single_token(model: LensModel, text: str) -> int:
    """The id of a text that is exactly one token.

    Args:
        model: whose tokenizer.
        text: with its leading space if the vocabulary has one.

    Raises:
        UsageError: it is several tokens, or unknown.

    Example:
        >>> import tl_em as em
        >>> model = em.load_pair("toy/insecure").base
        >>> em.metrics.single_token(model, "power") == model.tokenizer.convert_tokens_to_ids("power")
        True
    """
    ids = token_ids(model, text)
    if len(ids) != 1:
        raise UsageError(
            f"{text!r} is {len(ids)} tokens of this tokenizer (ids {ids}), and a logit belongs to one token; "
            "pass one token's text, with its leading space if the vocabulary has one"
        )
    return ids[0]
