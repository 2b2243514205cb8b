"""The weight form of an ablation equals the hook form, or is refused; and it can be taken back bit for bit."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomConfig, BloomForCausalLM

from tests.conftest import SURFACES, make_hf_model, make_tokenizer
from tl_em.directions.direction import Direction
from tl_em.errors import ProvenanceError, WeightEditError, WidthError
from tl_em.interventions import weight_proof
from tl_em.interventions.edits import Ablate, Add
from tl_em.interventions.intervene import intervene
from tl_em.interventions.weight_proof import copies_of
from tl_em.interventions.weights import _remove_, orthogonalize_, orthogonalized, untie_embeddings_
from tl_em.interventions.writing_weights import Part
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model
from tl_em.models.shared import address
from tl_em.models.sites import Provenance, Site

pytestmark = pytest.mark.surface

TOKENS = torch.tensor([[2, 3, 8, 20, 11, 6, 4], [2, 3, 9, 10, 30, 6, 4]])


def run(model: LensModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def fresh(family: str, surface: str, **options: Any) -> LensModel:
    return load_model(make_hf_model(family), surface=surface, tokenizer=make_tokenizer(), in_place=True, **options)  # pyright: ignore[reportArgumentType]


def random_direction(model: LensModel, seed: int = 3) -> Direction:
    return Direction(torch.randn(int(model.cfg.d_model), generator=torch.Generator().manual_seed(seed)), Site(1))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_weight_form_equals_hook_form_and_changes_the_model(family: str, surface: str) -> None:
    model = fresh(family, surface)
    direction = random_direction(model)
    before = run(model)
    untie_embeddings_(model)
    assert torch.equal(run(model), before)
    with intervene(model, Ablate(direction)):
        hooked = run(model)
    orthogonalize_(model, direction)
    edited = run(model)
    scale = float(before.abs().max())
    assert (edited - hooked).abs().max() <= 1e-5 * scale
    assert (hooked - before).abs().max() > 1e-2 * scale
    with intervene(model, Ablate(direction)):  # nothing is left to ablate
        assert (run(model) - edited).abs().max() <= 1e-5 * scale


def test_gemma_2_is_refused_because_a_norm_follows_its_weights(
    surface: str, make_model: Callable[..., LensModel]
) -> None:
    model = make_model("gemma2", surface)
    before = weights(model)
    with pytest.raises(WeightEditError, match=r"norm.*em\.intervene"):
        orthogonalize_(model, random_direction(model))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_tied_embeddings_are_refused_until_untied(family: str) -> None:
    model = fresh(family, "bridge")
    direction = random_direction(model)
    before = weights(model)
    with pytest.raises(WeightEditError, match="untie_embeddings_"):
        orthogonalize_(model, direction)
    with pytest.raises(WeightEditError, match="untie_embeddings_"), orthogonalized(model, direction):
        raise AssertionError("the block must not run")
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    untie_embeddings_(model)
    untie_embeddings_(model)  # nothing left to do
    orthogonalize_(model, direction)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_the_context_restores_weights_and_logits_bit_for_bit_also_after_an_exception(family: str, surface: str) -> None:
    model = fresh(family, surface)
    untie_embeddings_(model)
    direction, other = random_direction(model), random_direction(model, seed=4)
    logits, before = run(model), weights(model)
    with orthogonalized(model, direction):
        inside = run(model)
        with orthogonalized(model, other):
            assert not torch.equal(run(model), inside)
        assert torch.equal(run(model), inside)
    assert not torch.equal(inside, logits)
    with pytest.raises(KeyError, match="the user's own"), orthogonalized(model, direction):
        raise KeyError("the user's own")
    assert torch.equal(run(model), logits)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_every_bias_and_both_embeddings_are_edited(surface: str) -> None:
    model = fresh("gpt2", surface)
    untie_embeddings_(model)
    before = weights(model)
    with orthogonalized(model, random_direction(model)):
        inside = weights(model)
    changed = {before[name].shape for name, value in inside.items() if not torch.equal(value, before[name])}
    d, vocabulary, context = 32, int(model.cfg.d_vocab), int(model.cfg.n_ctx)
    assert {torch.Size([d]), torch.Size([vocabulary, d]), torch.Size([context, d])} < changed


def test_orientation_is_found_where_the_shape_does_not_tell() -> None:
    """A square weight: GPT-2's attention output is stored transposed with respect to Llama's."""
    for family, axis in (("gpt2", 1), ("llama", 0)):
        model: Any = fresh(family, "bridge")
        untie_embeddings_(model)
        weight = model.blocks[0].attn.o.original_component.weight
        assert weight.shape == (32, 32)
        direction = random_direction(model)
        before = weight.movedim(axis, -1) @ direction.unit
        with orthogonalized(model, direction):
            after = weight.movedim(axis, -1) @ direction.unit
            across = weight.movedim(1 - axis, -1) @ direction.unit
        assert before.abs().max() > 0.1 and across.abs().max() > 0.1
        assert after.abs().max() < 1e-6


def test_half_precision_is_edited_in_float32(surface: str) -> None:
    model = fresh("llama", surface, dtype=torch.bfloat16)
    direction = random_direction(model)
    embedding = next(value for name, value in model.named_parameters() if "embed" in name)  # pyright: ignore[reportAttributeAccessIssue]
    before = embedding.detach().clone()
    exact = before.float() - (before.float() @ direction.unit)[:, None] * direction.unit
    orthogonalize_(model, direction)
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(embedding.detach(), exact.to(torch.bfloat16))
    half = direction.unit.to(torch.bfloat16)
    naive = before - (before @ half)[:, None] * half
    assert direction.project(embedding.detach()).abs().mean() < direction.project(naive).abs().mean()


def test_a_direction_that_does_not_fit_changes_nothing(surface: str, make_model: Callable[..., LensModel]) -> None:
    model = make_model("llama", surface)
    before = weights(model)
    other = Provenance.of(make_model("gpt2", surface, template=None))
    wrong = [
        (Direction(torch.ones(7), Site(0)), WidthError),
        (Direction(torch.ones(32), Site(0), provenance=replace(other, n_layers=12)), ProvenanceError),
    ]
    for direction, error in wrong:
        with pytest.raises(error):
            orthogonalize_(model, direction)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_an_embedding_with_a_norm_inside_is_refused() -> None:
    """BLOOM on a HookedTransformer: the module that holds ``W_E`` gives what its norm makes of it."""
    if "hooked" not in SURFACES:
        pytest.skip("this TransformerLens has no HookedTransformer")
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=70, hidden_size=32, n_layer=2, n_head=4)).eval()
    model = load_model(bloom, surface="hooked", tokenizer=make_tokenizer(), in_place=True)
    assert model.embed.ln is not None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(WeightEditError, match="a norm or a projection"), orthogonalized(model, random_direction(model)):
        raise AssertionError("the block must not run")


class NormedEmbedding(nn.Embedding):
    """Gives no rows of its weight, and no module of its own says so."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.layer_norm(super().forward(input), (self.embedding_dim,))


def _normed_embedding(hf_model: Any) -> None:
    normed = NormedEmbedding(*hf_model.model.embed_tokens.weight.shape)
    normed.weight = hf_model.model.embed_tokens.weight
    hf_model.model.embed_tokens = normed


def _read_by_the_head(hf_model: Any) -> None:
    """A head that reads with the embedding's weight without sharing a parameter with it."""
    hf_model.lm_head.forward = lambda x: nn.functional.linear(x, hf_model.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_that_gives_no_rows_of_its_weight_is_refused(dtype: torch.dtype) -> None:
    hf_model = make_hf_model("llama")
    normed = NormedEmbedding(*hf_model.model.embed_tokens.weight.shape)
    normed.weight = hf_model.model.embed_tokens.weight
    hf_model.model.embed_tokens = normed
    model = load_model(hf_model, tokenizer=make_tokenizer(), in_place=True, dtype=dtype)
    with pytest.raises(WeightEditError, match="a norm or a projection"):
        orthogonalize_(model, random_direction(model))


def test_an_edit_that_is_not_the_ablation_is_taken_back() -> None:
    """A head that reads with the embedding's weight without sharing a parameter: only the logits show it."""
    hf_model = make_hf_model("llama")
    hf_model.lm_head.forward = lambda x: nn.functional.linear(x, hf_model.model.embed_tokens.weight)
    model = load_model(hf_model, tokenizer=make_tokenizer(), in_place=True)
    before, logits = weights(model), run(model)
    for edit in (orthogonalize_, lambda *given: orthogonalized(*given).__enter__()):
        with pytest.raises(WeightEditError, match="logits differ"):
            edit(model, random_direction(model))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert torch.equal(run(model), logits)


def test_hooks_of_the_user_rest_during_the_proof_and_act_afterwards(surface: str) -> None:
    model = fresh("llama", surface)
    direction = random_direction(model)
    with intervene(model, Add(Direction(direction.vector * 5, Site(1, "mlp_out")))):
        steered = run(model)
        with orthogonalized(model, direction):
            assert not torch.equal(run(model), steered)
        assert torch.equal(run(model), steered)


def test_a_weight_behind_something_else_is_refused() -> None:
    """An adapter's module in a write's path: the write is no longer one weight's output."""

    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    hf_model = make_hf_model("llama")
    hf_model.model.layers[1].mlp.down_proj = Twice(hf_model.model.layers[1].mlp.down_proj)
    model = load_model(hf_model, tokenizer=make_tokenizer(), in_place=True)
    with pytest.raises(WeightEditError, match="no weight's own output"):
        orthogonalize_(model, random_direction(model))


# --- What it costs ----------------------------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """How many numbers the largest tensor holds that is made meanwhile."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(("shape", "axis"), [((40, 32), -1), ((32, 40), 0), ((4, 10, 32), -1), ((32,), -1)])
def test_a_weight_is_edited_in_place_by_the_same_numbers(shape: tuple[int, ...], axis: int) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    part, removal = Part(module, "weight", axis), Ablate(Direction(torch.randn(32), Site(1)))
    wanted = removal.edit(part.tensor.detach().movedim(axis, -1)).movedim(-1, axis)
    assert not torch.allclose(wanted, part.tensor.detach())
    with Made() as made:
        _remove_(part, removal)
    torch.testing.assert_close(part.tensor.detach(), wanted, rtol=0, atol=1e-6)  # numbers of about 1, float32
    assert made.largest <= 40, "a second tensor of its size"


def test_an_edit_of_ones_own_is_not_taken_for_the_ablation(surface: str) -> None:
    class Half(Ablate):
        def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
            return (x + super().edit(x, mask, name=name)) / 2

    model = fresh("llama", surface)
    untie_embeddings_(model)
    half = Half(random_direction(model))
    with intervene(model, half):
        wanted = run(model)
    with orthogonalized(model, half):
        torch.testing.assert_close(run(model), wanted, rtol=1e-4, atol=1e-4)
    with orthogonalized(model, half.direction):
        assert not torch.allclose(run(model), wanted, atol=1e-2)


@pytest.mark.parametrize("large", [0, 2**40])
def test_copies_are_the_same_bits_and_lie_together_where_they_are_large(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_proof, "_LARGE", large)
    generator = torch.Generator().manual_seed(0)
    odd = torch.randn(5, 7, generator=generator)
    given = [odd, odd.T, odd.half()[:, :3], odd.bfloat16(), odd.double(), torch.zeros(0, 7), torch.tensor(3.0),
             odd.new_tensor([float("nan"), -0.0])]  # fmt: skip
    with torch.inference_mode():
        given.append(torch.randn(3))
        copies = copies_of(given)
    for tensor, copy in zip(given, copies, strict=True):
        assert copy.shape == tensor.shape and copy.dtype == tensor.dtype and not copy.is_inference()
        assert copy.contiguous().flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8))
        assert not copy.numel() or address(copy) != address(tensor)
    together = hasattr(mmap, "MADV_HUGEPAGE") and not large
    assert (len({address(copy) for copy in copies if copy.numel()}) == 1) == together
    odd.zero_()
    assert copies[0].any(), "a copy, not a view"


def test_the_proof_unembeds_one_token(surface: str) -> None:
    model = fresh("llama", surface)
    assert weight_proof.some_logits(model).shape == (1, 1, int(model.cfg.d_vocab))
