"""The order of the tree is the data flow: a module imports only from the lines above its own."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tl_em"
ORDER = (
    *("errors", "arguments", "artefacts", "pt_files", "showing", "threads", "stats", "models", "metrics", "directions"),
    *("dictionaries", "interventions", "reading", "claims", "features", "graph", "interop", "presets", "evals"),
    *("training", "report", "auditing", "serving", "organisms", "inspect_provider", "cli"),
)
DRAWS = "report"  # result classes call it lazily from .plot() and .save()
LENS = "transformer_lens"
LEAF = "organisms"
DISTRIBUTIONS = {
    "concept_erasure": "concept-erasure",
    "sklearn": "scikit-learn",
    "huggingface_hub": "huggingface-hub",
    "lazy_loader": "lazy-loader",
    "transformer_lens": "transformer-lens",
    "sae_lens": "sae-lens",
    "yaml": "pyyaml",
    "inspect_ai": "inspect-ai",
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    """A file as it is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {named(path) for path in MODULES}


def layer(path: Path) -> str:
    """The line of the table that a file belongs to: its folder, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Every absolute module name that a file imports, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    lazy |= {id(n) for f in ast.walk(tree) if isinstance(f, ast.If) and _type_checking(f) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        eager = id(node) not in lazy
        if isinstance(node, ast.Import):
            found += [(alias.name, eager) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            module = node.module or ""
            found += [(name if (name := f"{module}.{a.name}") in NAMES else module, eager) for a in node.names]
    return found


def _type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_module_can_be_imported(name: str) -> None:
    """Doctests are collected past an import that fails, for the sake of the one module whose package is an extra."""
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if (name, error.name) != ("tl_em.inspect_provider", "inspect_ai"):
            raise


def test_the_reader_of_imports_sees_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport a.b\nfrom tl_em import cli\n"
        "if TYPE_CHECKING:\n    import c\ndef f():\n    from d.e import g\n"
    )
    expected = [("typing", True), ("a.b", True), ("tl_em.cli", True), ("c", False), ("d.e", False)]
    assert sorted(imports(file)) == sorted(expected)


def test_every_module_has_its_place() -> None:
    assert len(MODULES) > 20
    assert {layer(path) for path in MODULES} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_only_from_above(path: Path) -> None:
    own = layer(path)
    if own == "__init__":
        return
    for name, eager in imports(path):
        if name != "tl_em" and not name.startswith("tl_em."):
            continue
        target = name.split(".")[1] if "." in name else "__init__"
        if target in ("__init__", "__version__"):
            continue
        if target == DRAWS and not eager:
            continue
        assert ORDER.index(target) <= ORDER.index(own), f"{own} imports {name}, which stands below it"


def test_the_toys_are_a_leaf_that_is_found_by_name() -> None:
    """Nothing above imports them, and their name as text stands only where they are looked up."""
    naming = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and str(node.value).startswith(f"tl_em.{LEAF}.")
    }
    outside = {name for name in naming if not name.startswith(LEAF)}
    assert outside == {"models/loading.py"}
    importing = {layer(path) for path in MODULES for name, _ in imports(path) if name.startswith(f"tl_em.{LEAF}")}
    assert importing == {LEAF, "cli"}


def circle(imported: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, of a table of who imports whom; empty where there is none."""
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_no_modules_import_each_other() -> None:
    """Anywhere in the package, type-only and lazy imports included; but results call ``report`` to draw themselves."""

    found: dict[str, set[str]] = {}
    for path in MODULES:
        for name, eager in imports(path):
            if name in NAMES - {"tl_em", named(path)} and (eager or not name.startswith(f"tl_em.{DRAWS}")):
                found.setdefault(named(path), set()).add(name)
    assert len(found) > 100
    assert circle(found) == []


def test_only_models_knows_transformer_lens_and_nobody_loads_it_early() -> None:
    knows = {layer(path) for path in MODULES for name, _ in imports(path) if name.split(".")[0] == LENS}
    assert knows == {"models"}
    heavy = {LENS, "sae_lens", "transformers", "circuitsvis", "peft", "concept_erasure"}
    for path in MODULES:
        early = {name.split(".")[0] for name, eager in imports(path) if eager} & heavy
        assert not early, f"{path.name} imports {early} when it is imported"


def test_only_report_draws() -> None:
    drawing = {
        layer(path) for path in MODULES for name, _ in imports(path) if name.split(".")[0] in ("matplotlib", "jinja2")
    }
    assert drawing == {"report"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core, rest = project.split("[project.optional-dependencies]")
    extras = rest.split("[project.scripts]")[0]
    declared = {name.lower() for name in re.findall(r'^    "([A-Za-z0-9_-]+)[><=!]', core, re.MULTILINE)}
    optional = {name.lower() for name in re.findall(r'"([A-Za-z0-9_-]+)(?:\[\w+\])?[><=!]', extras)}
    used = {name.split(".")[0] for path in MODULES for name, _ in imports(path)}
    third_party = used - set(sys.stdlib_module_names) - {"tl_em"}
    distributions = {DISTRIBUTIONS.get(name, name) for name in third_party}
    assert {"torch", "numpy"} <= distributions
    assert distributions <= declared | optional
    assert declared <= distributions


def test_no_two_classes_have_one_name() -> None:
    """Who reads a name in a message, a signature or an index must not have to ask which of them is meant."""
    names: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert len(names) > 100
    assert {name: files for name, files in names.items() if len(files) > 1} == {}
