"""What MkDocs does besides: runs the notebooks, sets equations as MathML, and shows the files of the root.

A notebook in ``docs/tutorials`` is committed without outputs and executed on every build, so what a page shows is what
the code gives today (not by ``mkdocs serve``, nor where ``DOCS_WITHOUT_OUTPUTS`` is set). No page loads anything from
anywhere: equations are MathML, pictures and frames are in the page.
"""

from __future__ import annotations

import html
import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat  # pyright: ignore[reportMissingImports]
from latex2mathml.converter import convert  # pyright: ignore[reportMissingImports]
from mkdocs.config.defaults import MkDocsConfig  # pyright: ignore[reportMissingImports]
from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]
from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[1]
FROM_THE_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
MATH = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
HELD = "<!-- output {} -->"
held: dict[str, list[str]] = {}
"""Outputs of a page, by its path: put in when the Markdown has become HTML."""
running = not os.environ.get("DOCS_WITHOUT_OUTPUTS")


def on_startup(command: str, **_: Any) -> None:
    """Whether notebooks are executed."""
    global running
    running = running and command == "build"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages that are not Markdown files of this folder."""
    for name, source in FROM_THE_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
    for name, text in runpy.run_path(str(ROOT / "docs" / "reference.py"))["reference"]().items():
        files.append(File.generated(config, name, content=text))
    for file in [each for each in files if each.src_uri.endswith(".ipynb")]:
        files.remove(file)
        name = file.src_uri.removesuffix(".ipynb") + ".md"
        files.append(File.generated(config, name, content=executed(Path(str(file.abs_src_path)), name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link to a notebook leads to its page."""
    return re.sub(r"(\]\([^)\s]*)\.ipynb(?=[)#])", r"\1.md", markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Outputs and equations."""
    for i, shown in enumerate(held.get(page.file.src_uri, ())):
        content = content.replace(HELD.format(i), shown)
    return MATH.sub(equation, content)


def equation(found: re.Match[str]) -> str:
    """TeX as MathML."""
    tex = html.unescape(found[2] or found[3])
    return convert(tex, display="block") if found[1] == "div" else f'<span class="math">{convert(tex)}</span>'


def executed(path: Path, name: str) -> str:
    """A notebook as Markdown, run from its first cell to its last; an error of a cell is an error of the build."""
    notebook = nbformat.read(path, as_version=4)
    if running:
        with TemporaryDirectory() as folder:
            where = {"metadata": {"path": folder}}
            NotebookClient(notebook, timeout=600, startup_timeout=300, resources=where).execute()
    held[name], parts = [], []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source}\n```")
            for shown in outputs(cell):
                parts.append(f'<div class="output" markdown="0">{HELD.format(len(held[name]))}</div>')
                held[name].append(shown)
    return "\n\n".join(parts)


def outputs(cell: Any) -> Iterator[str]:
    """Everything that a cell shows, as HTML, but for what goes to stderr: progress, and warnings with their paths."""
    for output in (each for each in cell.outputs if each.get("name") != "stderr"):
        data = output.get("data", {"text/plain": output.get("text", "")})
        if "text/html" in data:
            yield data["text/html"]
        elif "image/png" in data:
            yield f'<img alt="" src="data:image/png;base64,{data["image/png"].strip()}">'
        elif data.get("text/plain"):
            yield f"<pre>{html.escape(data['text/plain'])}</pre>"
