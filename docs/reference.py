"""Write ``docs/cli.md``, every ``--help`` word for word: ``python docs/reference.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from tl_em.cli import main as cli

PAGE = Path(__file__).with_name("cli.md")


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, with their full names."""
    yield name, command
    if isinstance(command, click.Group):
        for child in sorted(command.commands):
            yield from commands(command.commands[child], f"{name} {child}")


def page() -> str:
    """The page's text."""
    parts = ["# Command line\n"]
    for name, _ in commands(cli, "tl-em"):
        words = [*name.split()[1:], "--help"]
        shown = CliRunner().invoke(cli, words, prog_name="tl-em", terminal_width=100).output
        parts.append(f"## {name}\n\n```text\n{shown.strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
