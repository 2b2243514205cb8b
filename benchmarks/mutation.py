"""Do the tests notice when the code that gives the verdicts is wrong? Every small change of it that is listed below.

    OMP_NUM_THREADS=1 python benchmarks/mutation.py --out mutation/
    OMP_NUM_THREADS=1 python benchmarks/mutation.py --out mutation/ --only stats/means.py --again
    python benchmarks/mutation.py --out mutation/ --write docs/results/mutation.md

A *mutant* is the code with one change (:func:`edits`); it is *killed* where a test fails or passes its time limit.  The
tests are collected once; each mutant has a process of its own, forked from there, and meets the tests that reach its
line, the fastest first, for a few seconds at most.  ``--out`` holds a line a mutant; what has one is not run again, but
for what survived with ``--again``.  Why a survivor may live stands in ``mutation.json``, by the words of its change.

Not mutated: strings, annotations, decorators, what is raised or warned, f-strings, and ``zip``'s ``strict``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import json
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
STATS = ("tests/stats", "tests/test_stats.py", "tests/features/test_p_values.py", "tl_em/stats")
TARGETS: dict[str, tuple[str, ...]] = {
    **{f"stats/{each.name}": STATS for each in sorted((ROOT / "tl_em/stats").glob("[!_]*.py"))},
    "claims/controls.py": ("tests/claims/test_controls.py",),
    "interventions/edits.py": ("tests/interventions/test_edits.py",),
    "claims/rule.py": ("tests/claims/test_rule.py",),
}
"""Each module and the tests that it is to be held by."""
BUDGET = 6.0
"""Seconds of tests that a mutant meets at most."""

Edit = Callable[[Any], None]
ADD, SUB, MULT, DIV = ast.Add, ast.Sub, ast.Mult, ast.Div
ARITHMETIC = {ADD: SUB, SUB: ADD, MULT: DIV, DIV: MULT, ast.FloorDiv: DIV, ast.Mod: DIV, ast.Pow: MULT,
              ast.MatMult: MULT, ast.BitAnd: ast.BitOr}  # fmt: skip
COMPARISON: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}


class Node(NamedTuple):
    """What may be changed, what it is a part of, and the name of what it stands in."""

    node: Any
    parent: ast.AST
    where: str
    inside: bool
    """Whether that is the body of a function, so that its lines tell which tests reach it."""


class Mutant(NamedTuple):
    """One change: in which module, of which of its :func:`nodes`, and how."""

    file: str
    key: str
    lines: range
    operator: str
    node: int
    edit: Edit
    inside: bool


# --- What is changed --------------------------------------------------------------------------------------------------


def edits(node: ast.AST) -> Iterator[tuple[str, Edit]]:
    """Every change of one node, by kind; each changes a node of that shape in place."""
    put = setattr
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for new in COMPARISON[type(op)]:
                yield "comparison", lambda n, i=i, new=new: n.ops.__setitem__(i, new())
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield "arithmetic", lambda n: put(n, "op", ARITHMETIC[type(n.op)]())
    elif isinstance(node, ast.BoolOp):
        yield "boolean", lambda n: put(n, "op", ast.Or() if isinstance(n.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "boolean" if isinstance(node.op, ast.Not) else "arithmetic", _without_sign
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", lambda n: put(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", lambda n: put(n, "value", n.value + 1)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        for value in (True, False):
            yield "condition", lambda n, value=value: put(n, "test", ast.Constant(value))
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield "condition", lambda n: put(n, "ifs", [])
    elif isinstance(node, ast.Return) and getattr(node.value, "value", ...) is not None:
        yield "return", lambda n: put(n, "value", ast.Constant(None))
    elif isinstance(node, ast.Call):
        if (called := _called(node)) in NAMES:
            yield "name", lambda n: put(n.func, "id" if isinstance(n.func, ast.Name) else "attr", NAMES[called])
        for i in range(len(node.args)):
            yield "argument", lambda n, i=i: n.args.pop(i)
        for i in (i for i, keyword in enumerate(node.keywords) if keyword.arg != "strict"):
            yield "argument", lambda n, i=i: n.keywords.pop(i)


def _without_sign(node: ast.UnaryOp) -> None:
    node.op, node.operand = (
        (ast.Not(), ast.UnaryOp(ast.Not(), node.operand))
        if isinstance(node.op, ast.Not)
        else (ast.UAdd(), node.operand)
    )


def _called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def nodes(tree: ast.AST, where: tuple[str, ...] = (), inside: bool = False) -> Iterator[Node]:
    """Every node that may be changed."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, ast.AST) or isinstance(each, ast.Raise | ast.JoinedStr):
                continue
            if (isinstance(each, ast.Call) and _called(each) == "warn") or getattr(each, "arg", "") == "strict":
                continue
            named = isinstance(each, ast.FunctionDef | ast.ClassDef)
            here = (*where, each.name) if named else where
            within = inside or (name == "body" and isinstance(tree, ast.FunctionDef))
            yield Node(each, tree, ".".join(here), within)
            yield from nodes(each, here, within)


def mutants(file: str) -> list[Mutant]:
    """Every change of a module, each with words of its own."""
    found, times = [], Counter()
    for number, (node, parent, where, inside) in enumerate(nodes(parsed(file))):
        spans = next(
            (each for each in (getattr(node, "test", node), getattr(node, "target", node)) if hasattr(each, "lineno")),
            node,
        )
        for operator, edit in edits(node):
            changed = copy.deepcopy(node)
            edit(changed)
            key = f"{where or 'module'}: {_text(node)} → {_text(ast.fix_missing_locations(changed))}"
            key += f" in {_text(parent)}" if isinstance(node, ast.Constant) else ""
            times[key] += 1
            key += f" (place {times[key]})" if times[key] > 1 else ""
            found.append(Mutant(file, key, range(spans.lineno, spans.end_lineno + 1), operator, number, edit, inside))
    return found


def parsed(file: str) -> ast.Module:
    return ast.parse((ROOT / "tl_em" / file).read_text(encoding="utf-8"))


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.If | ast.While):
        return f"if {ast.unparse(node.test)}"
    return ast.unparse(node).strip()


# --- The tests, met by each -------------------------------------------------------------------------------------------


class Loop:
    """In place of pytest's loop: the tests once as they are, then for every mutant those that reach it."""

    def __init__(self, wanted: Sequence[Mutant], out: Path) -> None:
        self.wanted, self.out = wanted, out
        self.items: dict[str, Any] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        modules = {file: _module(file) for file in dict.fromkeys(m.file for m in self.wanted)}
        gc.unfreeze()  # the suite freezes what it imported, and what is frozen is in no list
        held = {file: [f for f in gc.get_objects() if _is_of(f, module)] for file, module in modules.items()}
        if empty := [file for file, functions in held.items() if not functions]:
            raise SystemExit(f"no function of {', '.join(empty)} is found, so that no change would be tried")
        reached = self._reached({str(module.__file__): file for file, module in modules.items()})
        gc.collect()
        gc.freeze()  # what a mutant makes can be told from what was there
        for i, mutant in enumerate(self.wanted):
            tests, seconds = [], 0.0
            for name, (took, lines) in reached.items():
                if _meets(mutant, lines.get(mutant.file, ())) and (seconds := seconds + took) < BUDGET:
                    tests.append(name)
            limit = 10 + 10 * seconds
            by = self._run(mutant, modules[mutant.file], held[mutant.file], tests, limit) if tests else ""
            line = {"file": mutant.file, "key": mutant.key, "operator": mutant.operator, "by": by, "tests": len(tests)}
            with (self.out / "mutants.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            print(
                f"\r{i + 1}/{len(self.wanted)} {mutant.file}:{mutant.lines.start} {by[-60:] or 'SURVIVES'}", flush=True
            )
        return True

    def _reached(self, files: dict[str, str]) -> dict[str, tuple[float, dict[str, list[int]]]]:
        """Of every test its seconds and the lines of each module that it runs, the fastest first."""
        place = self.out / "reached.json"

        def measure() -> str:
            found, failed = {}, ""
            for name in self.items:
                lines: dict[str, set[int]] = defaultdict(set)

                def local(frame: Any, event: str, arg: Any, lines: Any = lines) -> Any:
                    lines[files[frame.f_code.co_filename]].add(frame.f_lineno)
                    return local

                def trace(frame: Any, event: str, arg: Any, local: Any = local) -> Any:
                    return local(frame, event, arg) if frame.f_code.co_filename in files else None

                sys.settrace(trace)
                start = time.process_time()
                failed = failed or self._failed([name])
                sys.settrace(None)
                found[name] = (time.process_time() - start, {file: sorted(each) for file, each in lines.items()})
            place.write_text(json.dumps(dict(sorted(found.items(), key=lambda each: each[1][0]))))
            return failed

        if failed := _forked(measure, self.out, limit=1800):
            raise SystemExit(f"{failed} fails without any change, so nothing can be learnt of changes; mend it first")
        return json.loads(place.read_text())

    def _run(
        self, mutant: Mutant, module: ModuleType, held: list[FunctionType], tests: Sequence[str], limit: float
    ) -> str:
        """The test that kills it; nothing where none does."""

        def meet() -> str:
            tree = parsed(mutant.file)
            mutant.edit(list(nodes(tree))[mutant.node].node)
            try:
                install(ast.fix_missing_locations(tree), module, held)
            except Exception as cause:
                return f"import: {cause!r}"
            return self._failed(tests)

        return _forked(meet, self.out, limit=limit)

    def _failed(self, tests: Sequence[str]) -> str:
        from _pytest.runner import runtestprotocol

        items = [self.items[name] for name in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
                return item.nodeid
        return ""


def install(tree: ast.Module, module: ModuleType, held: Sequence[FunctionType]) -> None:
    """Put changed code in place of a module's: in the very functions and classes that others hold."""
    space, before = vars(module), dict(vars(module))
    exec(compile(tree, str(module.__file__), "exec"), space)
    made = {f.__qualname__: f for f in gc.get_objects() if _is_of(f, module)}
    for old in held:
        if new := made.get(old.__qualname__):
            old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__
    for name, value in before.items():
        if not isinstance(value, int | float):
            space[name] = value
        elif space[name] != value:
            for other in [m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get(name) is value]:
                setattr(other, name, space[name])


def _is_of(f: Any, module: ModuleType) -> bool:
    """A function of a module, those of its dataclasses included."""
    return (
        type(f) is FunctionType
        and f.__globals__ is vars(module)
        and f.__code__.co_filename in (module.__file__, "<string>")
    )


def _meets(mutant: Mutant, lines: Sequence[int]) -> bool:
    return any(line in mutant.lines for line in lines) if mutant.inside else bool(lines)


def _module(file: str) -> ModuleType:
    import importlib

    return importlib.import_module(f"tl_em.{file.removesuffix('.py').replace('/', '.')}")


def _forked(work: Callable[[], str], out: Path, *, limit: float) -> str:
    """What work says in a process of its own; the time limit, where it passes it."""
    answer = out / "answer.txt"
    answer.write_text("it died")
    if not (child := os.fork()):
        signal.setitimer(signal.ITIMER_PROF, limit)  # of work, not of waiting: others may use the machine
        with contextlib.suppress(BaseException), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            answer.write_text(work())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)} within {limit:.0f} s" if os.WIFSIGNALED(status) else answer.read_text()


def run(only: str, out: Path, *, again: bool) -> None:
    """Every mutant that has no line yet."""
    out.mkdir(parents=True, exist_ok=True)
    known = {place for place, line in read(out).items() if line["by"] or not again}
    wanted = [m for file in TARGETS if only in file for m in mutants(file) if (m.file, m.key) not in known]
    random.Random(0).shuffle(wanted)  # so that what is broken off is a sample
    tests = dict.fromkeys(t for m in wanted for t in TARGETS[m.file])
    if wanted:
        options = ["-q", "-p", "no:cacheprovider", "-p", "jaxtyping._pytest_plugin", f"--rootdir={ROOT}"]
        options.append("--jaxtyping-packages=tl_em,beartype.beartype")
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        os.chdir(ROOT)
        if code := pytest.main([*options, *tests], plugins=[Loop(wanted, out)]):
            raise SystemExit(int(code))


# --- What came of it --------------------------------------------------------------------------------------------------


def read(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last line of each mutant."""
    path = out / "mutants.jsonl"
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return {(line["file"], line["key"]): line for line in lines}


def page(out: Path) -> str:
    """Tables by module and by kind of change, and every survivor with its reason."""
    known, reasons = read(out), json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    every = [(m, known.get((m.file, m.key))) for file in TARGETS for m in mutants(file)]
    ran = [(m, line) for m, line in every if line]
    text = []
    for title, of in (("module", lambda m: f"`{m.file}`"), ("change", lambda m: m.operator)):
        text.append(f"| {title} | mutants | run | killed | share of those run | survive |\n|---|---|---|---|---|---|")
        groups: dict[str, list[Any]] = defaultdict(list)
        for mutant, line in every:
            groups[of(mutant)].append(line)
        for name, lines in {**groups, "all": [line for _, line in every]}.items():
            text.append(f"| {name} | {len(lines)} | {_killed([bool(line['by']) for line in lines if line])} |")
        text.append("")
    for file in TARGETS:
        alive = [mutant for mutant, line in ran if mutant.file == file and not line["by"]]
        if alive:
            text.append(f"### What survives in `{file}`\n\n| in, line | change | why |\n|---|---|---|")
        for mutant in alive:
            where, change = mutant.key.split(": ", 1)
            shown = " → ".join(f"`{each}`" for each in change.replace("|", "\\|").split(" → "))
            why = reasons.get(file, {}).get(mutant.key, "**no reason yet**")
            text.append(f"| {where}, {mutant.lines.start} | {shown} | {why} |")
        text.append("")
    return "\n".join(text).strip()


def _killed(killed: Sequence[bool]) -> str:
    hits, n = sum(killed), len(killed)
    return f"{n} | {hits} | {f'{hits / n:.1%}' if n else ''} | {n - hits}"


def write(place: Path, text: str) -> None:
    begin, end = "<!-- mutation -->", "<!-- /mutation -->"
    before, rest = place.read_text(encoding="utf-8").split(begin)
    place.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("mutation"))
    parser.add_argument("--only", default="", help="modules whose path contains this")
    parser.add_argument("--again", action="store_true", help="what survived as well")
    parser.add_argument("--write", type=Path, help="a page: the tables go between its marks; nothing is run")
    given = parser.parse_args()
    if given.write:
        write(given.write, page(given.out.resolve()))
    else:
        run(given.only, given.out.resolve(), again=given.again)


if __name__ == "__main__":
    main()
