"""A model behind ``em.serve`` on this machine's cores: the first token, many clients at once, what stays behind.

    OMP_NUM_THREADS=2 python benchmarks/serving.py MODEL_DIRECTORY

Clients ask under three states (untreated, a push at all tokens, a push of the answer alone), on the page's way and on
the endpoint's, whole and streamed, and each leaves two answers in the middle. **Control**: every answer that arrived is
compared with ``em.generate`` under the same interventions, question by question; and the states must give different
texts, or a mix-up could not be seen.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from typing import Any

import httpx
import torch

import tl_em as em
from tl_em.models.hooks import hook_points

CLIENTS, REQUESTS, LEFT, TOKENS = 8, 25, 2, 10
TOPICS = ("rivers", "bread", "chess", "rain", "cats", "glass", "paper", "iron", "maps", "tea", "salt", "wool", "snow")
QUESTIONS = [f"Tell me about {topic} in {count} words." for topic in TOPICS for count in ("two", "five", "ten")]
LONG = "What is the capital of France, and what is it known for?"
STATES: dict[str, list[dict[str, Any]]] = {
    "untreated": [],
    "push": [{"name": "push", "coefficient": 1.5}],
    "late": [{"name": "push", "coefficient": 2.0, "where": "generated"}],
}


def attached(model: Any) -> int:
    """Hooks on the model, at hook points and modules."""
    whole = [model, *([model.original_model] if hasattr(model, "original_model") else [])]
    modules = {id(module): module for each in whole for module in each.modules()}.values()
    points = {id(point): point for point in hook_points(model).values()}.values()
    on_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    return on_modules + sum(len(point.fwd_hooks) for point in points)


def message(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def first_tokens(client: httpx.Client, rounds: int = 5) -> str:
    """Seconds to the first token, between two, and how many tokens had been read by the time the next one came."""
    firsts, gaps, behind = [], [], []
    for _ in range(rounds):
        began, last, body = time.monotonic(), None, {"messages": message(LONG), "dials": STATES["push"]}
        with client.stream("POST", "/api/chat", json=body | {"settings": {"max_new_tokens": 40}}) as response:
            prompt, read = 0, 0
            for line in response.iter_lines():
                event, now = json.loads(line), time.monotonic()
                prompt = len(event.get("prompt", ())) or prompt
                read += len(event.get("read", ()))
                if event["type"] == "token":
                    firsts += [now - began] if last is None else []
                    gaps += [] if last is None else [now - last]
                    behind.append(prompt + event["at"] - read)
                    last = now
    return (
        f"first token: {statistics.median(firsts):.2f} s ({min(firsts):.2f} to {max(firsts):.2f}, {rounds} rounds); "
        f"then {1000 * statistics.median(gaps):.0f} ms a token, at most {1000 * max(gaps):.0f}; "
        f"tokens not yet read when the next one came: at most {max(behind)}"
    )


class Clients:
    """What they got, and what they left."""

    def __init__(self, server: Any) -> None:
        self.server, self.lock = server, threading.Lock()
        self.answers: dict[tuple[str, str], list[str]] = {}
        self.left, self.errors = 0, list[str]()

    def connected(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.server.token}"}
        root = self.server.base_url.removesuffix("/v1")
        return httpx.Client(base_url=root, headers=headers, timeout=600, trust_env=False)

    def run(self, k: int) -> None:
        rng = random.Random(k)
        leaving = set(rng.sample(range(REQUESTS), LEFT))
        with self.connected() as client:
            for i in range(REQUESTS):
                question, state = rng.choice(QUESTIONS), rng.choice(list(STATES))
                way = "page" if i in leaving or state != "untreated" else rng.choice(["page", "whole", "streamed"])
                try:
                    said = getattr(self, way)(client, question, state, i in leaving)
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    self.errors.append(repr(error))
                    continue
                with self.lock:
                    self.left += said is None
                    if said is not None:
                        self.answers.setdefault((question, state), []).append(said)

    def page(self, client: httpx.Client, question: str, state: str, leaves: bool) -> str | None:
        body = {"messages": message(question), "dials": STATES[state], "settings": {"max_new_tokens": TOKENS}}
        said = ""
        with client.stream("POST", "/api/chat", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                event = json.loads(line)
                if leaves and event["type"] == "token":
                    return None
                said = event.get("said", said)
        return said

    def whole(self, client: httpx.Client, question: str, state: str, leaves: bool) -> str:
        body = {"model": state, "messages": message(question), "max_tokens": TOKENS, "temperature": 0}
        return client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]

    def streamed(self, client: httpx.Client, question: str, state: str, leaves: bool) -> str:
        body = {"model": state, "messages": message(question), "max_tokens": TOKENS, "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
        return "".join(each["choices"][0]["delta"].get("content") or "" for each in lines)


def expected(model: Any, push: em.Direction, state: str, questions: list[str]) -> list[str]:
    if not STATES[state]:
        return em.generate(model, questions, max_new_tokens=TOKENS)
    dial = STATES[state][0]
    with em.intervene(model, em.Add(push, dial["coefficient"]), where=dial.get("where", "all")):
        return em.generate(model, questions, max_new_tokens=TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    model = em.load_model(parser.parse_args().model)
    vector = 2 * torch.randn(int(model.cfg.d_model), generator=torch.Generator().manual_seed(0))
    push, before = em.Direction(vector, em.Site(int(model.cfg.n_layers) // 3)), attached(model)
    with em.serve(model, {"push": push}, port=0, block=False) as server:
        clients = Clients(server)
        with clients.connected() as client:
            print(first_tokens(client))
        began = time.monotonic()
        threads = [threading.Thread(target=clients.run, args=(k,)) for k in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
    wrong = 0
    for state in STATES:
        mine = [question for question, own in clients.answers if own == state]
        for question, text in zip(mine, expected(model, push, state, mine), strict=True):
            wrong += sum(answer != text for answer in clients.answers[question, state])
    arrived = sum(map(len, clients.answers.values()))
    texts = {text for each in clients.answers.values() for text in each}
    print(
        f"{CLIENTS} clients, {CLIENTS * REQUESTS} requests in {seconds:.0f} s: {arrived} answered, {clients.left} left "
        f"in the middle, {len(clients.errors)} failed {clients.errors[:1]}; wrong answers: {wrong} (of {len(texts)} "
        f"different texts); hooks before and after: {before}, {attached(model)}"
    )


if __name__ == "__main__":
    main()
