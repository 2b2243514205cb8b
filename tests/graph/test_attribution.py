"""Edges are what interventions do with all else frozen; inputs add up; a planted circuit is found, a decoy is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_em as em
from tests.conftest import make_hf_model, make_tokenizer
from tl_em.errors import UsageError
from tl_em.graph import cost, edges
from tl_em.graph.build import attribute
from tl_em.graph.gradients import FROZEN, LAST, STREAM
from tl_em.graph.graph import AttributionGraph
from tl_em.graph.latents import has_positions
from tl_em.graph.rules.frozen import norm_scales, patterns
from tl_em.graph.targets import Completion
from tl_em.models.hooks import LensModel, hooked, read_point
from tl_em.models.loading import load_model

pytestmark = [
    pytest.mark.surface,
    pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale"),  # a Bridge, of the frozen runs below
]
PROMPT = "the cat sat on the big dog"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def dictionary(
    layer: int, width: int, read: str, write: str | None, *, seed: int = 0, d_sae: int = 24
) -> em.Dictionary:
    """A random one in which about half of the latents are on."""
    g = torch.Generator().manual_seed(seed + layer)
    W_enc, b_enc = torch.randn(width, d_sae, generator=g) / width**0.5, torch.randn(d_sae, generator=g) * 0.1
    W_dec, b_dec = torch.randn(d_sae, width, generator=g) / width**0.5, torch.randn(width, generator=g) * 0.1
    site_out = None if write is None else em.Site(layer, write)  # pyright: ignore[reportArgumentType]
    site_in = em.Site(layer, read)  # pyright: ignore[reportArgumentType]
    return em.Dictionary(W_enc, b_enc, W_dec, b_dec, activation="relu", site_in=site_in, site_out=site_out)


def transcoders(layers: Sequence[int] = (0, 1, 2)) -> list[em.Dictionary]:
    return [dictionary(layer, 32, "mlp_in", "mlp_out") for layer in layers]


@cache
def the_model(family: str, surface: Any, dtype: torch.dtype) -> LensModel:
    return load_model(make_hf_model(family), surface=surface, tokenizer=make_tokenizer(), dtype=dtype, in_place=True)


def values(model: LensModel, tokens: Tensor, names: Sequence[str], hooks: Sequence[Any] = ()) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def note(x: Tensor, hook: Any) -> None:
            seen[name] = x.detach().clone()

        return note

    with torch.no_grad(), hooked(model, [*hooks, *((name, keep(name)) for name in names)]):
        model(tokens[None])
    return seen


def as_frozen(model: LensModel, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What a frozen pass holds fixed. (Left alone, norms of a Hugging Face model compute in float32.)"""
    return values(model, tokens, [*norm_scales(model), *patterns(model), *names], FROZEN.hooks(model))


def frozen_at(recorded: dict[str, Tensor]) -> list[tuple[str, Any]]:
    """Every recorded point gives its recorded value, whatever runs into it."""
    return [(name, lambda x, hook, value=value: value) for name, value in recorded.items()]


def tokens_of(model: LensModel) -> Tensor:
    from tl_em.models.prompts import encode

    return torch.tensor(encode(model, [PROMPT], chat=False)[0].ids)


def logits_read(model: LensModel, x: Tensor, token: int) -> Tensor:
    weight = model.W_U.detach()  # pyright: ignore
    return x[0, -1] @ (weight[:, token] - weight.mean(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_an_edge_is_the_effect_of_its_source_with_all_else_frozen(
    family: str, surface: str, dtype: torch.dtype
) -> None:
    """Take one write away; norm scales, patterns and MLP outputs stay at their values: what changes is the edge."""
    model = the_model(family, surface, dtype)
    tokens, given = tokens_of(model), transcoders()
    graph = attribute(model, tokens, given, target=9, validate=False, chunk=7)
    mlps = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
    recorded = as_frozen(model, tokens, mlps)
    points = [read_point(model, each.site_in) for each in given]
    reads = [point.name for point in points] + [LAST]
    before = values(model, tokens, reads, frozen_at(recorded))
    sources = [next(row for row in graph.row("feature") if graph.nodes[row].layer == layer) for layer in (0, 1)]
    sources += [graph.row("error")[3], graph.row("token")[2]]
    for source in sources:
        node = graph.nodes[source]
        hooks = [*frozen_at(recorded), taken_away(model, tokens, given, graph, source, recorded)]
        after = values(model, tokens, reads, hooks)
        checked = 0
        for target, reader in enumerate(graph.nodes):
            if reader.kind == "feature" and reader.layer > node.layer and reader.feature is not None:
                place, one = points[reader.layer], given[reader.layer]
                change = place(before[place.name]) - place(after[place.name])
                predicted = (change[0, reader.pos] @ one.W_enc[:, reader.feature].to(dtype)).item()
            elif reader.kind == "logit" and reader.feature is not None:
                change = before[LAST] - after[LAST]
                predicted = logits_read(model, change, reader.feature).item()
            else:
                continue
            checked += abs(predicted) > 1e-3
            scale = max(1.0, float(graph.edges[target].abs().max()))
            assert abs(float(graph.edges[target, source]) - predicted) <= TOLERANCE[dtype] * scale
        assert checked > 3  # effects that are there, not zeros that agree


def taken_away(
    model: LensModel, tokens: Tensor, given: Sequence[em.Dictionary], graph: AttributionGraph, source: int,
    recorded: dict[str, Tensor],
) -> tuple[str, Any]:  # fmt: skip
    """A hook that takes off what one node writes, computed here anew."""
    node = graph.nodes[source]
    point = STREAM if node.kind == "token" else f"blocks.{node.layer}.hook_mlp_out"
    if node.kind == "feature":
        assert node.activation is not None and node.feature is not None
        write = node.activation * given[node.layer].W_dec[node.feature].to(recorded[point])
    elif node.kind == "error":
        place = read_point(model, given[node.layer].site_in)
        x = place(values(model, tokens, [place.name], FROZEN.hooks(model))[place.name]).detach()[0, node.pos]
        one = given[node.layer]
        a = (x @ one.W_enc.to(x) + one.b_enc.to(x)).relu()
        write = recorded[point][0, node.pos] - a @ one.W_dec.to(x) - one.b_dec.to(x)
    else:
        names = [STREAM, "hook_pos_embed"] if has_positions(model) else [STREAM]
        seen = values(model, tokens, names)
        write = seen[STREAM][0, node.pos] - (seen["hook_pos_embed"][0, node.pos] if has_positions(model) else 0.0)

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[0, node.pos] -= write.to(x)
        return x

    return point, edit


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_inputs_and_bias_add_up_to_what_a_latent_reads(family: str, surface: str) -> None:
    """The bias: what a latent reads when every node's write is taken away."""
    dtype = torch.float64
    model = the_model(family, surface, dtype)
    tokens, given = tokens_of(model), transcoders()
    graph = attribute(model, tokens, given, target=9, validate=False)
    mlps = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
    recorded = as_frozen(model, tokens, mlps)
    start = values(model, tokens, [STREAM, *(["hook_pos_embed"] if has_positions(model) else [])])
    bare = start.get("hook_pos_embed", torch.zeros_like(start[STREAM])).expand_as(start[STREAM])
    skipped = 0 in graph.settings["skip"]  # a BOS token has no latents: its MLP outputs are part of the bias
    empty = dict(recorded) | {STREAM: bare}
    for name, one in zip(mlps, given, strict=True):
        empty[name] = one.b_dec.to(dtype).expand_as(recorded[name]).clone()
        if skipped:
            empty[name][0, 0] = recorded[name][0, 0]
    points = [read_point(model, each.site_in) for each in given]
    bias = values(model, tokens, [point.name for point in points], frozen_at(empty))
    for row in graph.row("feature"):
        node = graph.nodes[row]
        assert node.feature is not None and node.activation is not None
        place, one = points[node.layer], given[node.layer]
        column, x = one.W_enc[:, node.feature].to(dtype), place(bias[place.name]).detach()[0, node.pos]
        constant = x @ column + one.b_enc[node.feature]
        assert float(graph.edges[row].sum() + constant) == pytest.approx(node.activation, abs=1e-9)  # float64 sums


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_skip_transcoder_passes_on_what_its_mlp_reads(family: str, surface: str) -> None:
    """As above, but the MLP of block 1 answers to a change of what it reads by its skip; without it edges differ."""
    dtype = torch.float64
    model, plain = the_model(family, surface, dtype), transcoders()
    tokens = tokens_of(model)
    W_skip = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)) / 32**0.5
    given = [plain[0], replace(plain[1], W_skip=W_skip), plain[2]]
    graph, without = (attribute(model, tokens, each, target=9, validate=False) for each in (given, plain))
    recorded = as_frozen(model, tokens, [f"blocks.{layer}.hook_mlp_out" for layer in range(3)])
    points = [read_point(model, each.site_in) for each in given]
    before = values(model, tokens, [point.name for point in points], frozen_at(recorded))
    now: dict[str, Tensor] = {}

    def answer(x: Tensor, hook: Any) -> Tensor:
        change = points[1](now["read"]) - points[1](before[points[1].name])
        kept = torch.ones(len(tokens), 1, dtype=dtype)
        kept[list(graph.settings["skip"])] = 0  # without latents, and so a constant
        return recorded["blocks.1.hook_mlp_out"] + kept * (change @ W_skip.to(dtype))

    source = graph.row("token")[2]
    hooks = [(name, edit) for name, edit in frozen_at(recorded) if name != "blocks.1.hook_mlp_out"]
    hooks += [(points[1].name, lambda x, hook: now.update(read=x)), ("blocks.1.hook_mlp_out", answer)]
    taken = taken_away(model, tokens, plain, graph, source, recorded)
    after = values(model, tokens, [point.name for point in points], [*hooks, taken])
    moved = 0.0
    for row in graph.row("feature"):
        node = graph.nodes[row]
        if node.layer == 2:
            assert node.feature is not None
            change = points[2](before[points[2].name]) - points[2](after[points[2].name])
            predicted = (change[0, node.pos] @ given[2].W_enc[:, node.feature].to(dtype)).item()
            assert float(graph.edges[row, source]) == pytest.approx(predicted, abs=1e-9)
            moved = max(moved, abs(predicted - float(without.edges[without.index[node.id], source])))
    assert moved > 1e-3  # the skip's part is there


def test_a_layer_without_a_transcoder_is_an_error_node_whole(surface: str) -> None:
    model = the_model("gpt2", surface, torch.float32)
    graph = attribute(model, tokens_of(model), transcoders((0, 2)), target=9, validate=False)
    assert {node.layer for node in graph.nodes if node.kind == "feature"} == {0, 2}
    assert {node.layer for node in graph.nodes if node.kind == "error"} == {0, 1, 2}


def test_the_chunk_changes_nothing(surface: str) -> None:
    model = the_model("llama", surface, torch.float32)
    graphs = [attribute(model, tokens_of(model), transcoders(), target=9, chunk=c, validate=False) for c in (1, 300)]
    # sums in another order
    torch.testing.assert_close(graphs[0].edges, graphs[1].edges, rtol=1e-4, atol=1e-6)
    assert graphs[0].edges.abs().max() > 0.1


def test_a_long_run_says_what_it_will_cost_and_a_short_one_nothing(
    small_model: LensModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock that every chunk puts on by two seconds: what was expected is what it took but for the trial chunk."""
    chunks, gradients = [], cost.gradients

    def counted(linear: Any, part: Any) -> dict[str, Tensor]:
        chunks.append(2.0)
        return gradients(linear, part)

    for module in ("cost", "gradients"):
        monkeypatch.setattr(f"tl_em.graph.{module}.gradients", counted)
    for module in (cost, edges):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: sum(chunks)))
    monkeypatch.setattr(cost, "LONG", 0.0)
    tokens = tokens_of(small_model)
    graphs = [attribute(small_model, tokens, transcoders(), target=9, chunk=c, validate=False) for c in (256, 1)]
    costs = [graph.settings["cost"] for graph in graphs]
    assert costs[0]["seconds_expected"] is None
    assert costs[1]["seconds_expected"] == costs[1]["seconds"] - 2.0 > 100
    said = capsys.readouterr().err
    assert said.count("attribution graph:") == 1 and "MiB" in said


# --- A linear model ---------------------------------------------------------------------------------------------------


def linear_hf() -> Any:
    """GPT-2 whose MLPs write nothing: linear under frozen norms and patterns."""
    hf = make_hf_model("gpt2")
    with torch.no_grad():
        for block in hf.transformer.h:
            block.mlp.c_proj.weight.zero_()
            block.mlp.c_proj.bias.zero_()
    return hf


def test_on_a_linear_model_attributions_sum_to_the_change_of_the_metric(surface: Any) -> None:
    """MLPs write nothing and norms and patterns stay: the tokens' totals are the target's change when all go."""
    model = load_model(linear_hf(), surface=surface, tokenizer=make_tokenizer(), dtype=torch.float64, in_place=True)
    tokens = tokens_of(model)
    graph = attribute(model, tokens, None, target=9, against="zero", rule="frozen", validate=False)
    recorded = as_frozen(model, tokens, [])
    start = values(model, tokens, [STREAM])[STREAM]
    reads = [
        logits_read(model, values(model, tokens, [LAST], frozen_at(recorded | {STREAM: x}))[LAST], 9).item()
        for x in (start, torch.zeros_like(start))
    ]
    total = sum(graph.nodes[row].attribution or 0.0 for row in graph.row("token"))
    assert abs(reads[0] - reads[1]) > 0.1
    assert total == pytest.approx(reads[0] - reads[1], abs=1e-9)


# --- A known circuit --------------------------------------------------------------------------------------------------


def planted() -> tuple[Any, list[em.Dictionary]]:
    """Token 9 writes e0; latent A (layer 0) reads e0, writes e1; latent f (layer 1) reads e1, writes the unembedding.

    The decoy D (layer 0) is on exactly when A is, and as strongly, but writes a direction that nothing reads. Attention
    is silenced, so that the circuit is all there is.
    """
    hf = make_hf_model("gpt2", n_layer=2)
    width = hf.config.n_embd
    random = torch.randn(width, width, generator=torch.Generator().manual_seed(3))
    random[:, 0] = 1  # a LayerNorm takes the mean off: axes orthogonal to it stay orthogonal
    axes = torch.linalg.qr(random)[0].T[1:]
    with torch.no_grad():
        for block in hf.transformer.h:
            for weights in (block.attn.c_proj, block.mlp.c_proj):
                weights.weight.zero_()
                weights.bias.zero_()
            for norm in (block.ln_1, block.ln_2):
                norm.weight.fill_(1.0)
                norm.bias.zero_()
        hf.transformer.wpe.weight.zero_()
        hf.transformer.wte.weight[9] = 3 * axes[0]
        hf.transformer.ln_f.weight.fill_(1.0)
        hf.transformer.ln_f.bias.zero_()
    made = []
    for layer, (read, writes) in enumerate(((axes[0], (axes[1], axes[2])), (axes[1], (axes[3], axes[4])))):
        W_enc = torch.stack([read, read if layer == 0 else axes[5]], 1)
        sites: dict[str, Any] = {"site_in": em.Site(layer, "mlp_in"), "site_out": em.Site(layer, "mlp_out")}
        zeros = torch.zeros(2), torch.zeros(width)
        made.append(em.Dictionary(W_enc, zeros[0], torch.stack(writes), zeros[1], activation="relu", **sites))
    return hf, made


def test_a_planted_circuit_is_found_and_its_decoy_is_not(surface: str) -> None:
    hf, (first, second) = planted()
    model = load_model(hf, surface=surface, tokenizer=make_tokenizer(), in_place=True)  # pyright: ignore
    # the MLPs write nothing: what the transcoders write is put there by hooks, so that A and f are in the model
    puts = [(f"blocks.{layer}.hook_mlp_out", writing(model, one)) for layer, one in enumerate((first, second))]
    target = em.Direction(second.W_dec[0], em.Site(1), position=-1)
    with hooked(model, [hook for pair in puts for hook in pair[1]]):
        graph = attribute(model, [4, 9], [first, second], target=target, validate=True)
    by_id = graph.index
    A, decoy, f = by_id["0_0_1"], by_id["0_1_1"], by_id["1_0_1"]
    a, d = graph.nodes[A].activation, graph.nodes[decoy].activation
    assert a == pytest.approx(d, rel=1e-6) and a is not None and a > 1  # correlated, wholly
    token, goal = by_id["E_9_1"], len(graph.nodes) - 1
    true = {(A, token), (decoy, token), (f, A), (goal, f)}
    size = graph.edges.abs()
    pairs = [(t, s) for t in (A, decoy, f, goal) for s in range(len(graph.nodes)) if s < t and graph.nodes[s].pos == 1]
    found = [(float(size[t, s]), (t, s) in true) for t, s in pairs]
    weakest, strongest = min(v for v, is_true in found if is_true), max(v for v, is_true in found if not is_true)
    assert weakest > 10 * strongest  # AUROC 1.0
    assert float(size[f, decoy]) < 1e-5 * float(size[f, A]) and float(size[goal, decoy]) < 1e-5 * float(size[goal, f])
    total = {row: graph.nodes[row].attribution or 0.0 for row in (A, decoy)}
    assert abs(total[A]) > 0.1 and abs(total[decoy]) < 1e-5


def writing(model: LensModel, one: em.Dictionary) -> list[tuple[str, Any]]:
    """Hooks that make an MLP write what its transcoder says."""
    place = read_point(model, one.site_in)
    seen: dict[str, Tensor] = {}

    def read(x: Tensor, hook: Any) -> None:
        seen["x"] = place(x)

    def write(x: Tensor, hook: Any) -> Tensor:
        return one.decode(one.encode(seen["x"]))

    assert one.site_out is not None
    return [(place.name, read), (one.site_out.hook_name, write)]


# --- Targets, bad input -----------------------------------------------------------------------------------------------


def test_each_kind_of_target(small_model: LensModel) -> None:
    given, tokens = transcoders(), tokens_of(small_model)
    direction = em.Direction(torch.randn(32), em.Site(1), position=-1, name="d")
    kinds: dict[str, Any] = {
        "dog": "dog", "several": ["dog", 12], "difference": ("dog", ["cat", "bird"]), "direction": direction,
        "completion": Completion("ran on"),
    }  # fmt: skip
    for name, target in kinds.items():
        graph = attribute(small_model, tokens, given, target=target, validate=False)
        assert len(graph.targets) == (2 if name == "several" else 1)
        assert graph.edges[-1].abs().max() > 1e-3, name
    single = [attribute(small_model, tokens, given, target=each, validate=False).edges[-1] for each in ("dog", "cat")]
    both = attribute(small_model, tokens, given, target=("dog", "cat"), validate=False).edges[-1]
    torch.testing.assert_close(both[:-1], (single[0] - single[1])[:-1], rtol=1e-4, atol=1e-5)  # float32 sums


def test_a_completion_s_edges_are_its_gradient(small_model: LensModel) -> None:
    """A small step along a token's embedding, everything frozen, changes the likelihood as the edge says."""
    given, tokens = transcoders(), tokens_of(small_model)
    graph = attribute(small_model, tokens, given, target=Completion("ran on"), validate=False)
    said = small_model.tokenizer("ran on", add_special_tokens=False)["input_ids"]  # pyright: ignore
    full = torch.cat([tokens, torch.tensor(said)])
    mlps = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
    recorded = as_frozen(small_model, full, mlps)
    seen = values(small_model, full, [STREAM, "hook_pos_embed"])
    write = (seen[STREAM] - seen["hook_pos_embed"])[0, 2]

    def likelihood(step: float) -> float:
        def edit(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[0, 2] += step * write
            return x

        with torch.no_grad(), hooked(small_model, [*frozen_at(recorded), (STREAM, edit)]):
            p = small_model(full[None]).log_softmax(-1)[0, -3:-1]
        return float(p.gather(-1, full[-2:, None]).sum())

    slope = (likelihood(0.02) - likelihood(-0.02)) / 0.04  # central differences: off by the third order
    edge = float(graph.edges[-1, graph.row("token")[2]])
    assert abs(edge) > 1e-3 and edge == pytest.approx(slope, rel=2e-2)


def test_dropped_latents_go_into_the_error(small_model: LensModel) -> None:
    given, tokens = transcoders(), tokens_of(small_model)
    whole, capped = (
        attribute(small_model, tokens, given, target=9, max_nodes=most, validate=False) for most in (8000, 20)
    )
    assert len(whole.row("feature")) > 20 == len(capped.row("feature"))
    assert capped.settings["dropped_latents"] == len(whole.row("feature")) - 20
    sums = [graph.edges[-1].sum().item() for graph in (whole, capped)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-4)


def test_bad_input_is_refused(small_model: LensModel, surface: str) -> None:
    given, tokens = transcoders(), tokens_of(small_model)
    for change, said in (
        ({"target": ("a", "b", "c")}, "tuple"), ({"target": ["a", 3.5]}, "no target"), ({"rule": "relp"}, "exact"),
        ({"against": "zero"}, "components"), ({"chunk": 0}, "chunk"), ({"max_bytes": 10}, "GiB"),
        ({"target": 10**6}, "not among"), ({"dictionaries": [given[0], given[0]]}, "several"),
    ):  # fmt: skip
        options: dict[str, Any] = {"target": 9, "dictionaries": given, "validate": False} | change
        with pytest.raises(UsageError, match=said):
            attribute(small_model, tokens, options.pop("dictionaries"), **options)
    with pytest.raises(UsageError, match="bfloat16"):
        attribute(the_model("gpt2", surface, torch.bfloat16), tokens, given, target=9)
