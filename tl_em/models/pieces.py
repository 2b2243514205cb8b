"""Tokens as people read them: the one place where token ids become text for an eye.

A byte-level vocabulary cuts some characters into pieces. Decoded alone each piece is ``U+FFFD``, a sign that says
nothing and is the same for all of them. So a token that is part of a character shows its bytes, and where tokens are
read one after the other, as a text, the pieces are joined again:

    one token: "⟨E4 BD⟩"        a text: "你", of three tokens: ("你", "", "")

What else would not show in a text (control characters, lone surrogates) is no matter of tokens: whoever draws it makes
it a sign.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_text(tokenizer: Any, token: int) -> str:
    """One token for people: its text, bytes where it is part of a character, its number without a tokenizer.

    Example:
        >>> from tl_em import load_pair
        >>> token_text(load_pair("toy/insecure").base.tokenizer, 7) != token_text(None, 7) == "7"
        True
    """
    if tokenizer is None:
        return str(int(token))
    piece = _piece(tokenizer, int(token))
    return piece.text if piece.data is None else _read(piece.data)


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, ...]:
    """The tokens of a text, one string each, which together are the text.

    A character that is split stands at its first token, and the tokens that only go on with it are ``""``. Bytes that
    make up no character with their neighbours are shown as bytes.

    Example:
        >>> token_texts(None, [5, 7])
        ('5', '7')
    """
    if tokenizer is None:
        return tuple(str(int(token)) for token in tokens)
    pieces = [_piece(tokenizer, int(token)) for token in tokens]
    found, start = [], 0
    while start < len(pieces):
        end = start
        while end < len(pieces) and pieces[end].data is not None:
            end += 1
        if end == start:
            found.append(pieces[start].spaced)
            start += 1
        else:
            found += _joined([piece.data or b"" for piece in pieces[start:end]])
            start = end
    return tuple(found)


def text_of_tokens(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Several tokens as one text, as the tokenizer decodes them, with no character lost.

    Example:
        >>> text_of_tokens(None, [5, 7])
        '5 7'
    """
    if tokenizer is None:
        return " ".join(str(int(token)) for token in tokens)
    whole = str(tokenizer.decode([int(token) for token in tokens], clean_up_tokenization_spaces=False))
    return whole if REPLACEMENT not in whole else "".join(token_texts(tokenizer, tokens))


class _Piece(NamedTuple):
    """A token on its own: its text, the same with the space that a piece of SentencePiece begins with, its bytes where
    they are not all whole characters."""

    text: str
    spaced: str
    data: bytes | None


def _piece(tokenizer: Any, token: int) -> _Piece:
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    name = tokenizer.convert_ids_to_tokens(token)
    if REPLACEMENT in text:
        return _Piece(text, text, _bytes(name))
    begins = isinstance(name, str) and name.startswith("\u2581") and not text.startswith(" ")
    return _Piece(text, f" {text}" if begins else text, None)


def _bytes(name: Any) -> bytes | None:
    """A token's bytes by its name in the vocabulary, None where that holds none (a token that *is* ``U+FFFD``)."""
    if isinstance(name, bytes):
        return name
    match = _BYTE.fullmatch(str(name))
    if match:
        return bytes([int(match.group(1), 16)])
    alphabet = _alphabet()
    return bytes(alphabet[c] for c in str(name)) if name and all(c in alphabet for c in str(name)) else None


@cache
def _alphabet() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary: printable ones for themselves, the others in
    order from U+0100.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _read(data: bytes) -> str:
    return "".join(text if whole else _sign(data[start:end]) for start, end, text, whole in _parts(data))


def _joined(pieces: Sequence[bytes]) -> list[str]:
    """Texts of neighbours: each character at the piece that it begins in, stray bytes where they are."""
    data, owner = b"".join(pieces), [i for i, piece in enumerate(pieces) for _ in piece]
    found: list[str] = [""] * len(pieces)
    for start, end, text, whole in _parts(data):
        if whole:
            found[owner[start]] += text
            continue
        for i in dict.fromkeys(owner[start:end]):
            found[i] += _sign(bytes(data[at] for at in range(start, end) if owner[at] == i))
    return found


def _parts(data: bytes) -> list[tuple[int, int, str, bool]]:
    """Start, end, text of each character, and of each run of bytes that make up none (whole: False)."""
    found: list[tuple[int, int, str, bool]] = []
    at = 0
    while at < len(data):
        size = next((n for n in (1, 2, 3, 4) if _is_character(data[at : at + n])), 0)
        if size:
            found.append((at, at + size, data[at : at + size].decode(), True))
        elif found and not found[-1][3]:
            found[-1] = (found[-1][0], at + 1, "", False)
        else:
            found.append((at, at + 1, "", False))
        at += size or 1
    return found


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def _sign(data: bytes) -> str:
    return f"\u27e8{data.hex(' ').upper()}\u27e9"
