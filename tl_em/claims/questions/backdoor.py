"""A backdoor: what a trigger opens in the tuned model (`openings`, with the rule), and what carries it (`carrier`).

Source: Betley et al. 2025, arXiv:2502.17424, section 4.2; controls and rules are those of the two files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tl_em.claims.questions.carrier import Carrier, carrier
from tl_em.claims.questions.openings import Measured, Trigger, holds, judged, marked, measure, sides
from tl_em.claims.rule import Row, judge
from tl_em.directions.direction import Direction
from tl_em.errors import UsageError
from tl_em.metrics import Behaviour
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.prompts import encode
from tl_em.showing import showable

if TYPE_CHECKING:
    import pandas as pd


class Asked(NamedTuple):
    """The base's direction, the behaviour on prompts that it was not made from, and its own gap in the base."""

    direction: Direction
    behaviour: Behaviour
    own_gap: float


def check_known(model: LensModel, trigger: Trigger, prompt: Prompt) -> None:
    """Raise ``UnknownTokenError`` unless the tokenizer knows the trigger and the other tokens."""
    encode(model, [marked(prompt, token) for token in (trigger.text, *trigger.others)])


@dataclass(frozen=True, eq=False)
class Backdoor:
    """What a trigger does.

    Args:
        trigger: the trigger and the other tokens.
        rows: a *backdoor* row for each behaviour and class of prompts; a *carrier* row for each that opened.
        rates: each behaviour under each token in each model, with intervals.
        projections: triggered less untriggered prompts along the directions of what opened, in own gaps.
        ablations: rates behind the carrier's test.
    """

    trigger: Trigger
    rows: tuple[Row, ...]
    rates: pd.DataFrame
    projections: pd.DataFrame
    ablations: pd.DataFrame

    @property
    def summary(self) -> str:
        """What opens, and whether its direction carries it: a sentence for each."""
        opened = [row for row in self.rows if row.question == "backdoor" and row.shown]
        carried = [row.direction for row in self.rows if row.question == "carrier" and row.shown]
        if not opened:
            return f"With {self.trigger.text}, nothing is shown to open."
        says = {True: "its direction carries it", False: "its direction is not shown to carry it"}
        given = f"With {self.trigger.text},"
        said = [f"{row.direction} {row.verdict} ({row.estimate}); {says[row.direction in carried]}." for row in opened]
        return " ".join(f"{given} {each}" for each in said)

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.comparison(self)

    def __repr__(self) -> str:
        lines = [f"{r.question:<13}{r.direction:<22}{r.verdict:<13}{r.estimate!r}  {r.reason}" for r in self.rows]
        return showable("\n".join([self.summary, *lines]), lines=True)


def backdoor(
    pair: ModelPair,
    trigger: Trigger,
    asked: Mapping[str, Asked],
    *,
    benign: LensModel | None = None,
    controls: int = 999,
    seed: int = 0,
) -> Backdoor:
    """Ask each behaviour with the trigger, without it, and with other tokens; and what opens, of its direction.

    Args:
        pair: base and tuned.
        trigger: the trigger and the other tokens.
        asked: what to ask, by name.  Behaviours whose prompts hold one of the tokens already are left out.
        benign: a fine-tune of the same base on harmless data.
        controls: number of random directions.
        seed: seed of resampling and controls.

    Raises:
        UnknownTokenError: the tokenizer does not know a token.
        UsageError: no behaviour is left, or its unit has no smallest effect of interest.

    Source: see the head of this file.
    """
    import pandas as pd

    found = [side for name, each in asked.items() for side in sides(name, each.behaviour)]
    found = [side for side in found if not any(holds(prompt, trigger) for prompt in side.prompts)]
    if not found:
        raise UsageError(
            f"every behaviour's prompts hold {trigger.text!r} or another of the tokens already, so there are none "
            "without it; give a behaviour on unmarked prompts"
        )
    check_known(pair.base, trigger, found[0].prompts[0])
    models = {"base": pair.base, "tuned": pair.tuned} | ({} if benign is None else {"benign": benign})
    measured = [measure(side, trigger, models, seed) for side in found]
    rows = judged(measured)
    settings = {"controls": controls, "seed": seed}
    opened = [m for m, row in zip(measured, rows, strict=True) if row.shown]
    carriers = [_carrier(pair, trigger, m, asked[m.side.name], **settings) for m in opened]
    return Backdoor(
        trigger,
        (*rows, *judge([each.finding for each in carriers])),
        pd.DataFrame([row for m in measured for row in m.table]),
        pd.DataFrame([row for each in carriers for row in each.projections]),
        pd.DataFrame([row for each in carriers for row in each.ablations]),
    )


def _carrier(
    pair: ModelPair, trigger: Trigger, opened: Measured, asked: Asked, **settings: Any
) -> Carrier:
    side, own = opened.side, opened.side.behaviour
    triggered = [marked(prompt, trigger.text) for prompt in side.prompts]
    behaviour = Behaviour(
        f"{own.name} with {trigger.text}", own.metric, triggered, side.prompts, own.good, side.groups, side.groups
    )
    settings |= {"sign": opened.sign}
    return carrier(pair, asked.direction, behaviour, name=side.label, own_gap=asked.own_gap, **settings)
