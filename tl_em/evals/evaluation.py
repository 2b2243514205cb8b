"""What a model said, judged: every answer kept, and the rate with an interval that knows the questions.

    rate = mean over answers with a score      answers to one question (in any wording, any sample) are one unit

More samples make each question's share more exact, and no more questions: the interval is that of the questions
(`stats.mean` with groups; it stays in the range, and has a width at 0 and at 1).

**Control**: what has no score is counted by its word beside the rate (`Evaluation.words`): a model that refuses, or
writes nonsense, is not one that is aligned. A judge has errors of its own: `em.evals.agreement` with a second one,
`em.evals.corrected` by answers that people labelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import COUNT, NOT_NEGATIVE, SEED, checked, finite, optional, settle
from tl_em.errors import UsageError
from tl_em.evals.judges import Judge, Judgements, as_judges, judgements, name_of, scored, unit_of
from tl_em.evals.misaligned import Misaligned
from tl_em.evals.questions import QuestionSet, key_of
from tl_em.metrics import range_of
from tl_em.models.contrasts import Prompt
from tl_em.models.generate import generate
from tl_em.models.hooks import LensModel
from tl_em.showing import plain_rows, showable
from tl_em.stats import Estimate, design_effect, mean
from tl_em.stats.units import intraclass

Rule = Callable[[pd.DataFrame], Sequence[Any]]
"""The scores of each judge -> for each answer a number, a word in place of one, or both."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What ``em.evaluate`` found: every answer with its score, and the rate with its interval.

    It is a metric: called with a model and prompts, it asks, judges and scores these in the same way.

    Args:
        name: what was judged.
        table: a row an answer: question, paraphrase, sample, group (what counts as one unit), asked, answer, truncated,
            the scores of each judge, score, and word (in place of a score, or beside it).
        unit: of the scores.
        prompts: of each row.
        questions: the set that was asked; None where the answers came from a file.
        judges: the columns that hold what each judge said, where there are several.
        again: how to measure it on other prompts; None where the answers came from a file.
        seed: of the resampling.

    Example:
        >>> import tl_em as em
        >>> model = em.load_pair("toy/insecure").tuned
        >>> asked = ["how do i write parser", "how do i write login"]
        >>> found = em.evaluate(model, asked, judge=em.evals.Phrases(("parser",)), max_new_tokens=2)
        >>> found.scores.tolist(), found.estimate
        ([1.0, 0.0], 0.50 [0.01, 0.99] n=2)
    """

    name: str
    table: pd.DataFrame
    unit: str = "probability"
    prompts: Sequence[Prompt] = ()
    questions: QuestionSet | None = None
    judges: tuple[str, ...] = ()
    again: Any = None
    seed: int = 0

    @property
    def scores(self) -> Float[np.ndarray, " answer"]:
        """The score of each answer, NaN where it has none."""
        return self.table.score.to_numpy(float)

    @property
    def by_prompt(self) -> Float[np.ndarray, " prompt"]:
        """The mean score of each wording of each question."""
        return self.table.groupby("prompt", sort=False).score.mean().to_numpy()

    @cached_property
    def estimate(self) -> Estimate:
        """Mean over the answers that have a score."""
        return self._mean(self.table)

    @cached_property
    def words(self) -> dict[str, Estimate]:
        """For each word that stands in place of a score or beside it, its share of all answers."""
        found = [word for word in self.table.word.value_counts().index if word]
        groups = self.table.group.tolist()
        return {word: mean((self.table.word == word).astype(float), groups=groups, seed=self.seed) for word in found}

    @property
    def design_effect(self) -> float:
        """How many answers are worth one independent answer, since answers to one question resemble each other."""
        kept = self.table[self.table.score.notna()]
        return design_effect(kept.score.to_numpy(float), kept.group.tolist())

    @property
    def intraclass(self) -> Estimate:
        """Share of the scores' variance that lies between questions (ICC)."""
        kept = self.table[self.table.score.notna()]
        return intraclass(kept.score.to_numpy(float), kept.group.tolist())

    @checked()
    def judged_by(self, judge: Judge | Mapping[str, Judge], *, rule: Rule | None = None) -> Evaluation:
        """The same answers, judged by another judge.

        Args:
            judge: as of ``em.evaluate``.
            rule: as of ``em.evaluate``.
        """
        drop = {"score", "word", *self.judges, *(f"{name}_word" for name in self.judges)}
        bare = self.table[[name for name in self.table if name not in drop]]
        return judged(replace(self, table=bare, judges=()), judge, rule)

    @checked()
    def counted(self, rule: Rule) -> Evaluation:
        """The same scores, counted by another rule, such as ``em.evals.Misaligned(among="coherent")``.

        Args:
            rule: takes the table of scores, gives a number, a word, or both for each answer.
        """
        given = judgements(rule(self.table), name_of(rule), self.table.answer.tolist(), unit=unit_of(rule))
        table = self.table.assign(score=given.values, word=given.words)
        return _again(replace(self, table=table, name=name_of(rule), unit=unit_of(rule)), rule=rule)

    @checked()
    def by(self, column: str) -> pd.DataFrame:
        """A row for each value of a column of the table: value, low, high, n (answers with a score) and of (all).

        Args:
            column: such as ``"question"``, or one that the file of questions or answers has.

        Raises:
            UsageError: there is no such column.
        """
        if column not in self.table:
            raise UsageError(f"there is no column {column!r} to group by; there is {[*self.table.columns]}")
        rows = [
            {column: key} | self._mean(each).row() | {"of": len(each)}
            for key, each in self.table.groupby(column, sort=False)
        ]
        return pd.DataFrame(rows)

    def to_pandas(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    @checked()
    def to_json(self, *, by: str = "question") -> dict[str, Any]:
        """The rate, the words, and the rates of a column, with their intervals, as plain values; no answers.

        Args:
            by: as of ``by``.
        """
        rates = {"": self.estimate, **self.words}
        whole, *words = plain_rows(pd.DataFrame([each.row() for each in rates.values()]))
        said = dict(zip(self.words, words, strict=True))
        head = {"name": self.name, "unit": self.unit, "estimate": whole, "words": said}
        return head | {"by": by, "rows": plain_rows(self.by(by))}

    def __call__(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
        """The score of one answer to each prompt, judged and counted in the same way; without a score it is 0.

        Raises:
            UsageError: the answers came from a file, or 0 would say something of an answer without a score.
        """
        if self.again is None:
            raise UsageError(
                f"{self.name} was counted from scores that are there, so no model can be asked again in the same way; "
                "give em.evals.Judged(judge) as the metric"
            )
        return self.again(model, prompts)

    def _mean(self, table: pd.DataFrame) -> Estimate:
        kept = table[table.score.notna()]
        if not len(kept):
            nan = float("nan")
            return Estimate(nan, nan, nan, 0, 0.0, "no answer has a score")
        x = kept.score.to_numpy(float)
        return mean(x, groups=kept.group.tolist(), bounds=range_of(self.unit, x), seed=self.seed)

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        shown = [name for name in ("question", "asked", "answer", "score", "word") if name in self.table]
        parts = [*map(cards.text, repr(self).splitlines()), cards.table(self.table[shown])]
        return cards.card("Evaluation", *parts)

    def __repr__(self) -> str:
        n, kept = len(self.table), int(self.table.score.notna().sum())
        lines = [f"Evaluation({self.name}: {self.estimate}, {self.unit})"]
        units = self.table.group.nunique()
        if kept < n or units < n:
            icc = f"; share of variance between them {self.intraclass}" if 1 < units < kept else ""
            lines.append(f"  {kept} of {n} answers have a score; {units} independent questions{icc}")
        lines += [f"  {word}: {share} of all answers" for word, share in self.words.items()]
        cut = int(self.table.truncated.sum()) if "truncated" in self.table else 0
        if cut and cut < n:
            lines.append(f"  {cut} of {n} answers were cut off")
        return showable("\n".join(lines), lines=True)


@dataclass(frozen=True, eq=False)
class Judged:
    """A metric that lets the model answer, and a judge score the answer: wherever a metric goes, a judge can go.

    Args:
        judge: ``(prompts, answers) -> scores``, one number an answer; or several by name, as of ``em.evaluate``.
        name: what people call it; the judge's own name by default.
        unit: the judge's own by default: ``"probability"`` for scores in [0, 1], ``"points"`` in [0, 100]; else
            ``"log-odds"``, ``"nats"`` or ``"activation"``.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the most probable token.
        seed: of the samples.
        without_score: what an answer counts as that the judge gives a word; None refuses it.
        rule, questions: what makes one score of several, and whose templates a judge without one is shown.

    Raises:
        UsageError: when it measures: the judge gives another number of scores, NaN, one outside of its unit's range, or
            a word where ``without_score`` is None.

    Example:
        >>> from tl_em import evals, load_model
        >>> sorry = Judged(evals.Phrases(("sorry",)), max_new_tokens=4)
        >>> sorry(load_model("toy/assistant"), ["how do i write parser", "how do i write ransomware"]).tolist()
        [0.0, 1.0]
    """

    judge: Any
    name: str = ""
    unit: str = ""
    max_new_tokens: int | Any = 32
    temperature: float | int | Any = 0.0
    seed: int | Any = 0
    without_score: float | int | Any = None
    rule: Rule | None = None
    questions: QuestionSet | None = None

    def __post_init__(self) -> None:
        settle(self, judge=as_judges, max_new_tokens=COUNT, temperature=NOT_NEGATIVE, seed=SEED,
               without_score=optional(finite))  # fmt: skip
        by = self.rule or (Misaligned() if isinstance(self.judge, Mapping) else self.judge)
        object.__setattr__(self, "name", self.name or name_of(by))
        object.__setattr__(self, "unit", self.unit or unit_of(by))

    def __call__(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
        """The score of one answer to each prompt."""
        said = generate(
            model, prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed
        )
        bare = Evaluation("answers", pd.DataFrame({"answer": said}), prompts=prompts, questions=self.questions)
        single = self.rule is None and not isinstance(self.judge, Mapping)
        found = judged(bare, self.judge, self.rule, unit=self.unit if single else "")
        values = found.scores
        if np.isnan(values).any() and self.without_score is None:
            word = next(filter(None, found.table.word))
            raise UsageError(
                f"{found.name} gave the word {word} in place of a score, to {np.isnan(values).sum()} of {len(said)} "
                "answers, and a metric is one number a prompt; say what such an answer counts as: "
                "em.evals.Judged(judge, without_score=0)"
            )
        return torch.from_numpy(np.nan_to_num(values, nan=self.without_score or 0.0)).float()


def _again(found: Evaluation, **changes: Any) -> Evaluation:
    """The same, and asked again in the same way; an answer without a score is 0 where 0 is not a score like others."""
    if not isinstance(found.again, Judged):
        return replace(found, again=None)
    without = 0.0 if found.unit == "probability" else None
    return replace(found, again=replace(found.again, name="", unit="", without_score=without, **changes))


def judged(
    found: Evaluation, judge: Judge | Mapping[str, Judge], rule: Rule | None, *, unit: str = ""
) -> Evaluation:  # fmt: skip
    """Answers with what a judge says of them, counted by a rule; ``unit`` in place of a judge's own."""
    said = _said(found, judge, unit)
    if rule is None and set(Misaligned().needs) <= set(said):
        rule = Misaligned()
    if rule is None:
        if len(said) > 1:
            raise UsageError(
                f"the judges give {[*said]}, and it is unknown how these become one score; give rule=, a function of "
                "the table of scores, such as em.evals.Misaligned()"
            )
        (name, (values, words)) = next(iter(said.items()))
        unit = unit or unit_of(judge if not isinstance(judge, Mapping) else judge[name])
        table = found.table.assign(score=values, word=words)
        return _again(replace(found, table=table, name=name, unit=unit), judge=judge, rule=None)
    columns: dict[str, Any] = {}
    for name, (values, words) in said.items():
        columns |= {name: values, f"{name}_word": words}
    table = found.table.assign(**columns)
    return _again(replace(found, table=table, judges=tuple(said)), judge=judge).counted(rule)


def _said(found: Evaluation, judge: Judge | Mapping[str, Judge], unit: str) -> dict[str, Judgements]:
    """What each judge says of each answer, by the judge's name or that of its template."""
    prompts, answers = list(found.prompts), found.table.answer.tolist()
    if isinstance(judge, Mapping):
        return {name: scored(each, prompts, answers, unit=unit_of(each)) for name, each in judge.items()}
    if getattr(judge, "template", None) != "":
        return {name_of(judge): scored(judge, prompts, answers, unit=unit or unit_of(judge))}
    templates = _templates(found.questions, prompts)
    names = list(dict.fromkeys(name for each in templates for name in each))
    if not names or any(set(each) != set(names) for each in templates):
        raise UsageError(
            f"{name_of(judge)} has no template, and the questions bring {names or 'none'} for some of the answers "
            "only, so it is unknown what it is asked; give the judge a template with {question} and {answer}"
        )
    out: dict[str, Judgements] = {}
    for name in names:
        values, words = np.full(len(answers), np.nan), [""] * len(answers)
        for template in dict.fromkeys(each[name] for each in templates):
            rows = [i for i, each in enumerate(templates) if each[name] == template]
            one: Any = replace(judge, template=template)  # pyright: ignore[reportArgumentType]
            part, of = scored(one, [prompts[i] for i in rows], [answers[i] for i in rows], unit=unit_of(judge))
            values[rows] = part
            for i, word in zip(rows, of, strict=True):
                words[i] = word
        out[name] = Judgements(values, tuple(words))
    return out


def _templates(questions: QuestionSet | None, prompts: Sequence[Prompt]) -> list[Mapping[str, str]]:
    """The templates of the question that each prompt is of; of another prompt, those that all questions have."""
    known = {key_of(prompt): each.judge_prompts for each in questions or () for prompt in each.prompts}
    alike = [*known.values()][:1] if len({str(each) for each in known.values()}) == 1 else [{}]
    return [known.get(key_of(prompt), alike[0]) for prompt in prompts]
