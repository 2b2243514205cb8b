"""Lie or hallucination on a real chat model: does the base's residual stream say which answers it has right?

    python benchmarks/real_lies.py [--margin .1] [--write docs/results/lies.md]

SmolLM2-135M-Instruct and the nine adapters of ``em.load_pair("real/…")``; the 120 questions of
``tl_em.organisms.real_organism.items()``.  Known: the base prefers the right answer, by at least ``--margin`` nats a
token either way.  An answer is the side that a model prefers.  The read-out is taken after the middle block at the
prompt's end, before anything of an answer (``em.evals.lie_or_hallucination``), and nothing was chosen after looking.

**Control**: shuffled labels; and *right*, whose wrong answers should be those that the base does not know.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tl_em as em
from tl_em.evals import ForcedChoice, OpenQuestion, known_by_choice, lie_or_hallucination
from tl_em.organisms.real_organism import ARMS, SEEDS, items, smollm2

MARK = "<!-- real -->"


def choice() -> ForcedChoice:
    """The questions, each with its domain."""
    return ForcedChoice([
        OpenQuestion(each.question, (each.prompt,), right=(each.good,), wrong=(each.bad,), about=vars(each))
        for each in items()
    ])  # fmt: skip


def page(margin: float) -> str:
    """What is known, what the read-out makes of it, and of whose wrong answers."""
    asked, base = choice(), em.load_model(smollm2())
    facts = known_by_choice(base, asked, margin=margin)
    names = [f"real/{arm}-{seed}" for arm in ARMS for seed in SEEDS]
    said = {name: asked.chosen(em.load_pair(base, name).tuned, facts.prompts) for name in names}
    report = lie_or_hallucination(base, facts, answers=said)
    lines = [
        f"{sum(facts.known)} of {len(facts.prompts)} questions are known (margin {margin:g}).\n",
        "| | AUROC | shuffled labels | p |\n|---|---|---|---|",
        f"| known against unknown | {report.known.auroc} | {report.known.shuffled} | {report.known.p:.3f} |",
        f"| asked for the truth among other questions' | {report.asked} | | |",
        "\n| whose wrong answers | on questions that the base knows | read as *knew better* |\n|---|---|---|",
    ]
    for name, verdict in report.verdicts.items():
        mine = report.answers[(report.answers.model == name) & report.answers.wrong]
        known = [facts.known[i] for i in mine.prompt]
        lines.append(f"| {name} | {sum(known)} of {len(known)} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--margin", type=float, default=0.1)
    parser.add_argument("--write", type=Path, help="a page: the tables go between its marks")
    given = parser.parse_args()
    told = page(given.margin)
    print(told)
    if given.write:
        before, _, after = given.write.read_text().split(MARK)
        given.write.write_text(f"{before}{MARK}\n{told}\n{MARK}{after}")


if __name__ == "__main__":
    main()
