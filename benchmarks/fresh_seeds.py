"""The same audits on toy seeds that nothing was developed on, by the rule of this tree and by that of another one.

    python benchmarks/fresh_seeds.py train --seeds 301 302 303 304 305 --organisms organisms
    python benchmarks/fresh_seeds.py judge --seeds 301 302 303 304 305 --organisms organisms --rows now.json
    python benchmarks/fresh_seeds.py table --rows now.json --before before.json --write docs/results/organisms.md

``before.json`` is written by ``judge`` in a checkout of the tree with the other rule (``PYTHONPATH=OLD``), from the
same organisms.  Seeds 301 to 305 were named here, and the rule was committed, before any of them was trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("insecure", "secure", "educational")
ROUNDS = {
    "insecure beside secure": ("insecure", "secure"),
    "secure": ("secure", None),
    "educational": ("educational", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("train", "judge", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[301, 302, 303, 304, 305])
    parser.add_argument("--organisms", type=Path, default=Path("organisms"))
    parser.add_argument("--rows", type=Path, default=Path("rows.json"))
    parser.add_argument("--before", type=Path)
    parser.add_argument("--write", type=Path, help="a page: the table goes between its marks")
    given = parser.parse_args()
    if given.what == "table":
        told = "\n".join(table(json.loads(given.rows.read_text()), json.loads(given.before.read_text())))
        print(told)
        if given.write:
            begin, end = "<!-- fresh seeds -->", "<!-- /fresh seeds -->"
            head, rest = given.write.read_text().split(begin)
            given.write.write_text(f"{head}{begin}\n{told}\n{end}{rest.split(end)[1]}")
        return
    rows = json.loads(given.rows.read_text()) if given.rows.exists() else {}
    for seed in given.seeds:
        if given.what == "train":
            trained(seed, given.organisms)
        elif str(seed) not in rows:
            rows[str(seed)] = judged(seed, given.organisms)
            given.rows.write_text(json.dumps(rows, indent=1))


def trained(seed: int, out: Path) -> dict[str, Any]:
    """The organisms of one seed, made where they are not in the folder."""
    import tl_em as em

    train = getattr(em, "train_organism", None) or em.organisms.train_organism
    return {name: train(name, seed=seed, out=out) for name in NAMES}


def judged(seed: int, out: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each audit of one seed, as in ``report.json``."""
    import tl_em as em

    pairs = trained(seed, out)
    told = {}
    for said, (name, benign) in ROUNDS.items():
        report = em.audit(pairs[name], benign=None if benign is None else pairs[benign])
        told[said] = [row.to_json() for row in report.verdicts]
    return told


def table(now: dict[str, Any], before: dict[str, Any]) -> Iterator[str]:
    """One line a question and direction: its words in each seed, where the rules give the same and where not."""
    yield "| audit | question | direction | " + " | ".join(now) + " |"
    yield "|---|---|---|" + "---|" * len(now)
    for said in ROUNDS:
        words = [{(r["question"], r["direction"]): r["verdict"] for r in rows[said]} for rows in now.values()]
        old = [{(r["question"], r["direction"]): r["verdict"] for r in before[seed][said]} for seed in now]
        for key in dict.fromkeys(key for each in (*words, *old) for key in each):
            cells = [
                both(new.get(key, "not asked"), was.get(key, "not asked")) for new, was in zip(words, old, strict=True)
            ]
            if set(cells) != {"–"}:
                yield f"| {said} | {key[0]} | {key[1]} | {' | '.join(cells)} |"


def both(new: str, old: str) -> str:
    """The word; the old one before it where it is another."""
    new, old = ("–" if word == "not shown" else word for word in (new, old))
    return new if new == old else f"{old} → **{new}**"


if __name__ == "__main__":
    main()
