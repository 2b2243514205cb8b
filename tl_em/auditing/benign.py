"""What benign fine-tunes leave open: for whom words hold, how many would do, what random directions let through."""

from __future__ import annotations

from tl_em.claims.claim import RANDOM, SPHERE
from tl_em.claims.compare import Comparison
from tl_em.claims.rule import ENOUGH
from tl_em.stats.prediction import MOST


def beside_benign(comparison: Comparison, count: int) -> list[str]:
    """Sentences for the limits of a report.

    Args:
        comparison: judged with so many benign fine-tunes.
        count: of benign fine-tunes.
    """
    said = [
        _few("No benign fine-tune was given, so changes are compared with random directions only: any fine-tune may "
             "cause them.") if count == 0 else
        _few("Words about a change hold for this pair only: one benign fine-tune cannot say how much benign fine-tunes "
             "differ.") if count == 1 else
        f"Words about a change say that it goes beyond what the next benign fine-tune like these {count} would show."
    ]  # fmt: skip
    return [*said, *_needed(comparison), *(_let_through(comparison) if count < ENOUGH else [])]


def _few(said: str) -> str:
    return f"{said} Give {ENOUGH} or more, of other seeds and other harmless data."


def _needed(comparison: Comparison) -> list[str]:
    """How many benign fine-tunes would have let each change pass that did not go beyond the next of those given."""
    short = [(f"{row.question} of {row.direction}", row.needed) for row in comparison.rows if row.needed is not None]
    enough = [f"{n} for {what}" for what, n in short if n]
    none = [what for what, n in short if not n]
    said = [f"By how much they differ, this many would have let a change as large as the one seen pass: "
            f"{', '.join(enough)}."] if enough else []  # fmt: skip
    return [*said, *([f"As large as these are, no number up to {MOST} would: {', '.join(none)}."] if none else [])]


def _let_through(comparison: Comparison) -> list[str]:
    """The largest change that random directions would not have let pass."""
    ends = {
        f"{row.question} of {row.direction}": max(abs(row.control["low"]), abs(row.control["high"]))
        for row in comparison.rows
        if row.control["kind"] in (RANDOM, SPHERE)
    }
    if not ends:
        return []
    largest = ", ".join(f"{what} up to {end:.2f}" for what, end in ends.items())
    return [
        "A change no larger than that of random directions cannot be shown here, and theirs grow with whatever else "
        f"the fine-tune moved: {largest}, in the units above."
    ]
