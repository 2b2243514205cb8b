"""The heat map says what its table says, marks what is not shown, and is drawn from the palette alone."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from tl_em.errors import UsageError
from tl_em.report import drawing, matrices, plots, svg
from tl_em.showing import number

NAMES = ["harmfulness", "refusal", "refusal_dissociated", "persona"]
VALUES = [0.5, -0.25, 0.0, 0.9, 0.1, -0.8]


@pytest.fixture
def table() -> pd.DataFrame:
    rows = []
    for (first, second), value in zip(combinations(NAMES, 2), VALUES, strict=True):
        row: dict[str, Any] = {"first": first, "second": second, "value": value, "ceiling": 0.95}
        rows.append(row | {"low": value - 0.2, "high": value + 0.2, "p": 0.3 if value == 0.5 else 0.01})
    return pd.DataFrame(rows)


def cells(ax: Any) -> list[Rectangle]:
    return [p for p in ax.patches if to_hex(p.get_facecolor()) != drawing.BAND]


@pytest.mark.parametrize("width", [3.25, 7.0])
def test_every_pair_is_written_with_interval_and_ceiling(table: pd.DataFrame, width: float) -> None:
    ax = matrices.cosines(table, reliability=dict.fromkeys(NAMES, 0.97), width=width).axes[0]
    written = [text.get_text().replace("\n", " ") for text in ax.texts]
    assert min(text.get_fontsize() for text in ax.texts) >= 7
    for value, said in zip(VALUES, ["0.50", "−0.25", "0.00", "0.90", "0.10", "−0.80"], strict=True):
        assert said in written
        assert f"[{number(value - 0.2)}, {number(value + 0.2)}]" in written
    assert written.count("ceiling 0.95") == 6
    assert written.count("0.97") == 4


def test_colour_is_the_sign_and_opacity_the_size(table: pd.DataFrame) -> None:
    drawn = cells(matrices.cosines(table).axes[0])
    found = [(to_hex(c.get_facecolor()), round(c.get_alpha() / 0.65, 6)) for c in drawn]
    colours = [drawing.MODELS["tuned"].colour if v > 0 else drawing.MODELS["benign"].colour for v in VALUES]
    assert found == [(colour, abs(v)) for colour, v in zip(colours, VALUES, strict=True)]
    order = {(round(c.get_x() + 0.5), round(c.get_y() + 0.5)) for c in drawn}
    assert order == set(combinations(range(4), 2))  # below the diagonal: column before row


def test_what_is_not_shown_is_marked_and_only_that(table: pd.DataFrame) -> None:
    """p too large (.5), and intervals that reach 0 (0 and .1)."""
    ax = matrices.cosines(table).axes[0]
    marked = {tuple(round(float(z)) for z in (*line.get_xdata(), *line.get_ydata())) for line in ax.lines if
              line.get_marker() == "o"}  # fmt: skip
    assert marked == {(0, 1), (0, 3), (1, 3)}
    bold = [text.get_text() for text in ax.texts if text.get_fontweight() == "bold"]
    assert sorted(bold) == sorted(["−0.25", "0.90", "−0.80"])


@pytest.mark.parametrize(("width", "n"), [(3.25, 4), (7.0, 4), (7.0, 9), (3.25, 9), (6.75, 20)])
def test_nothing_is_cut_off_or_overlaps(table: pd.DataFrame, width: float, n: int) -> None:
    names = NAMES if n == 4 else [f"a_long_concept_{i}" for i in range(n)]
    rows = [dict(table.iloc[1], first=a, second=b) for a, b in combinations(names, 2)]
    figure = matrices.cosines(pd.DataFrame(rows), reliability=dict.fromkeys(names, 0.97), width=width)
    canvas = FigureCanvasAgg(figure)
    with drawing.styled():
        canvas.draw()
    (ax,) = figure.axes
    labels = [*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels()]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in labels]
    legend = figure.legends[0].get_window_extent(canvas.get_renderer())
    for box in [*boxes, legend]:
        assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.height + 1
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert not any(legend.overlaps(box) for box in boxes)


def test_on_a_page_every_colour_is_the_pages_own(table: pd.DataFrame) -> None:
    """So that light and dark each have theirs."""
    drawn = str(svg.inline(matrices.cosines(table), "cosines"))
    assert "var(--tuned)" in drawn and "var(--benign)" in drawn and "opacity" in drawn
    assert not re.findall(r"#[0-9a-f]{6}", drawn)


def test_saving_twice_gives_the_same_bytes(table: pd.DataFrame, tmp_path: Path) -> None:
    first, second = (plots.save(matrices.cosines(table), tmp_path / k / "m.svg").read_bytes() for k in "ab")
    assert first == second


def test_bad_tables_are_typed_errors(table: pd.DataFrame) -> None:
    with pytest.raises(UsageError, match="ceiling"):
        matrices.cosines(table.drop(columns="ceiling"))
    with pytest.raises(UsageError, match="0 rows"):
        matrices.cosines(table.iloc[:0])
