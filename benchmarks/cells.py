"""What is asked of an architecture on a surface, cell by cell, and what is right by plain transformers.

    load, directory     em.load_model of the model in memory and of its directory
    forward             logits over 128 tokens
    batch, stream       next-token logits and the residual stream of prompts of five lengths, read in one padded batch
    generate            em.generate on two prompts against the uncached reference, token for token
    steered             the same, with a vector added after a middle block; a hand-written hook in the reference
    ablated             logits with a direction removed at every write, and none of it left in the stream
    ablated answers     generation under the same ablation
    weights             the weight form of the ablation; afterwards the weights are what they were

A cell is *equal*, with its largest gap in spreads of the reference's logits, or *refused*, by an error of this package.
"""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from families import Architecture
from judge import Answer, Reference, gap_of, make_tokens, without
from torch import Tensor

import tl_em as em
from tl_em.errors import CacheWarning, TlEmError, WeightEditError
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.stream import next_token_logits

Surface = Literal["bridge", "hooked"]
LONG, NEW = 128, 12
LENGTHS = (5, 17, 40, 96, LONG)
"""Of the padded batch: on both sides of windows and rope boundaries at 16 and 32."""
STARTS = (11, 26)
"""Of generation: 11 + 12 crosses a window of 16 on the way, 26 + 12 begins beyond it and crosses a boundary of 32."""
EQUAL = 1e-4
"""Of the spread. Rounding in float32 gives 1e-6 to 3e-5 over a few layers; what is misread gives 1e-2 and more."""


@dataclass(frozen=True)
class Cell:
    """What one check found."""

    verdict: str
    figure: float | None = None
    note: str = ""


class Undefined(Exception):
    """The right value is not defined here."""


def measured(gap: float, note: str = "") -> Cell:
    return Cell("equal" if gap <= EQUAL else "WRONG", gap, note)


def ids_of(tokens: Sequence[Tensor]) -> list[EncodedPrompt]:
    return [EncodedPrompt.from_ids(each[0].tolist()) for each in tokens]


class Case:
    """An architecture, what is right for it, and what a surface makes of it."""

    def __init__(self, architecture: Architecture, surface: Surface) -> None:
        self.architecture = architecture
        self.surface: Surface = surface
        self.source = architecture.make()
        if architecture.right == "refuse":
            return
        self.right = Reference(self.source)
        room = getattr(self.source.config, "max_position_embeddings", None) or LONG
        lengths = [length for length in LENGTHS if length < room] + [min(room, LONG)] * (room < LONG)
        self.tokens = self.make(lengths[-1], 0)
        self.logits = self.right.logits(self.tokens)
        self.streams = self.right.stream(self.tokens)
        width, self.middle = int(self.streams[0].shape[-1]), len(self.streams) // 2
        random = torch.randn(width, generator=torch.Generator().manual_seed(9))
        self.unit = random / random.norm()
        self.padded = [self.make(length, 20 + length) for length in lengths]
        self.writes = self.right.writes(self.tokens[:, :24]) if self.streams[0].ndim == 3 else []
        chosen = [self._prompt(length) for length in STARTS]
        self.prompts, self.plain = [tokens for tokens, _ in chosen], [answer for _, answer in chosen]

    def make(self, length: int, seed: int) -> Tensor:
        return make_tokens(min(self.right.vocabulary, 200), length, seed)

    def _prompt(self, length: int) -> tuple[Tensor, Answer]:
        """Tokens whose greedy continuation has no near ties and is not one token for ever."""
        tokens = torch.cat([self.make(length, seed) for seed in range(1, 5)])
        found = self.right.greedy(tokens, NEW)
        best = max(range(4), key=lambda i: min(len(set(found[i].ids)), 4) + min(1.0, min(found[i].leads) / 1e-2))
        return tokens[best : best + 1], found[best]

    def load(self, source: Any = None, *, prove: bool = True) -> Any:
        return em.load_model(self.source if source is None else source, surface=self.surface, prove=prove)

    def ablating(self) -> AbstractContextManager[None]:
        """The reference without the direction, at every module that writes."""
        if not self.writes:
            raise Undefined("no modules of the reference add up to the stream")
        return self.right.edited_at_writes(self.writes, without(self.unit))

    @property
    def direction(self) -> em.Direction:
        return em.Direction(self.unit, em.Site(self.middle))

    @cached_property
    def ablated(self) -> Tensor:
        with self.ablating():
            return self.right.logits(self.tokens)

    def right_answers(self) -> list[Answer]:
        return [self.right.greedy(tokens, NEW)[0] for tokens in self.prompts]


def _logits(model: Any, case: Case) -> Tensor:
    with torch.no_grad():
        return model(case.tokens).float()


def forward(case: Case, model: Any) -> Cell:
    return measured(gap_of(_logits(model, case), case.logits))


def directory(case: Case, model: Any) -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        case.source.save_pretrained(folder)
        again = case.load(folder)
        if case.architecture.right == "refuse":
            return Cell("WRONG", None, "loads")
        return measured(gap_of(_logits(again, case), case.logits))


def batch(case: Case, model: Any) -> Cell:
    right = torch.cat([case.right.logits(each)[:, -1] for each in case.padded])
    return measured(gap_of(next_token_logits(model, ids_of(case.padded)), right))


def stream(case: Case, model: Any) -> Cell:
    if case.streams[0].ndim != 3:
        raise Undefined("the reference has several streams")
    found = [case.right.stream(each) for each in case.padded]
    right = torch.stack([torch.stack([layer[0, -1] for layer in each]) for each in found])
    sites = [em.Site(layer) for layer in range(len(case.streams))]
    ours = em.capture(model, ids_of(case.padded), sites, position="prompt_end")
    return measured(float(((ours - right).abs().amax((0, 2)) / right.std((0, 2))).max()))


def answers(case: Case, model: Any, *interventions: Any) -> list[str]:
    with em.intervene(model, *interventions) if interventions else nullcontext():
        return em.generate(model, ids_of(case.prompts), max_new_tokens=NEW)


def same_answers(ours: Sequence[str], right: Sequence[Answer]) -> Cell:
    """Equal token for token, up to a first difference where the reference's own choice is a tie within rounding."""
    ties = []
    for start, text, answer in zip(STARTS, ours, right, strict=True):
        got = tuple(map(int, text.split()))
        if got == answer.ids:
            continue
        at = next((k for k, pair in enumerate(zip(got, answer.ids, strict=False)) if pair[0] != pair[1]), len(got))
        lead = answer.leads[min(at, NEW - 1)]
        if lead > 2 * EQUAL or at >= len(got):
            return Cell("WRONG", lead, f"after {start} tokens, differs from token {at} on, which leads by {lead:.1e}")
        ties.append(lead)
    return Cell("equal", max(ties, default=0.0), "a tie within rounding" if ties else "")


def generate(case: Case, model: Any) -> Cell:
    return same_answers(answers(case, model), case.plain)


def steered(case: Case, model: Any) -> Cell:
    size = float(case.streams[case.middle].norm(dim=-1).mean())
    for factor in (3.0, 20.0):
        vector = factor * size * case.unit
        with case.right.edited_after(case.middle, lambda x, v=vector: x + v.to(x.dtype)):
            right = case.right_answers()
        if [each.ids for each in right] != [each.ids for each in case.plain]:
            return same_answers(answers(case, model, em.Add(em.Direction(vector, em.Site(case.middle)))), right)
    raise Undefined("steering changes no answer of the reference")


def ablated(case: Case, model: Any) -> Cell:
    sites, prompts = [em.Site(i) for i in range(len(case.streams))], ids_of(case.prompts)
    before = em.capture(model, prompts, sites, position="prompt_end")
    with em.intervene(model, em.Ablate(case.direction)):
        after, logits = em.capture(model, prompts, sites, position="prompt_end"), _logits(model, case)
    there, left = (
        float(((x @ case.unit).abs() / x.norm(dim=-1)).max()) for x in (before, after)
    )  # of the stream, along the direction
    if there < 1e-2 or left > 1e-5:
        return Cell("WRONG", left, f"of the stream, {left:.1e} lies along the direction after and {there:.1e} before")
    return measured(gap_of(logits, case.ablated), f"changes the logits by {gap_of(case.ablated, case.logits):.1e}")


def ablated_answers(case: Case, model: Any) -> Cell:
    ours = answers(case, model, em.Ablate(case.direction))
    with case.ablating():
        return same_answers(ours, case.right_answers())


def weights(case: Case, model: Any) -> Cell:
    model = case.load(prove=False)
    before, note = _logits(model, case), ""
    try:
        edited = _edited(case, model)
    except WeightEditError as error:
        if "untie_embeddings_" not in str(error):
            raise
        em.untie_embeddings_(model)
        edited, note = _edited(case, model), "untied"
    if not torch.equal(before, _logits(model, case)):
        return Cell("WRONG", gap_of(_logits(model, case), before), "the weights are not what they were")
    return measured(gap_of(edited, case.ablated), note)


def _edited(case: Case, model: Any) -> Tensor:
    with em.interventions.orthogonalized(model, case.direction):
        return _logits(model, case)


CHECKS: dict[str, Callable[[Case, Any], Cell]] = {
    "forward": forward, "directory": directory, "batch": batch, "stream": stream, "generate": generate,
    "steered": steered, "ablated": ablated, "ablated answers": ablated_answers, "weights": weights,
}  # fmt: skip


def check(run: Callable[[], Any]) -> Any:
    """The result of a check, or what it ended in."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = run()
    except TlEmError as error:
        return Cell("refused", None, f"{type(error).__name__}: {_beginning(error)}")
    except Undefined as error:
        return Cell("undefined", None, str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-2:]
        lines = " > ".join(f"{f.filename.split('site-packages/')[-1].split('/tl_em/')[-1]}:{f.lineno}" for f in where)
        return Cell("FOREIGN", None, f"{type(error).__name__}: {_beginning(error)} ({lines})")
    if isinstance(found, Cell) and any(issubclass(each.category, CacheWarning) for each in said or ()):
        return replace(found, note=" ".join([found.note, "uncached"]).strip())
    return found


def _beginning(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def examine(case: Case, names: Sequence[str] = tuple(CHECKS)) -> dict[str, Cell]:
    """All cells of a case, but for side effects."""
    model = check(case.load)
    if isinstance(model, Cell):
        again = {"directory": check(lambda: directory(case, None))} if "directory" in names else {}
        return {"load": model} | again
    if case.architecture.right == "refuse":
        return {"load": Cell("WRONG", None, "loads"), "directory": check(lambda: directory(case, model))}
    shown = cast(Any, em.proof(model))
    found = {"load": measured(shown.forward, f"uncached: {shown.trouble}" if shown.trouble else "")}
    return found | {name: check(lambda name=name: CHECKS[name](case, model)) for name in names}
