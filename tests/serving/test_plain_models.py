"""A model without a chat template is served one text at a time; and what else stands around an answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import tl_em as em
from tl_em.errors import PromptError, UsageError
from tl_em.serving.answering import AnswerSettings, messages_of, prompt_of
from tl_em.serving.dials import Served, SteeringDial
from tl_em.serving.export import python_of
from tl_em.serving.guard import Guard
from tl_em.serving.openai_api import _text

from ..conftest import cached_model

ONE = [{"role": "user", "content": "the cat"}]


def plain() -> Any:
    return cached_model("gpt2", "bridge", template=None)


def test_one_message_is_the_text_and_several_are_refused() -> None:
    served = Served(plain())
    assert prompt_of(served, ONE) == "the cat"
    with pytest.raises(PromptError, match="no chat template"):
        prompt_of(served, messages_of([*ONE, {"role": "assistant", "content": "sat"}, *ONE]))


def test_its_python_asks_for_the_text_and_says_what_to_put_in_place() -> None:
    import torch

    eye = torch.eye(32)
    latents = em.Dictionary(eye, eye[0] * 0, eye, eye[0] * 0, activation="relu", site_in=em.Site(1))
    served = Served(plain(), {"model": em.Direction(torch.ones(32), em.Site(1))}, latents)
    dials = [SteeringDial("model", "add", 1.0), SteeringDial("latent 3", "ablate")]
    text = python_of(served, dials, ONE, AnswerSettings(max_new_tokens=2))
    assert 'prompt = "the cat"' in text and "[prompt]" in text
    assert "model = ...  # the model that em.serve was given" in text
    assert 'model_ = em.Direction.load("model.safetensors")' in text, "a direction's name is no other variable's"
    assert "# the dictionary that em.serve was given" in text


def test_websockets_are_closed_and_nothing_else_is_answered() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def passed(*given: Any) -> None:
        pytest.fail("it reached the application")

    guard = Guard(passed, "token", "127.0.0.1")
    for kind in ("websocket", "lifespan"):
        asyncio.run(guard({"type": kind}, passed, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_completion_goes_on_from_one_text() -> None:
    assert _text("a") == _text(["a"]) == "a"
    for wrong in (["a", "b"], [], 3, [3]):
        with pytest.raises(UsageError, match="no single text"):
            _text(wrong)


@pytest.mark.starts("a server")
def test_serving_says_where_opens_the_page_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import threading

    opened, there = [], threading.Event()

    def look(address: str) -> None:
        opened.append(address)
        there.set()

    monkeypatch.setattr("webbrowser.open", look)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: there.wait(30))
    server = em.serve(plain(), port=0, browser=True, token="known")
    assert opened == [server.address] and "token=known" in server.address
    assert f"Serving at {server.address}" in capsys.readouterr().out
    server.close()
