"""Everything that was asked for is there: missing, unexpected and mismatched tensors are named; no code is ever run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tl_em.errors import CorruptFileError, ModelError, TlEmError
from tl_em.models.loading import load_model
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.stream import next_token_logits

from ..conftest import make_hf_model, make_tokenizer
from . import zoo

pytestmark = pytest.mark.surface
PROMPT = [EncodedPrompt.from_ids([2, 7, 9, 17, 20, 3, 55])]
TOKENS = torch.tensor([[2, 7, 9, 17, 20, 3, 89]])
Weights = dict[str, torch.Tensor]


def rewritten(path: Path, change: Callable[[Weights], Weights], **config: Any) -> Path:
    """A saved model whose weights and config were changed on disk."""
    from safetensors.torch import load_file, save_file

    zoo.llama().save_pretrained(path)
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((path / "config.json").read_text(encoding="utf-8")) | config
    (path / "config.json").write_text(json.dumps(record), encoding="utf-8")
    return path


UP = "model.layers.1.mlp.up_proj.weight"


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (without(UP), {}, rf"1 tensor \({UP}\) missing from the files"),
        (without("lm_head.weight"), {}, r"lm_head\.weight\) missing"),
        (without("model.norm.weight"), {}, r"model\.norm\.weight\) missing"),
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, {}, r"30 tensors \(_orig_mod\.lm_head\.weight, "),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, {}, r"30 tensors \(lm_head\.weight, .* missing"),
        (lambda w: w | {"model.extra.weight": torch.ones(3)}, {}, r"model\.extra\.weight\) in the files, but"),
        (lambda w: w | {UP: torch.ones(5, 48)}, {}, rf"{UP} \(5, 48\) for \(96, 48\)\) of another shape"),
        (lambda w: w, {"num_hidden_layers": 4}, r"9 tensors \(model\.layers\.3\..* missing from the files"),
        (lambda w: w, {"num_hidden_layers": 2}, r"9 tensors \(model\.layers\.2\..* in the files, but not in the model"),
        (lambda w: w, {"vocab_size": 91}, r"lm_head\.weight \(90, 48\) for \(91, 48\)"),
        (lambda w: w, {"attention_bias": True}, r"12 tensors \(model\.layers\.0\.self_attn\.k_proj\.bias, "),
    ],
)
def test_tensors_that_do_not_belong_are_named(
    tmp_path: Path, change: Callable[[Weights], Weights], config: dict[str, Any], said: str
) -> None:
    with pytest.raises(CorruptFileError, match=said):
        load_model(rewritten(tmp_path, change, **config))


@pytest.mark.parametrize(
    "extra", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.attn.masked_bias"]
)
def test_buffers_of_old_files_are_no_fault(tmp_path: Path, extra: str) -> None:
    found = load_model(rewritten(tmp_path, lambda weights: weights | {extra: torch.ones(6)}))
    torch.testing.assert_close(
        next_token_logits(found, PROMPT), next_token_logits(load_model(zoo.llama()), PROMPT), rtol=1e-4, atol=1e-4
    )


def test_tied_weights_are_not_missing(tmp_path: Path, surface: str) -> None:
    hf_model = zoo.llama(tie_word_embeddings=True)
    hf_model.save_pretrained(tmp_path)
    found = load_model(tmp_path, surface=surface)
    with torch.no_grad():
        expected = hf_model(torch.tensor([PROMPT[0].ids])).logits[:, -1]
    torch.testing.assert_close(next_token_logits(found, PROMPT), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["a model of its own", "a tokenizer of its own", "a known model with code beside it"])
def test_code_that_comes_with_a_directory_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """transformers asks on the terminal whether to run it; nobody may answer, and nothing may run."""
    ran, directory = tmp_path / "ran", tmp_path / "model"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).write_text('ran')\nclass X:\n    pass\n"
    rewritten(directory, lambda weights: weights)
    for name in ("evil", "configuration_evil", "tokenization_evil"):
        (directory / f"{name}.py").write_text(code)
    record = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if kind != "a tokenizer of its own":
        record["auto_map"] = {"AutoConfig": "configuration_evil.X", "AutoModelForCausalLM": "evil.X"}
    if kind == "a model of its own":
        record |= {"model_type": "evil", "architectures": ["X"]}
    (directory / "config.json").write_text(json.dumps(record))
    if kind == "a tokenizer of its own":
        about = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_evil.X", None]}}
        (directory / "tokenizer_config.json").write_text(json.dumps(about))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if kind == "a known model with code beside it":
        load_model(directory)  # the class that transformers itself has
    else:
        with pytest.raises(ModelError):
            load_model(directory)
    assert not ran.exists()


# --- Adapters ---------------------------------------------------------------------------------------------------------

if find_spec("peft"):

    def adapted(path: Path, change: Callable[[Weights], Weights], **config: Any) -> Path:
        """A saved adapter on a saved base, its file and config changed on disk."""
        from peft import LoraConfig, get_peft_model
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM

        zoo.llama().save_pretrained(path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own
            base = AutoModelForCausalLM.from_pretrained(path / "base")
            options = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
            get_peft_model(base, options).save_pretrained(path / "adapter")
        file = path / "adapter" / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        record = json.loads((path / "adapter" / "adapter_config.json").read_text(encoding="utf-8")) | config
        (path / "adapter" / "adapter_config.json").write_text(json.dumps(record), encoding="utf-8")
        return path / "adapter"

    def test_a_whole_adapter_changes_its_base(tmp_path: Path, surface: str) -> None:
        adapter = adapted(tmp_path, lambda weights: weights)
        found, base = load_model(adapter, surface=surface), load_model(tmp_path / "base", surface=surface)
        assert (next_token_logits(found, PROMPT) - next_token_logits(base, PROMPT)).abs().max() > 1e-2

    @pytest.mark.parametrize(
        ("change", "config", "said"),
        [
            (lambda w: {k.replace("self_attn", "attn"): v for k, v in w.items()}, {}, "fit nothing in the base"),
            (lambda w: {k.replace("base_model.model.", ""): v for k, v in w.items()}, {}, "not in its file"),
            (lambda w: {k: v for k, v in w.items() if "layers.1" not in k}, {}, r"4 tensors .*\.1.* not in its file"),
            (lambda w: {k: v for k, v in w.items() if "lora_B" not in k}, {}, "6 tensors .*lora_B"),
            (lambda w: w, {"target_modules": ["q_proj"]}, "up_proj.* fit nothing in the base"),
            (lambda w: w, {"target_modules": ["q_proj", "up_proj", "k_proj"]}, "k_proj.* not in its file"),
            (lambda w: w, {"r": 3}, "does not fit its base"),
            (lambda w: {}, {}, "12 tensors .* not in its file"),
        ],
    )
    def test_an_adapter_that_is_not_whole_is_refused_by_name(
        tmp_path: Path, change: Callable[[Weights], Weights], config: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(TlEmError, match=said):
            load_model(adapted(tmp_path, change, **config))

    @pytest.mark.parametrize("changed", ["lm_head", "embed_tokens"])
    def test_an_adapter_on_one_of_two_tied_matrices_leaves_the_other(
        tmp_path: Path, changed: str, surface: str
    ) -> None:
        """peft merges into the shared matrix, so the change would be in both: another model, in silence."""
        from peft import LoraConfig

        options = LoraConfig(r=2, target_modules=[changed], init_lora_weights=False)
        tuned, plain = tied_with(tmp_path, options)
        expected = tuned(TOKENS).logits.log_softmax(-1)
        found = load_model(tmp_path / "adapter", surface=surface)(TOKENS).log_softmax(-1)
        assert (expected - plain).abs().max() > 1e-2
        assert (expected - found).abs().max() < 1e-4

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_an_adapter_of_prompts_is_refused(tmp_path: Path, in_memory: bool) -> None:
        """It changes no weight, so a model without its learned vectors would be the base, in silence."""
        from peft import PromptTuningConfig

        tuned, _ = tied_with(tmp_path, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        with pytest.raises(ModelError, match="PROMPT_TUNING"):
            load_model(tuned if in_memory else tmp_path / "adapter")

    def tied_with(path: Path, options: Any) -> tuple[Any, torch.Tensor]:
        """A model with tied embeddings and an adapter, both saved, and the base's log-probabilities."""
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        zoo.llama(tie_word_embeddings=True).save_pretrained(path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own
            base = AutoModelForCausalLM.from_pretrained(path / "base").eval()
            plain = base(TOKENS).logits.log_softmax(-1)
            tuned = get_peft_model(base, options).eval()
            tuned.save_pretrained(path / "adapter")
        return tuned, plain


def test_a_compiled_model_is_read_without_its_compiler() -> None:
    model = zoo.llama()
    compiled: Any = torch.compile(model, backend="eager")
    assert hasattr(compiled, "_orig_mod")
    loaded: Any = load_model(compiled)
    assert not any(hasattr(module, "_orig_mod") for module in loaded.modules())
    assert (loaded(TOKENS).log_softmax(-1) - model(TOKENS).logits.log_softmax(-1)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "dtype=torch.int8"),
        ({"dtype": "floaty"}, "dtype='floaty'"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used"),
        ({"device": "gpu"}, "device='gpu' cannot be used"),
        ({"tokenizer": 3}, "tokenizer= is a int"),
        ({"tokenizer": "./not-there"}, "has no tokenizer that can be loaded"),
        ({"chat_template_kwargs": "thinking"}, "names no arguments of a template"),
    ],
)
def test_an_argument_of_loading_that_means_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TlEmError, match=said):
        load_model(zoo.llama(), **options)


def test_a_dtype_by_name_and_a_model_that_is_loaded_already(surface: str) -> None:
    model: Any = load_model(zoo.llama(), surface=surface, dtype="float64")  # pyright: ignore[reportArgumentType]
    assert next(model.parameters()).dtype == torch.float64
    with pytest.raises(TlEmError, match="A TransformerLens model needs no loading"):
        load_model(model)


def test_a_tokenizer_of_ones_own_beside_a_model_of_a_family(tmp_path: Path, surface: str) -> None:
    """transformers 5 reads it with the rules of the family's own tokenizer: other ids, in silence."""
    make_hf_model("qwen2").save_pretrained(tmp_path)
    own = make_tokenizer()
    own.save_pretrained(tmp_path)
    assert "TokenizersBackend" in (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")
    prompt = encode(load_model(tmp_path, surface=surface), ["the cat"])[0]
    assert list(prompt.ids[slice(*prompt.instruction)]) == own("the cat", add_special_tokens=False)["input_ids"]
