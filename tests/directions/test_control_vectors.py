"""Control vectors: as repeng writes and reads them, as llama.cpp asks for them, and back as they were."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tl_em as em
from tests.directions.test_profile import PROMPTS, SET, directions, run
from tl_em.errors import CorruptFileError, FileError, ProvenanceError, TlEmError, UsageError, WidthError
from tl_em.interop import export_control_vector, import_control_vector

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.surface


def as_repeng(path: Path, vectors: dict[int, Any], *, kind: str = "controlvector", hint: str | None = "llama") -> Path:
    """The calls of repeng's ``ControlVector.export_gguf``, in their order."""
    writer = gguf.GGUFWriter(path, kind)
    if hint is not None:
        writer.add_string(f"{kind}.model_hint", hint)
    writer.add_uint32(f"{kind}.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def fields(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the package gguf reads."""
    reader = gguf.GGUFReader(path)
    tensors = {each.name: np.array(each.data) for each in reader.tensors}
    assert {each.tensor_type.name for each in reader.tensors} == {"F32"}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def test_what_is_written_is_what_the_others_read(small_model: Any, tmp_path: Path) -> None:
    given = directions(layers=(1, 2))
    path = export_control_vector(em.Profile(given), tmp_path / "a.gguf", model=small_model, coefficient=2.0)
    found, tensors = fields(path)
    assert found["general.architecture"] == "controlvector"
    assert (found["controlvector.model_hint"], found["controlvector.layer_count"]) == ("gpt2", 2)
    assert tensors.keys() == {"direction.1", "direction.2"}
    for each in given:
        vector = tensors[f"direction.{each.site.layer}"]
        assert vector.ndim == 1 and vector.dtype == np.float32
        assert np.array_equal(vector, (2.0 * each.vector).numpy())
    assert [each.name for each in tmp_path.iterdir()] == ["a.gguf"]


def test_direction_n_is_added_to_what_block_n_gives(
    surface: str, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    """As repeng's ControlModule does it, in the Hugging Face model itself."""
    from tests.conftest import make_hf_model
    from tests.directions.test_profile import TOKENS

    vectors = {i: np.random.default_rng(i).standard_normal(32).astype(np.float32) for i in (0, 2)}
    profile = import_control_vector(as_repeng(tmp_path / "r.gguf", vectors), name="happy")
    assert (profile.layers, profile.stream, profile.name) == ((0, 2), "resid_post", "happy")
    hf_model = make_hf_model("llama")

    def control(layer: int) -> Callable[..., Any]:
        def add(module: Any, args: Any, out: Any) -> Any:
            added = torch.from_numpy(vectors[layer]) * 1.5
            return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

        return add

    for layer in vectors:
        hf_model.model.layers[layer].register_forward_hook(control(layer))
    with torch.no_grad():
        theirs: Tensor = hf_model(TOKENS).logits
    ours = run(make_model("llama", surface), em.Add(profile, 1.5))
    assert (ours - theirs).abs().max() <= 1e-5 * float(theirs.std())
    assert (run(make_model("llama", surface)) - theirs).abs().max() > 0.1 * float(theirs.std())


def test_a_profile_comes_back_whole(small_model: Any, tmp_path: Path) -> None:
    profile = em.Profile(em.candidate_directions(small_model, SET, positions=[-2], layers=[2])).renamed("story")
    again = import_control_vector(export_control_vector(profile, tmp_path / "a.gguf", model=small_model))
    (one,), (other,) = profile.directions, again.directions
    assert torch.equal(one.vector, other.vector) and fields(tmp_path / "a.gguf")[1].keys() == {"direction.1"}
    for field in ("site", "position", "name", "provenance", "method", "reliability", "neutral"):
        assert getattr(one, field) == getattr(other, field)
    assert import_control_vector(tmp_path / "a.gguf", name="tale").name == "tale"
    export_control_vector(profile[2], tmp_path / "one.gguf", coefficient=-3.0)
    (back,) = import_control_vector(tmp_path / "one.gguf").directions
    assert torch.allclose(back.vector, one.vector, rtol=1e-6) and back.site == one.site
    assert fields(tmp_path / "one.gguf")[0]["controlvector.model_hint"] == "unknown"


def test_the_model_is_checked_and_becomes_the_provenance(small_model: Any, tmp_path: Path) -> None:
    vectors = {i: np.ones(32, dtype=np.float32) for i in (1, 2)}
    profile = import_control_vector(as_repeng(tmp_path / "r.gguf", vectors), model=small_model, position=-3)
    assert profile[1].provenance is not None and profile[1].provenance.differences(small_model) == []
    assert (profile[1].position, profile[1].method) == (-3, "control_vector")
    with pytest.raises(ProvenanceError, match="layer 7"):
        import_control_vector(as_repeng(tmp_path / "deep.gguf", {7: vectors[1]}), model=small_model)
    with pytest.raises(WidthError):
        import_control_vector(as_repeng(tmp_path / "w.gguf", {1: np.ones(8, dtype=np.float32)}), model=small_model)
    with pytest.raises(WidthError):
        export_control_vector(em.Profile(directions(width=8, layers=(1,))), tmp_path / "x.gguf", model=small_model)
    zero = {1: np.zeros(32, dtype=np.float32), 2: vectors[2]}
    assert import_control_vector(as_repeng(tmp_path / "z.gguf", zero)).layers == (2,)


@pytest.mark.parametrize(
    ("site", "said"),
    [
        (em.Site(0), "block 0"),
        (em.Site(1, "resid_pre"), "block 0"),
        (em.Site(0, "resid_pre"), "no output of a block"),
        (em.Site(1, "attn_out"), "no output of a block"),
    ],
)
def test_what_llama_cpp_cannot_add_is_refused_and_nothing_is_left(site: em.Site, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        export_control_vector(em.Direction(torch.ones(8), site), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stream", ["resid_post", "resid_pre"])
def test_what_is_advised_for_the_first_block_is_accepted(stream: Any, tmp_path: Path) -> None:
    first = ["resid_post", "resid_pre"].index(stream)
    profile = em.Profile([em.Direction(torch.ones(8), em.Site(at, stream)) for at in (first, 2, 3)])
    with pytest.raises(UsageError, match="block 0") as refused:
        export_control_vector(profile, tmp_path / "a.gguf")
    limit = int(re.search(r"if at > (\d)", str(refused.value))[1])  # pyright: ignore[reportOptionalSubscript]
    export_control_vector(em.Profile([profile[at] for at in profile if at > limit]), tmp_path / "a.gguf")
    assert len(import_control_vector(tmp_path / "a.gguf")) == 2


def test_no_coefficient_and_no_direction_are_refused(tmp_path: Path) -> None:
    for bad in (0.0, float("nan"), "2"):
        with pytest.raises(UsageError, match="coefficient"):
            export_control_vector(directions(layers=(1,))[0], tmp_path / "a.gguf", coefficient=bad)
    with pytest.raises(UsageError, match="no Direction and no Profile"):
        export_control_vector(torch.ones(3), tmp_path / "a.gguf")


def test_damaged_and_other_files_are_refused(tmp_path: Path) -> None:
    ones = np.ones(8, dtype=np.float32)
    with pytest.raises(FileError, match="no file"):
        import_control_vector(tmp_path / "none.gguf")
    with pytest.raises(CorruptFileError, match=r"of a 'llama'.*em\.load_model"):
        import_control_vector(as_repeng(tmp_path / "model.gguf", {1: ones}, kind="llama"))
    wrong: dict[str, dict[Any, Any]] = {
        "half": {1: ones.astype(np.float16)}, "square": {1: np.ones((8, 8), dtype=np.float32)}, "zero": {1: 0 * ones},
        "nan": {1: ones * np.nan}, "widths": {1: ones, 2: ones[:4]}, "name": {"x": ones}, "none": {},
    }  # fmt: skip
    for name, vectors in wrong.items():
        with pytest.raises(CorruptFileError):
            import_control_vector(as_repeng(tmp_path / f"{name}.gguf", vectors))
    whole = export_control_vector(em.Profile(directions(layers=(1, 2))), tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 20, 60, 200, len(whole) - 40):
        cut.write_bytes(whole[:size])
        with pytest.raises(CorruptFileError):
            import_control_vector(cut)
    changes = {b"direction.2": b"direction.7", b'"layer": 1': b'"layer": 4', b"control-vector/1": b"control-vector/9"}
    for old, new in changes.items():
        assert old in whole
        cut.write_bytes(whole.replace(old, new))
        with pytest.raises(CorruptFileError):
            import_control_vector(cut)
    rng = np.random.default_rng(0)
    for _ in range(60):  # a byte here and there: read, or refused in this package's words
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = int(rng.integers(256))
        cut.write_bytes(bytes(damaged))
        with suppress(TlEmError):
            assert import_control_vector(cut).width > 0


def test_steering_with_a_file_from_elsewhere_is_one_call(small_model: Any, tmp_path: Path) -> None:
    vectors = {i: 3 * np.random.default_rng(i).standard_normal(32).astype(np.float32) for i in (1, 2)}
    profile = import_control_vector(as_repeng(tmp_path / "r.gguf", vectors), model=small_model)
    with em.intervene(small_model, em.Add(profile, 5.0)):
        steered = em.generate(small_model, PROMPTS, max_new_tokens=4)
    assert steered != em.generate(small_model, PROMPTS, max_new_tokens=4)
    assert json.dumps(steered)
