"""A model that llama.cpp's format holds comes back as it was written; what the format hides is settled or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tl_em as em
from tests.conftest import SURFACES
from tl_em.errors import CorruptFileError, ModelError, ModelNotFoundError, OutputError, UsageError
from tl_em.interop import import_gguf

gguf = pytest.importorskip("gguf")
D, HEADS, KV, LAYERS, WIDE = 64, 4, 2, 2, 96
CONTROL = ["<|end|>", "<|user|>"]
CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"


def tokens() -> tuple[list[str], list[str]]:
    """Bytes, as byte-level tokenizers spell them, and a few merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelled = bytes_to_unicode()
    merges = ["Ġ Ġ", "a b", "1 2"]
    return [*CONTROL, *(spelled[i] for i in range(256)), *(merge.replace(" ", "") for merge in merges)], merges


def llama(**config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": len(tokens()[0]), "hidden_size": D, "intermediate_size": WIDE, "head_dim": D // HEADS,
                "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
                "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
                "rope_theta": 10000.0, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | config))).eval()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the rows of queries and keys in pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def written(
    path: Path, model: Any, *, pre: str = "smollm", quantised: bool = False, factors: np.ndarray | None = None,
    also: dict[str, Any] | None = None, extra: np.ndarray | None = None,
) -> Path:  # fmt: skip
    """The file as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {"name": "tiny", "license": "mit"}.items():
        writer.add_string(f"general.{name}", value)
    counts = {"block_count": LAYERS, "context_length": 256, "embedding_length": D, "feed_forward_length": WIDE,
              "attention.head_count": HEADS, "attention.head_count_kv": KV, "rope.dimension_count": D // HEADS,
              "vocab_size": len(tokens()[0])}  # fmt: skip
    for name, value in counts.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, value in (also or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"llama.{name}", value)
    vocabulary, merges = tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(vocabulary) - len(CONTROL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        value = weight.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = permuted(value, HEADS if "q_proj" in name else KV)
        own = names.get_name(name.removesuffix(".weight")) + ".weight"
        if quantised and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(own, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, value)
    for name, value in {"rope_freqs.weight": factors, "blk.0.nothing.weight": extra}.items():
        if value is not None:
            writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "tiny.gguf", llama())


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


@pytest.mark.surface
@pytest.mark.parametrize("surface", SURFACES)
def test_a_file_is_loaded_as_the_model_that_was_written(file: Path, surface: Any) -> None:
    ids = torch.randint(len(tokens()[0]), (1, 40), generator=torch.Generator().manual_seed(1))
    model = em.load_model(file, surface=surface)
    assert torch.allclose(logits(model, ids), logits(llama(), ids), atol=1e-3)
    assert em.proof(model) is not None
    assert model.tokenizer.chat_template == CHAT
    assert model.tokenizer.encode("<|user|>ab", add_special_tokens=False) == [1, tokens()[0].index("ab")]


def test_it_becomes_a_directory_that_transformers_loads(file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = import_gguf(file, tmp_path / "mine")
    assert "Nothing is lost" in said
    assert "licence: mit" in said
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert again.config.rms_norm_eps == 1e-5
    assert not hasattr(again.config, "quantization_config")
    ids = torch.arange(30)[None]
    assert torch.allclose(logits(again, ids), logits(llama(), ids), atol=1e-4)
    text = "a  5 12 ab"
    assert AutoTokenizer.from_pretrained(tmp_path / "mine").encode(text) == em.load_model(file).tokenizer.encode(text)
    with pytest.raises(OutputError, match="exists already"):
        import_gguf(file, tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "tiny.gguf"]


def test_what_quantising_rounded_away_is_said(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = written(tmp_path / "q8.gguf", llama(), quantised=True)
    assert "Q8_0 (15 of 20 tensors) rounded away is lost" in import_gguf(file, tmp_path / "mine")
    again, exact = AutoModelForCausalLM.from_pretrained(tmp_path / "mine").state_dict(), llama().state_dict()
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        gap = (again[name] - exact[name]).abs().max()
        assert 0 < gap < exact[name].abs().max() / 127


@pytest.mark.parametrize(("pre", "twelve", "spaces"), [("smollm", 2, 2), ("gpt-2", 1, 2), ("qwen2", 2, 3)])
def test_a_text_is_split_as_the_file_says(tmp_path: Path, pre: str, twelve: int, spaces: int) -> None:
    """GPT-2 takes 12 as one piece, the others digit by digit; before a digit, spaces stay together or do not."""
    tokenizer = em.load_model(written(tmp_path / "a.gguf", llama(), pre=pre)).tokenizer
    assert len(tokenizer.encode("12", add_special_tokens=False)) == twelve
    assert len(tokenizer.encode("  5", add_special_tokens=False)) == spaces + (pre == "gpt-2")


def test_an_unknown_split_is_refused_unless_a_tokenizer_is_given(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf", llama(), pre="of-tomorrow")
    with pytest.raises(ModelError, match=r"splits text as 'of-tomorrow'.*tokenizer=DIR"):
        em.load_model(file)
    given = em.load_model(written(tmp_path / "b.gguf", llama())).tokenizer
    assert em.load_model(file, tokenizer=given).tokenizer.get_vocab() == given.get_vocab()


def test_a_rotary_scaling_that_transformers_drops_is_put_back(tmp_path: Path) -> None:
    """Llama 3.1's is a table of factors in the file; without it far tokens are turned by wrong angles."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 2048}  # fmt: skip
    stretched = llama(rope_parameters=rope, max_position_embeddings=4096)
    plain = 10000.0 ** -(np.arange(0, D // HEADS, 2) / (D // HEADS))
    factors = plain / stretched.model.rotary_emb.inv_freq.double().numpy()
    assert factors.max() == pytest.approx(8)
    model: Any = em.load_model(written(tmp_path / "a.gguf", stretched, factors=factors))
    ids = torch.randint(len(tokens()[0]), (1, 200), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(logits(model, ids), logits(stretched, ids), atol=1e-3)
    assert model.original_model.config.rope_parameters == rope
    assert not torch.allclose(logits(llama(), ids), logits(stretched, ids), atol=1e-2)
    linear = llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    also = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    found = em.load_model(written(tmp_path / "b.gguf", linear, also=also))
    assert torch.allclose(logits(found, ids), logits(linear, ids), atol=1e-3)
    for name, trouble in {"c": {"factors": 1 + np.arange(8)}, "d": {"also": {"rope.scaling.type": "yarn"}}}.items():
        with pytest.raises(ModelError, match="stretches its rotary positions"):
            em.load_model(written(tmp_path / f"{name}.gguf", llama(), **trouble))


def test_a_tensor_that_nobody_asked_for_is_no_matter_of_indifference(tmp_path: Path) -> None:
    with pytest.raises((ModelError, CorruptFileError), match=r"numbers|tensor"):
        em.load_model(written(tmp_path / "a.gguf", llama(), extra=np.ones((4, 4))))


def test_pieces_are_joined_and_others_are_not(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    pieces = [tmp_path / f"piece-{i}" for i in range(3)]
    for i, piece in enumerate(pieces):
        piece.write_bytes(whole[i * 100_000 : (i + 1) * 100_000 if i < 2 else None])
    import_gguf(pieces, tmp_path / "mine")
    ids = torch.arange(30)[None]
    assert torch.allclose(logits(em.load_model(tmp_path / "mine"), ids), logits(llama(), ids), atol=1e-3)
    with pytest.raises(UsageError, match="llama-gguf-split --merge"):
        import_gguf([file, file], tmp_path / "other")
    with pytest.raises(CorruptFileError, match="does not begin as a GGUF file"):
        import_gguf(pieces[1:], tmp_path / "other")


def test_a_file_that_is_cut_off_or_missing_leaves_nothing(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no file"):
        em.load_model(tmp_path / "no.gguf")
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(CorruptFileError, match="cannot be read as a GGUF model"):
        import_gguf(short, tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.gguf", "tiny.gguf"]


def test_packed_weights_are_never_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers has kernels that multiply packed blocks (a GPU's), it would keep these in place of weights."""
    config: Any = getattr(transformers, "GgufConfig", None)
    if config is None:
        pytest.skip("this transformers always unpacks")
    assert not config().dequantize  # what it does by default
    asked: list[Any] = []
    real = transformers.AutoModelForCausalLM.from_pretrained

    def noted(*args: Any, **given: Any) -> Any:
        asked.append(given["quantization_config"].dequantize)
        return real(*args, **given)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", noted)
    em.load_model(file, prove=False)
    assert asked == [True]
