"""The figure of an effect curve: it draws what the table says, and every text can be read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection

from tl_em.errors import UsageError
from tl_em.report import curves, drawing, plots

WIDTHS = [3.25, 7.0]


def row(arm: str, name: str, strength: float, effect: float, kl: float, coherence: float = 0.5) -> dict[str, Any]:
    """One row of an effect curve's table, with intervals of half-width .02."""
    numbers = {"effect": effect, "change": effect - 0.1, "kl": kl, "coherence": coherence}
    found: dict[str, Any] = {"arm": arm, "name": name, "strength": strength, "n": 50, "p": np.nan, "note": ""}
    for column, value in numbers.items():
        found |= {column: value, f"{column}_low": value - 0.02 * kl, f"{column}_high": value + 0.02 * kl}
    return found


def made(*, scale: float = 1.0, coherence: str | None = "good, probability") -> Any:
    """A made-up curve of both signs: nothing here was measured."""
    strengths = [0.25, 0.5, 1.0, 2.0, -0.25, -0.5, -1.0, -2.0]
    own = [(s, 0.3 + 0.4 * np.tanh(s) * (0.2 if s < 0 else 1), 0.3 * s * s, 1 - abs(s) / 3) for s in strengths]
    rng = np.random.default_rng(0)
    rows = [row("untreated", "untreated", np.nan, 0.3, 0.0, 1.0)]
    rows += [row("intervention", f"strength {s}", s, e, k, c) for s, e, k, c in own]
    rows += [row("random", f"random {i}", s, 0.3 + rng.normal(0, 0.02), k, c) for i in range(12) for s, _, k, c in own]
    told = (("be malicious", 0.45, 1.1, 0.4), ("do not", 0.1, 0.2, 0.5))
    rows += [row("instruction", name, np.nan, e, k, c) for name, e, k, c in told]
    table = pd.DataFrame(rows)
    numbers = [c for c in table if c.startswith(("effect", "change"))]
    table[numbers] *= scale
    if coherence is None:
        table = table.drop(columns=[c for c in table if c.startswith("coherence")])
    return SimpleNamespace(to_pandas=table.copy, metric="bad, probability", coherence=coherence)


def texts(figure: Any) -> list[Any]:
    return [t for ax in figure.axes for t in (ax.xaxis.label, ax.yaxis.label, *ax.texts) if t.get_text()]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, -12.0])
def test_nothing_is_cut_off_or_overlaps(width: float, scale: float) -> None:
    figure = curves.effect(made(scale=scale), width=width)
    assert figure.get_figwidth() == width and len(figure.axes) == 2
    canvas = FigureCanvasAgg(figure)
    with drawing.styled():
        canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in texts(figure)]
    legend = figure.legends[0].get_window_extent(renderer)
    for box in [*boxes, legend]:
        assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1
        assert box.y0 >= -1 and box.y1 <= figure.bbox.height + 1
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert not any(legend.overlaps(box) for box in boxes)


def test_every_interval_and_every_random_direction_is_drawn() -> None:
    curve = made()
    table, ax = curve.to_pandas(), curves.effect(curve).axes[0]
    paths = [path.vertices for c in ax.collections if isinstance(c, LineCollection) for path in c.get_paths()]
    upright = sorted((v[0, 1], v[1, 1]) for v in paths if v[0, 0] == v[1, 0])
    shown = table[table["arm"].isin(["intervention", "instruction"])]
    np.testing.assert_allclose(upright, sorted(zip(shown["effect_low"], shown["effect_high"], strict=True)))
    points = max((line for line in ax.lines), key=lambda line: len(line.get_xdata()))
    assert len(points.get_xdata()) == (table["arm"] == "random").sum() == 96
    assert [t.get_text() for t in ax.texts] == ["be malicious", "do not"]


def test_right_is_worse_in_both_panels() -> None:
    kl, coherence = curves.effect(made()).axes
    assert kl.get_xscale() == "log" and kl.get_xlim()[0] < kl.get_xlim()[1]
    assert coherence.get_xlim()[0] > coherence.get_xlim()[1]
    assert "less to the right" in coherence.get_xlabel()
    assert kl.get_ylim() == (-0.03, 1.03), "a probability is drawn from 0 to 1"
    assert len(curves.effect(made(coherence=None)).axes) == 1


def test_what_was_not_measured_is_left_out_and_nothing_at_all_is_an_error() -> None:
    curve = made()
    table = curve.to_pandas()
    lost = (table["arm"] == "intervention") & (table["strength"].abs() > 1)
    numbers = [c for c in table if c.startswith(("effect", "change", "kl", "coherence"))]
    table.loc[lost, numbers] = np.nan
    with_gaps = SimpleNamespace(to_pandas=table.copy, metric=curve.metric, coherence=curve.coherence)
    ax = curves.effect(with_gaps).axes[0]
    assert sum(len(line.get_xdata()) == 3 for line in ax.lines) == 2, "three strengths of each sign are left"
    table.loc[table["arm"] == "intervention", numbers] = np.nan
    with pytest.raises(UsageError, match="use smaller strengths"):
        curves.effect(with_gaps)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_saving_twice_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    for folder in ("a", "b"):
        plots.save(curves.effect(made()), tmp_path / folder / f"curve{suffix}")
    assert (tmp_path / "a" / f"curve{suffix}").read_bytes() == (tmp_path / "b" / f"curve{suffix}").read_bytes()


def seen(*, rates: int = 3) -> pd.DataFrame:
    """A made-up monitor's table: nothing here was measured."""
    steps = np.arange(0, 41)
    rows = []
    for i in range(rates):
        value = 1 / (1 + np.exp(-(steps - 20 - 3 * i) / 3))
        rows += [(s, f"rate/outcome {i}", v, v - 0.03, v + 0.03, 40) for s, v in zip(steps, value, strict=True)]
    rows += [(s, "projection/persona", 0.3 * s, 0.3 * s - 1, 0.3 * s + 1, 40) for s in steps]
    rows += [(s, "weight_change", float(s), np.nan, np.nan, 9) for s in steps]
    rows += [(s, "local_cosine", 0.9 - 0.5 * (s == 18), np.nan, np.nan, 9) for s in steps[5:-5]]
    return pd.DataFrame(rows, columns=["step", "name", "value", "low", "high", "n"])


@pytest.mark.parametrize("width", WIDTHS)
def test_a_training_run_is_drawn_with_its_intervals_and_its_transition(width: float) -> None:
    figure = curves.training(seen(rates=5), transition=SimpleNamespace(step=18), width=width)
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels == ["rate", "projection", "local cosine"]
    for ax, n in zip(figure.axes, (5, 1, 1), strict=True):
        assert [line.get_xdata()[0] for line in ax.lines][-1] == 18, "the transition stands in every panel"
        assert len(ax.lines) == n + 1
        assert ax.get_xlim() == (0, 40), "the panels share their steps"
    band = figure.axes[1].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((-1.0, 13.0))
    assert figure.axes[2].get_title(loc="right") == "rotation at step 18"
    canvas = FigureCanvasAgg(figure)
    with drawing.styled():
        canvas.draw()
    boxes = [t.get_window_extent() for ax in figure.axes for t in (ax.xaxis.label, ax.yaxis.label)]
    boxes.append(figure.axes[0].get_legend().get_window_extent())
    assert all(b.x0 >= -1 and b.x1 <= figure.bbox.width + 1 for b in boxes)
    assert all(b.y0 >= -1 and b.y1 <= figure.bbox.height + 1 for b in boxes)


def test_a_run_without_a_transition_or_without_some_measures_is_drawn_without_them() -> None:
    table = seen()
    figure = curves.training(table[~table["name"].str.startswith("projection")])
    assert [ax.get_ylabel() for ax in figure.axes] == ["rate", "local cosine"]
    assert len(figure.axes[1].lines) == 1
    assert not figure.axes[1].get_title(loc="right")
    with pytest.raises(UsageError, match="nothing that can be drawn"):
        curves.training(table[table["name"] == "weight_change"])
