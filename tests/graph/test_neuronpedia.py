"""Neuronpedia's own client talks to a server on this machine: what is sent, what comes back, what goes wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import torch

import tl_em as em
from tl_em.errors import ServiceError, UsageError
from tl_em.graph.graph import AttributionGraph, Node
from tl_em.interop import described, upload_graph, upload_latents

pytest.importorskip("neuronpedia")

pytestmark = pytest.mark.starts("a server")


class Server(ThreadingHTTPServer):
    """Answers as Neuronpedia's endpoints do, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, Any, str | None]] = []
        self.refuse = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def answer(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        given: Any = json.loads(body) if body else None
        server.asked.append((self.command, self.path, given, self.headers.get("X-Api-Key")))
        path = self.path.removeprefix("/api/")
        found: Any = {}
        if path == "graph/signed-put":
            found = {"url": f"{server.url}/bucket", "putRequestId": "p1"}
        elif path.startswith("graph/") and self.command == "GET":
            model, slug = path.split("/")[1:]
            found = {"id": "g1", "modelId": model, "slug": slug, "promptTokens": ["a"], "prompt": "a",
                     "titlePrefix": "", "url": "https://bucket/x.json"}  # fmt: skip
        elif path == "graph/save-to-db":
            found = {"url": "https://somewhere"}
        elif path == "list/new":
            found = {"id": "l1", **given}
        elif path == "list/add-features":
            found = given["featuresToAdd"]
        elif path.startswith("feature/"):
            model, source, index = path.split("/")[1:]
            said = [{"description": f"says {index} <b>"}] if index != "9" else []
            found = {"modelId": model, "layer": source, "index": index, "explanations": said}
        data = json.dumps(found).encode()
        self.send_response(server.refuse or 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    from neuronpedia.requests.base_request import NPRequest

    found = Server()
    monkeypatch.setattr(NPRequest, "BASE_URL", f"{found.url}/api")
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "from-the-environment")
    Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def graph() -> AttributionGraph:
    nodes = (
        Node("token", -1, 0, 7, label="cat"),
        Node("feature", 6, 0, 3, "resid_post", activation=1.0),
        Node("feature", 6, 0, 9, "resid_post", activation=1.0),
        Node("feature", 7, 0, 3, "resid_post", activation=1.0),
        Node("logit", 8, 0, 9, label="sat", weight=0.8),
    )
    edges = torch.zeros(5, 5)
    edges[1, 0], edges[4, 1] = 0.5, 0.25
    return AttributionGraph(nodes, edges, ("cat",), prompt="cat", model="mine")


def dictionary(name: str = "gpt2-small/6-res-jb") -> em.Dictionary:
    eye = torch.eye(12)
    return em.Dictionary(eye, torch.zeros(12), eye, torch.zeros(12), activation="relu", site_in=em.Site(6), name=name)


def test_a_graph_goes_up_as_its_file_under_the_names_that_were_given(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    url = upload_graph(graph(), scan="gpt2-small", slug="the-cat", api_key="mine")
    assert url == "https://neuronpedia.org/gpt2-small/graph?slug=the-cat"
    assert [(method, path) for method, path, *_ in server.asked] == [
        ("POST", "/api/graph/signed-put"), ("PUT", "/bucket"),
        ("POST", "/api/graph/save-to-db"), ("GET", "/api/graph/gpt2-small/the-cat"),
    ]  # fmt: skip
    sent = server.asked[1][2]
    assert (sent["metadata"]["scan"], sent["metadata"]["slug"]) == ("gpt2-small", "the-cat")
    assert [each["weight"] for each in sent["links"]] == [0.5, 0.25] and len(sent["nodes"]) == 5
    assert {key for *_, key in server.asked} == {"mine", None}  # the bucket is shown no key
    assert capsys.readouterr().out == ""


def test_a_list_of_latents(server: Server) -> None:
    sae = dictionary()
    found = em.FeatureSet(sae, (3, 5), (1, -1))
    assert upload_latents(found, name="shared", description="by two", notes={5: "weaker"}) == "l1"
    new, items = (given for _, _, given, _ in server.asked)
    assert new == {"name": "shared", "description": "by two"}
    assert items["listId"] == "l1"
    assert items["featuresToAdd"] == [
        {"modelId": "gpt2-small", "layer": "6-res-jb", "index": "3", "description": ""},
        {"modelId": "gpt2-small", "layer": "6-res-jb", "index": "5", "description": "weaker"},
    ]
    assert {key for *_, key in server.asked} == {"from-the-environment"}
    assert upload_latents([sae.feature(1)], name="one") == upload_latents(sae.feature(1), name="one") == "l1"


def test_latents_of_a_graph_are_described_once_each(server: Server) -> None:
    before = graph()
    twice = replace(before.nodes[1], pos=0, stream="mlp_out")
    before = AttributionGraph((*before.nodes[:4], twice, before.nodes[4]), torch.zeros(6, 6), ("cat",), prompt="cat")
    after = described(before, {6: "gpt2-small/6-res-jb"})
    assert len(server.asked) == 2
    said = [node.extra.get("explanation") for node in after.nodes]
    assert said == [None, "says 3 <b>", "", None, "says 3 <b>", None]
    assert after.nodes[2].extra["link"] == "https://www.neuronpedia.org/gpt2-small/6-res-jb/9"
    assert "says 3 <b>" not in after._repr_html_()  # what comes from outside is escaped


def test_refusals_and_silence_are_said_and_wrong_names_never_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [
        lambda: upload_graph(graph(), scan="gpt2-small", slug="x"),
        lambda: upload_latents(dictionary().feature(1), name="x"),
        lambda: described(graph(), {6: "gpt2-small/6-res-jb"}),
    ]
    for status in (401, 404, 429, 500):
        server.refuse = status
        for call in calls:
            with pytest.raises(ServiceError, match="NEURONPEDIA_API_KEY"):
                call()
    asked = len(server.asked)
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    for call in calls:
        with pytest.raises(ServiceError, match="NPKeyMissingError"):
            call()
    wrong = [
        lambda: upload_graph(graph(), scan="", slug="x"),
        lambda: upload_latents(dictionary("mine").feature(1), name="x"),
        lambda: upload_latents([], name="x"),
        lambda: described(graph(), {3: "gpt2-small/3-res-jb"}),
        lambda: described(graph(), {6: "6-res-jb"}),
    ]
    for call in wrong:
        with pytest.raises(UsageError):
            call()
    assert len(server.asked) == asked
