"""What is written of a model is that model, edits and all, and loads where this package is not; or nothing is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen3Config,
)

import tl_em as em
from tests.conftest import FAMILIES, SURFACES, make_hf_model, make_tokenizer
from tests.models import zoo
from tests.models.zoo import GROUPED, SIZE, made
from tl_em.errors import ModelError, OutputError, UsageError, WeightEditError
from tl_em.models import directories
from tl_em.models.loading import load_model

pytestmark = pytest.mark.surface
TOKENS = torch.tensor([[2, 3, 8, 20, 11, 6, 4], [2, 3, 9, 10, 30, 6, 4]])


def fresh(family: str, surface: str, **options: Any) -> Any:
    return load_model(make_hf_model(family), surface=surface, tokenizer=make_tokenizer(), in_place=True, **options)  # pyright: ignore[reportArgumentType]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return getattr(out, "logits", out)


def elsewhere(folder: Path, **options: Any) -> Any:
    """As a stranger loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference of log-probabilities in spreads of the logits."""
    return float((one.log_softmax(-1) - other.log_softmax(-1)).abs().max() / other.std(-1).min())


def a_direction(model: Any, stream: str = "resid_post", layer: int = 1) -> em.Direction:
    generator = torch.Generator().manual_seed(3)
    return em.Direction(torch.randn(int(model.cfg.d_model), generator=generator), em.Site(layer, stream))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_an_orthogonalised_model_is_written_whole(family: str, surface: str, tmp_path: Path) -> None:
    model = fresh(family, surface)
    before = logits(model)
    em.untie_embeddings_(model)
    em.orthogonalize_(model, a_direction(model))
    edited = logits(model)
    folder = em.save_model(model, tmp_path / "edited")
    assert gap(logits(elsewhere(folder)), edited) <= 1e-5 < 1e-2 < gap(before, edited)
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings is False
    files = {each.name for each in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    again: Any = em.load_model(folder, surface=surface)  # pyright: ignore[reportArgumentType]
    assert gap(logits(again), edited) <= 1e-5
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
         {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ],
)  # fmt: skip
def test_what_transformers_4_knows_by_another_name_is_said_by_both(rope: Any, said: Any, tmp_path: Path) -> None:
    """It takes 10,000 for a theta that it does not find, in silence, and every logit is another."""
    model = load_model(zoo.llama(dict(rope)), tokenizer=make_tokenizer(), in_place=True)
    config = json.loads((em.save_model(model, tmp_path / "a") / "config.json").read_text())
    assert {key: config.get(key) for key in said} == said
    assert config["rope_parameters"]["rope_theta"] == 5e5 and config["torch_dtype"] == config["dtype"] == "float32"
    named = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == "PreTrainedTokenizerFast"


def test_saving_says_nothing_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers draws a bar, "Writing model shards"."""
    directories.fill_directory(tmp_path, make_hf_model("llama"), make_tokenizer())
    assert capfd.readouterr() == ("", "")


def test_two_kinds_of_layers_keep_their_two_thetas() -> None:
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
    found = directories._older_config({"rope_parameters": rope})
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (1e6, 1e4)
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 8.0} and found["rope_parameters"] is rope


def test_every_family_comes_back_as_it_was_and_tied_where_it_was(family: str, surface: str, tmp_path: Path) -> None:
    model, source = fresh(family, surface), make_hf_model(family)
    folder = em.save_model(model, tmp_path / "same")
    again = elsewhere(folder)
    assert gap(logits(again), logits(source)) <= 1e-5
    assert again.config.tie_word_embeddings == source.config.tie_word_embeddings
    for name, value in source.state_dict().items():
        assert torch.allclose(again.state_dict()[name], value, rtol=1e-6, atol=1e-6), name
    tokenizer = make_tokenizer()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


def wide(**changes: Any) -> dict[str, Any]:
    return GROUPED | changes


def small() -> dict[str, Any]:
    return SIZE


OTHERS = {
    "bloom": lambda: BloomConfig(vocab_size=90, hidden_size=48, n_layer=2, n_head=4),
    "gemma3": lambda: Gemma3TextConfig(**wide(head_dim=12, sliding_window=8, query_pre_attn_scalar=12)),
    "mistral": lambda: MistralConfig(**wide()),
    "neox": lambda: GPTNeoXConfig(**small()),
    "opt": lambda: OPTConfig(
        vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96, word_embed_proj_dim=48,
        max_position_embeddings=160,
    ),
    "phi3": lambda: Phi3Config(**wide(pad_token_id=0)),
    "qwen3": lambda: Qwen3Config(**wide(head_dim=12)),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_architectures_come_back_too(name: str, surface: str, tmp_path: Path) -> None:
    """Joint matrices, norms within attention, positions that begin at two: nothing here is known of them by name."""
    source = made(OTHERS[name]())
    expected = logits(source)
    try:
        model = em.load_model(source, surface=surface)  # pyright: ignore[reportArgumentType]
    except ModelError as error:
        pytest.skip(f"not on this surface: {error}")
    if (name, surface) == ("opt", "hooked"):  # which has no place for the two rows of positions before the first
        with pytest.raises(ModelError, match=r"embed_positions.*surface='bridge'"):
            em.save_model(model, tmp_path / name)
        return
    assert gap(logits(elsewhere(em.save_model(model, tmp_path / name))), expected) <= 2e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("stream", ["resid_post", "attn_out", "resid_pre"])
def test_a_baked_direction_is_in_the_directory(family: str, stream: str, surface: str, tmp_path: Path) -> None:
    model = fresh(family, surface)
    plain, steer = logits(model), em.Add(a_direction(model, stream), 2.0)
    with em.intervene(model, steer):
        steered = logits(model)
    em.bake_(model, steer)
    folder = em.save_model(model, tmp_path / "baked")
    assert gap(logits(elsewhere(folder)), steered) <= 1e-5 < 1e-2 < gap(plain, steered)
    if family == "llama":  # one switch, and no more than it takes
        config = AutoConfig.from_pretrained(folder)
        assert (config.mlp_bias, config.attention_bias) == (stream != "attn_out", stream == "attn_out")


def test_a_bias_that_the_class_cannot_hold_is_refused_and_nothing_is_left(surface: str, tmp_path: Path) -> None:
    model = fresh("qwen2", surface)
    em.bake_(model, em.Add(a_direction(model)))
    with pytest.raises(ModelError, match=r"has no such bias.*em\.intervene"):
        em.save_model(model, tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_a_low_rank_change_beside_the_weights_is_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    make_hf_model("llama").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    lora = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    lora.save_pretrained(tmp_path / "adapter")
    pair = em.load_pair(str(base), str(tmp_path / "adapter"))
    folders = [em.save_model(model, tmp_path / name) for name, model in (("b", pair.base), ("t", pair.tuned))]
    with_base, with_tuned = (logits(elsewhere(folder)) for folder in folders)
    assert gap(with_tuned, logits(lora.eval())) <= 1e-5 < 1e-3 < gap(with_tuned, with_base)
    assert not (folders[1] / "adapter_config.json").exists()
    in_memory = em.load_model(lora, tokenizer=str(base))
    assert gap(logits(elsewhere(em.save_model(in_memory, tmp_path / "m"))), with_tuned) <= 1e-5


def test_half_precision_stays_what_it_is(surface: str, tmp_path: Path) -> None:
    model = fresh("llama", surface, dtype=torch.bfloat16)
    again = elsewhere(em.save_model(model, tmp_path / "half"))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    source = make_hf_model("llama").to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, source[name]) for name, value in again.state_dict().items())


def test_hooks_are_no_part_of_it_and_nothing_is_written_under_them(surface: str, tmp_path: Path) -> None:
    model = fresh("gpt2", surface)
    plain = logits(model)
    with em.intervene(model, em.Add(a_direction(model), 5.0)):
        with pytest.raises(UsageError, match="Hooks are on this model"):
            em.save_model(model, tmp_path / "plain")
        assert list(tmp_path.iterdir()) == []
    folder = em.save_model(model, tmp_path / "plain")
    assert gap(logits(elsewhere(folder)), plain) <= 1e-5


def test_a_change_of_the_template_is_kept(tmp_path: Path) -> None:
    model = fresh("gpt2", "bridge")
    model.tokenizer.chat_template = "{% for m in messages %} {{ m.content }}{% endfor %}"
    folder = em.save_model(model, tmp_path / "mine")
    assert AutoTokenizer.from_pretrained(folder).chat_template == model.tokenizer.chat_template


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_an_edit_by_hand_is_written_or_refused_and_never_lost(family: str, surface: str, tmp_path: Path) -> None:
    model = fresh(family, surface)
    attention = model.blocks[1].attn
    holder, name = (attention, "W_Q") if surface == "hooked" else (attention.q.original_component, "weight")
    setattr(holder, name, torch.nn.Parameter(getattr(holder, name).detach() * 1.5))
    edited = logits(model)
    if (family, surface) == ("gpt2", "bridge"):  # a joint matrix, which a Bridge keeps in parts
        with pytest.raises(ModelError, match="another model"):
            em.save_model(model, tmp_path / "by-hand")
        assert list(tmp_path.iterdir()) == []
        return
    folder = em.save_model(model, tmp_path / "by-hand")
    assert gap(logits(elsewhere(folder)), edited) <= 1e-5


def test_what_is_there_is_replaced_on_demand_and_only_if_it_is_a_model(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model("gpt2", "bridge")
    mine = tmp_path / "mine"
    mine.mkdir()
    em.save_model(model, mine)  # an empty folder is as good as none
    with pytest.raises(OutputError, match="overwrite=True"):
        em.save_model(model, mine)
    (mine / "old").write_text("")
    em.save_model(model, mine, overwrite=True)
    assert not (mine / "old").exists() and (mine / "config.json").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("all of it")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputError):
            em.save_model(model, other, **options)
    assert (other / "thesis.txt").read_text() == "all of it"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        em.save_model(model, tmp_path / "file", overwrite=True)
    assert {each.name for each in tmp_path.iterdir()} == {"mine", "other", "file"}
    with pytest.raises(UsageError, match="overwrite="):
        em.save_model(model, tmp_path / "new", overwrite="yes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"em\.load_model"):
        em.save_model("gpt2", tmp_path / "new")  # pyright: ignore[reportArgumentType]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = fresh("gpt2", "bridge")
    folder = em.save_model(model, tmp_path / "mine")
    before = (folder / "model.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.original_model), "save_pretrained", full)
    with pytest.raises(OutputError, match="No space left"):
        em.save_model(model, folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_what_is_read_back_wrong_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a writer that changes one number is noticed."""
    model: Any = fresh("llama", "bridge")
    kind = type(model.original_model)
    write = kind.save_pretrained

    def wrong(self: Any, folder: Path) -> None:
        self.model.norm.weight = torch.nn.Parameter(self.model.norm.weight * 1.001)
        write(self, folder)

    monkeypatch.setattr(kind, "save_pretrained", wrong)
    with pytest.raises(ModelError, match="another model"):
        em.save_model(model, tmp_path / "wrong")
    assert list(tmp_path.iterdir()) == []


if "hooked" in SURFACES:

    @pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
    def test_processed_weights_and_models_from_nowhere_are_refused(tmp_path: Path) -> None:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        folded: Any = fresh("gpt2", "hooked")
        folded.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
        with pytest.raises(ModelError, match=r"folded.*em\.load_model"):
            em.save_model(folded, tmp_path / "folded")
        config = HookedTransformerConfig(n_layers=1, d_model=16, n_ctx=8, d_head=8, d_vocab=20, act_fn="relu")
        with pytest.raises(ModelError, match="does not say which Hugging Face model"):
            em.save_model(HookedTransformer(config), tmp_path / "nowhere")
        assert list(tmp_path.iterdir()) == []


def test_a_tied_embedding_is_untied_before_something_is_baked_into_it(surface: str) -> None:
    model = fresh("qwen2", surface)
    start = em.Add(a_direction(model, "resid_pre", 0))
    if surface == "bridge":
        with pytest.raises(WeightEditError, match="untie_embeddings_"):
            em.bake_(model, start)
    em.untie_embeddings_(model)
    with em.intervene(model, start):
        steered = logits(model)
    em.bake_(model, start)
    assert gap(logits(model), steered) <= 1e-5
