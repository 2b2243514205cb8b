"""Models from directories, memory and adapters: the same function on both surfaces, loud where something is wrong."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tl_em.errors import (
    CorruptFileError,
    ModelError,
    ModelNotFoundError,
    NonFiniteError,
    PairMismatchError,
    TlEmError,
    UsageError,
)
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair, load_model
from tl_em.models.prompts import encode

from ..conftest import SURFACES, make_hf_model, make_tokenizer

pytestmark = pytest.mark.surface

TOKENS = torch.tensor([[2, 7, 9, 17, 20, 3, 55]])


def saved(path: Path, family: str = "gpt2", *, tokenizer: bool = True, **changes: Any) -> Path:
    make_hf_model(family, **changes).save_pretrained(path)
    if tokenizer:
        make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("where", ["directory", "memory"])
def test_every_family_on_every_surface_is_the_hugging_face_model(
    tmp_path: Path, family: str, surface: str, where: str
) -> None:
    hf_model = make_hf_model(family)
    expected = hf_model(TOKENS).logits.detach()
    if where == "directory":  # a path that names another family: TransformerLens would believe it
        model = load_model(saved(tmp_path / "my-llama-gemma-2-model", family), surface=surface)
    else:
        model = load_model(hf_model, surface=surface, tokenizer=make_tokenizer())
    torch.testing.assert_close(
        model(TOKENS).detach(), expected, rtol=1e-4, atol=1e-4
    )  # HookedTransformer sums in another order
    assert isinstance(model, LensModel) and not model.training  # type: ignore[attr-defined]
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # type: ignore[attr-defined]
    assert model.cfg.d_vocab != model.cfg.d_model
    assert len(encode(model, ["the cat"])[0]) > 2


def test_a_model_in_memory_is_left_as_it_was(surface: str) -> None:
    """Booting a Bridge rewires the model it is built around."""
    hf_model = make_hf_model("llama")
    modules, state = {n: type(m) for n, m in hf_model.named_modules()}, copy.deepcopy(hf_model.state_dict())
    flags = {n: p.requires_grad for n, p in hf_model.named_parameters()}
    load_model(hf_model, surface=surface, tokenizer=make_tokenizer())
    assert {n: type(m) for n, m in hf_model.named_modules()} == modules
    assert {n: p.requires_grad for n, p in hf_model.named_parameters()} == flags
    assert all(torch.equal(a, b) for a, b in zip(state.values(), hf_model.state_dict().values(), strict=True))


def test_in_place_shares_the_weights() -> None:
    hf_model = make_hf_model("llama")
    weight = hf_model.model.embed_tokens.weight
    model = load_model(hf_model, tokenizer=make_tokenizer(), in_place=True)
    assert any(p is weight for p in model.original_model.parameters())  # type: ignore[attr-defined]


def test_tied_weights_stay_tied(make_model: Callable[..., LensModel]) -> None:
    model = load_model(make_hf_model("qwen2"), tokenizer=make_tokenizer())
    hf_model: Any = model.original_model  # type: ignore[attr-defined]
    assert hf_model.get_output_embeddings().weight.data_ptr() == hf_model.get_input_embeddings().weight.data_ptr()


def test_a_directory_without_a_tokenizer(tmp_path: Path, surface: str) -> None:
    model = load_model(saved(tmp_path, tokenizer=False), surface=surface)
    assert model.tokenizer is None and model(TOKENS).shape == (1, 7, 57)  # type: ignore[attr-defined]
    with pytest.raises(TlEmError, match="no tokenizer"):
        encode(model, ["the cat"])


def test_loading_is_quiet_and_restores_what_it_silenced(
    tmp_path: Path, surface: str, capfd: pytest.CaptureFixture[str]
) -> None:
    import logging

    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(saved(tmp_path), surface=surface)
    capfd.readouterr()
    load_model(tmp_path, surface=surface)
    assert capfd.readouterr() == ("", "")
    assert before == (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), logging.root.manager.disable)


def test_dtype(tmp_path: Path, surface: str) -> None:
    model = load_model(saved(tmp_path, "llama"), surface=surface, dtype=torch.bfloat16)
    assert model(TOKENS).dtype == torch.bfloat16
    half = make_hf_model("llama").to(torch.float16)
    assert load_model(half, surface=surface, tokenizer=make_tokenizer())(TOKENS).dtype == torch.float32


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["/no/such/directory", "./no_such", "a/b/c"])
def test_a_missing_directory(source: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no directory"):
        load_model(source)


@pytest.mark.parametrize("source", ["no-such-model-tl-em", "nobody-tl-em/no-such-model"])
def test_a_hub_that_does_not_answer(source: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"the hub gives no model.*pass the directory"):
        load_model(source)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor adapter_config\.json"):
        load_model(tmp_path)
    make_hf_model("gpt2").config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no readable weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "rubbish", "config", "tokenizer"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif damage == "rubbish":
        weights.write_bytes(b"not a safetensors file")
    else:
        (tmp_path / {"config": "config.json", "tokenizer": "tokenizer.json"}[damage]).write_text("{")
    with pytest.raises(CorruptFileError):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(surface: str, value: float) -> None:
    hf_model = make_hf_model("llama")
    hf_model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight.* 1 value"):
        load_model(hf_model, surface=surface, tokenizer=make_tokenizer())


def test_large_finite_weights_are_no_infinities() -> None:
    hf_model = make_hf_model("llama")
    hf_model.model.embed_tokens.weight.data[:2] = 3e38  # their sum overflows
    assert load_model(hf_model, tokenizer=make_tokenizer())


def test_arguments_that_mean_nothing(small_model: LensModel) -> None:
    with pytest.raises(UsageError, match="needs no loading"):
        load_model(object())
    if "hooked" not in SURFACES:
        with pytest.raises(ModelError, match="removed in version 4"):
            load_model(make_hf_model("gpt2"), surface="hooked", tokenizer=make_tokenizer())


if "hooked" in SURFACES:

    def test_an_architecture_that_hooked_transformer_lacks() -> None:
        from transformers import AutoModelForCausalLM, GraniteConfig

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        hf_model = AutoModelForCausalLM.from_config(GraniteConfig(vocab_size=57, num_key_value_heads=2, **sizes))
        with pytest.raises(ModelError, match="surface='bridge'"):
            load_model(hf_model, surface="hooked", tokenizer=make_tokenizer())

    def test_widths_that_are_not_the_usual_multiple() -> None:
        for family, changes in (("llama", {"head_dim": 16}), ("gpt2", {"n_inner": 40})):
            hf_model = make_hf_model(family, **changes)
            found = load_model(hf_model, surface="hooked", tokenizer=make_tokenizer())(TOKENS)
            torch.testing.assert_close(found.detach(), hf_model(TOKENS).logits.detach(), rtol=1e-4, atol=1e-4)

    def test_a_conversion_that_misreads_the_config_is_noticed() -> None:
        """TransformerLens drops the attention biases that a Llama may have."""
        hf_model = make_hf_model("llama", attention_bias=True)
        with pytest.raises(ModelError, match=r"not the same function.*surface='bridge'"):
            load_model(hf_model, surface="hooked", tokenizer=make_tokenizer())
        torch.testing.assert_close(
            load_model(hf_model, tokenizer=make_tokenizer())(TOKENS), hf_model(TOKENS).logits, rtol=1e-4, atol=1e-4
        )


# --- Adapters ---------------------------------------------------------------------------------------------------------

if find_spec("peft"):

    def adapter(path: Path, base: Path) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        hf_model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own
            tuned = get_peft_model(
                hf_model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
            )
            tuned.save_pretrained(path)
        return tuned.eval()

    def test_an_adapter_is_merged_into_its_base(tmp_path: Path, surface: str) -> None:
        base = saved(tmp_path / "base", "llama")
        tuned = adapter(tmp_path / "adapter", base)
        found = load_model(tmp_path / "adapter", surface=surface)(TOKENS).detach()
        torch.testing.assert_close(found, tuned(TOKENS).logits.detach(), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, load_model(base, surface=surface)(TOKENS), atol=1e-2)

    def test_a_peft_model_in_memory_is_itself_or_refused(tmp_path: Path) -> None:
        """A Bridge that splits a joint matrix takes its weights without their adapter: another model, in silence."""
        tuned = adapter(tmp_path / "adapter", saved(tmp_path / "base", "llama"))
        found = load_model(tuned, tokenizer=make_tokenizer())
        torch.testing.assert_close(found(TOKENS), tuned(TOKENS).logits, rtol=1e-4, atol=1e-4)
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own
            joint = get_peft_model(
                make_hf_model("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
            )
        with pytest.raises(ModelError, match=r"joint matrix.*merge_and_unload"):
            load_model(joint, tokenizer=make_tokenizer())
        load_model(joint.merge_and_unload(), tokenizer=make_tokenizer())

    def test_an_adapter_of_another_base(tmp_path: Path) -> None:
        adapter(tmp_path / "adapter", saved(tmp_path / "base", "llama"))
        config = tmp_path / "adapter" / "adapter_config.json"
        record = json.loads(config.read_text())
        config.write_text(
            json.dumps(record | {"base_model_name_or_path": str(saved(tmp_path / "other", "llama", hidden_size=64))})
        )
        with pytest.raises(CorruptFileError, match="does not fit its base"):
            load_model(tmp_path / "adapter")
        config.write_text(json.dumps(record | {"base_model_name_or_path": str(tmp_path / "gone")}))
        with pytest.raises(ModelNotFoundError, match="gone"):
            load_model(tmp_path / "adapter")


def test_an_adapter_without_peft_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"tl-em\[lora\]"):
        load_model(tmp_path)


# --- Pairs ------------------------------------------------------------------------------------------------------------


def test_a_pair_of_one_shape(make_model: Callable[..., LensModel]) -> None:
    base, tuned = make_model("gpt2", SURFACES[0]), make_model("gpt2", SURFACES[-1], seed=1)
    pair = ModelPair(base, tuned, name="pair", tuned_name="tuned")
    assert pair.base is base and pair.tuned is tuned and pair.base_name and pair.tuned_name == "tuned"
    assert repr(pair) == f"ModelPair('pair', base={pair.base_name!r}, tuned='tuned')"


def test_a_pair_that_does_not_match(make_model: Callable[..., LensModel]) -> None:
    base = make_model("gpt2", "bridge")
    wide = load_model(make_hf_model("gpt2", n_embd=64, n_layer=2, n_positions=32), tokenizer=make_tokenizer())
    with pytest.raises(PairMismatchError, match=r"n_layers is 3 in base and 2 in tuned; d_model is 32.*n_ctx is 64"):
        ModelPair(base, wide)
    other = load_model(make_hf_model("gpt2"), tokenizer=make_tokenizer(template="{{ messages[0].content }}"))
    with pytest.raises(PairMismatchError, match="different chat templates"):
        ModelPair(base, other)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(PairMismatchError, match="different vocabularies"):
        ModelPair(base, load_model(make_hf_model("gpt2"), tokenizer=tokenizer))
