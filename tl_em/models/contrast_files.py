"""A contrast set from disk: one file, a folder, or the two files of two classes; and a file of prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl_em.artefacts import read_text
from tl_em.errors import CorruptFileError, EmptyContrastError, FileError, UsageError
from tl_em.models.cells import Form, Prompt, Unreadable, checked, text
from tl_em.models.contrast_formats import LAYOUTS, Found, OneClass, from_record, from_rows, rows_or_record

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
    groups = dict(zip(("positive_groups", "negative_groups"), found.groups, strict=True))
    said = _said(found, path, negative)
    return {"positive": found.positive, "negative": found.negative, "label": label, "source": said, **groups}


def read_prompts(path: str | Path) -> list[Prompt]:
    """A corpus: the ``messages`` or the ``text`` of every row of a file (JSON Lines, JSON, a table, or lines of text).

    Raises:
        FileError, CorruptFileError: it cannot be read, or a row holds neither; by row.
    """
    try:
        rows = rows_or_record(read_text(path), Path(path))
        if isinstance(rows, dict):
            raise Unreadable("it is one JSON object")
        return [
            checked(f"{row.where}, column 'messages'", row.cells["messages"])
            if "messages" in row.cells
            else text(row, "text")
            for row in rows
        ]
    except Unreadable as error:
        raise CorruptFileError(
            f'{path}, {error}. It is no corpus: each row is an object such as {{"messages": […]}} or {{"text": "…"}}.'
        ) from error


def _read_file(path: Path, form: Form) -> Found | OneClass | dict[str, Any]:
    """One file: both classes, one of them, or the fields of a saved set."""
    try:
        document = rows_or_record(read_text(path), path)
        return from_record(document, form) if isinstance(document, dict) else from_rows(document, form)
    except CorruptFileError as error:
        raise CorruptFileError(f"{error} It does not hold a contrast set that can be read.") from error
    except Unreadable as error:
        raise CorruptFileError(
            f"{path}, {error}. It does not hold a contrast set that can be read: expected JSON "
            '{"positive": […], "negative": […]}, rows (CSV, TSV, JSONL) with prompt and label, or a published layout '
            "(help(em.ContrastSet.load) lists them)."
        ) from error


def _said(found: Found, path: Path, negative: Path | None) -> str:
    of = LAYOUTS[found.layout]
    if negative is not None:
        return f"{path.name} (positive) and {negative.name} (negative), one class each"
    return f"{path.name}, read as {of.name}; positive: {of.positive} ({of.source})".replace("`", "")


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
    lines = first.lines or [], second.lines or []
    if len(lines[0]) == len(lines[1]) and lines[0] != lines[1]:
        a, b = next(each for each in zip(*lines, strict=True) if each[0] != each[1])
        raise CorruptFileError(
            f"{path} and {other} have as many prompts, which makes those in the same place pairs, but line {a} of one "
            f"stands beside line {b} of the other. Take the empty lines out of both, or leave them out in both."
        )
    return Found("two", first.prompts, second.prompts, (first.groups, second.groups))


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
