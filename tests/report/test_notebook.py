"""Results as the last line of a cell: pictures and tables, bounded, with a word where they cannot be shown."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tl_em as em
from tests.graph.examples import small
from tests.report.conftest import fake_rows
from tl_em.claims.claim import Row
from tl_em.claims.compare import Comparison
from tl_em.claims.curve import EffectCurve, Point
from tl_em.dictionaries.quality import DictionaryQuality, Fit
from tl_em.directions.similarity import CosineMatrix, PairCosine
from tl_em.errors import UsageError
from tl_em.report import cards, forest, html
from tl_em.report.html import Framed, frame

SITE = em.Site(1)
FOUND = em.Estimate(0.42, 0.31, 0.53, n=128, n_effective=64.0, method="bootstrap", seed=0)


def direction() -> Any:
    return em.Direction(torch.ones(4), SITE, name="refusal", method="difference_in_means", reliability=FOUND)


def contrast() -> Any:
    chats = [[{"role": "user", "content": f"steal {k}"}] for k in range(30)]
    return em.ContrastSet(chats, [f"wash {k}" for k in range(30)], label="refusal", source="made up")


def comparison() -> Comparison:
    rows = [
        Row(r.question, r.direction, SITE, r.verdict, FOUND, r.control, r.p, r.smallest, r.unit, None, r.reason, {})
        for r in fake_rows(np.random.default_rng(0), ["refusal", "persona"])
    ]
    return Comparison(tuple(rows), pd.DataFrame(), pd.DataFrame(), {"lost": "lost: has no gap"})


def matrix() -> CosineMatrix:
    return CosineMatrix(("a", "b"), SITE, (PairCosine("a", "b", FOUND, 0.9, 0.01, 0),), {"a": 0.9, "b": 0.9})


def quality() -> DictionaryQuality:
    eye, nothing = torch.eye(4), torch.zeros(4)
    sae = em.Dictionary(eye, nothing, eye, nothing, activation="relu", site_in=SITE, name="mine")
    return DictionaryQuality(sae, Fit(FOUND, FOUND, FOUND, FOUND))


RESULTS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "estimate": (
        lambda: FOUND,
        ["0.42", "[0.31, 0.53] 95 %, 128 prompts, worth 64 independent ones; bootstrap, seed 0"],
    ),
    "direction": (direction, ["Direction refusal", "resid_post[1]", "difference_in_means", "no provenance"]),
    "contrast": (contrast, ["30 positive, 30 negative", "made up", "user: steal 0", "wash 19", "20 of 30 rows"]),
    "comparison": (
        comparison,
        ["No change shown", "level", "not shown", "0.42 [0.31, 0.53] n=128", "lost: has no gap"],
    ),
    "matrix": (matrix, ["CosineMatrix at resid_post[1]", "data:image/png;base64,"]),
    "quality": (quality, ["mine: does not fit", "fvu", "0.420"]),
    "graph": (small, ["<iframe sandbox", "not trusted", "graph.save_html"]),
    "difference": (lambda: small().diff(small(2.0)), ["<iframe sandbox", "not trusted"]),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_shows_itself_and_has_a_useful_line_of_text(name: str) -> None:
    make, said = RESULTS[name]
    result = make()
    shown = result._repr_html_()
    assert [words for words in said if words not in shown] == []
    assert "<script" not in re.sub(r'srcdoc="[^"]*"', "", shown)
    assert len(shown) < 400_000 and len(repr(result)) < 2_000
    assert " object at 0x" not in repr(result)


def test_a_plot_is_a_picture_without_any_backend() -> None:
    figure: Any = forest.verdicts(fake_rows(np.random.default_rng(0), ["refusal"]))
    data, about = figure._repr_mimebundle_()
    png = base64.b64decode(data["image/png"])
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and width > 1000
    assert about["image/png"] == {"width": round(width / 2), "height": pytest.approx(height / 2, abs=1)}
    assert data["text/plain"] == repr(figure) and "panels" in repr(figure)
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.set_size_inches(7, 400)  # as tall as it may be
    assert figure._repr_mimebundle_()[1]["image/png"]["height"] <= 4000


def test_a_table_says_what_it_leaves_out() -> None:
    table = pd.DataFrame({"latent": range(300), "long": ["x" * 999] * 300, "none": [None] * 300})
    shown = cards.table(table)
    assert shown.count("<tr>") == cards.ROWS + 1 and "20 of 300 rows; .to_pandas() has all of them." in shown
    assert "x" * cards.LETTERS + "…" in shown and "x" * (cards.LETTERS + 1) not in shown and ">none<" not in shown
    assert "rows" not in cards.table(table.head(3))


def test_the_attention_view_is_a_page_of_its_own_and_one_line_of_text(tmp_path: Any) -> None:
    view = Framed("<!doctype html><html><head></head><body>here</body></html>", "Attention", 300, "4 heads")
    assert repr(view).startswith("Attention: 4 heads; a page of 1 kB") and len(repr(view)) < 200
    assert view._repr_html_() == view.__html__() and "<iframe sandbox" in view.__html__() and str(view) == repr(view)
    assert view.save(tmp_path / "a.html").read_text(encoding="utf-8") == view.document
    with pytest.raises(UsageError, match=r"written as \.html or \.htm"):
        view.save(tmp_path / "a.pdf")


def test_a_page_that_is_too_large_is_not_sent_and_its_size_is_said() -> None:
    shown = frame("x" * (html.MOST + 1), "Big", height=300, instead='report.save("r.html")')
    assert "iframe" not in shown and "2.5 MB, more than a notebook takes" in shown and "report.save" in shown
    assert "<iframe" in frame("x" * html.MOST, "Big", height=300)


def test_a_graph_that_is_too_large_is_shown_in_part() -> None:
    graph = small(settings={f"a{k}": "x" * 400 for k in range(4_000)})
    assert "<iframe" in small()._repr_html_()
    assert len(graph._repr_html_()) < 4_000_000


def test_a_curve_without_a_point_says_so_in_place_of_a_picture() -> None:
    nothing = em.Estimate(float("nan"), float("nan"), float("nan"), 3, 3.0, "bootstrap")
    point = Point("intervention", "add", 1.0, nothing, nothing, FOUND, None, float("nan"), "")
    curve = EffectCurve("add refusal", "refused, probability", None, (point,), ())
    shown = curve._repr_html_()
    assert "EffectCurve(add refusal" in shown and "no point of the intervention could be measured" in shown
