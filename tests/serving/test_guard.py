"""Who may ask, and what a page may do: a token on every path, names of this machine alone, a closed policy, bounds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import tl_em as em
from tl_em.errors import OpenAddressWarning, UsageError

from .conftest import Asker, extracted

pytestmark = pytest.mark.starts("a server")
HOSTS = ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil", ""]


@pytest.fixture(scope="module")
def pair() -> em.ModelPair:
    return em.load_pair("toy/insecure")


@pytest.fixture(scope="module")
def asker(pair: em.ModelPair) -> Iterator[Asker]:
    with em.serve(pair.base, extracted(), port=0, block=False) as server, Asker(server) as each:
        yield each


@pytest.fixture(scope="module")
def stranger() -> Iterator[httpx.Client]:
    """A client that knows no token."""
    with httpx.Client(trust_env=False) as each:
        yield each


ROUTES = [("GET", "/"), ("GET", "/api/about"), ("PUT", "/api/dials"), ("POST", "/api/chat"), ("POST", "/api/kl"),
          ("POST", "/api/python"), ("GET", "/api/files/persona.safetensors"), ("GET", "/v1/models"),
          ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/nothing")]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_path_asks_for_the_token(asker: Asker, stranger: httpx.Client, method: str, path: str) -> None:
    token = asker.server.token
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {token}"},
                    {"Authorization": f"Bearer {token}x"}, {"Cookie": f"token={token}"}):  # fmt: skip
        found = stranger.request(method, asker.root + path, headers=headers)
        assert found.status_code == 401 and "token" in found.json()["error"]["message"]
    if path != "/":
        assert stranger.request(method, f"{asker.root}{path}?token={token}").status_code == 401
    known = asker.send(method, path, {} if method != "GET" else None)
    assert known.status_code in (200, 400, 404) and token not in known.text


@pytest.mark.parametrize("host", HOSTS)
def test_another_host_is_refused(asker: Asker, host: str) -> None:
    port = asker.root.rsplit(":", 1)[1]
    found = asker.send("GET", "/api/about", headers={"Host": host.format(port=port)})
    assert found.status_code == 421
    for name in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert asker.send("GET", "/api/about", headers={"Host": name}).status_code == 200


def test_another_page_is_refused(asker: Asker) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"{asker.root}.evil.example"):
        assert asker.send("GET", "/api/about", headers={"Origin": origin}).status_code == 403
    assert asker.send("GET", "/api/about", headers={"Origin": asker.root}).status_code == 200


def test_the_page_is_closed(asker: Asker, stranger: httpx.Client) -> None:
    one, two = (stranger.get(asker.server.address) for _ in range(2))
    policy = one.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert one.text.count(f'nonce="{nonce}"') == 2 and nonce not in two.text
    for header, value in (("cache-control", "no-store"), ("referrer-policy", "no-referrer"),
                          ("x-content-type-options", "nosniff"), ("x-frame-options", "DENY")):  # fmt: skip
        assert one.headers[header] == value == asker.send("GET", "/api/about").headers[header]
    assert "set-cookie" not in one.headers and "server" not in one.headers
    assert "http://" not in one.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in one.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"messages": NaN}', b"3"], ids=repr)
def test_what_is_no_json_is_refused(asker: Asker, body: bytes) -> None:
    for path in ("/api/chat", "/api/kl", "/v1/chat/completions"):
        found = asker.http.post(path, content=body)
        assert found.status_code in (200, 400) and (path == "/api/kl" or found.status_code == 400)
        assert "Traceback" not in found.text


def test_a_body_is_bounded(asker: Asker) -> None:
    found = asker.http.post("/api/chat", content=b" " * 1_000_001)
    assert found.status_code == 413 and "bytes" in found.json()["error"]["message"]

    def endless() -> Any:
        for _ in range(200):
            yield b" " * 10_000

    assert asker.http.post("/api/chat", content=endless()).status_code == 413


def test_an_open_address_is_warned_of(pair: em.ModelPair) -> None:
    with pytest.warns(OpenAddressWarning, match="open to other machines"):
        em.serve(pair.base, host="0.0.0.0", port=0, block=False).close()


def test_what_cannot_be_served_is_said(pair: em.ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    with em.serve(pair.base, port=0, block=False) as server:
        with pytest.raises(UsageError, match="nothing can listen"):
            em.serve(pair.base, port=int(server.base_url.split(":")[2].split("/")[0]), block=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UsageError, match=r"tl_em\[serve\]"):
        em.serve(pair.base, port=0, block=False)
