"""Artefacts appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tl_em.artefacts import check_writable, replacing
from tl_em.errors import OutputError


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    with replacing(target) as temporary:
        temporary.write_text("first")
    with pytest.raises(RuntimeError, match="half way"), replacing(target) as temporary:
        temporary.write_text("second, half")
        raise RuntimeError("half way")
    assert target.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_path_that_cannot_be_written_is_one_typed_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    for call in (
        lambda: check_writable(blocker / "report.html"),
        lambda: replacing(blocker / "report.html").__enter__(),
    ):
        with pytest.raises(OutputError, match="cannot write"):
            call()
    with pytest.raises(OutputError, match="is a directory"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "report.html")
    assert not (tmp_path / "new").exists()
