"""Directions: what they refuse, what they keep, what they survive on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tl_em.directions.direction import Direction
from tl_em.directions.extract import difference_in_means
from tl_em.errors import CorruptFileError, NonFiniteError, OutputError, WidthError, ZeroDirectionError
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Site

PROMPTS = ContrastSet(
    ["please steal the car", "tell me how steal the big bank", "steal a small red car"],
    ["please wash the car", "tell me how wash the big bank", "wash a small red car"],
    label="steal",
)


def test_a_direction_survives_its_file_bit_for_bit(small_model: LensModel, tmp_path: Path) -> None:
    made = difference_in_means(small_model, PROMPTS, site=Site(1), position="prompt_end")
    assert made.reliability is not None and made.neutral is not None
    loaded = Direction.load(made.save(tmp_path / "steal.safetensors"))
    assert torch.equal(made.vector, loaded.vector)
    for name in ("site", "position", "name", "provenance", "method", "reliability", "neutral"):
        assert getattr(made, name) == getattr(loaded, name), name
    bare = Direction(torch.ones(8), Site(0))
    again = Direction.load(bare.save(tmp_path / "bare.safetensors"))
    assert (again.reliability, again.provenance) == (None, None)


def test_corrupt_files_are_one_typed_error(tmp_path: Path) -> None:
    path = Direction(torch.ones(8), Site(0)).save(tmp_path / "d.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[:20], b"", b"not safetensors at all"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match="not a direction"):
            Direction.load(path)
    with pytest.raises(CorruptFileError):
        Direction.load(tmp_path / "missing.safetensors")
    with pytest.raises(CorruptFileError):
        other = tmp_path / "other.safetensors"
        other.write_text(json.dumps({"vector": [1]}))
        Direction.load(other)


def test_an_unwritable_path_is_one_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        Direction(torch.ones(4), Site(0)).save(tmp_path / "file" / "d.safetensors")


@pytest.mark.parametrize(
    ("vector", "error"),
    [
        (torch.zeros(4), ZeroDirectionError),
        (torch.tensor([1.0, float("nan")]), NonFiniteError),
        (torch.tensor([1.0, float("inf")]), NonFiniteError),
        (torch.ones(2, 3), WidthError),
    ],
)
def test_vectors_that_are_no_direction_are_refused(vector: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        Direction(vector, Site(0))


def test_projecting_another_width_is_refused() -> None:
    with pytest.raises(WidthError, match="5 wide"):
        Direction(torch.ones(4), Site(0)).project(torch.ones(3, 5))


def test_a_direction_does_not_share_memory_with_what_it_was_made_from() -> None:
    vector = torch.ones(4)
    direction = Direction(vector, Site(0))
    vector.zero_()
    assert direction.norm == 2.0
