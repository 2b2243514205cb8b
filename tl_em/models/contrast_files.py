"""A contrast set from disk: one file, a folder, or the two files of two classes; and a file of prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl_em.artefacts import csv_header, csv_rows, json_values, read_text
from tl_em.errors import CorruptFileError, EmptyContrastError, FileError, UsageError
from tl_em.models import contrast_rows
from tl_em.models.contrast_formats import FIELDS, LAYOUTS, MATCHING, OTHER, Found, OneClass, from_record, from_rows
from tl_em.models.contrast_rows import FileRow, Form, Prompt, Unreadable, checked, column_name

_KNOWN = {*contrast_rows.PROMPT, *contrast_rows.ANSWER, *contrast_rows.SYSTEM, *contrast_rows.GROUP,
          *contrast_rows.PAIR, contrast_rows.LABEL, MATCHING, OTHER, "positive", "negative", "best_answer", "type",
          "correct", "incorrect"}  # fmt: skip
"""Columns by which a table is known to be one."""
_OPEN = ("open_ended", "open")
_OPPOSITES = (("positive", "negative"), ("harmful", "harmless"), ("unsafe", "safe"), ("insecure", "secure"))


def read_contrast(path: Path, negative: Path | None, form: Form | str) -> dict[str, Any]:
    """Fields of a ``ContrastSet`` from a file, a folder, or the files of two classes; errors as of its ``load``."""
    if form != "chat" and form != "text":
        raise UsageError(f"form={form!r}: there are 'chat' (an answer is the assistant's) and 'text' (no template).")
    if negative is None and path.is_dir():
        label, (path, negative) = path.resolve().name, _in_folder(path)
    else:
        label = path.stem if negative is None else f"{path.stem} against {negative.stem}"
    found = _read_file(path, form)
    if negative is not None:
        found = _joined((path, found), (negative, _read_file(negative, form)))
    if isinstance(found, dict):
        return found
    if isinstance(found, OneClass):
        raise EmptyContrastError(
            f"{path} holds {found.what}, and no second class, so there is no difference to take. {_advice(path, found)}"
        )
    if negative is not None:
        said = f"{path.name} (positive) and {negative.name} (negative), one class each"
    else:
        of = LAYOUTS[found.layout]
        said = f"{path.name}, read as {of.name}; positive: {of.positive} ({of.source})".replace("`", "")
    return found.fields() | {"label": label, "source": said}


def read_prompts(path: str | Path) -> list[Prompt]:
    """A corpus: the ``messages`` or the ``text`` of every row of a file (JSON Lines, JSON, a table, or lines of text).

    Raises:
        FileError, CorruptFileError: it cannot be read, or a row holds neither; by row.
    """
    try:
        rows = _rows_or_record(read_text(path), Path(path))
        if isinstance(rows, dict):
            raise Unreadable("it is one JSON object")
        return [
            checked(f"{row.where}, column 'messages'", row.cells["messages"])
            if "messages" in row.cells
            else row.text("text")
            for row in rows
        ]
    except Unreadable as error:
        raise CorruptFileError(
            f'{path}, {error}. It is no corpus: each row is an object such as {{"messages": […]}} or {{"text": "…"}}.'
        ) from error


def _read_file(path: Path, form: Form) -> Found | OneClass | dict[str, Any]:
    """One file: both classes, one of them, or the fields of a saved set."""
    try:
        document = _rows_or_record(read_text(path), path)
        return from_record(document, form) if isinstance(document, dict) else from_rows(document, form)
    except CorruptFileError as error:
        raise CorruptFileError(f"{error} It does not hold a contrast set that can be read.") from error
    except Unreadable as error:
        raise CorruptFileError(
            f"{path}, {error}. It does not hold a contrast set that can be read: expected JSON "
            '{"positive": […], "negative": […]}, rows (CSV, TSV, JSONL) with prompt and label, or a published layout '
            "(help(em.ContrastSet.load) lists them)."
        ) from error


def _in_folder(folder: Path) -> tuple[Path, Path]:
    """The files ``positive.*`` and ``negative.*`` of a folder."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise FileError(f"The folder {folder} cannot be read ({error}). Pass one that can.") from error
    of = [[path for path in files if path.stem == side] for side in ("positive", "negative")]
    if len(of[0]) == 1 and len(of[1]) == 1:
        return of[0][0], of[1][0]
    names = ", ".join(path.name for path in files[:8]) or "no files"
    raise FileError(
        f"{folder} is a folder without exactly one positive.* and one negative.* ({names}), so it is unknown which "
        "files are the classes. Pass one file, or two: ContrastSet.load(positive_path, negative_path)."
    )


def _joined(*files: tuple[Path, Found | OneClass | dict[str, Any]]) -> Found:
    (path, first), (other, second) = files
    if not isinstance(first, OneClass) or not isinstance(second, OneClass):
        both = path if not isinstance(first, OneClass) else other
        raise UsageError(
            f"{both} holds both classes already, so it is not one of them. Load it alone: "
            f"ContrastSet.load({str(both)!r})."
        )
    lines = first.lines, second.lines
    if len(lines[0]) == len(lines[1]) and lines[0] != lines[1]:
        a, b = next(each for each in zip(*lines, strict=True) if each[0] != each[1])
        raise CorruptFileError(
            f"{path} and {other} have as many prompts, which makes those in the same place pairs, but line {a} of one "
            f"stands beside line {b} of the other. Take the empty lines out of both, or leave them out in both."
        )
    return Found([*first.examples, *(each._replace(positive=False) for each in second.examples)], "two")


def _advice(path: Path, found: OneClass) -> str:
    """The call that loads a contrast; names of files beside this one only help here, nothing is read by them."""
    folder = path.parent
    trait = all(len(list(folder.glob(f"{side}.*"))) == 1 for side in _OPPOSITES[0])
    if trait and path.stem not in _OPPOSITES[0]:
        return f"The texts of the trait lie beside it: ContrastSet.load({str(folder)!r})."
    answered = next((path.with_name(path.name.replace(name, "ab")) for name in _OPEN if name in path.name), path)
    if found.open_ended:
        of = repr(str(answered)) if answered != path and answered.is_file() else "ab_path"
        return (
            "Load the file whose rows also have answer_matching_behavior and answer_not_matching_behavior: "
            f"ContrastSet.load({of})."
        )
    partners = _partners(path)
    call = f"{str(path)!r}, negative_path" if partners is None else ", ".join(repr(str(each)) for each in partners)
    return f"Name the files of both classes, the positive one first: ContrastSet.load({call})."


def _partners(path: Path) -> tuple[Path, Path] | None:
    """The file and one beside it whose name says that it is the opposite; the positive one first."""
    for positive, negative in _OPPOSITES:
        for own, other in ((positive, negative), (negative, positive)):
            partner = path.with_name(path.name.replace(own, other, 1))
            if (path.name.startswith(own) or f"_{own}" in path.name) and partner.is_file():
                return (path, partner) if own == positive else (partner, path)
    return None


# --- What is in a file ------------------------------------------------------------------------------------------------


def _rows_or_record(content: str, path: Path) -> list[FileRow] | dict[str, Any]:
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
        return [FileRow.of(row.where, row.cells) for row in csv_rows(content, path, delimiter)]
    if suffix in (".json", ".jsonl", ".ndjson"):
        return _from_json(json_values(content, path))  # texts, one a line, or an error that says where it is no JSON
    if suffix not in (".txt", ".text", ""):
        raise Unreadable(f"a {suffix} file: its text is neither JSON nor a table with known columns in its header")
    lines = enumerate(content.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return [FileRow(f"text line {i + 1}", {"text": line}, i + 1) for i, line in lines if line.strip()]


def _from_json(values: list[tuple[int, Any]]) -> list[FileRow] | dict[str, Any]:
    value = values[0][1]
    if len(values) > 1:
        return [FileRow.of(f"line {line}", each) for line, each in values]
    if isinstance(value, dict):
        classes = [value[side] for side in FIELDS[:2] if isinstance(value.get(side), list)]
        saved = any(not (each and isinstance(each[0], dict)) for each in classes)  # a list of objects is one chat
        if saved or isinstance(value.get("instruction"), list):
            return value
        for key in ("prompts", "questions"):
            if isinstance(value.get(key), list):
                return [FileRow.of(f"{key}[{i}]", each) for i, each in enumerate(value[key])]
    rows = value if isinstance(value, list) else [value]
    return [FileRow.of(f"item {i + 1}", each) for i, each in enumerate(rows)]


def _delimiter(content: str, suffix: str) -> str | None:
    """What stands between the cells, by the known columns that the header then has; None where it is no table."""
    known = {mark: sum(column_name(name) in _KNOWN for name in csv_header(content, mark)) for mark in (",", "\t", ";")}
    best = max(known, key=known.__getitem__)
    if suffix not in (".csv", ".tsv"):
        return best if known[best] > 1 else None
    return best if known[best] else "\t" if suffix == ".tsv" else ","
