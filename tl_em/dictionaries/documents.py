"""Texts without end as full windows of tokens: of a stream no more is held than is being read.

    window = what the model reads before a text (BOS, where it has one) + tokens, until it is ``context`` long

A document that ends makes room for the next in the same window, with the same BOS before it; one that is longer goes on
in the next window.  Nothing is put between documents but what the tokenizer itself puts before a text, nothing is
padded, nothing is left out but the first token of a window and the BOS tokens: what stands there is the same
everywhere, or attends to itself alone, and in large models it is huge.

Where a window begins is a ``StreamPlace``: so many documents, so many tokens of the next, and a hash of those
documents, by which a stream that begins anew is known to be the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_em.artefacts import json_of, lines_of
from tl_em.errors import CorruptFileError, PositionError, PromptError, UsageError
from tl_em.models.contrast_rows import FileRow, Unreadable, checked
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, document_tokens
from tl_em.models.sites import Position

Corpus = str | Path | Iterable[Any] | Callable[[], Iterable[Any]]
"""Texts (or chats, or rows with ``text`` or ``messages``): a file, whatever can be iterated over, or a function."""
CONTEXT = 256
"""Tokens of a window, where it is not said."""
_GROUP, _CHARACTERS = 64, 2**18
"""Documents, and characters, that are tokenized together."""
_PIECE = 2**20
"""Characters of a line of text, or a text, after which another document begins."""


class CorpusPart(NamedTuple):
    """Prompts whose activations are held, and shuffled, together.

    Args:
        encoded: the prompts.
        spans: the tokens that are read of each.
        kept: which of these are samples.
        place: where the part begins, as JSON: its number, and what finds it again.
        whole: whether it is all there is, and every part is this one again.
    """

    encoded: Sequence[EncodedPrompt]
    spans: Int[Tensor, "prompt 2"]
    kept: Bool[Tensor, " token"]
    place: dict[str, Any]
    whole: bool = False


class StreamPlace(NamedTuple):
    """Where a window begins: in which pass over the documents, after how many, at which token of the next.

    ``digest`` is of the documents before it.
    """

    epoch: int = 0
    documents: int = 0
    token: int = 0
    digest: str = ""


class _Window(NamedTuple):
    ids: tuple[int, ...]
    kept: Bool[Tensor, " pos"]
    begins: StreamPlace
    ends: StreamPlace


def is_stream(corpus: Any) -> bool:
    """Whether something is read as it comes; a list, an array or a tensor is there whole."""
    return not isinstance(corpus, list | tuple) and not hasattr(corpus, "shape")


class Documents:
    """Windows of a stream of documents, in parts, from any place on.

    Args:
        model: whose tokens they are.
        corpus: see ``Corpus``.
        context: tokens of a window.
        most: samples a part, at least.

    Raises:
        UsageError: nothing that gives documents, or none come; a context that the model does not have.
    """

    def __init__(
        self, model: LensModel, corpus: Corpus | Any, context: int, most: int, position: Position = "all"
    ) -> None:
        if position != "all":
            raise PositionError(
                f"position={position!r} is a place in a prompt, and of a stream, cut into windows, every token is a "
                "sample. Leave position out, or give the prompts as a list, without context=."
            )
        if not 2 <= context <= int(model.cfg.n_ctx):
            raise UsageError(
                f"context={context} is no window of this model, which reads up to n_ctx = {model.cfg.n_ctx} tokens; "
                f"give context= 2 to {model.cfg.n_ctx}"
            )
        self.model, self.context, self.most = model, context, most
        self._open = _opener(corpus)
        once: Any = corpus if hasattr(corpus, "__next__") else None
        self._once = None if once is None else _documents(once)  # what is taken of it is gone
        first = list(islice(_documents(self._open()) if self._once is None else self._once, _GROUP))
        if not first:
            raise UsageError("The corpus holds no document, so there is nothing to train on; give texts that are there")
        self.begins = _digest(hashlib.sha256(), first).hexdigest()[:16]
        self._first = first if self._once is not None else None

    def parts(self, since: Mapping[str, Any] | None = None) -> Iterator[CorpusPart]:
        """Windows by the part, without end; where all there are fit into the first, that one again and again.

        Args:
            since: the place of the part to begin with.

        Raises:
            UsageError: an iterator ended, its documents are not those that were there before, or they are too few.
        """
        number = 0 if since is None else since["part"]
        at = StreamPlace() if since is None else StreamPlace(*since["place"])
        windows: Iterator[_Window | None] = self._windows(at)
        while True:
            found: list[_Window] = []
            samples, begun = 0, at
            while samples < self.most:
                window = next(windows)
                if window is None:  # the end of a pass
                    if begun == StreamPlace() and found:
                        yield from self._again(found, number)
                    continue
                found.append(window)
                samples += int(window.kept.sum())
            yield self._part(found, number)
            number, at = number + 1, found[-1].ends

    def _again(self, windows: Sequence[_Window], number: int) -> Iterator[CorpusPart]:
        while True:
            yield self._part(windows, number)._replace(whole=True)
            number += 1

    def _part(self, windows: Sequence[_Window], number: int) -> CorpusPart:
        encoded = [EncodedPrompt(each.ids, (0, len(each.ids)), len(each.ids) - 1, None, "") for each in windows]
        spans = torch.tensor([[0, self.context]] * len(encoded))
        place = {"part": number, "place": list(windows[0].begins)}
        return CorpusPart(encoded, spans, torch.cat([each.kept for each in windows]), place)

    def _windows(self, at: StreamPlace) -> Iterator[_Window | None]:
        """The windows of pass after pass, with None where one ends."""
        while True:
            digest, documents = hashlib.sha256(), self._fresh(at)
            passed = sum(1 for each in islice(documents, at.documents) if _digest(digest, [each]))
            if passed < at.documents or (passed and digest.hexdigest() != at.digest):
                raise UsageError(
                    f"The first {at.documents} documents of the corpus are not those that were trained on before the "
                    "checkpoint, so what follows would be another training. Give the corpus as it was, or another out=."
                )
            last = None
            for last in self._packed(documents, at, digest):
                yield last
            if last is None and at.documents == at.token == 0:
                raise UsageError(
                    f"The corpus holds fewer than context={self.context} tokens, and so no window. Give more text, or "
                    "a smaller context="
                )
            yield None
            at = StreamPlace(at.epoch + 1)

    def _fresh(self, at: StreamPlace) -> Iterator[Any]:
        """The documents from the first on; raises where they cannot be had again."""
        if self._once is None:
            return _documents(self._open())
        first, self._first = self._first, None
        if first is None or at.epoch:
            raise UsageError(
                "The corpus ended before the training did, and an iterator cannot be started again. Give a path, a "
                "list, a function that returns a new iterator, or fewer steps=."
            )
        return chain(first, self._once)

    def _packed(self, documents: Iterator[Any], at: StreamPlace, digest: Any) -> Iterator[_Window]:
        """The full windows of one pass; what is left at its end is dropped."""
        passed, token, ids, inside, begins = at.documents, at.token, list[int](), list[bool](), at
        for group in _grouped(documents):
            before, tokens = document_tokens(self.model, group)
            if len(before) >= self.context - 1:
                raise UsageError(f"context={self.context} holds no more than BOS tokens; give a longer one")
            for given, own in zip(group, tokens, strict=True):
                while token < len(own):
                    if not ids or token == 0:
                        ids += before
                        inside += [False] * len(before)
                    taken = own[token : token + max(0, self.context - len(ids))]
                    ids += taken
                    inside += [True] * len(taken)
                    token += len(taken)
                    if len(ids) >= self.context:
                        kept = torch.tensor(inside[: self.context])
                        kept[0] = False
                        ends = StreamPlace(at.epoch, passed, token, digest.hexdigest())
                        yield _Window(tuple(ids[: self.context]), kept, begins, ends)
                        ids, inside, begins = [], [], ends
                token, passed = 0, passed + 1
                _digest(digest, [given])


# ---- a tenth for judging ---------------------------------------------------------------------------------------------
JUDGED = 64
"""Windows of a stream that a dictionary is judged by."""


def set_apart(corpus: Any) -> tuple[Any, Callable[[LensModel, int | None], Sequence[Any]]]:
    """Nine tenths of a corpus that can be begun anew, and what gives the prompts of the others: every tenth document.

    Args:
        corpus: a list of prompts, of which all are prompts of their own; or a stream, of which so many windows are.

    Example:
        >>> learned, judged = set_apart(["a", *"bcdefghij", "k", "l"])
        >>> learned, judged(None, None)
        (['b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j', 'l'], ['a', 'k'])
    """
    if not is_stream(corpus):
        return [each for i, each in enumerate(corpus) if i % 10], lambda model, context: corpus[::10]
    opened = _opener(corpus)

    def judged(model: LensModel, context: int | None) -> Sequence[EncodedPrompt]:
        context = context or CONTEXT
        some = Documents(model, lambda: islice(_documents(opened()), 0, None, 10), context, JUDGED * context)
        return next(some.parts()).encoded[:JUDGED]

    return lambda: (each for i, each in enumerate(_documents(opened())) if i % 10), judged


# ---- what is in a corpus ---------------------------------------------------------------------------------------------
def _opener(corpus: Any) -> Callable[[], Iterable[Any]]:
    """What gives the rows of a corpus from the first on."""
    if isinstance(corpus, str | Path):
        path = Path(corpus).expanduser()
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return lambda: _rows(path)
        if path.suffix.lower() in (".txt", ".text"):
            return lambda: lines_of(path, most=_PIECE)
        raise UsageError(
            f"corpus={str(corpus)[:80]!r} is a string, and so a path, and a stream is read from .txt (a document a "
            "line) or .jsonl (a row with text or messages). Give such a file, or a list of texts."
        )
    if callable(corpus) and not isinstance(corpus, Iterable):
        return lambda: cast("Iterable[Any]", corpus())
    if isinstance(corpus, Iterable) and not isinstance(corpus, Mapping | bytes):
        return lambda: corpus
    raise UsageError(
        f"corpus is a {type(corpus).__name__}, which gives no documents. Give a list of prompts, a path (.txt, "
        ".jsonl), an iterator of texts, or a function that returns a new one."
    )


def _rows(path: Path) -> Iterator[Any]:
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            try:
                yield json_of(line)
            except ValueError as error:
                raise CorruptFileError(f"{path}, line {number}: {error}; write one JSON object a line") from error


def _documents(rows: Iterable[Any]) -> Iterator[Prompt | EncodedPrompt]:
    """Texts, chats and encoded prompts; blank texts are none, and one that is very long is several."""
    for number, row in enumerate(rows):
        if isinstance(row, EncodedPrompt):
            yield row
            continue
        try:
            cells = FileRow.of(f"document {number}", dict(row) if isinstance(row, Mapping) else row).cells
            if "messages" not in cells and not isinstance(cells.get("text"), str):
                raise Unreadable(f"document {number}: neither 'text' nor 'messages' among {list(cells)}")
            found = checked(f"document {number}", cells["messages"]) if "messages" in cells else cells["text"]
        except Unreadable as error:
            raise PromptError(
                f"{error}. It is no document, so there is nothing to read. Give texts, lists of messages, or rows such "
                'as {"text": "…"}.'
            ) from error
        if not isinstance(found, str):
            yield found
        else:
            pieces = (found[i : i + _PIECE] for i in range(0, len(found), _PIECE))
            yield from (piece for piece in pieces if piece.strip())


def _grouped(documents: Iterator[Any]) -> Iterator[list[Any]]:
    """Some documents at a time, so that a tokenizer has enough to do."""
    group, characters = [], 0
    for each in documents:
        group.append(each)
        characters += len(each) if isinstance(each, str) else _CHARACTERS // _GROUP
        if len(group) == _GROUP or characters >= _CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _digest(digest: Any, documents: Iterable[Any]) -> Any:
    """The hash, with some documents more."""
    for each in documents:
        said = repr(each.ids if isinstance(each, EncodedPrompt) else each).encode("utf-8", "backslashreplace")
        digest.update(hashlib.sha256(said).digest())
    return digest
