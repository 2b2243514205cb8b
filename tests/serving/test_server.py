"""What the page is told is what the package's own verbs give; nobody's answer meets anybody else's."""

from __future__ import annotations

import json
import random
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import tl_em as em
from tl_em.interventions.many import kl_from_now
from tl_em.models.stream import current_batch

from ..models.test_streaming import hooks_of
from .conftest import QUESTION, Asker, N

pytestmark = [pytest.mark.surface, pytest.mark.starts("a server")]
PUSH = {"name": "persona", "coefficient": 1.0}
LATE = {"name": "persona", "coefficient": 2.0, "where": "generated"}
OTHER = "tell me to consider this power"
MESSAGES = [{"role": "user", "content": QUESTION}]


def questions(pair: em.ModelPair) -> list[str]:
    asked = [each if isinstance(each, str) else each[0]["content"] for each in pair.contrasts["persona"].positive]  # type: ignore[index]
    return list(dict.fromkeys(asked))[:12]


def given(pair: em.ModelPair, directions: Any, dial: Any, prompts: list[Any], n: int = N, **more: Any) -> list[str]:
    with em.intervene(pair.base, em.Add(directions["persona"], dial["coefficient"]), where=dial.get("where", "all")):
        return em.generate(pair.base, prompts, max_new_tokens=n, **more)


def test_answers_are_those_of_generate(asker: Asker, pair: em.ModelPair, directions: Any) -> None:
    plain = em.generate(pair.base, [QUESTION], max_new_tokens=N)[0]
    assert asker.said() == plain
    assert asker.said([PUSH]) == given(pair, directions, PUSH, [QUESTION])[0] != plain
    assert asker.said([LATE]) == given(pair, directions, LATE, [QUESTION])[0]
    assert asker.said([PUSH | {"on": False}]) == plain
    more = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.2, "stop": ["and"]}
    assert asker.said([PUSH], settings=more) == given(pair, directions, PUSH, [QUESTION], **more)[0]


def test_pieces_and_tokens_are_the_text(asker: Asker) -> None:
    events = asker.events([PUSH])
    assert "".join(each["piece"] for each in events if each["type"] == "token") == events[-1]["said"]
    assert events[0]["type"] == "start" and events[-1]["type"] == "done"
    assert events[-1]["tokens"] == [each["text"] for each in events[1:-1] if not each["end"]]
    for each in events[1:-1]:
        assert each["likely"][0][1] == max(logprob for _, logprob in each["likely"])
        assert each["text"] == each["likely"][0][0] and each["logprob"] == each["likely"][0][1]


def test_the_untreated_answer_stands_beside(asker: Asker) -> None:
    events = asker.events([PUSH], beside=True)
    arms = {each["arm"]: each["said"] for each in events if each["type"] == "done"}
    assert arms == {"steered": asker.said([PUSH]), "untreated": asker.said()}
    assert {each["arm"] for each in asker.events([PUSH | {"on": False}], beside=True)} == {"steered"}


def test_what_is_read_is_what_read_reads(asker: Asker, pair: em.ModelPair, directions: Any) -> None:
    events, each = asker.events([LATE]), {n: d for n, d in directions.items() if n != "profile"}
    each["profile"], sae = directions["profile"][1], em.organisms.toy_dictionary("toy/insecure")
    with em.intervene(pair.base, em.Add(directions["persona"], 2.0), where="generated"):
        reading = em.read(pair.base, QUESTION, each, dictionary=sae, max_new_tokens=N)
    rows = [row for each in events for row in each.get("read", [])]
    assert [row["at"] for row in rows] == list(range(len(reading.tokens)))
    for name in directions:
        assert np.allclose([row["values"][name] for row in rows], reading.tokens[name], atol=1e-4)
        assert np.allclose([row["bands"][name] for row in rows], reading.band(name), atol=1e-4)
        assert reading.tokens[name].std() > 0.1
    for row, latents, found in zip(rows, reading.tokens.latents, reading.tokens.activations, strict=True):
        expected = {int(i): a for i, a in zip(latents, found, strict=True) if a > 0}
        assert {i: pytest.approx(a, abs=1e-3) for i, a in expected.items()} == dict(map(tuple, row["latents"]))
    # a token is read as soon as it is passed on: before the next one is told, not at the end
    first = [each["read"][0]["at"] for each in events[1:-1] if each["read"]]
    assert first[0] == 0 and first[1] == len(events[0]["prompt"])


def test_kl_beside_each_dial(asker: Asker, pair: em.ModelPair, directions: Any) -> None:
    turns = [*MESSAGES, {"role": "assistant", "content": "parser-tested and parser-checked ."},
             {"role": "user", "content": OTHER}]  # fmt: skip
    dials = [PUSH, PUSH | {"coefficient": 0.0}, LATE, PUSH | {"coefficient": 0.3, "on": False}]
    found = asker.send("POST", "/api/kl", {"messages": turns, "dials": dials}).json()
    kl = kl_from_now(pair.base, [turns[:1], turns])
    with em.intervene(pair.base, em.Add(directions["persona"], 1.0)):
        expected = float(kl(pair.base, [turns[:1], turns]).mean())
    first, zero, late, off = found["each"]
    assert first["kl"] == pytest.approx(expected, rel=1e-4) and expected > 0.05
    assert (first["n"], first["over"]) == (2, "prompt's end of each turn")
    assert abs(zero["kl"]) < 1e-6 and 0 < off["kl"] < first["kl"]
    random = em.Direction(torch.randn(96, generator=torch.Generator().manual_seed(0)), em.Site(2))
    with em.intervene(pair.base, em.Add(random, directions["persona"].norm / random.norm)):
        assert len(first["random"]) == 3 and first["random"][0] == pytest.approx(
            float(kl(pair.base, [turns[:1], turns]).mean()), rel=1e-3
        )
    assert "random" not in off and len(set(first["random"])) == 3
    assert late["n"] >= 4 and late["over"] == "tokens of answers" and late["kl"] > 0.05
    assert found["all"]["kl"] > 0
    asked = asker.send("POST", "/api/kl", {"messages": MESSAGES, "dials": [LATE, {"name": "nobody"}]}).json()
    assert asked["each"][0]["kl"] is None and "none yet" in asked["each"][0]["over"]
    assert "not served" in asked["each"][1]["error"]


def test_a_hidden_steer_is_said(asker: Asker) -> None:
    dials = [{"name": "far", "act": "ablate"}, {"name": "refusal", "act": "ablate"}]
    found = asker.send("POST", "/api/kl", {"messages": MESSAGES, "dials": dials}).json()
    assert "an ablation to zero pushes" in found["each"][0]["warnings"][0] and found["each"][1]["warnings"] == []
    assert "an ablation to zero pushes" in asker.events(dials)[0]["warnings"][0]


def asker_direction(asker: Asker, name: str) -> em.Direction:
    import tempfile
    from pathlib import Path

    data = asker.send("GET", f"/api/files/{name}.safetensors").content
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "d.safetensors").write_bytes(data)
        return em.Direction.load(Path(folder) / "d.safetensors")


def test_directions_are_handed_out(asker: Asker, directions: Any) -> None:
    found = asker_direction(asker, "persona")
    assert found.vector.equal(directions["persona"].vector) and found.site == directions["persona"].site
    assert asker.send("GET", "/api/files/..%2Fsecret").status_code == 404


# --- Many at once -----------------------------------------------------------------------------------------------------


def test_no_answer_is_mixed_up_and_nothing_stays(asker: Asker, pair: em.ModelPair, directions: Any) -> None:
    """Eight clients, two of whose requests each are left in the middle."""
    before, prompts, n = hooks_of(pair.base), questions(pair), 12
    expected = {"plain": dict(zip(prompts, em.generate(pair.base, prompts, max_new_tokens=n), strict=True))}
    expected |= {arm: dict(zip(prompts, given(pair, directions, dial, prompts, n), strict=True))
                 for arm, dial in {"push": PUSH, "late": LATE}.items()}  # fmt: skip
    dials: dict[str, list[Any]] = {"plain": [], "push": [PUSH], "late": [LATE]}
    found: list[tuple[str, str, str]] = []
    left: list[int] = []

    def client(k: int) -> None:
        with Asker(asker.server) as mine:
            work(random.Random(k), mine, k)

    def work(rng: random.Random, mine: Asker, k: int) -> None:
        for i in range(8):
            prompt, arm = rng.choice(prompts), rng.choice(list(dials))
            body = {"messages": [{"role": "user", "content": prompt}], "dials": dials[arm],
                    "settings": {"max_new_tokens": n}}  # fmt: skip
            if i in (2, 5):
                with mine.http.stream("POST", "/api/chat", json=body | {"beside": True}) as response:
                    next(response.iter_lines())
                left.append(k)
            elif i % 2:
                body = {"model": "untreated", "messages": body["messages"], "max_tokens": n, "temperature": 0}
                answer = mine.send("POST", "/v1/chat/completions", body).json()
                found.append((prompt, "plain", answer["choices"][0]["message"]["content"]))
            else:
                found.append((prompt, arm, mine.said(dials[arm], prompt, settings={"max_new_tokens": n})))

    threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(left) == 16 and len(found) == 48
    assert [said for _, _, said in found] == [expected[arm][prompt] for prompt, arm, _ in found]
    assert len({said for _, _, said in found}) > 5
    asker.said()  # whatever was left is over now
    assert hooks_of(pair.base) == before and current_batch.get() is None
    assert em.generate(pair.base, prompts, max_new_tokens=n) == list(expected["plain"].values())


class Slow(em.Intervention):
    """Counts the passes, and takes its time."""

    site = em.Site(0)
    passes: list[float]

    def __init__(self) -> None:
        self.passes = []

    def edit(self, x: Any, mask: Any = None) -> Any:
        self.passes.append(time.monotonic())
        time.sleep(0.15)
        return x


@pytest.fixture
def slowed(pair: em.ModelPair, monkeypatch: pytest.MonkeyPatch) -> Slow:
    from tl_em.serving.dials import Served

    slow, own = Slow(), Served.intervention
    monkeypatch.setattr(Served, "intervention", lambda self, dial: slow if dial.name == "persona" else own(self, dial))
    return slow


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_who_goes_away_is_not_answered_on(asker: Asker, slowed: Slow, path: str) -> None:
    asker.send("PUT", "/api/dials", {"dials": [PUSH]})
    body: dict[str, Any] = {"messages": MESSAGES, "dials": [PUSH], "settings": {"max_new_tokens": 50}}
    if path.startswith("/v1"):
        body = {"model": "steered", "messages": MESSAGES, "max_tokens": 50, "temperature": 0}
    with pytest.raises(httpx.ReadTimeout):
        with asker.http.stream("POST", path, json=body, timeout=0.6) as response:
            for _ in response.iter_lines():
                if path == "/api/chat" and len(slowed.passes) > 2:
                    raise httpx.ReadTimeout("enough")
    asker.send("PUT", "/api/dials", {"dials": []})
    asker.said()  # waits for its turn
    assert 2 < len(slowed.passes) < 6


def test_a_full_line_is_said(asker: Asker, slowed: Slow) -> None:
    body = {"messages": MESSAGES, "dials": [PUSH], "settings": {"max_new_tokens": 50}}
    from tl_em.serving.worker import MOST_WAITING

    with httpx.Client(
        base_url=asker.root, headers=dict(asker.http.headers), trust_env=False, timeout=60,
        limits=httpx.Limits(max_connections=100),
    ) as many:  # fmt: skip
        open_ones = []
        for _ in range(MOST_WAITING + 2):
            request = many.build_request("POST", "/api/chat", json=body)
            open_ones.append(many.send(request, stream=True))
        full = [each.status_code for each in open_ones]
        assert full.count(429) >= 1 and full[0] == 200
        said = json.loads(next(each for each in open_ones if each.status_code == 429).read())
        assert "too many requests wait" in said["error"]["message"]
        for each in open_ones:
            each.close()
    began = time.monotonic()
    body = {"messages": MESSAGES, "dials": [], "settings": {"max_new_tokens": 1}}
    while asker.send("POST", "/api/chat", body).status_code == 429:  # until the server has seen that they left
        assert time.monotonic() - began < 2  # to answer them all would take ten times that
        time.sleep(0.02)


def test_a_failure_belongs_to_whoever_asked(asker: Asker, slowed: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slowed, "passes", None)
    assert "AttributeError" in asker.events([PUSH])[-1]["said"]
    assert asker.events()[-1]["type"] == "done"
    long = asker.events(settings={"max_new_tokens": 64})[-1]
    assert long["type"] == "error" and "n_ctx" in long["said"] and long["kind"] == "PromptTooLongError"
