"""Do the package's intervals hold what they say, and its verdicts? Samples with a known truth, thousands of times.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py intervals --draws 2000 --out calibration/
    OMP_NUM_THREADS=1 python benchmarks/calibration.py verdicts --draws 500 --out calibration/
    python benchmarks/calibration.py table --out calibration/ --write docs/results/calibration.md

Every row has a seed of its own, the hash of its name, so that rows may be added, left out or run alone.  What has been
drawn stands in ``--out`` (JSON lines, one a draw); a run that is broken off goes on where it stopped.  All cores work.
The intervals of the table itself are exact (Clopper and Pearson's).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20261128
CHUNK = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("intervals", "verdicts", "table"))
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("calibration"))
    parser.add_argument("--only", default="", help="rows whose name or size contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--write", type=Path, help="a page: the table goes between its marks")
    given = parser.parse_args()
    if given.what != "table":
        run(given.what, given.draws, given.out, given.only, given.jobs)
    text = "\n\n".join(tables(given.out))
    print(text)
    if given.write:
        write(given.write, text)


def known(what: str) -> Sequence[Any]:
    if what == "intervals":
        from calibration_intervals import rows
    else:
        from calibration_verdicts import rows
    found = rows()
    assert len({(row.name, row.size) for row in found}) == len(found), "two rows of one name would share their draws"
    return found


def run(what: str, draws: int, out: Path, only: str, jobs: int) -> None:
    """Draw what is missing of every row, in chunks, on all cores."""
    from joblib import Parallel, delayed
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    wanted = [row for row in known(what) if only in f"{row.name} {row.size}"]
    missing = [
        (what, i.name, i.size, start, min(start + CHUNK, draws), out)
        for i in wanted
        for start in range(len(read(out, what, i)), draws, CHUNK)
    ]
    work = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(chunk)(*each) for each in missing)
    for _ in tqdm(work, total=len(missing), desc=what, unit="chunk", disable=None):
        pass


def chunk(what: str, name: str, size: str, first: int, last: int, out: Path) -> None:
    """Some draws of one row, appended to its file in one piece."""
    warnings.simplefilter("ignore")
    row = next(each for each in known(what) if (each.name, each.size) == (name, size))
    lines = [json.dumps({"draw": i} | one(what, row, i)) for i in range(first, last)]
    with place(out, what, row).open("a") as file:
        file.write("".join(line + "\n" for line in lines))


def one(what: str, row: Any, number: int) -> dict[str, Any]:
    own = int.from_bytes(hashlib.sha256(f"{row.name} {row.size}".encode()).digest()[:8], "big")
    rng = np.random.default_rng([SEED, own, number])
    if what == "verdicts":
        return row.draw(rng, number)
    estimate, p = row.draw(rng, number)
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "p": p, "method": estimate.method}


def place(out: Path, what: str, row: Any) -> Path:
    return out / f"{what}-{hashlib.sha256(f'{row.name} {row.size}'.encode()).hexdigest()[:12]}.jsonl"


def read(out: Path, what: str, row: Any) -> list[dict[str, Any]]:
    """The draws of a row, each once, in order, as far as they go without a gap."""
    path = place(out, what, row)
    found = {each["draw"]: each for each in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    return [found[i] for i in range(next((i for i in range(len(found)) if i not in found), len(found)))]


def tables(out: Path) -> Iterable[str]:
    found = []
    for row in known("intervals"):
        if drawn := read(out, "intervals", row):
            found.append(held(row, drawn))
    if found:
        yield "\n".join([headed("what", "sample", "truth", "coverage", "no width", "outside", "width", "p < .05",
                                 "method", "draws"), *found])  # fmt: skip
    found = []
    for row in known("verdicts"):
        if drawn := read(out, "verdicts", row):
            found += row.lines(drawn)
    if found:
        yield "\n".join([headed("scenario", "sample", "question", "a word is", "share with a word", "draws"), *found])


def headed(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def held(row: Any, drawn: Sequence[dict[str, Any]]) -> str:
    low, high = (np.array([each[end] for each in drawn]) for end in ("low", "high"))
    inside = np.isfinite(low) & (low <= row.truth + 1e-12) & (high >= row.truth - 1e-12)
    outside = (low < row.span[0] - 1e-9) | (high > row.span[1] + 1e-9)
    null = share([each["p"] < 0.05 for each in drawn]) if row.null else ""
    methods = sorted({each["method"] for each in drawn})
    width = float(np.nanmean(high - low))
    return (
        f"| {row.name} | {row.size} | {row.truth:.3g} | {share(inside)} | {np.mean(high <= low):.1%} | "
        f"{outside.mean():.1%} | {width:.3g} | {null} | {'; '.join(methods)} | {len(drawn)} |"
    )


def share(held: Any) -> str:
    """A share of draws with its exact interval."""
    from statsmodels.stats.proportion import proportion_confint

    k, n = int(np.sum(held)), len(held)
    low, high = np.nan_to_num(np.array(proportion_confint(k, n, method="beta"), dtype=float), nan=float(k == n))
    return f"{k / n:.3f} [{low:.3f}, {high:.3f}]"


def write(page: Path, text: str) -> None:
    begin, end = "<!-- calibration -->", "<!-- /calibration -->"
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
