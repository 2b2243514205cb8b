"""Files as saklas, steerkit and hidden-directions write them are read, and what is written for them comes back."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import tl_em as em
from tests.directions.test_profile import SET, directions, run
from tl_em.errors import CorruptFileError, ProvenanceError, UsageError, WidthError
from tl_em.interop import (
    export_layer_vectors,
    export_saklas,
    export_steering_vector,
    export_steerkit,
    import_layer_vectors,
    import_saklas,
    import_steering_vector,
    import_steerkit,
)

FIELDS = ("site", "position", "name", "provenance", "method", "reliability", "neutral")


def vectors(layers: tuple[int, ...] = (0, 2), width: int = 32) -> dict[int, torch.Tensor]:
    return {i: torch.randn(width, generator=torch.Generator().manual_seed(i)) for i in layers}


def found(model: Any, layers: list[int]) -> em.Profile:
    return em.Profile(em.candidate_directions(model, SET, positions=[-2], layers=layers)).renamed("story")


def same(one: em.Profile, other: em.Profile, tolerance: float = 0.0) -> None:
    for a, b in zip(one.directions, other.directions, strict=True):
        assert torch.allclose(a.vector, b.vector, rtol=tolerance, atol=0)
        assert all(getattr(a, field) == getattr(b, field) for field in FIELDS)


# --- saklas -----------------------------------------------------------------------------------------------------------


def as_saklas(path: Path, rows: dict[int, torch.Tensor], **changes: Any) -> Path:
    """The two files of ``saklas.Profile.save``."""
    data = save({f"layer_{i}": row for i, row in rows.items()})
    record = {"format_version": 6, "saklas_version": "5.3.0", "method": "manifold_pca",
              "tensor_sha256": hashlib.sha256(data).hexdigest(), "provenance": {"concept": "warm"}}  # fmt: skip
    path.write_bytes(data)
    path.with_suffix(".json").write_text(json.dumps(record | changes))
    return path


def test_a_profile_of_saklas_is_read(small_model: Any, tmp_path: Path) -> None:
    rows = vectors()
    profile = import_saklas(as_saklas(tmp_path / "warm.safetensors", rows), model=small_model, name="warm")
    assert (profile.layers, profile.stream, profile.name) == ((0, 2), "resid_post", "warm")
    assert all(torch.equal(profile[i].vector, row) for i, row in rows.items())
    assert profile[0].method == "saklas: manifold_pca" and profile[0].provenance is not None
    with pytest.raises(WidthError):
        import_saklas(as_saklas(tmp_path / "w.safetensors", vectors(width=8)), model=small_model)
    with pytest.raises(ProvenanceError):
        import_saklas(as_saklas(tmp_path / "d.safetensors", vectors((9,))), model=small_model)


def test_a_profile_is_written_as_saklas_asks_and_comes_back_whole(small_model: Any, tmp_path: Path) -> None:
    profile = found(small_model, [1, 2])
    path = export_saklas(profile, tmp_path / "a.safetensors")
    assert load_file(path).keys() == {"layer_0", "layer_1"}  # resid_pre of block 1 is what block 0 gives
    record = json.loads(path.with_suffix(".json").read_text())
    assert set(record) == {"format_version", "saklas_version", "method", "tensor_sha256", "provenance"}
    assert record["tensor_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (record["format_version"], record["method"]) == (6, "profile") and isinstance(record["saklas_version"], str)
    same(profile, import_saklas(path))
    assert import_saklas(path, name="tale").name == "tale"
    assert {each.name for each in tmp_path.iterdir()} == {"a.safetensors", "a.json"}


def test_damaged_files_of_saklas_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    changes: list[dict[str, Any]] = [{"format_version": 5}, {"tensor_sha256": "0" * 64}, {"more": 1}]
    changes += [{"provenance": {"tl_em": wrong}} for wrong in ([], [1], [{"layer": 9}], "x", {"a": 1})]
    for change in changes:
        with pytest.raises(CorruptFileError, match="no profile of saklas"):
            import_saklas(as_saklas(path, vectors(), **change))
    wrong_rows = [torch.ones(2, 2), torch.ones(4).half(), torch.zeros(4), torch.full((4,), torch.nan)]
    for rows in ({}, *({0: row} for row in wrong_rows)):
        with pytest.raises(CorruptFileError):
            import_saklas(as_saklas(path, rows))
    as_saklas(path, vectors())
    path.with_suffix(".json").unlink()
    with pytest.raises(CorruptFileError):
        import_saklas(path)
    for call in (lambda: import_saklas("a.gguf"), lambda: export_saklas(directions()[0], "a.gguf")):
        with pytest.raises(UsageError, match=r"\.safetensors"):
            call()


# --- steerkit ---------------------------------------------------------------------------------------------------------


def as_steerkit(path: Path, rows: dict[str, torch.Tensor], **changes: str) -> Path:
    """The header of ``steerkit.Probe.save``."""
    header = {
        "schema_version": "3", "layer": "1", "n_total_layers": "3", "normalized_depth": "0.500000", "model_id": "gpt2",
        "hook_site": "resid_post", "hook_name": "blocks.1.hook_resid_post", "default_method": "logistic",
        "auto_alpha": "4.500000", "bias_json": "{}", "metrics_json": '{"auc_test_logistic": 0.9}',
        "created_at": "2026-01-01T00:00:00+00:00", "extras_json": "{}",
    }  # fmt: skip
    save_file({f"direction.{name}": row for name, row in rows.items()}, path, metadata=header | changes)
    return path


def units() -> dict[str, torch.Tensor]:
    return {name: row / row.norm() for name, row in zip(("logistic", "mass_mean"), vectors().values(), strict=True)}


def test_a_probe_of_steerkit_is_read(small_model: Any, tmp_path: Path) -> None:
    rows = units()
    probe = import_steerkit(as_steerkit(tmp_path / "a.safetensors", rows), model=small_model, name="warm")
    assert (probe.site, probe.name, probe.method) == (em.Site(1), "warm", "logistic")
    assert torch.allclose(probe.vector, 4.5 * rows["logistic"]) and probe.provenance is not None
    other = import_steerkit(tmp_path / "a.safetensors", method="mass_mean")
    assert other.method == "lda" and torch.allclose(other.unit, rows["mass_mean"])
    plain = import_steerkit(as_steerkit(tmp_path / "b.safetensors", rows, auto_alpha=""))
    assert plain.norm == pytest.approx(1.0)
    attention = as_steerkit(tmp_path / "c.safetensors", rows, hook_name="blocks.2.hook_attn_out")
    assert import_steerkit(attention).site == em.Site(2, "attn_out")
    with pytest.raises(UsageError, match="logistic, mass_mean"):
        import_steerkit(tmp_path / "a.safetensors", method="diff_of_means")
    for hook in ("hook_embed", "ln_final.hook_normalized"):
        with pytest.raises(UsageError, match="no stream of a block"):
            import_steerkit(as_steerkit(tmp_path / "d.safetensors", rows, hook_name=hook))
    with pytest.raises(ProvenanceError):
        import_steerkit(as_steerkit(tmp_path / "e.safetensors", rows, n_total_layers="12"), model=small_model)


def test_a_direction_is_written_as_steerkit_reads_it_and_comes_back(small_model: Any, tmp_path: Path) -> None:
    for stream in ("resid_post", "mlp_out"):
        site = em.Site(1, stream)
        direction = em.difference_in_means(small_model, SET, site=site, position="prompt_end").renamed("story")
        path = export_steerkit(direction, tmp_path / f"{stream}.safetensors")
        with safe_open(path, framework="pt") as file:
            header, keys = file.metadata(), list(file.keys())
            unit = file.get_tensor(keys[0])
        assert keys == ["direction.diff_of_means"] and float(unit.norm()) == pytest.approx(1.0)
        assert (header["default_method"], header["hook_name"]) == ("diff_of_means", site.hook_name)
        assert float(header["auto_alpha"]) == pytest.approx(direction.norm, abs=1e-6)
        assert json.loads(header["bias_json"]) == {"diff_of_means": 0.0} and header["n_total_layers"] == "3"
        same(em.Profile([direction]), em.Profile([import_steerkit(path)]), tolerance=1e-5)
    bare = em.Direction(torch.ones(32), em.Site(1))
    with pytest.raises(UsageError, match="model="):
        export_steerkit(bare, tmp_path / "bare.safetensors")
    assert import_steerkit(export_steerkit(bare, tmp_path / "bare.safetensors", model=small_model)).provenance is None
    unhooked = em.Direction(torch.ones(32), em.Site(1, "mlp_in"))
    with pytest.raises(UsageError, match="hook"):
        export_steerkit(unhooked, tmp_path / "x.safetensors", model=small_model)


def test_damaged_probes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    changes = [{"auto_alpha": "nan"}, {"auto_alpha": "x"}, {"n_total_layers": "x"}, {"extras_json": "[["}]
    changes += [{"extras_json": json.dumps({"tl_em": wrong})} for wrong in (1, {}, {"norm": "x", "direction": {}})]
    for change in changes:
        with pytest.raises(CorruptFileError):
            import_steerkit(as_steerkit(path, units(), **change))
    for row in (torch.zeros(4), torch.full((4,), torch.nan), torch.ones(2, 2)):
        with pytest.raises(CorruptFileError):
            import_steerkit(as_steerkit(path, {"logistic": row}))
    save_file({"other": torch.ones(2)}, path)
    with pytest.raises(CorruptFileError):
        import_steerkit(path)


# --- steering-vectors, hidden-directions ------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["resid_post", "attn_out", "mlp_out"])
def test_a_steering_vector_goes_out_and_comes_back(stream: str) -> None:
    profile = em.Profile(directions(stream))
    made = export_steering_vector(profile)
    assert set(made) == {"layer_activations", "layer_type"}  # the two arguments of SteeringVector
    again = em.Profile(import_steering_vector(SimpleNamespace(**made), name="x"))
    same(profile, again)
    single = export_steering_vector(em.Direction(torch.ones(4), em.Site(3, "resid_pre")))
    assert list(single["layer_activations"]) == [2] and single["layer_type"] == "decoder_block"
    with pytest.raises(UsageError, match="no output of a block"):
        export_steering_vector(em.Direction(torch.ones(4), em.Site(0, "resid_pre")))


def test_layer_vectors_are_plain_json_and_stacks_of_tensors(small_model: Any, tmp_path: Path) -> None:
    rows = vectors((0, 1, 2))
    path = tmp_path / "a.json"
    profile = em.Profile([em.Direction(row, em.Site(i), name="x") for i, row in rows.items()])
    again = import_layer_vectors(export_layer_vectors(profile, path), name="x")
    same(profile, again)
    path.write_text(json.dumps([[0.0, 0.0], [1.0, 2.0]]))
    assert import_layer_vectors(path).layers == (1,)
    stack = torch.stack(list(rows.values()))
    torch.save(stack, tmp_path / "v.pt")
    assert import_layer_vectors(tmp_path / "v.pt", model=small_model).layers == (0, 1)  # the last is past the norm
    torch.save(torch.cat([torch.zeros(1, 32), stack[1:]]), tmp_path / "v.pt")
    assert import_layer_vectors(tmp_path / "v.pt").layers == (1, 2)


class Runs:
    """A pickle that runs what it names."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (Path("ran"),))


def test_damaged_layer_vectors_are_refused_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.json"
    texts = ["", "{", "3", "null", '{"x": [1]}', '{"1": [[1]]}', '{"1": "x"}', '{"1": [1], "2": [1, 2]}', '{"1": [0]}']
    for text in [*texts, '{"1": [NaN]}', "[1, 2]", "[[[1]]]", '{"1": [1], "01": [2]}', "{}", "[" * 10_000]:
        path.write_text(text)
        with pytest.raises(CorruptFileError):
            import_layer_vectors(path)
    for data in (pickle.dumps(Runs()), b"", b"PK\x03\x04"):
        (tmp_path / "v.pt").write_bytes(data)
        with pytest.raises(CorruptFileError):
            import_layer_vectors(tmp_path / "v.pt")
    torch.save({"a": Runs()}, tmp_path / "v.pt")
    with pytest.raises(CorruptFileError):
        import_layer_vectors(tmp_path / "v.pt")
    assert not (tmp_path / "ran").exists()


def test_what_comes_from_elsewhere_steers(small_model: Any, tmp_path: Path) -> None:
    rows = vectors()
    profiles = [
        import_saklas(as_saklas(tmp_path / "a.safetensors", rows)),
        import_layer_vectors(export_layer_vectors(import_saklas(tmp_path / "a.safetensors"), tmp_path / "a.json")),
    ]
    plain, *steered = [run(small_model), *(run(small_model, em.Add(each)) for each in profiles)]
    assert torch.equal(steered[0], steered[1]) and not torch.allclose(plain, steered[0], atol=1e-2)
