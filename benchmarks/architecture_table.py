"""docs/results/architectures.md from the results of benchmarks/architectures.py: a row an architecture."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from families import ARCHITECTURES

_HEAD = """<!-- Written by `python benchmarks/architectures.py --table`; do not edit. -->
# Architectures

{count} models made from configurations, with random weights, on every surface, in three environments. Norms, biases,
windows and rotary boundaries (at 16 and 32 tokens) matter in them, so that a loader that drops one is seen. What is
right is computed by plain transformers, eager, in float32, without a cache, with hooks of torch written by hand;
nothing of this package takes part in it.

A cell holds the worst of nine checks: logits over 128 tokens, of the model in memory and of its directory; a padded
batch of five lengths; the residual stream in it; two answers of 12 tokens, plain, steered and ablated, token for token;
the logits under an ablation at every write; its weight form. Gaps are the largest difference of log-probabilities, in
*spreads* (standard deviations over the vocabulary) of the reference's logits; up to {bound:g} is rounding.

- a number: every check is equal, and this is the largest gap
- *refused*: `em.load_model` ends in an error of this package, and says why
- letters after a number: that part alone is refused, by such an error: **r** residual stream, **s** steering,
  **a** ablation, **w** its weight form
- **u**: equal, but every token is made by reading the whole text again (a `CacheWarning` says so)
- **?**: the right value is not defined (no parts of the reference add up to its stream)
- **WRONG**, **FOREIGN**: another result, or an error of somebody else's. There should be none

    python benchmarks/architectures.py --out results.jsonl          # in each environment
    python benchmarks/architectures.py --table results.jsonl …      # this page
"""
_LETTERS = {"stream": "r", "steered": "s", "ablated": "a", "ablated answers": "a", "weights": "w"}
_FAULTS = ("WRONG", "FOREIGN")
_REASONS = {
    "not the same function": "the surface is not the same function as the model (proven, so refused)",
    "cannot build a TransformerBridge": "TransformerLens builds no Bridge of it",
    "cannot build a HookedTransformer": "TransformerLens builds no HookedTransformer of it",
    "does not run where": "TransformerLens builds a Bridge of it that does not run",
    "a token sees those that follow": "bidirectional",
    "encoder-decoder": "an encoder-decoder",
    "no logits over its vocabulary|no causal language model|no embedding of tokens|does not run on text tokens": (
        "no language-modelling head, or no text"
    ),
    "could not be taken out alone": "reads images, and its language model cannot be taken out alone",
}


_EFFECTS = """## Side effects

Under a `sitecustomize` that forbids sockets and subprocesses, {loads} loads from memory and as many from a directory,
and the first loads of {processes} processes, which import everything, attempted **{attempted}** of them.

Compared before and after: default dtype and device, threads, modes and random states of torch, NumPy and Python,
warnings, logging, environment, working directory, standard streams, temporary files, classes of the model, the source's
weights, config, modules, hooks and mode. **{changed}** loads left one changed.
"""


class Column(NamedTuple):
    """A surface in an environment."""

    lens: str
    transformers: str
    surface: str

    def __str__(self) -> str:
        surface = {"bridge": "Bridge", "hooked": "HookedTransformer"}[self.surface]
        return f"{surface}, TL {self.lens}, transformers {self.transformers}"


def page(found: Sequence[Mapping[str, Any]], bound: float = 1e-4) -> str:
    """The page as Markdown; where an architecture was run twice, the last run counts."""
    cells: dict[tuple[str, Column], Mapping[str, Any]] = {}
    for each in found:
        if "name" in each:
            cells[each["name"], _column(each)] = each
    columns = sorted({column for _, column in cells})
    parts = [_HEAD.format(count=len(ARCHITECTURES), bound=bound), _counts(cells, columns), _table(cells, columns)]
    return "\n".join([*parts, _refusals(cells, columns), _effects(found, cells)])


def _column(record: Mapping[str, Any]) -> Column:
    versions = record["versions"]
    return Column(versions["transformer-lens"], versions["transformers"], record["surface"])


def _table(cells: Mapping[Any, Any], columns: Sequence[Column]) -> str:
    rows = ["## Every architecture\n", f"| | {' | '.join(map(str, columns))} |", "|---|" + "---|" * len(columns)]
    for each in ARCHITECTURES:
        shown = [_shown(cells.get((each.name, column))) for column in columns]
        rows.append(f"| {each.name} | {' | '.join(shown)} |")
    return "\n".join(rows) + "\n"


def _shown(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "not run"
    if "crash" in record:
        return f"**CRASH** {record['crash'].strip().splitlines()[-1][:60]}"
    found = {name: cell for name, cell in record["cells"].items() if name != "effects"}
    faults = [f"{name} {cell['verdict']}" for name, cell in found.items() if cell["verdict"] in _FAULTS]
    if faults:
        return f"**{', '.join(faults)}**"
    if found["load"]["verdict"] == "refused":
        return "refused"
    worst = max(cell["figure"] for cell in found.values() if cell["figure"] is not None)
    return " ".join([f"{worst:.0e}", *_marks(found)])


def _marks(found: Mapping[str, Any]) -> list[str]:
    refused = {_LETTERS.get(name, name) for name, cell in found.items() if cell["verdict"] == "refused"}
    uncached = any("uncached" in cell["note"] for cell in found.values())
    undefined = any(cell["verdict"] == "undefined" for cell in found.values())
    return sorted(refused) + ["u"] * uncached + ["?"] * undefined


def _counts(cells: Mapping[Any, Any], columns: Sequence[Column]) -> str:
    kinds = ("equal", "refused", "undefined", "WRONG", "FOREIGN")
    rows = ["## Counts\n", f"| | models | load | {' | '.join(f'cells {kind}' for kind in kinds)} |"]
    rows.append("|---" * (len(kinds) + 3) + "|")
    for column in columns:
        records = [record for (_, at), record in cells.items() if at == column]
        loads = sum(r.get("cells", {}).get("load", {}).get("verdict") == "equal" for r in records)
        verdicts = Counter(
            cell["verdict"] for r in records for name, cell in r.get("cells", {}).items() if name != "effects"
        )
        numbers = " | ".join(str(verdicts[kind]) for kind in kinds)
        rows.append(f"| {column} | {len(records)} | {loads} | {numbers} |")
    return "\n".join(rows) + "\n"


def _refusals(cells: Mapping[Any, Any], columns: Sequence[Column]) -> str:
    """Why models are refused, by kind."""
    kinds: dict[str, dict[Column, list[str]]] = defaultdict(lambda: defaultdict(list))
    for (name, column), record in cells.items():
        load = record.get("cells", {}).get("load", {})
        if load.get("verdict") == "refused":
            kinds[_reason(load["note"])][column].append(name)
    rows = ["## Why models are refused\n"]
    for reason, where in sorted(kinds.items()):
        rows += [f"- {reason}", *(f"    - {column}: {', '.join(where[column])}" for column in columns if where[column])]
    return "\n".join(rows) + "\n"


def _reason(note: str) -> str:
    return next((said for pattern, said in _REASONS.items() if re.search(pattern, note)), note[:120])


def _effects(found: Sequence[Mapping[str, Any]], cells: Mapping[Any, Any]) -> str:
    """What loading did beside."""
    effects = {key: each["cells"]["effects"] for key, each in cells.items() if "effects" in each.get("cells", {})}
    faults = [f"- {name}, {column}: {cell['note'][:300]}" for (name, column), cell in effects.items() if cell["note"]]
    first = [each["imports"] for each in found if "imports" in each]
    changed = sorted({f"- {change}" for each in first for change in each["changed"]})
    attempted = sum(int(cell["figure"] or 0) for cell in effects.values())
    attempted += sum(len(each["attempted"]) for each in first)
    rows = [
        _EFFECTS.format(loads=len(effects), attempted=attempted, changed=len(faults), processes=len(first)),
        *faults,
    ]
    return "\n".join([*rows, f"The first loads left {len(changed)}.", *changed, ""])
