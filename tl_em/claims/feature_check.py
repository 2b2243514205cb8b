"""What a verification found: a row for each treatment, with its verdict beside its controls.

Every effect stands beside the band that holds 95 % of its placebos' effects. A set's verdict is made of the words of
its own rows, removed and induced; the rule that gives them is at the head of ``claims.questions.latents``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from tl_em.arguments import checked
from tl_em.claims.claim import NOT_SHOWN
from tl_em.dictionaries.dictionary import Dictionary
from tl_em.errors import UsageError
from tl_em.showing import plain_rows, showable
from tl_em.stats import Estimate

ArmName = Literal["remove", "induce"]
SET, DIRECTION = "the set", "mean difference"
WORDS: dict[str, str] = {"remove": "carries the behaviour", "induce": "induces the behaviour"}
BESIDE = "beside"


@dataclass(frozen=True, eq=False)
class CheckRow:
    """One treatment of the latents, judged.

    Args:
        arm: ``"remove"`` (in the tuned model) or ``"induce"`` (in the base).
        subject: ``"the set"``, ``"latent 17"``, or ``"mean difference"``, which is not judged.
        verdict: the word that the rule gives, or ``"not shown"``; of the mean difference ``"beside"``.
        effect: the change of the behaviour in the direction that the claim predicts, in the metric's units.
        kl: KL from the untreated model at the last token, in nats.
        control: what the placebos are, how many, the band that holds 95 % of their effects, and p.
        p: adjusted p.
        changes: of the good behaviour and the coherence, where they are measured.
        reason: what holds, or what does not.
    """

    arm: str
    subject: str
    verdict: str
    effect: Estimate
    kl: Estimate
    control: Mapping[str, Any]
    p: float
    changes: Mapping[str, Estimate]
    reason: str

    @property
    def shown(self) -> bool:
        """Whether the rule gave a word."""
        return self.verdict in WORDS.values()


@dataclass(frozen=True, eq=False)
class FeatureCheck:
    """What verifying a latent, or a set of latents, found: a row each, its verdict, and what it was judged by.

    Args:
        dictionary, indices: which latents, of which dictionary.
        label: what was asked, for people.
        rows: one for each treatment, with its verdict.
        rates: behaviour untreated and treated, of every treatment and of the placebos.
        doses: dose-response of the set, and the mean difference at the same KL.
        match: mean density and decoder norm of the latents and of their placebos.
        settings: what was treated how.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> sae, whole = em.organisms.toy_dictionary("toy/insecure"), pair.contrasts["persona"]
        >>> persona = em.ContrastSet(whole.positive[:16], whole.negative[:16])
        >>> options = dict(metric=pair.behaviours["persona"].metric, placebos=19, singly=False, doses=())
        >>> check = em.verify_feature(pair.tuned, sae.feature(176), persona, **options)
        >>> check.verdict
        'not shown'
    """

    dictionary: Dictionary
    indices: tuple[int, ...]
    label: str
    rows: tuple[CheckRow, ...]
    rates: pd.DataFrame
    doses: pd.DataFrame
    match: Mapping[str, float]
    settings: Mapping[str, Any]

    @checked()
    def row(self, arm: str = "remove", subject: str = SET) -> CheckRow:
        """The row of a treatment.

        Raises:
            UsageError: there is none.
        """
        for each in self.rows:
            if (each.arm, each.subject) == (arm, subject):
                return each
        known = ", ".join(f"({r.arm!r}, {r.subject!r})" for r in self.rows)
        raise UsageError(f"no treatment ({arm!r}, {subject!r}) was measured; there are {known}")

    @property
    def verdict(self) -> str:
        """What is shown of the set."""
        words = [row.verdict for row in self.rows if row.subject == SET and row.shown]
        return " and ".join(words).replace(" the behaviour and", " and") or NOT_SHOWN

    @property
    def shown(self) -> bool:
        """Whether the set is shown to carry the behaviour."""
        return self.row().shown

    def to_pandas(self) -> pd.DataFrame:
        """One row a treatment."""
        return pd.DataFrame([_plain(row) for row in self.rows])

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a report."""
        frames = {"rows": self.to_pandas(), "rates": self.rates, "doses": self.doses}
        tables = {name: plain_rows(frame) for name, frame in frames.items()}
        head = {"label": self.label, "dictionary": self.dictionary.label, "hash": self.dictionary.hash}
        return {**head, "indices": list(self.indices), "verdict": self.verdict, **tables,
                "match": dict(self.match), "settings": dict(self.settings)}  # fmt: skip

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.listed(self, f"{self.label}: {self.verdict}")

    def __repr__(self) -> str:
        lines = [f"{self.label}: {self.verdict}"]
        for row in self.rows:
            band = "; placebos [{low:.2f}, {high:.2f}]".format(**row.control) if row.control else ""
            others = "".join(f"; {name} {change.value:+.2f}" for name, change in row.changes.items())
            lines.append(f"  {row.arm} {row.subject}: {row.verdict}, {row.effect}{band}{others} ({row.reason})")
        return showable("\n".join(lines), lines=True)


def _plain(row: CheckRow) -> dict[str, Any]:
    e, c = row.effect, row.control
    placebos = {"placebo_low": c.get("low"), "placebo_high": c.get("high"), "placebos": c.get("n")}
    plain = {"arm": row.arm, "subject": row.subject, "verdict": row.verdict, "effect": e.value, "low": e.low,
             "high": e.high, "n": e.n, **placebos, "p": row.p, "kl": row.kl.value}  # fmt: skip
    plain |= {f"{name}_change": change.value for name, change in row.changes.items()}
    return plain | {"reason": row.reason}
