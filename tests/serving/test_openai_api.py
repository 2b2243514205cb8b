"""OpenAI's own client asks the steered model and the untreated one, and gets what ``em.generate`` gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

import tl_em as em

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
    [{"n": 2}, {"tools": [{"type": "function", "function": {"name": "f"}}]},
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


def test_several_answers_are_several_requests(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="send 2 requests"):
        client.chat.completions.create(model="steered", messages=MESSAGES, max_tokens=N, n=2)  # type: ignore[arg-type]


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
