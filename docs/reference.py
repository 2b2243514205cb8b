"""Write ``docs/reference/command-line.md``, every ``--help`` word for word: ``python docs/reference.py``.

The pages of the Python reference are made anew on every build (``docs/build.py``): one a folder of the package, with
every name of ``tl_em.__all__`` and of the public namespaces below it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
from click.testing import CliRunner

import tl_em as em
from tl_em.cli import main as cli

PACKAGE = Path(em.__file__).parent
PAGE = Path(__file__).with_name("reference") / "command-line.md"
TITLES = {
    "audit": "The audit",
    "models": "Models, prompts and sites",
    "metrics": "Metrics",
    "directions": "Directions",
    "interventions": "Interventions",
    "reading": "A text, token by token",
    "claims": "Comparing, choosing, judging",
    "dictionaries": "Sparse dictionaries",
    "features": "Latents",
    "graph": "Attribution graphs",
    "presets": "Published recipes",
    "evals": "Judges and answers",
    "serving": "A page to steer by",
    "training": "While a model trains",
    "organisms": "Organisms and studies",
    "stats": "Estimates",
    "errors": "Errors and warnings",
}
FILES = {"auditing": "audit"}
"""What each page is called, by the folder or file of the package that it documents."""


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, with their full names."""
    yield name, command
    if isinstance(command, click.Group):
        for child in sorted(command.commands):
            yield from commands(command.commands[child], f"{name} {child}")


def page() -> str:
    """The command line's page."""
    parts = ["# Command line\n"]
    for name, _ in commands(cli, "tl-em"):
        words = [*name.split()[1:], "--help"]
        shown = CliRunner().invoke(cli, words, prog_name="tl-em", terminal_width=100).output
        parts.append(f"## {name}\n\n```text\n{shown.strip()}\n```\n")
    return "\n".join(parts)


def imported(home: Path) -> dict[str, str]:
    """The names that a file takes from other files of the package, each with the module that it is defined in."""
    package = ".".join(("tl_em", *home.parent.relative_to(PACKAGE).parts))
    found: dict[str, str] = {}
    for node in ast.parse(home.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and (node.level or node.module.startswith("tl_em.")):
            module = f"{package}.{node.module}" if node.level else node.module
            found |= {each.asname or each.name: module for each in node.names}
    return found


def public() -> dict[str, str]:
    """Every public name, once, as it is written after ``em.``, with the module that it is defined in."""
    found = imported(PACKAGE / "__init__.pyi")
    seen = {id(getattr(em, name)) for name in found}
    folders = [name for name in em.__all__  # pyright: ignore[reportAttributeAccessIssue]
               if inspect.ismodule(getattr(em, name))]
    for folder in sorted(folders, key=lambda name: name != "interop"):
        for name, module in inside(folder).items():
            value = getattr(getattr(em, folder), name)
            if id(value) not in seen and (inspect.isclass(value) or inspect.isroutine(value)):
                seen.add(id(value))
                found[f"{folder}.{name}"] = module
    return found


def inside(folder: str) -> dict[str, str]:
    """The public names of a folder, or of a file, with the module that each is defined in."""
    homes = (PACKAGE / folder / "__init__.pyi", PACKAGE / folder / "__init__.py", PACKAGE / f"{folder}.py")
    home = next(each for each in homes if each.exists())
    return defined(folder) if folder in ("errors", "metrics") else imported(home)


def defined(module: str) -> dict[str, str]:
    """The public classes and functions of a file."""
    home = import_module(f"tl_em.{module}")
    own = {name: value for name, value in vars(home).items() if inspect.isclass(value) or inspect.isfunction(value)}
    return {name: home.__name__ for name, value in own.items() if value.__module__ == home.__name__ and name[0] != "_"}


def reference() -> dict[str, str]:
    """The pages of the Python reference, by file name."""
    names: dict[str, list[tuple[str, str]]] = {title: [] for title in TITLES}
    for name, module in public().items():
        folder = module.split(".")[1]
        names[FILES.get(folder, folder)].append((name, f"{module}.{name.split('.')[-1]}"))
    return {
        f"reference/{folder}.md": "\n".join([f"# {TITLES[folder]}\n", *(entry(*each) for each in sorted(found))])
        for folder, found in names.items()
        if found
    }


def entry(name: str, path: str) -> str:
    """What mkdocstrings replaces by a name's documentation."""
    return f"::: {path}\n    options:\n      heading: em.{name}\n      toc_label: {name}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
