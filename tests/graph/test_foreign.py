"""Files of other programs: they open, nothing in them is lost, and what is broken is named."""

from __future__ import annotations

import copy
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.graph.examples import large, small
from tl_em.errors import CorruptFileError, GraphTooLargeError
from tl_em.graph import exchange_reading
from tl_em.graph.exchange import save_graph
from tl_em.graph.exchange_format import cantor
from tl_em.graph.exchange_reading import load_graph
from tl_em.graph.graph import AttributionGraph, Node

PUBLISHED = Path(os.environ.get("TL_EM_GRAPH_FILES", Path(__file__).parents[3] / "shared" / "data" / "graphs"))
"""A folder of graph files as Neuronpedia serves them, where there is one."""


def node(name: str, kind: str, layer: Any, pos: int, feature: Any, **more: Any) -> dict[str, Any]:
    """As circuit-tracer's pydantic model writes it, every key in its order."""
    plain = {"node_id": name, "feature": feature, "layer": layer, "ctx_idx": pos, "feature_type": kind,
             "token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": name,
             "clerp": "", "influence": 0.4, "activation": None}  # fmt: skip
    return plain | more


def latent(layer: int, index: int, pos: int, **more: Any) -> dict[str, Any]:
    name = f"{layer}_{index}_{pos}"
    return node(name, "cross layer transcoder", str(layer), pos, cantor(layer, index),
                **{"activation": 1.25, **more})  # fmt: skip


def error(name: str, layer: int, pos: int) -> dict[str, Any]:
    return node(name, "mlp reconstruction error", str(layer), pos, -1)


def published() -> dict[str, Any]:
    """What Neuronpedia serves, made up: its keys, its order (latents, errors, tokens, targets), a reader's saved view,
    and keys that nobody here has heard of."""
    return {
        "metadata": {
            "slug": "two-three", "scan": "gemma-2-2b", "transcoder_list": [], "prompt_tokens": ["<bos>", "2", "3"],
            "prompt": "<bos>23", "node_threshold": 0.5, "schema_version": 1,
            "info": {"creator_name": "Anonymous (CT)", "creator_url": "https://neuronpedia.org",
                     "source_urls": ["https://neuronpedia.org/gemma-2-2b/x", "https://huggingface.co/x/y"],
                     "transcoder_set": "gemma", "generator": {"name": "circuit-tracer", "version": "3f0965b6"},
                     "create_time_ms": 1789593485457},
            "generation_settings": {"max_n_logits": 5, "desired_logit_prob": 0.6, "max_feature_nodes": 3000},
            "pruning_settings": {"node_threshold": 0.5, "edge_threshold": 0.8},
            "feature_details": {"neuronpedia_source_set": "gemmascope-transcoder-16k"}, "later": {"a": [1, None]},
        },
        "qParams": {"pinnedIds": ["3_7_2", "25_-1_2", "elsewhere"], "supernodes": [["digits", "3_7_2", "0_4_1"]],
                    "linkType": "both", "clickedId": "0_4_1", "sg_pos": "1,2", "densityThreshold": 0.9},
        "nodes": [
            latent(0, 4, 1, clerp="two", vis_link="https://example.org/4"), latent(0, 9, 2, activation=0),
            latent(3, 7, 2, influence=1, examples=[{"tokens": ["a"]}]), error("25_-1_2", 25, 2),
            node("E_2_0", "embedding", "E", 0, 0), node("E_50_1", "embedding", "E", 1, 1),
            node("E_51_2", "embedding", "E", 2, 2),
            node("27_99_2", "logit", "27", 2, 99, clerp='Output "4" (p=0.412)', token_prob=0.4121093750001,
                 is_target_logit=True, influence=None),
        ],
        "links": [
            {"source": "E_2_0", "target": "0_4_1", "weight": 24.5},
            {"source": "E_50_1", "target": "0_4_1", "weight": -12, "label": "mine"},
            {"source": "E_51_2", "target": "0_9_2", "weight": 0.0},
            {"source": "0_4_1", "target": "3_7_2", "weight": 0.12345678901234567},
            {"source": "0_9_2", "target": "3_7_2", "weight": 1e-60},
            {"source": "3_7_2", "target": "27_99_2", "weight": 2.0},
            {"source": "25_-1_2", "target": "27_99_2", "weight": 0.25},
        ],
        "comments": [{"by": "someone", "text": "see \u2028 this \U0001f600"}],
        "version": 3,
    }  # fmt: skip


def mixed() -> dict[str, Any]:
    """As a program with attention latents writes them: words in ids, whole layers, targets at the number of layers,
    biases, and more about some nodes."""
    return {
        "metadata": {"slug": "m", "scan": "qwen3-1.7b", "prompt": "a b", "prompt_tokens": ["a", " b"],
                     "schema_version": 1},
        "qParams": {},
        "nodes": [
            {"node_id": "1_cro_5_1", "jsNodeId": "1_cro_5_1", "feature": cantor(1, 5), "layer": 1, "ctx_idx": 1,
             "feature_type": "cross layer transcoder", "clerp": "F33", "activation": 2.0, "influence": 0.5},
            {"node_id": "1_lor_5_1", "jsNodeId": "1_lor_5_1", "feature": cantor(1, 5), "layer": 1, "ctx_idx": 1,
             "feature_type": "lorsa", "clerp": "", "activation": 1.0,
             "qk_tracing_results": {"pair_wise_contributors": [["E_7_0", "E_8_1", 0.5]]}},
            *({"node_id": name, "jsNodeId": name, "feature": None, "layer": 1, "ctx_idx": 1, "feature_type": kind,
               "clerp": "", "activation": None}
              for name, kind in (("1_error_mlp_1", "mlp reconstruction error"), ("1_error_attn_1", "lorsa error"),
                                 ("1_bias_tc_bD_1", "bias"), ("1_bias_attn_bO_1", "bias"))),
            *({"node_id": f"E_{token}_{pos}", "jsNodeId": "x", "feature": None, "layer": "E", "ctx_idx": pos,
               "feature_type": "embedding", "clerp": f'Emb: "{text}"', "token": text}
              for pos, (token, text) in enumerate([(7, "a"), (8, " b")])),
            {"node_id": "2_9_1", "jsNodeId": "2_9_1", "feature": 9, "layer": 2, "ctx_idx": 1, "feature_type": "logit",
             "clerp": 'Logit " c" (p=0.300)', "token_prob": 0.3, "activation": None},
        ],
        "links": [
            {"source": s, "target": t, "weight": w}
            for s, t, w in (("E_7_0", "1_lor_5_1", 1.0), ("1_lor_5_1", "1_cro_5_1", 2.0), ("1_cro_5_1", "2_9_1", 3.0),
                            ("1_error_mlp_1", "2_9_1", 0.5), ("1_error_attn_1", "1_cro_5_1", 0.25),
                            ("1_bias_tc_bD_1", "2_9_1", 0.125), ("1_bias_attn_bO_1", "1_cro_5_1", -0.5))
        ],
        "qk_only_nodes": {"0_lor_3_0": {"layer": 0}},
    }  # fmt: skip


def oldest() -> dict[str, Any]:
    """Before schema versions: no saved view, latents numbered by an offset a layer."""
    plain = published()
    plain = {name: plain[name] for name in ("metadata", "nodes", "links")}
    plain["metadata"] = {name: plain["metadata"][name] for name in ("slug", "scan", "prompt_tokens", "prompt")}
    for each in plain["nodes"][:3]:
        each["feature"] = int(each["node_id"].split("_")[1]) + 100_000 * int(each["layer"])
    return plain


def written(plain: Any, path: Path) -> Path:
    path.write_text(json.dumps(plain), encoding="utf-8")
    return path


def read(plain: Any, folder: Path) -> AttributionGraph:
    return load_graph(written(plain, folder / "theirs.json"))


def again(graph: AttributionGraph, folder: Path) -> dict[str, Any]:
    return json.loads(graph.save_json(folder / "another name.json").read_bytes())


def in_order(plain: Any) -> Any:
    """With the order of keys, which equality of dicts does not see."""
    if isinstance(plain, dict):
        return [(name, in_order(value)) for name, value in plain.items()]
    return [in_order(each) for each in plain] if isinstance(plain, list) else plain


@pytest.mark.parametrize("made", [published, mixed, oldest])
def test_a_file_of_another_program_is_saved_as_it_was(made: Any, tmp_path: Path) -> None:
    graph = read(made(), tmp_path)
    found = again(graph, tmp_path)
    assert found == made()
    assert in_order(found) == in_order(made())
    assert again(load_graph(tmp_path / "another name.json"), tmp_path) == made()
    assert not graph.edges.triu().any() and graph.edges.any()
    assert graph.targets[0].layer == (2 if made is mixed else 26)
    assert "Not validated" in graph.save_html(tmp_path / "g.html").read_text(encoding="utf-8")


def test_what_the_graph_holds_is_what_the_file_says(tmp_path: Path) -> None:
    graph = read(published(), tmp_path)
    by_id = {n.id: n for n in graph.nodes}
    assert by_id["0_4_1"].label == "two" and by_id["3_7_2"].influence == 1.0 and by_id["26_99_2"].label == "4"
    assert graph.supernodes == (("digits", ("3_7_2", "0_4_1")),)
    assert graph.settings["info"]["transcoder_set"] == "gemma" and graph.model == "gemma-2-2b"
    assert "ambiguous_links" not in graph.settings
    graph = read(mixed(), tmp_path)
    kinds = {n.id: (n.kind, n.stream, n.feature) for n in graph.nodes}
    assert kinds["1_5_1"] == ("feature", None, 5) and kinds["1_5_1_feature_attn_out"] == ("feature", "attn_out", 5)
    assert kinds["1_-1_1_error_attn_out"] == ("error", "attn_out", -1)
    assert len(graph.nodes) == 9 and int((graph.edges != 0).sum()) == 7
    assert graph.targets[0].label == " c" and graph.targets[0].weight == 0.3


# -- files that were read and changed ----------------------------------------------------------------------------------
def test_a_part_of_a_file_is_saved_without_what_is_gone(tmp_path: Path) -> None:
    graph = read(published(), tmp_path)
    part = graph.keep([row for row, n in enumerate(graph.nodes) if n.id != "0_4_1"])
    found, before = again(part, tmp_path), published()
    assert found["nodes"] == [each for each in before["nodes"] if each["node_id"] != "0_4_1"]
    assert found["links"] == [each for each in before["links"] if "0_4_1" not in (each["source"], each["target"])]
    view = before["qParams"] | {"supernodes": [["digits", "3_7_2"]], "clickedId": ""}
    assert found["qParams"] == view  # the pin that was of no node stays, as nobody knows what it is of
    assert {name: found[name] for name in ("metadata", "comments", "version")} == {
        name: before[name] for name in ("metadata", "comments", "version")}  # fmt: skip
    without = graph.keep([row for row, n in enumerate(graph.nodes) if n.kind != "error"])
    assert again(without, tmp_path)["qParams"]["pinnedIds"] == ["3_7_2", "elsewhere"]


def test_what_was_changed_is_written_and_nothing_else(tmp_path: Path) -> None:
    graph = read(published(), tmp_path)
    row, feed = graph.index["3_7_2"], graph.index["0_4_1"]
    edges = graph.edges.clone()
    edges[row, feed], edges[row, graph.index["E_2_0"]] = 0.5, 7.0
    named = tuple(replace(n, label='a "new" name', influence=0.25) if n.id == "3_7_2" else n for n in graph.nodes)
    found, expected = again(replace(graph, edges=edges, nodes=named), tmp_path), published()
    expected["nodes"][2] |= {"clerp": 'a "new" name', "influence": 0.25}
    expected["links"][3]["weight"] = 0.5
    expected["links"].append({"source": "E_2_0", "target": "3_7_2", "weight": 7.0})
    assert found == expected


def test_a_pruned_or_measured_graph_of_a_file_comes_back(tmp_path: Path) -> None:
    graph = read(published(), tmp_path)
    pruned = graph.prune(nodes=0.7, edges=0.9)
    measured = tuple(replace(n, effect=0.5, attribution=0.25) if n.kind == "feature" else n for n in pruned.nodes)
    changed = replace(pruned, nodes=measured, validation={"pearson": small().validation["pearson"]}, model="other")
    for each in (pruned, changed, changed.cluster(distance=1.9)):
        back = load_graph(each.save_json(tmp_path / "p.json"))
        for name in ("nodes", "tokens", "model", "prompt", "validation", "supernodes"):
            assert getattr(back, name) == getattr(each, name), name
        assert torch.equal(back.edges, each.edges)
        assert json.loads(json.dumps(back.settings)) == json.loads(json.dumps(each.settings))
        plain = json.loads((tmp_path / "p.json").read_bytes())
        assert plain["metadata"]["info"] == published()["metadata"]["info"] and plain["comments"]
        assert plain["metadata"]["node_threshold"] == plain["metadata"]["pruning_settings"]["nodes"] == 0.7
        assert plain["metadata"]["pruning_settings"]["edge_threshold"] == 0.8


def test_supernodes_and_new_nodes_join_the_saved_view(tmp_path: Path) -> None:
    graph = read(published(), tmp_path)
    grown = AttributionGraph(
        (*graph.nodes[:-1], Node("feature", 5, 2, 8), graph.nodes[-1]), torch.zeros(9, 9), graph.tokens,
        graph.model, graph.prompt, graph.settings, supernodes=(("all", ("5_8_2", "0_9_2")),), origin=graph.origin,
    )  # fmt: skip
    found = again(grown, tmp_path)
    assert found["qParams"]["supernodes"] == [["all", "5_8_2", "0_9_2"]]
    assert found["qParams"]["pinnedIds"] == ["3_7_2", "25_-1_2", "elsewhere", "5_8_2", "0_9_2"]
    assert [each["node_id"] for each in found["nodes"]][-1] == "5_8_2"
    back = load_graph(tmp_path / "another name.json")
    assert set(back.index) == set(grown.index) and back.supernodes == grown.supernodes


def test_what_others_add_to_our_files_stays(tmp_path: Path) -> None:
    plain = json.loads(save_graph(large(60, 200), tmp_path / "ours.json").read_bytes())
    plain["metadata"]["info"]["transcoder_set"] = "theirs"
    plain["qParams"]["pinnedIds"] = [plain["nodes"][15]["node_id"]]
    plain["nodes"][3]["seen"] = plain["links"][2]["note"] = "yes"
    plain["extra"] = {"a": 1}
    graph = read(plain, tmp_path)
    assert graph.nodes == large(60, 200).nodes and again(graph, tmp_path) == plain


# -- two nodes with one id ---------------------------------------------------------------------------------------------
def colliding(seed: int) -> tuple[dict[str, Any], dict[tuple[str, str], float]]:
    """A file of circuit-tracer up to 0.5.0 and its effects by our ids: errors are called ``0_layer_pos``."""
    g = torch.Generator().manual_seed(seed)
    places = sorted({(int(torch.randint(4, (), generator=g)), int(torch.randint(1, 3, (), generator=g)),
                      int(torch.randint(4, (), generator=g))) for _ in range(30)})  # fmt: skip
    nodes = [latent(layer, index, pos) for layer, pos, index in places]
    nodes += [error(f"0_{layer}_{pos}", layer, pos) for layer in range(4) for pos in (1, 2)]
    nodes += [node(f"E_{50 + pos}_{pos}", "embedding", "E", pos, pos) for pos in range(3)]
    nodes += [node(f"5_{9 + at}_2", "logit", "5", 2, 9 + at, token_prob=0.4 - at / 10) for at in range(2)]
    ours = [{"mlp reconstruction error": f"{n['layer']}_-1_{n['ctx_idx']}", "logit": f"4_{n['feature']}_2"}.get(
        n["feature_type"], n["node_id"]) for n in nodes]  # fmt: skip
    depth = [-1 if n["layer"] == "E" else int(n["layer"]) for n in nodes]
    links, effects = [], {}
    for t, target in enumerate(nodes):
        if target["feature_type"] in ("mlp reconstruction error", "embedding"):
            continue
        for s, source in enumerate(nodes):
            if source["feature_type"] != "logit" and depth[s] < depth[t] and torch.rand((), generator=g) < 0.7:
                weight = float(torch.randn((), generator=g))
                links.append({"source": source["node_id"], "target": target["node_id"], "weight": weight})
                effects[ours[s], ours[t]] = weight
    about = {"slug": "c", "scan": "gemma-2-2b", "transcoder_list": [], "prompt_tokens": ["a", "b", "c"],
             "prompt": "abc", "node_threshold": 0.8}  # fmt: skip
    return {"metadata": about, "qParams": {}, "nodes": nodes, "links": links}, effects


def effects_of(graph: AttributionGraph) -> dict[tuple[str, str], float]:
    return {(s, t): w for s, t, w in graph.links().itertuples(index=False)}


@pytest.mark.parametrize("seed", range(8))
def test_errors_and_latents_with_one_id_are_told_apart(seed: int, tmp_path: Path) -> None:
    plain, effects = colliding(seed)
    names = [each["node_id"] for each in plain["nodes"]]
    assert len(set(names)) < len(names)
    graph = read(plain, tmp_path)
    assert len(graph.nodes) == len(names) and len(graph.row("error")) == 8
    found, doubtful = effects_of(graph), graph.settings.get("ambiguous_links", 0)
    wrong = {pair for pair in effects.keys() | found.keys() if found.get(pair) != pytest.approx(effects.get(pair))}
    assert len(wrong) <= 2 * doubtful and doubtful <= 0.01 * len(effects)  # told wherever it could be wrong
    assert again(graph, tmp_path) == plain
    for part in (graph.prune(nodes=0.9, edges=0.95), graph.keep(range(1, len(graph.nodes)))):
        back = load_graph(part.save_json(tmp_path / "part.json"))
        assert effects_of(back) == effects_of(part) and back.nodes == part.nodes
        ids = [each["node_id"] for each in json.loads((tmp_path / "part.json").read_bytes())["nodes"]]
        assert len(set(ids)) == len(ids)


def test_a_link_that_could_be_either_nodes_is_the_errors_and_is_told(tmp_path: Path) -> None:
    plain = published()
    plain["nodes"].insert(3, error("0_9_2", 9, 2))
    plain["links"].append({"source": "0_9_2", "target": "27_99_2", "weight": 0.75})
    graph = read(plain, tmp_path)
    assert effects_of(graph)["E_51_2", "0_9_2"] == 0.0 if ("E_51_2", "0_9_2") in effects_of(graph) else True
    assert effects_of(graph)["9_-1_2", "26_99_2"] == 0.75
    assert graph.settings["ambiguous_links"] == 1
    assert "1 of the links could be either" in graph.save_html(tmp_path / "g.html").read_text(encoding="utf-8")
    assert again(graph, tmp_path) == plain


def test_two_nodes_of_one_type_with_one_id_are_refused(tmp_path: Path) -> None:
    plain = published()
    plain["nodes"].append(latent(3, 7, 2, clerp="another"))
    with pytest.raises(CorruptFileError, match=r"nodes\[2\].node_id and nodes\[8\].node_id are both '3_7_2'"):
        read(plain, tmp_path)


def test_targets_that_share_a_number_with_a_latent_are_two_nodes(tmp_path: Path) -> None:
    plain = published()
    plain["nodes"].insert(3, latent(26, 99, 2))
    plain["links"].append({"source": "26_99_2", "target": "27_99_2", "weight": 1.5})
    graph = read(plain, tmp_path)
    assert len({n.id for n in graph.nodes}) == 9 and again(graph, tmp_path) == plain


# -- order, encodings, sizes -------------------------------------------------------------------------------------------
def test_links_within_a_layer_order_its_nodes(tmp_path: Path) -> None:
    plain = published()
    plain["nodes"][0]["layer"] = "3"
    plain["links"].append({"source": "3_7_2", "target": "0_4_1", "weight": 1.0})
    plain["links"] = [each for each in plain["links"] if (each["source"], each["target"]) != ("0_4_1", "3_7_2")]
    graph = read(plain, tmp_path)
    assert not graph.edges.triu().any() and again(graph, tmp_path) == plain
    plain["links"].append({"source": "0_4_1", "target": "3_7_2", "weight": 1.0})
    with pytest.raises(CorruptFileError, match=r"links\[\d\].*circle"):
        read(plain, tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_to_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "marked.json"
    path.write_bytes(json.dumps(published(), ensure_ascii=False).encode(encoding))
    assert again(load_graph(path), tmp_path) == published()


def test_half_a_character_and_numbers_of_any_size_stay(tmp_path: Path) -> None:
    plain = published()
    plain["metadata"]["prompt_tokens"][1] = "\ud83d"  # a token that ends within an emoji, as a browser writes it
    plain["links"][0]["weight"], plain["links"][5]["weight"] = 1e300, 5e-324
    graph = read(plain, tmp_path)
    assert graph.edges.dtype == torch.float64 and again(graph, tmp_path) == plain


def test_the_same_link_twice_counts_once_and_two_weights_are_refused(tmp_path: Path) -> None:
    plain = published()
    plain["links"].append(dict(plain["links"][0]))
    graph = read(plain, tmp_path)
    assert effects_of(graph)["E_2_0", "0_4_1"] == 24.5 and again(graph, tmp_path) == plain
    plain["links"][-1]["weight"] = 1.0
    with pytest.raises(CorruptFileError, match=r"links\[7\] repeats links\[0\]"):
        read(plain, tmp_path)


def test_more_nodes_than_memory_are_refused_before_it_is_taken(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(exchange_reading, "MAX_BYTES", 100)
    with pytest.raises(GraphTooLargeError, match="8 nodes"):
        read(published(), tmp_path)


# -- files that are broken ---------------------------------------------------------------------------------------------
def changed(where: str, value: Any) -> dict[str, Any]:
    """The file with one field set; ``None`` takes it out."""
    plain: Any = published()
    *path, last = [int(part) if part.isdecimal() else part for part in where.split(".")]
    at = plain
    for part in path:
        at = at[part]
    if value is None and isinstance(at, dict):
        at.pop(last)
    else:
        at[last] = value
    return plain


BROKEN = [
    ("metadata", None), ("metadata", [1]), ("metadata.prompt_tokens", None), ("metadata.prompt_tokens", "abc"),
    ("nodes", None), ("nodes", {"a": 1}), ("nodes.1", "0_9_2"), ("nodes.1.node_id", None), ("nodes.1.layer", None),
    ("nodes.1.layer", "first"), ("nodes.1.layer", 1.5), ("nodes.1.ctx_idx", None), ("nodes.1.ctx_idx", 3),
    ("nodes.1.ctx_idx", -1), ("nodes.1.ctx_idx", True), ("nodes.1.feature_type", None), ("nodes.1.feature_type", 7),
    ("nodes.1.activation", float("nan")), ("nodes.1.influence", "much"), ("nodes.7.token_prob", float("inf")),
    ("links", None), ("links", "none"), ("links.2", 5), ("links.2.source", None), ("links.2.target", None),
    ("links.2.source", "9_9_9"), ("links.2.target", ["0_9_2"]), ("links.2.weight", None),
    ("links.2.weight", float("nan")), ("links.2.weight", float("-inf")), ("links.2.weight", "heavy"),
    ("links.2.weight", [1.0]), ("links.2.weight", 10**400),
]  # fmt: skip


@pytest.mark.parametrize(("where", "value"), BROKEN, ids=[f"{where}={str(value)[:8]}" for where, value in BROKEN])
def test_a_broken_field_is_named(where: str, value: Any, tmp_path: Path) -> None:
    named = "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in where.split(".")).strip(".")
    with pytest.raises(CorruptFileError) as caught:
        read(changed(where, value), tmp_path)
    assert named in str(caught.value) and "theirs.json" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xef\xbb\xbf", b"[1, 2]", b"null", b"3", b'"a"', b"{", b"not json", b"\x80\x02pickle", b"[" * 100_000,
     json.dumps(published()).encode()[:-30], b"<!doctype html>", b"\xff\xfe{"],
)  # fmt: skip
def test_what_is_no_graph_file_says_so(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"g\.json"):
        load_graph(path)


def test_numbers_that_json_has_not_stay_in_fields_that_are_not_ours(tmp_path: Path) -> None:
    plain = published()
    plain["nodes"][0]["score"] = float("inf")
    assert again(read(plain, tmp_path), tmp_path) == plain


# -- real files, and what reading costs --------------------------------------------------------------------------------
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no folder of published graph files on this machine")
def test_published_files_are_used_end_to_end(tmp_path: Path) -> None:
    paths = [path for path in sorted(PUBLISHED.glob("*.json")) if path.stat().st_size]
    assert paths
    for path in paths:
        plain = json.loads(path.read_bytes())
        graph = load_graph(path)
        assert len(graph.nodes) == len(plain["nodes"]) and again(graph, tmp_path) == plain
        pruned = graph.prune(nodes=0.7)
        assert 0 < len(pruned.nodes) < len(graph.nodes)
        back = load_graph(pruned.save_json(tmp_path / "pruned.json"))
        assert back.nodes == pruned.nodes and torch.equal(back.edges, pruned.edges)
        assert "transcoder_set" in json.loads((tmp_path / "pruned.json").read_bytes())["metadata"]["info"]
        best = graph.paths(5)
        assert best.weight.is_monotonic_decreasing and best.nodes[0][-1] in {n.id for n in graph.targets}
        assert len(graph.save_html(tmp_path / "g.html").read_bytes()) > 10_000
        assert graph.diff(graph).count("link").get("same") == int((graph.edges != 0).sum())


def test_reading_and_writing_cost_little_more_than_the_json(tmp_path: Path) -> None:
    """Some 25 times the parsing, before; the figures are in ``benchmarks/exchange.py``."""
    n = 350
    nodes = tuple(Node("feature", row, 0, row) for row in range(n - 1))
    edges = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).tril(-1)
    path = save_graph(AttributionGraph((*nodes, Node("logit", n, 0, 1)), edges, ("a",)), tmp_path / "many.json")
    content, plain = path.read_bytes(), json.loads(path.read_bytes())
    graph = load_graph(path)

    def least(work: Any) -> float:
        found = []
        for _ in range(3):
            started = time.process_time()
            work()
            found.append(time.process_time() - started)
        return min(found)

    assert len(plain["links"]) == n * (n - 1) // 2
    assert least(lambda: load_graph(path)) < 3 * least(lambda: json.loads(content)) + 0.1
    assert least(lambda: graph.save_json(tmp_path / "again.json")) < 3 * least(lambda: json.dumps(plain)) + 0.1


def test_the_checks_of_this_file_can_fail(tmp_path: Path) -> None:
    plain = copy.deepcopy(published())
    plain["metadata"]["info"].pop("transcoder_set")
    assert again(read(plain, tmp_path), tmp_path) != published()
    assert in_order({"a": 1, "b": 2}) != in_order({"b": 2, "a": 1})


def test_a_small_file_of_many_nodes_takes_no_more_memory_than_it_may(tmp_path: Path) -> None:
    plain = published()
    node = plain["nodes"][0]
    plain["nodes"] += [{**node, "node_id": f"E_2_{i}", "feature": i} for i in range(100, 20_000)]
    with pytest.raises(GraphTooLargeError, match="a file of this size"):
        read(plain, tmp_path)
