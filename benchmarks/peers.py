"""Extraction and steering with other tools, over the floor of their own process.

steering-vectors 0.12.2 and repeng 0.4.0 pin transformers < 5 and numpy < 2, saklas 5.3.0, steerkit 0.3.0 and
hidden-directions 0.1.6 want newer ones, so this script makes two environments, with the same torch.  The floor there is
bare Hugging Face: extraction without hooks and unembedding on sorted batches, generation without steering.  Compare
ratios with those of ``extraction.py`` and ``hooks.py``, not seconds.

A peer that does less or other work says so: all read one position where this package reads five; repeng takes a
principal component of paired differences, at every layer but the first; saklas fits a metric beside (its batch of
captured rows is timed alone); hidden-directions reads one prompt at a time.  The newer three name models by a
directory or the hub, so they run with ``--weights`` only.  steerkit steers by TransformerLens's own generation on a
HookedTransformer, which is a row of ``hooks.py`` (it reads a Bridge here, since TransformerLens's HookedTransformer
does not know every directory); hidden-directions serves from another program.

    OMP_NUM_THREADS=1 python benchmarks/peers.py --env .venv-peers --rounds 7
    OMP_NUM_THREADS=1 python benchmarks/peers.py --env .venv-peers --weights DIRECTORY --prompts 16 --rounds 3
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from timing import (
    SIZES,
    Size,
    Way,
    device_of,
    floor,
    interleaved,
    make_hf,
    make_prompts,
    make_tokenizer,
    peak_bytes,
    ratio,
    sizes,
    sorted_batches,
    table,
)  # fmt: skip
from torch import Tensor

PEERS = {
    "older": ("steering-vectors==0.12.2", "repeng==0.4.0", "transformers>=4.50,<5"),
    "newer": ("saklas==5.3.0", "steerkit==0.3.0", "hidden-directions==0.1.6"),
}
NEW, PROMPT, ROWS, LAYER = 24, 24, 16, 4


def make_environment(folder: Path, peers: tuple[str, ...]) -> Path:
    """The interpreter of an environment with these peers, made if it is not there."""
    python, made = folder / "bin" / "python", folder / "packages"
    packages = [f"torch=={torch.__version__.partition('+')[0]}", *peers]
    if not made.exists() or made.read_text(encoding="utf-8").split() != packages:
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        made.write_text("\n".join(packages), encoding="utf-8")
    return python


# --- Inside that environment ------------------------------------------------------------------------------------------


def quietly(way: Way) -> Way:
    """Without the progress bars."""

    def run() -> Any:
        with redirect_stderr(io.StringIO()):
            return way()

    return run


def extraction(size: Size, rounds: int, count: int, device: torch.device) -> None:
    from repeng import ControlVector, DatasetEntry  # pyright: ignore[reportMissingImports]
    from steering_vectors import train_steering_vector  # pyright: ignore[reportMissingImports]

    hf, tokenizer = make_hf("qwen2", size, device), make_tokenizer(size=size)
    prompts = make_prompts(count, seed=0, own=10), make_prompts(count, seed=1, own=20)
    pairs = list(zip(*prompts, strict=True))
    entries = [DatasetEntry(*pair) for pair in pairs]
    batches = sorted_batches(tokenizer([*prompts[0], *prompts[1]])["input_ids"], device)

    def mean_difference(batch: int) -> Any:
        return train_steering_vector(hf, tokenizer, pairs, batch_size=batch)

    error = distance(mean_difference(32).layer_activations, hf, tokenizer, prompts, device)
    assert error < (1e-4 if device.type == "cpu" else 0.05), error
    ways: dict[str, Way] = {
        "floor": lambda: floor(hf, hf.get_output_embeddings(), batches),
        "steering-vectors, batch 32 (1 position)": lambda: mean_difference(32),
        "steering-vectors, batch 1, its default (1 position)": lambda: mean_difference(1),
        "repeng, batch 32 (PCA, 1 position)": quietly(lambda: ControlVector.train(hf, tokenizer, entries)),
    }
    report(f"extraction, {size}, {count}+{count} prompts", ways, rounds, device)


@torch.no_grad()
def distance(found: dict[int, Tensor], hf: Any, tokenizer: Any, prompts: Any, device: torch.device) -> float:
    """Largest relative distance from the mean difference of one prompt at a time, at the last position."""
    means = []
    for some in prompts:
        rows = [torch.tensor([ids], device=device) for ids in tokenizer(some)["input_ids"]]
        seen = [hf(row, output_hidden_states=True).hidden_states[1:-1] for row in rows]  # the last one is normed
        means.append(torch.stack([torch.stack([x[0, -1] for x in each]).double() for each in seen]).mean(0))
    expected = means[0] - means[1]
    off = [float((found[i].double() - x).norm() / x.norm()) for i, x in enumerate(expected)]
    return max(off)


def steering(size: Size, rounds: int, device: torch.device) -> None:
    import numpy as np
    from repeng import ControlModel, ControlVector  # pyright: ignore[reportMissingImports]
    from steering_vectors import SteeringVector  # pyright: ignore[reportMissingImports]

    hf, other = make_hf("qwen2", size, device), make_hf("qwen2", size, device)
    prompts = make_prompts(ROWS, seed=0, own=10, shortest=PROMPT, longest=PROMPT)
    tokens = make_tokenizer(size=size)(prompts, return_tensors="pt")
    ids = tokens["input_ids"].to(device)
    vector = torch.randn(size.d_model, generator=torch.Generator().manual_seed(0)).to(device, hf.dtype)
    steer = SteeringVector({LAYER: vector})
    kind = getattr(other.model.layers[LAYER], "attention_type", None)
    mutated = ControlModel(other, [LAYER])
    if kind is not None:
        other.model.layers[LAYER].attention_type = kind  # transformers asks for it, repeng's wrapper has none
    mutated.set_control(ControlVector("qwen2", {LAYER: np.asarray(vector.float().cpu())}))

    def run(model: Any) -> Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )

    def steered() -> Tensor:
        with steer.apply(hf):
            return run(hf)

    assert torch.equal(steered(), run(mutated)) and not torch.equal(steered(), run(hf))
    ways: dict[str, Callable[[], Any]] = {"HF generate, unsteered": lambda: run(hf), "steering-vectors": steered}
    ways["repeng (its wrapper stays in the model)"] = lambda: run(mutated)
    report(f"steered generation, {size}, {ROWS} prompts of {PROMPT}, {NEW} new tokens", ways, rounds, device)


def newer_extraction(size: Size, rounds: int, count: int, device: torch.device) -> None:
    from hidden_directions.extract.refusal import _collect_last_token_acts  # pyright: ignore[reportMissingImports]
    from saklas.core.capture import _encode_and_capture_all_batch  # pyright: ignore[reportMissingImports]
    from steerkit import extract_activations  # pyright: ignore[reportMissingImports]
    from steerkit.data import ContrastPair  # pyright: ignore[reportMissingImports]
    from steerkit.models import ModelHandle  # pyright: ignore[reportMissingImports]
    from transformer_lens.model_bridge import TransformerBridge

    hf, tokenizer = make_hf("qwen2", size, device), make_tokenizer(size=size)
    own = make_hf("qwen2", size, device), make_tokenizer(size=size)
    lens = TransformerBridge.boot_transformers(size.directory, hf_model=own[0], tokenizer=own[1])
    prompts = make_prompts(count, seed=0, own=10), make_prompts(count, seed=1, own=20)
    everything = [*prompts[0], *prompts[1]]
    rows = tokenizer(everything)["input_ids"]
    halves = [(text.partition(" ")[0], text.partition(" ")[2]) for text in everything]
    pairs = [ContrastPair(a[0], a[1], b[1]) for a, b in zip(halves[:count], halves[count:], strict=True)]
    one = make_tokenizer(size=size)
    one.chat_template = "{{ messages[0].content }}"  # so that all read the same tokens
    ends = [(torch.tensor([row]), len(row) - 1) for row in rows]

    def of_saklas() -> Any:
        layers, found = hf.model.layers, []
        for i in range(0, len(rows), 32):
            some = slice(i, i + 32)
            texts = [""] * len(rows[some])
            read = _encode_and_capture_all_batch(hf, tokenizer, texts, texts, layers, device, rendered=ends[some])
            found.append(read)
        return found

    def of_hidden_directions() -> Any:
        return [_collect_last_token_acts(hf, one, some, "") for some in prompts]

    handle = ModelHandle(lens, "model")
    batches = sorted_batches(rows, device)
    ways: dict[str, Way] = {
        "floor": lambda: floor(hf, hf.get_output_embeddings(), batches),
        "saklas's capture, batch 32 (1 position)": of_saklas,
        "steerkit, batch 32 (1 position)": lambda: extract_activations(pairs, handle, batch_size=32),
        "steerkit, batch 8, its default (1 position)": lambda: extract_activations(pairs, handle),
        "hidden-directions, batch 1 (1 position)": quietly(of_hidden_directions),
    }
    theirs = torch.cat([found[size.layers - 2] for found in of_saklas()])
    ours = torch.cat(of_hidden_directions())[:, size.layers - 2].to(theirs)
    assert (theirs - ours).norm(dim=-1).max() < 1e-3 * ours.norm(dim=-1).min(), "they read other tokens"
    report(f"extraction, {size}, {count}+{count} prompts", ways, rounds, device)


def newer_steering(size: Size, rounds: int, device: torch.device) -> None:
    os.environ["HOME"] = tempfile.mkdtemp()  # saklas keeps files there
    from saklas.core.profile import Profile  # pyright: ignore[reportMissingImports]
    from saklas.core.sampling import SamplingConfig  # pyright: ignore[reportMissingImports]
    from saklas.core.session import SaklasSession  # pyright: ignore[reportMissingImports]

    prompts = make_prompts(ROWS, seed=0, own=10, shortest=PROMPT, longest=PROMPT)
    hf, tokenizer = make_hf("qwen2", size, device), make_tokenizer(size=size)
    session = SaklasSession(hf, tokenizer, probes=[])
    _ = session.layer_means, session.whitener  # which steering asks for, and cannot have once it generates
    vector = torch.randn(size.d_model, generator=torch.Generator().manual_seed(0)).to(device, hf.dtype)
    session.steer("random", Profile({LAYER: vector}))
    greedy = SamplingConfig(temperature=0.0, max_tokens=NEW)
    ids = tokenizer(prompts, return_tensors="pt")["input_ids"].to(device)

    def run() -> Tensor:
        return hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )

    def of_saklas(steering: str | None) -> list[list[int]]:
        found = session.generate_batch(prompts, steering=steering, sampling=greedy, raw=True)
        return [each.tokens for each in found]

    plain = [row[ids.shape[1] :] for row in run().tolist()]
    assert of_saklas(None) == plain != of_saklas("1.0 random")
    ways: dict[str, Way] = {"HF generate, unsteered": run, "saklas, steered": lambda: of_saklas("1.0 random")}
    ways["saklas, unsteered"] = lambda: of_saklas(None)
    report(f"steered generation, {size}, {ROWS} prompts of {PROMPT}, {NEW} new tokens", ways, rounds, device)


def report(title: str, ways: dict[str, Way], rounds: int, device: torch.device) -> None:
    peaks = {name: f"{peak_bytes(way, device) / 2**20:.1f}" for name, way in ways.items()}
    times = interleaved(ways, rounds=rounds, device=device)
    base = next(iter(ways))
    columns = {"over the first": lambda n: ratio(times[n], times[base]), "s": lambda n: f"{min(times[n]):.2f}"}
    rows = {name: {c: of(name) for c, of in columns.items()} | {"MiB": peaks[name]} for name in ways}
    table(f"{title}; {rounds} rounds, median (least)", rows)


def main() -> None:
    """Make the environment and run this script in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path(".venv-peers"), help="where the environments are made")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=64, help="of each class, to extract from")
    parser.add_argument("--size", choices=[size.name for size in SIZES], default=None)
    parser.add_argument("--weights", help="a directory with a real model, in place of random weights")
    parser.add_argument("--device", default=None)
    parser.add_argument("--inside", choices=tuple(PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        wanted = ("older", "newer") if options.weights else ("older",)
        for name in wanted:
            python = make_environment(options.env.resolve() / name, PEERS[name])
            subprocess.run([python, __file__, "--inside", name, *sys.argv[1:]], check=True)
        return
    device = device_of(options.device)
    parts = {"older": (extraction, steering), "newer": (newer_extraction, newer_steering)}[options.inside]
    for size in sizes(options, SIZES):
        parts[0](size, options.rounds, options.prompts, device)
        parts[1](size, options.rounds, device)


if __name__ == "__main__":
    main()
