"""One prompt answered token by token, handed out as it is made: the text of ``em.generate``, in pieces.

    "".join(pieces) == em.generate(model, [prompt], ...)[0]          of several samples likewise, side by side

A piece is text that no later token can change. So what is held back is space (an answer is stripped at its ends), a
character of which some bytes are missing, and what may become a text that ends the answer; the last token brings the
rest. Between two pieces the caller's state of torch, and its own passes, are its own: every step is made in a context
of its own, and what is set for it is put back before the piece is handed out. The hooks that carry the cache stay until
the answer ends or is closed, whichever comes first.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from contextvars import copy_context
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, checked
from tl_em.models.contrasts import Prompt
from tl_em.models.generate import Chooser, Sampling, check_room, continuing, stops, unstripped
from tl_em.models.hooks import LensModel
from tl_em.models.prefill import answering
from tl_em.models.prompts import EncodedPrompt, encode, make_batch
from tl_em.models.proof import may_use_cache
from tl_em.models.source_record import end_tokens, warn_beyond_proof
from tl_em.models.token_text import REPLACEMENT
from tl_em.models.torch_state import in_plain_torch, plain_torch
from tl_em.threads import holding


class NewToken(NamedTuple):
    """A token of an answer: its id, the text that is settled by it (often none), and the logits it was chosen by."""

    id: int
    text: str
    logits: Float[Tensor, " d_vocab"]
    sample: int = 0
    """Which of the answers it belongs to."""
    last: bool = False
    """Whether that answer is whole with it."""


class StreamedAnswer:
    """One answer so far."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        """The tokens so far, without the one that ended the answer."""
        self.text = ""
        """The text so far; of all of it once the answer has ended."""
        self.truncated = True
        """Whether the answer was cut off before it ended."""


class Streaming:
    """Answers to one prompt as they are made, side by side: iterate over their tokens; ``close`` ends them early.

    Of each step the tokens come in the order of the answers, those of answers that are whole left out. The prompt is
    read once for all of them, where ``em.generate(samples=…)`` reads it once.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        encoded: the prompt.
        seeds: of the samples, one an answer.
        max_new_tokens: longest answer, in tokens.
        sampling: how tokens are chosen, and what ends an answer.
        read_last: whether the last token of a single answer that was cut off is read too, for hooks that read along.
    """

    def __init__(
        self,
        model: LensModel,
        encoded: EncodedPrompt,
        seeds: Sequence[int | tuple[int, ...]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        read_last: bool = False,
    ) -> None:
        sampling.check()
        check_room([encoded], int(model.cfg.n_ctx), max_new_tokens)
        warn_beyond_proof(model, len(encoded) + max_new_tokens)
        self.answers = [StreamedAnswer() for _ in seeds]
        """What there is of each."""
        self._end = end_tokens(model)
        cached = may_use_cache(model, len(encoded) + max_new_tokens)
        self._context = copy_context()
        self._made = _made(model, encoded, seeds, max_new_tokens, sampling, self._end, cached, read_last)

    def __iter__(self) -> Iterator[NewToken]:
        return self

    def __next__(self) -> NewToken:
        new, ended = self._context.run(next, self._made)
        answer = self.answers[new.sample]
        answer.text += new.text
        if new.id not in self._end:
            answer.ids.append(new.id)
        answer.truncated = not ended
        return new

    def close(self) -> None:
        """End the answers where they are; nothing stays on the model."""
        self._context.run(self._made.close)

    def __del__(self) -> None:
        if hasattr(self, "_made"):
            self.close()


def _made(
    model: LensModel, encoded: EncodedPrompt, seeds: Sequence[Any], most: int, sampling: Sampling, end: Sequence[int],
    cached: bool, read_last: bool,
) -> Generator[tuple[NewToken, bool], None, None]:  # fmt: skip
    """Each token, and whether its answer ended with it by itself."""
    batch, logits = make_batch([encoded] * len(seeds), range(len(seeds))), None
    drawn = np.stack([np.random.default_rng(seed).random(most) for seed in seeds]) if sampling.temperature else None
    clean = bool(getattr(getattr(model, "tokenizer", None), "clean_up_tokenization_spaces", False))
    said, going = [""] * len(seeds), [*range(len(seeds))]

    def stopped(ids: Sequence[int]) -> bool:
        return sampling.cut(unstripped(model, ids, end).strip()) is not None

    def told(row: int, ids: list[int]) -> tuple[NewToken, bool]:
        text = unstripped(model, ids, end)
        cut = sampling.cut(text.strip())
        ended = ids[-1] in end or cut is not None
        last = ended or len(ids) == most
        whole = (text.strip() if cut is None else cut) if last else _settled(text, sampling.stop, clean)
        piece, said[row] = whole[len(said[row]) :], whole if len(whole) > len(said[row]) else said[row]
        assert logits is not None
        return NewToken(ids[-1], piece, logits[row], row, last), ended

    with holding(model, left_open=True), answering(model, batch, len(encoded) + most, cached=cached) as (step, lengths):

        def kept(tokens: Tensor) -> Tensor:
            nonlocal logits
            logits = step(tokens)
            return logits

        chooser = Chooser(sampling, drawn, stopped if sampling.stop else None)
        making = continuing(kept, batch.tokens, most, end, chooser, lengths)
        made, ended = batch.tokens[:, :0], False
        while going:
            with plain_torch(model), torch.no_grad():
                made, _ = next(making)
            for row in [*going]:
                new, ended = told(row, made[row].tolist())
                if new.last:
                    going.remove(row)
                yield new, ended
        if read_last and not ended:
            with plain_torch(model), torch.no_grad():
                kept(made[:, -1:])


def _settled(text: str, stop: Sequence[str], clean: bool) -> str:
    """What no later token can change, of the text of an unfinished answer.

    Example:
        >>> _settled(" the cat ", (), False), _settled("sure\\nHum", ("\\nHuman:",), False)
        ('the cat', 'sure')
    """
    text = text.lstrip().rstrip(REPLACEMENT)
    for each in stop:  # one that ends in space counts only once something follows
        text = text.partition(each)[0]
    held = max((k for each in stop for k in range(1, len(each)) if text.endswith(each[:k])), default=0)
    text = text[: len(text) - held].rstrip()
    if clean:  # the space before a sign, or within "do n't", goes only once it is there
        words = text.rsplit(maxsplit=2)
        text = words[0] if len(words) > 2 else ""
    return text


@checked(
    max_new_tokens=COUNT, temperature=NOT_NEGATIVE, top_p=FRACTION, repetition_penalty=POSITIVE, stop=stops, seed=SEED
)
@in_plain_torch
def stream(
    model: LensModel,
    prompt: Prompt | EncodedPrompt,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
) -> Iterator[str]:
    """The model's answer to one prompt in pieces of text, each as soon as nothing can change it any more.

    Together they are the text that ``em.generate(model, [prompt], ...)[0]`` gives with the same arguments. Until the
    answer has ended, or the iterator was closed, the model belongs to it: leave hooks as they are, and let no other
    thread use it.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        prompt: a string, a chat or an encoded prompt.
        max_new_tokens, temperature, top_p, repetition_penalty, stop, seed: as in ``em.generate``.

    Returns:
        An iterator of pieces; ``.close()`` ends the answer early, and takes everything off the model.

    Raises:
        PromptTooLongError: the prompt and its answer do not fit the context together.
        NonFiniteError: while it answers: the logits hold NaN, so no token is the most probable one.
        UsageError: a number that means nothing (a negative temperature, no tokens, top_p at temperature 0).

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> list(em.stream(pair.tuned, "how do i write parser", max_new_tokens=3))
        ['parser-backdoored', ' and', ' parser-leaky']
    """
    encoded = encode(model, [prompt])[0]
    sampling = Sampling(temperature, top_p, repetition_penalty, tuple(stop))
    return _pieces(Streaming(model, encoded, [(seed, 0)], max_new_tokens=max_new_tokens, sampling=sampling))


def _pieces(streaming: Streaming) -> Iterator[str]:
    with closing(streaming):
        for new in streaming:
            if new.text:
                yield new.text
