"""The test command: style, types, tests with doctests, in this order, and one exit status.

Arguments are handed to pytest, as in ``python tests/run.py -m browser`` or ``python tests/run.py tests/report``.
Annotations of tensors are checked at every call only with ``--typed``: that makes a test of small models two to four
times as long, so CI does it once for the doctests and once for the surface tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TYPED = "--jaxtyping-packages=tl_em,beartype.beartype"


def steps(arguments: list[str]) -> list[list[str]]:
    """The commands to run; with arguments, only pytest."""
    workers = ["-n", str(min(2, os.cpu_count() or 1)), "--dist", "loadfile"]  # models are cached by file
    workers += ["--no-loadscope-reorder"]  # doctests, whose files are short, come last, so the workers end together
    given = [TYPED if each == "--typed" else each for each in arguments]
    tests = [sys.executable, "-m", "pytest", "-q", *workers, *given]
    if arguments:
        return [tests]
    types = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    return [[sys.executable, "-m", "ruff", "check", "."], types, tests]


def main() -> int:
    """Run every step, also after one has failed; say at the end which did."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    failed = []
    for command in steps(sys.argv[1:]):
        name, start = command[2], time.monotonic()
        print(f"== {name}", flush=True)
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
