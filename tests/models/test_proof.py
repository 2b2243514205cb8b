"""What a surface must show before it is trusted: found where it is wrong, not found where it is right."""

from __future__ import annotations

import copy
import logging
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers

import tl_em as em
from tl_em.errors import CacheWarning, ModelError, TlEmError, UnprovenWarning
from tl_em.models import generate as generation
from tl_em.models import loading, prefill, proof
from tl_em.models.cache import steps
from tl_em.models.generate import generate
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.sites import Provenance, Site
from tl_em.models.source_record import Boundaries, boundaries, end_tokens
from tl_em.models.stream import capture, next_token_logits

from ..conftest import SURFACES, make_hf_model, make_tokenizer
from . import zoo

pytestmark = pytest.mark.surface
HOOKED = pytest.mark.skipif("hooked" not in SURFACES, reason="this TransformerLens has no HookedTransformer")


def tokens(*lengths: int, seed: int = 0) -> list[EncodedPrompt]:
    generator = torch.Generator().manual_seed(seed)
    return [EncodedPrompt.from_ids(torch.randint(7, 50, (n,), generator=generator).tolist()) for n in lengths]


def uncached(hf_model: Any, prompt: EncodedPrompt, n: int) -> list[int]:
    """Greedy decoding by the plain Hugging Face model, one whole forward pass a token."""
    ids = list(prompt.ids)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(hf_model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt.ids) :]


def generated(model: LensModel, prompt: EncodedPrompt, n: int) -> list[int]:
    return [int(token) for token in generate(model, [prompt], max_new_tokens=n)[0].split()]


# --- The forward pass -------------------------------------------------------------------------------------------------


def test_every_family_shows_itself_equal(make_model: Callable[..., LensModel], family: str, surface: str) -> None:
    shown = proof.proof(make_model(family, surface))
    assert shown is not None and shown.trouble is None and not shown.beyond
    assert shown.tokens == 64  # the whole context of these models
    assert all(gap is not None and gap < 1e-4 for gap in (shown.forward, shown.batch, shown.cache))
    assert str(shown).startswith("shown equal in float32: forward over 64 tokens (")


@HOOKED
def test_a_window_that_is_not_read_is_found_beyond_it() -> None:
    with pytest.raises(ModelError, match=r"not the same function.*over 64 tokens.*surface='bridge'"):
        load_model(zoo.qwen2(12), surface="hooked")
    load_model(zoo.qwen2(90), surface="bridge")
    with pytest.raises(ModelError, match="over 98 tokens"):
        load_model(zoo.qwen2(90), surface="hooked")


@HOOKED
@pytest.mark.parametrize("scale", [None, 2.0], ids=["flat logits", "spread logits"])
def test_the_bound_is_relative_to_the_spread_of_the_logits(scale: float | None) -> None:
    hf_model = zoo.llama({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, scale=scale)
    with pytest.raises(ModelError, match="spreads of its logits"):
        load_model(hf_model, surface="hooked")
    shown = proof.proof(load_model(hf_model))
    assert shown is not None and shown.forward is not None and shown.forward < 1e-4


@pytest.mark.parametrize("change", ["the first", "a vector", "the last"])
def test_a_surface_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, surface: str, change: str
) -> None:
    """Whatever upstream misreads: here, a part that is changed behind its back."""
    build = getattr(loading, f"as_{surface}")

    def misread(*args: Any) -> Any:
        model = build(*args)
        weights = list(model.parameters())
        vector = next(weight for weight in weights if weight.ndim == 1 and bool(weight.any()))
        changed = {"the first": weights[0], "a vector": vector, "the last": weights[-1]}[change]
        with torch.no_grad():
            changed += 0.05 * torch.randn(changed.shape, generator=torch.Generator().manual_seed(0))
        return model

    hf_model = zoo.llama()
    load_model(hf_model, surface=surface)
    monkeypatch.setattr(loading, f"as_{surface}", misread)
    with pytest.raises(ModelError, match="not the same function"):
        load_model(hf_model, surface=surface)


def test_a_surface_that_is_built_and_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch, surface: str) -> None:
    build = getattr(loading, f"as_{surface}")

    def breaking(module: Any, args: Any) -> None:
        raise AttributeError("no attribute 'embed_positions'")

    def built(*args: Any) -> Any:
        model = build(*args)
        model.blocks[1].register_forward_pre_hook(breaking)
        return model

    monkeypatch.setattr(loading, f"as_{surface}", built)
    with pytest.raises(ModelError, match=r"does not run where .* does \(AttributeError: no attribute 'embed_pos"):
        load_model(zoo.llama(), surface=surface)


def test_a_half_precision_model_is_compared_in_its_own_dtype(surface: str) -> None:
    shown = proof.proof(load_model(zoo.llama(), surface=surface, dtype=torch.bfloat16))
    assert shown is not None and shown.dtype == "bfloat16" and shown.forward is not None
    assert 1e-4 < shown.forward < proof.HALF  # rounding shows, and is not taken for an error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_frequencies_are_not_rounded_with_the_weights(tmp_path: Any, surface: str, dtype: torch.dtype) -> None:
    """``hf_model.to(torch.bfloat16)`` rounds them; ``from_pretrained(dtype=torch.bfloat16)`` does not."""
    halved = zoo.llama(scale=6.0).to(torch.bfloat16)
    assert halved.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    halved.save_pretrained(tmp_path)
    prompt = tokens(120)
    stored = next_token_logits(load_model(tmp_path, surface=surface, dtype=dtype), prompt)
    in_memory = next_token_logits(load_model(halved, surface=surface, dtype=dtype), prompt)
    torch.testing.assert_close(in_memory, stored, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        rounded = halved.to(dtype)(torch.tensor([prompt[0].ids])).logits[:, -1].float()
    assert (rounded - stored).abs().max() > 1e-3  # it would matter


def test_proving_can_be_skipped_and_the_provenance_says_so(surface: str) -> None:
    skipped, proven = (load_model(zoo.llama(), surface=surface, prove=each) for each in (False, True))
    assert proof.proof(skipped) is None and proof.proof(proven) is not None
    assert (Provenance.of(skipped).proven, Provenance.of(proven).proven) == (False, True)


def test_one_line_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tl_em"):
        load_model(zoo.llama())
    said = [record.getMessage() for record in caplog.records if record.name.startswith("tl_em")]
    assert len(said) == 1 and "shown equal in float32: forward over 64 tokens" in said[0]


# --- Boundaries -------------------------------------------------------------------------------------------------------


def test_boundaries_are_read_from_the_config() -> None:
    assert boundaries(transformers.MistralConfig(**zoo.GROUPED, sliding_window=24)) == Boundaries(windows=(24,))
    assert boundaries(transformers.Qwen2Config(**zoo.GROUPED, sliding_window=24)).windows == ()  # named, not used
    assert boundaries(zoo.llama(zoo.LONGROPE).config).turns == (32,)
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert boundaries(zoo.llama(llama3 | {"original_max_position_embeddings": 48}).config).scaled == (48,)
    assert boundaries(transformers.GPT2Config()) == Boundaries()


def test_prompts_on_both_sides_of_a_turn_are_measured_as_if_alone() -> None:
    """Beyond its boundary, longrope rotates *all* tokens of a pass otherwise: a shorter prompt must not share it."""
    hf_model = zoo.llama(zoo.LONGROPE)
    model, prompts = load_model(hf_model), tokens(10, 32, 33, 60)
    with torch.no_grad():
        expected = torch.stack([hf_model(torch.tensor([p.ids])).logits[0, -1] for p in prompts])
        padded = torch.tensor([prompts[0].ids + prompts[3].ids[10:]])
        assert (hf_model(padded).logits[0, 9] - expected[0]).abs().max() > 2e-3  # sharing a pass would matter
    torch.testing.assert_close(next_token_logits(model, prompts), expected, rtol=1e-4, atol=1e-4)
    alone = torch.cat([capture(model, [p], [Site(1)], position="prompt_end") for p in prompts])
    torch.testing.assert_close(capture(model, prompts, [Site(1)], position="prompt_end"), alone, rtol=1e-4, atol=1e-4)


def test_an_answer_that_crosses_a_turn_is_the_uncached_one() -> None:
    hf_model = zoo.llama(zoo.LONGROPE)
    model = load_model(hf_model)
    for prompt in tokens(8, 26, 40):
        assert generated(model, prompt, 16) == uncached(hf_model, prompt, 16)


def test_a_boundary_too_costly_to_cross_is_said_when_it_is_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_model = zoo.qwen2(90)
    crossed = load_model(hf_model)
    monkeypatch.setattr(proof, "_CPU", (0.0, 0.0))
    model = load_model(hf_model)
    shown = proof.proof(model)
    assert shown is not None and shown.tokens == 64 and shown.beyond == (90,)
    assert "not shown beyond 90 tokens" in str(shown)
    next_token_logits(model, tokens(90))
    next_token_logits(crossed, tokens(91))
    with pytest.warns(UnprovenWarning, match="91 tokens is longer than the sliding window or rotary boundary of 90"):
        next_token_logits(model, tokens(91))


# --- The cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "window", "mpt", "multi-query", "alibi", "parallel"])
def test_generation_is_the_uncached_one_of_the_plain_model(name: str) -> None:
    wide = {"vocab_size": 90, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    hf_model = {
        "llama": zoo.llama,
        "window": lambda: zoo.qwen2(12),
        "mpt": zoo.mpt,
        "multi-query": lambda: zoo.made(
            transformers.GPTBigCodeConfig(vocab_size=90, n_embd=48, n_layer=3, n_head=4, n_positions=160)
        ),
        "alibi": lambda: zoo.made(transformers.BloomConfig(vocab_size=90, hidden_size=48, n_layer=3, n_head=4)),
        "parallel": lambda: zoo.made(transformers.FalconConfig(**wide, alibi=False, multi_query=True)),
    }[name]()
    model = load_model(hf_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)  # of a TransformerLens whose cache is wrong for it
        for prompt in tokens(4, 9, 30):
            assert generated(model, prompt, 12) == uncached(hf_model, prompt, 12)


@contextmanager
def _forgetful(model: LensModel, *, cached: bool) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A cache that is handed over under a name that nobody reads: every step sees its own tokens alone."""
    with true_steps(model, cached=False) as again:
        if not cached:
            yield again
            return

        def step(new: torch.Tensor) -> torch.Tensor:
            return model(new)[:, -1]

        yield step


true_steps = proof.steps


def test_a_cache_that_forgets_is_found_not_used_and_said_once(monkeypatch: pytest.MonkeyPatch, surface: str) -> None:
    hf_model = zoo.llama()
    prompt = tokens(9)[0]
    expected = uncached(hf_model, prompt, 12)
    monkeypatch.setattr(proof, "steps", _forgetful)
    monkeypatch.setattr(prefill, "steps", _forgetful)
    with _forgetful(load_model(hf_model, surface=surface, prove=False), cached=True) as step, torch.no_grad():
        new = generation.continued(step, torch.tensor([prompt.ids]), 12, [])
    assert new[0].tolist() != expected  # it would be wrong
    model = load_model(hf_model, surface=surface)
    shown = proof.proof(model)
    assert shown is not None and shown.cache is None and "differ by" in str(shown.trouble)
    with pytest.warns(CacheWarning, match="was not shown to be right"):
        assert generated(model, prompt, 12) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generated(model, prompt, 12) == expected


def test_a_cache_that_fails_costs_the_cache_alone(monkeypatch: pytest.MonkeyPatch, surface: str) -> None:
    def broken(model: Any) -> bool:
        raise TypeError("forward() got an unexpected keyword argument")

    monkeypatch.setattr(proof, "_cache_gap", lambda model, tokens, dtype: broken(model))
    hf_model, prompt = zoo.llama(), tokens(9)[0]
    model = load_model(hf_model, surface=surface)
    with pytest.warns(CacheWarning, match="TypeError: forward"):
        assert generated(model, prompt, 6) == uncached(hf_model, prompt, 6)


def test_a_model_that_came_ready_made_is_proven_before_it_generates() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    hf_model = make_hf_model("llama")
    prompt = tokens(9)[0]
    expected = uncached(hf_model, prompt, 12)
    model = TransformerBridge.boot_transformers("mine", hf_model=hf_model, tokenizer=make_tokenizer(bos=False))
    model.tokenizer = None
    calls: list[tuple[int, ...]] = []
    handle = model.hook_dict["blocks.1.hook_resid_post"]
    handle.add_hook(lambda x, hook: calls.append(tuple(x.shape)))
    assert proof.proof(model) is None
    assert generated(model, prompt, 4) == expected[:4]
    shown = proof.proof(model)
    assert shown is not None and shown.cache is not None and shown.forward is None
    assert [shape[1] for shape in calls] == [9, 1, 1, 1]  # the proof passed the user's hook by
    assert Provenance.of(model).proven is None


@pytest.mark.parametrize("where", ["generation config", "config"])
def test_any_of_several_end_tokens_ends_an_answer(surface: str, where: str) -> None:
    hf_model, prompt = zoo.llama(), tokens(9)[0]
    free = uncached(hf_model, prompt, 12)
    second = next(i for i in range(3, 12) if free[i] not in free[:i])
    holder = hf_model.generation_config if where == "generation config" else hf_model.config
    holder.eos_token_id = [89, free[second]]  # the generation config decides where both name some
    if where == "generation config":
        holder.eos_token_id = torch.tensor(holder.eos_token_id)  # as transformers takes them too
    model = load_model(hf_model, surface=surface)
    for each in (model, copy.deepcopy(model)):
        assert end_tokens(each) == sorted([89, free[second]])
        assert generated(each, prompt, 12) == free[:second]


def test_each_of_two_threads_keeps_its_own_cache(surface: str) -> None:
    """With the other's, a model continues the other's text: fluent nonsense, in silence."""
    model, prompts = load_model(zoo.llama(), surface=surface), [torch.tensor([each.ids]) for each in tokens(9, 5)]
    new = torch.tensor([[11]])

    def elsewhere() -> None:
        with steps(model, cached=True) as step:
            read.append(step(prompts[1]))

    read: list[torch.Tensor] = []
    with torch.no_grad(), steps(model, cached=True) as step:
        step(prompts[0])
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        found = step(new)
    with torch.no_grad():
        expected = model(torch.cat([prompts[0], new], 1))[:, -1]
    assert len(read) == 1
    assert (found - expected).abs().max() < 1e-4


# --- What is refused --------------------------------------------------------------------------------------------------


def others() -> dict[str, Callable[[], Any]]:
    t5 = {"vocab_size": 90, "d_model": 48, "num_layers": 2, "num_heads": 4, "d_kv": 12, "d_ff": 96}
    bart = {"vocab_size": 90, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96}
    bart |= {"decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    seen = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return {
        "T5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
        "BART": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**bart)),
        "BERT": zoo.bert,
        "no head": lambda: transformers.LlamaModel(transformers.LlamaConfig(**zoo.GROUPED)),
        "classifier": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**zoo.GROUPED)),
        "tagger": lambda: transformers.LlamaForTokenClassification(transformers.LlamaConfig(**zoo.GROUPED)),
        "images": lambda: transformers.ViTModel(transformers.ViTConfig(**seen, image_size=28, patch_size=14)),
    }


@pytest.mark.parametrize("name", list(others()))
@pytest.mark.parametrize("where", ["memory", "directory"])
def test_what_is_no_causal_language_model_is_refused(tmp_path: Any, name: str, where: str) -> None:
    hf_model = others()[name]()
    if where == "directory":
        hf_model.save_pretrained(tmp_path)
    with pytest.raises(TlEmError) as caught:
        load_model(tmp_path if where == "directory" else hf_model)
    assert isinstance(caught.value, ModelError) or "missing from the files" in str(caught.value)


def test_a_model_that_looks_ahead_is_refused_for_that() -> None:
    with pytest.raises(ModelError, match="a token sees those that follow it"):
        load_model(zoo.bert())


@pytest.mark.parametrize("where", ["memory", "directory"])
def test_of_a_model_that_reads_images_the_language_model_alone(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, surface: str, where: str
) -> None:
    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    whole = zoo.with_images()
    if where == "directory":
        whole.save_pretrained(tmp_path)
    model = load_model(tmp_path if where == "directory" else whole, surface=surface)
    prompt = tokens(20)
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor([prompt[0].ids])).logits[:, -1]
    torch.testing.assert_close(next_token_logits(model, prompt), expected, rtol=1e-4, atol=1e-4)
    assert model.cfg.n_layers == 3
    if surface == "bridge":
        assert type(model.original_model).__name__ == "LlamaForCausalLM"  # type: ignore[attr-defined]


def test_a_model_without_a_language_model_of_its_own_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tl_em.models import checkpoint

    monkeypatch.setattr(checkpoint, "_text_weights", lambda whole, alone: {})
    with pytest.raises(ModelError, match="reads more than text, and its language model could not be taken out"):
        load_model(zoo.with_images())


# --- The caller's settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inference", "no grad", "float64", "meta", "autocast"])
def test_loading_is_the_same_under_the_callers_modes_of_torch(surface: str, mode: str) -> None:
    hf_model, prompt = zoo.llama(), tokens(20)
    expected = next_token_logits(load_model(hf_model, surface=surface), prompt)
    before = torch.get_default_dtype(), torch.get_rng_state()
    try:
        if mode == "float64":
            torch.set_default_dtype(torch.float64)
        context = {
            "inference": torch.inference_mode,
            "no grad": torch.no_grad,
            "float64": torch.enable_grad,
            "meta": lambda: torch.device("meta"),
            "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        }[mode]()
        set_to = torch.get_default_dtype()
        with context:
            model = load_model(hf_model, surface=surface)
        assert torch.get_default_dtype() == set_to and torch.equal(torch.get_rng_state(), before[1])
    finally:
        torch.set_default_dtype(before[0])
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # type: ignore[attr-defined]
    assert not any(p.is_inference() or p.is_meta for p in model.parameters())  # type: ignore[attr-defined]
    torch.testing.assert_close(next_token_logits(model, prompt), expected, rtol=1e-5, atol=1e-5)


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        hf_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**zoo.GROUPED))
    with pytest.raises(ModelError, match="on the meta device"):
        load_model(hf_model)


def test_template_arguments_are_kept_and_pairs_must_agree() -> None:
    given = {"enable_thinking": False}
    models = [
        load_model(make_hf_model("llama"), tokenizer=make_tokenizer(), chat_template_kwargs=each)
        for each in (given, given, None)
    ]
    assert models[0].tokenizer.chat_template_kwargs == given  # type: ignore[attr-defined]
    em.ModelPair(models[0], models[1])
    with pytest.raises(em.TlEmError, match="their chat_template_kwargs are"):
        em.ModelPair(models[0], models[2])
