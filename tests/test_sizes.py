"""How large each folder may be, in lines without blanks, comments and docstrings: ``tests/sizes.json``.

Raising a number there is a line that somebody reads in a review; what shrinks is written down at once, and stays.
"""

from __future__ import annotations

import ast
import io
import json
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tl_em"
SIZES: dict[str, int] = json.loads((ROOT / "tests" / "sizes.json").read_text(encoding="utf-8"))
FILES = sorted(PACKAGE.rglob("*.py"))
SLACK = 30
"""Lines that a folder may lie below its number before the number has to follow."""
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def size(source: str) -> int:
    """Lines that hold code."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    silent: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            silent |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in SILENT]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - silent)


@cache
def folders() -> dict[str, int]:
    """The size of each folder, and of each file that stands in none."""
    found: dict[str, int] = {}
    for path in FILES:
        part = path.relative_to(PACKAGE).parts[0]
        found[part] = found.get(part, 0) + size(path.read_text(encoding="utf-8"))
    return found


def test_blanks_comments_and_docstrings_do_not_count() -> None:
    head = '"""What it is."""\n\n# why\nx = (\n    1\n)\n\n'
    body = 'def f():\n    """Docs.\n\n    More."""\n    return x\n'
    assert size(head + body) == 5


@pytest.mark.parametrize("name", sorted({*SIZES, *(path.relative_to(PACKAGE).parts[0] for path in FILES)}))
def test_every_folder_keeps_to_its_size(name: str) -> None:
    found = folders().get(name, 0)
    assert found <= SIZES.get(name, 0), f"{name} has {found} lines of code; delete some, or raise it"
    assert found >= SIZES[name] - SLACK, f"{name} has only {found} lines: write that down in tests/sizes.json"
