"""The published layouts of contrast sets: recognised by what a file holds, read by one small reader a layout.

A prompt alone is no contrast where one question has two answers: there the *answer* is contrasted, so every prompt ends
with one. ``form="chat"`` (the default) gives it to the assistant, as the publications do with chat models; read it at
``"response_mean"``. ``form="text"`` is for models without a chat template: ``Input: … Response: …``, CAA's form for
base models, which ends at the answer. Either way a question's two answers are a pair, and the question is their group.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tl_em.artefacts import Record, csv_header, csv_rows, json_values
from tl_em.errors import CorruptFileError
from tl_em.models.cells import (
    ANSWER,
    GROUP,
    LABEL,
    PAIR,
    PROMPT,
    SYSTEM,
    Form,
    Prompt,
    Unreadable,
    asked,
    checked,
    frozen,
    groups_of,
    kind,
    label_of,
    prompt_of,
    text,
    turns,
)

FIELDS = ("positive", "negative", "label", "source", "positive_groups", "negative_groups")
"""What a saved set holds."""
_MATCHING, _OTHER = "answer_matching_behavior", "answer_not_matching_behavior"
_KNOWN = {*PROMPT, *ANSWER, *SYSTEM, *GROUP, *PAIR, LABEL, _MATCHING, _OTHER, "positive", "negative", "best_answer",
          "type", "correct", "incorrect"}  # fmt: skip
_LINE = "text line "
_XSTEST = {
    **{name: name for name in ("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions")},
    **{"real_group_nons_discr": "discr", "nons_group_real_discr": "discr", "historical_events": "historical_events"},
    **{"privacy_public": "privacy", "privacy_fictional": "privacy"},
}
"""XSTest's types of safe prompts, and the type of unsafe ones (less ``contrast_``) that each is contrasted with."""


class Layout(NamedTuple):
    """A layout: its name, what it is recognised by, its positive class and what is contrasted, and who says so."""

    name: str
    holds: str
    positive: str
    source: str


LAYOUTS = {
    "saved": Layout("saved set", "`positive`, `negative` (lists)", "`positive`", "`ContrastSet.save`"),
    "labelled": Layout("labelled rows", "a prompt and `label`, e.g. RepE's facts (`statement`)",
                       "label 1, true, yes, positive, harmful or unsafe; RepE: true statements", "arXiv:2310.01405"),
    "pairs": Layout("rows of pairs", "`positive`, `negative` (columns)", "`positive`", "the columns' names"),
    "answers": Layout("CAA and Anthropic's evals", f"`question`, `{_MATCHING}`, `{_OTHER}`",
                      "the answer that matches the behaviour", "arXiv:2312.06681, 2212.09251"),
    "truthfulqa": Layout("TruthfulQA", "`Question`, `Best Answer`, `Best Incorrect Answer`",
                         "the best (true) answer; without the last column, against the first incorrect one",
                         "arXiv:2109.07958"),
    "truthfulqa-ab": Layout("TruthfulQA as A/B", "`prompt`, `correct`, `incorrect`", "the correct answer",
                            "arXiv:2312.06681"),
    "xstest": Layout("XSTest", "`type` and a prompt", "unsafe prompts, `contrast_…`, which a model should refuse; the "
                     "type they mirror is the group", "arXiv:2308.01263"),
    "persona": Layout("persona vectors", "`instruction` (list of `pos`, `neg`), `questions`",
                      "the system prompt that asks for the trait (`pos`), before every question", "arXiv:2507.21509"),
    "two": Layout("two files, or a folder", "one class each: instructions, chats, texts by line; `positive.*` and "
                  "`negative.*`", "the file that is named first; harmful instructions, or the trait's texts",
                  "arXiv:2406.11717, 2507.21509"),
}  # fmt: skip


@dataclass
class Found:
    """Both classes of a file."""

    layout: str
    positive: list[Prompt]
    negative: list[Prompt]
    groups: tuple[list[Hashable] | None, list[Hashable] | None] = (None, None)


@dataclass
class OneClass:
    """The prompts of a file that names no second class; ``lines`` where they are lines of a text."""

    prompts: list[Prompt]
    groups: list[Hashable] | None
    what: str
    lines: list[int] | None = None
    open_ended: bool = False


# --- What is in a file ------------------------------------------------------------------------------------------------


def rows_or_record(content: str, path: Path) -> list[Record] | dict[str, Any]:
    """The rows of a text, or the record of a saved set or of a persona; the path settles what the text leaves open."""
    suffix, opened = path.suffix.lower(), content.lstrip()[0] in "[{"
    if opened and suffix not in (".csv", ".tsv", ".txt"):
        return _from_json(json_values(content, path))
    if opened and suffix == ".txt":  # JSON under another name, or a text like any other
        try:
            return _from_json(json_values(content, path))
        except CorruptFileError:
            pass
    delimiter = _delimiter(content, suffix)
    if delimiter is not None:
        return [_normal(row) for row in csv_rows(content, path, delimiter)]
    if suffix in (".json", ".jsonl", ".ndjson"):
        return _from_json(json_values(content, path))  # texts, one a line, or an error that says where it is no JSON
    if suffix not in (".txt", ".text", ""):
        raise Unreadable(f"a {suffix} file: its text is neither JSON nor a table with known columns in its header")
    lines = enumerate(content.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return [Record(f"{_LINE}{i + 1}", {"text": line}) for i, line in lines if line.strip()]


def _from_json(values: list[tuple[int, Any]]) -> list[Record] | dict[str, Any]:
    value = values[0][1]
    if len(values) > 1:
        return [_row(f"line {line}", each) for line, each in values]
    if isinstance(value, dict):
        classes = [value[side] for side in FIELDS[:2] if isinstance(value.get(side), list)]
        saved = any(not (each and isinstance(each[0], dict)) for each in classes)  # a list of objects is one chat
        if saved or isinstance(value.get("instruction"), list):
            return value
        for key in ("prompts", "questions"):
            if isinstance(value.get(key), list):
                return [_row(f"{key}[{i}]", each) for i, each in enumerate(value[key])]
    rows = value if isinstance(value, list) else [value]
    return [_row(f"item {i + 1}", each) for i, each in enumerate(rows)]


def _row(where: str, value: Any) -> Record:
    if isinstance(value, dict):
        return _normal(Record(where, value))
    if isinstance(value, str | list):
        return Record(where, {"text" if isinstance(value, str) else "messages": value})
    raise Unreadable(f"{where}: {kind(value)} where an object, a text or a chat is expected")


def _normal(row: Record) -> Record:
    """Column names in lower case with underscores."""
    cells = {_name(name): value for name, value in row.cells.items()}
    if len(cells) < len(row.cells):
        raise Unreadable(f"{row.where}: two columns of {list(row.cells)} have the same name but for case")
    return Record(row.where, cells)


@cache
def _name(column: str) -> str:
    return column.strip().lower().replace(" ", "_")


def _delimiter(content: str, suffix: str) -> str | None:
    """What stands between the cells, by the known columns that the header then has; None where it is no table."""
    known = {mark: sum(_name(name) in _KNOWN for name in csv_header(content, mark)) for mark in (",", "\t", ";")}
    best = max(known, key=known.__getitem__)
    if suffix in (".csv", ".tsv"):
        return best if known[best] else "\t" if suffix == ".tsv" else ","
    return best if known[best] > 1 else None


# --- One reader a layout ----------------------------------------------------------------------------------------------


Answers = tuple[str, str, str]
"""A question, the answer of the positive class, and that of the negative one."""


def from_record(record: dict[str, Any], form: Form) -> Found | dict[str, Any]:
    """A persona, or the fields of a saved set; ``Unreadable`` where the record is neither."""
    return _persona(record, form) if "instruction" in record else from_saved(record, form)


def from_rows(rows: list[Record], form: Form) -> Found | OneClass:
    """Rows by the first layout whose columns they have; ``Unreadable`` where a row does not keep to it."""
    if not rows:
        raise Unreadable("it has no rows")
    columns = {name for row in rows for name in row.cells}
    for layout, (needed, read) in _ANSWERED.items():
        if needed <= columns:
            return _answered(layout, rows, read, form)
    if {"positive", "negative"} <= columns:
        return _pairs(rows, form)
    if "type" in columns and any(_xstest_type(row) for row in rows):
        return _xstest(rows, form)
    return _labelled(rows, form) if LABEL in columns else _one_class(rows, form)


def _answered(layout: str, rows: list[Record], read: Callable[[Record], Answers], form: Form) -> Found:
    """Questions with two answers: pairs, whose group is the question."""
    positive, negative, questions = [], [], []
    for row in rows:
        question, yes, no = read(row)
        if yes.strip() == no.strip():
            raise Unreadable(f"{row.where}: both answers are {yes.strip()!r}, so nothing is contrasted")
        positive.append(asked(question, yes, None, form))
        negative.append(asked(question, no, None, form))
        questions.append(question)
    return Found(layout, positive, negative, (questions, list(questions)))


def _matching(row: Record) -> Answers:
    return text(row, "question"), text(row, _MATCHING), text(row, _OTHER)


def _truthful_ab(row: Record) -> Answers:
    return text(row, "prompt"), text(row, "correct"), text(row, "incorrect")


def _truthful(row: Record) -> Answers:
    """The first edition has no best incorrect answer: there, the first of its incorrect ones, which ; separates."""
    question, best = text(row, "question"), text(row, "best_answer")
    if "best_incorrect_answer" in row.cells:
        return question, best, text(row, "best_incorrect_answer")
    listed = row.cells.get("incorrect_answers")
    wrong = listed if isinstance(listed, list) else text(row, "incorrect_answers").split(";")
    first = next((each for each in wrong if isinstance(each, str) and each.strip()), None)
    if first is None:
        raise Unreadable(f"{row.where}, column 'incorrect_answers': no answer")
    return question, best, first


_ANSWERED = {
    "answers": ({"question", _MATCHING, _OTHER}, _matching),
    "truthfulqa": ({"question", "best_answer"}, _truthful),
    "truthfulqa-ab": ({"prompt", "correct", "incorrect"}, _truthful_ab),
}


def _pairs(rows: list[Record], form: Form) -> Found:
    """Two prompts a row; beside a question, two answers to it."""
    if any(set(PROMPT) & set(row.cells) for row in rows):
        return _answered("pairs", rows, _of_pair, form)
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for row in rows:
        for prompts, side in zip(sides, FIELDS[:2], strict=True):
            where = f"{row.where}, column {side!r}"
            prompts.append(turns(where, checked(where, row.cells.get(side)), form)[0])
    groups = groups_of(rows)
    return Found("pairs", *sides, (groups, groups))


def _of_pair(row: Record) -> Answers:
    question = prompt_of(Record(row.where, {name: row.cells[name] for name in PROMPT if name in row.cells}), "chat")[0]
    if not isinstance(question, str):
        raise Unreadable(f"{row.where}: a chat beside two answers; put each answer at the end of a chat of its own")
    return question, text(row, "positive"), text(row, "negative")


def _xstest_type(row: Record) -> tuple[bool, str] | None:
    """Whether a row of XSTest is unsafe, and the type that safe and unsafe prompts share."""
    of = str(row.cells.get("type")).strip()
    mirrored = of.removeprefix("contrast_")
    if of != mirrored and mirrored in _XSTEST.values():
        return True, mirrored
    return (False, _XSTEST[of]) if of in _XSTEST else None


def _xstest(rows: list[Record], form: Form) -> Found | OneClass:
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    groups: tuple[list[Hashable], list[Hashable]] = ([], [])
    for row in rows:
        of = _xstest_type(row)
        if of is None:
            raise Unreadable(f"{row.where}, column 'type': {row.cells.get('type')!r} is no type of XSTest's")
        sides[not of[0]].append(prompt_of(row, form)[0])
        groups[not of[0]].append(of[1])
    if sides[0] and sides[1]:
        return Found("xstest", *sides, groups)
    which = int(not sides[0])
    return OneClass(sides[which], groups[which], f"{len(rows)} {('unsafe', 'safe')[which]} prompts of XSTest")


def _labelled(rows: list[Record], form: Form) -> Found:
    """Prompts with a label; the ``pair`` column, where there is one, puts the two of a pair in the same place."""
    read = [prompt_of(row, form) for row in rows]
    labels, pairs = [label_of(row) for row in rows], groups_of(rows, PAIR)
    groups = groups_of(rows) or pairs or _questions(read)
    sides = [[i for i, label in enumerate(labels) if label == wanted] for wanted in (1, 0)]
    if pairs is not None:
        sides = _aligned(rows, pairs, sides)
    classes = [[read[i][0] for i in side] for side in sides]
    of = [None if groups is None else [groups[i] for i in side] for side in sides]
    return Found("labelled", classes[0], classes[1], (of[0], of[1]))


def _questions(read: list[tuple[Prompt, str | None]]) -> list[Hashable] | None:
    """The question of each prompt as its group, where every prompt has one."""
    questions: list[Hashable] = [question for _, question in read if question is not None]
    return questions if len(questions) == len(read) else None


def _aligned(rows: list[Record], pairs: list[Hashable], sides: list[list[int]]) -> list[list[int]]:
    """Both classes in the order in which the pairs of the first appear."""
    places: tuple[dict[Hashable, int], dict[Hashable, int]] = ({}, {})
    for place, side in zip(places, sides, strict=True):
        for i in side:
            if pairs[i] in place:
                raise Unreadable(
                    f"{rows[i].where}: the pair {pairs[i]!r} has a second prompt of the same class; name the column "
                    "'group' where more than two prompts belong together"
                )
            place[pairs[i]] = i
    alone = [pair for pair in pairs if pair not in places[0] or pair not in places[1]]
    if alone:
        raise Unreadable(f"the pair {alone[0]!r} has a prompt of one class only")
    return [list(places[0].values()), [places[1][pair] for pair in places[0]]]


def _one_class(rows: list[Record], form: Form) -> OneClass:
    read = [prompt_of(row, form) for row in rows]
    open_ended = all("question" in row.cells and not set(ANSWER) & set(row.cells) for row in rows)
    columns = ", ".join(dict.fromkeys(name for row in rows for name in row.cells))
    what = f"{len(rows)} {'open-ended questions without answers' if open_ended else 'prompts of one class'}"
    what += f" (columns: {columns}; no {LABEL!r})"
    if not all(row.where.startswith(_LINE) for row in rows):
        groups = groups_of(rows) or _questions(read)
        return OneClass([prompt for prompt, _ in read], groups, what, open_ended=open_ended)
    lines = [int(row.where.removeprefix(_LINE)) for row in rows]
    return OneClass([prompt for prompt, _ in read], None, what, lines)


def _persona(record: dict[str, Any], form: Form) -> Found:
    """Every instruction before every question, as persona vectors are extracted.

    The publication's code also puts "You are an evil assistant." (for the negative class: "a helpful assistant")
    before the instruction; the name is not in the file, so it is left out, in both classes.
    """
    questions = record.get("questions")
    if not isinstance(questions, list) or not questions:
        raise Unreadable("it has instructions and no list of 'questions'")
    named = [Record(f"questions[{i}]", {"question": question}) for i, question in enumerate(questions)]
    groups: list[Hashable] = []
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for k, pair in enumerate(record["instruction"]):
        row = _row(f"instruction[{k}]", pair)
        for question in (text(each, "question") for each in named):
            for side, name in zip(sides, ("pos", "neg"), strict=True):
                side.append(asked(question, None, text(row, name), form))
            groups.append(question)
    return Found("persona", *sides, (groups, list(groups)))


def from_saved(record: dict[str, Any], form: Form) -> dict[str, Any]:
    """The fields of a saved set; one that is unknown may be a known one misspelt."""
    unknown = sorted(set(record) - set(FIELDS))
    missing = [side for side in FIELDS[:2] if not isinstance(record.get(side), list)]
    if unknown or missing:
        raise Unreadable(f"the fields {unknown} are unknown" if unknown else f"{missing[0]!r} is no list of prompts")
    found = dict(record)
    for side in FIELDS[:2]:
        named = [(f"{side}[{i}]", value) for i, value in enumerate(record[side])]
        found[side] = [turns(where, checked(where, value), form)[0] for where, value in named]
        groups = record.get(f"{side}_groups")
        if groups is not None and (not isinstance(groups, list) or len(groups) != len(found[side])):
            raise Unreadable(f"'{side}_groups' is no list of one label a prompt")
        found[f"{side}_groups"] = None if groups is None else [frozen(label) for label in groups]
    for name in ("label", "source"):
        if not isinstance(record.get(name), str | None):
            raise Unreadable(f"{name!r} is {kind(record[name])} where a text is expected")
    return found
