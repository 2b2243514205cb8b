"""What an audit will ask, written down before the tuned model is read, and whether an audit is what was planned.

A plan holds the questions with their words and smallest effects, hashes of every prompt by the part that it is used in,
of behaviours and tuning data, the version of the rule, method, controls and seed, and which models are meant.  No
weights are read for it.  What an audit asks beyond its plan is *exploratory*; what it asks otherwise is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tl_em
from tl_em.arguments import COUNT, SEED, checked
from tl_em.artefacts import json_values, read_text, replacing
from tl_em.auditing.splits import SIDES, Subject, subjects_of
from tl_em.claims.claim import Question, Row
from tl_em.claims.compare import as_questions
from tl_em.claims.questions.backdoor import Trigger
from tl_em.claims.rule import VERSION
from tl_em.directions.methods import as_method
from tl_em.errors import CorruptFileError, OutputError, PlanError, UsageError
from tl_em.metrics import Behaviour, Metric
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair, carried
from tl_em.models.sites import Position
from tl_em.showing import json_shown, showable

SCHEMA = "tl-em/plan/1"
PLANNED, EXPLORATORY = "planned", "exploratory"
MODELS = ("base", "tuned", "benign", "replicates")
PARTS = ("train", "select", "test")


@dataclass(frozen=True, eq=False)
class Plan:
    """What an audit will ask, and when that was written down; ``em.plan`` makes it, ``em.audit(plan=)`` checks it.

    Args:
        asked: all that is checked, as plain values: models by name, questions, directions with the hashes of their
            prompts, method, controls, seed, version of the rule.
        made: when, in UTC.
        version: of tl_em.

    Example:
        >>> import tl_em as em
        >>> written = em.plan("toy/insecure", questions=["level", "use"])
        >>> written.asked["tuned"], list(written.asked["questions"]), len(written.hash)
        ('toy/insecure', ['level', 'use'], 16)
    """

    asked: dict[str, Any]
    made: str
    version: str

    @property
    def hash(self) -> str:
        """Of everything in it, its date included."""
        return digest({"asked": self.asked, "made": self.made, "tl_em": self.version})

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in the file (schema ``tl-em/plan/1``)."""
        return {"schema": SCHEMA, "hash": self.hash, "made": self.made, "tl_em": self.version, "asked": self.asked}

    @checked()
    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write it to a new file, whole or not at all.

        Raises:
            OutputError: there is a plan already, or the path cannot be written.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise OutputError(
                f"{path} is there already, and a plan that is written over was none; pass another path, or "
                "overwrite=True (--overwrite) if nothing was audited by it"
            )
        with replacing(path) as temporary:
            temporary.write_text(json_shown(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            FileError: there is no such file. CorruptFileError: it is no plan, or was changed after it was written.
        """
        values = json_values(read_text(path), path)
        try:
            [(_, found)] = values
            if found["schema"] != SCHEMA:
                raise ValueError(f"its schema is {found['schema']!r}")
            made = cls(found["asked"], found["made"], found["tl_em"])
            if found["hash"] != made.hash:
                raise ValueError(f"it was changed after it was written: its hash is {made.hash}, not {found['hash']}")
            _ = [each.keys() for each in (made.asked["questions"], made.asked["directions"])]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFileError(
                f"{path} is no plan that this version can read ({type(error).__name__}: {error}), so nothing can be "
                "checked against it; take it from where it was kept, or write a new one: em.plan(…, out='plan.json')"
            ) from error
        return made

    @checked()
    def check(self, now: Mapping[str, Any]) -> None:
        """Raise unless an audit asks all that was planned, as it was planned.

        Args:
            now: what it asks, in the form of ``asked``; what it asks besides is exploratory.

        Raises:
            PlanError: it differs; the message has every difference and the call that mends it.
        """
        found = list(_differences(self.asked, now, self.version))
        if found:
            raise PlanError(
                f"this audit is not the one of plan {self.hash} ({self.made}), so its words would not be planned ones: "
                f"{'; '.join(found)}. Ask what was planned, or leave plan= out: then all of it is exploratory"
            )

    @checked()
    def status(self, row: Row) -> str:
        """``"planned"`` or ``"exploratory"``, of a row of the audit."""
        known = self.asked["trigger"] is not None
        if row.question not in ("backdoor", "carrier"):
            known = row.question in self.asked["questions"] and row.direction in self.asked["directions"]
        return PLANNED if known else EXPLORATORY

    @checked()
    def said(self, rows: Sequence[Row]) -> str:
        """What the page says of it."""
        beyond = [f"{row.question} of {row.direction}" for row in rows if self.status(row) == EXPLORATORY]
        also = f" Beyond the plan, and so exploratory: {', '.join(beyond)}." if beyond else ""
        day = self.made[:16].replace("T", " ")
        return f"Planned: questions, prompts, rule and seed stand in plan {self.hash} of {day} UTC.{also}"

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        facts = [(key, self.asked[key]) for key in ("base", "tuned", "controls", "seed", "method")]
        names = [(key, ", ".join(self.asked[key])) for key in ("questions", "directions")]
        return cards.card(f"Plan {self.hash}, {self.made}", cards.facts([*facts, *names]))

    def __repr__(self) -> str:
        asked = ", ".join(self.asked["questions"]), ", ".join(self.asked["directions"])
        return showable(f"Plan {self.hash} of {self.made}: {asked[0]} of {asked[1]}")


@checked(controls=COUNT, seed=SEED)
def plan(
    base: ModelPair | LensModel | str | Path,
    tuned: str | Path | None = None,
    *,
    contrasts: Mapping[str, ContrastSet] | None = None,
    behaviours: Mapping[str, Behaviour | Metric] | None = None,
    benign: Any = None,
    tuning_data: Sequence[Any] | None = None,
    judged: Mapping[str, ContrastSet] | None = None,
    positions: Mapping[str, Position] | None = None,
    trigger: str | None = None,
    other_triggers: Sequence[str] | None = None,
    replicates: Sequence[Any] = (),
    questions: Sequence[Any] | None = None,
    method: Any = "difference_in_means",
    controls: int = 999,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Plan:
    """Write down what an audit will ask, before the tuned model is read; ``em.audit(..., plan=)`` checks it.

    Args:
        base: name or path of the base, or of a toy, whose contrast sets come with it; a loaded base; or a pair.  No
            weights are read.
        tuned: name or path of the tuned model that is meant, as ``em.load_pair`` will get it; any without one.
        benign, replicates: their names, or paths; or pairs.
        contrasts, behaviours, tuning_data, judged, positions: as of ``em.audit``.
        trigger, other_triggers, questions, method, controls, seed: as of ``em.audit``.
        out: JSON file to write.
        overwrite: whether a plan that is there already may be lost.

    Returns:
        A Plan.

    Raises:
        OutputError: ``out`` is there already, or cannot be written.
        UsageError: an unknown method or question, or triggers to compare with and none to compare.
        EmptyContrastError: a contrast set that cannot be split.

    Example:
        >>> import tl_em as em
        >>> em.plan("base-directory", "tuned-directory", questions=["level"], seed=3).asked["seed"]
        3
    """
    pair = base if isinstance(base, ModelPair) else _named(base, tuned)
    judged = judged if judged is not None or contrasts is not None else pair.judged
    models = {"base": pair.base_name, "tuned": pair.tuned_name}
    asked = what_is_asked(
        models | {"benign": names_of(benign), "replicates": names_of(replicates)},
        subjects_of(pair, contrasts, behaviours, judged or {}, positions, seed), as_questions(questions),
        method=as_method("method", method).name, trigger=trigger_of(pair, trigger, other_triggers),
        tuning_data=tuning_data if tuning_data is not None else pair.tuning_data, controls=controls, seed=seed,
    )  # fmt: skip
    made = Plan(asked, datetime.now(timezone.utc).isoformat(timespec="seconds"), tl_em.__version__)
    if out is not None:
        made.save(out, overwrite=overwrite)
    return made


def what_is_asked(
    models: Mapping[str, Any],
    subjects: Sequence[Subject],
    questions: Sequence[Question],
    *,
    method: str,
    trigger: Trigger | None,
    tuning_data: Sequence[Any] | None,
    controls: int,
    seed: int,
) -> dict[str, Any]:
    """All that an audit asks, as plain values: the form in which a plan holds it."""
    return {
        **models,
        "rule": VERSION,
        "questions": {q.name: {"words": list(q.words), "unit": q.unit, "smallest": q.smallest} for q in questions},
        "directions": {q.name: _of_direction(q) for q in subjects},
        "tuning_data": None if tuning_data is None else digest([_plain(row) for row in tuning_data]),
        "trigger": None if trigger is None else trigger.text,
        "other_triggers": [] if trigger is None else list(trigger.others),
        "method": method,
        "controls": controls,
        "seed": seed,
    }


def _of_direction(subject: Subject) -> dict[str, Any]:
    own = subject.chosen_by, subject.judged
    prompts = [[[_plain(p) for p in getattr(each, side)] for side in SIDES] for each in own]
    groups = [[[str(g) for g in getattr(each, f"{side}_groups") or ()] for side in SIDES] for each in own]
    return {
        **{part: _of_prompts(each) for part, each in zip(PARTS, subject.splits, strict=True)},
        "position": str(subject.position),
        "behaviour": f"{subject.judged.metric.name} in {subject.judged.metric.unit}",
        "behaviour_prompts": digest([prompts, groups]),
    }


def _of_prompts(contrast: ContrastSet) -> str:
    groups = [[str(g) for g in each or ()] for each in (contrast.positive_groups, contrast.negative_groups)]
    return digest([contrast.hash, groups])


def _plain(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def digest(values: Any) -> str:
    """Hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def trigger_of(pair: Any, text: str | None, others: Sequence[str] | None) -> Trigger | None:
    """The trigger that was given, or the pair's own, with the tokens that stand in its place."""
    text = text if text is not None else pair.trigger
    if text is None:
        if others and list(others) != list(pair.other_triggers or ()):  # a pair may have these alone
            raise UsageError(f"other_triggers={list(others)} control for a trigger, and there is none; pass trigger=")
        return None
    if others is None:
        others = [mark for mark in pair.other_triggers or () if mark != text]
    return Trigger(text, tuple(others))


def names_of(models: Any) -> list[str]:
    """The names of one model, or of several: pairs have some, and so has a name or a path."""
    given = models if isinstance(models, list | tuple) else [] if models is None else [models]
    return [str(each) if isinstance(each, str | Path) else _name(each) for each in given]


def _name(model: Any) -> str:
    own = getattr(model, "tuned_name", None) or getattr(getattr(model, "cfg", None), "model_name", None)
    return str(own or "a model of yours")


def _named(base: Any, tuned: str | Path | None) -> Any:
    """What a pair is called and carries, of names alone."""
    empty = dict.fromkeys(each.name for each in fields(ModelPair))
    return SimpleNamespace(**empty | carried(base, tuned))


MEND = {
    "seed": "pass seed={0!r}",
    "controls": "pass controls={0!r}",
    "method": "pass method={0!r}",
    "trigger": "pass trigger={0!r}",
    "other_triggers": "pass other_triggers={0!r}",
    "tuning_data": "pass the tuning_data= that were planned",
    "rule": "install tl_em {1}, whose rule it was, or write a new plan",
    "base": "load the base that was planned",
    "tuned": "load the tuned model that was planned",
    "benign": "pass benign= those that were planned",
    "replicates": "pass replicates= those that were planned",
}
FIELDS = {
    "train": "prompts of extraction", "select": "prompts that choose the layer", "test": "prompts that are judged",
    "position": "token", "behaviour": "behaviour", "behaviour_prompts": "prompts of its behaviour",
}  # fmt: skip


def _differences(planned: Mapping[str, Any], now: Mapping[str, Any], version: str) -> Iterator[str]:
    free = {"tuned"} if planned["tuned"] is None else set()
    free |= {"trigger", "other_triggers"} if planned["trigger"] is None else set()  # then a backdoor is exploratory
    for key, mend in MEND.items():
        first, second = planned.get(key), now.get(key)
        if key not in free and not _same(key, first, second):
            call = mend.format(first, version) if first not in (None, []) else f"leave {key}= out"
            yield f"{key}: planned {first!r}, now {second!r} ({call})"
    for key, argument in (("questions", "questions"), ("directions", "contrasts")):
        for name, each in planned[key].items():
            own = now.get(key, {}).get(name)
            if own is None:
                yield f"{name}: planned, now not asked (pass {argument}= with {', '.join(planned[key])})"
                continue
            changed = [field for field in each if each[field] != own.get(field)]
            if changed:
                said = [
                    f"{FIELDS.get(field, field)} planned {each[field]!r}, now {own.get(field)!r}" for field in changed
                ]
                yield f"{name}: {', '.join(said)} (pass in {argument}= what was planned)"


def _same(key: str, planned: Any, now: Any) -> bool:
    if key not in MODELS or planned == now:
        return bool(planned == now)
    both = [each if isinstance(each, list) else [each] for each in (planned, now)]
    return len(both[0]) == len(both[1]) and all(_one(a) == _one(b) for a, b in zip(*both, strict=True))


def _one(name: Any) -> str:
    """A path by what it leads to; a name of the hub, which leads nowhere here, as it is."""
    return str(Path(str(name)).resolve())
