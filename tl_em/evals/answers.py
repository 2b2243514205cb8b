"""What a model answers to a question set: in batches that are fixed beforehand, kept as they are made.

    seed of an answer = SHA-256(seed, question, wording, sample)     batch = up to 64 answers, to prompts of like length

So an answer depends neither on the batch it is in (but for rounding) nor on which other questions are asked; and since
the batches depend on the whole list alone, a run that was killed makes the missing ones as it would have made them: its
answers are those of a run that was not.

**Control**: a folder belongs to one list, one set of settings and one model *as it is hooked*: what the model says
first is kept with the answers and compared before a run goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from tl_em.artefacts import check_writable, read_object, replacing
from tl_em.errors import CorruptFileError, UsageError
from tl_em.evals.questions import QuestionSet, asked_in, key_of, units_in
from tl_em.models.generate import Answered, Sampling, answered, answered_together, check_room
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.stream import next_token_logits

FIRST_TOKENS, TOP, NEAR = 8, 8, 0.05
"""Of what the model says first: tokens, next tokens compared, and how far their log-probabilities may lie apart."""


def answer_table(
    model: LensModel, questions: QuestionSet, *, max_new_tokens: int, seed: int, out: Path | None = None,
    progress: bool | None = None,
) -> tuple[pd.DataFrame, list[Any]]:  # fmt: skip
    """Every answer, a row each, and the prompt of each row.

    Args:
        model: who answers; hooks on it stay in force.
        questions: what is asked.
        max_new_tokens: longest answer, in tokens.
        seed: of the samples.
        out: folder in which each batch is kept.
        progress: a bar; None shows one on a terminal only.

    Returns:
        columns question, paraphrase, sample, prompt (its number), group, asked, seed, answer, truncated, and what the
        questions' file says of them.

    Raises:
        UsageError: samples at temperature 0, or a folder of another evaluation. OutputError: it cannot be written.
        PromptTooLongError: a prompt and its answer do not fit the context.
    """
    table, prompts, temperatures = _to_ask(questions, seed)
    encoded = encode(model, prompts)
    check_room(encoded, int(model.cfg.n_ctx), max_new_tokens)  # of all, before any is answered
    batches = [
        [rows[i] for i in within]
        for temperature in sorted(set(temperatures))
        for rows in [[i for i, own in enumerate(temperatures) if own == temperature]]
        for within in answered_together(model, [encoded[i] for i in rows], max_new_tokens)
    ]
    kept = None if out is None else _Kept(out, _inputs(model, table, encoded[0], temperatures, max_new_tokens))
    answers: dict[int, Answered] = {} if kept is None else kept.found()
    show = sys.stderr.isatty() if progress is None else progress
    if show and len(answers) < len(table):
        said = f"{len(table) - len(answers)} of {len(table)} answers of at most {max_new_tokens} tokens to make"
        tqdm.write(f"{said}; the bar says how long after the first {len(batches[0])}", sys.stderr)
    with tqdm(total=len(table), initial=len(answers), desc="answers", unit="answer", disable=not show) as bar:
        for k, rows in enumerate(batches):
            if set(rows) <= set(answers):
                continue
            new = answered(
                model, [encoded[i] for i in rows], [int(table.seed[i]) for i in rows],
                max_new_tokens=max_new_tokens, sampling=Sampling(temperatures[rows[0]]),
            )  # fmt: skip
            answers |= dict(zip(rows, new, strict=True))
            if kept is not None:
                kept.keep(k, {i: answers[i] for i in rows})
            bar.update(len(rows))
    columns = pd.DataFrame([answers[i] for i in range(len(table))])
    table = pd.concat([table, columns.rename(columns={"text": "answer"})], axis=1)
    if kept is not None:
        kept.finish(table)
    return table, prompts


def _to_ask(questions: QuestionSet, seed: int) -> tuple[pd.DataFrame, list[Any], list[float]]:
    """A row an answer that is wanted, with its prompt and temperature."""
    rows, prompts, temperatures, number = [], [], [], -1
    for question in questions:
        if question.samples > 1 and not question.temperature:
            raise UsageError(
                f"at temperature 0 all {question.samples} samples are the same; pass temperature=1, or samples=1"
            )
        for paraphrase, prompt in enumerate(question.prompts):
            number += 1
            for sample in range(question.samples):
                rows.append((question.id, paraphrase, sample, number, asked_in(prompt)))
                prompts.append(prompt)
                temperatures.append(question.temperature)
    table = pd.DataFrame(rows, columns=["question", "paraphrase", "sample", "prompt", "asked"])
    table.insert(4, "group", units_in(table.question.tolist(), prompts))
    seen: dict[Any, int] = {}
    seeds = []
    for (question, _, sample, *_), prompt in zip(rows, prompts, strict=True):
        key = (seed, question, key_of(prompt), sample)
        seen[key] = seen.get(key, -1) + 1  # one prompt asked twice has two answers
        seeds.append(int.from_bytes(hashlib.sha256(json.dumps([*key, seen[key]]).encode()).digest()[:7], "big"))
    table["seed"] = seeds
    about = {key: value for question in questions for key, value in question.about.items()}
    for key in [key for key, value in about.items() if isinstance(value, str | int | float) and key not in table]:
        by_id = {question.id: question.about.get(key) for question in questions}
        table[key] = [by_id[each] for each in table.question]
    return table, prompts, temperatures


def _inputs(
    model: LensModel, table: pd.DataFrame, first: EncodedPrompt, temperatures: Sequence[float], max_new_tokens: int
) -> dict[str, Any]:
    """All that the answers depend on; of the model, what it says first."""
    settings = {"schema": 1, "max_new_tokens": max_new_tokens, "temperatures": sorted(set(temperatures))}
    asked = hashlib.sha256(json.dumps([table.seed.tolist(), list(temperatures)]).encode()).hexdigest()
    likely, tokens = next_token_logits(model, [first])[0].log_softmax(-1).topk(TOP)
    room, sampling = min(FIRST_TOKENS, max_new_tokens), Sampling(temperatures[0])
    said = answered(model, [first], [int(table.seed[0])], max_new_tokens=room, sampling=sampling)[0].text
    after = dict(zip(map(str, tokens.tolist()), likely.tolist(), strict=True))
    return settings | {"asked": asked, "said": said, "next": after}


class _Kept:
    """The folder that answers are kept in: ``asked.json``, a file a batch, and at the end ``answers.parquet``.

    Nothing is written before there are answers: what was asked without any would be of no use to a later run.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any]) -> None:
        self.whole, self.parts, self.record = folder / "answers.parquet", folder / "parts", folder / "asked.json"
        self.inputs = inputs
        check_writable(self.record)
        if self.record.exists():
            self._compare(read_object(self.record), inputs, folder)

    @staticmethod
    def _compare(there: dict[str, Any], here: dict[str, Any], folder: Path) -> None:
        other = [key for key in here if key not in ("next", "said") and there.get(key) != here[key]]
        then = there.get("next", {})
        moved = any(abs(value - then.get(key, value)) > NEAR for key, value in here["next"].items())
        if not other and (moved or not set(then) & set(here["next"]) or there.get("said") != here["said"]):
            other = ["the model, or what is hooked to it"]
        if other:
            raise UsageError(
                f"{folder} holds the answers of another evaluation ({', '.join(other)} differs), and a mixture of both "
                "would be of neither; pass another folder as out=, or delete this one"
            )

    def found(self) -> dict[int, Answered]:
        """The answers that are there, by row."""
        if self.whole.exists():
            return dict(enumerate(self._read(self.whole)))
        found: dict[int, Answered] = {}
        for part in sorted(self.parts.glob("[!.]*.parquet")):
            rows = pd.read_parquet(part)["row"].tolist()
            found |= dict(zip(rows, self._read(part), strict=True))
        return found

    @staticmethod
    def _read(path: Path) -> list[Answered]:
        try:
            table = pd.read_parquet(path)
            return [Answered(*row) for row in zip(table.answer.tolist(), table.truncated.tolist(), strict=True)]
        except (OSError, ValueError, AttributeError) as error:
            raise CorruptFileError(f"{path} holds no answers ({error}); delete it, and they are made again") from error

    def keep(self, k: int, answers: dict[int, Answered]) -> None:
        """Write a batch, whole or not at all; before the first one, what was asked."""
        if not self.record.exists():
            with replacing(self.record) as temporary:
                temporary.write_text(json.dumps(self.inputs, indent=1), encoding="utf-8")
        columns = {"row": list(answers), "answer": [a.text for a in answers.values()],
                   "truncated": [a.truncated for a in answers.values()]}  # fmt: skip
        with replacing(self.parts / f"{k:05d}.parquet") as temporary:
            pd.DataFrame(columns).to_parquet(temporary)

    def finish(self, table: pd.DataFrame) -> None:
        """One file in place of the parts."""
        if not self.whole.exists():
            with replacing(self.whole) as temporary:
                table.to_parquet(temporary)
        shutil.rmtree(self.parts, ignore_errors=True)
