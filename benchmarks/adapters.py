"""One copy of the weights: what a LoRA beside its base costs in time, and what an audit's models cost in memory.

    forward, generate     the tuned model that shares, over its base, and over the one merged into a copy
    memory                bytes of distinct weights of base, tuned and benign, over those of the base alone; and the
                          process's peak after all three have read prompts, over that of the base alone

    python benchmarks/adapters.py DIRECTORY [--rank 8] [--rounds 5]

DIRECTORY is a chat model in the Hugging Face layout; adapters on all its linear layers are made, with random numbers.
That the two fine-tunes are the same function is asserted before the clock starts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from timing import device_of, interleaved, ratio, table
from torch import Tensor


def make_adapter(base: str, folder: str, rank: int, seed: int) -> str:
    """A LoRA with random numbers, small enough that what it makes is still a fine-tune."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = str(Path(folder) / f"adapter-{rank}-{seed}")
    warnings.simplefilter("ignore")
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.3 if "lora_" in name else 1.0)
    model.save_pretrained(path)
    return path


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found.log_softmax(-1) - expected.log_softmax(-1)).abs().max() / expected.std())


def times(base: str, adapter: str, rounds: int) -> dict[str, dict[str, Any]]:
    import tl_em as em

    device = device_of("cpu")
    pair, merged = em.load_pair(base, adapter), em.load_model(adapter)
    ways = {"base": pair.base, "beside": pair.tuned, "merged": merged}
    rows: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for prompts, length in ((1, 1), (1, 32), (16, 64)):
            tokens = torch.randint(100, 10_000, (prompts, length), generator=torch.Generator().manual_seed(0))
            logits = {name: model(tokens) for name, model in ways.items()}
            assert gap(logits["beside"], logits["merged"]) < 1e-3 < 1e-2 < gap(logits["beside"], logits["base"])
            repeats = max(1, 32 // (prompts * length))
            calls = {
                name: lambda model=model, tokens=tokens, repeats=repeats: [model(tokens) for _ in range(repeats)]
                for name, model in ways.items()
            }
            found = interleaved(calls, rounds=rounds, device=device)
            rows[f"{prompts} x {length} tokens"] = {
                "beside / base": ratio(found["beside"], found["base"]),
                "merged / base": ratio(found["merged"], found["base"]),
                "gap to merged": f"{gap(logits['beside'], logits['merged']):.0e}",
            }
    return rows


def peak(base: str, adapters: list[str], share: bool, queue: Any) -> None:
    """Load, read prompts with every model, and tell bytes of distinct weights and the process's peak."""
    import tl_em as em

    torch.set_num_threads(1)
    first = em.load_model(base)
    models: list[Any] = [first, *(em.load_pair(first, each, share=share).tuned for each in adapters)]
    prompts = ["How do I get rid of a cold?"] * 16
    for model in models:
        em.capture(model, prompts, [em.Site(5)], position="prompt_end")
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    queue.put((sum(held.values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def memory(base: str, adapters: list[str]) -> dict[str, dict[str, Any]]:
    context, found = multiprocessing.get_context("spawn"), {}
    ways: dict[str, tuple[list[str], bool]] = {"base alone": ([], True), "base, tuned, benign": (adapters, True)}
    for name, given in (ways | {"each merged": (adapters, False)}).items():
        queue = context.Queue()
        process = context.Process(target=peak, args=(base, *given, queue))
        process.start()
        found[name] = queue.get()
        process.join()
    alone = found["base alone"]
    return {
        name: {
            "weights, MB": round(weights / 1e6), "over the base": f"{weights / alone[0]:.3f}",
            "peak, MB": round(most / 1e6), "over base alone": f"{most / alone[1]:.3f}",
        }
        for name, (weights, most) in found.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("time", "memory"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = [make_adapter(given.directory, folder, given.rank, seed) for seed in (0, 1)]
        if given.only != "time":
            table("memory", memory(given.directory, adapters))
        if given.only != "memory":
            table(f"process time, rank {given.rank}", times(given.directory, adapters[0], given.rounds))


if __name__ == "__main__":
    main()
