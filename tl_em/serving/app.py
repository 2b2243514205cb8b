"""The routes of the page: what is there, an answer as it is made, how far dials push, the Python of a state."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

import tl_em
from tl_em.directions.direction import Direction
from tl_em.directions.profile import Profile
from tl_em.errors import TlEmError, UsageError
from tl_em.graph.references import SINK
from tl_em.models.sites import Provenance
from tl_em.models.templates import has_template
from tl_em.report.html import environment
from tl_em.serving.answering import DEFAULT, LONGEST, AnswerSettings, answered_live, divergence, messages_of, prompt_of
from tl_em.serving.dials import Served, SteeringDial, dials_of
from tl_em.serving.export import python_of
from tl_em.serving.guard import Guard, body_of, policy, refused
from tl_em.serving.openai_api import Endpoint, busy, unless_gone
from tl_em.serving.worker import Event, ModelThread, status_of
from tl_em.showing import showable, slug

_TEMPLATES = Path(__file__).parent / "templates"


class Page:
    """The routes, and the dials as they stand.

    Args:
        served: the model.
        thread: that runs it.
        dials: at the beginning.
    """

    def __init__(self, served: Served, thread: ModelThread, dials: Sequence[SteeringDial]) -> None:
        self.served, self.thread, self.dials = served, thread, tuple(dials)

    async def page(self, request: Request) -> Response:
        """``GET /``."""
        nonce = secrets.token_urlsafe(16)
        document = environment(_TEMPLATES).get_template("serve.html.j2").render(
            nonce=nonce, version=tl_em.__version__, title=_label(self.served), sink=SINK
        )  # fmt: skip
        return HTMLResponse(document, headers={"content-security-policy": policy(nonce)})

    async def about(self, request: Request) -> Response:
        """``GET /api/about``: what can be turned and read."""
        served, dictionary = self.served, self.served.dictionary
        directions = [
            {"name": name, "about": _about(each), "file": f"{slug(name)}.safetensors"}
            for name, each in served.directions.items()
        ]
        latents = None if dictionary is None else {
            "name": dictionary.label, "n": dictionary.d_sae, "site": str(dictionary.site_in),
            "set": not dictionary.is_transcoder,
        }  # fmt: skip
        return JSONResponse({
            "model": _label(served), "directions": directions, "dictionary": latents, "longest": LONGEST,
            "default": DEFAULT, "n_ctx": int(served.model.cfg.n_ctx), "sink": SINK,
            "chat": has_template(getattr(served.model, "tokenizer", None)),
            "dials": [each.to_json() for each in self.dials],
        })  # fmt: skip

    async def turn(self, request: Request) -> Response:
        """``PUT /api/dials``: how the endpoint answers from now on."""
        dials = dials_of((await body_of(request)).get("dials"))
        for dial in dials:
            self.served.intervention(dial)
        self.dials = dials
        return JSONResponse({"dials": [each.to_json() for each in dials], "said": [repr(each) for each in dials]})

    async def chat(self, request: Request) -> Response:
        """``POST /api/chat``: an answer under dials, and beside it one without, as lines of JSON."""
        body = await body_of(request)
        prompt = prompt_of(self.served, messages_of(body.get("messages")))
        dials, settings = dials_of(body.get("dials")), AnswerSettings.from_json(body.get("settings", {}))
        beside = bool(body.get("beside")) and any(each.on for each in dials)

        def run(emit: Callable[[Event], None], gone: Callable[[], bool]) -> None:
            answered_live(self.served, prompt, dials, settings, emit, gone)
            if beside and not gone():
                answered_live(self.served, prompt, (), settings, emit, gone, arm="untreated")

        waiting = self.thread.ask(run)
        if waiting is None:
            return busy()
        return StreamingResponse(_lines(waiting.events()), media_type="application/x-ndjson")

    async def kl(self, request: Request) -> Response:
        """``POST /api/kl``: how far each dial pushes, on a conversation."""
        body = await body_of(request)
        dials, given = dials_of(body.get("dials")), body.get("messages")
        messages = messages_of([*given, {"role": "user", "content": "-"}])[:-1] if isinstance(given, list) else []

        def run(emit: Callable[[Event], None], gone: Callable[[], bool]) -> None:
            emit({"type": "kl"} | divergence(self.served, messages, dials, gone))

        waiting = self.thread.ask(run)
        if waiting is None:
            return busy()
        try:
            found = await unless_gone(request, anext(waiting.events()))
        except ConnectionError:
            waiting.leave()
            return Response(status_code=499)
        if found["type"] == "error":
            return refused(found["status"], found["said"], found["kind"])
        return JSONResponse(found)

    async def python(self, request: Request) -> Response:
        """``POST /api/python``: the Python that gives an answer again."""
        body = await body_of(request)
        dials, settings = dials_of(body.get("dials")), AnswerSettings.from_json(body.get("settings", {}))
        return PlainTextResponse(python_of(self.served, dials, messages_of(body.get("messages")), settings))

    async def file(self, request: Request) -> Response:
        """``GET /api/files/NAME``: a direction or profile, as its ``load`` reads it."""
        name = request.path_params["name"]
        found = next((d for n, d in self.served.directions.items() if f"{slug(n)}.safetensors" == name), None)
        if found is None:
            return refused(404, "no direction of that name is served here; take a name of GET /api/about")
        with tempfile.TemporaryDirectory() as folder:
            data = found.save(Path(folder) / "direction.safetensors").read_bytes()
        kept = {"content-disposition": f'attachment; filename="{slug(name)}"'} if name.isascii() else {}
        return Response(data, media_type="application/octet-stream", headers=kept)


def application(
    served: Served, token: str, *, host: str = "127.0.0.1", dials: Sequence[SteeringDial] = (),
    thread: ModelThread | None = None,
) -> Any:  # fmt: skip
    """The page and the endpoint as an ASGI application, guarded.

    Args:
        served: the model, and what can be turned on it.
        token: that every request must know.
        host: that is listened at.
        dials: at the beginning.
        thread: that runs the model; one of its own by default.
    """
    thread = thread or ModelThread()
    page = Page(served, thread, dials)
    endpoint = Endpoint(served, thread, lambda: page.dials)
    routes = [
        Route("/", page.page, methods=["GET"]),
        Route("/api/about", page.about, methods=["GET"]),
        Route("/api/dials", page.turn, methods=["PUT"]),
        Route("/api/chat", page.chat, methods=["POST"]),
        Route("/api/kl", page.kl, methods=["POST"]),
        Route("/api/python", page.python, methods=["POST"]),
        Route("/api/files/{name}", page.file, methods=["GET"]),
        Route("/v1/models", endpoint.models, methods=["GET"]),
        Route("/v1/models/{name}", endpoint.models, methods=["GET"]),
        Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
        Route("/v1/completions", endpoint.completions, methods=["POST"]),
    ]
    handlers: Any = {TlEmError: _said, 404: _nothing, 405: _nothing, 500: _broken}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), token, host)


async def _said(request: Request, error: Any) -> Response:
    long = isinstance(error, UsageError) and str(error).startswith("the request holds more than")
    return refused(413 if long else status_of(error), str(error), type(error).__name__)


async def _nothing(request: Request, error: Any) -> Response:
    said = "there is nothing at this path, or not by this method; the page is at /, the endpoint at /v1"
    return refused(error.status_code, said)


async def _broken(request: Request, error: Any) -> Response:
    said = f"{type(error).__name__}: the request could not be answered, and nothing was changed; send it again"
    return refused(500, said, "server_error")


async def _lines(events: AsyncIterator[Event]) -> AsyncIterator[str]:
    async for event in events:
        yield json.dumps(event) + "\n"


def _about(directed: Direction | Profile) -> str:
    if isinstance(directed, Direction):
        return f"{directed.site}, length {directed.norm:.2f}"
    middle = directed.directions[len(directed.directions) // 2]
    return f"{directed.stream} at {len(directed)} layers, read at {middle.site}"


def _label(served: Served) -> str:
    return showable(served.source or Provenance.of(served.model).model)
