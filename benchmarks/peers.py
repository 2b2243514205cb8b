"""This package beside others on a real model: one command, one table.

    OMP_NUM_THREADS=1 python benchmarks/peers.py --env .venv-peers --weights DIRECTORY --table peers.json \\
        --write docs/results/performance.md

Ours runs in the environment of this process, each peer in one of its own (``environments.py``), which are made under
``--env`` where they are not there.  Every time is a ratio to the floor of its own process, taken in turn with it, so
that rows of different processes compare: for extraction all blocks of sorted batches without hooks and unembedding, for
generation Hugging Face's ``generate``, else a forward pass.  Memory is the most that torch held beyond the weights.
That the ways of a process give the same is asserted before its clock starts.

Each part that is finished is kept in ``--table``, and the same command goes on after it; a part that could not be made
stands in the table with the reason, and is tried again.

A peer that does less or other work says so: the extractions of others read one position where this package reads five;
repeng takes a principal component of paired differences, at every layer but the first; saklas fits a metric beside (its
batch of captured rows is timed alone); hidden-directions reads one prompt at a time, and serves from another program.
steerkit reads a Bridge here, since TransformerLens's HookedTransformer does not know every directory; it steers by
TransformerLens's own generation, which is a row.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environments import ROOT, make_environment
from timing import (
    Size,
    Way,
    device_of,
    floor,
    make_hf,
    make_prompts,
    make_tokenizer,
    measured,
    real_size,
    sorted_batches,
)  # fmt: skip
from torch import Tensor

NEW, PROMPT, ROWS, LAYER = 24, 24, 16, 4
BEGIN, END = "<!-- peers -->", "<!-- /peers -->"
EVEN = 0.03
"""Ratios that differ by less are the same: what the machine does."""

Row = dict[str, str]
"""Of a table: ``table``, ``name``, ``over`` (median and least), ``MiB``, and maybe ``said``."""


@dataclass(frozen=True)
class Given:
    """What a run is made with: rounds of the clock, prompts of each class to extract from."""

    rounds: int
    prompts: int


def named(
    table: str, rows: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], column: str = "over"
) -> list[Row]:
    """Some rows of a script's table, under names of this one."""
    some = [(label, rows[name]) for name, label in names.items()]
    return [{"table": table, "name": label, "over": row[column], "MiB": row["MiB"], "said": row.get("said", "")}
            for label, row in some]  # fmt: skip


def timed(table: str, ways: dict[str, Way], rounds: int, device: torch.device) -> list[Row]:
    """Rows of ways over the one named floor, which has none."""
    rows = measured(ways, "floor", rounds, device)
    return named(table, rows, {name: name for name in ways if name != "floor"})


# --- In this package's environment ------------------------------------------------------------------------------------


def extraction_here(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
    from extraction import measure

    names = {
        "tl_em, before every block": "**before every block** (5 positions)",
        "tl_em, after every block": "**after every block** (5 positions)",
        "refusal_direction's": "refusal_direction's procedure, anew, Bridge (5 positions)",
        "bare HF: refusal_direction's": "refusal_direction's procedure, anew, Hugging Face (5 positions)",
        "run_with_cache, filtered": "TransformerLens's run_with_cache, filtered (5 positions)",
        "run_with_cache, all": "TransformerLens's run_with_cache, all (5 positions)",
    }
    found = measure("qwen2", size, "bridge", given.rounds, given.prompts, device, tuple(names))
    return named("extraction", found, names, "over the floor")


def steering_here(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
    from hooks import generate

    names = {
        "em.generate, steered": "**`em.generate`, Bridge, steered**",
        "em.generate": "**`em.generate`, Bridge, untreated**",
        "surface's generate, its own hooks": "TransformerLens's own generate with its hooks, steered (steerkit's way)",
        "surface's generate": "TransformerLens's own generate, untreated",
    }
    found = generate("qwen2", size, "bridge", given.rounds, device, (*names, "HF generate"))
    return named("generation", found, names, "over HF's")


def chats_here(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
    from hooks import mixed

    fused, padded = "HF generate, fused attention", "HF generate, padded"
    names = {"em.generate": "**`em.generate`, Bridge**", padded: "Hugging Face's generate, padded, eager attention"}
    return named(
        "chats", mixed("qwen2", size, "bridge", given.rounds, device, (*names, fused)), names, "over HF's, fused"
    )


def samples_here(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
    from hooks import samples

    names = {"em.generate(samples=8)": "**`em.generate(samples=8)`, Bridge**"}
    found = samples("qwen2", size, "bridge", given.rounds, device, (*names, "HF, 8 sequences"))
    return named("samples", found, names, "over HF's")


def hooks_here(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
    from hooks import ablate, attach

    some = "plain forward", "bare torch hooks"
    ours, theirs = "tl_em Ablate", "Ablate.hooks in TL run_with_hooks"
    names = {ours: "**`em.Ablate`**", some[1]: some[1], theirs: "TransformerLens's run_with_hooks"}
    found = named(
        "ablation", ablate("qwen2", size, "bridge", given.rounds, device, (*some, *names)), names, "over plain"
    )
    ours, theirs = "tl_em hooked()", "TL run_with_hooks"
    names = {ours: "**ours**", some[1]: some[1], theirs: "TransformerLens's run_with_hooks"}
    return found + named("reading", attach("qwen2", size, "bridge", given.rounds, device, (*some, *names)), names,
                         "over plain")  # fmt: skip


def scores_lens4(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
    from attribution_patching import ONE, OURS, THEIRS, scores

    names = {ONE: f"**`{ONE}`**, one gradient", THEIRS: f"TransformerLens 4.3's `{THEIRS}`, one gradient",
             OURS: f"**`{OURS}`**, the default, five gradients"}  # fmt: skip
    return named("scores", scores(size.directory, (0, 2, 8, 12), given.rounds), names)


def graph_here(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
    from tracing import here

    return of_graphs(here(size, min(given.rounds, 2), device, folder))


def graph_older(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
    from tracing import there

    return of_graphs(there(size, min(given.rounds, 2), device, folder))


def of_graphs(found: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Each graph has a table of its own."""
    rows = []
    for name, row in found.items():
        label, _, graph = name.rpartition(" (")
        rows += named(f"graph, {graph[:-1]}", {"": row}, {"": label})
    return rows


# --- In the environments of others ------------------------------------------------------------------------------------


def quietly(way: Way) -> Way:
    """Without the progress bars."""

    def run() -> Any:
        with redirect_stderr(io.StringIO()):
            return way()

    return run


def extraction_older(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
    from repeng import ControlVector, DatasetEntry  # pyright: ignore[reportMissingImports]
    from steering_vectors import train_steering_vector  # pyright: ignore[reportMissingImports]

    hf, tokenizer = make_hf("qwen2", size, device), make_tokenizer(size=size)
    prompts = make_prompts(given.prompts, seed=0, own=10), make_prompts(given.prompts, seed=1, own=20)
    pairs = list(zip(*prompts, strict=True))
    entries = [DatasetEntry(*pair) for pair in pairs]
    batches = sorted_batches(tokenizer([*prompts[0], *prompts[1]])["input_ids"], device)

    def mean_difference(batch: int) -> Any:
        return train_steering_vector(hf, tokenizer, pairs, batch_size=batch)

    error = distance(mean_difference(32).layer_activations, hf, tokenizer, prompts, device)
    assert error < (1e-4 if device.type == "cpu" else 0.05), error
    ways: dict[str, Way] = {
        "floor": lambda: floor(hf, hf.get_output_embeddings(), batches),
        "steering-vectors 0.12.2, batches of 32 (1 position)": lambda: mean_difference(32),
        "steering-vectors 0.12.2, its default of 1 (1 position)": lambda: mean_difference(1),
        "repeng 0.4.0, a principal component (1 position)": quietly(
            lambda: ControlVector.train(hf, tokenizer, entries)
        ),
    }
    return timed("extraction", ways, given.rounds, device)


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


def steering_older(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
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
    ways: dict[str, Callable[[], Any]] = {"floor": lambda: run(hf), "steering-vectors 0.12.2, steered": steered}
    ways["repeng 0.4.0, steered"] = lambda: run(mutated)
    return timed("generation", ways, given.rounds, device)


def extraction_newer(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
    from hidden_directions.extract.refusal import _collect_last_token_acts  # pyright: ignore[reportMissingImports]
    from saklas.core.capture import _encode_and_capture_all_batch  # pyright: ignore[reportMissingImports]
    from steerkit import extract_activations  # pyright: ignore[reportMissingImports]
    from steerkit.data import ContrastPair  # pyright: ignore[reportMissingImports]
    from steerkit.models import ModelHandle  # pyright: ignore[reportMissingImports]
    from transformer_lens.model_bridge import TransformerBridge

    hf, tokenizer = make_hf("qwen2", size, device), make_tokenizer(size=size)
    own = make_hf("qwen2", size, device), make_tokenizer(size=size)
    lens = TransformerBridge.boot_transformers(size.directory, hf_model=own[0], tokenizer=own[1])
    prompts = make_prompts(given.prompts, seed=0, own=10), make_prompts(given.prompts, seed=1, own=20)
    everything = [*prompts[0], *prompts[1]]
    rows = tokenizer(everything)["input_ids"]
    halves = [(text.partition(" ")[0], text.partition(" ")[2]) for text in everything]
    pairs = [
        ContrastPair(a[0], a[1], b[1]) for a, b in zip(halves[: given.prompts], halves[given.prompts :], strict=True)
    ]
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
        "saklas 5.3.0, its batch of captured rows alone (1 position)": of_saklas,
        "steerkit 0.3.0 on a Bridge, batches of 32 (1 position)": lambda: extract_activations(
            pairs, handle, batch_size=32
        ),
        "steerkit 0.3.0 on a Bridge, its default of 8 (1 position)": lambda: extract_activations(pairs, handle),
        "hidden-directions 0.1.6, one prompt at a time (1 position)": quietly(of_hidden_directions),
    }
    theirs = torch.cat([found[size.layers - 2] for found in of_saklas()])
    ours = torch.cat(of_hidden_directions())[:, size.layers - 2].to(theirs)
    assert (theirs - ours).norm(dim=-1).max() < 1e-3 * ours.norm(dim=-1).min(), "they read other tokens"
    return timed("extraction", ways, given.rounds, device)


def steering_newer(size: Size, given: Given, device: torch.device, folder: Path) -> list[Row]:
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
    ways: dict[str, Way] = {"floor": run, "saklas 5.3.0, steered": lambda: of_saklas("1.0 random")}
    ways["saklas 5.3.0, untreated"] = lambda: of_saklas(None)
    return timed("generation", ways, given.rounds, device)


# --- The table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What is measured in one go: one process after another, in the environments named, with a folder in common.

    Args:
        tables: that it has rows of; what: of whom, where there are none.
        seconds: about, on SmolLM2-135M: once, and each round.
    """

    processes: Mapping[str, Callable[[Size, Given, torch.device, Path], list[Row]]]
    tables: tuple[str, ...]
    what: str
    seconds: tuple[int, int]


PARTS: Mapping[str, Part] = {
    "extraction": Part({"here": extraction_here}, ("extraction",), "**ours**", (90, 45)),
    "extraction, transformers 4": Part({"older": extraction_older}, ("extraction",), "steering-vectors, repeng",
                                       (60, 30)),
    "extraction, transformers 5": Part({"newer": extraction_newer}, ("extraction",),
                                       "saklas, steerkit, hidden-directions", (75, 40)),
    "generation": Part({"here": steering_here}, ("generation",), "**ours**", (75, 25)),
    "generation, transformers 4": Part({"older": steering_older}, ("generation",), "steering-vectors, repeng",
                                       (70, 15)),
    "generation, transformers 5": Part({"newer": steering_newer}, ("generation",), "saklas", (150, 20)),
    "chats": Part({"here": chats_here}, ("chats",), "**ours**", (75, 20)),
    "samples": Part({"here": samples_here}, ("samples",), "**ours**", (25, 10)),
    "hooks": Part({"here": hooks_here}, ("ablation", "reading"), "**ours**", (60, 25)),
    "scores": Part({"lens4": scores_lens4}, ("scores",), "TransformerLens's attribution_patch, and ours", (300, 30)),
    "graph": Part({"here": graph_here, "older": graph_older}, ("graph, every", "graph, kept"),
                  "circuit-tracer, and ours", (150, 40)),
}  # fmt: skip
TABLES = {
    "extraction": ("extraction, all layers", "the floor"),
    "generation": (f"generation, {ROWS} prompts of {PROMPT} tokens, {NEW} new", "Hugging Face's generate"),
    "chats": (f"{ROWS} chats of many lengths, {NEW} new, one answer each",
              "Hugging Face's generate, padded, fused attention"),
    "samples": (f"8 samples of each of 2 prompts, {NEW} new", "Hugging Face's generate, 8 sequences"),
    "ablation": ("ablation at every write, on the Bridge", "a plain forward"),
    "reading": ("a read hook at every layer, on the Bridge", "a plain forward"),
    "scores": ("scores of all nodes against a contrast prompt", "a forward pass"),
    "graph, every": ("graph, a random transcoder at every layer: every active latent of 3 tokens", "a forward pass"),
    "graph, kept": ("the same, the 500 leading latents of a longer prompt", "a forward pass"),
}  # fmt: skip
"""By name: what it is of, and over what."""
WHY = {
    "saklas 5.3.0": "of one position it keeps a fifth; generation is Hugging Face's, with one hook",
    "hidden-directions": "it holds one prompt at a time",
    "steering-vectors": "its default holds one prompt at a time; generation is Hugging Face's, with one hook",
    "repeng": "generation is Hugging Face's, with one module in the model",
    "bare torch hooks": "they are what ours is made of, without the checks",
    "TransformerLens 4.3's `attribution_patch`": "one gradient against five for the default, whose r is higher; the "
    "same gradient here is the row above",
    "Hugging Face's generate": "it is what ours is over",
}
"""Why one can be ahead of ours in time or memory, by the beginning of its name."""


def inside(process: str, options: argparse.Namespace) -> None:
    """One process of a part; its rows go to a file."""
    part, environment = options.part, process
    device, size = device_of("cpu"), real_size(options.weights)
    given, folder = Given(options.rounds, options.prompts), Path(options.folder)
    found = PARTS[part].processes[environment](size, given, device, folder)
    (folder / f"{environment}.json").write_text(json.dumps(found), encoding="utf-8")


def made(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """The rows of a part, or the reason why there are none."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for environment in PARTS[part].processes:
            try:
                python = Path(sys.executable) if environment == "here" else make_environment(options.env, environment)
            except subprocess.CalledProcessError as error:
                return {"reason": f"its environment could not be made (pip ended with {error.returncode})"}
            command = [python, __file__, "--inside", environment, "--part", part, "--folder", folder]
            command += [
                "--weights",
                options.weights,
                "--rounds",
                str(options.rounds),
                "--prompts",
                str(options.prompts),
            ]
            paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True,
                                  env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
            if done.returncode:
                print(done.stderr[-4000:], file=sys.stderr, flush=True)
                lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
                return {"reason": lines[-1][:200] if lines else f"its process ended with {done.returncode}"}
            rows += json.loads((Path(folder) / f"{environment}.json").read_text(encoding="utf-8"))
    return {"rows": rows}


def figure(text: str) -> float:
    """The median of a ratio as it is written."""
    return float(text.split()[0])


def short(text: str) -> str:
    """A ratio with two decimals.

    Example:
        >>> short("1.013 (0.984)")
        '1.01 (.98)'
    """
    each = [float(part) for part in text.replace("(", "").replace(")", "").split()]
    median, least = (f"{x:.1f}" if x >= 10 else f"{x:.2f}".removeprefix("0") for x in each)
    return f"{median} ({least})"


def section(name: str, parts: Mapping[str, Any]) -> str:
    """One table in Markdown, the fastest first, and who is ahead of ours in it."""
    what, base = TABLES[name]
    rows = [row for part in parts.values() for row in part.get("rows", ()) if row["table"] == name]
    rows.sort(key=lambda row: figure(row["over"]))
    lines = [f"| {what} | over {base} | MiB |", "|---|---|---|"]
    for row in rows:
        said = f": {row['said']}" if row.get("said") else ""
        lines.append(f"| {row['name']}{said} | {short(row['over'])} | {float(row['MiB']):,.0f} |")
    for part, about in PARTS.items():
        if name in about.tables and "rows" not in parts.get(part, {}):
            reason = parts.get(part, {}).get("reason", "not run yet").replace("|", "/")
            lines.append(f"| {about.what} | not made: {reason} | |")
    return "\n".join([*lines, "", said_of(rows)])


def said_of(rows: list[Row]) -> str:
    """Who is ahead of ours in time and in memory, and why; of ours the best of each counts."""
    ours = [row for row in rows if row["name"].startswith("**")]
    others = [row for row in rows if not row["name"].startswith("**")]
    if not ours:
        return "Ours is missing, so nothing is compared."
    if not others:
        return f"Nobody else has this; ours is {min(figure(row['over']) for row in ours):.2f} of the floor."
    found = []
    for what, value in (("faster", lambda row: figure(row["over"])), ("smaller", lambda row: float(row["MiB"]))):
        bar = (1 - EVEN) * min(value(row) for row in ours)
        ahead = [row["name"] for row in others if value(row) < bar]
        each = [f"{name} ({why(name)})" for name in ahead]
        found.append(f"Nobody is {what}." if not each else f"{what.capitalize()}: {'; '.join(each)}.")
    return " ".join(found)


def why(name: str) -> str:
    """The reason that is known."""
    return next((reason for begin, reason in WHY.items() if name.startswith(begin)), "no reason is known yet")


def page(kept: Mapping[str, Any]) -> str:
    """What stands between the marks."""
    one = kept["settings"]
    head = (
        f"{one['model']}, float32, one thread, {one['rounds']} rounds (graphs at most 2), {one['prompts']} prompts "
        "of each class; median, and in brackets the least, over the floor of its own process. MiB: beyond the "
        f"weights. Less than {EVEN:.0%} apart is the same."
    )
    return "\n\n".join([head, *(section(name, kept["parts"]) for name in TABLES)])


def saved(path: Path, kept: Mapping[str, Any]) -> None:
    """Written whole, or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    beside.replace(path)


def main() -> None:
    """Make what is missing of the table, part by part, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path(".venv-peers"), help="where the environments are made")
    parser.add_argument("--weights", required=True, help="a directory with a real model: a Llama")
    parser.add_argument("--table", type=Path, default=Path("peers.json"), help="where finished parts are kept")
    parser.add_argument("--write", type=Path, help="put the table between its marks in this file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16, help="of each class, to extract from")
    parser.add_argument("--only", choices=tuple(PARTS), nargs="+", default=list(PARTS), help="parts to make")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options.inside, options)
    name = Path(options.weights).absolute().name
    settings = {"model": name, "rounds": options.rounds, "prompts": options.prompts}
    kept: dict[str, Any] = {"settings": settings, "parts": {}}
    if options.table.exists():
        kept = json.loads(options.table.read_text(encoding="utf-8"))
        if kept["settings"] != settings:
            raise SystemExit(
                f"{options.table} is of {kept['settings']}, and this run of {settings}; give another --table"
            )
    wanted = [part for part in options.only if "rows" not in kept["parts"].get(part, {})]
    expected = sum(once + each * options.rounds for once, each in (PARTS[part].seconds for part in wanted))
    print(f"{len(wanted)} of {len(PARTS)} parts to make, about {expected / 60:.0f} min for SmolLM2-135M on an idle",
          "machine, more where an environment has to be made first", flush=True)  # fmt: skip
    for part in wanted:
        started = time.perf_counter(), sum(os.times()[2:4])
        kept["parts"][part] = found = made(part, options)
        saved(options.table, kept)
        took, cpu = time.perf_counter() - started[0], sum(os.times()[2:4]) - started[1]
        print(f"{part}: {found.get('reason', 'made')}; {took:.0f} s, {cpu:.0f} s of CPU", flush=True)
    text = page(kept)
    print(text)
    if options.write:
        whole = options.write.read_text(encoding="utf-8")
        before, after = whole.split(BEGIN)[0], whole.split(END)[1]
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
