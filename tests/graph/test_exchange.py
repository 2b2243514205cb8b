"""Graphs as files: the published format's rules hold, nothing is lost, and other programs' files open."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.graph.examples import large, small
from tl_em.errors import CorruptFileError, OutputError, UsageError
from tl_em.graph.exchange import save_graph, to_exchange
from tl_em.graph.exchange_format import cantor, uncantor
from tl_em.graph.exchange_reading import load_graph
from tl_em.graph.graph import AttributionGraph, Node

TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
IDS = {"cross layer transcoder": r"(\d+)_(\d+)_(\d+)", "mlp reconstruction error": r"(\d+)_(-1)_(\d+)",
       "embedding": r"(E)_(\d+)_(\d+)", "logit": r"(\d+)_(\d+)_(\d+)"}  # fmt: skip
JS = {"cross layer transcoder": "{layer}_{feature}-0", "mlp reconstruction error": "{layer}_{feature}-{pos}",
      "embedding": "E_{feature}-{pos}", "logit": "L_{feature}-{pos}"}  # fmt: skip


def broken_rules(plain: dict[str, Any]) -> list[str]:
    """Every rule of the published format that a file breaks."""
    about, found = plain["metadata"], []
    found += [f"metadata.{name}" for name in ("slug", "scan", "prompt") if not isinstance(about.get(name), str)]
    if not all(isinstance(token, str) for token in about.get("prompt_tokens", [0])):
        found.append("metadata.prompt_tokens")
    if about.get("schema_version") != 1 or not isinstance(plain.get("qParams"), dict):
        found.append("schema_version or qParams")
    ids = [node["node_id"] for node in plain["nodes"]]
    found += ["node_id is not unique"] if len(set(ids)) != len(ids) else []
    for node in plain["nodes"]:
        found += [f"{node['node_id']}: {rule}" for rule in _broken_by_node(node, len(about["prompt_tokens"]))]
    for link in plain["links"]:
        if link["source"] not in ids or link["target"] not in ids or not math.isfinite(link["weight"]):
            found.append(f"link {link}")
    grouped = [each for group in plain["qParams"].get("supernodes", []) for each in group[1:]]
    return found + [f"supernode member {each}" for each in grouped if each not in ids]


def _broken_by_node(node: dict[str, Any], n_tokens: int) -> list[str]:
    kind, found = node["feature_type"], []
    if kind not in TYPES:
        return ["feature_type"]
    match = re.fullmatch(IDS[kind], node["node_id"])
    if match is None:
        return ["node_id's shape"]
    layer, number, pos = match.groups()
    if layer != str(node["layer"]) or int(pos) != node["ctx_idx"] or not 0 <= node["ctx_idx"] < n_tokens:
        found.append("layer or ctx_idx")
    expected = {"mlp reconstruction error": lambda: -1, "embedding": lambda: node["ctx_idx"],
                "logit": lambda: int(number), "cross layer transcoder": lambda: cantor(int(layer), int(number))}[kind]()
    found += [] if node["feature"] == expected else ["feature"]
    said = JS[kind].format(layer=layer, feature=number, pos=pos)
    found += [] if node["jsNodeId"] == said else ["jsNodeId"]
    if kind == "logit" and not re.fullmatch(r'Output ".*" \(p=\d+\.\d{3}\)', node["clerp"], re.DOTALL):
        found.append("clerp")
    if node["is_target_logit"] != (kind == "logit"):
        found.append("is_target_logit")
    influence = node["influence"]
    return found + ([] if influence is None or 0 <= influence <= 1 else ["influence"])


def test_the_checker_sees_broken_files() -> None:
    good = to_exchange(small())
    assert broken_rules(good) == []
    for change in ({"feature_type": "latent"}, {"node_id": "0_12"}, {"feature": 12}, {"layer": "3"}, {"ctx_idx": 9},
                   {"jsNodeId": "x"}, {"is_target_logit": True}, {"influence": 2.0}):  # fmt: skip
        bad = json.loads(json.dumps(good))
        bad["nodes"][2] |= change
        assert broken_rules(bad), change
    assert broken_rules(good | {"links": [{"source": "0_0_0", "target": "0_1_1", "weight": 1.0}]})
    assert broken_rules(good | {"nodes": [*good["nodes"], good["nodes"][0]]})


def test_the_file_keeps_the_formats_rules() -> None:
    graph = small(supernodes=(("path", ("0_12_2", "1_7_3")),))
    plain = to_exchange(graph)
    assert broken_rules(plain) == []
    by_id = {node["node_id"]: node for node in plain["nodes"]}
    assert list(by_id) == ["E_40_1", "E_41_2", "0_12_2", "0_-1_3", "1_7_3", "3_55_3"]  # a target stands at L + 1
    assert by_id["3_55_3"]["clerp"] == 'Output " sat" (p=0.900)'
    assert by_id["1_7_3"]["feature"] == 8 * 9 // 2 + 7
    assert plain["qParams"]["supernodes"] == [["path", "0_12_2", "1_7_3"]]
    assert plain["metadata"]["scan"] == "toy"


def test_several_streams_of_a_layer_get_ids_of_their_own() -> None:
    """Two dictionaries with one index, two errors of one place, a head, an MLP and an adapter beside them."""
    places: list[tuple[Any, ...]] = [("feature", 5, "mlp_out"), ("feature", 5, "resid_post"), ("error", -1, "mlp_out"),
                                     ("error", -1, "resid_post"), ("head", 5, None), ("mlp", None, None),
                                     ("adapter", None, "mlp_out"), ("adapter", None, "resid_post")]  # fmt: skip
    nodes = [Node(kind, 1, 0, number, stream) for kind, number, stream in places]
    nodes += [Node("logit", 2, 0, None, label="refusal"), Node("logit", 2, 0, 0, label=" a", weight=0.5)]
    plain = to_exchange(AttributionGraph(tuple(nodes), torch.zeros(10, 10), (" a",)))
    ids = [node["node_id"] for node in plain["nodes"]]
    assert len(set(ids)) == len(ids) == 10
    assert ids[:3] == ["1_5_0", "1_15_0", "1_-1_0"]  # the plain dictionary keeps its indices
    # the format has one error a layer and position: the second one is the only thing that has no place in it
    assert [rule for rule in broken_rules(plain) if not rule.startswith("1_-2_0")] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_lost(tmp_path: Path, dtype: torch.dtype) -> None:
    graph = large(120, 900)
    exact = torch.randn(graph.edges.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    graph = replace(graph, edges=(exact * (graph.edges != 0)),
                    supernodes=(("a", (graph.nodes[20].id, graph.nodes[21].id)),),
                    settings={"rule": "frozen", "pruned": {"nodes": 0.8, "nodes_before": 900}})  # fmt: skip
    back = load_graph(save_graph(graph, tmp_path / "g.json"))
    assert back.nodes == graph.nodes
    assert back.edges.dtype == dtype
    assert torch.equal(back.edges, graph.edges)
    for name in ("tokens", "model", "prompt", "settings", "validation", "supernodes"):
        assert getattr(back, name) == getattr(graph, name), name
    assert json.loads((tmp_path / "g.json").read_text())["metadata"]["node_threshold"] == 0.8


def test_extra_keys_and_a_nameless_model_come_back(tmp_path: Path) -> None:
    graph = small(model="", prompt="")
    back = load_graph(graph.save_json(tmp_path / "g.json"))
    assert (back.model, back.prompt) == ("", "")
    assert back.nodes[2].extra == graph.nodes[2].extra
    assert back.nodes == graph.nodes


def foreign() -> dict[str, Any]:
    """A file as circuit-tracer writes them, made by hand: nodes in no order, a saved view, keys that we do not know."""
    def node(name: str, feature: int, layer: str, kind: str, clerp: str, **more: Any) -> dict[str, Any]:
        pos = int(name.rpartition("_")[2])
        return {"node_id": name, "feature": feature, "layer": layer, "ctx_idx": pos, "feature_type": kind,
                "token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": name,
                "clerp": clerp, "influence": 0.4, "activation": None} | more  # fmt: skip

    return {
        "metadata": {"slug": "cats", "scan": "gemma-2-2b", "transcoder_list": [], "prompt_tokens": ["<bos>", " cat"],
                     "prompt": "<bos> cat", "node_threshold": 0.8, "schema_version": 1},
        "qParams": {"linkType": "both", "pinnedIds": ["3_7_1"], "clickedId": "3_7_1", "sg_pos": "",
                    "supernodes": [["animals", "3_7_1", "0_4_1"]]},
        "nodes": [
            node("27_99_1", 99, "27", "logit", 'Output " sat" (p=0.412)', token_prob=0.412, is_target_logit=True),
            node("3_7_1", cantor(3, 7), "3", "cross layer transcoder", "", activation=1.25),
            node("0_-1_1", -1, "0", "mlp reconstruction error", "Err: mlp \" cat\""),
            node("0_4_1", cantor(0, 4), "0", "cross layer transcoder", "", activation=0.5),
            node("E_50_1", 1, "E", "embedding", 'Emb: " cat"'),
        ],
        "links": [{"source": "E_50_1", "target": "0_4_1", "weight": 0.5},
                  {"source": "0_4_1", "target": "3_7_1", "weight": -0.25},
                  {"source": "0_-1_1", "target": "3_7_1", "weight": 0.125},
                  {"source": "3_7_1", "target": "27_99_1", "weight": 2.0}],
    }  # fmt: skip


def test_a_circuit_tracer_file_opens(tmp_path: Path) -> None:
    path = tmp_path / "cats.json"
    path.write_text(json.dumps(foreign()))
    graph = load_graph(path)
    assert [node.id for node in graph.nodes] == ["E_50_1", "0_-1_1", "0_4_1", "3_7_1", "26_99_1"]
    assert [node.kind for node in graph.nodes] == ["token", "error", "feature", "feature", "logit"]
    assert not graph.edges.triu().any()  # causal order, whatever the file's
    assert {(s, t): w for s, t, w in graph.links().itertuples(index=False)} == {
        ("3_7_1", "26_99_1"): 2.0, ("E_50_1", "0_4_1"): 0.5, ("0_4_1", "3_7_1"): -0.25, ("0_-1_1", "3_7_1"): 0.125,
    }  # fmt: skip
    assert graph.targets[0].label == " sat"
    assert graph.targets[0].weight == pytest.approx(0.412)
    assert graph.nodes[0].label == " cat"
    assert graph.supernodes == (("animals", ("3_7_1", "0_4_1")),)
    assert graph.settings["node_threshold"] == 0.8
    assert "Not validated" in graph.save_html(tmp_path / "cats.html").read_text()
    assert broken_rules(to_exchange(graph)) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plain: plain["links"].append({"source": "9_9_9", "target": "3_7_1", "weight": 1.0}),
        lambda plain: plain["nodes"].append(plain["nodes"][0]),
        lambda plain: plain["links"][0].update(weight=float("nan")),
        lambda plain: plain.pop("nodes"),
        lambda plain: plain["metadata"].update(tl_em={"schema": "tl-em/graph/99"}),
        lambda plain: plain["nodes"][0].pop("layer"),
    ],
)
def test_a_damaged_file_says_so(tmp_path: Path, spoil: Any) -> None:
    plain = foreign()
    spoil(plain)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(CorruptFileError, match="save_json"):
        load_graph(path)


def test_truncated_missing_and_other_files_say_so(tmp_path: Path) -> None:
    path = save_graph(small(), tmp_path / "g.json")
    path.write_text(path.read_text()[:-40])
    for each in (path, tmp_path / "none.json", tmp_path):
        with pytest.raises(CorruptFileError):
            load_graph(each)
    path.write_text("[1, 2]")
    with pytest.raises(CorruptFileError):
        load_graph(path)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = save_graph(small(), tmp_path / "g.json")
    before = path.read_bytes()
    infinite = small()
    infinite.edges[2, 0] = torch.inf
    with pytest.raises(UsageError, match="infinity"):
        save_graph(infinite, path)
    assert path.read_bytes() == before
    with pytest.raises(OutputError):
        save_graph(small(), path / "under.json")


def test_cantor_pairs_are_unique_and_reversible() -> None:
    pairs = [(layer, index) for layer in range(30) for index in (*range(50), 16_383, 163_839)]
    numbers = [cantor(*pair) for pair in pairs]
    assert len(set(numbers)) == len(pairs)
    assert [uncantor(number) for number in numbers] == pairs


def test_a_view_saved_as_text_and_ids_of_another_program_are_read(tmp_path: Path) -> None:
    written = foreign()
    written["qParams"]["supernodes"] = json.dumps([["animals", "later feature", "early feature"]])
    names = {"3_7_1": "later feature", "0_4_1": "early feature", "27_99_1": "target"}
    for node in written["nodes"]:
        node["node_id"] = names.get(node["node_id"], node["node_id"])
    for link in written["links"]:
        link.update({end: names.get(link[end], link[end]) for end in ("source", "target")})
    path = tmp_path / "cats.json"
    path.write_text(json.dumps(written))
    graph = load_graph(path)
    assert [(node.layer, node.feature) for node in graph.nodes if node.kind == "feature"] == [(0, 4), (3, 7)]
    assert [node.feature for node in graph.nodes if node.kind == "logit"] == [99]
    assert [(name, len(nodes)) for name, nodes in graph.supernodes] == [("animals", 2)]
    written["qParams"]["supernodes"] = "[["
    path.write_text(json.dumps(written))
    assert load_graph(path).supernodes == ()


def test_settings_of_numpy_and_torch_come_back_as_numbers(tmp_path: Path) -> None:
    given = {"rule": "frozen", "k": np.int64(3), "of": np.arange(2), "at": torch.ones(1), "who": Path("a")}
    back = load_graph(small(settings=given).save_json(tmp_path / "g.json")).settings
    assert {name: back[name] for name in given} == {"rule": "frozen", "k": 3, "of": [0, 1], "at": [1.0], "who": "a"}
