"""While a model is built, what TransformerLens and transformers say is held back: chatter dropped, warnings kept.

They say much about themselves, on standard output, as warnings and in logs. What is known to be chatter is dropped; any
other warning is given once the model is there, because it may be about a result. Log handlers are put back. What other
threads print meanwhile is printed, what they log is logged afterwards; only one thread at a time is quiet.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from threading import get_ident
from typing import Any

from tl_em.threads import SPOKEN, holding

_LOGGERS = ("", "transformers", "transformer_lens", "huggingface_hub", "peft", "accelerate")
_CHATTER = re.compile(
    "|".join(
        (
            "is deprecated|was deprecated|are deprecated|will be removed|DEPRECATED",
            "loaded pretrained model|moving model to device",
            "load report|copying from the old one",  # what is missing is an error of checkpoint.py
            "not using an official model|you are not using layernorm|not folding|setting to model",
            "support for .* in hookedtransformer is currently experimental",
            "float32 by default|default_padding_side|changing model dtype",
            "`?torch_dtype`? is|attention implementation|set `is_decoder=true`|if you want to use",
            "is falling back to its reference pytorch implementation",
            "special tokens have been added|tokenizer.*(bos|eos|pad)_token",
        )
    ),
    re.IGNORECASE,
)
"""What upstream is known to say on loading that is no fault of the model."""


class _Held(logging.Handler):
    """Keeps records, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[int, logging.LogRecord] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.records[id(record)] = record


class _Muted:
    """Standard output without what this thread writes."""

    def __init__(self, out: Any) -> None:
        self._out, self._thread = out, get_ident()

    def write(self, text: str) -> int:
        return len(text) if self._out is None or get_ident() == self._thread else self._out.write(text)

    def flush(self) -> None:
        if self._out is not None:
            self._out.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what upstream says while a model is built; warnings that are no chatter are given afterwards.

    The environment is put back as well: torch's compiler writes its cache directory there when it is imported.
    """
    with holding(SPOKEN), _held_back() as (caught, records):
        yield
    for each in caught:
        aging = issubclass(each.category, DeprecationWarning | PendingDeprecationWarning | FutureWarning)
        if not aging and not _CHATTER.search(str(each.message)):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    for record in records.values():
        told = record.levelno >= logging.WARNING and not _CHATTER.search(record.getMessage())
        if told or record.thread != get_ident():
            logging.getLogger(record.name).handle(record)


@contextmanager
def _held_back() -> Iterator[tuple[list[warnings.WarningMessage], dict[int, logging.LogRecord]]]:
    """What was warned of and logged in the block; afterwards the process is as it was."""
    environment = dict(os.environ)
    from transformers.utils import logging as hf_logging

    held, loggers = _Held(), [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.handlers[:], logger.level) for logger in loggers]
    bars = hf_logging.is_progress_bar_enabled()
    with ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.enter_context(redirect_stdout(_Muted(sys.stdout)))
        hf_logging.disable_progress_bar()
        for logger in loggers:
            logger.handlers[:] = [held]
        try:
            yield caught if caught is not None else [], held.records
        finally:
            for logger, handlers, level in before:
                logger.handlers[:] = handlers
                logger.setLevel(level)
            if bars:
                hf_logging.enable_progress_bar()
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update({k: v for k, v in environment.items() if os.environ.get(k) != v})
