"""Serving: one port of this machine, a token in the address, a page that is opened, an end by Ctrl-C."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import threading
import warnings
import webbrowser
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tl_em.arguments import NOUNS, checked, several, whole
from tl_em.dictionaries.loading import load_dictionary
from tl_em.dictionaries.protocol import as_dictionary
from tl_em.directions.direction import Direction
from tl_em.directions.files import load_directed
from tl_em.directions.profile import Profile, as_directed, check_all_fit
from tl_em.errors import OpenAddressWarning, UsageError
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model
from tl_em.models.sites import Provenance, Site
from tl_em.serving.dials import Served, SteeringDial
from tl_em.showing import showable

PORT = 8765


class RunningServer:
    """A server in a thread of its own, as ``em.serve(block=False)`` gives it; a ``with`` block ends it.

    Args:
        served: the model.
        dials: at the beginning.
        host: where it listens.
        listening: the socket that is open there.
        token: that requests must know.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> with em.serve(pair.tuned, port=0, block=False) as server:
        ...     server.address.startswith("http://127.0.0.1:"), server.base_url.endswith("/v1")
        (True, True)
    """

    def __init__(
        self, served: Served, dials: Sequence[SteeringDial], host: str, listening: socket.socket, token: str
    ) -> None:
        import uvicorn

        from tl_em.serving.app import application
        from tl_em.serving.worker import ModelThread

        self.token = token
        """That every request must know: in the page's address, or as ``Authorization: Bearer``."""
        for dial in dials:
            served.intervention(dial)
        self._model_thread = ModelThread()
        app = application(served, token, host=host, dials=dials, thread=self._model_thread)
        self._socket = listening
        shown = "127.0.0.1" if host in ("", "0.0.0.0") else "[::1]" if host == "::" else host
        shown = f"[{shown}]" if ":" in shown and not shown.startswith("[") else shown
        self._root = f"http://{shown}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app, log_level="error", access_log=False, server_header=False, lifespan="off", ws="none",
            limit_concurrency=128, timeout_graceful_shutdown=2,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """Of the page, with its token: who has it may ask."""
        return f"{self._root}/?token={self.token}"

    @property
    def base_url(self) -> str:
        """Of the endpoint, for OpenAI's clients; the token is their API key."""
        return f"{self._root}/v1"

    def run(self) -> None:
        """Serve until Ctrl-C."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._model_thread.close()

    def start(self) -> RunningServer:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="tl_em", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)
        return self

    def close(self) -> None:
        """End it; nothing stays on the model."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(timeout=10)
        self._socket.close()
        self._model_thread.close()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RunningServer({self._root}; the page's address is .address)"


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, TypeError, ValueError) as error:  # TypeError, ValueError: no host's name
        raise UsageError(
            f"nothing can listen at {host}, port {port} ({error}), so there would be no page; pass another port=, or "
            "port=0 for any that is free"
        ) from error


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.casefold() == "localhost"


@checked(port=lambda name, value: whole(name, value, low=0, high=65535))
def serve(
    model: LensModel | str | Path | Any,
    directions: Direction | Profile | Sequence[Direction | Profile | str | Path] | Mapping[str, Direction] | Any = (),
    *,
    dictionary: Any = None,
    dials: Sequence[SteeringDial] = (),
    surface: Any = "bridge",
    host: str = "127.0.0.1",
    port: int = PORT,
    token: str | None = None,
    browser: bool = False,
    block: bool = True,
) -> RunningServer:
    """Chat with a model on a local page while directions and latents are turned by dials.

    The page colours each token of an answer by what a chosen direction reads there, shows the untreated answer beside
    it, says how far each dial is from the untreated model, and gives the Python that makes the same text again. An
    OpenAI-compatible endpoint answers under the same dials, and without them. Both listen on this machine alone, and to
    those alone who have the address, which holds a random token.

    Args:
        model: a HookedTransformer or TransformerBridge, or what ``em.load_model`` takes.
        directions: what can be turned and read: directions, profiles, or files of either; a mapping gives names.
        dictionary: whose latents can be turned and read: a dictionary, or a file of one.
        dials: what is turned from the beginning (``em.serving.SteeringDial``).
        surface: of a model that is loaded here.
        host: where to listen; anything but this machine alone is warned of.
        port: of the address; 0 takes any that is free.
        token: that requests must know; a random one by default.
        browser: whether to open the page.
        block: whether to serve until Ctrl-C; else it serves in a thread, and the call returns.

    Returns:
        The server: ``.address`` of the page, ``.base_url`` and ``.token`` for OpenAI's clients, ``.close()``.

    Raises:
        UsageError: the extra ``serve`` is missing, nothing can listen there, or a dial turns what is not served.
        WidthError, ProvenanceError: a direction or dictionary of another model. And what ``em.load_model`` raises.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> site = em.Site(2)
        >>> persona = em.difference_in_means(pair.base, pair.contrasts["persona"], site=site, position="prompt_end")
        >>> server = em.serve(pair.base, {"persona": persona}, port=0, block=False)
        >>> server.close()

    Source: the endpoint's form: OpenAI's API reference, "Chat completions".
    """
    _check_extra()
    if not _loopback(host):
        warnings.warn(
            f"host={host!r} is open to other machines, over a connection that nobody encrypted: whoever reads along "
            "has the token, and may use the model; leave host= out, and tunnel the port over SSH",
            OpenAddressWarning,
            stacklevel=2,
        )
    with ExitStack() as stack:
        listening = stack.enter_context(_listening(host, port))  # before a model is loaded, which takes longer
        made = _served(model, directions, dictionary, surface)
        server = RunningServer(made, dials, host, listening, token or secrets.token_urlsafe(24))
        stack.pop_all()
    if block:
        print(f"Serving at {server.address}\nEndpoint {server.base_url}, API key {server.token}\nEnd with Ctrl-C.")
    if browser:
        threading.Timer(0.5, webbrowser.open, (server.address,)).start()
    if not block:
        return server.start()
    server.run()
    return server


def _check_extra() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "starlette and uvicorn are not installed, so nothing can be served; run pip install 'tl_em[serve]'"
        ) from error


def _served(model: Any, directions: Any, dictionary: Any, surface: Any) -> Served:
    source = str(model) if isinstance(model, str | Path) else None
    loaded: Any = load_model(source, surface=surface) if source is not None else NOUNS["LensModel"]("model", model)
    named, files = _named(directions)
    for each in named.values():
        check_all_fit(each, loaded)
    file = str(dictionary) if isinstance(dictionary, str | Path) else None
    found = dictionary if file is None else load_dictionary(file)
    latents = None if found is None else as_dictionary(found).check(loaded)
    if latents is not None and not isinstance(latents.site_in, Site):
        raise UsageError("a crosscoder reads several sites at once, and here one is read; give one of a single site")
    return Served(loaded, named, latents, source, Provenance.of(loaded).surface, files, file)


def _named(directions: Any) -> tuple[dict[str, Direction | Profile], dict[str, str]]:
    """Directions and profiles by name, and the files of those that came from one."""
    if isinstance(directions, Mapping) and not isinstance(directions, Profile):
        return {str(name): as_directed(f"directions[{name!r}]", each) for name, each in directions.items()}, {}
    one = isinstance(directions, str | Path | Direction | Profile)
    named: dict[str, Direction | Profile] = {}
    files: dict[str, str] = {}
    for i, each in enumerate([directions] if one else several("directions", directions)):
        file = str(each) if isinstance(each, str | Path) else None
        found = as_directed(f"directions[{i}]", each if file is None else load_directed(file))
        name = found.name or (None if file is None else Path(file).stem) or f"direction {i}"
        if name in named:
            raise UsageError(
                f"several directions are called {showable(name)!r}, so a dial could mean any of them; give them as "
                "{name: direction}, or rename one: direction.renamed(name)"
            )
        named[name] = found
        files |= {} if file is None else {name: file}
    return named, files
