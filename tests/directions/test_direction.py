"""Directions: what they refuse, what they keep, what they survive on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tl_em.directions.direction import Direction
from tl_em.directions.extract import difference_in_means, differences_in_means
from tl_em.errors import CorruptFileError, NonFiniteError, OutputError, WidthError, ZeroDirectionError
from tl_em.models.capture import capture
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Site

PROMPTS = ContrastSet(
    ["please steal the car", "tell me how steal the big bank", "steal a small red car"],
    ["please wash the car", "tell me how wash the big bank", "wash a small red car"],
    label="steal",
)


def test_difference_in_means_is_the_difference_of_the_captured_means(model: LensModel) -> None:
    sites = [Site(0), Site(2, "resid_pre"), Site(1, "mlp_out")]
    found = differences_in_means(model, PROMPTS, sites=sites, positions=["instruction_end", "prompt_end"])
    assert [(d.site, d.position) for d in found] == [(s, p) for p in ("instruction_end", "prompt_end") for s in sites]
    for direction in found:
        acts = [
            capture(model, prompts, [direction.site], position=direction.position)[:, 0]
            for prompts in (PROMPTS.positive, PROMPTS.negative)
        ]
        expected = acts[0].double().mean(0) - acts[1].double().mean(0)
        torch.testing.assert_close(direction.vector.double(), expected, rtol=1e-4, atol=1e-5)  # float32 batches
    assert found[0].provenance is not None
    assert found[0].provenance.data == PROMPTS.hash
    assert found[0].provenance.differences(model) == []


def test_a_direction_survives_its_file_bit_for_bit(small_model: LensModel, tmp_path: Path) -> None:
    made = difference_in_means(small_model, PROMPTS, site=Site(1), position="prompt_end")
    loaded = Direction.load(made.save(tmp_path / "steal.safetensors"))
    assert torch.equal(made.vector, loaded.vector)
    assert (made.site, made.position, made.name, made.provenance) == (
        loaded.site, loaded.position, loaded.name, loaded.provenance,
    )  # fmt: skip


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
