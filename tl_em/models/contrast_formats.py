"""The published layouts of contrast sets: recognised by what a file holds, read by one small reader a layout.

A prompt alone is no contrast where one question has two answers: there the *answer* is contrasted, so every prompt ends
with one. ``form="chat"`` (the default) gives it to the assistant, as the publications do with chat models; read it at
``"response_mean"``. ``form="text"`` is for models without a chat template: ``Input: … Response: …``, CAA's form for
base models, which ends at the answer. Either way a question's two answers are a pair, and the question is their group.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from tl_em.models import contrast_rows
from tl_em.models.contrast_rows import ANSWER, LABEL, PAIR, PROMPT, FileRow, Form, Prompt, Unreadable, asked, groups_of

FIELDS = ("positive", "negative", "label", "source", "positive_groups", "negative_groups")
"""What a saved set holds."""
MATCHING, OTHER = "answer_matching_behavior", "answer_not_matching_behavior"
_XSTEST = {
    **{name: name for name in ("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions")},
    **{"real_group_nons_discr": "discr", "nons_group_real_discr": "discr", "historical_events": "historical_events"},
    **{"privacy_public": "privacy", "privacy_fictional": "privacy"},
}
"""XSTest's types of safe prompts, and the type of unsafe ones (less ``contrast_``) that each is contrasted with."""


class ContrastPrompt(NamedTuple):
    """A prompt, its class, and what it belongs with."""

    positive: bool
    prompt: Prompt
    group: Hashable = None


@dataclass
class Found:
    """Both classes of a file."""

    examples: list[ContrastPrompt]
    layout: str

    def fields(self) -> dict[str, Any]:
        """The prompts and groups of a ``ContrastSet``."""
        grouped = all(each.group is not None for each in self.examples)
        found: dict[str, Any] = {}
        for side, wanted in zip(FIELDS[:2], (True, False), strict=True):
            of = [each for each in self.examples if each.positive is wanted]
            found[side] = [each.prompt for each in of]
            found[f"{side}_groups"] = [each.group for each in of] if grouped else None
        return found


@dataclass
class OneClass:
    """The examples of a file that names no second class; ``lines`` where they are lines of a text."""

    examples: list[ContrastPrompt]
    what: str
    lines: tuple[int, ...] = ()
    open_ended: bool = False


def from_record(record: dict[str, Any], form: Form) -> Found | dict[str, Any]:
    """A persona, or the fields of a saved set; ``Unreadable`` where the record is neither."""
    return Found(list(_persona(record, form)), "persona") if "instruction" in record else from_saved(record, form)


def from_rows(rows: list[FileRow], form: Form) -> Found | OneClass:
    """Rows by the first layout whose columns they have; ``Unreadable`` where a row does not keep to it."""
    if not rows:
        raise Unreadable("it has no rows")
    columns = {name for row in rows for name in row.cells}
    for name, layout in LAYOUTS.items():
        if layout.read is not None and layout.columns <= columns:
            found = list(layout.read(rows, form))
            if name == "xstest" and len({each.positive for each in found}) == 1:
                return OneClass(found, f"{len(rows)} {'unsafe' if found[0].positive else 'safe'} prompts of XSTest")
            if found:
                return Found(found, name)
    return _one_class(rows, form)


# --- One reader a layout ----------------------------------------------------------------------------------------------

Answers = Sequence[str]
"""A question, the answer of the positive class, and that of the negative one."""


def _answered(rows: list[FileRow], form: Form, *, read: Callable[[FileRow], Answers]) -> Iterator[ContrastPrompt]:
    """Questions with two answers: pairs, whose group is the question."""
    for row in rows:
        question, yes, no = read(row)
        if yes.strip() == no.strip():
            raise Unreadable(f"{row.where}: both answers are {yes.strip()!r}, so nothing is contrasted")
        yield ContrastPrompt(True, asked(question, yes, None, form), question)
        yield ContrastPrompt(False, asked(question, no, None, form), question)


def _columns(*names: str) -> Callable[[list[FileRow], Form], Iterator[ContrastPrompt]]:
    """A reader of questions whose answers stand in these columns."""
    return partial(_answered, read=lambda row: [row.text(name) for name in names])


def _truthful(row: FileRow) -> Answers:
    """The first edition has no best incorrect answer: there, the first of its incorrect ones, which ; separates."""
    question, best = row.text("question"), row.text("best_answer")
    if "best_incorrect_answer" in row.cells:
        return question, best, row.text("best_incorrect_answer")
    listed = row.cells.get("incorrect_answers")
    wrong = listed if isinstance(listed, list) else row.text("incorrect_answers").split(";")
    first = next((each for each in wrong if isinstance(each, str) and each.strip()), None)
    if first is None:
        raise Unreadable(f"{row.where}, column 'incorrect_answers': no answer")
    return question, best, first


def _pairs(rows: list[FileRow], form: Form) -> Iterator[ContrastPrompt]:
    """Two prompts a row; beside a question, two answers to it."""
    if any(set(PROMPT) & set(row.cells) for row in rows):
        yield from _answered(rows, form, read=_of_pair)
        return
    read: list[ContrastPrompt] = []
    for row in rows:
        for side in FIELDS[:2]:
            where = f"{row.where}, column {side!r}"
            read.append(ContrastPrompt(side == "positive", _turns(where, row.cells.get(side), form)))
    groups = groups_of(rows)
    yield from read if groups is None else [each._replace(group=groups[i // 2]) for i, each in enumerate(read)]


def _of_pair(row: FileRow) -> Answers:
    question = FileRow(row.where, {name: row.cells[name] for name in PROMPT if name in row.cells}).prompt("chat")[0]
    if not isinstance(question, str):
        raise Unreadable(f"{row.where}: a chat beside two answers; put each answer at the end of a chat of its own")
    return question, row.text("positive"), row.text("negative")


def _xstest(rows: list[FileRow], form: Form) -> Iterator[ContrastPrompt]:
    """Prompts by their type, the group being the type that safe and unsafe ones share; none where no type is known."""
    said = [str(row.cells.get("type")).strip() for row in rows]
    unsafe = [of.removeprefix("contrast_") if of.startswith("contrast_") else "" for of in said]
    known = [mirrored in _XSTEST.values() or of in _XSTEST for of, mirrored in zip(said, unsafe, strict=True)]
    for row, of, mirrored, is_type in zip(rows, said, unsafe, known, strict=True):
        if any(known) and not is_type:
            raise Unreadable(f"{row.where}, column 'type': {row.cells.get('type')!r} is no type of XSTest's")
        if is_type:
            yield ContrastPrompt(bool(mirrored), row.prompt(form)[0], mirrored or _XSTEST[of])


def _labelled(rows: list[FileRow], form: Form) -> Iterator[ContrastPrompt]:
    """Prompts with a label; the ``pair`` column, where there is one, puts the two of a pair in the same place."""
    read = [row.prompt(form) for row in rows]
    labels, pairs = [row.label() for row in rows], groups_of(rows, PAIR)
    groups = groups_of(rows) or pairs or _questions(read) or [None] * len(rows)
    for i in range(len(rows)) if pairs is None else _aligned(rows, pairs, labels):
        yield ContrastPrompt(bool(labels[i]), read[i][0], groups[i])


def _questions(read: list[tuple[Prompt, str | None]]) -> Sequence[Hashable] | None:
    """The question of each prompt as its group, where every prompt has one."""
    questions = [question for _, question in read if question is not None]
    return questions if len(questions) == len(read) else None


def _aligned(rows: list[FileRow], pairs: list[Hashable], labels: list[int]) -> Iterator[int]:
    """Rows, those of a pair one after the other, in the order in which the positive ones appear."""
    places: dict[tuple[Hashable, int], int] = {}
    for label in (1, 0):
        for i in (i for i in range(len(rows)) if labels[i] == label):
            if (pairs[i], label) in places:
                raise Unreadable(
                    f"{rows[i].where}: the pair {pairs[i]!r} has a second prompt of the same class; name the column "
                    "'group' where more than two prompts belong together"
                )
            places[pairs[i], label] = i
    alone = [pair for pair in pairs if (pair, 1) not in places or (pair, 0) not in places]
    if alone:
        raise Unreadable(f"the pair {alone[0]!r} has a prompt of one class only")
    for pair, label in places:
        if label:
            yield from (places[pair, 1], places[pair, 0])


def _one_class(rows: list[FileRow], form: Form) -> OneClass:
    read = [row.prompt(form) for row in rows]
    open_ended = all("question" in row.cells and not set(ANSWER) & set(row.cells) for row in rows)
    columns = ", ".join(dict.fromkeys(name for row in rows for name in row.cells))
    what = f"{len(rows)} {'open-ended questions without answers' if open_ended else 'prompts of one class'}"
    what += f" (columns: {columns}; no {LABEL!r})"
    lines = tuple(row.line for row in rows if row.line is not None)
    groups = None if lines else groups_of(rows) or _questions(read)
    examples = [
        ContrastPrompt(True, prompt, None if groups is None else groups[i]) for i, (prompt, _) in enumerate(read)
    ]
    return OneClass(examples, what, lines, open_ended)


def _persona(record: dict[str, Any], form: Form) -> Iterator[ContrastPrompt]:
    """Every instruction before every question, as persona vectors are extracted.

    The publication's code also puts "You are an evil assistant." (for the negative class: "a helpful assistant")
    before the instruction; the name is not in the file, so it is left out, in both classes.
    """
    asks = record.get("questions")
    if not isinstance(asks, list) or not asks:
        raise Unreadable("it has instructions and no list of 'questions'")
    questions = [FileRow(f"questions[{i}]", {"question": question}).text("question") for i, question in enumerate(asks)]
    for k, pair in enumerate(record["instruction"]):
        row = FileRow.of(f"instruction[{k}]", pair)
        for question in questions:
            for name in ("pos", "neg"):
                yield ContrastPrompt(name == "pos", asked(question, None, row.text(name), form), question)


def _turns(where: str, value: Any, form: Form) -> Prompt:
    return contrast_rows.turns(where, contrast_rows.checked(where, value), form)[0]


def from_saved(record: dict[str, Any], form: Form) -> dict[str, Any]:
    """The fields of a saved set; one that is unknown may be a known one misspelt."""
    unknown = sorted(set(record) - set(FIELDS))
    missing = [side for side in FIELDS[:2] if not isinstance(record.get(side), list)]
    if unknown or missing:
        raise Unreadable(f"the fields {unknown} are unknown" if unknown else f"{missing[0]!r} is no list of prompts")
    found = dict(record)
    for side in FIELDS[:2]:
        named = [(f"{side}[{i}]", value) for i, value in enumerate(record[side])]
        found[side] = [_turns(where, value, form) for where, value in named]
        groups = record.get(f"{side}_groups")
        if groups is not None and (not isinstance(groups, list) or len(groups) != len(found[side])):
            raise Unreadable(f"'{side}_groups' is no list of one label a prompt")
        found[f"{side}_groups"] = None if groups is None else [contrast_rows.frozen(label) for label in groups]
    for name in ("label", "source"):
        if not isinstance(record.get(name), str | None):
            raise Unreadable(f"{name!r} is {contrast_rows.kind(record[name])} where a text is expected")
    return found


# --- The layouts ------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """A layout: its name, what it is recognised by, its positive class and what is contrasted, and who says so.

    Rows that have the ``columns`` are read by ``read``.
    """

    name: str
    holds: str
    positive: str
    source: str
    columns: frozenset[str] = frozenset()
    read: Callable[[list[FileRow], Form], Iterator[ContrastPrompt]] | None = None


LAYOUTS = {
    "saved": Layout("saved set", "`positive`, `negative` (lists)", "`positive`", "`ContrastSet.save`"),
    "answers": Layout("CAA and Anthropic's evals", f"`question`, `{MATCHING}`, `{OTHER}`",
                      "the answer that matches the behaviour", "arXiv:2312.06681, 2212.09251",
                      frozenset({"question", MATCHING, OTHER}), _columns("question", MATCHING, OTHER)),
    "truthfulqa": Layout("TruthfulQA", "`Question`, `Best Answer`, `Best Incorrect Answer`",
                         "the best (true) answer; without the last column, against the first incorrect one",
                         "arXiv:2109.07958", frozenset({"question", "best_answer"}),
                         partial(_answered, read=_truthful)),
    "truthfulqa-ab": Layout("TruthfulQA as A/B", "`prompt`, `correct`, `incorrect`", "the correct answer",
                            "arXiv:2312.06681", frozenset({"prompt", "correct", "incorrect"}),
                            _columns("prompt", "correct", "incorrect")),
    "pairs": Layout("rows of pairs", "`positive`, `negative` (columns)", "`positive`", "the columns' names",
                    frozenset({"positive", "negative"}), _pairs),
    "xstest": Layout("XSTest", "`type` and a prompt", "unsafe prompts, `contrast_…`, which a model should refuse; the "
                     "type they mirror is the group", "arXiv:2308.01263", frozenset({"type"}), _xstest),
    "labelled": Layout("labelled rows", "a prompt and `label`, e.g. RepE's facts (`statement`)",
                       "label 1, true, yes, positive, harmful or unsafe; RepE: true statements", "arXiv:2310.01405",
                       frozenset({LABEL}), _labelled),
    "persona": Layout("persona vectors", "`instruction` (list of `pos`, `neg`), `questions`",
                      "the system prompt that asks for the trait (`pos`), before every question", "arXiv:2507.21509"),
    "two": Layout("two files, or a folder", "one class each: instructions, chats, texts by line; `positive.*` and "
                  "`negative.*`", "the file that is named first; harmful instructions, or the trait's texts",
                  "arXiv:2406.11717, 2507.21509"),
}  # fmt: skip
"""In the order in which rows are asked whether they are one."""
