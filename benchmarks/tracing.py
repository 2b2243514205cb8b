"""Graphs with a transcoder at every layer: ours beside circuit-tracer 0.5, on the same model, prompt and transcoders.

No transcoders are published for the model, so they are random: ``D_SAE`` unit rows a layer, read before the MLP and
written after it, with one threshold a layer at which ``ON`` latents of a token are on in the mean (their decoders
carry as much in all as the MLP's output).  What a graph costs depends on how many are on, not on what they mean.

Two graphs: every active latent of a few tokens, where both draw the same nodes, so that all edges are compared (of
latents, errors and tokens to latents and targets); and the ``KEPT`` that lead on a longer prompt, of tens of thousands
that are on.  There each picks by its own estimate, and the edges are compared between the latents and tokens that both
drew.  circuit-tracer expands the prompt to a batch of as many copies as it takes rows at once; ``CHUNK`` is of both.
It knows this model's family but not the model, so its HookedTransformer is made from a config, with weights converted
by TransformerLens's own function.

Both halves are called by ``peers.py``, each in its environment; ``here`` leaves its graphs in a file and ``there``
compares before anything of it is timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Size, Way, make_hf, make_tokenizer, measured
from torch import Tensor

D_SAE, ON, KEPT, CHUNK, TARGETS = 2048, 40, 500, 64, 10
TEXT = "The old bridge over the river was closed last winter because of the"
FEW = 3
"""Tokens of the prompt whose every latent is drawn: beyond them a graph here is no longer drawn whole by itself."""
ALIKE = 1e-4
"""Of the largest edge: float32 sums in another order, through 30 layers."""
FILE = "graphs.npz"


def prompts_of(size: Size) -> dict[str, list[int]]:
    """Token ids by name; both begin with a special token, at which neither has latents."""
    tokenizer: Any = make_tokenizer(size=size)
    ids = [int(tokenizer.bos_token_id), *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    return {"every": ids[:FEW], "kept": ids}


def rows_of(layer: int, width: int) -> tuple[Tensor, Tensor]:
    """Random encoder and decoder rows [d_sae width], the same in every process."""
    g = torch.Generator().manual_seed(layer)
    encoder, decoder = (torch.randn(D_SAE, width, generator=g) for _ in range(2))
    return encoder / encoder.norm(dim=1, keepdim=True), decoder / decoder.norm(dim=1, keepdim=True)


@torch.no_grad()
def scales(hf: Any, ids: list[int], width: int) -> tuple[list[float], list[float]]:
    """By layer: the threshold, and a length of decoder rows at which the latents write as much as the MLP does."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [layer.mlp.register_forward_hook(lambda m, a, out: seen.append((a[0][0, 1:], out[0, 1:])))
               for layer in hf.model.layers]  # fmt: skip
    hf(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    thresholds, lengths = [], []
    for layer, (x, out) in enumerate(seen):
        encoder, decoder = rows_of(layer, width)
        pre = x @ encoder.T
        thresholds.append(float(pre.flatten().sort(descending=True).values[ON * len(x)].clamp(min=0)))
        lengths.append(float(out.norm() / ((pre * (pre > thresholds[-1])) @ decoder).norm()))
    return thresholds, lengths


# --- Ours -------------------------------------------------------------------------------------------------------------


def here(size: Size, rounds: int, device: torch.device, folder: Path) -> dict[str, dict[str, str]]:
    """Our graphs: left in the folder for ``there``, and timed over a forward pass."""
    from timing import make_model

    import tl_em as em

    model, hf, prompts = make_model("qwen2", size, "bridge", device), make_hf("qwen2", size, device), prompts_of(size)
    thresholds, lengths = scales(hf, prompts["kept"], size.d_model)
    dictionaries = []
    for layer, (threshold, length) in enumerate(zip(thresholds, lengths, strict=True)):
        encoder, decoder = rows_of(layer, size.d_model)
        zeros = torch.zeros(D_SAE), torch.zeros(size.d_model)
        sites: Any = {"site_in": em.Site(layer, "mlp_in"), "site_out": em.Site(layer, "mlp_out")}
        dictionaries.append(em.Dictionary(encoder.T, zeros[0], length * decoder, zeros[1], activation="jumprelu",
                                          threshold=torch.tensor(threshold), **sites))  # fmt: skip
    found: dict[str, Any] = {"thresholds": np.array(thresholds), "lengths": np.array(lengths)}
    ways: dict[str, Way] = {}
    for name, ids in prompts.items():
        with torch.no_grad():
            targets = hf(torch.tensor([ids])).logits[0, -1].topk(TARGETS).indices.tolist()
        options: dict[str, Any] = {"target": targets, "skip": [0], "validate": False, "chunk": CHUNK}
        options |= {"max_nodes": KEPT} if name == "kept" else {}

        def graph(ids: list[int] = ids, options: Mapping[str, Any] = options) -> em.AttributionGraph:
            return em.attribute(model, ids, dictionaries, **options)

        made = graph()
        found |= {f"{name} targets": np.array(targets), f"{name} edges": made.edges.numpy()}
        found[f"{name} nodes"] = np.array([key(n.kind, n.layer, n.pos, n.feature) for n in made.nodes])
        ways[name] = graph
    np.savez(folder / FILE, **found)
    return rows("**`em.attribute`, a transcoder at every layer**", ways, hf, prompts, rounds, device)


KINDS = ("token", "feature", "error", "logit")


def key(kind: str, layer: int, pos: int, feature: int | None) -> tuple[int, int, int, int]:
    """What a node is called in both: kind, layer, position, latent or token."""
    if kind in ("token", "error"):
        return KINDS.index(kind), 0 if kind == "token" else layer, pos, 0
    return KINDS.index(kind), layer if kind == "feature" else 0, pos, int(feature or 0)


def rows(
    label: str, ways: Mapping[str, Way], hf: Any, prompts: Mapping[str, list[int]], rounds: int, device: torch.device
) -> dict[str, dict[str, str]]:
    """Over a forward pass of the longer prompt through the Hugging Face model of this process."""
    tokens = torch.tensor([prompts["kept"]], device=device)

    @torch.no_grad()
    def forward() -> None:
        hf(tokens)

    forward()
    every = measured({"floor": forward, **ways}, "floor", rounds, device)
    return {f"{label} ({name})": every[name] for name in ways}


# --- circuit-tracer ---------------------------------------------------------------------------------------------------


def replacement(hf: Any, size: Size, given: Mapping[str, np.ndarray]) -> Any:
    """The same model and transcoders as circuit-tracer's ReplacementModel."""
    from circuit_tracer import ReplacementModel  # pyright: ignore[reportMissingImports]
    from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet  # pyright: ignore[reportMissingImports]
    from circuit_tracer.transcoder.activation_functions import JumpReLU  # pyright: ignore[reportMissingImports]
    from transformer_lens import HookedTransformerConfig  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights  # pyright: ignore

    layers = {}
    for layer in range(size.layers):
        encoder, decoder = rows_of(layer, size.d_model)
        act = JumpReLU(torch.full((D_SAE,), float(given["thresholds"][layer])))
        layers[layer] = one = SingleLayerTranscoder(size.d_model, D_SAE, act, layer, dtype=torch.float32)
        one.W_enc.data, one.W_dec.data = encoder, float(given["lengths"][layer]) * decoder
    c = hf.config
    width = c.hidden_size // c.num_attention_heads
    theta = getattr(c, "rope_theta", None) or c.rope_parameters["rope_theta"]
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_heads=c.num_attention_heads, d_head=width,
        n_key_value_heads=c.num_key_value_heads, d_mlp=c.intermediate_size, n_ctx=256, d_vocab=c.vocab_size,
        act_fn=c.hidden_act, eps=c.rms_norm_eps, normalization_type="RMS", final_rms=True, gated_mlp=True,
        positional_embedding_type="rotary", rotary_dim=width, rotary_base=int(theta), rotary_adjacent_pairs=False,
        model_name=size.name, original_architecture="LlamaForCausalLM", tokenizer_name=size.directory,
        default_prepend_bos=False, dtype=torch.float32, device="cpu",
    )  # fmt: skip
    # Only the pre-MLP hook and the MLP's output are asked for, as its own transcoders for Llama do.
    model = ReplacementModel.from_config(config, TranscoderSet(layers, "mlp.hook_in", "hook_mlp_out", scan="random"))
    renamed = {name.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed."): weight
               for name, weight in convert_llama_weights(hf, config).items()}  # fmt: skip
    missing, unknown = model.load_state_dict(renamed, strict=False)
    left = [
        name for name in missing if "transcoders" not in name and not name.endswith(("mask", "IGNORE", "sin", "cos"))
    ]
    assert not left and not unknown, (left, unknown)
    return model


def there(size: Size, rounds: int, device: torch.device, folder: Path) -> dict[str, dict[str, str]]:
    """circuit-tracer's graphs: compared with ours, then timed."""
    from circuit_tracer import attribute  # pyright: ignore[reportMissingImports]

    given, hf, prompts = dict(np.load(folder / FILE)), make_hf("qwen2", size, device), prompts_of(size)
    model = replacement(hf, size, given)
    with torch.no_grad():
        tokens = torch.tensor([prompts["kept"]])
        ours, theirs = hf(tokens).logits, model(tokens)
    off = float((ours - theirs).abs().max() / ours.std())
    assert off < 1e-3, f"its model is another one: logits differ by {off:.0e} of their spread"
    ways: dict[str, Way] = {}
    said = {}
    for name, ids in prompts.items():
        options: dict[str, Any] = {"attribution_targets": torch.tensor(given[f"{name} targets"]), "batch_size": CHUNK}
        options |= {"max_feature_nodes": KEPT} if name == "kept" else {}

        def graph(ids: list[int] = ids, options: Mapping[str, Any] = options) -> Any:
            return attribute(torch.tensor(ids), model, **options)

        said[name] = same_edges(graph(), given, name)
        print(name, said[name], flush=True)
        ways[name] = graph
    found = rows("circuit-tracer 0.5.0", ways, hf, prompts, rounds, device)
    return {label: row | {"said": said[label.rpartition("(")[2][:-1]]} for label, row in found.items()}


def same_edges(graph: Any, given: Mapping[str, np.ndarray], name: str) -> str:
    """How far both matrices agree where both have an edge; of all latents also those from errors."""
    layers, length = graph.cfg.n_layers, graph.n_pos
    latents = graph.active_features[graph.selected_features].tolist()
    keys = [key("feature", *each) for each in latents]
    keys += [key("error", layer, pos, None) for layer in range(layers) for pos in range(length)]
    keys += [key("token", -1, pos, None) for pos in range(length)]
    keys += [key("logit", layers, length - 1, int(token)) for token in graph.logit_token_ids]
    at = {each: row for row, each in enumerate(keys)}
    ours = [tuple(each) for each in given[f"{name} nodes"].tolist()]
    whole = name == "every"
    both = [
        (row, at[each]) for row, each in enumerate(ours) if each in at and (whole or each[0] != KINDS.index("error"))
    ]
    drawn = sum(each[0] == KINDS.index("feature") for each in ours)
    common = sum(ours[row][0] == KINDS.index("feature") for row, _ in both)
    assert not whole or drawn == len(latents) == common, (drawn, len(latents), common)
    here_, there_ = (np.array(some) for some in zip(*both, strict=True))
    a = given[f"{name} edges"][np.ix_(here_, here_)]
    b = graph.adjacency_matrix.numpy()[np.ix_(there_, there_)]
    off, r = float(np.abs(a - b).max() / np.abs(a).max()), float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert off < ALIKE and np.abs(a).max() > 0, (name, off, r)
    return (f"{common} latents in both of {drawn} and {len(latents)} (of {len(graph.active_features)} that are on); "
            f"edges between them r = {r:.6f}, at most {off:.0e} of the largest apart")  # fmt: skip
