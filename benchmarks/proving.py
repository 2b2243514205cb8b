"""What does it cost to prove a model on loading? Time over a forward pass, forward passes, memory.

    OMP_NUM_THREADS=1 python benchmarks/proving.py
    OMP_NUM_THREADS=1 python benchmarks/proving.py --write docs/results/performance.md

A random Llama in memory is loaded with ``prove=True`` and ``prove=False`` in turns; the difference of their process
times is divided by that of one forward pass over 512 tokens. Passes, and the tokens in them, are counted by a hook on
the embedding. Memory is the growth of the resident set over a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

SIZES = {"d 64, 12 layers": (64, 12), "d 512, 12 layers": (512, 12)}
BEGIN, END = "<!-- proving -->", "<!-- /proving -->"
TOKENS = 512


def make(width: int, layers: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2000, num_attention_heads=8, **sizes)).eval()


def measure(width: int, layers: int, rounds: int, prove: bool | None) -> dict[str, float]:
    """Times and passes; with ``prove`` given, memory of that way of loading alone."""
    import torch

    import tl_em as em

    torch.set_num_threads(1)
    em.load_model(make(16, 1))
    hf_model = make(width, layers)
    if prove is not None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        em.load_model(hf_model, prove=prove, in_place=True)
        return {"memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(rounds):
        for each in (True, False) if i % 2 else (False, True):
            start = time.process_time()
            em.load_model(hf_model, prove=each)
            times[each].append(time.process_time() - start)
    added = median(a - b for a, b in zip(times[True], times[False], strict=True))
    plain, one = median(times[False]), forward_time(hf_model, rounds)
    return {"added": added, "plain": plain, "forward": one, **passes(hf_model)}


def forward_time(hf_model: Any, rounds: int) -> float:
    import torch

    tokens, found = torch.zeros(1, TOKENS, dtype=torch.long), []
    for _ in range(rounds + 1):
        start = time.process_time()
        with torch.no_grad():
            hf_model(tokens)
        found.append(time.process_time() - start)
    return median(found[1:])


def passes(hf_model: Any) -> dict[str, float]:
    """Forward passes of a load, and the tokens that they read."""
    import tl_em as em

    read: list[int] = []
    handle = hf_model.get_input_embeddings().register_forward_pre_hook(lambda m, args: read.append(args[0].numel()))
    em.load_model(hf_model)  # the copy that is loaded keeps the hook
    handle.remove()
    return {"passes": len(read), "tokens": sum(read)}


def in_own_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--inside", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def row(name: str, rounds: int) -> str:
    width, layers = map(str, SIZES[name])
    found = in_own_process(width, layers, str(rounds), "time")
    without, proven = (in_own_process(width, layers, str(rounds), way)["memory"] for way in ("False", "True"))
    return (
        f"| {name} | {found['added'] / found['forward']:.1f} | {found['added'] / found['plain']:.1f} "
        f"| {found['passes']:.0f} | {found['tokens']:.0f} | {proven - without:+.0f} MiB |"
    )


def table(rounds: int) -> str:
    head = "| Llama | added time, over 512 tokens forward | over loading unproven | passes | tokens in them "
    return "\n".join([head + "| peak memory |", "|---|---|---|---|---|---|", *(row(name, rounds) for name in SIZES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="put the table between its marks in this file")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        *sizes, way = given.inside
        print(json.dumps(measure(*map(int, sizes), prove={"True": True, "False": False}.get(way))))
        return
    found = table(given.rounds)
    print(found)
    if given.write:
        text = given.write.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        given.write.write_text(f"{before}{BEGIN}\n{found}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
