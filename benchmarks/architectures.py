"""Which architectures are right, on which surface, in which versions? Every cell: equal, refused, or a fault.

    python benchmarks/architectures.py                          # all, in this environment -> JSON lines
    python benchmarks/architectures.py --only "qwen2 window" --only mpt
    python benchmarks/architectures.py --table a.jsonl b.jsonl  # docs/results/architectures.md

Each architecture (benchmarks/families.py) is loaded from memory and from a directory, on every surface that this
TransformerLens has, and judged by benchmarks/judge.py: plain transformers, without a cache.  Each runs in a process of
its own under benchmarks/guard.py, where sockets and subprocesses are forbidden.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from families import ARCHITECTURES, Architecture, named
from guard import attempts, changes, environment, state

LONG, NEW = 128, 14
LENGTHS = (5, 17, 40, 96, LONG)
"""Of the padded batch: on both sides of windows and rope boundaries at 16 and 32."""
STARTS = (12, 26, 40)
"""Of generation: 12 + 14 crosses a window of 16 on the way, 26 + 14 a boundary of 32; 40 begins beyond both."""
EQUAL = 1e-4
"""Of the spread. Rounding in float32 gives 1e-6 to 3e-5 over a few layers; what is misread gives 1e-2 and more."""
SURFACES = ("bridge", "hooked") if int(version("transformer-lens").split(".")[0]) < 4 else ("bridge",)
CELLS = ("load", "directory", "forward", "batch", "stream", "generate", "steered", "ablated", "ablated answers", "weights", "effects")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What one check found."""

    verdict: str
    figure: float | None = None
    note: str = ""


class Undefined(Exception):
    """The right value is not defined here."""


# --- One architecture -------------------------------------------------------------------------------------------------


class Case:
    """An architecture, what is right for it, and what a surface makes of it."""

    def __init__(self, architecture: Architecture, surface: str) -> None:
        import torch
        from judge import Reference, make_tokens

        self.architecture, self.surface = architecture, surface
        self.source = architecture.make()
        if architecture.right == "refuse":
            return
        self.right = Reference(self.source)
        room = getattr(self.source.config, "max_position_embeddings", None) or LONG
        self.lengths = [length for length in LENGTHS if length < room] + [min(room, LONG)] * (room < LONG)
        self.tokens = make_tokens(min(self.right.vocabulary, 200), self.lengths[-1])
        self.logits = self.right.logits(self.tokens)
        self.streams = self.right.stream(self.tokens)
        self.width = int(self.streams[0].shape[-1])
        self.middle = len(self.streams) // 2
        self.random = torch.randn(self.width, generator=torch.Generator().manual_seed(9))
        self.unit = self.random / self.random.norm()
        self.prompts = [self._prompt(length) for length in STARTS]
        self.writes = self.right.writes(self.tokens[:, :24]) if self.streams[0].ndim == 3 else []

    def _prompt(self, length: int) -> Any:
        """Tokens whose greedy continuation has no near ties and is not one token for ever."""
        from judge import make_tokens, spread_of

        tried = []
        for seed in range(1, 5):
            tokens = make_tokens(min(self.right.vocabulary, 200), length, seed)
            ids, lead = self.right.greedy(tokens, NEW)
            tried.append((min(len(set(ids)), 4) + min(1.0, lead / (1e-2 * spread_of(self.logits))), tokens))
            if tried[-1][0] > 3.9:
                break
        return max(tried, key=lambda each: each[0])[1]

    def load(self, source: Any = None) -> Any:
        import tl_em as em

        return em.load_model(self.source if source is None else source, surface=self.surface)  # type: ignore[arg-type]


def forward(case: Case, model: Any) -> Cell:
    import torch
    from judge import gap_of

    with torch.no_grad():
        return measured(gap_of(model(case.tokens).float(), case.logits))


def directory(case: Case, model: Any) -> Cell:
    import torch
    from judge import gap_of

    with tempfile.TemporaryDirectory() as folder:
        case.source.save_pretrained(folder)
        again = case.load(folder)
        with torch.no_grad():
            return measured(gap_of(again(case.tokens).float(), case.logits))


def batch(case: Case, model: Any) -> Cell:
    import torch
    from judge import gap_of, make_tokens

    from tl_em.models.capture import next_token_logits
    from tl_em.models.prompts import EncodedPrompt

    tokens = [make_tokens(min(case.right.vocabulary, 200), length, 20 + length) for length in case.lengths]
    right = torch.cat([case.right.logits(each)[:, -1] for each in tokens])
    ours = next_token_logits(model, [EncodedPrompt.from_ids(each[0].tolist()) for each in tokens])
    return measured(gap_of(ours, right))


def stream(case: Case, model: Any) -> Cell:
    import torch
    from judge import make_tokens

    import tl_em as em
    from tl_em.models.prompts import EncodedPrompt

    if case.streams[0].ndim != 3:
        raise Undefined("the reference has several streams")
    tokens = [make_tokens(min(case.right.vocabulary, 200), length, 20 + length) for length in case.lengths]
    found = [case.right.stream(each) for each in tokens]
    right = torch.stack([torch.stack([layer[0, -1] for layer in each]) for each in found])
    sites = [em.Site(layer) for layer in range(len(case.streams))]
    ours = em.capture(model, [EncodedPrompt.from_ids(t[0].tolist()) for t in tokens], sites, position="prompt_end")
    return measured(float(((ours - right).abs().amax((0, 2)) / right.std((0, 2))).max()))


def answers(case: Case, model: Any, interventions: Sequence[Any] = ()) -> list[str]:
    import tl_em as em
    from tl_em.models.prompts import EncodedPrompt

    prompts = [EncodedPrompt.from_ids(tokens[0].tolist()) for tokens in case.prompts]
    if not interventions:
        return em.generate(model, prompts, max_new_tokens=NEW)
    with em.intervene(model, *interventions):
        return em.generate(model, prompts, max_new_tokens=NEW)


def right_answers(case: Case) -> tuple[list[str], float]:
    from judge import spread_of

    found = [case.right.greedy(tokens, NEW) for tokens in case.prompts]
    return [" ".join(map(str, ids)) for ids, _ in found], min(lead for _, lead in found) / spread_of(case.logits)


def same_answers(ours: Sequence[str], right: Sequence[str], lead: float) -> Cell:
    wrong = [i for i, pair in enumerate(zip(ours, right, strict=True)) if pair[0] != pair[1]]
    if not wrong:
        return Cell("equal", 0.0, f"lead {lead:.1e}")
    first = [
        next((k for k, pair in enumerate(zip(ours[i].split(), right[i].split())) if pair[0] != pair[1]), NEW)
        for i in wrong
    ]
    note = f"{len(wrong)} of {len(right)} answers differ, from token {min(first)} on; prompts of {[STARTS[i] for i in wrong]}"
    return Cell("near tie" if lead < EQUAL else "WRONG", len(wrong) / len(right), note)


def generate(case: Case, model: Any) -> Cell:
    right, lead = right_answers(case)
    return same_answers(answers(case, model), right, lead)


def steered(case: Case, model: Any) -> Cell:
    import tl_em as em

    plain, _ = right_answers(case)
    size = float(case.streams[case.middle].norm(dim=-1).mean())
    for factor in (0.5, 1.5, 5.0):
        vector = factor * size * case.unit
        with case.right.edited_after(case.middle, lambda x, v=vector: x + v.to(x.dtype)):
            right, lead = right_answers(case)
        if right != plain:
            break
    else:
        raise Undefined("steering changes no answer of the reference")
    return same_answers(answers(case, model, [em.Add(em.Direction(vector, em.Site(case.middle)))]), right, lead)


def ablated(case: Case, model: Any) -> Cell:
    import torch
    from judge import gap_of, without

    import tl_em as em
    from tl_em.models.prompts import EncodedPrompt

    direction, sites = em.Direction(case.unit, em.Site(case.middle)), [em.Site(i) for i in range(len(case.streams))]
    prompts = [EncodedPrompt.from_ids(tokens[0].tolist()) for tokens in case.prompts]
    before = em.capture(model, prompts, sites, position="prompt_end")
    with em.intervene(model, em.Ablate(direction)), torch.no_grad():
        after, logits = em.capture(model, prompts, sites, position="prompt_end"), model(case.tokens).float()
    there = float(((before @ case.unit).abs() / before.norm(dim=-1)).max())
    left = float(((after @ case.unit).abs() / after.norm(dim=-1)).max())
    if there < 1e-2 or left > 1e-5:
        return Cell("WRONG", left, f"of the stream, {left:.1e} lies along the direction after and {there:.1e} before")
    if not case.writes:
        return Cell("unjudged", None, "no modules add up to the stream, yet it was ablated")
    with case.right.edited_at_writes(case.writes, without(case.unit)):
        right = case.right.logits(case.tokens)
    return measured(gap_of(logits, right), f"changes the logits by {gap_of(right, case.logits):.1e}")


def ablated_answers(case: Case, model: Any) -> Cell:
    from judge import without

    import tl_em as em

    ours = answers(case, model, [em.Ablate(em.Direction(case.unit, em.Site(case.middle)))])
    if not case.writes:
        return Cell("unjudged", None, "no modules add up to the stream, yet it was ablated")
    with case.right.edited_at_writes(case.writes, without(case.unit)):
        right, lead = right_answers(case)
    return same_answers(ours, right, lead)


def weights(case: Case, model: Any) -> Cell:
    import torch
    from judge import gap_of, without

    import tl_em as em
    from tl_em.errors import WeightEditError

    direction, note = em.Direction(case.unit, em.Site(case.middle)), ""
    model = case.load()
    with torch.no_grad():
        try:
            with em.orthogonalized(model, direction):
                pass
        except WeightEditError as error:
            if "untie_embeddings_" not in str(error):
                raise
            em.untie_embeddings_(model)
            note = "untied"
        before = model(case.tokens).float()
        with em.orthogonalized(model, direction):
            edited = model(case.tokens).float()
        after = model(case.tokens).float()
        with em.intervene(model, em.Ablate(direction)):
            hooked = model(case.tokens).float()
    if gap_of(before, case.logits) > EQUAL:
        return Cell("WRONG", gap_of(before, case.logits), "without an edit already")
    if not torch.equal(before, after):
        return Cell("WRONG", gap_of(after, before), "the weights are not what they were")
    gap = gap_of(edited, hooked)
    if case.writes:
        with case.right.edited_at_writes(case.writes, without(case.unit)):
            gap = max(gap, gap_of(edited, case.right.logits(case.tokens)))
    return measured(gap, note)


def measured(gap: float, note: str = "") -> Cell:
    return Cell("equal" if gap <= EQUAL else "WRONG", gap, note)


CHECKS: dict[str, Callable[[Case, Any], Cell]] = {
    "forward": forward, "directory": directory, "batch": batch, "stream": stream, "generate": generate,
    "steered": steered, "ablated": ablated, "ablated answers": ablated_answers, "weights": weights,
}  # fmt: skip


def check(name: str, run: Callable[[], Any]) -> Any:
    """The result of a check, or what it ended in."""
    from tl_em.errors import TlEmError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run()
    except TlEmError as error:
        return Cell("refused", None, f"{type(error).__name__}: {first_sentence(error)}")
    except Undefined as error:
        return Cell("undefined", None, str(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{f.filename.split('site-packages/')[-1].split('/wt-sweep/')[-1]}:{f.lineno}" for f in frames[-2:]]
        return Cell("FOREIGN", None, f"{type(error).__name__}: {first_sentence(error)} ({' > '.join(where)})")


def first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300]


def examine(architecture: Architecture, surface: str) -> dict[str, Any]:
    """All cells of an architecture on a surface."""
    start, cells = time.monotonic(), {}
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    import sitecustomize  # type: ignore[import-not-found]

    sitecustomize.allowed[:] = ["subprocess.Popen"]  # transformers looks for compilers when some models are made
    case = Case(architecture, surface)
    sitecustomize.allowed.clear()
    tried, before = len(attempts()), state(case.source)
    model = check("load", case.load)
    refused = isinstance(model, Cell)
    cells["load"] = model if refused else Cell("equal" if architecture.right == "text" else "WRONG", None, "loads")
    changed = changes(before, state(case.source))
    if architecture.right == "refuse":
        cells["directory"] = check("directory", lambda: _directory_loads(case))
    elif not refused:
        cells |= {name: check(name, lambda each=each: each(case, model)) for name, each in CHECKS.items()}
    else:
        cells["directory"] = check("directory", lambda: directory(case, None))
    reached = attempts()[tried:]
    note = "; ".join([*(f"changed: {name}" for name in changed), *reached])
    cells["effects"] = Cell("FAULT" if note else "none", len(reached), note)
    return {
        "name": architecture.name,
        "surface": surface,
        "cells": {name: asdict(cell) for name, cell in cells.items()},
        "seconds": round(time.monotonic() - start, 1),
    }


def _directory_loads(case: Case) -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        case.source.save_pretrained(folder)
        case.load(folder)
    return Cell("WRONG", None, "loads")


# --- All of them, each in a process of its own ------------------------------------------------------------------------


def serve(names: Sequence[str], surfaces: Sequence[str], out: Path, limit: float) -> None:
    """Examine each in a fork of this process, which has imported everything once; under the guard."""
    import sitecustomize  # type: ignore[import-not-found]
    import torch

    import tl_em as em

    before = state()
    torch.set_num_threads(1)
    import transformer_lens.model_bridge  # noqa: F401

    try:
        em.load_model(named("gpt2").make())  # the first load imports the rest
    except em.TlEmError:
        pass
    torch.manual_seed(0)
    print(f"# imports changed: {changes(before, state())}; attempted: {attempts()}", flush=True)
    for name in names:
        for surface in surfaces:
            with tempfile.NamedTemporaryFile() as file:
                sitecustomize.allowed[:] = ["os.fork"]
                child = os.fork()
                sitecustomize.allowed.clear()
                if child == 0:
                    _child(name, surface, Path(file.name))
                record = _await(child, Path(file.name), limit) | {"name": name, "surface": surface}
            with out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record | {"versions": versions()}) + "\n")
            _say(record)


def _child(name: str, surface: str, path: Path) -> None:
    try:
        path.write_text(json.dumps(examine(named(name), surface)), encoding="utf-8")
    except BaseException:
        path.write_text(json.dumps({"crash": traceback.format_exc()[-1500:]}), encoding="utf-8")
    finally:
        os._exit(0)


def _await(child: int, path: Path, limit: float) -> dict[str, Any]:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            text = path.read_text(encoding="utf-8")
            return json.loads(text) if text else {"crash": f"the process ended with status {status}"}
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"crash": f"not finished after {limit:.0f} s"}


def _say(record: Mapping[str, Any]) -> None:
    print(f"{record['name']} [{record['surface']}] {record.get('seconds', '')}", flush=True)
    if "crash" in record:
        print("    CRASH " + record["crash"].strip().splitlines()[-1], flush=True)
    for cell, found in record.get("cells", {}).items():
        figure = "" if found["figure"] is None else f"{found['figure']:.1e}"
        print(f"    {cell:16s} {found['verdict']:9s} {figure:8s} {found['note'][:230]}", flush=True)


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("transformer-lens", "transformers", "torch")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="name of an architecture; may be repeated")
    parser.add_argument("--surface", action="append", choices=SURFACES)
    parser.add_argument("--out", type=Path, default=Path("architectures.jsonl"))
    parser.add_argument("--limit", type=float, default=180.0, help="seconds an architecture and surface may take")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.only or [each.name for each in ARCHITECTURES]
    if given.inside:
        serve(names, given.surface or SURFACES, given.out, given.limit)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--inside", *sys.argv[1:]]
        return subprocess.run(command, env=environment(Path(folder)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
