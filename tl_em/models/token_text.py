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
from itertools import accumulate, groupby
from typing import Any

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
    text, data = _decoded(tokenizer, int(token))
    return text if data is None else "".join(_characters([data]))


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
    decoded = [_decoded(tokenizer, int(token)) for token in tokens]
    found: list[str] = []
    for in_bytes, run in groupby(enumerate(decoded), key=lambda each: each[1][1] is not None):
        if in_bytes:
            found += _characters([data or b"" for _, (_, data) in run])
        else:
            found += [_spaced(tokenizer, int(tokens[i]), text) for i, (text, _) in run]
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


def _decoded(tokenizer: Any, token: int) -> tuple[str, bytes | None]:
    """A token on its own: its text, and its bytes where they are not all whole characters."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return text, _bytes(tokenizer.convert_ids_to_tokens(token)) if REPLACEMENT in text else None


def _spaced(tokenizer: Any, token: int, text: str) -> str:
    """With the space that a piece of SentencePiece begins with."""
    name = None if REPLACEMENT in text else tokenizer.convert_ids_to_tokens(token)
    return f" {text}" if isinstance(name, str) and name.startswith("\u2581") and not text.startswith(" ") else text


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


def _characters(pieces: Sequence[bytes]) -> list[str]:
    """Texts of neighbours: each character at the piece that it begins in, stray bytes, as bytes, where they are."""
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    read = b"".join(pieces).decode(errors="surrogateescape")  # a stray byte becomes half a surrogate pair
    signs = [(c, c.encode(errors="surrogateescape")) for c in read]
    starts = accumulate((len(data) for _, data in signs), initial=0)
    placed = [(owner[start], c, data) for start, (c, data) in zip(starts, signs, strict=False)]
    found = [""] * len(pieces)
    for (i, stray), run in groupby(placed, key=lambda each: (each[0], "\udc80" <= each[1] <= "\udcff")):
        data = b"".join(each for _, _, each in run)
        found[i] += f"\u27e8{data.hex(' ').upper()}\u27e9" if stray else data.decode()
    return found
