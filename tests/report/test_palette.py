"""One palette in figures and pages, which every kind of eye can tell apart; and figures of the size of print."""

from __future__ import annotations

import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

import tl_em
from tests.graph.examples import small
from tests.report.test_curves import made
from tests.report.test_notebook import comparison, matrix
from tests.report.test_page import contrast, themes
from tests.test_arguments import PUBLIC
from tl_em.claims.curve import EffectCurve
from tl_em.directions.similarity import CosineMatrix
from tl_em.errors import UsageError
from tl_em.report import curves, drawing, graphs, plots
from tl_em.report.svg import _COLOURS

LIGHT, DARK = themes()
EYES: dict[str, Any] = {
    "usual": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}
"""Linear RGB as it is seen: Machado, Oliveira and Fernandes 2009, table 1, severity 1."""
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def lab(colour: str, eye: str) -> np.ndarray:
    """CIELAB of a colour as an eye sees it."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    x, y, z = np.array(XYZ) @ np.clip(np.array(EYES[eye]) @ linear, 0, 1) / [0.95047, 1.0, 1.08883]
    fx, fy, fz = (np.cbrt(v) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def nearest(colours: Any, eye: str) -> float:
    """The smallest distance of two colours, in CIELAB: about 2 can just be seen side by side."""
    found = list(dict.fromkeys(colours))
    assert len(found) > 1
    return min(float(np.linalg.norm(lab(a, eye) - lab(b, eye))) for a, b in itertools.combinations(found, 2))


TOGETHER = {"models": drawing.MODELS.values(), "conditions": drawing.CONDITIONS.values(), "series": drawing.SERIES}


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("group", TOGETHER)
def test_what_stands_together_is_told_apart_by_every_eye(group: str, eye: str) -> None:
    colours = [look.colour for look in TOGETHER[group]]
    assert nearest(colours, eye) > 24
    assert nearest([DARK[_COLOURS[colour]] for colour in colours], eye) > 15
    assert nearest(["#d55e00", "#9a7200"], "protan") < 2  # what this is about: orange and ochre are one to some
    assert len({(look.colour, look.marker) for look in TOGETHER[group]}) == len(colours)


@pytest.mark.parametrize("eye", EYES)
def test_links_of_graphs_are_told_apart_by_every_eye(eye: str) -> None:
    css = (Path(tl_em.__file__).parent / "graph" / "assets" / "viewer.css").read_text()
    light, dark = (dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", part)) for part in css.split('data-theme="dark"', 1))
    for theme in (light, dark):
        assert nearest([theme[name] for name in graphs.CHANGES], eye) > 15
        assert nearest([theme["pos"], theme["neg"]], eye) > 60
    assert {name: light[name] for name in graphs.CHANGES} == {name: look[0] for name, look in graphs.CHANGES.items()}


def test_figures_and_pages_have_one_palette() -> None:
    for colour, name in _COLOURS.items():
        assert LIGHT.get(name) in (colour, None) or name in ("rule", "band"), (colour, name)
        assert name in DARK
    for look in drawing.SERIES:
        assert look.colour in _COLOURS and look.text in _COLOURS
        for theme in (LIGHT, DARK):
            assert contrast(theme[_COLOURS[look.colour]], theme["page"]) >= 3
            assert contrast(theme[_COLOURS[look.text]], theme["page"]) >= 4.5
    folder = Path(drawing.__file__).parent
    for path in sorted({*folder.glob("*.py")} - {folder / f"{name}.py" for name in ("drawing", "graphs", "svg")}):
        assert re.findall(r"\"#[0-9a-f]{6}\"", path.read_text()) == [], f"{path.name} has colours of its own"


# ---- the size of print -----------------------------------------------------------------------------------------------
def shown() -> dict[str, Any]:
    """One of every figure that a result draws."""
    curve: Any = type("Curve", (), {**vars(made()), "plot": EffectCurve.plot})
    monitor = tl_em.training.Monitor(rates=lambda model: {"bad": [0.1, 0.9]}, window=None)
    monitor(0, tl_em.load_pair("toy/insecure").base)  # pyright: ignore[reportArgumentType]
    return {"curve": curve(), "comparison": comparison(), "matrix": matrix(), "monitor": monitor}


@pytest.mark.parametrize(("width", "expected"), [("column", 3.25), ("text", 6.75), ("page", 6.75), (5, 5.0)])
def test_figures_of_a_papers_width_have_letters_that_can_be_read(
    report: Any, tmp_path: Path, width: Any, expected: float
) -> None:
    figures = {name: each.plot(width=width) for name, each in shown().items()} | plots.figures(report, width=width)
    figures["graph"] = graphs.graph(small(), width=width)
    for name, figure in figures.items():
        assert figure.get_figwidth() == expected, name
        sizes = [t.get_fontsize() for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
        assert sizes and min(sizes) >= 7, name
    for suffix in ("svg", "pdf", "png"):
        assert figures["matrix"].save_figure(tmp_path / f"m.{suffix}").stat().st_size > 1000
    svg = (tmp_path / "m.svg").read_text()
    assert f'width="{expected * 72:g}pt"' in svg and "CosineMatrix" not in svg
    assert small().save_figure(tmp_path / "g.pdf", width=width).read_bytes().startswith(b"%PDF")


def test_every_plot_takes_a_papers_width() -> None:
    public = [value.plot for value in PUBLIC.values() if inspect.isclass(value) and hasattr(value, "plot")]
    drawn = [*public, EffectCurve.plot, CosineMatrix.plot]
    written = [path.read_text() for path in Path(tl_em.__file__).parent.rglob("*.py")]
    assert sum(text.count("def plot(") for text in written) == len(drawn) == 6
    assert all(inspect.signature(each).parameters["width"].default == 7.0 for each in drawn)
    for wrong in ("columns", 0, float("nan"), None):
        with pytest.raises(UsageError, match="width"):
            curves.effect(made(), width=wrong)  # pyright: ignore[reportArgumentType]
