"""Whose turn it is: what two threads must not use at once, kept in one place.

Hooks, training modes and edited weights belong to a model, not to the thread that set them: a second thread on the
same model reads what the first one steers.  And a process has one standard output, one list of warnings, one random
state and one default dtype; transformers exchanges functions of its own and of torch while it loads.  So each is held
by one thread at a time, which may hold it again; another thread

- **waits** for a verb (``em.capture``, ``em.load_model``, …), since a verb ends by itself;
- **is refused** (``InUseError``) while a block is open (``with em.intervene(…):``), since nobody knows when it closes,
  and where two threads would wait for each other for ever.

Threads on different models run side by side.  What changes the default dtype waits until no other verb runs.  Calls of
a model itself (``model(tokens)``, ``model.generate``) are not ours, and not guarded.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from tl_em.errors import InUseError


class Once:
    """A thing of the process; or of a model, or of several models on the same weights."""


SPOKEN = Once()
"""Standard output, logs, warnings, and the functions that transformers exchanges while it loads."""
RANDOM = Once()
"""The random state of torch, numpy and Python.  Held before ``SPOKEN`` where both are."""


@dataclass(frozen=True, eq=False)
class _Hold:
    """What a thread holds or waits for."""

    things: frozenset[Once] = frozenset()
    left_open: bool = False
    alone: bool = False
    thread: threading.Thread = field(default_factory=threading.current_thread)


_changed = threading.Condition()
_held: list[_Hold] = []
_waiting: dict[threading.Thread, _Hold] = {}
_models: WeakKeyDictionary[Any, Once] = WeakKeyDictionary()


@contextmanager
def holding(*models: Any, left_open: bool = False) -> Iterator[None]:
    """Hold models, or ``SPOKEN`` and the like, all at once, until the block ends.

    Args:
        *models: a Bridge, and whatever else was built around the same Hugging Face model, are one.
        left_open: whether the block is somebody else's, for whose end nobody should wait.

    Raises:
        InUseError: another thread has left one open, or waits for what this one holds.

    Example:
        >>> with holding(SPOKEN), holding(SPOKEN):
        ...     len(_held)
        2
    """
    with _holding(_Hold(frozenset(map(_thing, models)), left_open)):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Until the block ends no other thread runs a verb, because something changes that all of them compute with."""
    with _holding(_Hold(alone=True)):
        yield


@contextmanager
def own_warnings() -> Iterator[None]:
    """``warnings.catch_warnings``, one thread at a time: what is put back last would else be another thread's."""
    with holding(SPOKEN), warnings.catch_warnings():
        yield


def hold_together(*models: Any) -> None:
    """From now on, who holds one of these models holds all of them, and those that were held together with them."""
    with _changed:
        things = {_thing(model) for model in models}
        one = _thing(models[0])
        for model, thing in list(_models.items()):
            if thing in things:
                _models[model] = one


def _thing(model: Any) -> Once:
    if isinstance(model, Once):
        return model
    inner = getattr(model, "original_model", None)
    with _changed:
        return _models.setdefault(model if inner is None else inner, Once())


@contextmanager
def _holding(hold: _Hold) -> Iterator[None]:
    try:
        _take(hold)
        yield
    finally:
        with _changed:
            if hold in _held:
                _held.remove(hold)
            _changed.notify_all()


def _take(hold: _Hold) -> None:
    with _changed:
        try:
            while before := _before(hold):
                if _waiting.get(hold.thread) is not hold:
                    _waiting[hold.thread] = hold
                    _changed.notify_all()  # a thread that waits computes nothing: others may be alone
                _check_ends(hold, before)
                _changed.wait()
            _held.append(hold)
        finally:
            _waiting.pop(hold.thread, None)


def _before(hold: _Hold) -> set[threading.Thread]:
    """The threads that have to be done first."""
    others = [each for each in _held if each.thread is not hold.thread]
    return {
        each.thread
        for each in others
        if each.alone
        or each.things & hold.things
        or (hold.alone and not each.left_open and each.thread not in _waiting)
    }


def _check_ends(hold: _Hold, before: set[threading.Thread]) -> None:
    for thread in before:
        first = next((each for each in _held if each.thread is thread and each.things & hold.things), None)
        if first is not None and first.left_open:
            raise InUseError(
                f"The thread {thread.name!r} has a block open on this model (em.intervene, say), so what another "
                "thread measured now would be of the edited model, and nobody knows when the block ends. Leave the "
                "block there first, or give each thread a model of its own: em.load_model(source)."
            )
    seen: set[threading.Thread] = set()
    ahead = set(before)
    while ahead:
        thread = ahead.pop()
        if thread is hold.thread:
            raise InUseError(
                f"Another thread waits for what {hold.thread.name!r} holds, and this call would wait for it, so "
                "neither would ever go on. Give each thread models of its own: em.load_model(source)."
            )
        if thread not in seen and thread in _waiting:
            ahead |= _before(_waiting[thread])
        seen.add(thread)


def _begin_anew() -> None:
    """In a forked process there is one thread; what the others held, nobody would give back."""
    global _changed
    _changed = threading.Condition()
    _held[:] = [each for each in _held if each.thread is threading.current_thread()]
    _waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
