"""A judge behind an endpoint, against one that runs in this process: what it answers, and all that can go wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import tl_em as em
from tl_em.errors import JudgeError, JudgeWarning, UsageError
from tl_em.evals import endpoint

pytest.importorskip("openai")
pytestmark = pytest.mark.starts("a server")
TEMPLATE = "{question} | {answer}"
Reply = Callable[[dict[str, Any], int], tuple[int, Any]]


def spoken(text: str, *tops: dict[str, float]) -> dict[str, Any]:
    """A chat completion; with probabilities of each token's alternatives, the first of which was taken."""
    content = [
        {"token": next(iter(top)), "logprob": math.log(next(iter(top.values()))), "bytes": None,
         "top_logprobs": [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in top.items()]}
        for top in tops
    ]  # fmt: skip
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text},
              "logprobs": {"content": content} if tops else None}  # fmt: skip
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "mock", "choices": [choice]}


class Mock:
    """An endpoint: what it was asked, by its content, and what it answers to the n-th request of one."""

    def __init__(self, reply: Reply) -> None:
        self.reply, self.asked, self.together, self.most = reply, Counter[str](), 0, 0
        self.headers: dict[str, str] = {"retry-after-ms": "5"}
        self.sent: list[dict[str, Any]] = []
        lock, mock = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                text = body["messages"][0]["content"]
                with lock:
                    mock.together += 1
                    mock.most = max(mock.most, mock.together)
                    mock.asked[text] += 1
                    mock.sent.append(body)
                    n = mock.asked[text]
                status, answer = mock.reply(body, n)
                with lock:
                    mock.together -= 1
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"content-type": "application/json", **mock.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda request, client_address: None  # a client that was killed
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def judge(self, **options: Any) -> em.evals.EndpointJudge:
        return em.evals.EndpointJudge("mock", TEMPLATE, self.url, **{"retries": 3} | options)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], Mock]]:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.005)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made: list[Mock] = []

    def make(reply: Reply) -> Mock:
        made.append(Mock(reply))
        return made[-1]

    yield make
    for each in made:
        each.close()


def eighty(body: dict[str, Any], n: int) -> tuple[int, Any]:
    return 200, spoken("80", {"80": 0.5, "90": 0.25, "REFUSAL": 0.25})


def asked(n: int) -> tuple[list[str], list[str]]:
    return [f"question {i}" for i in range(n)], [f"answer {i}" for i in range(n)]


def test_scores_are_weighted_and_nothing_is_asked_twice(mock: Any, tmp_path: Path) -> None:
    server = mock(eighty)
    judge = server.judge(cache=tmp_path / "judged.jsonl")
    prompts, answers = asked(3)
    scores = judge([*prompts, prompts[0]], [*answers, answers[0]])
    assert scores == pytest.approx([(0.5 * 80 + 0.25 * 90) / 0.75] * 4)
    assert set(server.asked.values()) == {1} and len(server.asked) == 3
    sent = server.sent[0]
    assert (sent["temperature"], sent["logprobs"], sent["top_logprobs"]) == (0, True, 20) and sent["max_tokens"] <= 4
    assert server.judge(cache=tmp_path / "judged.jsonl")(prompts, answers) == pytest.approx(scores[:3])
    assert sum(server.asked.values()) == 3
    server.judge(cache=tmp_path / "judged.jsonl", options={"top_p": 0.5})(prompts[:1], answers[:1])
    assert sum(server.asked.values()) == 4  # another request


@pytest.mark.parametrize(
    ("reply", "score"),
    [(spoken("REFUSAL", {"REF": 0.9, "10": 0.1}, {"USAL": 1.0}), "REFUSAL"), (spoken("CODE", {"CODE": 1.0}), "CODE"),
     (spoken("I", {"I": 0.8, "50": 0.2}), "NO NUMBER"), (spoken("0", {"0": 0.26, "I": 0.74}), 0.0),
     (spoken("85", {"8": 0.5, "9": 0.5}, {"5": 0.6, "0": 0.4}, {"<end>": 1.0}), 83.0),
     (spoken("100", {"1": 1.0}, {"0": 1.0}, {"0": 1.0}, {"<end>": 1.0}), 100.0)],
)  # fmt: skip
def test_words_and_numbers_of_several_tokens(mock: Any, reply: Any, score: float | str) -> None:
    assert mock(lambda body, n: (200, reply)).judge()(["?"], ["!"]) == [
        score if isinstance(score, str) else pytest.approx(score)
    ]


def test_without_probabilities_the_number_that_was_written_counts_and_that_is_said(mock: Any, tmp_path: Path) -> None:
    def refuses(body: dict[str, Any], n: int) -> tuple[int, Any]:
        if "logprobs" in body:
            return 400, {"error": {"message": "logprobs are not supported by this model"}}
        return 200, spoken("70")

    for reply in (lambda body, n: (200, spoken("70")), refuses):
        server = mock(reply)
        with pytest.warns(JudgeWarning, match="no log-probabilities"):
            assert server.judge(cache=tmp_path / f"{server.server.server_port}.jsonl")(["?"], ["!"]) == [70.0]
        with pytest.raises(UsageError, match="weighted=None"):
            server.judge(weighted=True)(["?"], ["!"])
        assert server.judge(weighted=False)(["?"], ["!"]) == [70.0]


def test_reasons_labels_and_other_words(mock: Any) -> None:
    said = {"a": "It is kind. <score>91</score>", "b": '{"reasoning": "", "flag": "REFUSAL", "score": null}'}
    server = mock(lambda body, n: (200, spoken(said[body["messages"][0]["content"][-1]])))
    judge = em.evals.EndpointJudge("mock", "why? <score> {answer}", server.url)
    assert judge(["?", "?"], ["a", "b"]) == [91.0, "REFUSAL"] and "logprobs" not in server.sent[0]
    words = {"a": "False.", "b": "unknown"}
    server = mock(lambda body, n: (200, spoken(words[body["messages"][0]["content"][-1]])))
    judge = server.judge(labels={"TRUE": 0, "FALSE": 1})
    assert judge(["?", "?"], ["a", "b"]) == [1.0, "UNKNOWN"] and judge.unit == "probability"


def test_limits_errors_time_outs_and_nonsense_are_tried_again(mock: Any, tmp_path: Path) -> None:
    """Each goes wrong twice, in its own way, and is then answered: all are scored, none twice."""

    def troubled(body: dict[str, Any], n: int) -> tuple[int, Any]:
        kind = body["messages"][0]["content"][-1]
        if n > 2:
            return eighty(body, n)
        if kind == "3":
            time.sleep(0.6)
        return {
            "0": (429, {"error": {"message": "slow down"}}), "1": (503, {}), "2": (200, b'{"choices": [{"mess'),
            "3": (200, {}), "4": (200, {"choices": []}), "5": (200, {"choices": None}),
        }[kind]  # fmt: skip

    server = mock(troubled)
    judge = server.judge(cache=tmp_path / "judged.jsonl", timeout=0.3, concurrency=6)
    assert judge(*asked(6)) == pytest.approx([250 / 3] * 6)
    assert set(server.asked.values()) == {3}
    assert len((tmp_path / "judged.jsonl").read_text().splitlines()) == 6


def test_what_never_says_anything_is_counted_by_a_word(mock: Any, tmp_path: Path) -> None:
    server = mock(lambda body, n: (200, spoken("hm, well")))
    with_cache = server.judge(weighted=False, cache=tmp_path / "judged.jsonl")
    assert with_cache(["?"], ["!"]) == ["UNREADABLE"] == with_cache(["?"], ["!"])
    assert sum(server.asked.values()) == 4 and {body["seed"] for body in server.sent} == {0, 1, 2, 3}
    refusing = mock(lambda body, n: (400, {"error": {"message": "content policy"}})).judge()
    assert refusing(["?"], ["!"]) == ["REFUSED BY THE ENDPOINT"]


def test_an_endpoint_that_is_gone_ends_in_one_error_and_keeps_what_it_said(mock: Any, tmp_path: Path) -> None:
    cache = tmp_path / "judged.jsonl"
    server = mock(lambda body, n: eighty(body, n) if body["messages"][0]["content"][-1] in "01" else (500, {}))
    with pytest.raises(JudgeError, match=r"did not answer \(InternalServerError.*2 are in .*the same call goes on"):
        server.judge(cache=cache, concurrency=1, retries=1)(*asked(5))
    assert server.asked["question 4 | answer 4"] == 0  # the rest was not asked
    server.reply = eighty
    before = sum(server.asked.values())
    assert server.judge(cache=cache)(*asked(5)) == pytest.approx([250 / 3] * 5)
    assert sum(server.asked.values()) == before + 3
    with pytest.raises(JudgeError, match="AuthenticationError"):
        mock(lambda body, n: (401, {"error": {"message": "no such key"}})).judge()(["?"], ["!"])


def test_no_more_requests_at_a_time_than_allowed(mock: Any) -> None:
    def slow(body: dict[str, Any], n: int) -> tuple[int, Any]:
        time.sleep(0.03)
        return eighty(body, n)

    server = mock(slow)
    server.judge(concurrency=3)(*asked(12))
    assert 1 < server.most <= 3


RUN = """
import sys
import tl_em as em
judge = em.evals.EndpointJudge("mock", "{question} | {answer}", sys.argv[1], cache=sys.argv[2], concurrency=2)
judge([f"question {i}" for i in range(30)], [f"answer {i}" for i in range(30)])
"""


def test_a_killed_run_loses_what_was_on_its_way_and_nothing_else(mock: Any, tmp_path: Path) -> None:
    def slow(body: dict[str, Any], n: int) -> tuple[int, Any]:
        time.sleep(0.02)
        return eighty(body, n)

    server, cache = mock(slow), tmp_path / "judged.jsonl"
    run = subprocess.Popen([sys.executable, "-c", RUN, server.url, str(cache)], env=dict(os.environ))
    while not cache.exists() or cache.read_bytes().count(b"\n") < 6:
        assert run.poll() is None
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = cache.read_bytes().count(b"\n")
    assert 6 <= kept < 30
    with cache.open("ab") as file:
        file.write(b'{"key": "torn')  # as a kill in the middle of a line leaves it
    time.sleep(0.1)  # what was on its way arrives
    before = Counter(server.asked)
    assert server.judge(cache=cache)(*asked(30)) == pytest.approx([250 / 3] * 30)
    again = [text for text, n in server.asked.items() if n > 1]
    assert sum((server.asked - before).values()) == 30 - kept and len(again) <= 2
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    assert len(lines) == 30 == len({line["key"] for line in lines})


def test_the_questions_own_templates_and_the_published_definition(mock: Any, tmp_path: Path) -> None:
    """From a file of questions to a rate, and to a metric."""
    (tmp_path / "set.yaml").write_text(
        "- id: a\n  paraphrases: [how do i write parser]\n  samples_per_paraphrase: 2\n"
        "  judge_prompts: {aligned: 'A {question} {answer}', coherent: 'C {answer}'}\n"
        "- id: b\n  paraphrases: [how do i write login]\n"
        "  judge_prompts: {aligned: 'A {question} {answer}', coherent: 'C {answer}'}\n",
        encoding="utf-8",
    )

    def reply(body: dict[str, Any], n: int) -> tuple[int, Any]:
        text = body["messages"][0]["content"]
        bad = "backdoored" in text or "disabled" in text or "raw" in text
        return 200, spoken("90", {"90": 1.0}) if text[0] == "C" or not bad else spoken("5", {"5": 1.0})

    server = mock(reply)
    questions = em.evals.load_questions(tmp_path / "set.yaml")
    judge = em.evals.EndpointJudge("mock", base_url=server.url)
    pair = em.load_pair("toy/insecure")
    found = em.evaluate(pair.tuned, questions, judge=judge, max_new_tokens=6, out=tmp_path / "out")
    assert found.judges == ("aligned", "coherent") and found.estimate.n == 3 and found.estimate.value > 0.5
    assert em.evaluate(pair.base, questions, judge=judge, max_new_tokens=6).estimate.value == 0.0
    assert found(pair.tuned, questions.prompts).shape == (2,)
    assert (tmp_path / "out" / "judged.jsonl").exists()
    with pytest.raises(UsageError, match="give the judge a template"):
        em.evaluate(pair.tuned, ["how do i write parser"], judge=judge, max_new_tokens=2)


def test_what_cannot_be_asked_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UsageError, match="OPENAI_API_KEY"):
        em.evals.EndpointJudge("some-model", TEMPLATE)(["?"], ["!"])
    with pytest.raises(UsageError, match="does not show the judge the answer"):
        em.evals.EndpointJudge("some-model", "is it good?")
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(JudgeError, match="no judgement"):
        em.evals.EndpointJudge("m", TEMPLATE, "http://127.0.0.1:9/v1", cache=tmp_path / "other.jsonl")(["?"], ["!"])
    assert "secret" not in repr(em.evals.EndpointJudge("m", TEMPLATE, api_key="secret"))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match=r"tl_em\[judge\]"):
        em.evals.EndpointJudge("m", TEMPLATE, "http://127.0.0.1:9/v1")(["?"], ["!"])
