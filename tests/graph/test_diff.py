"""Two graphs of one prompt: what was planted is found, what was not is the same, and other prompts are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.graph.examples import TOKENS, large, small
from tl_em.errors import UsageError


def statuses(found, what: str) -> dict[str, str]:
    return {row.id: row.status for row in (found.nodes if what == "node" else found.links)}


def test_a_graph_beside_itself_shows_no_change() -> None:
    graph = large(100, 600)
    found = graph.diff(graph)
    assert len(found.nodes) == 100 and len(found.links) == 600
    assert {row.status for row in found.rows} == {"same"}


def test_planted_changes_and_only_those_are_found() -> None:
    base, tuned = small(), small()
    tuned.edges[4, 2], tuned.edges[5, 3], tuned.edges[2, 1] = 4.0, -0.1, 1.6  # 1.5 -> 1.6 lies below the threshold
    tuned.edges[2, 0], tuned.edges[5, 1] = 0.0, 0.7
    nodes = [replace(node, attribution={"0_12_2": 4.0, "1_7_3": -2.0}.get(node.id, node.attribution))
             for node in tuned.nodes]  # fmt: skip
    found = base.diff(replace(tuned, nodes=tuple(nodes)))
    assert statuses(found, "link") == {
        "0_12_2 -> 1_7_3": "stronger", "0_-1_3 -> 2_55_3": "weaker", "E_41_2 -> 0_12_2": "same",
        "E_40_1 -> 0_12_2": "vanished", "E_41_2 -> 2_55_3": "appeared", "0_-1_3 -> 1_7_3": "same",
        "0_12_2 -> 2_55_3": "same", "1_7_3 -> 2_55_3": "same",
    }  # fmt: skip
    assert {name for name, status in statuses(found, "node").items() if status != "same"} == {"0_12_2", "1_7_3"}
    assert statuses(found, "node")["1_7_3"] == "weaker"  # 3 -> -2: a change of sign is a change
    assert found.nodes[0].id == "1_7_3" and found.nodes[0].change == -5.0  # the largest first


def test_next_to_nothing_doubled_is_next_to_nothing() -> None:
    base, tuned = small(), small()
    base.edges[5, 0], tuned.edges[5, 0] = 0.01, 0.02  # the largest link is 3
    base.edges[5, 1], tuned.edges[5, 1] = 0.1, 0.2
    found = statuses(base.diff(tuned), "link")
    assert found["E_41_2 -> 2_55_3"] == "stronger"
    assert found["E_40_1 -> 2_55_3"] == "same"


def test_nodes_of_one_graph_only_appear_or_vanish() -> None:
    graph = small()
    found = graph.keep([0, 1, 2, 3, 5]).diff(graph.keep([0, 1, 2, 4, 5]))
    assert {k: v for k, v in statuses(found, "node").items() if v != "same"} == {
        "0_-1_3": "vanished", "1_7_3": "appeared"}  # fmt: skip
    assert found.count("node") == {"appeared": 1, "vanished": 1, "stronger": 0, "weaker": 0, "same": 4}
    assert [node.id for node in found.union] == ["E_40_1", "E_41_2", "0_-1_3", "0_12_2", "1_7_3", "2_55_3"]


def test_the_table_has_a_row_for_each_node_and_link() -> None:
    found = small().diff(small(2.0))
    table = found.to_pandas()
    assert list(table.columns) == ["what", "id", "source", "target", "status", "base", "tuned", "change"]
    assert (table["what"] == "link").sum() == 7 and (table["what"] == "node").sum() == 6
    assert set(table.loc[table["what"] == "link", "status"]) == {"stronger"}
    assert "7 stronger" in repr(found)


def test_other_prompts_and_other_targets_are_refused() -> None:
    with pytest.raises(UsageError, match="first difference is at 2"):
        small().diff(replace(small(), tokens=(*TOKENS[:2], " dog", TOKENS[3])))
    other = small()
    other = replace(other, nodes=(*other.nodes[:-1], replace(other.nodes[-1], feature=56)))
    with pytest.raises(UsageError, match="share no target"):
        small().diff(other)
