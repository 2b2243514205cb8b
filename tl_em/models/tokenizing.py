"""Text as a tokenizer's own ids: at most one BOS token, no token that a loader made up, nothing lost without a word.

    ids(text) = [BOS] + what the tokenizer puts before a text + tokenizer(text, add_special_tokens=False)

The BOS token stands there where TransformerLens would put one (``cfg.default_prepend_bos``) *and* the tokenizer itself
names one that the model has an embedding for. What the text begins with already is not put before it once more.
What a tokenizer appends of its own accord (EOS, SEP) is left out: it says that a text is over, and a prompt is not.

TransformerLens changes the tokenizer that it is given: it makes up EOS, PAD and BOS tokens where there are none, and
reloads a tokenizer with its BOS switched on. So what the tokenizer's own files say is read before that, and kept.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tl_em.errors import PromptError, UnknownTokenError

Span = tuple[int, int]

_NAMES = ("bos_token", "eos_token", "pad_token")
_KEPT = "tl_em_before"


# ---- what the tokenizer itself says ----------------------------------------------------------------------------------
def made_up(tokenizer: Any) -> tuple[str, ...]:
    """Names of the special tokens that a loader gave the tokenizer, which its own files do not name.

    TransformerLens makes ``<|endoftext|>`` the EOS token of a tokenizer without one, and the EOS token its PAD and BOS.
    """
    own = getattr(tokenizer, "init_kwargs", {})
    eos = getattr(tokenizer, "eos_token", None)
    given = {
        "bos_token": eos is not None and tokenizer.bos_token == eos,
        "eos_token": eos == "<|endoftext|>",
        "pad_token": eos is not None and tokenizer.pad_token == eos,
    }
    return tuple(name for name in _NAMES if given[name] and not own.get(name))


def own_bos(tokenizer: Any) -> int | None:
    """The id of the BOS token that the tokenizer itself names, None where it names none."""
    if tokenizer is None or getattr(tokenizer, "bos_token", None) is None or "bos_token" in made_up(tokenizer):
        return None
    found = tokenizer.bos_token_id
    return None if found is None else int(found)


def keep_before(tokenizer: Any, before: Sequence[int] | None) -> None:
    """Keep with a tokenizer what its files put before a text, as ``own_before`` found it before it was changed."""
    if tokenizer is not None and before is not None:
        setattr(tokenizer, _KEPT, tuple(before))


def own_before(tokenizer: Any) -> tuple[int, ...] | None:
    """What the tokenizer puts before a text by itself, as its files say; None without a tokenizer."""
    if tokenizer is None:
        return None
    kept = getattr(tokenizer, _KEPT, None)
    return kept if kept is not None else _before(tokenizer)


def _probes(tokenizer: Any) -> Iterator[str]:
    yield from ("a", "the", ".")
    yield from list(tokenizer.get_vocab())[-3:]


def _before(tokenizer: Any) -> tuple[int, ...]:
    for probe in _probes(tokenizer):
        try:
            whole = list(tokenizer(probe)["input_ids"])
            core = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        except Exception:  # a word that is not in a vocabulary without an unknown token
            continue
        at = next((i for i in range(len(whole) - len(core) + 1) if whole[i : i + len(core)] == core), None)
        if core and at is not None:
            return tuple(whole[:at])
    return ()


def same_ids(tokenizer: Any, other: Any) -> bool:
    """Whether two tokenizers read a few texts alike, special tokens included."""

    def read(each: Any, text: str) -> list[int] | None:
        try:
            return list(each(text)["input_ids"])
        except Exception:  # both may refuse it
            return None

    names = " ".join(tokenizer.all_special_tokens)
    texts = ("a the cat", " The  Cat\n\tsat. 12 345!", "naïve 佛 שלום 😀", names, "def f(x):\n    return x")
    return all(read(tokenizer, text) == read(other, text) for text in texts)


# ---- text to ids -----------------------------------------------------------------------------------------------------
class PlainText(NamedTuple):
    """Tokens of a text that goes through no template, and how many of them are special ones before it."""

    ids: tuple[int, ...]
    start: int


def before_text(tokenizer: Any, *, prepend: bool, d_vocab: int) -> tuple[int, ...]:
    """What stands before a text that goes through no template, see the head of this file; arguments as below."""
    bos, before = own_bos(tokenizer), own_before(tokenizer) or ()
    if not prepend and not hasattr(tokenizer, _KEPT):  # TransformerLens may have switched the BOS on
        return tuple(token for token in before if token != bos)
    if prepend and bos is not None and bos not in before and bos < d_vocab:
        return (bos, *before)
    return before


def plain_tokens(tokenizer: Any, texts: Sequence[str], *, prepend: bool, d_vocab: int) -> list[PlainText]:
    """Texts as the tokenizer's own ids, see the head of this file.

    Args:
        tokenizer: as it stands on a model.
        texts: what is read, as it is.
        prepend: whether a BOS token is wanted.
        d_vocab: number of embeddings.

    Raises:
        UnknownTokenError: words outside the vocabulary. PromptError: nothing to read.
    """
    bos, before = own_bos(tokenizer), before_text(tokenizer, prepend=prepend, d_vocab=d_vocab)
    read, found = tokenized(tokenizer, list(texts)), []
    offsets = read.get("offset_mapping") or [None] * len(texts)
    for text, core, spans in zip(texts, read["input_ids"], offsets, strict=True):
        check_known(tokenizer, text, core, spans)
        if not core:
            raise PromptError(
                f"The prompt {text[:60]!r} has no tokens: the tokenizer leaves all of it out, so there is nothing to "
                f"read. Drop it."
            )
        sizes = range(min(len(before), len(core)), 0, -1)
        twice = next((n for n in sizes if before[len(before) - n :] == tuple(core[:n])), 0)  # the text begins with them
        kept = before[: len(before) - twice]
        start = max(len(before), int(core[0] == bos))
        found.append(PlainText((*kept, *core), start if start < len(kept) + len(core) else 0))
    return found


def tokenized(tokenizer: Any, text: Any) -> Any:
    """Ids of a text (or of a list of them) without special tokens, with character offsets where there are any.

    Raises:
        PromptError: half a character (a lone surrogate). UnknownTokenError: a word that the vocabulary cannot spell.
    """
    for each in [text] if isinstance(text, str) else text:
        check_characters(each)
    options = {"return_offsets_mapping": True} if getattr(tokenizer, "is_fast", False) else {}
    try:
        return tokenizer(text, add_special_tokens=False, **options)
    except Exception as error:  # the Rust library raises bare Exceptions
        shown = repr(text if isinstance(text, str) else text[0])[:60]
        raise UnknownTokenError(
            f"The tokenizer cannot read the prompt {shown}{' or one after it' if len(text) > 1 else ''} ({error}), so "
            f"the model has no token for part of it. Use prompts of the model's own vocabulary."
        ) from error


def check_characters(text: str) -> None:
    """Raise ``PromptError`` for a lone surrogate, which no tokenizer can read.

    Example:
        >>> check_characters("whole 😀")
        >>> check_characters("half \\ud83d")
        Traceback (most recent call last):
        ...
        tl_em.errors.PromptError: The prompt 'half \\ud83d' holds half a character (U+D83D, a lone surrogate), ...
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"The prompt {text[:60]!r} holds half a character (U+{ord(text[error.start]):04X}, a lone surrogate), "
            f"which no tokenizer can read. Read the file that it comes from as UTF-8 (json.loads joins both halves)."
        ) from error


# ---- where characters went -------------------------------------------------------------------------------------------
def tokens_and_spans(tokenizer: Any, text: str) -> tuple[tuple[int, ...], Callable[[int, int], Span]]:
    """Tokens of rendered text, and a function from a span of characters to the span of tokens that overlap it."""
    read = tokenized(tokenizer, text)
    ids, offsets = tuple(read["input_ids"]), read.get("offset_mapping")
    check_known(tokenizer, text, ids, offsets)
    if offsets is not None:

        def span_of(start: int, end: int) -> Span:
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
            first = sum(b <= start for _, b in offsets)
            return (inside[0], inside[-1] + 1) if inside else (first, first)

        return ids, span_of

    def span_by_prefix(start: int, end: int) -> Span:
        head, whole = (tokenizer(text[:at], add_special_tokens=False)["input_ids"] for at in (start, end))
        first, last = shared_prefix(ids, head), shared_prefix(ids, whole)
        return first, max(first, last if last == len(whole) or start == end else last + 1)

    return ids, span_by_prefix


def shared_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many leading items agree."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def check_known(tokenizer: Any, text: str, ids: Sequence[int], offsets: Sequence[Span] | None) -> None:
    """Raise ``UnknownTokenError`` where the model would read something else than the text, or less.

    An unknown token counts where the text does not itself hold its name. A vocabulary without one may leave characters
    out; spaces, control characters and accents, which a tokenizer may take off on purpose, do not count.
    """
    unknown, name = _unknown(tokenizer)
    if unknown is not None and unknown in ids:
        if offsets is None:
            wrong = list(ids).count(unknown) > text.count(name)
            words = [word for word in dict.fromkeys(text.split()) if _has(tokenizer, word, unknown) and word != name]
        else:
            spans = [(a, b) for token, (a, b) in zip(ids, offsets, strict=True) if token == unknown]
            words = list(dict.fromkeys(_word(text, a, b) for a, b in spans if text[a:b].strip() != name))
            wrong = bool(words)
        if wrong:
            raise UnknownTokenError(
                f"{', '.join(map(repr, words[:8])) or 'Part'} of the prompt {text[:60]!r} is not in the model's "
                f"vocabulary, so the model would read {name!r} in its place. Use prompts of the model's own vocabulary."
            )
    lost = _lost(tokenizer, text, ids, offsets) if offsets is not None else ""
    if lost:
        raise UnknownTokenError(
            f"{', '.join(map(repr, dict.fromkeys(lost[:8])))} of the prompt {text[:60]!r} is not in the model's "
            f"vocabulary, and the tokenizer leaves it out, so the model would read less than is written. Use prompts "
            f"of the model's own vocabulary."
        )


def _unknown(tokenizer: Any) -> tuple[int | None, str]:
    """The unknown token and its name, also one that only the vocabulary knows of."""
    found = getattr(tokenizer, "unk_token_id", None)
    if found is not None:
        return int(found), str(tokenizer.unk_token)
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    name = getattr(model, "unk_token", None)
    if name is None and type(model).__name__ == "Unigram":
        at = re.search(r"unk_id=(\d+)", repr(model)[:80])
        return (int(at.group(1)), str(tokenizer.convert_ids_to_tokens(int(at.group(1))))) if at else (None, "")
    found = tokenizer.get_vocab().get(name) if name else None
    return found, str(name)


def _word(text: str, start: int, end: int) -> str:
    """The word that characters stand in."""
    inside = text[start:end].strip()
    if not inside or any(c.isspace() for c in inside):
        return inside or text[start:end]
    start += len(text[start:end]) - len(text[start:end].lstrip())
    first = max((i + 1 for i in range(start) if text[i].isspace()), default=0)
    return text[first:].split()[0]


def _has(tokenizer: Any, word: str, unknown: int) -> bool:
    return unknown in tokenizer(word, add_special_tokens=False)["input_ids"]


def _lost(tokenizer: Any, text: str, ids: Sequence[int], offsets: Sequence[Span]) -> str:
    """Letters, signs and pictures that no token covers, and that the tokens do not spell."""
    at, lost = 0, ""
    for start, end in (*offsets, (len(text), len(text))):
        lost += text[at:start]
        at = max(at, end)
    lost = "".join(c for c in lost if unicodedata.category(c)[0] in "LNPS")
    spelled = tokenizer.decode(list(ids)) if lost else ""  # offsets of some tokenizers are not to be trusted
    return "".join(c for c in lost if c not in spelled)
