"""Figures: they draw what the tables say, change nothing global, and save to files that repeat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection

from tl_em.errors import OutputError, UsageError
from tl_em.report import drawing, forest, plots, rates
from tl_em.report.studies import study

WIDTHS = [3.25, 7.0]


def segments(ax: Any) -> np.ndarray:
    """The ends of every horizontal interval of a panel."""
    found = [path.vertices for c in ax.collections if isinstance(c, LineCollection) for path in c.get_paths()]
    return np.array([v[:, 0] for v in found if v.shape == (2, 2) and v[0, 1] == v[1, 1]])


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_drawn(report: Any, width: float) -> None:
    figures = plots.figures(report, width=width)
    directions = dict.fromkeys(report.comparison.by_layer["direction"])
    assert list(figures) == ["rates", *(f"layers-{name}" for name in directions), "verdicts", "use"]
    assert all(figure.get_figwidth() == width for figure in figures.values())


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_or_overlaps(report: Any, width: float) -> None:
    """Every text lies inside the figure, and no two panels' titles or axis labels overlap."""
    for name, figure in plots.figures(report, width=width).items():
        canvas = FigureCanvasAgg(figure)
        with drawing.styled():
            canvas.draw()
        renderer = canvas.get_renderer()
        texts = [t for ax in figure.axes for t in (ax.title, ax._left_title, ax.xaxis.label, *ax.texts)]
        boxes = [t.get_window_extent(renderer) for t in texts if t.get_text()]
        legend = figure.legends[0].get_window_extent(renderer)
        for box in [*boxes, legend]:
            assert box.x0 >= -1, name
            assert box.x1 <= figure.bbox.width + 1, name
            assert box.y0 >= -1, name
            assert box.y1 <= figure.bbox.height + 1, name
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]), name
        assert not any(legend.overlaps(box) for box in boxes), name


@pytest.mark.parametrize("lines", [5, 6, 7, 8])
def test_the_key_names_every_line_inside_the_figure(lines: int) -> None:
    arms = [f"{32 + n} · {'the same domain' if n % 2 else 'other domains'}" for n in range(lines)]
    rows = [{"arm": arm, "seed": s, "share": x, "bad": x / 2} for arm in arms for s in (1, 2) for x in (0.0, 1.0)]
    figure = study(pd.DataFrame(rows), x="share", by=["arm"], values=["bad"])
    with drawing.styled():
        FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    names = [text.get_window_extent() for text in legend.get_texts()]
    assert len(names) == lines
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 + 1 for box in names)


def test_rates_draws_every_interval_of_the_table(report: Any) -> None:
    ax = rates.by_domain(report.rates).axes[0]
    expected = report.rates[report.rates["outcome"] == "bad"][["low", "high"]].to_numpy()
    drawn = segments(ax)
    assert len(expected) == 30
    assert sorted(map(tuple, drawn.round(9))) == sorted(map(tuple, expected.round(9)))


def test_rates_puts_the_tuned_domain_first_and_marks_it(report: Any) -> None:
    shuffled = report.rates.sort_values("domain", ascending=False)
    labels = [label.get_text() for label in rates.by_domain(shuffled).axes[0].get_yticklabels()]
    assert labels[0] == "code (tuned on)"
    assert not any("tuned on" in label for label in labels[1:])


def test_layers_draws_the_control_band_and_the_site(report: Any) -> None:
    site = report.comparison.rows[0].site
    figure = plots.layers(report.comparison.by_layer, direction="persona", site=site)
    gap = next(ax for ax in figure.axes if ax.get_title(loc="left") == "gap")
    band = gap.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(-0.15)
    assert band[:, 1].max() == pytest.approx(0.15)
    assert any(line.get_linestyle() != "-" and set(line.get_xdata()) == {2} for line in gap.lines)


def test_layers_takes_the_stream_of_the_site(report: Any) -> None:
    table = report.comparison.by_layer
    other = table.assign(stream="mlp_out", value=table["value"] + 100, low=np.nan, high=np.nan)
    both = pd.concat([other, table])
    site = report.comparison.rows[0].site
    tops = [
        plots.layers(both, direction="persona", site=s, stream=t).axes[0].get_ylim()[1]
        for s, t in ((site, None), (None, "resid_post"), (None, "mlp_out"))
    ]
    assert tops[0] < 50
    assert tops[1] < 50
    assert tops[2] > 50


def test_verdicts_draws_each_row_against_its_own_smallest_effect(report: Any) -> None:
    figure = forest.verdicts(report.comparison.rows)
    titles = [ax.get_title(loc="left").split(",")[0] for ax in figure.axes]
    assert titles == ["level", "separation", "rotation", "use", "entanglement"]
    use = figure.axes[titles.index("use")]
    dashed = [c for c in use.collections if isinstance(c, LineCollection) and len(c.get_paths()) == 2]
    assert {round(float(p.vertices[0, 0]), 3) for c in dashed for p in c.get_paths()} == {-0.05, 0.05}


def test_use_fits_its_axis_to_log_odds(report: Any) -> None:
    table = report.comparison.use
    assert rates.use(table).axes[0].get_xlim() == (-0.02, 1.02)
    logits = table.assign(value=table["value"] * 10 - 5, low=table["low"] * 10 - 5, high=table["high"] * 10 - 5)
    assert rates.use(logits).axes[0].get_xlim()[0] < -4


def test_missing_intervals_are_drawn_as_points(report: Any) -> None:
    table = report.rates.assign(low=np.nan, high=np.nan)
    rates.by_domain(table).canvas.draw()
    with pytest.raises(UsageError, match=r"width=0\.1 is out of range"):
        rates.by_domain(table, width=0.1)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_saving_twice_gives_the_same_bytes(report: Any, tmp_path: Path, suffix: str) -> None:
    for folder in ("a", "b"):
        plots.save(rates.by_domain(report.rates), tmp_path / folder / f"rates{suffix}")
    assert (tmp_path / "a" / f"rates{suffix}").read_bytes() == (tmp_path / "b" / f"rates{suffix}").read_bytes()


def test_svg_text_is_text(report: Any, tmp_path: Path) -> None:
    assert ">medicine</text>" in plots.save(rates.by_domain(report.rates), tmp_path / "rates.svg").read_text()


def test_bad_requests_are_typed_errors(report: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no column outcome"):
        rates.by_domain(report.rates.drop(columns="outcome"))
    with pytest.raises(UsageError, match="no direction 'other'"):
        plots.layers(report.comparison.by_layer, direction="other")
    with pytest.raises(UsageError, match="level"):
        forest.verdicts([])
    figure = rates.by_domain(report.rates)
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
        plots.save(figure, tmp_path / "rates.gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        plots.save(figure, tmp_path / "file" / "rates.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_global_is_touched(small: Any, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for name, figure in plots.figures(small).items():
        plots.save(figure, tmp_path / f"{name}.svg")
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_hostile_names_are_drawn_as_they_are(hostile: Any, tmp_path: Path) -> None:
    for name, figure in plots.figures(hostile).items():
        text = plots.save(figure, tmp_path / f"{len(name)}.svg").read_text()
        assert "<script" not in text
        assert "<img" not in text
