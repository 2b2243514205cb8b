"""One thread that runs the model, and a bounded line of what it is asked: nobody's hooks meet anybody else's.

A model belongs to one thread at a time (``tl_em.threads``), and an intervention to the model. So everything that is
asked stands in line for one thread, and each is answered alone, under its own dials. Whoever goes away while waiting is
passed over, and whoever goes away while being answered is left at the next token.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from tl_em.errors import InUseError, TlEmError, first_line

MOST_WAITING = 32
Event = dict[str, Any]
Asking = Callable[[Callable[[Event], None], Callable[[], bool]], None]
"""What is done in the thread, given where to tell events, and whether anybody still listens."""


class Waiting:
    """Something that was asked: its events as they come, and a way to go away."""

    def __init__(self, ask: Asking, loop: asyncio.AbstractEventLoop) -> None:
        self._ask, self._loop = ask, loop
        self._gone = threading.Event()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    def tell(self, event: Event | None) -> None:
        """From the thread: an event, or None at the end."""
        if not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._events.put_nowait, event)
            except RuntimeError:  # closed in this very moment: nobody listens
                self._gone.set()

    @property
    def gone(self) -> bool:
        """Whether nobody wants the rest."""
        return self._gone.is_set()

    def leave(self) -> None:
        """Nobody wants the rest."""
        self._gone.set()

    async def events(self) -> AsyncIterator[Event]:
        """Each as it comes; leaving this loop is going away."""
        try:
            while (event := await self._events.get()) is not None:
                yield event
        finally:
            self._gone.set()

    def run(self) -> None:
        """In the thread."""
        try:
            if not self._gone.is_set():
                self._ask(self.tell, self._gone.is_set)
        except TlEmError as error:
            self.tell({"type": "error", "kind": type(error).__name__, "said": str(error), "status": status_of(error)})
        except Exception as error:
            said = (
                f"{type(error).__name__}: {first_line(error)}. The answer ended there, and the next one begins anew; "
                "send the request again, or look at the model with em.generate"
            )
            self.tell({"type": "error", "kind": type(error).__name__, "said": said, "status": 500})
        finally:
            self.tell(None)


def status_of(error: TlEmError) -> int:
    """Of HTTP: 503 where the model is somebody else's for now, 400 where the request is at fault."""
    return 503 if isinstance(error, InUseError) else 400


class ModelThread:
    """The thread, and the line before it.

    Args:
        most: how many may wait.
    """

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._line: deque[Waiting] = deque()
        self._changed, self._most, self._open = threading.Condition(), most, True
        self._thread = threading.Thread(target=self._serve, name="tl_em model", daemon=True)
        self._thread.start()

    def ask(self, asking: Asking) -> Waiting | None:
        """Stand in line; None where it is full. Called in the loop whose tasks listen."""
        waiting = Waiting(asking, asyncio.get_running_loop())
        with self._changed:
            if sum(not each.gone for each in self._line) >= self._most:
                return None
            self._line.append(waiting)
            self._changed.notify()
        return waiting

    def close(self) -> None:
        """End the thread, once what it does now is done."""
        with self._changed:
            self._open = False
            for waiting in self._line:
                waiting.leave()
            self._changed.notify()
        self._thread.join(timeout=10)

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._line and self._open:
                    self._changed.wait()
                if not self._line:
                    return
                waiting = self._line.popleft()
            waiting.run()
