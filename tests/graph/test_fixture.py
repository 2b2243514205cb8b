"""What circuit-tracer 0.5.0 computed for a small random model, from hooks alone, on every surface."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import tl_em as em
from tl_em.graph.build import attribute
from tl_em.graph.graph import AttributionGraph, Node
from tl_em.graph.pruning import prune, scores
from tl_em.models.loading import load_model
from tl_em.models.upstream_chatter import quiet

CASE = Path(__file__).parents[3] / "shared" / "fixtures" / "circuit_tracer_case"
pytestmark = [
    pytest.mark.surface,
    pytest.mark.skipif(not CASE.is_dir(), reason="the fixture of circuit-tracer is not on this machine"),
]
Key = tuple[str, int, int, int | None]


@cache
def case() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(CASE / "case.safetensors"), json.loads((CASE / "case.json").read_text(encoding="utf-8"))


def hf_model(weights: dict[str, Tensor], config: dict[str, Any]) -> Any:
    """The fixture's HookedTransformer as a Hugging Face GPT-2."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config["d_vocab"], n_positions=config["n_ctx"], n_embd=config["d_model"],
            n_layer=config["n_layers"], n_head=config["n_heads"], n_inner=config["d_mlp"], activation_function="gelu",
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
            architectures=["GPT2LMHeadModel"],
        )
    )  # fmt: skip
    state = {
        "transformer.wte.weight": weights["model.embed.W_E"],
        "transformer.wpe.weight": weights["model.pos_embed.W_pos"],
        "transformer.ln_f.weight": weights["model.ln_final.w"], "transformer.ln_f.bias": weights["model.ln_final.b"],
        "lm_head.weight": weights["model.unembed.W_U"].T,
    }  # fmt: skip
    for layer in range(config["n_layers"]):
        part = {k.removeprefix(f"model.blocks.{layer}."): v for k, v in weights.items() if f"blocks.{layer}." in k}
        qkv = [part[f"attn.W_{each}"].permute(1, 0, 2).flatten(1) for each in "QKV"]
        at = f"transformer.h.{layer}."
        state |= {
            at + "ln_1.weight": part["ln1.w"], at + "ln_1.bias": part["ln1.b"],
            at + "ln_2.weight": part["ln2.w"], at + "ln_2.bias": part["ln2.b"],
            at + "attn.c_attn.weight": torch.cat(qkv, 1),
            at + "attn.c_attn.bias": torch.cat([part[f"attn.b_{each}"].flatten() for each in "QKV"]),
            at + "attn.c_proj.weight": part["attn.W_O"].flatten(0, 1), at + "attn.c_proj.bias": part["attn.b_O"],
            at + "mlp.c_fc.weight": part["mlp.W_in"], at + "mlp.c_fc.bias": part["mlp.b_in"],
            at + "mlp.c_proj.weight": part["mlp.W_out"], at + "mlp.c_proj.bias": part["mlp.b_out"],
        }  # fmt: skip
    state["lm_head.bias"] = weights["model.unembed.b_U"]  # which a GPT-2 of Hugging Face has not
    model.set_attn_implementation("eager")
    model.lm_head = torch.nn.Linear(config["d_model"], config["d_vocab"])
    model.load_state_dict({k: v.contiguous() for k, v in state.items()}, strict=True)
    return model.eval()


def hooked_model(weights: dict[str, Tensor], config: dict[str, Any]) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

    with quiet():
        model = HookedTransformer(HookedTransformerConfig.from_dict({**config, "device": "cpu"}))
    state = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all("mask" in k or "IGNORE" in k for k in missing.missing_keys)
    return model.eval()


def transcoders(weights: dict[str, Tensor], config: dict[str, Any]) -> list[em.Dictionary]:
    """The fixture's read the norm *before* its weight and bias, ours after: folded in, they are the same function."""
    found = []
    for layer in range(config["n_layers"]):
        norm, shift = weights[f"model.blocks.{layer}.ln2.w"], weights[f"model.blocks.{layer}.ln2.b"]
        at = {name: weights[f"transcoder.{layer}.{name}"] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        W_enc = at["W_enc"].T / norm[:, None]
        sites: dict[str, Any] = {"site_in": em.Site(layer, "mlp_in"), "site_out": em.Site(layer, "mlp_out")}
        b_enc = at["b_enc"] - shift @ W_enc
        found.append(em.Dictionary(W_enc, b_enc, at["W_dec"], at["b_dec"], activation="relu", **sites))
    return found


@cache
def our_graph(surface: str) -> AttributionGraph:
    weights, about = case()
    config = about["config"]
    if surface == "hooked":
        model = hooked_model(weights, config)
    else:
        model = load_model(hf_model(weights, config), surface="bridge", in_place=True)
    given = transcoders(weights, config)
    return attribute(model, weights["tokens"], given, target=None, skip=(0,), validate=False)


def their_nodes() -> list[Key]:
    weights, about = case()
    last, layers = len(weights["tokens"]), about["config"]["n_layers"]
    return [
        *(("feature", layer, pos, index) for layer, pos, index in weights["active_features"].tolist()),
        *(("error", layer, pos, -1) for layer in range(layers) for pos in range(last)),
        *(("token", -1, pos, token) for pos, token in enumerate(weights["tokens"].tolist())),
        *(("logit", layers, last - 1, token) for token in weights["logit_ids"].tolist()),
    ]


def key(node: Node) -> Key:
    return (node.kind, node.layer, node.pos, node.feature)


def as_theirs(graph: AttributionGraph) -> Tensor:
    """Our edges in their order; 0 where we have no such node (position 0 has no errors)."""
    rows = {key(node): row for row, node in enumerate(graph.nodes)}
    names = their_nodes()
    here = torch.tensor([at for at, name in enumerate(names) if name in rows])
    ours = torch.tensor([rows[name] for name in names if name in rows])
    edges = torch.zeros(len(names), len(names), dtype=graph.edges.dtype)
    edges[here[:, None], here[None]] = graph.edges[ours][:, ours]
    return edges


def test_the_same_nodes(surface: str) -> None:
    weights, _ = case()
    graph = our_graph(surface)
    missing = set(their_nodes()) - {key(node) for node in graph.nodes}
    assert missing == {("error", layer, 0, -1) for layer in range(3)}  # theirs are 0: position 0 has no error
    assert {key(node) for node in graph.nodes} <= set(their_nodes())
    ours = {key(node): node.activation for node in graph.nodes if node.kind == "feature"}
    names = their_nodes()[: len(weights["active_features"])]
    found = torch.tensor([ours[name] for name in names])
    torch.testing.assert_close(found, weights["activation_values"], rtol=1e-4, atol=1e-5)  # folding, in float32
    p = torch.tensor([node.weight for node in graph.targets])
    torch.testing.assert_close(p, weights["logit_probabilities"], rtol=1e-5, atol=1e-7)


def test_adjacency_equals_theirs_to_1e_5(surface: str) -> None:
    theirs = case()[0]["adjacency"]
    ours = as_theirs(our_graph(surface))
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_scores_equal_theirs_to_1e_4(surface: str) -> None:
    about, found = case()[1], scores(our_graph(surface))
    assert abs(found.replacement - about["replacement_score"]) <= 1e-4
    assert abs(found.completeness - about["completeness_score"]) <= 1e-4


def test_masks_after_pruning_equal_theirs(surface: str) -> None:
    weights, about = case()
    pruned = prune(our_graph(surface), nodes=about["node_threshold"], edges=about["edge_threshold"])
    kept = {key(node) for node in pruned.nodes}
    theirs = {name for name, mask in zip(their_nodes(), weights["node_mask"].tolist(), strict=True) if mask}
    assert kept == theirs
    torch.testing.assert_close((as_theirs(pruned) != 0).to(torch.uint8), weights["edge_mask"], rtol=0, atol=0)
    order = torch.tensor([node.influence for node in pruned.nodes])
    names = their_nodes()
    at = [names.index(key(node)) for node in pruned.nodes]
    expected = weights["cumulative_influence"][at]
    inner = torch.tensor([node.kind not in ("logit",) for node in pruned.nodes])
    torch.testing.assert_close(order[inner], expected[inner], rtol=1e-4, atol=1e-5)
