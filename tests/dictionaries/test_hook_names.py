"""A hook's name means one tensor: each is compared with TransformerLens's own cache, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

import tl_em as em
from tl_em.dictionaries.checks import same_name
from tl_em.dictionaries.hook_names import _LENS, place, placed
from tl_em.dictionaries.norms import mlp_norm
from tl_em.errors import UsageError
from tl_em.models.hooks import LensModel, hook_points
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.stream import captured

pytestmark = pytest.mark.surface
IDS = [2, 9, 14, 30, 11, 42, 17]
GATED = ("attn_in", "_input", "_result", "_scale", "hook_pattern", "attn_scores")


def cache(model: Any) -> Mapping[str, torch.Tensor]:
    """Every tensor of block 1 that TransformerLens names."""
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str, x: torch.Tensor, hook: object) -> None:
        kept[name] = x.detach().clone()

    names = [n for n in hook_points(model) if n.startswith("blocks.1.") and not any(word in n for word in GATED)]
    model.set_use_hook_mlp_in(True)
    try:
        with torch.no_grad():
            model.run_with_hooks(torch.tensor([IDS]), fwd_hooks=[(n, partial(keep, n)) for n in names])
    finally:
        model.set_use_hook_mlp_in(False)
    return kept


def read(model: LensModel, site: em.Site) -> torch.Tensor:
    positions = list(range(-len(IDS), 0))
    return captured(model, [EncodedPrompt.from_ids(IDS)], [site], positions)[0, :, 0]


def test_every_name_is_the_tensor_that_its_site_reads(model: LensModel, family: str) -> None:
    """What the table maps, on every surface and family; behind a module's own output a norm may follow (Gemma)."""
    kept = cache(model)
    compared = 0
    for tail in _LENS:
        name = f"blocks.1.{tail}"
        if name not in kept:
            continue
        found = place(name, "hook_name")
        assert found is not None
        if found.module and family == "gemma2":
            assert not torch.allclose(
                read(model, found.site), kept[name][0], atol=1e-2
            )  # which Dictionary.check refuses
            continue
        there = kept[name][0]
        if found.before_weight:
            norm = mlp_norm(model, 1)
            there = there * norm.weight + norm.bias
            assert not torch.allclose(there, kept[name][0], atol=1e-2)  # the weight matters
        torch.testing.assert_close(read(model, found.site), there, atol=2e-5, rtol=1e-4)
        compared += 1
    assert compared >= 7


def test_every_other_name_of_a_block_is_refused_by_its_name(model: LensModel) -> None:
    others = [name for name in cache(model) if name.removeprefix("blocks.1.") not in _LENS]
    assert len(others) > 5 and "blocks.1.attn.hook_z" in {*others, "blocks.1.attn.hook_z"}
    for name in others:
        with pytest.raises(UsageError, match=r"names no site of this package"):
            place(name, "hook_name")


@pytest.mark.parametrize(
    ("name", "site", "module"),
    [
        ("model.layers.3", em.Site(3), False),
        ("model.layers.3.output", em.Site(3), False),
        ("model.layers.3.input", em.Site(3, "resid_pre"), False),
        ("transformer.h.3.mlp", em.Site(3, "mlp_out"), True),
        ("gpt_neox.layers.3.attention", em.Site(3, "attn_out"), True),
        ("layers.3.mlp", em.Site(3, "mlp_out"), True),
        ("layers.3.mlp.input", em.Site(3, "mlp_in"), False),
        ("model.layers.3.pre_feedforward_layernorm.output", em.Site(3, "mlp_in"), False),
        ("model.layers.3.post_feedforward_layernorm.output", em.Site(3, "mlp_out"), False),
        ("model.language_model.layers.3.pre_feedforward_layernorm.input", em.Site(3, "resid_mid"), False),
        ("resid_post_layer_3", em.Site(3), False),
        ("attention_out_layer_3", em.Site(3, "attn_out"), False),
    ],
)
def test_modules_of_hugging_face_and_trainers_words_are_sites(name: str, site: em.Site, module: bool) -> None:
    found = place(name, "hook_name")
    assert found is not None and (found.site, found.module) == (site, module)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.o_proj.input",
        "blocks.3.attn.hook_z",
        "blocks.3.mlp.hook_post",
        "transformer.h.3.ln_2",
        "blocks.3.hook_q_input",
    ],
)
def test_a_tensor_that_no_site_reads_is_refused_also_where_a_site_is_given(name: str) -> None:
    with pytest.raises(UsageError, match=r"hook_name is .*names no site"):
        placed(name, "hook_name", em.Site(3), "site_in")


@pytest.mark.parametrize(
    "name", [None, "", "hook_embed", "model.layers.3.post_attention_layernorm.output", "my_stream"]
)
def test_what_only_the_user_can_know_is_asked_for(name: str | None) -> None:
    with pytest.raises(UsageError, match=r"Pass site_in=em\.Site"):
        placed(name, "hook_name", None, "site_in")
    assert placed(name, "hook_name", em.Site(3), "site_in").site == em.Site(3)


def test_a_site_that_contradicts_the_name_is_refused() -> None:
    assert placed("blocks.3.hook_mlp_in", "hook_name", em.Site(3, "resid_mid"), "site_in").site.stream == "resid_mid"
    with pytest.raises(UsageError, match=r"hook_name is 'blocks\.3\.hook_mlp_in'.*dictionary\.at\("):
        placed("blocks.3.hook_mlp_in", "hook_name", em.Site(3, "mlp_in"), "site_in")
    with pytest.raises(UsageError, match=r"is no site"):
        placed("blocks.3.hook_mlp_in", "hook_name", "resid_mid", "site_in")


def test_the_norm_is_what_stands_between_the_normalised_stream_and_the_mlp(model: LensModel) -> None:
    """The same on every surface: Gemma's is 1 + w, GPT-2's has a bias."""
    norm, kept = mlp_norm(model, 1), cache(model)
    there = kept["blocks.1.ln2.hook_normalized"][0] * norm.weight + norm.bias
    torch.testing.assert_close(read(model, em.Site(1, "mlp_in")), there, atol=2e-5, rtol=1e-4)


def test_names_of_one_model_are_told_from_those_of_two() -> None:
    assert same_name("gpt2-small", "gpt2") and same_name("Qwen/Qwen2.5-7B", "/models/qwen2.5-7b-instruct/")
    assert not same_name("gpt2", "pythia-70m") and not same_name("", "gpt2")
