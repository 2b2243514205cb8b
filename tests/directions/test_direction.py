"""Directions: what they refuse, what they keep, what they survive on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tl_em.directions.direction import Direction
from tl_em.directions.extract import difference_in_means
from tl_em.directions.profile import Profile
from tl_em.errors import (
    CorruptFileError,
    NonFiniteError,
    OutputError,
    TlEmError,
    UsageError,
    WidthError,
    ZeroDirectionError,
)
from tl_em.interventions.edits import Ablate, Clamp
from tl_em.interventions.subspaces import Erase
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
    assert loaded == made and again == bare and len({made, loaded, bare, again}) == 2
    assert bare != made and bare != Direction(2 * torch.ones(8), Site(0)) and bare != bare.renamed("b") and bare != 1
    profile = Profile([made])
    assert Profile.load(profile.save(tmp_path / "profile.safetensors")) == profile != Profile([made.renamed("b")])
    with pytest.raises(CorruptFileError, match=r"holds a profile. Read it as that: em\.Profile\.load\(path\)") as other:
        Direction.load(tmp_path / "profile.safetensors")
    assert type(other.value) is CorruptFileError


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


LONG, SHORT = [3e20, 4e20, 0.0], [3e-22, 0.0, -4e-22]


@pytest.mark.parametrize(
    "vector",
    [
        torch.tensor(LONG),
        torch.tensor(SHORT),
        torch.tensor([1e38, -1e38, 1e38]),
        torch.tensor([2e-38, 1e-38, 0.0]),
        torch.tensor([3, 4, 0]),
        torch.tensor([3.0, 4.0, 0.0], dtype=torch.float16),
        torch.tensor([3.0, 4.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
        np.array([3.0, 4.0, 0.0]),
        (3, 4, 0),
    ],
    ids=str,
)
def test_a_direction_of_any_length_and_kind_ablates(vector: Any) -> None:
    direction = Direction(vector, Site(1))
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    unit = direction.unit.double()
    assert abs(float(unit.norm()) - 1) < 1e-6
    before, after = x.double() @ unit, Ablate(direction).edit(x).double() @ unit
    assert before.abs().max() > 0.5 and after.abs().max() < 1e-6
    assert direction.norm == pytest.approx(float(np.linalg.norm(direction.vector.double().numpy())), rel=1e-6)
    erased = Erase([direction]).edit(x).double() @ unit
    assert erased.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("vector", "error"),
    [
        (torch.full((3,), 1e-42), ZeroDirectionError),
        (np.full(3, 1e-60), ZeroDirectionError),
        (np.full(3, 1e60), NonFiniteError),
        (torch.ones(1, 3), WidthError),
        ([], ZeroDirectionError),
        (torch.ones(3, device="meta"), UsageError),
        (torch.ones(3, dtype=torch.bool), UsageError),
        ("abc", UsageError),
    ],
    ids=str,
)
def test_what_float32_cannot_hold_is_refused(vector: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Direction(vector, Site(1))


def test_centres_and_bounds_are_finite_and_of_the_width() -> None:
    direction = Direction([3.0, 4.0], Site(1))
    assert Ablate(direction, around=[9.0, 1.0]).edit(torch.tensor([[3.0, 4.0]])).shape == (1, 2)
    for around in ([1.0, float("nan")], [1.0], torch.ones(1, 2), {}, {3: [1.0, 1.0]}, "mean"):
        with pytest.raises(TlEmError):
            Ablate(direction, around=around)
    for bounds in ({"low": 2, "high": 1}, {"low": float("nan")}, {"high": "1"}, {}):
        with pytest.raises(TlEmError):
            Clamp(direction, **bounds)
    for basis in ([], torch.zeros(2, 2), torch.ones(2), [[float("inf"), 1.0]], [direction, "x"]):
        with pytest.raises(TlEmError):
            Erase(basis)
