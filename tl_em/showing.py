"""What cannot be seen is shown as a sign: the one place where text from outside is made fit for an eye.

Tokens, labels, file names and names of models are text of anyone. A control character moves a terminal's cursor or
ends an XML parser, a lone surrogate cannot be written as UTF-8, a bidirectional override makes a line read as another,
a zero-width space is not there. Each becomes its code point in angle brackets; line ends and tabs become their arrows:

    showable("a\\x1b[0m") = "a⟨1b⟩[0m"        showable("a\\nb") = "a↵b"

What draws letters stays as it is, markup included: escaping ``<`` or ``[`` is the work of whoever writes HTML or rich
markup. Data on disk is not changed by any of this: files keep the text that was given.

Source for what is dangerous: Unicode Technical Report 36, *Unicode Security Considerations*, sections 2.10 and 3.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from tl_em.errors import UsageError

MINUS = "\u2212"
_SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥", "\u2028": "␤", "\u2029": "␤"}
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_DRAWN = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Format characters that draw a mark (Arabic number signs and their kin)."""
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and marks that draw nothing."""
_JOINERS = frozenset("\u200c\u200d")
_SELECTORS = frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0), *range(0x180B, 0x180E), 0x180F)))
_TAGS = re.compile("\U0001f3f4[\U000e0061-\U000e007a\U000e0030-\U000e0039]{2,6}\U000e007f")
"""Flags of regions: a black flag spelled out in tags, which are format characters elsewhere."""
_HALF = re.compile("[\ud800-\udfff]")
_PLAIN = re.compile(r"[ -~\u00a1-\u00ac\u00ae-\u0233]*", re.ASCII)


def showable(text: object, *, lines: bool = False) -> str:
    """Text in which everything that would not show, or would change how the rest shows, is a visible sign.

    Args:
        text: what is to be shown; anything else than a string is written as ``str`` writes it.
        lines: whether line ends stay line ends (a message, a paragraph) or become ``↵`` (a label, a token).

    Returns:
        text that any encoding, XML parser and terminal can take. It is not escaped for HTML or markup. Twice is once.

    Example:
        >>> showable("refusal"), showable("\\x1b[31m\\x00"), showable("a\\nb"), showable("a\\u202eb")
        ('refusal', '⟨1b⟩[31m⟨0⟩', 'a↵b', 'a⟨202e⟩b')
        >>> showable("\\ud83d"), showable("\\ufffe"), showable("one\\ntwo\\x07", lines=True)
        ('⟨d83d⟩', '⟨fffe⟩', 'one\\ntwo⟨7⟩')
    """
    whole = text if isinstance(text, str) else str(text)
    if _PLAIN.fullmatch(whole):
        return whole
    kept = {at for found in _TAGS.finditer(whole) for at in range(*found.span())}
    return "".join(
        c if at in kept or (lines and c == "\n") or not _hidden(whole, at) else _sign(c) for at, c in enumerate(whole)
    )


def token_shown(token: object) -> str:
    """A token as it can be seen: as :func:`showable`, and a lone space or nothing at all has a sign too.

    Example:
        >>> token_shown("\\n"), token_shown(" "), token_shown(""), token_shown("a\\u2028b"), token_shown("</script>")
        ('↵', '·', '∅', 'a␤b', '</script>')
    """
    whole = token if isinstance(token, str) else str(token)
    return "·" * len(whole) if not whole.strip(" ") and whole else showable(whole) or "∅"


def check_names(names: Iterable[object]) -> None:
    """Raise unless every name can stand in a table and a file; all others can be shown.

    Raises:
        UsageError: a name holds half a character (a lone surrogate), which UTF-8, and so pandas, cannot hold.

    Example:
        >>> check_names(["refusal", "\\x1b[0m"])
        >>> check_names(["a\\ud800"])
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: the name a⟨d800⟩ holds half a character (a lone surrogate), which ...
    """
    for name in names:
        if isinstance(name, str) and _HALF.search(name):
            raise UsageError(
                f"the name {showable(name)} holds half a character (a lone surrogate), which no table and no file can "
                f"hold, so the result could not be written down; name it {encodable(name)!r}, or otherwise"
            )


def encodable(text: str) -> str:
    """The text with a sign in place of each half of a character, which UTF-8 cannot hold; all else as it is.

    Example:
        >>> encodable("a\\ud800"), encodable("a\\x1b") == "a\\x1b"
        ('a⟨d800⟩', True)
    """
    return _HALF.sub(lambda found: _sign(found.group()), text)


def slug(name: str) -> str:
    """A name as a file name or the id of an element: other names give other slugs, and a plain name is its own.

    Example:
        >>> slug("layers-refusal"), slug("[/b]"), slug("../../b")
        ('layers-refusal', 'b-5d78e8', 'b-d959b0')
    """
    kept = re.sub(r"[^\w.-]+", "-", showable(name)).strip("-.")[:80]
    if kept == name:
        return kept
    return f"{kept}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}".lstrip("-")


def number(value: float | None, digits: int = 2) -> str:
    """A number for people: fixed digits, a true minus sign, an en dash where there is none.

    Example:
        >>> number(0.1234), number(float("nan")), number(-1.0).lstrip(MINUS)
        ('0.12', '–', '1.00')
    """
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return (MINUS + text[1:] if float(text) else text[1:]) if text.startswith("-") else text


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """``[low, high]``, or the reason why there is none.

    Example:
        >>> interval(0.31, 0.53), interval(float("nan"), float("nan"))
        ('[0.31, 0.53]', '[no interval]')
    """
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return "[no interval]"
    return f"[{number(low, digits)}, {number(high, digits)}]"


def lasting(seconds: float | int) -> str:
    """A duration that somebody will wait.

    Example:
        >>> lasting(90), lasting(1000), lasting(10_000)
        ('90 s', '16.7 min', '2.8 h')
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def plain_rows(table: Any) -> list[dict[str, Any]]:
    """A pandas table as JSON's plain rows; text that UTF-8 cannot hold (lone surrogates), which pandas refuses, shown.

    Args:
        table: a DataFrame.
    """
    try:
        return json.loads(table.to_json(orient="records"))
    except UnicodeEncodeError:
        seen = table.map(lambda value: showable(value) if isinstance(value, str) else value)
        return json.loads(seen.rename(columns=showable).to_json(orient="records"))


def json_shown(value: Any, **settings: Any) -> str:
    """JSON for a terminal or a UTF-8 file: letters as they are, what would not show as JSON's own escapes.

    Args:
        value: what ``json.dumps`` takes, with its ``settings``.

    Example:
        >>> json_shown({"é\\u202e": "\\ud800"})
        '{"é\\\\u202e": "\\\\ud800"}'
    """
    text = json.dumps(value, ensure_ascii=False, **settings)
    return "".join(c if c == "\n" or not _hidden(text, at) else _escape(c) for at, c in enumerate(text))


def _escape(c: str) -> str:
    return f"\\u{ord(c):04x}" if ord(c) < 0x80 else json.dumps(c)[1:-1]  # json leaves DEL as it is


def _hidden(text: str, at: int) -> bool:
    """Whether a character draws nothing or turns the text around it."""
    c = text[at]
    if c in _JOINERS:  # between letters it is spelling, at an end it is nothing
        return not (0 < at < len(text) - 1 and _joins(text[at - 1]) and _joins(text[at + 1]))
    if c in _SELECTORS:  # one after a character chooses its form; more of them carry text that nobody sees
        return at == 0 or text[at - 1] in _SELECTORS
    return c in _BLANK or (unicodedata.category(c) in _HIDDEN and c not in _DRAWN)


def _joins(c: str) -> bool:
    return unicodedata.category(c)[0] in "LMS" and c not in _BLANK


def _sign(c: str) -> str:
    return _SIGNS.get(c) or f"\u27e8{ord(c):x}\u27e9"
