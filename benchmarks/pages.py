"""Hostile strings in every place of every page, opened in a real browser, and of every repr, in a real terminal.

    python benchmarks/pages.py --out pages/ [--write docs/results/pages.md]

Everything that shows itself is taken apart to its texts: names, tokens, prompts, answers, keys, columns.  One after
another each is replaced by a hostile one, past all checks, and what then renders is opened in Chromium.  A page is
*inert* where no script of the text ran, nothing was asked for, no dialog opened, the browser complained of nothing, and
no control character stands in what it shows.  A text in whose place only certain words may stand may end in an error.
What a terminal would get (``repr``) goes through tmux: the title, the screen and the cursor stay what they were.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fuzz  # noqa: E402

import tl_em as em  # noqa: E402
from tests.visits import Visit, chromium  # noqa: E402

RUN = "window.evil=1;document.title='evil';fetch('http://127.0.0.1:9/evil')"
HOSTILE = (
    f"</script><script>{RUN}</script>", f"</style></script><img src=x onerror=\"{RUN}\">",
    f"\"'><svg onload=\"{RUN}\">",
    f"javascript:{RUN}", "{{7*7}}{% raw %}${7*7}<%= 7*7 %>", "]]></title></textarea><script>window.evil=1</script>",
    "\x1b]0;evil\x07\x1b[2J\x1b[31mred\x1b[0m", "\u202eevil\u2066\u2069\u200b\ufeff", "\x00\x08\x7f\x85\u2028\u2029",
    "<!--<script>", "&lt;script&gt;&#60;script&#62;", "\ud800half", f"<a href=\"javascript:{RUN}\">x</a>",
    "<iframe src=http://127.0.0.1:9/evil></iframe><link rel=stylesheet href=http://127.0.0.1:9/e.css>",
    "[/bold red]evil[/]",
    "@import url(http://127.0.0.1:9/e.css);}*{background:url(http://127.0.0.1:9/x)}", "$\\href{javascript:1}{x}$ __*`#",
)  # fmt: skip
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff]")
INSIDE = 6
"""Levels of things in things; of a list's items and a table's rows, the first two."""
CLOSED = {"kind", "document"}
"""A node's kind, one of five words wherever a node is made, without which it has no shape; and a page itself."""

Way = tuple[Any, ...]


def parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a thing holds, by how to reach it."""
    names = [each.name for each in dataclasses.fields(value)] if hasattr(type(value), "__dataclass_fields__") else []
    if names:
        yield from ((("field", name), getattr(value, name)) for name in names
                    if hasattr(value, name) and name not in CLOSED)  # fmt: skip
    elif type(value).__name__ == "DataFrame":
        texts = [name for name in value.columns if len(value) and isinstance(value[name].iloc[0], str)]
        yield from ((("cell", name), value[name].iloc[0]) for name in texts)
        yield from ((("column", name), name) for name in value.columns if isinstance(name, str))
    elif isinstance(value, dict):
        yield from ((("key", key), key) for key in itertools.islice(value, 2) if isinstance(key, str))
        yield from ((("item", key), each) for key, each in itertools.islice(value.items(), 4))
    elif isinstance(value, list | tuple):
        yield from ((("at", i), each) for i, each in enumerate(value[:2]))
    elif type(value).__module__.startswith("tl_em") and hasattr(value, "__dict__"):
        yield from ((("field", name), each) for name, each in vars(value).items())


def ways(value: Any, depth: int = INSIDE) -> Iterator[Way]:
    """How to reach every text."""
    for step, inner in parts(value):
        if isinstance(inner, str):
            yield (step,)
        elif depth and type(inner).__name__ not in ("Tensor", "ndarray", "TransformerBridge", "HookedTransformer"):
            yield from ((step, *rest) for rest in ways(inner, depth - 1))


def put(value: Any, way: Way, text: str) -> Any:
    """A copy in which another text stands there; nothing is checked."""
    (kind, name), *rest = way
    if kind in ("field",):
        found = copy.copy(value)
        for cached in [key for key in vars(found) if isinstance(getattr(type(found), key, None), object)
                       and type(getattr(type(found), key, None)).__name__ == "cached_property"]:  # fmt: skip
            object.__delattr__(found, cached)
        inner = getattr(value, name)
        object.__setattr__(found, name, put(inner, tuple(rest), text) if rest else text)
        return found
    if kind == "cell":
        found = value.copy()
        found[name] = [text, *list(found[name])[1:]]
        return found
    if kind == "column":
        return value.rename(columns={name: text})
    if kind == "key":
        return {text if key == name else key: each for key, each in value.items()}
    if kind == "item":
        return {**value, name: put(value[name], tuple(rest), text) if rest else text}
    items = list(value)
    items[name] = put(items[name], tuple(rest), text) if rest else text
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def things() -> list[Any]:
    """One of everything that shows itself."""
    with contextlib.suppress(Exception):
        import tests.report.conftest  # noqa: F401
    pair = em.load_pair("toy/insecure")
    contrast = (pair.contrasts or {})["persona"]
    small = em.ContrastSet(contrast.positive[:12], contrast.negative[:12])
    direction = em.difference_in_means(pair.base, small, site=em.Site(2), position="prompt_end")
    some = {name: (pair.contrasts or {})[name] for name in ("persona", "refusal")}
    matrix = em.directions.cosine_matrix(pair.base, some, site=em.Site(2), position="prompt_end")
    reading = em.read(pair.tuned, small.negative[:2], {"persona": direction}, alternatives=2, max_new_tokens=2)
    graph = fuzz.hostile.graph()
    return [*fuzz.things(), matrix, small.lint(), graph.diff(graph), reading.beside(reading)]


def shown(thing: Any) -> list[str]:
    """Its pages: in a notebook, and as files."""
    made = [thing._repr_html_()] if hasattr(thing, "_repr_html_") else []
    made += [thing.document] if isinstance(getattr(thing, "document", None), str) else []
    if hasattr(thing, "save_html"):
        with tempfile.TemporaryDirectory() as folder:
            made.append(Path(thing.save_html(Path(folder) / "page.html")).read_text(encoding="utf-8"))
    return [page for page in made if page]


def opened(browser: Any, page: str, file: Path) -> str:
    """What is wrong with it, or nothing."""
    try:
        data = page.encode()
    except UnicodeEncodeError:
        return "it cannot be written"
    around = b"" if b"<html" in data[:500].lower() else b"<!doctype html><meta charset=utf-8><body>"
    file.write_bytes(around + data)
    visit = Visit(browser, file)
    try:
        visit.page.wait_for_timeout(60)
        frames = visit.page.frames
        ran = any(frame.evaluate("() => Boolean(window.evil) || document.title === 'evil'") for frame in frames)
        asked = [url for url in visit.requests if not url.startswith(("file:", "data:", "about:"))]
        texts = "".join(frame.evaluate("() => document.body ? document.body.innerText : ''") for frame in frames)
        errors = [each for each in visit.errors if "sandbox" not in each]
        return (
            "a script ran" if ran else f"it asks for {asked[0][:60]}" if asked
            else f"complaint: {errors[0][:90]}" if errors
            else f"shows {CONTROL.search(texts)!r}" if CONTROL.search(texts) else ""
        )  # fmt: skip
    finally:
        visit.page.context.close()


def tmux(*words: str) -> str:
    return subprocess.run(["tmux", *words], capture_output=True, text=True, check=True).stdout


def in_terminal(texts: list[str]) -> str:
    """What a terminal made of them, if it is anything but text."""
    with tempfile.TemporaryDirectory() as folder:
        file, name = Path(folder) / "out.txt", f"pages{time.time_ns()}"
        file.write_text("\n".join(texts) + "\nEND-OF-IT\n", encoding="utf-8", errors="surrogateescape")
        screen = title = ""
        tmux("new-session", "-d", "-s", name, "-x", "200", "-y", "50", f"cat {file}; sleep 20")
        try:
            for _ in range(50):
                time.sleep(0.1)
                screen = tmux("capture-pane", "-p", "-e", "-t", name)
                if "END-OF-IT" in screen:
                    break
            title = tmux("display", "-p", "-t", name, "#{pane_title}")
        finally:
            tmux("kill-session", "-t", name)
    return "the title changed" if "evil" in title else "it is coloured" if "\x1b[31m" in screen else \
        "" if "END-OF-IT" in screen else "the end is not to be seen"  # fmt: skip


def run(out: Path, most: int) -> list[dict[str, Any]]:
    rows, failed, strings = [], [], itertools.cycle(HOSTILE)
    warnings.simplefilter("ignore")
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        assert all(opened(browser, HOSTILE[i], file) for i in (0, 1, 2, 5, 6, 7, 13)), "what is not escaped is found"
        assert not opened(browser, "<p>text</p>", file)
        for thing in things():
            kind, counts, texts = type(thing).__name__, Counter[str](), []
            every = list(ways(thing))
            for way in every[:: max(1, len(every) // most)]:
                text = next(strings)
                try:
                    changed = put(thing, way, text)
                    pages = shown(changed)
                    said = repr(changed)
                except Exception as error:
                    counts["refused"] += 1
                    counts["in an error of the package"] += isinstance(error, em.TlEmError)
                    continue
                texts.append(said)
                if CONTROL.search(said.replace("\n", "")):
                    failed.append({"thing": kind, "way": str(way), "text": text, "why": "control signs in its repr"})
                for page in pages:
                    counts["pages"] += 1
                    if why := opened(browser, page, file):
                        failed.append({"thing": kind, "way": str(way), "text": text, "why": why})
            wrong = in_terminal(texts[:40]) if texts else ""
            failed += [{"thing": kind, "way": "", "text": "", "why": wrong}] if wrong else []
            bad = sum(each["thing"] == kind for each in failed)
            rows.append({"what": kind, "texts": len(every), "replaced": len(texts), "refused": counts["refused"],
                         "pages opened": counts["pages"], "not inert": bad})  # fmt: skip
            print(rows[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "pages.json").write_text(json.dumps(rows))
    (out / "failed.jsonl").write_text("".join(json.dumps(each) + "\n" for each in failed))
    return rows


def written(out: Path) -> str:
    rows = json.loads((out / "pages.json").read_text())
    text = "# Hostile strings\n\nMade by `python benchmarks/pages.py`, which says what is counted.\n\n"
    text += "| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]) + "\n"
    return text + "".join("| " + " | ".join(str(value) for value in row.values()) + " |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most", type=int, default=60, help="texts of one thing, spread over it")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    run(given.out, given.most)
    if given.write:
        given.write.write_text(written(given.out), encoding="utf-8")


if __name__ == "__main__":
    main()
