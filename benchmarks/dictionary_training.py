"""How fast is a dictionary trained from a stream of text?  Over the forward pass that reads the same tokens.

The floor is the bare pass up to the site, of the same windows in the same batches, under ``stop_at_layer``: no hook, no
unembedding.  *whole* is everything from text to weights: it reads, tokenizes, packs, runs the model, shuffles, scales
and takes the steps of the optimiser; *dense* is that with the step of SAELens itself in place of ours.  *steps* are
ours alone, on activations that are there.  What *whole* costs beyond the floor and the steps is what the package adds.
*reached* is tokens a second of *whole* over those of the floor.

    aim: reached >= .8, and whole over floor + steps <= 1.2

Arithmetic: of a pass two operations a weight and token, and attention; of a dense step six products of tokens x d_sae x
d_model; of ours with top-k one, and five of tokens x k x d_model; with JumpReLU and ReLU, where latents have gradients
all over, five.  So *reached* is bounded there by pass / (pass + five products), where both are equally fast.

That both steps give the same losses (1e-5) is asserted before the clock starts.  Text: what lies around, the package's
own sources.

    OMP_NUM_THREADS=1 python benchmarks/dictionary_training.py --rounds 3        SmolLM2-135M, sites 10 and 20
    OMP_NUM_THREADS=1 python benchmarks/dictionary_training.py --memory
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timing import Way, interleaved, peak_bytes, ratio, table
from torch import Tensor

import tl_em as em
from tl_em.dictionaries import descent
from tl_em.dictionaries.corpus import ActivationSource, ReadSoFar
from tl_em.dictionaries.descent import TrainingRun, descended, trainer_of
from tl_em.dictionaries.documents import Documents
from tl_em.dictionaries.training import saelens_config
from tl_em.models.torch_state import making_weights
from tl_em.models.upstream_chatter import quiet
from tl_em.organisms.real_organism import smollm2

D_SAE, K, BATCH, CONTEXT, TOGETHER = 4096, 32, 4096, 256, 8
EXACT = 1e-5


def texts() -> Iterator[str]:
    """The sources of this package, again and again."""
    while True:
        for path in sorted(Path(em.__file__).parent.rglob("*.py")):
            yield path.read_text(encoding="utf-8")


@contextmanager
def dense() -> Iterator[None]:
    """SAELens's own step."""
    from sae_lens.saes.sae import TrainingSAE  # pyright: ignore[reportMissingImports]

    def theirs(config: Any, _: bool) -> Any:
        kind: Any = TrainingSAE.get_sae_class_for_architecture(config.architecture())
        return kind(config)

    ours, descent.training_sae = descent.training_sae, theirs
    try:
        yield
    finally:
        descent.training_sae = ours


@contextmanager
def untold() -> Iterator[None]:
    """Without the steps that the cost is told from, which a run of any length takes once."""
    tell, descent._tell_cost = descent._tell_cost, lambda *_: None
    try:
        yield
    finally:
        descent._tell_cost = tell


def trained(model: Any, layer: int, activation: str, steps: int, **given: Any) -> em.Dictionary:
    """From text to weights."""
    settings: dict[str, Any] = {"d_sae": D_SAE, "k": K, "batch": BATCH, "context": CONTEXT} | given
    with untold():
        return em.dictionaries.train_dictionary(
            model, em.Site(layer), texts(), activation=activation, steps=steps, **settings
        )


def losses(activation: str, batches: Sequence[Tensor]) -> list[float]:
    """Of steps alone."""
    config = saelens_config(activation, batches[0].shape[1], D_SAE, K, 1.0, False, "cpu")
    run = TrainingRun(config, len(batches), BATCH, 1e-3, 0, transcoder=False)
    with making_weights():
        return [found.loss.item() for found in descended(trainer_of(run), iter(batches))]


def forward(model: Any, layer: int, tokens: Tensor) -> None:
    """The floor."""
    with torch.no_grad():
        for some in tokens.split(TOGETHER):
            model(some, stop_at_layer=layer + 1)


def operations(model: Any, layer: int, activation: str) -> str:
    """Of a token, in millions: a pass up to the site, a dense step, and what is left of it."""
    blocks = getattr(model.original_model, "model").layers[: layer + 1]  # noqa: B009
    weights = sum(each.numel() for each in blocks.parameters())
    attention = 2 * (layer + 1) * CONTEXT * int(model.cfg.d_model)
    product = 2 * int(model.cfg.d_model) * D_SAE
    ours = product + 5 * 2 * int(model.cfg.d_model) * K if activation.endswith("topk") else 5 * product
    return f"{(2 * weights + attention) / 1e6:.0f} + {6 * product / 1e6:.0f} ({ours / 1e6:.0f})"


def measure(model: Any, layer: int, activation: str, rounds: int, steps: int) -> dict[str, Any]:
    """A row of the table."""
    documents = Documents(model, texts(), CONTEXT, steps * BATCH)
    source = ActivationSource([model], documents, [em.Site(layer)], difference=False, seed=0)
    source.open(ReadSoFar())
    tokens = torch.tensor([each.ids for each in source.first.encoded])
    batches = list(islice(source.batches(BATCH), steps))
    ours = losses(activation, batches)
    with dense():
        theirs = losses(activation, batches)
    off = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    assert off < EXACT, off

    def with_dense_steps() -> None:
        with dense():
            trained(model, layer, activation, steps)

    ways: dict[str, Way] = {
        "floor": lambda: forward(model, layer, tokens),
        "whole": lambda: trained(model, layer, activation, steps),
        "dense": with_dense_steps,
        "steps": lambda: losses(activation, batches),
    }
    times = interleaved(ways, rounds=rounds, device=torch.device("cpu"))
    both = [a + b for a, b in zip(times["floor"], times["steps"], strict=True)]
    reached = {name: ratio(times["floor"], times[name]) for name in ("whole", "dense")}
    return {
        **{f"{name}, µs a token": f"{median(each) / tokens.numel() * 1e6:.0f}" for name, each in times.items()},
        "reached": reached["whole"], "reached, dense": reached["dense"],
        "whole over floor + steps": ratio(times["whole"], both),
        "MFLOP: pass + step (ours)": operations(model, layer, activation), "off": f"{off:.0e}",
    }  # fmt: skip


def memory(model: Any, layer: int) -> dict[str, Any]:
    """Peak MiB by the number of steps, with parts of 4 MiB."""
    from tl_em.dictionaries import training

    training.BUFFER = 2**22
    few = {"d_sae": 512, "batch": 1024}
    trained(model, layer, "topk", 2, **few)  # what is made once
    found = {steps: peak_bytes(lambda steps=steps: trained(model, layer, "topk", steps, **few), torch.device("cpu"))
             for steps in (4, 16, 64)}  # fmt: skip
    return {f"{steps * 1024:,} tokens": f"{each / 2**20:.1f}" for steps, each in found.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of 4,096 tokens")
    parser.add_argument("--sites", type=int, nargs="*", default=[10, 20])
    parser.add_argument("--activations", nargs="*", default=["topk", "batchtopk", "jumprelu", "relu"])
    parser.add_argument("--memory", action="store_true", help="only peak memory, by the number of tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet():
        model = em.load_model(str(smollm2()))
    if options.memory:
        table("SmolLM2-135M, peak MiB beyond the weights", {"site 2": memory(model, 2)})
        return
    title = f"SmolLM2-135M, d_sae {D_SAE}, k {K}, batch {BATCH}, context {CONTEXT}, {options.rounds} rounds"
    for layer in options.sites:
        for activation in options.activations:
            row = measure(model, layer, activation, options.rounds, options.steps)
            table(f"{title}; median (least)", {f"site {layer}, {activation}": row})


if __name__ == "__main__":
    main()
