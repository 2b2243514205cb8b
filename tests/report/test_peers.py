"""The table beside other tools (``benchmarks/peers.py``): who is ahead is said, and what is missing stands there."""

from __future__ import annotations

from typing import Any

from tests.conftest import benchmark


def row(name: str, over: str, size: str) -> dict[str, str]:
    return {"table": "scores", "name": name, "over": over, "MiB": size, "said": ""}


def test_who_is_ahead_is_said_with_the_reason_that_is_known() -> None:
    peers = benchmark("peers")
    ours = [row("**a**", "1.000 (0.900)", "100.0"), row("**b**", "2.000 (2.000)", "50.0")]
    theirs = [row("bare torch hooks", "0.900 (0.900)", "60.0"), row("another", "0.980 (0.500)", "10.0")]
    said = peers.said_of([*ours, *theirs])
    assert said == (
        f"Faster: bare torch hooks ({peers.WHY['bare torch hooks']}). Smaller: another (no reason is known yet)."
    )
    assert peers.said_of([*ours, theirs[1] | {"MiB": "49.0"}]) == "Nobody is faster. Nobody is smaller."


def test_a_part_that_was_not_made_stands_in_its_table_with_the_reason() -> None:
    peers = benchmark("peers")
    made: dict[str, Any] = {"extraction": {"rows": [row("**a**", "0.750 (0.710)", "82.0") | {"table": "extraction"}]}}
    failed = {"extraction, transformers 4": {"reason": "No module named 'repeng'"}}
    table = peers.section("extraction", made | failed)
    assert "| **a** | .75 (.71) | 82 |" in table
    assert "| steering-vectors, repeng | not made: No module named 'repeng' | |" in table
    assert "| saklas, steerkit, hidden-directions | not made: not run yet | |" in table


def test_every_table_is_some_parts() -> None:
    peers = benchmark("peers")
    assert {name for part in peers.PARTS.values() for name in part.tables} == set(peers.TABLES)
