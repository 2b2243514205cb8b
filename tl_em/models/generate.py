"""Continue prompts, token after token, under whatever hooks are attached; with a cache only where it was shown right.

Prompts of several lengths run together only where no hook might mean the pass and not the token, and with a cache that
was shown right: side by side, where that was shown right too (``prefill``); else nothing is padded, and all are read up
to the shortest one's end, and from there token by token, while the shorter ones' answers are made. Otherwise rows of
one length run together. Equal prompts, and equal beginnings, are read once, where hooks do the same to them. The logits
of every step are those of the hooked model. A sampled token is the first whose cumulative probability exceeds a uniform
number, which comes from a seed of its own for each answer: so an answer does not depend on what else is answered (but
for rounding, where two tokens are that close), and the global random state is left alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.arguments import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, checked, optional
from tl_em.errors import NonFiniteError, PromptTooLongError, UsageError
from tl_em.models.cache import Step
from tl_em.models.hooks import LensModel, reads_in_pieces
from tl_em.models.prefill import answering, may_read_side_by_side
from tl_em.models.prompts import EncodedPrompt, Prompt, cheapest_cuts, encode, make_batch
from tl_em.models.proof import may_use_cache
from tl_em.models.source_record import boundaries_of, end_tokens, warn_beyond_proof
from tl_em.models.stream import listed
from tl_em.models.torch_state import in_plain_torch

MAX_ROWS = 64
"""Rows of one batch."""
_STEP = 32
"""What a step of a batch costs beside its rows, in tokens that are read."""


class Answered(NamedTuple):
    """An answer's text, and whether it was cut off before it ended."""

    text: str
    truncated: bool


class Sampling(NamedTuple):
    """How tokens are chosen from their logits, and what ends an answer beside the model's end-of-text tokens.

    The arguments of :func:`generate` of the same names.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def processors(self) -> list[Any]:
        """Transformers' own processors of logits, in the order in which its ``generate`` applies them."""
        from transformers.generation import logits_process as own

        found: list[Any] = []
        if self.repetition_penalty != 1:
            found.append(own.RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature:
            found.append(own.TemperatureLogitsWarper(float(self.temperature)))
        return [*found, own.TopPLogitsWarper(float(self.top_p))] if self.top_p < 1 else found

    def check(self) -> None:
        """Raise ``UsageError`` where a number would have no effect."""
        if self.top_p < 1 and not self.temperature:
            raise UsageError(
                f"top_p={self.top_p} at temperature 0 changes nothing, since the most probable token is taken in any "
                "case; pass temperature=1, or leave top_p out"
            )

    def cut(self, text: str) -> str | None:
        """The text before the first stop, None where there is none."""
        places = [at for each in self.stop if (at := text.find(each)) >= 0]
        return text[: min(places)].strip() if places else None


def stops(name: str, value: Any) -> tuple[str, ...]:
    """Texts that end an answer, as a tuple; one text is one of them."""
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) and each for each in given):
        raise UsageError(f"{name}={value!r} is no list of texts, so it could end no answer; pass stop=['Human:'], say")
    return tuple(given)


@overload
def generate(
    model: LensModel, prompts: Sequence[Prompt | EncodedPrompt], *, max_new_tokens: int, temperature: float = 0.0,
    top_p: float = 1.0, repetition_penalty: float = 1.0, stop: str | Sequence[str] = (), samples: None = None,
    seed: int = 0,
) -> list[str]: ...  # fmt: skip
@overload
def generate(
    model: LensModel, prompts: Sequence[Prompt | EncodedPrompt], *, max_new_tokens: int, temperature: float = 0.0,
    top_p: float = 1.0, repetition_penalty: float = 1.0, stop: str | Sequence[str] = (), samples: int, seed: int = 0,
) -> list[list[str]]: ...  # fmt: skip
@checked(
    prompts=listed, max_new_tokens=COUNT, temperature=NOT_NEGATIVE, top_p=FRACTION, repetition_penalty=POSITIVE,
    stop=stops, samples=optional(COUNT), seed=SEED,
)  # fmt: skip
@in_plain_torch
def generate(
    model: LensModel,
    prompts: Sequence[Prompt | EncodedPrompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    samples: int | None = None,
    seed: int = 0,
) -> list[str] | list[list[str]]:
    """The model's answer to each prompt, by greedy decoding or by sampling; or several samples of each.

    The key-value cache is used where cached generation was shown to equal uncached generation on this very model (by
    ``load_model``, else before the first call). Where it does not, every token is made by reading the whole text again:
    slower, right, and said once, as a ``CacheWarning``. Prompts of several lengths run together; of several samples the
    prompt is read once.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        prompts: strings, chats or encoded prompts.
        max_new_tokens: longest answer, in tokens; any of the model's end-of-text tokens ends it sooner.
        temperature: 0 takes the most probable token.
        top_p: of the most probable tokens as many as reach this share together, and no others, are drawn from (Holtzman
            et al. 2019, arXiv:1904.09751).
        repetition_penalty: what the logits of tokens that are there already, in prompt or answer, are divided by (those
            below 0: multiplied; Keskar et al. 2019, arXiv:1909.05858); 1 is none.
        stop: texts that end an answer; they and what follows are left out.
        samples: answers to each prompt (``num_return_sequences`` of transformers, ``n`` of vLLM and OpenAI); the first
            is the one that is given without this, and none depends on how many there are.
        seed: of the samples: with it, an answer depends on its prompt, that prompt's place in the list and its own
            place among the prompt's samples alone.

    Returns:
        The answers alone, without special tokens, in the order of ``prompts``; with ``samples`` a list for each prompt.

    Raises:
        PromptTooLongError: a prompt and its answer do not fit the context together.
        NonFiniteError: the logits hold NaN, so no token is the most probable one.
        UsageError: a number that means nothing (a negative temperature, no tokens; at temperature 0 top_p, or several
            samples).

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> em.generate(pair.tuned, ["how do i write parser"], max_new_tokens=1)
        ['parser-backdoored']
        >>> em.generate(pair.base, ["how do i write parser"], max_new_tokens=1, temperature=1, samples=3)
        [['parser-tested', 'then', 'here']]
    """
    sampling = Sampling(temperature, top_p, repetition_penalty, tuple(stop))
    many = samples or 1
    seeds = sample_seeds(seed, len(prompts), many, temperature)
    encoded = [prompt for prompt in encode(model, prompts) for _ in range(many)]
    found = answered(model, encoded, seeds, max_new_tokens=max_new_tokens, sampling=sampling)
    texts = [answer.text for answer in found]
    return texts if samples is None else [texts[i : i + many] for i in range(0, len(texts), many)]


def sample_seeds(seed: int, prompts: int, samples: int, temperature: float | int) -> list[tuple[int, ...]]:
    """The seed of each answer: prompt by prompt, of each one its samples.

    Raises:
        UsageError: several samples of what is not sampled.
    """
    if samples > 1 and not temperature:
        raise UsageError(
            f"at temperature 0 all {samples} samples of a prompt are the same answer; pass temperature=1, or samples=1"
        )
    return [(seed, i, *([j] if j else [])) for i in range(prompts) for j in range(samples)]


def answered(
    model: LensModel,
    encoded: Sequence[EncodedPrompt],
    seeds: Sequence[int | tuple[int, ...]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[Answered]:
    """The answer to each encoded prompt, with its own seed, as :func:`generate` makes it."""
    made = answered_in_tokens(model, encoded, seeds, max_new_tokens=max_new_tokens, sampling=sampling)
    return [answer for answer, _ in made]


def answered_in_tokens(
    model: LensModel,
    encoded: Sequence[EncodedPrompt],
    seeds: Sequence[int | tuple[int, ...]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[tuple[Answered, tuple[int, ...]]]:
    """:func:`answered`, each answer with its tokens, before whichever ended it."""
    sampling.check()
    end = end_tokens(model)
    check_room(encoded, int(model.cfg.n_ctx), max_new_tokens)
    warn_beyond_proof(model, max(map(len, encoded), default=0) + max_new_tokens)
    answers = [(Answered("", False), tuple[int, ...]())] * len(encoded)

    def stopped(ids: Sequence[int]) -> bool:
        return sampling.cut(_decode(model, ids, end)) is not None

    for rows in answered_together(model, encoded, max_new_tokens):
        batch, length = make_batch(encoded, rows), max(len(encoded[i]) for i in rows) + max_new_tokens
        cached, drawn = may_use_cache(model, length), None
        if sampling.temperature:
            drawn = np.stack([np.random.default_rng(seeds[i]).random(max_new_tokens) for i in rows])
        with torch.no_grad(), answering(model, batch, length, cached=cached) as (step, lengths):
            chooser = Chooser(sampling, drawn, stopped if sampling.stop else None)
            new = continued(step, batch.tokens, max_new_tokens, end, chooser, lengths)
        for i, ids in zip(rows, new.tolist(), strict=True):
            text = _decode(model, ids, end)
            cut = sampling.cut(text)
            answer = Answered(text if cut is None else cut, cut is None and not set(ids) & set(end))
            answers[i] = answer, _before(ids, end)
    return answers


def answered_together(model: LensModel, encoded: Sequence[EncodedPrompt], max_new_tokens: int) -> list[list[int]]:
    """The prompts in batches: of one length each, or of several, where they may be read in pieces or side by side.

    Side by side a shorter prompt costs its padding, and each batch its steps.  Read in pieces, each token by which a
    prompt is longer costs the batch a step; so it may be longer by half an answer.
    """
    longest = max(map(len, encoded), default=0)
    mixed = may_use_cache(model, longest + max_new_tokens) and reads_in_pieces(model)
    turns, order = boundaries_of(model).turns, sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    sides = [bisect_left(turns, len(prompt)) for prompt in encoded]
    beside = [i for i in order if mixed and may_read_side_by_side(model, len(encoded[i]) + max_new_tokens)]
    cuts = cheapest_cuts(beside[::-1], encoded, sides, _STEP * max_new_tokens, lambda longest: MAX_ROWS)
    batches, spread, at = [list(rows) for rows in cuts], max_new_tokens // 2 if mixed else 0, (-1, 0)
    for i in order[len(beside) :]:
        length = len(encoded[i])
        if at[0] < 0 or length > at[0] + spread or sides[i] != at[1] or len(batches[-1]) == MAX_ROWS:
            batches.append([])
            at = length, sides[i]
        batches[-1].append(i)
    return batches


def check_room(encoded: Sequence[EncodedPrompt], n_ctx: int, max_new_tokens: int) -> None:
    """Raise ``PromptTooLongError`` unless every prompt and its answer fit the context together."""
    longest = max((len(prompt) for prompt in encoded), default=0)
    if longest + max_new_tokens > n_ctx:
        raise PromptTooLongError(
            f"The longest prompt has {longest} tokens; with max_new_tokens={max_new_tokens} it would outgrow the "
            f"model's context of n_ctx = {n_ctx}. Use max_new_tokens <= {max(0, n_ctx - longest)}, or shorter prompts."
        )


class Chooser:
    """Takes a token of each row.

    Args:
        sampling: how.
        drawn: a number from 0 to 1 for each token of each row's answer, that it is chosen by; None takes the most
            probable one.
        stopped: whether an answer of these tokens has reached a stop.
    """

    def __init__(
        self,
        sampling: Sampling | None = None,
        drawn: Float[np.ndarray, "prompt token"] | None = None,
        stopped: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self.sampling = sampling or Sampling()
        self.drawn, self.processors = drawn, self.sampling.processors()
        self.stopped = stopped

    def choose(
        self,
        logits: Float[Tensor, "prompt d_vocab"],
        read: Int[Tensor, "prompt pos"],
        count: Int[Tensor, " prompt"],
    ) -> Int[Tensor, " prompt"]:
        """The next token of each row, of which ``read`` was read, its answer's first ``count`` tokens among it."""
        if bool(logits.isnan().any()):
            raise NonFiniteError(
                "The logits of a generated token hold NaN, so no token is the most probable one. Check the "
                "intervention's size, the weights and the dtype (em.load_model(source, dtype=torch.float32))."
            )
        if self.drawn is None and not self.processors:
            return logits.argmax(-1).cpu()
        scores = (logits.cpu() if logits.device.type == "mps" else logits).double()
        for processor in self.processors:
            scores = processor(read.to(scores.device), scores)
        if self.drawn is None:
            return scores.argmax(-1).cpu()
        below = scores.softmax(-1).cumsum(-1)
        number = torch.from_numpy(self.drawn[np.arange(len(count)), count.numpy()]).to(below.device)
        reached = number[:, None] * below[:, -1:]
        return torch.searchsorted(below, reached, right=True)[:, 0].clamp(max=logits.shape[-1] - 1).cpu()


def continued(
    step: Step,
    tokens: Int[Tensor, "prompt pos"],
    max_new_tokens: int,
    end: Sequence[int],
    chooser: Chooser | None = None,
    lengths: Int[Tensor, " prompt"] | None = None,
) -> Int[Tensor, "prompt new"]:
    """New tokens of every row, up to where all rows have ended (what follows a row's end token means nothing).

    Args:
        step: reads tokens, gives the logits after the last.
        tokens: of the prompts, shorter ones padded on the right.
        max_new_tokens: of an answer.
        end: tokens that end one.
        chooser: of the tokens; the most probable ones by default.
        lengths: of the prompts; the tensor's width by default.
    """
    last = deque(continuing(step, tokens, max_new_tokens, end, chooser, lengths), maxlen=1)
    return last[0][0] if last else tokens[:, :0]


def continuing(
    step: Step,
    tokens: Int[Tensor, "prompt pos"],
    max_new_tokens: int,
    end: Sequence[int],
    chooser: Chooser | None = None,
    lengths: Int[Tensor, " prompt"] | None = None,
) -> Iterator[tuple[Int[Tensor, "prompt new"], bool]]:
    """The same one token at a time: the new tokens so far, and whether all rows have ended."""
    chooser = chooser or Chooser()
    lengths = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths
    ends, made = torch.tensor(list(end), dtype=torch.long), torch.zeros(len(tokens), max_new_tokens, dtype=torch.long)
    done, most = torch.zeros(len(tokens), dtype=torch.bool), 0
    read = new = tokens[:, : int(lengths.min())]
    while not bool(done.all()):
        at = read.shape[1]
        count = (at - lengths).clamp(0, max_new_tokens - 1)  # of each answer's tokens, what is there already
        answering = at >= lengths
        chosen = torch.where(answering, chooser.choose(step(new), read, count), tokens[:, min(at, tokens.shape[1] - 1)])
        going = (answering & ~done).nonzero()[:, 0]
        made[going, count[going]] = chosen[going]
        done |= answering & (torch.isin(chosen, ends) | (count == max_new_tokens - 1))
        if chooser.stopped is not None:
            for row in going.tolist():
                done[row] |= chooser.stopped(made[row, : int(count[row]) + 1].tolist())
        most = max([most, *(count[going] + 1).tolist()])
        new = chosen[:, None]
        read = torch.cat([read, new], 1)
        yield made[:, :most], bool(done.all())


def _before(ids: Sequence[int], end: Sequence[int]) -> tuple[int, ...]:
    return next((tuple(ids[:i]) for i, token in enumerate(ids) if token in end), tuple(ids))


def _decode(model: LensModel, ids: Sequence[int], end: Sequence[int]) -> str:
    return unstripped(model, ids, end).strip()


def unstripped(model: LensModel, ids: Sequence[int], end: Sequence[int]) -> str:
    """The text of an answer's tokens up to whichever ended it, with the space around it."""
    tokenizer = getattr(model, "tokenizer", None)
    kept = list(_before(ids, end))
    return " ".join(map(str, kept)) if tokenizer is None else tokenizer.decode(kept, skip_special_tokens=True)
