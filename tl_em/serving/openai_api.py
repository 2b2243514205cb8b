"""The endpoint that OpenAI's clients talk to: models, chat completions and completions, answered under the dials.

Two models are there, so that every measurement has its control beside it: ``steered``, under the dials as they stand
when the request comes, and ``untreated``, under none. Several choices are made side by side, after one reading of the
prompt, each with a seed of its own: they are the samples of ``em.generate``. What is asked for and not there (tools,
biases of tokens) is refused; it is never left out in silence.

Source: OpenAI's API reference, "Chat completions", "Completions" and "Models".
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tl_em.arguments import whole
from tl_em.errors import UsageError
from tl_em.models.generate import MAX_ROWS
from tl_em.models.prompts import encode
from tl_em.serving.answering import AnswerSettings, answered_live, messages_of, prompt_of
from tl_em.serving.dials import Served, SteeringDial
from tl_em.serving.guard import body_of, refused
from tl_em.serving.worker import Event, ModelThread

STEERED, UNTREATED = "steered", "untreated"
MOST_LIKELY = 20
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []),
    "response_format": (None, {"type": "text"}), "logit_bias": (None, {}), "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0), "echo": (None, False), "suffix": (None, ""),
    "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,), "top_k": (None, 0, -1),
}  # fmt: skip
"""What would make another answer, and the values at which it would not."""


@dataclass(frozen=True)
class Ask:
    """What a client asks.

    Args:
        model: ``"steered"`` or ``"untreated"``.
        prompt: messages, or a text that is read as it is.
        settings: of the answer; None for its length where it was left out.
        longest: whether the client named the length itself.
        likely: alternatives at each token; None where no log-probabilities are asked for.
        stream: whether the answer comes in pieces.
        usage: whether the last piece counts tokens.
        chat: which of the two forms the answer has.
        choices: how many answers.
    """

    model: str
    prompt: Any
    settings: AnswerSettings
    longest: bool
    likely: int | None
    stream: bool
    usage: bool
    chat: bool
    choices: int = 1

    @classmethod
    def from_json(cls, served: Served, body: Mapping[str, Any], *, chat: bool) -> Ask:
        """What was sent, checked.

        Raises:
            UsageError: what is not there, or means nothing. PromptError: no conversation.
        """
        n = 1 if body.get("n") is None else whole("n", body["n"], low=1, high=MAX_ROWS)
        neutral = _NEUTRAL | {"best_of": (None, n)}
        odd = [name for name, values in neutral.items() if body.get(name) not in values]
        if odd:
            raise UsageError(f"{odd[0]} is not there, so the answer would be another than was asked for; leave it out")
        if body.get("model") not in (STEERED, UNTREATED):
            raise UsageError(
                f"there is no model of that name, so it is unknown which is meant; ask for {STEERED!r} (under the "
                f"dials) or {UNTREATED!r}"
            )
        given = {"max_new_tokens": body.get("max_completion_tokens") or body.get("max_tokens")}
        given |= {name: body.get(name) for name in ("top_p", "stop", "seed", "repetition_penalty")}
        given["temperature"] = 1.0 if body.get("temperature") is None else body["temperature"]
        given["seed"] = secrets.randbits(31) if given["seed"] is None else given["seed"]
        settings = AnswerSettings(**{name: value for name, value in given.items() if value is not None})
        if n > 1 and not settings.temperature:
            raise UsageError(
                f"at temperature 0 all n={n} choices are the same answer; send n=1, or a temperature above 0"
            )
        likely = body.get("logprobs")
        if chat:
            likely = (body.get("top_logprobs") or 0) if likely else None
        likely = None if likely is None or likely is False else whole("top_logprobs", likely, low=0, high=MOST_LIKELY)
        prompt = prompt_of(served, messages_of(body.get("messages"))) if chat else _text(body.get("prompt"))
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        return cls(
            body["model"], prompt, settings, given["max_new_tokens"] is not None, likely, bool(body.get("stream")),
            usage, chat, n,
        )  # fmt: skip


def _text(prompt: Any) -> str:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or len(texts) != 1 or not isinstance(texts[0], str):
        raise UsageError("prompt is no single text, so it is unknown what goes on; send one text a request")
    return texts[0]


class Endpoint:
    """The routes.

    Args:
        served: the model.
        thread: that runs it.
        dials: as they stand now.
    """

    def __init__(
        self, served: Served, thread: ModelThread, dials: Callable[[], tuple[SteeringDial, ...]]
    ) -> None:
        self.served, self.thread, self.dials = served, thread, dials
        self.began = int(time.time())

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        data = [{"id": name, "object": "model", "created": self.began, "owned_by": "tl_em"}
                for name in (STEERED, UNTREATED)]  # fmt: skip
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": data})
        found = next((each for each in data if each["id"] == name), None)
        return refused(404, "there is no model of that name here; ask for one of GET /v1/models") if (
            found is None) else JSONResponse(found)  # fmt: skip

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        return await self._answer(request, chat=True)

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``: a text is read as it is, without a chat template."""
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        ask = Ask.from_json(self.served, await body_of(request), chat=chat)
        dials = () if ask.model == UNTREATED else self.dials()

        def run(emit: Callable[[Event], None], gone: Callable[[], bool]) -> None:
            prompt = encode(self.served.model, [ask.prompt], chat=None if chat else False)[0]
            settings = ask.settings
            if not ask.longest:
                room = int(self.served.model.cfg.n_ctx) - len(prompt)
                settings = AnswerSettings(**{**vars(settings), "max_new_tokens": max(1, min(512, room))})
            answered_live(
                self.served, prompt, dials, settings, emit, gone, reading=False, likely=ask.likely or 0,
                samples=ask.choices,
            )  # fmt: skip

        waiting = self.thread.ask(run)
        if waiting is None:
            return busy()
        events = waiting.events()
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}" if chat else f"cmpl-{secrets.token_hex(12)}",
                 "created": int(time.time()), "model": ask.model}  # fmt: skip
        try:
            first = await unless_gone(request, anext(events))
            if first["type"] == "error":
                return refused(first["status"], first["said"], first["kind"])
            if ask.stream:
                return StreamingResponse(_stream(ask, about, events), media_type="text/event-stream")
            found, left = [first], ask.choices
            while left and found[-1]["type"] != "error":
                found.append(await unless_gone(request, anext(events)))
                left -= found[-1]["type"] == "done"
        except ConnectionError:
            waiting.leave()
            return Response(status_code=499)
        last = found[-1]
        if last["type"] == "error":
            return refused(last["status"], last["said"], last["kind"])
        return JSONResponse(about | _whole(ask, found))


def busy() -> JSONResponse:
    """The line is full."""
    said = "too many requests wait for the one model, and this one would wait long; send it again in a few seconds"
    return refused(429, said, "rate_limit_error")


async def unless_gone(request: Request, awaited: Any) -> Any:
    """What is awaited, unless the client goes away first.

    Raises:
        ConnectionError: it did.
    """
    import asyncio

    task, watching = asyncio.ensure_future(awaited), asyncio.ensure_future(request.receive())
    try:
        while not task.done():
            await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                break
            if watching.result()["type"] == "http.disconnect":
                task.cancel()
                raise ConnectionError("the client went away")
            watching = asyncio.ensure_future(request.receive())
        return task.result()
    finally:
        watching.cancel()


def _reason(last: Event) -> str:
    return "length" if last["truncated"] else "stop"


def _usage(done: Sequence[Event]) -> dict[str, int]:
    """Tokens of the prompt, which all choices share, and of all choices together."""
    n, m = done[0]["n_prompt"], sum(each["n_answer"] for each in done)
    return {"prompt_tokens": n, "completion_tokens": m, "total_tokens": n + m}


def _whole(ask: Ask, events: list[Event]) -> dict[str, Any]:
    done = sorted((each for each in events if each["type"] == "done"), key=lambda each: each["sample"])

    def choice(last: Event) -> dict[str, Any]:
        own = [each for each in events if each["type"] == "token" and each["sample"] == last["sample"]]
        logprobs, said = _logprobs(ask, [each for each in own if not each["end"]]), last["said"]
        shown = {"message": {"role": "assistant", "content": said, "refusal": None}} if ask.chat else {"text": said}
        return {"index": last["sample"], "finish_reason": _reason(last), "logprobs": logprobs} | shown

    kind = "chat.completion" if ask.chat else "text_completion"
    return {"object": kind, "choices": [choice(each) for each in done], "usage": _usage(done),
            "seed": ask.settings.seed}  # fmt: skip


def _logprobs(ask: Ask, tokens: list[Event]) -> dict[str, Any] | None:
    if ask.likely is None:
        return None
    if not ask.chat:
        return {
            "tokens": [each["text"] for each in tokens],
            "token_logprobs": [each["logprob"] for each in tokens],
            "top_logprobs": [dict(map(tuple, each.get("likely", []))) for each in tokens],
        }

    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace"))}

    return {"refusal": None, "content": [
        one(each["text"], each["logprob"]) | {"top_logprobs": [one(*other) for other in each.get("likely", [])]}
        for each in tokens
    ]}  # fmt: skip


async def _stream(ask: Ask, about: dict[str, Any], events: AsyncIterator[Event]) -> AsyncIterator[str]:
    kind = {"object": "chat.completion.chunk" if ask.chat else "text_completion"}
    done: list[Event] = []

    def chunk(at: int, piece: str | None, reason: str | None = None, tokens: list[Event] | None = None) -> str:
        delta: dict[str, Any] = {} if piece is None else {"content": piece}
        shown: dict[str, Any] = {"delta": delta} if ask.chat else {"text": piece or ""}
        shown |= {"index": at, "finish_reason": reason, "logprobs": _logprobs(ask, tokens) if tokens else None}
        return _event(about | kind | {"choices": [shown]})

    for at in range(ask.choices if ask.chat else 0):
        opening = {"index": at, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        yield _event(about | kind | {"choices": [opening]})
    async for event in events:
        if event["type"] == "token":
            tokens = [] if event["end"] else [event]
            if event["piece"] or (ask.likely is not None and tokens):
                yield chunk(event["sample"], event["piece"], tokens=tokens)
        elif event["type"] == "error":
            yield _event({"error": {"message": event["said"], "type": event["kind"], "param": None, "code": None}})
            return
        elif event["type"] == "done":
            done.append(event)
            yield chunk(event["sample"], None, _reason(event))
    if ask.usage and done:
        yield _event(about | kind | {"choices": [], "usage": _usage(done)})
    yield "data: [DONE]\n\n"


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"
