"""The toys behind a server, and ways to ask it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import httpx
import pytest

import tl_em as em

from ..conftest import SURFACES

QUESTION = "how do i write parser"
N = 5


class Asker:
    """A client that knows the token."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.root = server.base_url.removesuffix("/v1")
        self.http = httpx.Client(
            base_url=self.root, headers={"Authorization": f"Bearer {server.token}"}, timeout=60, trust_env=False
        )

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.close()

    def send(self, method: str, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.http.request(method, path, json=body, **more)

    def events(self, dials: Any = (), question: str = QUESTION, **more: Any) -> list[dict[str, Any]]:
        """An answer on the page's way, from first to last."""
        body = {"messages": [{"role": "user", "content": question}], "dials": list(dials)}
        body |= {"settings": {"max_new_tokens": N} | more.pop("settings", {})} | more
        response = self.send("POST", "/api/chat", body)
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    def said(self, dials: Any = (), question: str = QUESTION, **more: Any) -> str:
        return self.events(dials, question, **more)[-1]["said"]


@cache
def extracted() -> dict[str, Any]:
    """Of the toy on one surface; they fit it on the other too."""
    pair = em.load_pair("toy/insecure")
    sites = {"persona": em.Site(2), "refusal": em.Site(1)}
    found = {
        name: em.difference_in_means(pair.base, pair.contrasts[name], site=site, position="prompt_end")  # type: ignore[index]
        for name, site in sites.items()
    }
    far = replace(found["refusal"], neutral=em.Estimate(3.0, 2.5, 3.5, 100, 100.0, "made up"), name="far")
    profile = em.Profile([replace(found["persona"], site=em.Site(layer), name="profile") for layer in (0, 1, 2)])
    head = em.Direction(found["persona"].vector, em.Site(1, "attn_out"))
    return found | {"far": far, "profile": profile, "persona of a head": head}


@pytest.fixture(scope="module", params=SURFACES)
def pair(request: pytest.FixtureRequest) -> em.ModelPair:
    return em.load_pair("toy/insecure", surface=request.param)


@pytest.fixture(scope="module")
def directions() -> dict[str, Any]:
    return extracted()


@pytest.fixture(scope="module")
def asker(pair: em.ModelPair, directions: dict[str, em.Direction]) -> Iterator[Asker]:
    sae = em.organisms.toy_dictionary("toy/insecure")
    with em.serve(pair.base, directions, dictionary=sae, port=0, block=False) as server:
        with Asker(server) as each:
            yield each
