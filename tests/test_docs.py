"""README and docs: their names exist, their commands parse, their links lead somewhere, nothing local is in them."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import tl_em as em
from tl_em.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(path.relative_to(ROOT)) for path in PAGES]
SOURCES = [
    path
    for pattern in (
        "tl_em/**/*.py",
        "tests/**/*.py",
        "benchmarks/**/*.py",
        "tl_em/report/templates/*",
        ".ci/*",
        "*.toml",
    )
    for path in ROOT.glob(pattern)
]
LOCAL = re.compile(r"(?<![\w./$-])/(?:tmp|root|home|mnt|opt|work|Users)/")
HOSTS = re.compile(r"(?:pypi|pythonhosted|npmjs|download\.pytorch|debian)\.\w+", re.IGNORECASE)


def blocks(path: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def test_the_readme_has_blocks_of_both_kinds() -> None:
    assert len(blocks(ROOT / "README.md", "python")) == 3
    assert len(blocks(ROOT / "README.md", "sh")) == 2


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_python_blocks_parse_and_use_public_names(path: Path) -> None:
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "em":
                assert node.attr in em.__all__, f"{path.name}: em.{node.attr}"


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_commands_are_one_line_each_and_name_real_commands(path: Path) -> None:
    for block in blocks(path, "sh", "bash", "console"):
        for line in block.strip().splitlines():
            words = shlex.split(line)
            assert words
            for i, word in enumerate(words):
                if word.endswith("tl-em"):
                    assert words[i + 1] in main.commands or words[i + 1].startswith("-"), line


def test_ci_runs_the_command_of_the_readme() -> None:
    command = next(block for block in blocks(ROOT / "README.md", "sh") if "tests/run.py" in block)
    assert command.count("\n") == 1
    assert "grep -m 1 'python tests/run.py' README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_links_to_files_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_of_one_machine_is_in_it(path: Path) -> None:
    assert LOCAL.search("see /" + "opt/x")
    assert HOSTS.search("https://py" + "pi.org/x")
    text = path.read_text(encoding="utf-8")
    assert not LOCAL.search(text), LOCAL.search(text)
    assert not HOSTS.search(text), HOSTS.search(text)
