"""Kinds of architecture that differ, each equal to plain transformers or refused.

``benchmarks/architectures.py`` in little. What is right is computed by ``benchmarks/judge.py`` from the Hugging Face
model alone, without a cache, with hooks of torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..conftest import SURFACES, benchmark

pytestmark = pytest.mark.surface

EQUAL_ON_A_BRIDGE = (
    *("llama rope llama3", "llama rope longrope"),  # rotary boundaries; one turns all tokens
    *("qwen3 window", "gemma3"),  # windows; two rotary bases and post-norms
    *("gpt-neox parallel", "bloom", "mpt"),  # parallel blocks, alibi
    *("mixtral", "deepseek-v3"),  # experts, latent attention
    *("mamba", "falcon-h1"),  # a state space in attention's place, and beside it
    "llava",  # the language model of one that reads images
)
REFUSED = ("t5", "bert masked", "gemma3 bidirectional", "llama headless", "llama classifier")
CHECKS = ("forward", "batch", "stream", "steered", "ablated", "weights")


def judged(name: str, checks: tuple[str, ...] = CHECKS) -> dict[str, dict[str, Any]]:
    """Cells of an architecture on every surface."""
    cells = benchmark("cells")
    case, found = cells.Case(sys.modules["families"].named(name), "bridge"), {}
    for case.surface in SURFACES:
        found[case.surface] = cells.examine(case, checks)
    return found


@pytest.mark.parametrize("name", EQUAL_ON_A_BRIDGE)
def test_a_surface_is_equal_or_refused(name: str) -> None:
    found = judged(name)
    faults = [(surface, check, cell) for surface, each in found.items() for check, cell in each.items()]
    assert not [each for each in faults if each[2].verdict not in ("equal", "refused")]
    shown = {check for check, cell in found["bridge"].items() if cell.verdict == "equal"}
    assert shown >= {"load", *CHECKS} - {"weights"}  # only the weight form may not exist


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_causal_language_model_is_refused(name: str) -> None:
    for each in judged(name, ("directory",)).values():
        assert {cell.verdict for cell in each.values()} == {"refused"}
        assert each["load"].note.startswith("ModelError: ")


def test_the_judge_sees_a_model_that_is_another_one() -> None:
    cells = benchmark("cells")
    case = cells.Case(sys.modules["families"].named("llama"), "bridge")
    model = case.load()
    assert cells.forward(case, model).verdict == cells.steered(case, model).verdict == "equal"
    with torch.no_grad():
        model.blocks[1].ln1.weight.mul_(1.05)
    assert {check(case, model).verdict for check in (cells.forward, cells.batch, cells.stream)} == {"WRONG"}
    answer = case.plain[0]
    text = " ".join(map(str, (answer.ids[0], 1 + answer.ids[1], *answer.ids[2:])))
    ours = [text, *(" ".join(map(str, each.ids)) for each in case.plain[1:])]
    assert cells.same_answers(ours, case.plain).verdict == "WRONG"
    tied = answer._replace(leads=(1.0, 0.0, *answer.leads[2:]))
    assert cells.same_answers(ours, [tied, *case.plain[1:]]).verdict == "equal"  # a tie at the token that differs
    tied = answer._replace(leads=(0.0, 1.0, *answer.leads[2:]))
    assert cells.same_answers(ours, [tied, *case.plain[1:]]).verdict == "WRONG"  # a tie elsewhere


_LOADS = """
import json, socket, subprocess, sys
from guard import attempts, changes, state
everywhere = lambda: socket.socket().bind(("0.0.0.0", 0))
for attempt in (lambda: socket.create_connection(("127.0.0.1", 9)), lambda: subprocess.run(["true"]), everywhere):
    try:
        attempt()
    except BaseException as error:
        assert type(error).__name__ == "Forbidden"
caught = len(attempts())
socket.socket().bind(("127.0.0.1", 0))
import numpy, scipy.stats, torch
import tl_em as em
before = state()
em.load_model(sys.argv[1])
changed = changes(before, state())
from families import named
for name in sys.argv[2:]:
    hf_model = named(name).make()
    before = state(hf_model)
    try:
        em.load_model(hf_model)
    except em.TlEmError:
        pass
    changed += changes(before, state(hf_model))
print(json.dumps({"caught": caught, "attempted": attempts()[caught:], "changed": changed}))
"""


@pytest.mark.starts("Python with a guard")
def test_loading_attempts_nothing_and_leaves_nothing_changed(tmp_path: Path) -> None:
    """Under a guard of sockets and subprocesses that is first shown to catch one of each.

    Loopback may be bound: that reaches nobody, and urllib3, which boto3 brings, tries it at import to learn of IPv6.
    The first load brings the imports of TransformerLens and transformers; theirs is an empty cache directory of torch.
    """
    guard, directory = benchmark("guard"), tmp_path / "model"
    benchmark("families").named("gpt2").make().save_pretrained(directory)
    environment = guard.environment(tmp_path)
    environment["PYTHONPATH"] += os.pathsep + str(Path(guard.__file__).parent)
    command = [sys.executable, "-c", _LOADS, str(directory), "llava", "bert masked", "llama"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    changed = [each for each in found["changed"] if not each.startswith("temporary files (+torchinductor")]
    assert (found["caught"], found["attempted"], changed) == (3, [], [])
