"""Is one state of the package slower, or larger in memory, than another?  The same command in two checkouts, in turns.

    ratio = CPU seconds (of all threads and children) or peak memory, after / before;  median over rounds

The order is reversed in odd rounds, so that what warms up or cools down hits both alike.  **Control**: the first
checkout against itself (``--control``), whose ratio is what the machine alone makes of it.

    python benchmarks/two_trees.py BEFORE AFTER                       (the demo)
    python benchmarks/two_trees.py BEFORE AFTER -- benchmarks/hooks.py --rounds 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

DEMO = ["-m", "tl_em.cli", "demo", "--out", "{folder}"]


class Used(NamedTuple):
    """What one run of the command took."""

    seconds: float
    mebibytes: float


def run(tree: Path, command: list[str]) -> Used:
    """The command with one checkout's package, its CPU time and the peak of its memory.

    Raises:
        SystemExit: the command failed; its last lines are shown.
    """
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run([sys.executable, *sys.argv[1:]], capture_output=True, text=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr) if done.returncode else None\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)\n"
        "sys.exit(done.returncode)"
    )
    with tempfile.TemporaryDirectory() as folder:
        words = [word.replace("{folder}", folder) for word in command]
        words = [str(tree / word) if word.startswith("benchmarks/") else word for word in words]
        env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tree, env=env)
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(command)} failed\n{done.stderr}")
    seconds, mebibytes = map(float, done.stdout.split())
    return Used(seconds, mebibytes)


def main() -> int:
    """Parse, run in turns, print a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--control", action="store_true", help="run BEFORE a second time in every round")
    parser.add_argument("command", nargs="*", help="for python; after --")
    chosen = parser.parse_args()
    trees = {"before": chosen.before.resolve(), "after": chosen.after.resolve()}
    trees |= {"before again": trees["before"]} if chosen.control else {}
    found: dict[str, list[Used]] = {name: [] for name in trees}
    for turn in range(chosen.rounds):
        for name in list(trees)[:: -1 if turn % 2 else 1]:
            found[name].append(run(trees[name], chosen.command or DEMO))
    first = found.pop("before")
    for name, each in found.items():
        pairs = list(zip(each, first, strict=True))
        time, memory = (statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1))
        took = " ".join(f"{a.seconds:.1f}/{b.seconds:.1f}" for a, b in pairs)
        least = min(a.seconds for a, _ in pairs) / min(b.seconds for _, b in pairs)
        print(f"{name} / before: time {time:.3f} (least {least:.3f}), memory {memory:.3f}   CPU s {took}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
