"""Files of other libraries encode and decode as those libraries do, by their equations, or are refused by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tl_em as em
from tl_em.errors import CorruptFileError, FileError, NonFiniteError, UsageError

WIDTH, LATENTS = 8, 20
SITE = em.Site(5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def x() -> Tensor:
    return 2 * draw(30, WIDTH, seed=99)


def same(found: em.Dictionary, x: Tensor, a: Tensor, said: Tensor) -> None:
    assert 0 < (a > 0).float().mean() < 0.95
    torch.testing.assert_close(found.encode(x), a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.reconstruct(x), said, atol=1e-4, rtol=1e-5)


# ---- dictionary_learning -----------------------------------------------------------------------------------------
LINEAR = {"encoder.weight": draw(LATENTS, WIDTH), "encoder.bias": draw(LATENTS), "decoder.weight": draw(WIDTH, LATENTS)}
MATRICES = {"W_enc": draw(WIDTH, LATENTS), "b_enc": draw(LATENTS), "W_dec": draw(LATENTS, WIDTH), "b_dec": draw(WIDTH)}


def trained(folder: Path, kind: str | None, state: dict[str, Any], **trainer: Any) -> Path:
    torch.save(state, folder / "ae.pt")
    said = {"dict_class": kind, "layer": 5, "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_5"}
    config = {"trainer": said | trainer, "buffer": {"ctx_len": 128, "io": "out"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_an_autoencoder_takes_its_bias_off_and_its_rows_are_of_length_one(tmp_path, x):
    bias = draw(WIDTH, seed=3)
    found = em.load_dictionary(trained(tmp_path, "AutoEncoder", {**LINEAR, "bias": bias}))
    D = LINEAR["decoder.weight"]
    assert not torch.allclose(D.norm(dim=0), torch.ones(LATENTS))
    f = ((x - bias) @ LINEAR["encoder.weight"].T + LINEAR["encoder.bias"]).relu()
    same(found, x, f * D.norm(dim=0), f @ D.T + bias)
    assert found.site_in == SITE and found.metadata["model_name"] == "EleutherAI/pythia-70m"
    assert found.metadata["context_size"] == 128


def test_the_newer_autoencoder_takes_nothing_off(tmp_path, x):
    bias = draw(WIDTH, seed=3)
    found = em.load_dictionary(trained(tmp_path, "AutoEncoderNew", {**LINEAR, "decoder.bias": bias}))
    f = (x @ LINEAR["encoder.weight"].T + LINEAR["encoder.bias"]).relu()
    same(found, x, f, f @ LINEAR["decoder.weight"].T + bias)


@pytest.mark.parametrize("named", [True, False])
def test_a_gated_autoencoder_is_on_where_its_gate_is(tmp_path, x, named):
    state = {
        "encoder.weight": draw(LATENTS, WIDTH),
        "decoder.weight": draw(WIDTH, LATENTS),
        "r_mag": draw(LATENTS) / 2,
        "gate_bias": draw(LATENTS, seed=1),
        "mag_bias": draw(LATENTS, seed=2),
        "decoder_bias": draw(WIDTH, seed=3),
    }
    found = em.load_dictionary(trained(tmp_path, "GatedAutoEncoder" if named else None, state))
    before = (x - state["decoder_bias"]) @ state["encoder.weight"].T
    gate = before + state["gate_bias"] > 0
    magnitude = (state["r_mag"].exp() * before + state["mag_bias"]).relu()
    assert (gate & (magnitude == 0)).any() and (~gate & (magnitude > 0)).any()  # the two disagree, both ways
    a = gate * magnitude
    same(found, x, a, a @ state["decoder.weight"].T + state["decoder_bias"])


def test_topk_keeps_k_at_each_token_and_ignores_the_threshold_of_its_training(tmp_path, x):
    state = {**LINEAR, "b_dec": draw(WIDTH, seed=3), "k": torch.tensor(4), "threshold": torch.tensor(0.5)}
    found = em.load_dictionary(trained(tmp_path, "AutoEncoderTopK", state, k=4))
    before = ((x - state["b_dec"]) @ LINEAR["encoder.weight"].T + LINEAR["encoder.bias"]).relu()
    a = before * (before >= before.topk(4).values[:, -1:])
    same(found, x, a, a @ LINEAR["decoder.weight"].T + state["b_dec"])
    assert found.activation == "topk" and found.k == 4 and found.threshold is None


@pytest.mark.parametrize("matryoshka", [False, True])
def test_batch_topk_is_on_above_its_threshold(tmp_path, x, matryoshka):
    extra = {"k": torch.tensor(4), "threshold": torch.tensor(1.5), "b_dec": MATRICES["b_dec"]}
    state = {**(MATRICES if matryoshka else LINEAR), **extra}
    state |= {"group_sizes": torch.tensor([5, 15])} if matryoshka else {}
    kind = "MatryoshkaBatchTopKSAE" if matryoshka else "BatchTopKSAE"
    found = em.load_dictionary(trained(tmp_path, kind, state, k=4))
    W, b = (
        (MATRICES["W_enc"], MATRICES["b_enc"]) if matryoshka else (LINEAR["encoder.weight"].T, LINEAR["encoder.bias"])
    )
    before = (x - state["b_dec"]) @ W + b
    a = torch.where(before > 1.5, before, 0.0)
    rows = MATRICES["W_dec"] if matryoshka else LINEAR["decoder.weight"].T
    same(found, x, a, a @ rows + state["b_dec"])
    assert found.activation == "jumprelu"


def test_jumprelu_takes_nothing_off_and_below_zero_is_a_relu(tmp_path, x):
    threshold = draw(LATENTS, seed=5)
    assert (threshold < 0).any() and (threshold > 0).any()
    found = em.load_dictionary(trained(tmp_path, "JumpReluAutoEncoder", {**MATRICES, "threshold": threshold}))
    before = x @ MATRICES["W_enc"] + MATRICES["b_enc"]
    a = (before * (before > threshold)).relu()
    same(found, x, a, a @ MATRICES["W_dec"] + MATRICES["b_dec"])


def test_what_two_classes_share_needs_the_name_of_the_class(tmp_path):
    state = {**LINEAR, "b_dec": draw(WIDTH), "k": torch.tensor(4), "threshold": torch.tensor(0.5)}
    with pytest.raises(UsageError, match=r"AutoEncoderTopK or a BatchTopKSAE.*dict_class"):
        em.load_dictionary(trained(tmp_path, None, state))


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"dict_class": "CrossCoder"}, UsageError, "dict_class"),
        ({"dict_class": "GatedAutoEncoder"}, CorruptFileError, "dict_class"),
        ({"k": 5}, CorruptFileError, "k=4"),
        ({"layer": 3}, CorruptFileError, "submodule_name"),
        ({"submodule_name": None}, UsageError, "submodule_name"),
    ],
)
def test_settings_that_contradict_the_file_are_refused_by_name(tmp_path, changes, error, named):
    state = {**LINEAR, "b_dec": draw(WIDTH), "k": torch.tensor(4), "threshold": torch.tensor(0.5)}
    assert em.load_dictionary(trained(tmp_path, "AutoEncoderTopK", state, k=4)).k == 4
    with pytest.raises(error, match=named):
        settings = {"k": 4} | changes
        em.load_dictionary(trained(tmp_path, settings.pop("dict_class", "AutoEncoderTopK"), state, **settings))


def test_a_threshold_that_was_never_measured_is_refused(tmp_path):
    state = {**LINEAR, "b_dec": draw(WIDTH), "k": torch.tensor(4), "threshold": torch.tensor(-1.0)}
    with pytest.raises(UsageError, match=r"threshold=-1.0"):
        em.load_dictionary(trained(tmp_path, "BatchTopKSAE", state))


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (Path.touch, (Path("ran"),))  # pyright: ignore[reportReturnType]


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder.weight": Evil()}, tmp_path / "ae.pt")
    with pytest.raises(CorruptFileError, match=r"run code"):
        em.load_dictionary(tmp_path / "ae.pt", site_in=SITE)
    np.savez(tmp_path / "params.npz", W_enc=np.array([Evil()], dtype=object))
    with pytest.raises(CorruptFileError, match=r"no plain arrays"):
        em.load_dictionary(tmp_path / "params.npz", site_in=SITE)
    assert not (tmp_path / "ran").exists()


# ---- Gemma Scope -------------------------------------------------------------------------------------------------
SCOPE = {
    "W_enc": draw(WIDTH, LATENTS),
    "b_enc": draw(LATENTS),
    "W_dec": draw(LATENTS, WIDTH),
    "b_dec": draw(WIDTH),
    "threshold": draw(LATENTS).abs(),
}


def scope(folder: Path, repository: str, **changes: Tensor) -> Path:
    inside = folder / f"models--google--{repository}" / "layer_5" / "width_16k" / "average_l0_71"
    inside.mkdir(parents=True)
    np.savez(inside / "params.npz", **{name: each.numpy() for name, each in {**SCOPE, **changes}.items()})
    return inside


def test_gemma_scope_is_a_jumprelu_of_the_raw_stream(tmp_path, x):
    found = em.load_dictionary(scope(tmp_path, "gemma-scope-2b-pt-res"))
    before = x @ SCOPE["W_enc"] + SCOPE["b_enc"]
    a = torch.where(before > SCOPE["threshold"], before, 0.0)
    same(found, x, a, a @ SCOPE["W_dec"] + SCOPE["b_dec"])
    assert (found.site_in, found.metadata["model_name"]) == (SITE, "google/gemma-2-2b")


def test_gemma_scope_says_by_its_folders_where_it_was_trained(tmp_path):
    assert em.load_dictionary(scope(tmp_path / "a", "gemma-scope-9b-pt-mlp")).site_in == em.Site(5, "mlp_out")
    transcoder = em.load_dictionary(scope(tmp_path / "b", "gemma-scope-2b-pt-transcoders") / "params.npz")
    assert (transcoder.site_in, transcoder.site_out) == (em.Site(5, "mlp_in"), em.Site(5, "mlp_out"))
    assert transcoder.metadata["before_norm_weight"] is True
    with pytest.raises(UsageError, match=r"hook_z"):
        em.load_dictionary(scope(tmp_path / "c", "gemma-scope-2b-pt-att"), site_in=SITE)
    elsewhere = tmp_path / "params.npz"
    np.savez(elsewhere, **{name: each.numpy() for name, each in SCOPE.items()})
    with pytest.raises(UsageError, match=r"site_in"):
        em.load_dictionary(elsewhere)
    assert em.load_dictionary(elsewhere, site_in=SITE).site_in == SITE
    with pytest.raises(NonFiniteError, match=r"threshold"):
        em.load_dictionary(scope(tmp_path / "d", "gemma-scope-2b-pt-res", threshold=SCOPE["threshold"] / 0))


def scope_2(folder: Path, skip: Tensor | None = None, **config: Any) -> Path:
    tensors = {{"W_enc": "w_enc", "W_dec": "w_dec"}.get(name, name): each for name, each in SCOPE.items()}
    tensors |= {} if skip is None else {"affine_skip_connection": skip}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder / "params.safetensors")
    said = {
        "architecture": "jump_relu",
        "model_name": "gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
    }
    (folder / "config.json").write_text(json.dumps(said | config), encoding="utf-8")
    return folder


def test_gemma_scope_2_reads_what_its_hugging_face_hook_says(tmp_path, x):
    skip = draw(WIDTH, WIDTH) / 3
    found = em.load_dictionary(scope_2(tmp_path, skip, affine_connection=True))
    assert (found.site_in, found.site_out) == (em.Site(5, "mlp_in"), em.Site(5, "mlp_out"))
    assert "before_norm_weight" not in found.metadata
    before = x @ SCOPE["W_enc"] + SCOPE["b_enc"]
    a = torch.where(before > SCOPE["threshold"], before, 0.0)
    same(found, x, a, a @ SCOPE["W_dec"] + SCOPE["b_dec"] + x @ skip)
    sae = em.load_dictionary(scope_2(tmp_path, hf_hook_point_in="model.layers.5.output", hf_hook_point_out=None))
    assert (sae.site_in, sae.site_out) == (SITE, SITE)


def test_gemma_scope_2_refuses_what_contradicts_itself(tmp_path):
    with pytest.raises(CorruptFileError, match=r"affine_connection"):
        em.load_dictionary(scope_2(tmp_path, affine_connection=True))
    with pytest.raises(UsageError, match=r"architecture='topk'"):
        em.load_dictionary(scope_2(tmp_path, architecture="topk"))
    with pytest.raises(UsageError, match=r"hf_hook_point_in.*o_proj"):
        em.load_dictionary(scope_2(tmp_path, hf_hook_point_in="model.layers.5.self_attn.o_proj.input"))


# ---- sparsify ----------------------------------------------------------------------------------------------------
def sparsify(folder: Path, hookpoint: str, *, skip: Tensor | None = None, drop: str = "", **cfg: Any) -> Path:
    inside = folder / hookpoint
    inside.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": draw(LATENTS, WIDTH),
        "encoder.bias": draw(LATENTS),
        "W_dec": draw(LATENTS, WIDTH),
        "b_dec": draw(WIDTH),
    } | ({} if skip is None else {"W_skip": skip})
    save_file({name: each for name, each in tensors.items() if name != drop}, inside / "sae.safetensors")
    said = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": LATENTS,
        "k": 4,
        "skip_connection": skip is not None,
        "transcode": False,
        "d_in": WIDTH,
        "multi_topk": False,
    }
    (inside / "cfg.json").write_text(json.dumps(said | cfg), encoding="utf-8")
    run = {"model": "HuggingFaceTB/SmolLM2-135M", "dataset": "fineweb", "ctx_len": 2049}
    (folder / "config.json").write_text(json.dumps(run), encoding="utf-8")
    return inside


def topk(before: Tensor, k: int) -> Tensor:
    before = before.relu()
    return before * (before >= before.topk(k).values[:, -1:])


def test_sparsify_takes_its_bias_off_and_reads_a_modules_output(tmp_path, x):
    found = em.load_dictionary(sparsify(tmp_path, "layers.5"))
    a = topk((x - draw(WIDTH)) @ draw(LATENTS, WIDTH).T + draw(LATENTS), 4)
    same(found, x, a, a @ draw(LATENTS, WIDTH) + draw(WIDTH))
    assert found.site_in == SITE and found.metadata["model_name"] == "HuggingFaceTB/SmolLM2-135M"
    mlp = em.load_dictionary(sparsify(tmp_path, "layers.5.mlp") / "sae.safetensors")
    assert (mlp.site_in, mlp.is_transcoder, mlp.metadata["module_output"]) == (em.Site(5, "mlp_out"), False, True)
    assert em.load_dictionary(sparsify(tmp_path / "layers.5", "seed0")).site_in == SITE


def test_a_transcoder_of_sparsify_takes_nothing_off_and_keeps_its_skip(tmp_path, x):
    skip = draw(WIDTH, WIDTH) / 3
    found = em.load_dictionary(sparsify(tmp_path, "layers.5.mlp", transcode=True, skip=skip))
    assert (found.site_in, found.site_out) == (em.Site(5, "mlp_in"), em.Site(5, "mlp_out"))
    a = topk(x @ draw(LATENTS, WIDTH).T + draw(LATENTS), 4)
    same(found, x, a, a @ draw(LATENTS, WIDTH) + draw(WIDTH) + x @ skip.T)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"activation": "groupmax"}, UsageError, "activation='groupmax'"),
        ({"signed": True}, UsageError, "signed=True"),
        ({"k": LATENTS + 1}, UsageError, "k=21"),
        ({"k": None}, UsageError, "without k"),
        ({"skip_connection": True}, CorruptFileError, "skip_connection"),
        ({"d_in": 9}, CorruptFileError, "d_in"),
        ({"num_latents": 0}, CorruptFileError, "256"),
        ({"drop": "b_dec"}, CorruptFileError, "lacks b_dec"),
    ],
)
def test_sparsify_is_refused_by_the_field(tmp_path, changes, error, named):
    assert em.load_dictionary(sparsify(tmp_path, "layers.5")).k == 4
    with pytest.raises(error, match=named):
        em.load_dictionary(sparsify(tmp_path, "layers.5", **changes))


# ---- circuit-tracer ----------------------------------------------------------------------------------------------
def tracer(
    folder: Path,
    *,
    hook: str = "mlp.hook_in",
    out: str = "hook_mlp_out",
    layers: int = 2,
    kind: str = "transcoder_set",
    **extra: Tensor,
) -> Path:
    tensors = {
        "W_enc": draw(LATENTS, WIDTH),
        "b_enc": draw(LATENTS),
        "W_dec": draw(LATENTS, WIDTH),
        "b_dec": draw(WIDTH),
    }
    for layer in range(layers):
        save_file({**tensors, **extra}, folder / f"layer_{layer}.safetensors")
    (folder / "config.yaml").write_text(
        f'model_name: "meta-llama/Llama-3.2-1B"\nmodel_kind: {kind}\nfeature_input_hook: "{hook}"  # read here\n'
        f"feature_output_hook: {out}\nscan: mntss/x\ntranscoders:\n  - a\n  - b\n",
        encoding="utf-8",
    )
    return folder


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("jump", [False, True])
def test_a_transcoder_of_circuit_tracer_is_a_relu_or_a_jumprelu_with_a_skip_or_without(tmp_path, x, skip, jump):
    W_skip, threshold = draw(WIDTH, WIDTH) / 3, draw(LATENTS).abs()
    extra = ({"W_skip": W_skip} if skip else {}) | ({"activation_function.threshold": threshold} if jump else {})
    found = em.load_dictionary(tracer(tmp_path, **extra) / "layer_1.safetensors")
    assert (found.site_in, found.site_out) == (em.Site(1, "mlp_in"), em.Site(1, "mlp_out"))
    before = x @ draw(LATENTS, WIDTH).T + draw(LATENTS)
    a = torch.where(before > (threshold if jump else 0), before, 0.0)
    same(found, x, a, a @ draw(LATENTS, WIDTH) + draw(WIDTH) + (x @ W_skip.T if skip else 0))
    assert em.load_dictionary(tmp_path, layer=1).hash == found.hash
    assert found.metadata["model_name"] == "meta-llama/Llama-3.2-1B"


def test_the_hooks_of_circuit_tracer_are_transformerlenss(tmp_path):
    assert em.load_dictionary(tracer(tmp_path, hook="hook_resid_mid"), layer=0).site_in == em.Site(0, "resid_mid")
    raw = em.load_dictionary(tracer(tmp_path, hook="ln2.hook_normalized"), layer=0)
    assert raw.site_in == em.Site(0, "mlp_in") and raw.metadata["before_norm_weight"] is True
    with pytest.raises(UsageError, match=r"feature_input_hook.*hook_z"):
        em.load_dictionary(tracer(tmp_path, hook="attn.hook_z"), layer=0)


def test_a_set_of_circuit_tracer_asks_which_layer_and_an_older_file_is_turned(tmp_path, x):
    with pytest.raises(UsageError, match=r"pass layer="):
        em.load_dictionary(tracer(tmp_path))
    whole = em.load_dictionary(tmp_path, layer=0)
    turned = tracer(tmp_path, layers=1, W_dec=draw(LATENTS, WIDTH).T.contiguous())
    assert em.load_dictionary(turned / "layer_0.safetensors").hash == whole.hash
    together = {
        f"transcoders.{layer}.{name}": each
        for layer in (0, 1)
        for name, each in {
            "W_enc": draw(LATENTS, WIDTH),
            "b_enc": draw(LATENTS) + layer,
            "W_dec": draw(LATENTS, WIDTH),
            "b_dec": draw(WIDTH),
        }.items()
    }
    save_file(together, tmp_path / "all.safetensors")
    first, second = (em.load_dictionary(tmp_path / "all.safetensors", layer=layer) for layer in (0, 1))
    assert (first.hash, second.site_in.layer) == (whole.hash, 1) and first.hash != second.hash
    with pytest.raises(UsageError, match=r"layers \[0, 1\]"):
        em.load_dictionary(tmp_path / "all.safetensors", layer=2)


def test_circuit_tracers_other_kinds_are_refused_by_field(tmp_path):
    with pytest.raises(UsageError, match=r"model_kind='cross_layer_transcoder'"):
        em.load_dictionary(tracer(tmp_path, kind="cross_layer_transcoder"), layer=0)
    with pytest.raises(UsageError, match=r"threshold"):
        em.load_dictionary(tracer(tmp_path, **{"activation_function.threshold": draw(LATENTS)}), layer=0)
    with pytest.raises(UsageError, match=r"log_thresholds"):
        em.load_dictionary(tracer(tmp_path, log_thresholds=draw(LATENTS)), layer=0)


# ---- every format ------------------------------------------------------------------------------------------------
def made_by(name: str, folder: Path) -> Path:
    """A file of the format whose weights can be damaged."""
    folder.mkdir()
    if name == "dictionary_learning":
        return trained(folder, "AutoEncoder", {**LINEAR, "bias": draw(WIDTH)}) / "ae.pt"
    if name == "gemma_scope":
        return scope(folder, "gemma-scope-2b-pt-res") / "params.npz"
    if name == "gemma_scope_2":
        return scope_2(folder) / "params.safetensors"
    if name == "sparsify":
        return sparsify(folder, "layers.5") / "sae.safetensors"
    if name == "circuit_tracer":
        return tracer(folder) / "layer_1.safetensors"
    eye = torch.eye(WIDTH)
    own = em.Dictionary(eye, torch.zeros(WIDTH), eye, torch.zeros(WIDTH), activation="relu", site_in=SITE)
    return own.save(folder / "own.safetensors")


FORMATS = ("dictionary_learning", "gemma_scope", "gemma_scope_2", "sparsify", "circuit_tracer", "own")


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file_of_any_format_is_one_typed_error_and_the_source_is_kept(name, tmp_path):
    path = made_by(name, tmp_path / name)
    found = em.load_dictionary(path)
    if name != "own":
        assert found.metadata["format"] == name and found.metadata["model_name"]
        again = em.load_dictionary(found.save(tmp_path / "again.safetensors"))
        assert (again.metadata, again.hash) == (found.metadata, found.hash)
    for cut in (path.read_bytes()[:-40], path.read_bytes()[:20], b""):
        path.write_bytes(cut)
        with pytest.raises(CorruptFileError):
            em.load_dictionary(path)
    path.unlink()
    with pytest.raises(FileError, match=r"no '"):
        em.load_dictionary(path)


@pytest.mark.parametrize("name", FORMATS[1:5])
def test_tensors_that_do_not_belong_together_are_a_corrupt_file(name, tmp_path):
    path = made_by(name, tmp_path / name)
    wrong = draw(LATENTS + 1)
    if name == "gemma_scope":
        np.savez(path, **{n: each.numpy() for n, each in {**SCOPE, "b_enc": wrong}.items()})
    else:
        from safetensors.torch import load_file

        held = load_file(path)
        bias = "encoder.bias" if "encoder.bias" in held else "b_enc"
        save_file({**held, bias: wrong}, path)
    with pytest.raises(CorruptFileError, match=r"do not belong together"):
        em.load_dictionary(path)


@pytest.mark.parametrize("name", FORMATS[:5])
def test_a_matrix_of_three_axes_is_refused_by_its_name(name, tmp_path):
    """A crosscoder's, or a cross-layer transcoder's, under the names of a simpler dictionary."""
    path = made_by(name, tmp_path / name)
    key = {"dictionary_learning": "decoder.weight", "gemma_scope_2": "w_dec"}.get(name, "W_dec")
    if name == "dictionary_learning":
        trained(tmp_path / name, "AutoEncoder", {**LINEAR, "bias": draw(WIDTH), key: draw(2, WIDTH, LATENTS)})
    elif name == "gemma_scope":
        np.savez(path, **{n: each.numpy() for n, each in {**SCOPE, key: draw(LATENTS, 2, WIDTH)}.items()})
    else:
        from safetensors.torch import load_file

        save_file({**load_file(path), key: draw(LATENTS, 2, WIDTH)}, path)
    with pytest.raises(UsageError, match=rf"{key}=\(.*no matrix"):
        em.load_dictionary(path)


def test_gates_of_another_length_are_a_corrupt_file(tmp_path):
    state = {
        "encoder.weight": draw(LATENTS, WIDTH),
        "decoder.weight": draw(WIDTH, LATENTS),
        "r_mag": draw(3),
        "gate_bias": draw(LATENTS),
        "mag_bias": draw(LATENTS),
        "decoder_bias": draw(WIDTH),
    }
    with pytest.raises(CorruptFileError, match="do not belong together"):
        em.load_dictionary(trained(tmp_path, "GatedAutoEncoder", state))


def test_folders_and_files_of_no_known_format_say_what_is_known(tmp_path):
    with pytest.raises(UsageError, match=r"known are"):
        em.load_dictionary(tmp_path)
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match=r"known are"):
        em.load_dictionary(tmp_path / "notes.txt")
    sparsify(tmp_path, "layers.5")
    with pytest.raises(UsageError, match=r"layers\.5; give one of them"):
        em.load_dictionary(tmp_path)
    save_file({"weight": draw(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"holds weight"):
        em.load_dictionary(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"is no path"):
        em.load_dictionary(3)
    with pytest.raises(UsageError, match=r"layer=2 chooses nothing"):
        em.load_dictionary(tmp_path / "layers.5", layer=2)
    for wrong in (-1, 1.5, "2"):
        with pytest.raises(UsageError, match=r"layer="):
            em.load_dictionary(tmp_path / "layers.5", layer=wrong)
