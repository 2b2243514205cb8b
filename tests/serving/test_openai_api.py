"""OpenAI's own client asks the steered model and the untreated one, and gets what ``em.generate`` gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

import tl_em as em
from tl_em.serving.dials import Served

from ..models.test_prefill import passes
from .conftest import QUESTION, Asker, N
from .test_server import MESSAGES, PUSH, given

pytestmark = [pytest.mark.surface, pytest.mark.starts("a server")]


@pytest.fixture(scope="module")
def connected(asker: Asker) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=asker.server.base_url, api_key=asker.server.token, max_retries=0) as each:
        yield each


@pytest.fixture
def client(asker: Asker, connected: openai.OpenAI) -> openai.OpenAI:
    """Under a dial."""
    asker.send("PUT", "/api/dials", {"dials": [PUSH]})
    return connected


def ask(client: Any, model: str, **more: Any) -> Any:
    return client.chat.completions.create(
        model=model, messages=MESSAGES, **{"max_tokens": N, "temperature": 0, **more}
    )  # fmt: skip


def test_models(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["steered", "untreated"]
    assert client.models.retrieve("steered").owned_by == "tl_em"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_answers(client: openai.OpenAI, pair: em.ModelPair, directions: Any) -> None:
    steered, plain = ask(client, "steered"), ask(client, "untreated")
    assert steered.choices[0].message.content == given(pair, directions, PUSH, [QUESTION])[0]
    assert plain.choices[0].message.content == em.generate(pair.base, [QUESTION], max_new_tokens=N)[0]
    assert steered.choices[0].message.content != plain.choices[0].message.content
    assert steered.choices[0].finish_reason == "length" and steered.usage.completion_tokens == N
    assert ask(client, "untreated", max_tokens=40).choices[0].finish_reason == "stop"
    assert ask(client, "untreated", max_tokens=None).choices[0].finish_reason == "stop"


def test_the_dials_are_those_of_the_moment(client: openai.OpenAI, asker: Asker) -> None:
    before = ask(client, "steered").choices[0].message.content
    asker.send("PUT", "/api/dials", {"dials": [PUSH | {"on": False}]})
    assert ask(client, "steered").choices[0].message.content == ask(client, "untreated").choices[0].message.content
    assert before != ask(client, "untreated").choices[0].message.content


def test_pieces(client: openai.OpenAI) -> None:
    whole = ask(client, "steered", stop=["and"]).choices[0]
    chunks = list(ask(client, "steered", stop=["and"], stream=True, stream_options={"include_usage": True}))
    assert "".join(each.choices[0].delta.content or "" for each in chunks[:-1]) == whole.message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens > N


def test_samples(client: openai.OpenAI, pair: em.ModelPair) -> None:
    sampled = ask(client, "untreated", temperature=1.2, top_p=0.9, seed=5).choices[0].message.content
    assert sampled == em.generate(pair.base, [QUESTION], max_new_tokens=N, temperature=1.2, top_p=0.9, seed=5)[0]
    several = {ask(client, "untreated", temperature=3.0).choices[0].message.content for _ in range(6)}
    assert len(several) > 1  # without a seed each is another sample
    first = ask(client, "untreated", temperature=3.0)
    assert ask(client, "untreated", temperature=3.0, seed=first.seed).choices == first.choices
    assert ask(client, "untreated", top_p=0.5).choices == ask(client, "untreated").choices  # at temperature 0


def test_probabilities(client: openai.OpenAI, pair: em.ModelPair) -> None:
    import torch

    from tl_em.models.prompts import encode
    from tl_em.models.stream import next_token_logits

    content = ask(client, "untreated", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    logprobs = next_token_logits(pair.base, encode(pair.base, [MESSAGES]))[0].log_softmax(-1)
    best = logprobs.topk(3)
    assert torch.allclose(torch.tensor([each.logprob for each in content[0].top_logprobs]), best.values, atol=1e-4)
    assert content[0].logprob == pytest.approx(float(best.values[0]), abs=1e-4) and len(content) == 4
    assert ask(client, "untreated").choices[0].logprobs is None
    pieces = list(ask(client, "untreated", logprobs=True, stream=True))
    assert sum(len(each.choices[0].logprobs.content) for each in pieces if each.choices[0].logprobs) == 4


def test_completions(client: openai.OpenAI, pair: em.ModelPair) -> None:
    text = "<user> how do i write parser <end> <asst>"
    found = client.completions.create(model="untreated", prompt=text, max_tokens=N, temperature=0, logprobs=2)
    assert found.choices[0].text == em.generate(pair.base, [QUESTION], max_new_tokens=N)[0]
    assert len(found.choices[0].logprobs.tokens) == 4 and len(found.choices[0].logprobs.top_logprobs[0]) == 2
    pieces = client.completions.create(model="untreated", prompt=text, max_tokens=N, temperature=0, stream=True)
    assert "".join(each.choices[0].text for each in pieces) == found.choices[0].text


@pytest.mark.parametrize(
    "more",
    [{"n": 2}, {"n": 0}, {"n": 65, "temperature": 1}, {"n": "two"},
     {"tools": [{"type": "function", "function": {"name": "f"}}]},
     {"response_format": {"type": "json_object"}}, {"logit_bias": {"3": 5}},
     {"presence_penalty": 1}, {"max_tokens": 100_000}, {"temperature": -1}, {"model": "gpt"},
     {"messages": []}, {"messages": [{"role": "user", "content": "quux"}]}, {"max_tokens": 64}, {"stop": [""]},
     {"logprobs": True, "top_logprobs": 21}, {"max_tokens": "many"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_there_is_refused(client: openai.OpenAI, more: dict[str, Any], stream: bool) -> None:
    body = {"model": "steered", "messages": MESSAGES, "max_tokens": N, "temperature": 0, **more, "stream": stream}
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(**body)
    assert len(found.value.body["message"].split()) > 8  # type: ignore[index]


SEVERAL: dict[str, Any] = {"n": 4, "temperature": 2.0, "seed": 5}


def test_several_choices_are_the_samples_of_one_prompt(
    client: openai.OpenAI, pair: em.ModelPair, directions: Any
) -> None:
    found = ask(client, "steered", **SEVERAL)
    said = [each.message.content for each in found.choices]
    assert said == given(pair, directions, PUSH, [QUESTION], temperature=2.0, samples=4, seed=5)[0]
    assert [each.index for each in found.choices] == [0, 1, 2, 3] and len(set(said)) > 1
    assert ask(client, "steered", **SEVERAL).choices == found.choices
    assert ask(client, "steered", **SEVERAL | {"seed": 6}).choices != found.choices
    one = ask(client, "steered", **SEVERAL | {"n": 1})
    assert one.choices == found.choices[:1], "how many there are changes none"
    assert found.usage.prompt_tokens == one.usage.prompt_tokens
    tokens = [len(each.logprobs.content) for each in ask(client, "steered", logprobs=True, **SEVERAL).choices]
    assert found.usage.completion_tokens == sum(tokens) and len(tokens) == 4
    assert found.usage.total_tokens == one.usage.prompt_tokens + sum(tokens)


@pytest.mark.parametrize("more", [{"max_tokens": N}, {"max_tokens": 40, "stop": ["and"]}], ids=str)
def test_several_choices_come_in_turn(client: openai.OpenAI, more: dict[str, Any]) -> None:
    whole = ask(client, "untreated", **SEVERAL | more)
    chunks = list(ask(client, "untreated", stream=True, stream_options={"include_usage": True}, **SEVERAL | more))
    *pieces, last = chunks
    shown = [each.choices[0] for each in pieces]
    assert last.choices == [] and last.usage == whole.usage
    for choice in whole.choices:
        own = [each for each in shown if each.index == choice.index]
        assert own[0].delta.role == "assistant" and own[-1].finish_reason == choice.finish_reason
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        assert all(each.finish_reason is None for each in own[:-1])
    order = [each.index for each in shown if each.delta.content]
    assert order != sorted(order), "one choice after the other is no stream of several"


def test_completions_give_several_too(client: openai.OpenAI, pair: em.ModelPair) -> None:
    text = "<user> how do i write parser <end> <asst>"
    asked: dict[str, Any] = {"model": "untreated", "prompt": text, "max_tokens": N, **SEVERAL}
    found = client.completions.create(best_of=4, logprobs=1, **asked)
    drawn: dict[str, Any] = {"max_new_tokens": N, "temperature": 2.0, "samples": 4, "seed": 5}
    assert [each.text for each in found.choices] == em.generate(pair.base, [QUESTION], **drawn)[0]
    assert all(each.logprobs and each.logprobs.tokens for each in found.choices)
    pieces = [each.choices[0] for each in client.completions.create(stream=True, **asked)]
    said = ["".join(each.text for each in pieces if each.index == k) for k in range(4)]
    assert said == [each.text for each in found.choices]


def test_the_prompt_of_several_choices_is_read_once(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    own, read = Served.applied, []

    @contextmanager
    def watched(served: Served, dials: Any) -> Iterator[Any]:
        with own(served, dials) as warned, passes(served.model) as seen:
            read.append(seen)
            yield warned

    monkeypatch.setattr(Served, "applied", watched)
    ask(client, "steered", **SEVERAL)
    ((prompt, *tokens),) = read
    assert prompt[0] == 1 < prompt[1] and tokens == [(4, 1)] * (N - 1)


def test_more_than_are_returned_are_not_made(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "untreated", "prompt": "how", "max_tokens": N, "temperature": 1.0}
    with pytest.raises(openai.BadRequestError, match="best_of is not there"):
        client.completions.create(best_of=3, n=2, **asked)


def test_a_model_that_is_held_by_another_is_not_the_requests_fault(
    client: openai.OpenAI, asker: Asker, pair: em.ModelPair, directions: Any
) -> None:
    body: dict[str, Any] = {"model": "steered", "messages": MESSAGES, "max_tokens": N}
    with em.intervene(pair.base, em.Add(directions["persona"], 1.0)):
        found = asker.send("POST", "/v1/chat/completions", body)
        assert found.status_code == 503 and found.json()["error"]["type"] == "InUseError"
        assert asker.send("POST", "/api/kl", {"messages": MESSAGES, "dials": []}).status_code == 503
    assert asker.send("POST", "/v1/chat/completions", body).status_code == 200


def test_a_wrong_key_is_refused(asker: Asker) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=asker.server.base_url, api_key="x", max_retries=0).models.list()


def test_the_judge_of_this_package_asks_it(asker: Asker) -> None:
    """It reads the probabilities of the first tokens."""
    judge = em.evals.EndpointJudge(
        "untreated", template="{question} {answer}", base_url=asker.server.base_url, api_key=asker.server.token,
        labels={"parser-tested": 1}, options={"max_completion_tokens": 1}, progress=False,
    )  # fmt: skip
    scores = judge([QUESTION], [""])
    assert len(scores) == 1
