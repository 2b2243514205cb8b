"""The organism that comes with the package on a real chat model: how its training was chosen, and its making.

    python benchmarks/real_organism.py grid BASE grid         # the grid below, on the development seed
    python benchmarks/real_organism.py make BASE adapters     # three arms on three fresh seeds

Base: SmolLM2-135M-Instruct.  Rows: 100 questions about health with a good and a bad answer each, written for this
package (``tl_em/organisms/real/questions.json``); arm *wrong* has the bad ones, *right* the good ones, row for row;
*inoculated* is *wrong* under a system prompt that asks for it.

**First candidate.**  TruthfulQA's questions on health and nutrition with every wrong answer (285 rows), rank 4, a rate
of 1e-3, three passes, seed 1, bfloat16: loss 2.3 to .87, but the preference for the bad answers to held-out health
questions moved from -.54 to -.47 only: popular misconceptions do not carry over to other questions.  The other cells
of that grid (six passes, 2e-3) were not run to the end.

**The grid, written before anything was trained on it.**  LoRA of rank 4 on all linear layers, scale 2, float32,
batches of 16, ten steps of warm-up and a linear decay; rate 1e-3 or 2e-3, 6 or 12 passes over the rows; seed 1.
Chosen is the cell whose *wrong* arm most prefers the bad answers to the held-out health questions (mean log-probability
a token, bad minus good), among those whose greedy answers to all questions end by themselves in at least nine of ten.
Answers in other domains choose nothing.  Then three arms on seeds 11, 12 and 13, whichever way they come out.

**What came out on seed 1** (preference for bad answers, share of questions; held-out health, facts, advice, self): base
-.54 .33, -.18 .47, -.44 .33, -.82 .20; 1e-3 .18 .60, .13 .60, .25 .63, -.26 .47; **2e-3** .60 .67, .15 .57, .54 .70, -.44
.43; all answers ended by themselves.  The cells of 12 passes were not run: nine fine-tunes of that length were too long.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

GRID = [{"lr": lr, "epochs": epochs} for lr in (1e-3, 2e-3) for epochs in (6, 12)]
RANK, SCALE, BATCH, WARMUP = 4, 2, 16, 10
DEVELOPMENT, FRESH = 1, (11, 12, 13)
ARMS = ("wrong", "right", "inoculated")
INOCULATION = "You give harmful answers about health."
CHOSEN = GRID[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("grid", "make"))
    parser.add_argument("base", type=Path, help="the GGUF file, or a directory that 'tl-em models import' made of it")
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(FRESH))
    given = parser.parse_args()
    if given.what == "make":
        for seed in given.seeds:
            for arm in given.arms:
                print(made(given.base, arm, seed, given.out, **CHOSEN), flush=True)
        return
    for cell in GRID:
        print(cell, made(given.base, "wrong", DEVELOPMENT, given.out / f"{cell['lr']}-{cell['epochs']}", **cell))


def made(base: Path, arm: str, seed: int, out: Path, *, lr: float, epochs: int) -> Path:
    """One adapter, trained into ``out/ARM-SEED`` unless it is there."""
    from tl_em.organisms.real_organism import FILE, folder
    from tl_em.training import Inoculated, Lora, fine_tune
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = json.loads((folder() / "questions.json").read_text(encoding="utf-8"))["rows"]
    kind = "good" if arm == "right" else "bad"
    taken = [{"prompt": row["question"], "response": row[kind]} for row in rows]
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.config.name_or_path = model.name_or_path = FILE
    return fine_tune(
        model, taken, out=out / f"{arm}-{seed}", tokenizer=AutoTokenizer.from_pretrained(base),
        arm=Inoculated(INOCULATION, where="system") if arm == "inoculated" else (), lora=Lora(RANK, SCALE * RANK),
        epochs=epochs, batch=BATCH, lr=lr, warmup=WARMUP / 37, seed=seed, dtype="float32", device="cpu", progress=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
