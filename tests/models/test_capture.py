"""Captures equal TransformerLens's own cache of each prompt alone; nothing but the wanted positions is kept or run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache

import tl_em as em
from tl_em.errors import NonFiniteError, PositionError, PromptError, UsageError
from tl_em.graph.attention import attention_pattern
from tl_em.models import stream as capture_module
from tl_em.models import unembedding
from tl_em.models.cache import reading_on
from tl_em.models.class_means import mean_activation
from tl_em.models.hooks import LensModel, hook_points, hooked, read_point
from tl_em.models.prompts import EncodedPrompt, Prompt, encode
from tl_em.models.sites import Site
from tl_em.models.stream import capture, next_token_logits, sequence_logprobs

from ..conftest import make_tokenizer

pytestmark = pytest.mark.surface

STREAMS = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
SITES = [Site(layer, stream) for layer in (0, 2) for stream in STREAMS]  # type: ignore[arg-type]
PROMPTS: list[Prompt] = [
    "the cat sat",
    "please tell me how to steal a big red car .",
    "tell me",
    "the dog ran from the bank",
]
ANSWERED: list[Prompt] = [
    [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": "sorry cannot help ."}],
    [{"role": "user", "content": "the cat sat on a bank"}, {"role": "assistant", "content": "yes"}],
]
CLOSE = {"rtol": 1e-5, "atol": 2e-5}  # float32 sums over a padded and an unpadded batch


def alone(model: LensModel, ids: tuple[int, ...]) -> tuple[torch.Tensor, dict[Site, torch.Tensor]]:
    """Logits and streams of one unpadded prompt, through TransformerLens's own cache."""
    logits, cache = model.run_with_cache(torch.tensor([ids]))  # type: ignore[attr-defined]
    points = {site: read_point(model, site) for site in SITES}
    return logits[0].detach(), {site: point(cache[point.name])[0].detach() for site, point in points.items()}


@pytest.mark.parametrize("position", ["instruction_end", "prompt_end", -3])
def test_capture_equals_the_cache_of_each_prompt_alone(model: LensModel, position: Any) -> None:
    found = capture(model, PROMPTS, SITES, position=position)
    assert found.shape == (4, 12, 32) and found.dtype == torch.float32 and not found.requires_grad
    for row, encoded in enumerate(encode(model, PROMPTS)):
        at = {"instruction_end": encoded.instruction[1] - 1, "prompt_end": len(encoded) - 1, -3: len(encoded) - 3}[
            position
        ]
        _, streams = alone(model, encoded.ids)
        for column, site in enumerate(SITES):
            torch.testing.assert_close(found[row, column], streams[site][at], **CLOSE)


def test_response_mean(model: LensModel) -> None:
    found = capture(model, ANSWERED, SITES, position="response_mean")
    for row, encoded in enumerate(encode(model, ANSWERED)):
        assert encoded.response is not None
        _, streams = alone(model, encoded.ids)
        for column, site in enumerate(SITES):
            torch.testing.assert_close(found[row, column], streams[site][slice(*encoded.response)].mean(0), **CLOSE)


def test_both_surfaces_agree(make_model: Callable[..., LensModel], family: str) -> None:
    from ..conftest import SURFACES

    found = [capture(make_model(family, s), PROMPTS, SITES, position="prompt_end") for s in SURFACES]
    torch.testing.assert_close(found[0], found[-1], **CLOSE)


def test_left_padding_would_be_wrong_on_a_bridge(make_model: Callable[..., LensModel]) -> None:
    """Why everything here is padded on the right."""
    model = make_model("gpt2", "bridge")
    (encoded,) = encode(model, ["the cat sat"])
    padded = torch.tensor([(0,) * 4 + encoded.ids])
    assert not torch.allclose(model(padded)[0, -1], next_token_logits(model, [encoded])[0], atol=1e-2)


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(small_model: LensModel) -> None:
    tokenizer = small_model.tokenizer  # type: ignore[attr-defined]
    encoded = encode(small_model, ["<pad> the cat", "the dog ran from the bank", "<bos> cat"], chat=False)
    expected = capture(small_model, encoded, SITES, position="prompt_end"), next_token_logits(small_model, encoded)
    before, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        torch.testing.assert_close(capture(small_model, encoded, SITES, position="prompt_end"), expected[0], **CLOSE)
        torch.testing.assert_close(next_token_logits(small_model, encoded), expected[1], **CLOSE)
        assert tokenizer.padding_side == "left"
    finally:
        tokenizer.padding_side = before


def test_no_keys_and_values_are_kept_of_what_is_read_once(
    make_model: Callable[..., LensModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were: of all layers, which is what a pass of SmolLM2 took most of its memory for."""
    model, kept = make_model("llama", "bridge"), list[int]()
    encoded = encode(model, [*PROMPTS, PROMPTS[0]])

    def update(self: Any, *args: Any, update: Any = Cache.update, **options: Any) -> Any:
        kept.append(1)
        return update(self, *args, **options)

    monkeypatch.setattr(Cache, "update", update)
    with torch.no_grad(), reading_on(model) as read:
        read(torch.tensor([encoded[0].ids]))
    assert len(kept) == model.cfg.n_layers
    kept.clear()
    capture(model, encoded, SITES, position="prompt_end")
    next_token_logits(model, encoded[:1])
    sequence_logprobs(model, ANSWERED[:1])
    em.attribute(model, PROMPTS[0], target=("yes", "cannot"))
    attention_pattern(model, PROMPTS[0], 1)
    assert not kept


def test_a_graph_reads_as_it_does_with_a_tokenizer_that_pads_on_the_left(small_model: Any) -> None:
    """A HookedTransformer hides leading tokens then that are its padding."""
    tokenizer = small_model.tokenizer
    prompt = EncodedPrompt.from_ids([tokenizer.pad_token_id, *encode(small_model, ["the cat sat"])[0].ids])

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        graph = em.attribute(small_model, prompt, target=("yes", "cannot"))
        return graph.edges, attention_pattern(small_model, prompt, 1)

    before, expected = tokenizer.padding_side, read()
    tokenizer.padding_side = "left"
    try:
        torch.testing.assert_close(read(), expected, **CLOSE)
    finally:
        tokenizer.padding_side = before


def test_encoded_prompts_are_taken_as_they_are(small_model: LensModel) -> None:
    torch.testing.assert_close(
        capture(small_model, encode(small_model, PROMPTS), SITES, position=-1),
        capture(small_model, PROMPTS, SITES, position=-1),
    )


def test_capture_sees_what_attached_hooks_leave(small_model: LensModel) -> None:
    with hooked(small_model, [("blocks.1.hook_resid_post", lambda x, hook: torch.full_like(x, 3.0))]):
        found = capture(small_model, PROMPTS, [Site(1), Site(2, "resid_pre")], position="prompt_end")
    assert bool((found == 3.0).all())


def counted_blocks(model: LensModel, run: Callable[[], Any]) -> list[int]:
    """Which blocks' inputs were reached."""
    reached: list[int] = []
    points = [hook_points(model)[f"blocks.{i}.hook_resid_pre"] for i in range(3)]
    handles = [p.register_forward_hook(lambda *_, i=i: reached.append(i)) for i, p in enumerate(points)]
    handles.append(model.unembed.register_forward_hook(lambda *_: reached.append(3)))  # type: ignore[attr-defined]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return sorted(set(reached))


@pytest.mark.parametrize(("site", "blocks"), [(Site(0), [0]), (Site(1, "resid_pre"), [0, 1]), (Site(2), [0, 1, 2])])
def test_the_pass_ends_when_everything_is_read(small_model: LensModel, site: Site, blocks: list[int]) -> None:
    assert counted_blocks(small_model, lambda: capture(small_model, PROMPTS, [site], position="prompt_end")) == blocks
    assert counted_blocks(small_model, lambda: small_model(torch.tensor([[2, 7]]))) == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # in TransformerLens's generate
def test_ending_early_leaves_no_trace(small_model: LensModel) -> None:
    tokens = torch.tensor([[2, 7, 9]])
    before = small_model(tokens)
    capture(small_model, PROMPTS, [Site(0)], position="prompt_end")
    assert torch.equal(small_model(tokens), before)
    assert small_model.generate(tokens, max_new_tokens=2, verbose=False, do_sample=False).shape == (1, 5)
    assert not any(point.fwd_hooks or point._forward_hooks for point in hook_points(small_model).values())


def test_a_capture_inside_a_checked_context_does_not_raise_for_blocks_it_never_ran(small_model: LensModel) -> None:
    with hooked(small_model, [("blocks.2.hook_resid_post", lambda x, hook: x)]):
        capture(small_model, PROMPTS, [Site(0)], position="prompt_end")


# --- Logits -----------------------------------------------------------------------------------------------------------


def test_next_token_logits_are_those_of_each_prompt_alone(model: LensModel) -> None:
    mixed = [*PROMPTS, *ANSWERED]
    found = next_token_logits(model, mixed)
    assert found.dtype == torch.float32 and found.shape == (6, len(make_tokenizer()))
    for row, encoded in enumerate(encode(model, mixed)):
        torch.testing.assert_close(found[row], alone(model, encoded.ids)[0][-1], **CLOSE)


def test_only_the_wanted_tokens_are_unembedded(small_model: LensModel) -> None:
    shapes: list[tuple[int, ...]] = []
    handle = small_model.unembed.register_forward_hook(lambda m, a, y: shapes.append(tuple(y.shape)))  # type: ignore[attr-defined]
    try:
        next_token_logits(small_model, PROMPTS)
        sequence_logprobs(small_model, ANSWERED)
    finally:
        handle.remove()
    assert shapes == [(1, 4, 57), (1, 1, 57), (1, 5, 57)]  # one in the pass, all of them after it


def test_a_model_whose_unembedding_is_no_module_gives_the_same(
    small_model: LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = next_token_logits(small_model, PROMPTS), sequence_logprobs(small_model, ANSWERED)
    for module in (capture_module, unembedding):
        monkeypatch.setattr(module, "unembedding_of", lambda model: None)
    torch.testing.assert_close(next_token_logits(small_model, PROMPTS), expected[0], **CLOSE)
    torch.testing.assert_close(sequence_logprobs(small_model, ANSWERED), expected[1], **CLOSE)


def test_next_token_logits_under_an_intervention_equal_tl_run_with_hooks(model: LensModel) -> None:
    def edit(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x.roll(1, -1)

    name = "blocks.1.hook_resid_post"
    with hooked(model, [(name, edit)]):
        found = next_token_logits(model, PROMPTS)
    assert not torch.allclose(found, next_token_logits(model, PROMPTS), atol=1e-2)
    for row, encoded in enumerate(encode(model, PROMPTS)):
        theirs = model.run_with_hooks(torch.tensor([encoded.ids]), fwd_hooks=[(name, edit)])  # type: ignore[attr-defined]
        torch.testing.assert_close(found[row], theirs[0, -1].detach(), **CLOSE)


def test_sequence_logprobs_are_sums_over_the_response(model: LensModel) -> None:
    found = sequence_logprobs(model, ANSWERED)
    each = sequence_logprobs(model, ANSWERED, per_token=True)
    for row, encoded in enumerate(encode(model, ANSWERED)):
        assert encoded.response is not None
        start, end = encoded.response
        logprobs = alone(model, encoded.ids)[0].log_softmax(-1)
        total = sum(float(logprobs[i - 1, encoded.ids[i]]) for i in range(start, end))
        assert float(found[row]) == pytest.approx(total, abs=1e-4)
        assert float(each[row]) == pytest.approx(total / (end - start), abs=1e-4)
    with pytest.raises(PositionError):
        sequence_logprobs(model, PROMPTS)


def test_small_batches_change_nothing(small_model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = next_token_logits(small_model, PROMPTS), sequence_logprobs(small_model, ANSWERED)
    monkeypatch.setattr(capture_module, "_MAX_TOKENS", 12)
    torch.testing.assert_close(next_token_logits(small_model, PROMPTS), expected[0], **CLOSE)
    torch.testing.assert_close(sequence_logprobs(small_model, ANSWERED), expected[1], **CLOSE)


@pytest.mark.parametrize(
    ("d_model", "d_mlp", "read", "passed"), [(32, None, 2048, 8192), (576, 1536, 1040, 2080), (4096, 14336, 512, 2048)]
)
def test_a_pass_holds_fewer_tokens_where_blocks_are_wide(
    d_model: int, d_mlp: int | None, read: int, passed: int
) -> None:
    model: Any = SimpleNamespace(cfg=SimpleNamespace(d_model=d_model, d_mlp=d_mlp, device="cpu"))
    assert (capture_module._capture_tokens(model), capture_module._pass_tokens(model)) == (read, passed)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_are_named(small_model: LensModel) -> None:
    marked = encode(small_model, PROMPTS)[1].ids[3]

    def poison(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[:1, 3] = float("nan")  # the longest prompt comes first in its batch
        return x

    assert marked
    with hooked(small_model, [("blocks.1.hook_resid_pre", poison)]):
        for run in (
            lambda: capture(small_model, PROMPTS, [Site(0), Site(2)], position="prompt_end"),
            lambda: mean_activation(small_model, PROMPTS, site=Site(2), position="prompt_end"),
        ):
            with pytest.raises(NonFiniteError, match=r"resid_post\[2\] of prompt 1"):
                run()
        with pytest.raises(NonFiniteError, match="logits of prompt 1"):
            next_token_logits(small_model, PROMPTS)


def test_infinities_in_the_padding_do_not_leak_into_a_mean(small_model: LensModel) -> None:
    encoded = encode(small_model, ANSWERED)
    expected = capture(small_model, encoded, [Site(1)], position="response_mean")
    width = max(map(len, encoded))

    def poison(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        for row, length in enumerate(sorted(map(len, encoded), reverse=True)):
            x[row, length:width] = float("inf")
        return x

    with hooked(small_model, [("blocks.1.hook_resid_post", poison)]):
        torch.testing.assert_close(
            capture(small_model, encoded, [Site(1)], position="response_mean"), expected, **CLOSE
        )


def test_refusals(small_model: LensModel, surface: str) -> None:
    with pytest.raises(PositionError, match="'all'"):
        capture(small_model, PROMPTS, [Site(0)], position="all")
    with pytest.raises(PromptError, match="no prompts"):
        capture(small_model, [], [Site(0)], position="prompt_end")
    with pytest.raises(UsageError, match="No sites"):
        capture(small_model, PROMPTS, [], position="prompt_end")
