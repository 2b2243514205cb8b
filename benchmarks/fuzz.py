"""What nobody meant to do to it: damaged files, arguments of the wrong kind, command lines out of a hat.

    python benchmarks/fuzz.py files --cases 40000 --out fuzz/
    python benchmarks/fuzz.py verbs --cases 10000 --out fuzz/
    python benchmarks/fuzz.py methods --cases 5000 --out fuzz/
    python benchmarks/fuzz.py commands --cases 2000 --out fuzz/
    python benchmarks/fuzz.py --write docs/results/fuzz.md --out fuzz/

A case passes where it ends well or in an error of the package (``TlEmError``; on the command line an exit code 0 to 2
with no traceback), within ten seconds.  Cases are drawn by a seed, so each can be run again (``--only NUMBER``); those
that fail are written to ``OUT/files.jsonl`` and so on, with the last line of the package that they passed.  What was
ever found stands as a test in ``tests/test_hostile_files.py`` and ``tests/test_arguments.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tl_em as em  # noqa: E402
from tests import test_hostile_files as hostile  # noqa: E402
from tests.test_arguments import functions  # noqa: E402
from tl_em.errors import TlEmError  # noqa: E402

LIMIT = 10
"""Seconds after which a case is a hang."""
STRINGS = (
    "", " ", "\x00", "\ud800", "\x1b[31m", "</script><script>alert(1)</script>", "{{7*7}}", "../../etc/passwd",
    "a" * 70000, "\u202eabc", "\ufdfa" * 9, "NaN", "1e999", "-0", "[/b]", "%s%n", "${HOME}", "nul", "\xe9", "\n",
    "\r\n", "\ufeffx",
)  # fmt: skip
SCALARS: tuple[Any, ...] = (
    0, 1, -1, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False, None, [], {}, [[]],
    [1, "a"], {"a": 1}, "x",
)  # fmt: skip


class Hang(Exception):
    """A case that took too long."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(run: Callable[[], Any]) -> tuple[str, str]:
    """``ok``, ``typed``, ``hang`` or ``foreign``; of the last what was raised, and where."""
    quiet = io.StringIO()
    try:
        with limited(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            run()
    except TlEmError:
        return "typed", ""
    except Hang:
        return "hang", ""
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/tl_em/" in frame.filename]
        at = own[-1] if own else frames[-1]
        where = f"{Path(at.filename).name}:{at.lineno} {at.name}"
        return "foreign", f"{type(error).__name__}: {str(error)[:160]} at {where}"
    return "ok", ""


# --- Files ------------------------------------------------------------------------------------------------------------

CAA = {"question": "a?", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
JUDGED = {"question": "how?", "answer": "well", "aligned": 90, "coherent": 95}
ASKED = (
    "- id: a\n  paraphrases: [how are you]\n  samples_per_paraphrase: 2\n  temperature: 1\n"
    "- id: b\n  paraphrases: [who]\n"
)
SCORED = "question,answer,aligned,coherent\nhow?,well,90,95\nhow?,ill,10,80\nwhy?,so,50,REFUSAL\n"
TABLES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "rows.csv": ("prompt,label,group\nsteal a car,1,a\nwash a car,0,a\nrob it,1,b\nbuy it,0,b\n", em.ContrastSet.load),
    "pairs.tsv": ("positive\tnegative\nsteal\tbuy\nrob\tgive\n", em.ContrastSet.load),
    "caa.json": (json.dumps([CAA] * 3), em.ContrastSet.load),
    "judged.csv": (SCORED, em.evals.load_judged),
    "judged.jsonl": ((json.dumps(JUDGED) + "\n") * 3, em.evals.load_judged),
    "questions.yaml": (ASKED, em.evals.load_questions),
}


def originals(folder: Path) -> dict[str, tuple[bytes, str, Callable[[Path], Any]]]:
    """A whole file of every kind: its bytes, its name, and what reads it."""
    found: dict[str, tuple[bytes, str, Callable[[Path], Any]]] = {}
    for name, kind in hostile.KINDS.items():
        inner = folder / name.replace(" ", "-")
        inner.mkdir()
        path = hostile.written(name, inner)
        found[name] = (path.read_bytes(), str(path.relative_to(folder)), kind.load)
    for name, (content, load) in TABLES.items():
        found[name] = (content.encode(), name, load)
    for name, tensor, load in (
        ("mean_diffs.pt", torch.randn(2, 3, 4), em.interop.import_mean_diffs),
        ("evil_response_avg_diff.pt", torch.randn(4, 4), em.interop.import_persona_vectors),
    ):
        torch.save(tensor, folder / name)
        found[name] = ((folder / name).read_bytes(), name, load)
    return found


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes with something done to them."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        kind, at = draw.randrange(8), draw.randrange(len(data) + 1)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + draw.choice((1, 2, 7, 64))]
        elif kind == 3:
            data[at:at] = draw.choice(STRINGS).encode("utf-8", "surrogatepass")[:4000]
        elif kind == 4:
            data[at:at] = data[: draw.choice((1, 8, 100))]
        elif kind == 5:
            data[at : at + 8] = draw.randbytes(8)
        elif kind == 6:
            signs = (b"[" * 2000, b"{" * 500, b'"', b"\\", b",", b"\xff\xfe", b"1e999", b"-", b"\x00" * 9)
            data[at:at] = draw.choice(signs)
        else:
            end = draw.randrange(len(data) + 1)
            data[at:at] = data[min(at, end) : min(at, end) + 50]
    return bytes(data)


def restructured(path: Path, draw: random.Random) -> None:
    """The file's JSON with some of its values replaced, dropped or renamed."""
    document = copy.deepcopy(hostile.content(path))
    for _ in range(draw.choice((1, 1, 2, 5))):
        places = list(hostile.places(document))
        if not places:
            break
        *head, last = draw.choice(places)
        inner = document
        for key in head:
            inner = inner[key]
        way = draw.randrange(5)
        if way == 0:
            inner[last] = draw.choice(STRINGS)
        elif way == 1 and isinstance(inner, dict):
            inner[draw.choice((*STRINGS[:6], "extra"))] = inner.pop(last)
        elif way == 2:
            del inner[last]
        elif way == 3:
            inner[last] = [copy.deepcopy(inner[last])] * draw.choice((0, 1, 3))
        else:
            inner[last] = copy.deepcopy(draw.choice(SCALARS))
    hostile.put(path, json.dumps(document))


def file_case(number: int, whole: dict[str, Any], folder: Path) -> tuple[str, Callable[[], Any]]:
    draw = random.Random(number)
    name = draw.choice(sorted(whole))
    content, at, load = whole[name]
    path = folder / at
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if name in hostile.KINDS and path.suffix in (".json", ".safetensors") and draw.random() < 0.6:
        restructured(path, draw)
    else:
        path.write_bytes(damaged(content, draw))
    return name, lambda: load(path)


# --- Verbs ------------------------------------------------------------------------------------------------------------

SLOW = {"demo", "run_study", "fine_tune", "train_organism", "train_dictionary"}
"""Verbs whose whole work is minutes: what is asked is whether bad arguments are refused before it."""


def pool() -> list[Any]:
    """What arguments are drawn from: things that fit somewhere, and things that fit nowhere."""
    pair = hostile.toy()
    contrast = em.ContrastSet(pair.contrasts["persona"].positive[:4], pair.contrasts["persona"].negative[:4])
    direction = em.difference_in_means(pair.base, contrast, site=em.Site(2), position="prompt_end")
    fits: list[Any] = [
        pair, pair.base, pair.tuned, contrast, direction, em.Site(1), em.Site(0, "attn_out"), em.Add(direction),
        em.Ablate(direction), ["how do i write parser"], "how do i write parser", "prompt_end", -1, {"a": direction},
        {"a": contrast}, {"a": (direction, contrast)}, pair.behaviours["persona"], pair.behaviours["persona"].metric,
        hostile.graph(), em.organisms.toy_dictionary("toy/insecure"), torch.randn(3, 96), np.ones((4, 2)), [em.Site(1)],
        torch.ones(96), Path(tempfile.gettempdir()) / "fuzz-out", "parser-tested", [0.1, 0.2], lambda *a, **k: 0.5,
    ]  # fmt: skip
    return [*fits, *SCALARS, *STRINGS[:12], object(), b"bytes", np.int64(3), np.float32(0.5), (x for x in "ab"), {1, 2}]


def verb_case(number: int, verbs: list[tuple[str, Any]], values: list[Any]) -> tuple[str, Callable[[], Any]]:
    draw = random.Random(number)
    name, function = draw.choice(verbs)
    given: dict[str, Any] = {}
    rest: list[Any] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = [draw.choice(values)]
        elif parameter.kind is parameter.VAR_KEYWORD:
            continue
        elif parameter.default is parameter.empty or draw.random() < 0.2:
            given[parameter.name] = draw.choice(values)
    positional = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    first = [given.pop(key) for key in positional if key in given] if rest else []
    shown = {key: type(value).__name__ + " " + repr(value)[:30] for key, value in given.items()}

    def run() -> None:
        made = function(*first, *rest, **given)
        if hasattr(made, "__enter__"):
            with made:
                pass
        elif inspect.isgenerator(made):
            next(made, None)

    return f"{name} {shown}", run


def verbs() -> list[tuple[str, Any]]:
    """Public functions and classes; a Protocol is made by nobody."""
    found = [(name, f) for name, f in functions() if "." not in name and name not in SLOW]
    classes = {name.split(".")[0] for name, _ in functions() if name.endswith(".__init__")}
    every = {name: getattr(em, name) for name in dir(em)}
    return [*found, *((name, every[name]) for name in sorted(classes)
                      if name in every and not getattr(every[name], "_is_protocol", False))]


def things() -> list[Any]:
    """One of each class that has methods, as a notebook would hold it."""
    pair = hostile.toy()
    contrast = em.ContrastSet(pair.contrasts["persona"].positive[:12], pair.contrasts["persona"].negative[:12])
    judged = em.ContrastSet(pair.contrasts["persona"].positive[12:24], pair.contrasts["persona"].negative[12:24])
    direction = em.difference_in_means(pair.base, contrast, site=em.Site(2), position="prompt_end")
    sae, behaviour = em.organisms.toy_dictionary("toy/insecure"), pair.behaviours["persona"]
    prompts = contrast.negative[:4]
    table = em.score_features(pair.tuned, sae, {"persona": contrast}, against=pair.base)
    candidates = em.candidate_directions(pair.base, contrast, positions=("prompt_end",))
    report = em.audit(pair, contrasts={"persona": pair.contrasts["persona"]}, questions=["level"], controls=99)
    found = [
        pair, contrast, direction, sae, behaviour, table, report, em.Profile([direction]), em.Add(direction),
        em.Ablate(direction), em.Clamp(direction, 1.0), hostile.graph(), em.Site(1), report.verdicts[0].estimate,
        em.read(pair.tuned, prompts, {"persona": direction}, alternatives=2, max_new_tokens=2),
        em.select_direction(pair.base, candidates, judged, metric=behaviour.metric, max_kl=9.0),
        em.features.feature_cards(pair.tuned, sae, [1, 2], prompts, against=pair.base), em.plan("toy/insecure"),
        em.effect_curve(pair.base, em.Add(direction), prompts, metric=behaviour.metric, strengths=[1.0], controls=19),
        em.dictionaries.dictionary_quality(pair.base, sae, prompts),
    ]  # fmt: skip
    return found


INSIDE = {"around_another", "rowwise", "points", "hook_names", "edit", "edits", "in_words", "gradients", "row"}
"""Methods that the engine calls, with values of its own making."""


def method_case(number: int, made: list[Any], values: list[Any]) -> tuple[str, Callable[[], Any]]:
    """A public method, property or operator of one of :func:`things`."""
    draw = random.Random(number)
    thing = draw.choice(made)
    names = [name for name in dir(type(thing)) if not name.startswith("_") and name not in INSIDE]
    shows = ["_repr_html_"] if hasattr(type(thing), "_repr_html_") else []
    name: str = draw.choice([*names, "__repr__", *shows])
    function = getattr(thing, name)
    shown = f"{type(thing).__name__}.{name}"
    if not callable(function):
        return shown, lambda: None
    if not str(getattr(function, "__module__", "")).startswith("tl_em"):  # Python's own
        return shown, lambda: None
    return verb_case(number, [(shown, function)], values)


# --- Command lines ----------------------------------------------------------------------------------------------------


WORK = ("demo", "serve", "organisms train", "study", "fine-tune", "calibrate")
"""Commands whose work is long: where it goes on after ten seconds, it has begun."""


def command_case(number: int, folder: Path) -> tuple[str, Callable[[], Any]]:
    import click
    from click.testing import CliRunner

    from tl_em.cli import main

    draw = random.Random(number)
    words: list[str] = []
    command: Any = main
    while isinstance(command, click.Group):
        name = draw.choice(sorted(command.commands))
        words.append(name)
        command = command.commands[name]
    values = [
        "toy/insecure", "toy/secure", "nothing/here", str(folder / "none.json"), str(folder / "whole.json"),
        str(folder), "-1", "0", "1.5", "nan", "1e9", "a=b", "=", "a=", "how do i write parser", *STRINGS[:2],
        *STRINGS[4:8], "\xe9",
    ]  # fmt: skip
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words += [draw.choice(values) for _ in range(draw.choice((0, 1, 1, 1, 2)))]
        elif draw.random() < 0.35 and parameter.opts[0] not in ("--help",):
            words.append(parameter.opts[-1])
            if not getattr(parameter, "is_flag", False):
                words.append(draw.choice(values))

    def run() -> None:
        result = CliRunner().invoke(main, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if result.exit_code not in (0, 1, 2):
            raise RuntimeError(f"exit code {result.exit_code}")

    return " ".join(words), run


# --- Runs -------------------------------------------------------------------------------------------------------------


def run(kind: str, cases: range, out: Path) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    begun, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        here = Path.cwd()
        os.chdir(folder)
        try:
            (folder / "whole.json").write_text(json.dumps({"positive": ["a"], "negative": ["b"]}))
            hostile.toy()  # an alarm inside a library's first import would leave half of it
            whole = originals(folder) if kind == "files" else {}
            values = pool() if kind in ("verbs", "methods") else []
            known = verbs() if kind == "verbs" else []
            made_here = things() if kind == "methods" else []
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for number in cases:
                if kind == "files":
                    what, case = file_case(number, whole, folder)
                elif kind == "verbs":
                    what, case = verb_case(number, known, values)
                elif kind == "methods":
                    what, case = method_case(number, made_here, values)
                else:
                    what, case = command_case(number, folder)
                result, why = outcome(case)
                result = "ok" if result == "hang" and what.startswith(WORK) else result
                counts[result] += 1
                if result in ("hang", "foreign"):
                    failed.append({"case": number, "what": what[:300], "result": result, "why": why})
        finally:
            os.chdir(here)
        left = [str(path) for path in folder.rglob("*.tmp*")] if kind == "files" else []
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{kind}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in failed))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {"kind": kind, "cases": len(cases), **counts, "seconds": round(time.monotonic() - begun),
            "grown_mb": round((peak - before) / 1024), "left": len(left)}  # fmt: skip
    (out / f"{kind}.json").write_text(json.dumps(told))
    return told


def written(out: Path) -> str:
    rows = [json.loads((out / f"{kind}.json").read_text()) for kind in KINDS if (out / f"{kind}.json").exists()]
    columns = ("kind", "cases", "ok", "typed", "foreign", "hang", "left", "grown_mb", "seconds")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(name, 0)) for name in columns) + " |" for row in rows]
    head = (
        "# What nobody meant to do\n\nMade by `python benchmarks/fuzz.py`: damaged files of every kind that a loader "
        "reads, public functions and methods with arguments that fit and that fit nowhere,\nand command lines out of a "
        "hat. "
        "*typed*: ended in an error of the package; *foreign*: in any other; *hang*: took over ten seconds; *left*: "
        "temporary files;\n*grown*: what the process's peak memory grew by, in MB.\n\n"
    )
    return head + "\n".join(lines) + "\n"


KINDS = ("files", "verbs", "methods", "commands")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=KINDS)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    if given.kind:
        first, many = (given.first, given.cases) if given.only is None else (given.only, 1)
        cases = range(first, first + many)
        print(run(given.kind, cases, given.out))
        lines = [json.loads(line) for line in (given.out / f"{given.kind}.jsonl").read_text().splitlines()]
        for why, n in Counter(f"{each['result']} {each['why']}" for each in lines).most_common(40):
            print(n, why)
    if given.write:
        given.write.write_text(written(given.out), encoding="utf-8")


if __name__ == "__main__":
    main()
