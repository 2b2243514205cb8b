"""The delta hook is SAELens's ablation with its error term, on both surfaces, and other hooks at the point stay.

In one pass at one point: a hook of the user's adds a vector, a latent is ablated, a direction is ablated.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import tl_em as em
from tests.conftest import SURFACES, cached_model, make_hf_model, make_tokenizer
from tl_em.dictionaries import Dictionary, from_sae_lens

pytestmark = pytest.mark.surface
WIDTH, LATENTS, SITE, LAYERS = 32, 48, em.Site(1), 3
POINT, NEXT = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"
TOLERANCE = 1e-6
"""Of the largest value: sums in another order, in float32."""
PROMPT = "the cat sat in the car and the big dog ran to the queen"


def pushed() -> torch.Tensor:
    return torch.linspace(-0.5, 0.5, WIDTH)


def direction() -> em.Direction:
    return em.Direction(torch.arange(1.0, WIDTH + 1).sin(), SITE)


def own_dictionary() -> Dictionary:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(WIDTH, LATENTS, generator=generator) / WIDTH**0.5
    b = 0.1 * torch.randn(LATENTS + WIDTH, generator=generator)
    return Dictionary(W, b[:LATENTS], W.T, b[LATENTS:], activation="relu", site_in=SITE)


def ablated(x: torch.Tensor) -> torch.Tensor:
    unit = direction().unit
    return x - (x @ unit)[..., None] * unit


def tokens_of(model) -> torch.Tensor:
    return torch.tensor([model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])


def ours(model, tokens, intervention, *, user: bool = True, also: bool = True):
    """Logits, and the stream behind the point, under the user's hook and our interventions."""
    kept = {}

    def add(x, hook):
        return x + pushed()

    def keep(x, hook):
        kept["x"] = x.detach().clone()

    hooks = [(POINT, add)] if user else []
    others = (em.Ablate(direction(), around=torch.zeros(WIDTH)),) if also else ()
    with torch.no_grad(), model.hooks(fwd_hooks=hooks), em.intervene(model, intervention, *others):
        with model.hooks(fwd_hooks=[(NEXT, keep)]):
            return model(tokens), kept["x"]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("also", [False, True])
def test_it_is_the_formula_by_hand_with_the_error_kept(surface, also):
    model, sae = cached_model("gpt2", surface), own_dictionary()
    tokens = tokens_of(model)
    _, before = ours(model, tokens, em.ScaleFeature(sae.feature(0), 1.0), also=False)  # factor 1: the user's hook only
    _, plain = ours(model, tokens, em.ScaleFeature(sae.feature(0), 1.0), user=False, also=False)
    torch.testing.assert_close(before, plain + pushed())  # its hook is there, and first
    a = sae.encode(before)
    index = int(a.mean((0, 1)).argmax())
    off = a.clone()
    off[..., index] = 0
    expected = sae.decode(off) + (before - sae.decode(a))
    expected = ablated(expected) if also else expected
    _, found = ours(model, tokens, em.ScaleFeature(sae.feature(index), 0.0), also=also)
    assert (a[..., index] > 0).any() and float((expected - before).abs().max()) > 0.1
    assert not close(sae.decode(off), expected)  # without the error it would be another thing
    assert close(found, expected)


# ---- SAELens itself ----------------------------------------------------------------------------------------------
def their_sae():
    from sae_lens.saes import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=WIDTH, d_sae=LATENTS, apply_b_dec_to_input=True))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) / WIDTH**0.5)
    sae.cfg.metadata.hook_name = POINT
    return sae


def their_model(surface: str, folder):
    """The same weights in SAELens's own model class, which replaces the hook point by the SAE."""
    if surface == "hooked":
        from sae_lens import HookedSAETransformer

        model = cached_model("gpt2", surface)
        theirs = HookedSAETransformer(model.cfg, tokenizer=model.tokenizer)
        theirs.load_state_dict(model.state_dict())
        return theirs.eval()
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    make_hf_model("gpt2").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return SAETransformerBridge.boot_transformers(str(folder), device="cpu")


@pytest.mark.skipif(find_spec("sae_lens") is None, reason="sae-lens is not installed (it pins transformer-lens<4)")
@pytest.mark.filterwarnings("ignore:.*[Dd]eprecat", "ignore::UserWarning")  # SAELens's and TransformerLens's own
@pytest.mark.parametrize("surface", ["hooked", "bridge"])
@pytest.mark.parametrize("also", [False, True])
def test_it_is_what_saelens_gives_with_its_error_term(surface, also, tmp_path):
    model, sae, theirs = cached_model("gpt2", surface), their_sae(), their_model(surface, tmp_path)
    tokens = tokens_of(model)
    with torch.no_grad():
        assert close(theirs(tokens), model(tokens))
    mine = from_sae_lens(sae)
    _, before = ours(model, tokens, em.ScaleFeature(mine.feature(0), 1.0), also=False)
    index = int(mine.encode(before).mean((0, 1)).argmax())
    kept = {}

    def off(a, hook):
        a[..., index] = 0
        return a

    def keep(x, hook):
        kept["x"] = x.detach().clone()

    # A user's hook at the point itself is lost there, so the vector is added by the block's last write.
    inner = getattr(theirs, "get_sae_hook_name", lambda sae, name: f"{POINT}.{name}")
    named = getattr(theirs, "_resolve_hook_name", str)  # an alias is ignored in silence once an SAE is attached
    hooks = [(named("blocks.1.hook_mlp_out"), lambda x, hook: x + pushed()), (inner(sae, "hook_sae_acts_post"), off)]
    hooks += [(inner(sae, "hook_sae_output"), lambda x, hook: ablated(x))] if also else []
    with torch.no_grad(), theirs.saes([sae], use_error_term=True):
        expected = theirs.run_with_hooks(tokens, fwd_hooks=[*hooks, (named(NEXT), keep)])
    found, stream = ours(model, tokens, em.ScaleFeature(mine.feature(index), 0.0), also=also)
    with torch.no_grad():
        assert not close(model(tokens), expected)
    assert close(stream, kept["x"])
    assert close(found, expected)
