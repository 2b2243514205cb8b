"""The one way to disk: what is written appears whole or not at all, what is read is decoded strictly or refused.

Files are written beside their place and then renamed onto it.  No text is cut at ``str.splitlines``, which also cuts at
U+2028 and U+0085 inside a JSON string and at a line break inside a quoted cell.  Nothing is guessed of a byte that is
not UTF-8, and a key given twice is not one of its values.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from tl_em.errors import CorruptFileError, FileError, OutputError, TlEmError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Made = TypeVar("Made")

# --- Writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; rename it onto ``path`` if the block ends well.

    A symbolic link stays one: what it points at is replaced.

    Raises:
        OutputError: the folder cannot be made or written to.  Whatever stood at ``path`` before is then untouched.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "a" / "note.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> (folder / "a" / "note.txt").read_text()
        'whole'
    """
    target = Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)
    temporary = target.parent / f"{_name_beside(target)}{secrets.token_hex(4)}.tl_em{target.suffix[:20]}"
    try:  # around its making, too: Ctrl-C may fall anywhere
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target.parent)
            mode = _made(temporary)
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            raise OutputError(_message(target, error)) from error
        try:
            yield temporary
            temporary.chmod(mode)  # some writers make a file of their own in its place
            temporary.replace(target)
        except TlEmError:  # of which some are OSErrors, too
            raise
        except OSError as error:
            raise OutputError(_message(target, error)) from error
    finally:
        with suppress(OSError, ValueError):
            temporary.unlink()


@contextmanager
def replacing_folder(path: str | Path, *, overwrite: bool = False, holds: str = "config.json") -> Iterator[Path]:
    """Yield an empty folder beside ``path``; it becomes ``path`` if the block ends well, and is gone if not.

    Args:
        path: of the folder; it may exist and be empty.
        overwrite: let it take the place of one that holds something, if that is one of the same kind.
        holds: a file that every folder of this kind holds, so that no other folder is ever replaced.

    Raises:
        OutputError: something stands there, or nothing can be written there. It is then untouched.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "model"
        >>> with replacing_folder(target) as folder:
        ...     _ = (folder / "config.json").write_text("{}")
        >>> [each.name for each in target.iterdir()]
        ['config.json']
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    check_folder(target, overwrite=overwrite, holds=holds)
    with folder_beside(target) as beside:
        made, before = beside / "made", beside / "before"
        made.mkdir()
        yield made
        try:
            if target.exists():
                target.replace(before)
            made.replace(target)
        finally:
            if before.exists() and not target.exists():
                before.replace(target)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``, on the same disk; it is gone after the block, however that ends.

    One that a killed process left goes when something is next written there.

    Raises:
        OutputError: nothing can be written there, or no more.
    """
    folder = path.parent / f"{_name_beside(path)}{secrets.token_hex(4)}.folder"
    try:
        try:  # twice, since Ctrl-C may fall on the first removal
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path.parent)
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, TlEmError):
            raise OutputError(_message(path, error)) from error
        raise


def check_folder(path: str | Path, *, overwrite: bool = False, holds: str = "config.json") -> None:
    """Raise now, before long work, if :func:`replacing_folder` would refuse ``path``.

    Raises:
        OutputError: something stands there that may not be replaced.
    """
    target = Path(path).expanduser()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not overwrite:
        raise OutputError(
            f"{str(target)!r} exists already, and nothing is written over it, since what it holds may be all there is "
            "of it. Name another folder, or pass overwrite=True where a folder of the same kind may go."
        )
    if not (target / holds).is_file():
        raise OutputError(
            f"{str(target)!r} holds no {holds}, so it is something else than what would take its place, and it is left "
            "alone even with overwrite=True. Name another folder, or empty this one yourself."
        )


_NODE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_SWEPT: set[Path] = set()
_CUT = 100
"""Characters of a file's name that the name of its temporary holds."""


def _made(temporary: Path) -> int:
    """Make an empty file there; the mode that new files have."""
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return stat.S_IMODE(temporary.stat().st_mode)


_TEMPORARY = re.compile(
    r"\.(?P<name>.*)\.(?P<node>[0-9a-f]{8})-(?P<process>[0-9]+)-([0-9a-f]{8}\.tl_em(\..*)?|[a-z0-9_]{8}\.folder)",
    re.DOTALL,
)


def _name_beside(target: Path) -> str:
    """How what is written in place of ``target`` begins: whose it is, since a folder may be shared."""
    return f".{target.name[:_CUT]}.{_NODE}-{os.getpid()}-"


def _sweep(folder: Path) -> None:
    """Temporaries of processes of this machine that were killed go, once a process and folder."""
    if folder in _SWEPT:
        return
    _SWEPT.add(folder)
    for each in folder.iterdir():
        found = _TEMPORARY.fullmatch(each.name)
        if not found or found["node"] != _NODE or _runs(int(found["process"])):
            continue
        if not each.name.endswith(".folder"):
            each.unlink(missing_ok=True)
            continue
        target, made = folder / found["name"], each / "made"
        if (each / "before").exists() and not target.exists():  # killed between the two renames: both are whole
            if len(found["name"]) == _CUT:
                continue  # for whom is not known any more
            made.replace(target)
        shutil.rmtree(each, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether a process of this machine is alive; one that may not be asked is."""
    if process == os.getpid() or os.name == "nt":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Write tensors, and as JSON in the header what they mean, to one safetensors file, whole or not at all.

    Raises:
        OutputError: the path cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    apart = {name: each.cpu().contiguous().clone() for name, each in tensors.items()}  # tied ones too
    with replacing(path) as temporary, folder_beside(temporary.with_name(Path(path).name)) as folder:
        try:  # in a folder, since safetensors makes a temporary of its own beside what it writes
            save_file(apart, made := folder / "tensors", metadata={"tl_em": json.dumps(about)})
        except SafetensorError as error:  # a full disk, say
            raise OutputError(_message(Path(path), error)) from error
        made.replace(temporary)
    return Path(path)


_LOADERS = {"direction": "em.Direction.load", "profile": "em.Profile.load", "dictionary": "em.load_dictionary"}


def load_tensors(
    path: str | Path, schema: str, make: Callable[[dict[str, Tensor], dict[str, Any]], Made], *, damage: str
) -> Made:
    """What ``make`` makes of the tensors and the header that :func:`save_tensors` wrote.

    Args:
        path: of the file.
        schema: the header's ``"schema"``; its second part says what the file holds.
        make: may raise what Python raises for values that are not what they should be.
        damage: what damaged values would do, and the call that mends it.

    Raises:
        CorruptFileError: missing, truncated, changed, or something else.
    """
    from safetensors import SafetensorError, safe_open

    kind = schema.split("/")[1]
    if not os.path.lexists(path):
        raise CorruptFileError(f"{str(path)!r} is not a {kind}: there is no such file. Check the path.")
    try:
        check_file(path)
        with safe_open(str(path), framework="pt") as file:
            about = json_of((file.metadata() or {})["tl_em"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        head, _, rest = str(about["schema"]).partition("/")
        other = rest.split("/")[0] if head == "tl-em" else ""
        if other in ("", kind):
            if about["schema"] != schema:
                raise KeyError(f"schema {about['schema']!r}")
            return make(tensors, about)
    except (SafetensorError, OSError, *DAMAGE, TlEmError) as error:
        raise CorruptFileError(
            f"{path} is not a {kind} that this version can read "
            f"({type(error).__name__}: {error}); {damage}"
        ) from error
    how = f": {_LOADERS[other]}(path)" if other in _LOADERS else ""
    raise CorruptFileError(f"{path} is not a {kind}: it holds a {other}. Read it as that{how}.")


DAMAGE = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError)
"""What Python raises where a file's values are not what they should be."""


def check_ending(path: str | Path, what: str, *endings: str) -> None:
    """Raise unless a file's name ends as what is written in it is called.

    Args:
        path: where it is to be written.
        what: in a few words.
        endings: that it may have, in small letters; capitals count as these.

    Raises:
        UsageError: another ending, or none.

    Example:
        >>> check_ending("a.HTML", "a page", ".html", ".htm")
        >>> check_ending("a.pdf", "a page", ".html", ".htm")
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: 'a.pdf': a page is written as .html or .htm, ...
    """
    if Path(path).suffix.lower() not in endings:
        *others, last = endings
        listed = f"{', '.join(others)} or {last}" if others else last
        raise UsageError(
            f"{Path(path).name!r}: {what} is written as {listed}, and under another name it would be opened as what it "
            f"is not; give a path that ends in {listed}"
        )


def check_writable(path: str | Path) -> None:
    """Raise now, before long work, if ``path`` could not be written at its end.

    Raises:
        OutputError: no file can be made there.
    """
    target = Path(path)
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    reason = None
    if not folder.is_dir():
        reason = NotADirectoryError(f"{folder} is not a directory")
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = PermissionError(f"no permission to write in {folder}")
    elif target.is_dir():
        reason = IsADirectoryError(f"{target} is a directory")
    if reason is not None:
        raise OutputError(_message(target, reason)) from reason


@contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """Around long work of another library that writes into a folder as it goes, and can be called again.

    Raises:
        OutputError: the disk is full, or nothing may be written there; what was finished before is kept.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):  # torch.save's word for it
            raise
        raise OutputError(
            f"cannot write into {folder}: {str(error).splitlines()[0]}; what was finished before is kept. Make room, "
            "and make the same call again: it goes on from there."
        ) from error


def _message(path: Path, error: Exception) -> str:
    return f"cannot write {path}: {error}; nothing was left behind. Pass a path in a folder that you can write to"


# --- Reading ----------------------------------------------------------------------------------------------------------

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like UTF-16's, so it is looked for first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHERS = (
    (b"\x1f\x8b", "is compressed with gzip", "Unpack it first: gunzip FILE"),
    (b"BZh", "is compressed with bzip2", "Unpack it first: bunzip2 FILE"),
    (b"\xfd7zXZ", "is compressed with xz", "Unpack it first: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", "Unpack it first: unzstd FILE"),
    (b"PK\x03\x04", "is a zip archive (a workbook is one, too)", "Unpack it, or save the sheet as CSV in UTF-8"),
    (b"PAR1", "is Parquet", "Write it as JSONL: pandas.read_parquet(a).to_json(b, orient='records', lines=True)"),
)
_ZERO = "a zero byte, so the file is binary, or UTF-16 without a byte-order mark. Save it as UTF-8."
_SPACE = re.compile(r"[ \t\r\n]*")  # JSON's white space: U+2028 and U+0085 are none


class Record(NamedTuple):
    """One record of a file: where it stands, for messages, and its cells by column."""

    where: str
    cells: dict[str, Any]


def read_bytes(path: str | Path) -> bytes:
    """What a file holds.

    Raises:
        FileError: it is missing, may not be read, or is no file: a folder, or a pipe, at which reading would wait.
    """
    try:
        check_file(path)
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise FileError(f"{str(path)[:200]!r} cannot be read ({error}); pass the path of a file") from error


def check_file(path: str | Path) -> None:
    """Raise where reading would wait or never end.

    Raises:
        FileNotFoundError: nothing is there.
        IsADirectoryError: it is a folder.
        FileError: it is a pipe or a device.
    """
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a directory")
    if not stat.S_ISREG(mode):
        raise FileError(
            f"{str(path)[:200]!r} is a pipe or a device and no file, so reading it could wait for ever. Write what "
            "comes out of it to a file first, and pass that."
        )


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark; the mark is no part of it.

    Raises:
        FileError: the file is missing, a folder, or may not be read.
        CorruptFileError: it is empty, compressed, or holds bytes that are no text in its encoding.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = path.write_bytes(codecs.BOM_UTF8 + "naïve".encode())
        >>> read_text(path)
        'naïve'
    """
    data = read_bytes(path)
    encoding = _encoding(data, path)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CorruptFileError(
            f"{path}, line {line}: the byte 0x{data[error.start]:02x} is not text in {encoding} ({error.reason}), and "
            "another encoding would be a guess. Save the file as UTF-8."
        ) from error
    if not text.strip():
        raise CorruptFileError(f"{path} is empty ({len(data)} bytes), so there is nothing to read. Write it again.")
    if "\0" in text:
        raise CorruptFileError(f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: {_ZERO}")
    return text


def lines_of(path: str | Path, *, most: int | None = None) -> Iterator[str]:
    """The lines of a text file, one at a time, as :func:`read_text` would read them; never held whole.

    Args:
        path: of the file.
        most: characters after which a line is cut.

    Raises:
        FileError, CorruptFileError: as :func:`read_text`, when the first line is asked for, or the bad one.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = path.write_bytes("naïve\\r\\n\\u2028cut".encode())
        >>> list(lines_of(path)), list(lines_of(path, most=4))
        (['naïve', '\\u2028cut'], ['naïv', 'e', '\\u2028cut'])
    """
    try:
        check_file(path)
        with Path(path).open("rb") as raw:
            head = raw.read(4)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise FileError(f"{str(path)[:200]!r} cannot be read ({error}); pass the path of a file") from error
    encoding, number = _encoding(head, path), 0
    with Path(path).open(encoding=encoding) as file:
        try:
            while line := file.readline(-1 if most is None else most):
                number += 1
                if "\0" in line:
                    raise CorruptFileError(f"{path}, line {number}: {_ZERO}")
                yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise CorruptFileError(
                f"{path}, after line {number}: bytes that are not text in {encoding} ({error.reason}), and another "
                "encoding would be a guess. Save the file as UTF-8."
            ) from error


def _encoding(head: bytes, path: str | Path) -> str:
    """Of a file that begins so."""
    for magic, found, remedy in _OTHERS:
        if head.startswith(magic):
            raise CorruptFileError(f"{path} {found}, so it holds no text to read. {remedy}.")
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")


def json_values(text: str, path: str | Path) -> list[tuple[int, Any]]:
    """The JSON values in a text, one for JSON and one a record for JSON Lines, each with the line that it begins in.

    Raises:
        CorruptFileError: what is no JSON, and an object with one key twice; by line and column.

    Example:
        >>> json_values('{"a": "x\\u2028y"}\\r\\n\\r\\n[1]', "a.jsonl")
        [(1, {'a': 'x\\u2028y'}), (3, [1])]
    """
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    found: list[tuple[int, Any]] = []
    at, line = _skipped(text, 0), 1 + text.count("\n", 0, _skipped(text, 0))
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise CorruptFileError(f"{path}, {where}: {error.msg}; the file is cut off, or not JSON") from error
        except (ValueError, RecursionError) as error:  # a key twice, an endless number, a thousand brackets
            raise CorruptFileError(f"{path}, in the value that begins in line {line}: {error}") from error
        found.append((line, value))
        start, at = at, _skipped(text, end)
        line += text.count("\n", start, at)
    return found


def json_of(text: str | bytes) -> Any:
    """The JSON value of a text that is nothing else: a header, a record.

    Raises:
        ValueError: no JSON, brackets in brackets without end, an object with one key twice.

    Example:
        >>> json_of('{"a": [1]}')
        {'a': [1]}
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("brackets in brackets, deeper than anything that is written") from error


def checked_fields(kind: type[Any], plain: Any) -> dict[str, Any]:
    """The fields of a dataclass, from JSON, each of the type that it is annotated with.

    Raises:
        TypeError: no object, or a field of another type.

    Example:
        >>> from tl_em.stats import Estimate
        >>> checked_fields(Estimate, {"value": "much"})
        Traceback (most recent call last):
        ...
        TypeError: value is 'much', not float
    """
    if not isinstance(plain, Mapping):
        raise TypeError(f"{_shown(plain)} is no record of a {kind.__name__}")
    hints = get_type_hints(kind)
    for name, value in plain.items():
        if not _is(value, hints.get(name, Any)):
            raise TypeError(f"{name} is {_shown(value)}, not {getattr(hints[name], '__name__', hints[name])}")
    return dict(plain)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is one of this annotation, as far as a single look tells."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_is(value, each) for each in get_args(hint))
    if kind is Literal:
        return value in get_args(hint)
    if kind in (int, float):
        return type(value) in {int: (int,), float: (int, float)}[kind]
    return not isinstance(kind, type) or isinstance(value, list if kind is tuple else kind)


def read_rows(path: str | Path) -> list[Record]:
    """The objects of a JSON Lines file, or of a JSON list.

    Raises:
        FileError, CorruptFileError: as :func:`read_text` and :func:`json_values`, or a line is no object.
    """
    values = json_values(read_text(path), path)
    if len(values) == 1 and isinstance(values[0][1], list):
        rows = [Record(f"item {i + 1}", value) for i, value in enumerate(values[0][1])]
    else:
        rows = [Record(f"line {line}", value) for line, value in values]
    for where, value in rows:
        if not isinstance(value, dict):
            raise CorruptFileError(f"{path}, {where}: {_shown(value)} is no JSON object; write one object a line")
    return rows


def read_object(path: str | Path) -> dict[str, Any]:
    """The one object of a JSON file.

    Raises:
        FileError, CorruptFileError: as :func:`read_text` and :func:`json_values`, or it holds something else.
    """
    values = json_values(read_text(path), path)
    if len(values) != 1 or not isinstance(values[0][1], dict):
        raise CorruptFileError(f"{path} holds something else than one JSON object, so it says nothing; delete it")
    return values[0][1]


def csv_header(text: str, delimiter: str) -> list[str]:
    """The first record of a text as a table with this delimiter; empty where it cannot be one."""
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def csv_rows(text: str, path: str | Path, delimiter: str = ",") -> list[Record]:
    """The records of a table with a header, cells as the strings that they are; blank lines are none.

    Raises:
        CorruptFileError: a quote that does not end, more or fewer cells than the header has, a column twice; by row.

    Example:
        >>> csv_rows('prompt,label\\n"one\\ntwo",007\\n', "a.csv")
        [Record(where='row 1 (line 2)', cells={'prompt': 'one\\ntwo', 'label': '007'})]
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    rows: list[Record] = []
    line = 1
    try:
        for record in reader:
            where, line = f"row {len(rows) + 1} (line {line})", reader.line_num + 1
            if not any(cell.strip() for cell in record):
                continue
            if header is None:
                header = _checked(record, path)
                continue
            if len(record) != len(header):
                raise CorruptFileError(
                    f"{path}, {where}: {len(record)} cells where the header has {len(header)}, so it is unknown which "
                    "belongs to which column. Put cells with a comma or a line break in double quotes."
                )
            rows.append(Record(where, dict(zip(header, record, strict=True))))
    except csv.Error as error:
        raise CorruptFileError(
            f"{path}, row {len(rows) + 1} (line {line}): {error}, so it is unknown where the cell ends. Quotes inside "
            "a quoted cell are doubled; very long cells fit in JSONL."
        ) from error
    return rows


def _checked(header: Sequence[str], path: str | Path) -> list[str]:
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise CorruptFileError(f"{path}: the header names the column {twice[0]!r} twice. Rename one of them.")
    return list(header)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice, and it is unknown which value is meant")
    return found


def _skipped(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
