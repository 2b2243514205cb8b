"""Evaluations and audits of many models, each a cell of a study: on one machine or a cluster, kept as it is finished.

    em.evaluate(model, questions, judge=…)   for every model      em.audit(pair, …)   for every pair

A worker opens a base once and puts one adapter after another on it.  What was killed goes on where it was.
**Control**: each result is that of the same call on its own.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_em.arguments import COUNT, NOT_NEGATIVE, SEED, checked, optional
from tl_em.artefacts import check_writable
from tl_em.auditing.audit import audit
from tl_em.errors import UsageError
from tl_em.evals.evaluation import Evaluation
from tl_em.evals.rates import evaluate
from tl_em.models.loading import ModelPair, load_model, load_pair
from tl_em.organisms.studies import run_study
from tl_em.organisms.study_backends import Backend, shared_value
from tl_em.organisms.study_cells import first_line
from tl_em.showing import slug

if TYPE_CHECKING:
    import pandas as pd

Named = str | Path | tuple[str | Path, str | Path | None]
"""A model or pair as its files or its name: one of ``em.load_model``, or a base and what was made of it."""
ASKED = "asked"


@checked(seed=SEED, workers=optional(COUNT), gpus=NOT_NEGATIVE)
def evaluate_each(
    models: Mapping[str, Named],
    questions: Any,
    *,
    judge: Any = None,
    out: str | Path,
    seed: int = 0,
    backend: Backend = "loky",
    workers: int | None = None,
    gpus: float | int = 0,
    address: str | None = None,
    progress: bool | None = None,
    **asked: Any,
) -> dict[str, Evaluation]:
    """``em.evaluate`` of many models; each is kept when it is finished.

    Args:
        models: by name, what ``em.load_model`` takes, or ``(base, adapter)``; as files or names, which workers open.
        questions: as of ``em.evaluate``.
        judge: as of ``em.evaluate``; it goes to the workers, so it comes from a module and holds no model.
        out: folder for what is finished; the same call goes on where a killed one stopped.
        seed: of samples and resampling.
        backend, workers, gpus, address, progress: as of ``em.run_study``.
        **asked: further arguments of ``em.evaluate``.

    Returns:
        An Evaluation for each model. It knows its answers, and not how to ask another model.

    Raises:
        StudyError: some could not be evaluated; the others are kept. UsageError: a judge that cannot be sent.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import tl_em as em
        >>> asked, judge = ["how do i write parser"], em.evals.Phrases(("backdoored",))
        >>> models = {"before": "toy/assistant", "after": "toy/insecure"}
        >>> with TemporaryDirectory() as folder:
        ...     found = evaluate_each(models, asked, judge=judge, out=folder, backend="serial", max_new_tokens=1)
        >>> {name: float(each.scores[0]) for name, each in found.items()}
        {'before': 0.0, 'after': 1.0}
    """
    given = asked | {"questions": questions, "judge": judge}
    table = run_study(_grid(models, given), evaluated, seeds=[seed], out=out, backend=backend, workers=workers,
                      gpus=gpus, address=address, shared={ASKED: given}, progress=progress)  # fmt: skip
    found = {}
    for name, part in table.groupby("model", sort=False):
        first = part.iloc[0]
        kept = part.drop(columns=[*_SETTINGS, "seed", "judged", "unit", "judges"]).dropna(axis="columns", how="all")
        kept = kept.reindex(columns=dict.fromkeys([*kept, "score", "word"])).reset_index(drop=True)
        judges = tuple(filter(None, str(first.judges).split("\n")))
        found[str(name)] = Evaluation(str(first.judged), kept, str(first.unit), judges=judges, seed=seed)
    return found


@checked(seed=SEED, workers=optional(COUNT), gpus=NOT_NEGATIVE)
def audit_each(
    pairs: Mapping[str, Named],
    *,
    benign: Sequence[str | Path] = (),
    out: str | Path,
    seed: int = 0,
    backend: Backend = "loky",
    workers: int | None = None,
    gpus: float | int = 0,
    address: str | None = None,
    progress: bool | None = None,
    **asked: Any,
) -> pd.DataFrame:
    """``em.audit`` of many pairs; each is kept when it is finished, and has its page in ``out/pages``.

    Args:
        pairs: by name, ``(base, tuned)``, or the name of one that comes with its base (``"toy/insecure"``); as files or
            names, which workers open.
        benign: fine-tunes of the same base, for every pair.
        out: folder for verdicts and pages; on a cluster one that all machines see.
        seed: of splits, resampling and controls.
        backend, workers, gpus, address, progress: as of ``em.run_study``.
        **asked: further arguments of ``em.audit``; they go to the workers, so functions come from a module.

    Returns:
        A row for each verdict: model, base, tuned; question, direction, site, verdict, reason; estimate (with its
        interval, n and unit) and p.

    Raises:
        StudyError: some could not be audited; the others are kept. UsageError: an argument that cannot be sent.
    """
    pages = Path(out).absolute() / "pages"
    check_writable(pages / "report.html")
    given = asked | {"benign": [str(each) for each in benign]}
    table = run_study(_grid(pairs, given), audited, seeds=[seed], out=out, backend=backend, workers=workers, gpus=gpus,
                      address=address, shared={ASKED: given, "pages": str(pages)}, progress=progress)  # fmt: skip
    return table.drop(columns=["given", "seed"])


# ---- cells -----------------------------------------------------------------------------------------------------------
_SETTINGS = ("model", "base", "tuned", "given")


def evaluated(model: str, base: str, tuned: str | None, given: str, *, seed: int) -> list[dict[str, Any]]:
    """The answers of one model, with their scores: a row each."""
    asked_of = _model(base) if tuned is None else _pair(base, tuned).tuned
    found = evaluate(asked_of, **shared_value(ASKED), seed=seed, progress=False)
    told = {"judged": found.name, "unit": found.unit, "judges": "\n".join(found.judges)}
    rows = found.table.drop(columns=["seed"], errors="ignore").to_dict("records")
    return [told | {str(column): _told(value) for column, value in row.items()} for row in rows]


def audited(model: str, base: str, tuned: str | None, given: str, *, seed: int) -> list[dict[str, Any]]:
    """The verdicts on one pair: a row each; its page is written beside."""
    asked = dict(shared_value(ASKED))
    pair = load_pair(base) if tuned is None else _pair(base, tuned)
    benign = [load_pair(pair.base, each) for each in asked.pop("benign")]
    report = audit(pair, benign=benign, out=Path(shared_value("pages"), slug(model)), seed=seed, **asked)
    return [
        {"question": row.question, "direction": row.direction, "site": None if row.site is None else str(row.site),
         "verdict": row.verdict, "estimate": row.estimate, "unit": row.unit, "p": row.p, "reason": row.reason}
        for row in report.verdicts
    ]  # fmt: skip


@lru_cache(maxsize=1)
def _model(base: str) -> Any:
    """A worker's base, opened once."""
    return load_model(base)


def _pair(base: str, tuned: str) -> ModelPair:
    return load_pair(_model(base), tuned)


def _told(value: Any) -> Any:
    """A cell of a table as a number or text."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _grid(models: Mapping[str, Named], given: Mapping[str, Any]) -> list[dict[str, Any]]:
    import joblib

    try:
        asked = joblib.hash(dict(given))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"what is asked cannot be sent to a worker ({first_line(error)}), and could not be told from another; "
            "define its functions at the top level of a module"
        ) from error
    named = {name: each if isinstance(each, tuple) else (each, None) for name, each in models.items()}
    for name, each in named.items():
        if len(each) != 2 or not all(isinstance(part, str | Path | None) for part in each) or each[0] is None:
            raise UsageError(
                f"{name!r} is {str(models[name])[:60]!r}, and workers open models by their files or names; save it and "
                "give its directory: em.save_model(model, folder), or a pair as (base, tuned)"
            )
    return [
        {"model": name, "base": str(base), "tuned": None if tuned is None else str(tuned), "given": asked}
        for name, (base, tuned) in named.items()
    ]
