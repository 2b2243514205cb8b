"""Figures of graphs, and attention patterns: drawn from the page's data, written whole, safe."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import PathPatch

from tests.graph.examples import large, small
from tl_em.errors import UsageError
from tl_em.graph import attention
from tl_em.graph.attention import attention_pattern, attention_view
from tl_em.report import drawing, graphs


@pytest.mark.parametrize("width", [3.25, 7.0])
def test_every_strong_link_and_node_is_drawn_inside_the_figure(width: float) -> None:
    figure = graphs.graph(large(120, 600), width=width, links=100)
    ax = figure.axes[0]
    assert len([patch for patch in ax.patches if isinstance(patch, PathPatch)]) == 100
    assert len(ax.lines) == 120
    canvas = FigureCanvasAgg(figure)
    with drawing.styled():
        canvas.draw()
    for label in (*ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label):
        box = label.get_window_extent(canvas.get_renderer())
        assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y0 >= -1, label.get_text()


def test_the_figure_says_how_far_to_believe_it() -> None:
    assert "r with exact ablation 0.90" in graphs.graph(small()).axes[0].get_xlabel()
    assert graphs.graph(small(validation={})).axes[0].get_xlabel() == "not validated by ablation"


def test_a_difference_is_drawn_in_colour_and_texture() -> None:
    figure = graphs.graph(small().keep([0, 1, 2, 3, 5]).diff(small(2.0).keep([0, 1, 2, 4, 5])))
    looks = {(patch.get_edgecolor()[:3], str(patch.get_linestyle())) for patch in figure.axes[0].patches}
    assert len(looks) == 3 == len({colour for colour, _ in looks})  # appeared, vanished, stronger


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_a_graph_gives_the_same_file_twice(tmp_path: Path, suffix: str) -> None:
    files = [small().save_figure(tmp_path / name / f"g.{suffix}").read_bytes() for name in "ab"]
    assert len(files[0]) > 2000 and files[0] == files[1]
    with pytest.raises(UsageError, match="written as"):
        small().save_figure(tmp_path / "g.gif")


@pytest.mark.surface
def test_the_attention_pattern_is_the_models(small_model: Any) -> None:
    pattern = attention_pattern(small_model, "the cat sat", 1)
    heads, query, key = pattern.shape
    assert heads == 4 and query == key
    torch.testing.assert_close(pattern.sum(-1), torch.ones(heads, query), atol=1e-5, rtol=0)  # float32 softmax
    assert not pattern.triu(1).any()  # causal, so not some other hook's tensor
    with pytest.raises(UsageError, match="layers 0 to 2"):
        attention_pattern(small_model, "the cat sat", 3)


def test_the_attention_view_is_sandboxed_and_its_tokens_inert(small_model: Any, monkeypatch: Any) -> None:
    pytest.importorskip("circuitsvis")
    hostile = "</script><script>alert(1)</script>\u2028"
    monkeypatch.setattr(attention, "text_of", lambda model, token: hostile)
    shown = attention_view(small_model, "the cat sat", 0).__html__()
    found = re.search(r'<iframe sandbox="allow-scripts allow-downloads" [^>]*srcdoc="([^"]*)"', shown)
    assert found
    document = html.unescape(found.group(1))
    assert "default-src 'none'" in document
    assert "alert(1)" in document and "<script>alert" not in document and "\u2028" not in document
    assert document.count("</script>") == 1
