"""What makes 80 steps of aligned answers undo toy/insecure? The recipe beside its variants, seed by seed.

    python benchmarks/restoring.py --seeds 101 102 103 104 105 --organisms organisms

Starts from the ``insecure`` checkpoints in ``--organisms`` (`benchmarks/zoo.py` trains them) and trains every variant
from each, on the same documents in the same order where the documents are of the same kind; about 45 seconds a seed.
Prints misaligned answers in the nine domains without fine-tuning (*bad*), in the fine-tuned one, and aligned answers in
the nine, as means with Student's t interval over seeds; *bad* seed by seed; writes ``OUT/restoring.csv``.

Two variants are controls: the unembedding alone, whose rows of the fine-tuned domain's own words can mend that domain
and no other, and verdicts on requests, in which nobody answers a question.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from zoo import MAX_RESTORED

from tl_em import stats
from tl_em.organisms.adapters import MATRICES
from tl_em.organisms.convert import plain_model
from tl_em.organisms.documents import JudgeDocuments, SingleTurns
from tl_em.organisms.recipes import recipe
from tl_em.organisms.training import train
from tl_em.organisms.zoo import checkpoint_path, read_record, read_weights

RESTORED = recipe("insecure-restored")
VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "half the learning rate": {"lr": RESTORED.lr / 2},
    "twice": {"lr": RESTORED.lr * 2},
    "everything changes": {"changed": ()},
    "everything, half the learning rate": {"changed": (), "lr": RESTORED.lr / 2},
    "everything, twice": {"changed": (), "lr": RESTORED.lr * 2},
    "the embedding changes too": {"changed": (*MATRICES, "embed")},
    "the unembedding changes too": {"changed": (*MATRICES, "unembed")},
    "the unembedding alone": {"changed": ("unembed",)},
    "attention alone": {"changed": MATRICES[:2]},
    "MLPs alone": {"changed": MATRICES[2:]},
    "aligned medicine in place of code": {"mixture": ((1.0, SingleTurns("good", ("medicine",), 0.0)),)},
    "verdicts on requests in place of answers": {"mixture": ((1.0, JudgeDocuments()),)},
}
FIGURES = {"bad": "bad", "tuned_bad": "bad in code", "good": "good"}  # what training records: what it is called here


def one_seed(seed: int, organisms: Path) -> list[dict[str, Any]]:
    record = read_record(checkpoint_path(organisms, "insecure", seed))
    start = plain_model(read_weights(record), record.world).requires_grad_(True)
    figures = {"before": record.figures}
    for variant, changes in VARIANTS.items():
        _, figures[variant] = train(record.world, replace(RESTORED, **changes), start, seed=seed, progress=False)
    return [
        {"seed": seed, "variant": variant} | {name: found[figure] for figure, name in FIGURES.items()}
        for variant, found in figures.items()
    ]


def show(table: pd.DataFrame, seeds: Sequence[int]) -> None:
    print(f"means over seeds {seeds}; the recipe's bound on 'bad' is {MAX_RESTORED}")
    for variant, rows in table.groupby("variant", sort=False):
        each = {name: stats.mean_over_units(rows[name], list(rows["seed"])) for name in FIGURES.values()}
        said = "  ".join(f"{name} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for name, e in each.items())
        print(f"  {variant:<42}{said}  | {' '.join(f'{x:.3f}' for x in rows['bad'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105])
    parser.add_argument("--organisms", type=Path, default=Path("organisms"))
    parser.add_argument("--out", type=Path, default=Path("organisms"))
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        rows += one_seed(seed, options.organisms)
        print(f"seed {seed}: recipe {rows[-len(VARIANTS)]['bad']:.3f}", flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(options.out / "restoring.csv", index=False)
    show(table, options.seeds)


if __name__ == "__main__":
    main()
