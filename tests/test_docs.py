"""README and docs: every code block runs, every name is documented, links lead somewhere, nothing local is in them."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest
from cloudpickle import register_pickle_by_value

import tl_em as em
from tl_em.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")),
         *sorted(DOCS.rglob("*.ipynb"))]  # fmt: skip
IDS = [str(path.relative_to(ROOT)) for path in PAGES]
SLOW = {"README.md"} | {f"docs/tutorials/{path.name}" for path in (DOCS / "tutorials").glob("*.ipynb")}
SLOW |= {"docs/how-to/audit.md", "docs/how-to/verify-a-latent.md"}
"""Pages whose code takes more than ten seconds: CI runs the notebooks when it builds the docs, README's blocks in
``tests/plain_install.py``, and all with ``-m slow``."""
STARTS = {"docs/how-to/serve.md": "a server"}
SOURCES = [
    path
    for pattern in (
        "tl_em/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "docs/*.py", "tl_em/report/templates/*", ".ci/*",
        "*.toml", "*.yml", ".pre-commit-config.yaml", ".github/**/*.*",
    )
    for path in ROOT.glob(pattern)
]  # fmt: skip
LOCAL = re.compile(r"(?<![\w./$-])/(?:tmp|root|home|mnt|opt|work|Users)/")
HOSTS = re.compile(r"(?:pypi|pythonhosted|npmjs|download\.pytorch|debian)\.\w+", re.IGNORECASE)
WORDS_OF_EXPLANATION = 5000
MEASURED = re.compile(r"\bseeds? \d|\bseeds? 1\d\d\b|\btoy/\w+ \(seed", re.IGNORECASE)
REFERENCE = runpy.run_path(str(DOCS / "reference.py"))
NAMES = sorted(REFERENCE["public"]())
FUTURE = "from __future__ import annotations\n"
NO_EXAMPLE = {"train_organism", "organisms.run_real", "organisms.audit_each"}
"""They train or audit for minutes; their how-to page has the command."""


def prose(path: Path) -> str:
    """A page as Markdown; of a notebook, its cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells)


def blocks(path: Path, *languages: str) -> list[str]:
    """Code blocks of some languages, with the files that they show."""
    found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", prose(path), re.MULTILINE | re.DOTALL)
    shown = [body for language, body in found if language in languages]
    return [re.sub(r'^--8<-- "(.*?)"$', lambda m: (ROOT / m[1]).read_text("utf-8"), body, flags=re.M) for body in shown]


def test_the_readme_has_blocks_of_both_kinds() -> None:
    assert len(blocks(ROOT / "README.md", "python")) == 4
    assert len(blocks(ROOT / "README.md", "sh")) == 3


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_python_blocks_parse_and_use_public_names(path: Path) -> None:
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "em":
                assert node.attr in dir(em), f"{path.name}: em.{node.attr}"


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (name in SLOW) + [pytest.mark.starts(STARTS[each]) for each in STARTS if each == name]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=marks(name))
        for name, path in zip(IDS, PAGES, strict=True)
        if "\n```python" in prose(path)
    ],
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page from top to bottom, in an empty folder; a warning is an error, as in every test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    code, page = "\n".join(blocks(ROOT / name, "python")), ModuleType("page")
    if FUTURE in code:  # the files that a page shows have it at their head, which is not the page's
        code = FUTURE + code.replace(FUTURE, "")
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "page", page)
    register_pickle_by_value(page)  # what it defines goes to workers as from a notebook, by value
    exec(compile(code, str(tmp_path / "page.py"), "exec", dont_inherit=True), page.__dict__)
    plt.close("all")


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_commands_are_one_line_each_and_name_real_commands(path: Path) -> None:
    for block in blocks(path, "sh", "bash", "console"):
        for line in block.strip().splitlines():
            words = shlex.split(line)
            assert words
            for i, word in enumerate(words):
                if word.endswith("tl-em"):
                    assert words[i + 1] in main.commands or words[i + 1].startswith("-"), line


def test_ci_runs_the_command_of_the_readme_and_builds_the_docs() -> None:
    command = next(block for block in blocks(ROOT / "README.md", "sh") if "tests/run.py" in block)
    assert command.count("\n") == 1
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "grep -m 1 'python tests/run.py' README.md" in ci
    assert "mkdocs build --strict" in ci


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_links_to_files_lead_to_files(path: Path) -> None:
    made = {*REFERENCE["reference"](), "changelog.md", "contributing.md"}
    for target in re.findall(r"\]\(([^)#\s]+)", prose(path)):
        if not target.startswith("https://"):
            there = (path.parent / target).resolve()
            page = there.relative_to(DOCS).as_posix() if there.is_relative_to(DOCS) else ""
            assert there.exists() or page in made, f"{path.name}: {target}"


def test_every_page_is_in_the_navigation_and_nothing_else() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?:: |- )([\w/-]+\.md)$", settings, re.MULTILINE))
    written = {path.relative_to(DOCS).with_suffix(".md").as_posix() for path in PAGES if path.is_relative_to(DOCS)}
    assert listed == written | {*REFERENCE["reference"](), "changelog.md", "contributing.md"}


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_of_one_machine_is_in_it(path: Path) -> None:
    assert LOCAL.search("see /" + "opt/x")
    assert HOSTS.search("https://py" + "pi.org/x")
    text = path.read_text(encoding="utf-8")
    assert not LOCAL.search(text), LOCAL.search(text)
    assert not HOSTS.search(text), HOSTS.search(text)


def test_the_explanation_is_short_and_measures_nothing() -> None:
    assert MEASURED.search("on toy/insecure (seed 11)") and MEASURED.search("in seeds 101 to 105")
    pages = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "explanation").glob("*.md")}
    assert not {name: found[0] for name, text in pages.items() if (found := MEASURED.search(text))}
    assert 2000 < sum(len(text.split()) for text in pages.values()) <= WORDS_OF_EXPLANATION


# --- What public names say of themselves ------------------------------------------------------------------------------


def documented(name: str) -> object:
    """The value of a public name; of an instance or a ``Literal``, its type."""
    value: object = em
    for part in name.split("."):
        value = getattr(value, part)
    return value if inspect.isclass(value) or inspect.isroutine(value) else type(value)


def parameters(value: object) -> list[str]:
    """What a caller writes: of a class, what it is made with, where that is its own."""
    if inspect.isclass(value) and (issubclass(value, Exception) or getattr(value, "_is_protocol", False)):
        return []
    try:
        found = inspect.signature(value).parameters.values()  # pyright: ignore[reportArgumentType]
    except ValueError:
        return []
    return [p.name for p in found if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_says_what_it_is_what_it_takes_and_shows_it(name: str) -> None:
    value = documented(name)
    text = inspect.getdoc(value) or ""
    first = text.split("\n")[0]
    assert first.endswith((".", "?", ":")) or "." in first, f"{name}: its first line says no purpose: {first!r}"
    assert len(first.split()) >= 4 and not first.startswith(f"{name}("), f"{name}: {first!r} says no purpose"
    said = text.partition("Args:")[2].partition("\n\n")[0]
    missing = [p for p in parameters(value) if not re.search(rf"(?:^|[\s,*]){p}\b[^\n]*:|\b{p}, ", said)]
    assert not missing, f"{name}: no word under Args: about {missing}"
    if name not in NO_EXAMPLE and not (inspect.isclass(value) and issubclass(value, Exception)):
        assert ">>> " in text, f"{name}: no example that runs"


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(REFERENCE["reference"]().values())
    shown = set(re.findall(r"heading: em\.([\w.]+)$", text, re.MULTILINE))
    flat = {name for name in em.__all__ if not inspect.ismodule(getattr(em, name))}
    assert flat <= shown == set(NAMES)
