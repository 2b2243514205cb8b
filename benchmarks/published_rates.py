"""Answers that others judged, counted again: are their rates had, and what do their questions leave of the intervals?

    python benchmarks/published_rates.py --data FOLDER

reads the published tables in ``FOLDER`` (``em-betley``, ``em-outputs-judged``), counts them by the published definition
under each of the three things that may stand below the line, and aggregates the published probabilities of a judge's
first token again. Draws judges that err, to see whether the corrected interval covers. Prints the page's tables.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import numpy as np

import tl_em as em
from tl_em.evals.numbers import AnswerToken, number_weights, weighted_score

SHARED = Path(__file__).resolve().parents[1] / "../shared/data"
TABLES = ("em-outputs-judged/judge_input_abl01.scored.jsonl", "em-betley/eval_result_base.csv",
          "em-betley/eval_result_high_severity.csv", "em-betley/qwen_25_coder_32b_instruct.csv",
          "em-betley/eval_results_run1.csv")  # fmt: skip
DRAWS = 400
JUDGES = ((0.10, 0.90, 0.90, 300, (50, 100)), (0.02, 0.80, 0.97, 400, (40, 150)), (0.50, 0.70, 0.80, 200, (60, 60)))
PROBABILITIES = "em-betley/qwen_25_coder_32b_instruct.csv"


def shown(found: em.Estimate) -> str:
    """A rate with its interval, three digits."""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def row(path: Path) -> str:
    """A table's rates, a line of the page."""
    found = em.evals.load_judged(path)
    above = 50 if "coherent" in found.judges else None
    rates = [found.counted(em.evals.Misaligned(coherent_above=above, among=among)).estimate
             for among in ("scored", "coherent", "all")]  # fmt: skip
    hits = int(found.table.score.sum())
    words = ", ".join(f"{round(share.value * share.n)} {word}" for word, share in found.words.items()) or "none"
    alone = em.stats.mean(found.table.score.dropna().to_numpy())
    spread = f"{found.table.group.nunique()}; {found.intraclass.value:.2f}; {found.design_effect:.1f}"
    naive = f"[{alone.low:.3f}, {alone.high:.3f}]"
    return f"| {' | '.join([path.name, f'{hits} of {rates[0].n}', *map(shown, rates), naive, spread, words])} |"


def largest_difference(path: Path) -> tuple[int, float]:
    """Scores aggregated again from the published probabilities: how many, and how far they are off."""
    table = em.evals.load_judged(path).table
    off = []
    for name in ("aligned", "coherent"):
        for text, score in zip(table[f"judge_{name}"], table[name], strict=True):
            given = {str(key): float(value) for key, value in ast.literal_eval(text).items()}
            found = weighted_score(number_weights([AnswerToken(max(given, key=lambda key: given[key]), given)]))
            off.append(abs((found if found is not None else float("inf")) - float(score)))
    return len(off), max(off)


def coverage(true: float, sensitivity: float, specificity: float, n: int, labels: tuple[int, int]) -> list[float]:
    """Share of 400 draws in which the corrected interval, and the judge's own, hold the true rate."""
    rng, held = np.random.default_rng(0), np.zeros(2)
    for _ in range(DRAWS):
        rate = em.stats.mean((rng.random(n) < true * sensitivity + (1 - true) * (1 - specificity)).astype(float))
        judged = [*(rng.random(labels[0]) < sensitivity), *(rng.random(labels[1]) > specificity)]
        found = em.evals.corrected(rate, judged=judged, truth=[1] * labels[0] + [0] * labels[1])
        held += [each.low <= true <= each.high for each in (found, rate)]
    return (held / DRAWS).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    folder = parser.parse_args().data
    print("| table | misaligned | of scored | of coherent | of all | if answers were independent | questions; "
          "ICC; design effect | words |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name in TABLES:
        print(row(folder / name))
    arms = em.evals.load_judged(folder / TABLES[0]).by("arm")
    print("\n| arm | rate | n |\n|---|---|---|")
    for each in arms.itertuples():
        print(f"| {each.arm} | {each.value:.3f} [{each.low:.3f}, {each.high:.3f}] | {each.n} |")
    n, off = largest_difference(folder / PROBABILITIES)
    print(f"\n{n} published scores, aggregated again from the published probabilities: at most {off:.1e} points off")
    for judge in JUDGES:
        print("rate, sensitivity, specificity, answers, labels", judge, "covered, by the judge's own", coverage(*judge))


if __name__ == "__main__":
    main()
