"""One answer, told token by token: what it says, what is read at each token, what else could have been said.

    KL(untreated || treated) = sum p log(p / q)       over the next token, in nats; a mean over n places

The places are the prompt's end of each turn of the conversation; of a dial that acts on answers alone they are the
last answer's tokens, since before them it does nothing.

**Control**: the same done along ``RANDOM`` random directions of the same length, drawn evenly, at the same places.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor

from tl_em.arguments import FRACTION, NOT_NEGATIVE, POSITIVE, SEED, settle, whole
from tl_em.directions.direction import Direction
from tl_em.directions.profile import Profile
from tl_em.errors import PromptError, TlEmError, UsageError
from tl_em.models.generate import Sampling, sample_seeds, stops
from tl_em.models.hooks import hooked
from tl_em.models.prompts import EncodedPrompt, encode, make_batch
from tl_em.models.stream import batch_logits, next_token_logits
from tl_em.models.streaming import NewToken, StreamedAnswer, Streaming
from tl_em.models.templates import has_template
from tl_em.models.token_text import token_text, token_texts
from tl_em.models.torch_state import in_plain_torch
from tl_em.reading.reading import WITHIN
from tl_em.reading.watch import Watch
from tl_em.serving.dials import Served, SteeringDial

LONGEST, DEFAULT = 4096, 256
"""Tokens of an answer: at most, and where nobody says how many."""
MOST_TURNS, MOST_TEXT = 200, 200_000
"""Messages of a conversation, and characters of all of them."""
LATENTS, LIKELY, TURNS_OF_KL, RANDOM = 8, 8, 8, 3
"""Latents at a token; likely tokens in its place; last turns over which KL is taken; random directions beside it."""
Emit = Callable[[dict[str, Any]], None]
Stopped = Callable[[], bool]


@dataclass(frozen=True)
class AnswerSettings:
    """How an answer is made: the arguments of ``em.generate``, bounded.

    Args:
        max_new_tokens, temperature, top_p, repetition_penalty, stop, seed: as there.
    """

    max_new_tokens: int | Any = DEFAULT
    temperature: float | Any = 0.0
    top_p: float | Any = 1.0
    repetition_penalty: float | Any = 1.0
    stop: tuple[str, ...] | Any = ()
    seed: int | Any = 0

    def __post_init__(self) -> None:
        settle(
            self, max_new_tokens=lambda name, value: whole(name, value, low=1, high=LONGEST), temperature=NOT_NEGATIVE,
            top_p=FRACTION, repetition_penalty=POSITIVE, stop=stops, seed=SEED,
        )  # fmt: skip
        if len(self.stop) > 16:
            raise UsageError(f"stop has {len(self.stop)} texts, and each is looked for at every token; give at most 16")

    @classmethod
    def from_json(cls, value: Any) -> AnswerSettings:
        """Settings as a page sends them; what is left out is the default."""
        if not isinstance(value, Mapping) or not set(value) <= set(cls.__dataclass_fields__):
            known = ", ".join(cls.__dataclass_fields__)
            raise UsageError(f"settings hold what is no setting, so it would have no effect; send an object of {known}")
        return cls(**value)

    def sampling(self) -> Sampling:
        """The same for the loop that makes tokens; at temperature 0 no ``top_p`` changes anything."""
        top_p = self.top_p if self.temperature else 1.0
        return Sampling(self.temperature, top_p, self.repetition_penalty, self.stop)


def messages_of(value: Any) -> list[dict[str, str]]:
    """A conversation as a page or a client sends it, the last message the user's.

    Raises:
        PromptError: anything else.
    """
    def turn(each: Any) -> dict[str, str]:
        role, content = (each.get("role"), each.get("content")) if isinstance(each, Mapping) else (None, None)
        role = "system" if role == "developer" else role
        if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise PromptError(
                "a message has no role of system, user and assistant, or no text as its content, so it is unknown "
                'what was said; send {"role": "user", "content": "..."}'
            )
        return {"role": role, "content": content}

    if not isinstance(value, list) or not 0 < len(value) <= MOST_TURNS:
        raise PromptError(f"messages are no list of 1 to {MOST_TURNS}, so there is nothing to answer; send a list")
    found = [turn(each) for each in value]
    if sum(len(each["content"]) for each in found) > MOST_TEXT:
        raise PromptError(f"the messages hold more than {MOST_TEXT} characters, which no context holds; shorten them")
    if found[-1]["role"] != "user":
        raise PromptError("the last message is not the user's, so there is nothing to answer; end with a user message")
    return found


def prompt_of(served: Served, messages: Sequence[Mapping[str, str]]) -> Any:
    """A conversation as this package's prompt; without a chat template one message, as a text.

    Raises:
        PromptError: several messages, and no template to show them by.
    """
    if has_template(getattr(served.model, "tokenizer", None)):
        return [dict(each) for each in messages]
    if len(messages) > 1:
        raise PromptError(
            "the model has no chat template, so it is unknown how several messages are shown to it; send one message "
            "of the user alone"
        )
    return messages[-1]["content"]


@in_plain_torch
def answered_live(
    served: Served,
    prompt: Any,
    dials: Sequence[SteeringDial],
    settings: AnswerSettings,
    emit: Emit,
    stopped: Stopped,
    *,
    arm: str = "steered",
    reading: bool = True,
    likely: int = LIKELY,
    samples: int = 1,
) -> None:
    """Answer a prompt under dials and tell of it: ``start``, a ``token`` each, ``done`` for each answer.

    Args:
        served: the model and what is read.
        prompt: as ``em.generate`` takes one.
        dials: in force.
        settings: of the answer.
        emit: told of each event, as plain data.
        stopped: whether nobody wants the rest; looked at before each token.
        arm: which answer this is, for whoever listens.
        reading: whether directions and latents are read; of one answer only.
        likely: so many likely tokens are told at each place; 0 for none.
        samples: answers, side by side, as ``em.generate(samples=…)`` gives them.

    Raises:
        UsageError: several samples at temperature 0.
    """
    began = time.monotonic()
    model, tokenizer = served.model, getattr(served.model, "tokenizer", None)
    encoded, reading = encode(model, [prompt])[0], reading and samples == 1
    sampling, seeds = settings.sampling(), sample_seeds(settings.seed, 1, samples, settings.temperature)
    watch = Watch(model, served.read if reading else {}, served.dictionary if reading else None, LATENTS)
    with served.applied(dials) as warned, hooked(model, watch.hooks()):
        streaming = Streaming(
            model, encoded, seeds, max_new_tokens=settings.max_new_tokens, sampling=sampling, read_last=reading
        )
        emit({"type": "start", "arm": arm, "prompt": list(token_texts(tokenizer, encoded.ids)), "warnings": warned})
        told, count = 0, [0] * samples
        with closing(streaming):
            for new in streaming:
                if stopped():
                    return
                at, answer = count[new.sample], streaming.answers[new.sample]
                read, count[new.sample] = len(encoded) + at, at + 1
                event: dict[str, Any] = {"type": "token", "arm": arm, "sample": new.sample, "at": at, "id": new.id}
                event["end"] = at == len(answer.ids)  # the token that ends an answer is none of it
                event["text"] = text = token_text(tokenizer, new.id)
                event["space"] = new.text.startswith(" ") and not text.startswith(" ")  # the decoder's, between words
                event |= {"piece": new.text} | _likely(tokenizer, new, likely)
                emit(event | {"read": _read(served, watch, read, told)})
                told = read
                if new.last and samples > 1:
                    emit(_done(tokenizer, encoded, answer, arm, new.sample, began))
        answer = streaming.answers[0]
        last = _read(served, watch, len(encoded) + len(answer.ids), told) if reading and answer.truncated else []
    if samples == 1:
        emit(_done(tokenizer, encoded, answer, arm, 0, began) | {"read": last})


def _done(
    tokenizer: Any, encoded: EncodedPrompt, answer: StreamedAnswer, arm: str, sample: int, began: float
) -> dict[str, Any]:
    return {
        "type": "done", "arm": arm, "sample": sample, "said": answer.text, "truncated": answer.truncated,
        "tokens": list(token_texts(tokenizer, answer.ids)), "seconds": time.monotonic() - began,
        "n_prompt": len(encoded), "n_answer": len(answer.ids),
    }  # fmt: skip


def _likely(tokenizer: Any, new: NewToken, most: int) -> dict[str, Any]:
    logprobs = new.logits.float().log_softmax(-1)
    found: dict[str, Any] = {"logprob": float(logprobs[new.id])}
    if most:
        best = logprobs.topk(min(most, len(logprobs)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found["likely"] = [[token_text(tokenizer, i), logprob] for i, logprob in pairs]
    return found


def _read(served: Served, watch: Watch, length: int, told: int) -> list[dict[str, Any]]:
    """What was read at the tokens of a text from ``told`` on: values, bands of random directions, latents."""
    columns = watch.read_at([length])[0]
    if not columns:
        return []
    width = int(served.model.cfg.d_model)
    share = float(beta.ppf(WITHIN, 0.5, (width - 1) / 2)) ** 0.5 if width > 1 else 1.0
    found = []
    for at in range(told, length):
        each: dict[str, Any] = {"at": at, "values": {}, "bands": {}}
        for name, direction in served.read.items():
            each["values"][name] = float(columns[name][at])
            each["bands"][name] = float(columns[f"norm {direction.site.hook_name}"][at]) * share
        if "latents" in columns:
            pairs = zip(columns["latents"][at].tolist(), columns["activations"][at].tolist(), strict=True)
            each["latents"] = [[int(i), float(a)] for i, a in pairs if a > 0]
        found.append(each)
    return found


# --- How far dials push -----------------------------------------------------------------------------------------------


@in_plain_torch
def divergence(
    served: Served, messages: Sequence[Mapping[str, str]], dials: Sequence[SteeringDial], stopped: Stopped
) -> dict[str, Any]:
    """KL from the untreated model of each dial alone, and of all together, on a conversation.

    Args:
        served: the model.
        messages: of the conversation; its user's turns, and the answers to them, are the places.
        dials: each is measured as if it were on.
        stopped: whether nobody wants the rest; looked at between two dials.
    """
    ends, answers = _places(served, messages)
    randoms = [_randomly(served, k) for k in range(RANDOM)]
    before: dict[bool, Tensor | None] = {False: _logprobs(served, ends, False), True: None}

    def measured(group: Sequence[SteeringDial], served: Served = served) -> dict[str, Any]:
        late = bool(group) and all(dial.where == "generated" for dial in group)
        places = answers if late else ends
        if not group or not places:
            return {"kl": None, "n": 0, "over": "answers, and there is none yet" if late else "no prompt yet"}
        if before[late] is None:
            before[late] = _logprobs(served, places, late)
        with served.applied(group) as warned:
            after = _logprobs(served, places, late)
        p = before[late]
        assert p is not None and after is not None
        kl = (p.exp() * (p - after)).sum(-1)
        over = "tokens of answers" if late else "prompt's end of each turn"
        return {"kl": float(kl.mean()), "n": len(kl), "over": over, "warnings": warned}

    each = []
    for dial in dials:
        if stopped():
            return {}
        each.append(_or_error(measured, [replace(dial, on=True)]))
        if dial.on and dial.name in served.directions and each[-1]["kl"] is not None:
            found = [_or_error(measured, [dial], other)["kl"] for other in randoms if not stopped()]
            each[-1]["random"] = [kl for kl in found if kl is not None]
    on = [dial for dial in dials if dial.on]
    alone = each[dials.index(on[0])] if len(on) == 1 else None
    return {"each": each, "all": alone or _or_error(measured, on)}


def _randomly(served: Served, k: int) -> Served:
    """The same with random directions in place of its own, each as long as the one whose place it takes."""
    generator = torch.Generator().manual_seed(k)

    def along(each: Direction, drawn: Tensor) -> Direction:
        return replace(each, vector=drawn / drawn.norm() * each.norm, neutral=None)

    found: dict[str, Direction | Profile] = {}
    for name, each in served.directions.items():
        drawn = torch.randn(int(served.model.cfg.d_model), generator=generator)
        many = isinstance(each, Profile)  # whose layers agree with each other, as a real one's do
        found[name] = Profile([along(one, drawn) for one in each.directions]) if many else along(each, drawn)
    return replace(served, directions=found)


def _or_error(measured: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    try:
        return measured(*given)
    except TlEmError as error:
        return {"kl": None, "n": 0, "over": "", "error": str(error)}


def _places(
    served: Served, messages: Sequence[Mapping[str, str]]
) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
    """The last turns up to each prompt's end, and up to each answer's."""
    if not has_template(getattr(served.model, "tokenizer", None)):
        asked: Iterable[Any] = [each["content"] for each in messages if each["role"] == "user"]
        return encode(served.model, [each for each in asked if each.strip()][-TURNS_OF_KL:]), []
    turns = [list(messages[: i + 1]) for i, each in enumerate(messages)]
    ends = [turn for turn in turns if turn[-1]["role"] == "user"][-TURNS_OF_KL:]
    answers = [turn for turn in turns if turn[-1]["role"] == "assistant" and turn[-1]["content"].strip()]
    return encode(served.model, ends) if ends else [], encode(served.model, answers[-1:]) if answers else []


def _logprobs(served: Served, encoded: Sequence[EncodedPrompt], late: bool) -> Tensor | None:
    """Of the next token, in nats: after each prompt, or after each token of each answer."""
    if not encoded:
        return None
    if not late:
        return next_token_logits(served.model, encoded).double().log_softmax(-1)
    found = []
    for each in encoded:
        assert each.response is not None
        batch, places = make_batch([each], [0]), torch.arange(*each.response)
        found.append(batch_logits(served.model, batch, torch.zeros_like(places), places).float().cpu())
    return torch.cat(found).double().log_softmax(-1)
