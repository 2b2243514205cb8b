"""Which architectures are right, on which surface, in which versions? Every cell: equal, refused, or a fault.

    python benchmarks/architectures.py --out a.jsonl            # all, in this environment
    python benchmarks/architectures.py --only "qwen2 window" --only mpt
    python benchmarks/architectures.py --table a.jsonl b.jsonl  # docs/results/architectures.md

Each architecture (benchmarks/families.py) is loaded from memory and from a directory, on every surface that this
TransformerLens has, and judged (benchmarks/cells.py) by plain transformers without a cache (benchmarks/judge.py). Each
runs in a process of its own under benchmarks/guard.py, where sockets and subprocesses are forbidden.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from families import ARCHITECTURES, named
from guard import attempts, changes, environment, permitted, state

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "architectures.md"
SURFACES = ("bridge", "hooked") if int(version("transformer-lens").split(".")[0]) < 4 else ("bridge",)


def examined(name: str, surface: Any) -> dict[str, Any]:
    """All cells of an architecture on a surface, and what loading it did beside."""
    from cells import Case, Cell, examine

    start = time.monotonic()
    with permitted("subprocess.Popen"):  # transformers itself looks for compilers when some models are made
        case = Case(named(name), surface)
    tried, load = len(attempts()), case.load
    changed: list[str] = []

    def loaded(*args: Any, **options: Any) -> Any:
        before = state(case.source)
        case.load = load  # the first load is the one that is looked at
        try:
            return load(*args, **options)
        finally:
            changed.extend(changes(before, state(case.source)))

    case.load = loaded
    found = examine(case)
    note = "; ".join([*(f"changed: {each}" for each in changed), *attempts()[tried:]])
    found["effects"] = Cell("FAULT" if note else "none", len(attempts()) - tried, note)
    seconds = round(time.monotonic() - start, 1)
    return {"cells": {key: asdict(cell) for key, cell in found.items()}, "seconds": seconds}


# --- All of them, each in a process of its own ------------------------------------------------------------------------


def serve(names: Sequence[str], surfaces: Sequence[str], out: Path, limit: float) -> None:
    """Examine each in a fork of this process, which has imported everything once; under the guard."""
    with tempfile.TemporaryDirectory() as folder:
        forked(lambda: named("gpt2").make().save_pretrained(folder), limit)
        imports = {"changed": first_load(folder), "attempted": attempts()}
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # a collection in a fork would copy all that was imported
    _write(out, {"imports": imports})
    known = {(each.get("name"), each.get("surface")) for each in records(out)}
    for name, surface in ((name, surface) for name in names for surface in surfaces):
        if (name, surface) not in known:
            record = forked(lambda name=name, surface=surface: examined(name, surface), limit)
            _write(out, {"name": name, "surface": surface} | record)


def first_load(folder: str) -> list[str]:
    """What the first load of a process changes for good, the imports of TransformerLens and transformers included."""
    import numpy  # noqa: F401
    import torch  # noqa: F401

    import tl_em as em

    before = state()
    em.load_model(folder)
    return changes(before, state())


def forked(run: Callable[[], Any], limit: float) -> dict[str, Any]:
    """The result of a function in a process of its own, or how that ended."""
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        with permitted("os.fork"):
            child = os.fork()
        if child == 0:
            _in_child(run, path)
        end = time.monotonic() + limit
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                text = path.read_text(encoding="utf-8")
                return json.loads(text) if text else {"crash": f"the process ended with status {status}"}
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return {"crash": f"not finished after {limit:.0f} s"}


def _in_child(run: Callable[[], Any], path: Path) -> None:
    try:
        path.write_text(json.dumps(run() or {}), encoding="utf-8")
    except BaseException:
        path.write_text(json.dumps({"crash": traceback.format_exc()[-1500:]}), encoding="utf-8")
    finally:
        os._exit(0)


def records(path: Path) -> list[dict[str, Any]]:
    """What a file of results holds."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _write(out: Path, record: Mapping[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**record, "versions": versions()}) + "\n")
    print(record.get("name", "imports"), record.get("surface", record.get("imports")), record.get("seconds", ""))
    if "crash" in record:
        print("    CRASH " + record["crash"].strip().splitlines()[-1])
    for cell, found in record.get("cells", {}).items():
        figure = "" if found["figure"] is None else f"{found['figure']:.1e}"
        print(f"    {cell:16s} {found['verdict']:9s} {figure:8s} {found['note'][:230]}")
    sys.stdout.flush()


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("transformer-lens", "transformers", "torch")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="an architecture by name; may be repeated")
    parser.add_argument("--surface", action="append", choices=SURFACES)
    parser.add_argument("--out", type=Path, default=Path("architectures.jsonl"), help="goes on where it ends")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds an architecture and surface may take")
    parser.add_argument("--table", type=Path, nargs="+", help="files of results, one or more an environment")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        from architecture_table import page

        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(page([each for path in given.table for each in records(path)]), encoding="utf-8")
        return 0
    if given.inside:
        names = given.only or [each.name for each in ARCHITECTURES]
        serve(names, given.surface or SURFACES, given.out, given.limit)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--inside", *sys.argv[1:]]
        return subprocess.run(command, env=environment(Path(folder)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
