"""What a plain install brings: bounds on both sides, and licences under which anybody may use it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: each for name, each in PROJECT["optional-dependencies"].items() if name not in ("dev", "all")}
ASKED = [*PROJECT["dependencies"], *(line for each in EXTRAS.values() for line in each)]
PERMISSIVE = re.compile(
    r"MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|CNRI|MPL|Mozilla|Zlib|BSL|CC0|Unlicense"
)
"""Of each part of a licence's name one of these; MPL asks only that changes of its own files stay open."""


@pytest.mark.parametrize("line", ASKED)
def test_every_dependency_has_a_lower_and_an_upper_bound(line: str) -> None:
    operators = {each.operator for each in Requirement(line).specifier}
    assert {">=", "<"} <= operators, line


def licence(name: str) -> str:
    about = distribution(name).metadata
    told = [each.split("::")[-1] for each in about.get_all("Classifier") or [] if each.startswith("License")]
    return about.get("License-Expression") or "; ".join(told) or (about.get("License") or "unknown").splitlines()[0]


def brought() -> Iterator[tuple[str, str]]:
    """Every distribution that a plain install needs, and its licence."""
    seen: set[str] = set()
    todo = [Requirement(line).name for line in PROJECT["dependencies"]]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = [Requirement(line) for line in distribution(name).requires or []]
        except PackageNotFoundError:  # of another platform
            continue
        yield name, licence(name)
        todo += [each.name for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})]


def test_all_that_is_brought_may_be_used_by_anybody() -> None:
    found = dict(brought())
    assert {"torch", "transformers", "numpy"} <= found.keys()
    parts = {name: re.split(r" AND | OR | WITH |;", said) for name, said in found.items()}
    unclear = {name: said for name, said in found.items()
               if not all(PERMISSIVE.search(part) or "exception" in part for part in parts[name])
               or re.search(r"\bA?GPL|LGPL|NonCommercial|\bNC\b", said)}  # fmt: skip
    assert not unclear
