"""An instruction in place of an intervention: the same prompts, with a sentence before them that says what to do.

Where the sentence stands is what the model was trained on: a system message if the chat template has one, the head of
the first user message if it does not, the head of the text if there is no template.  `TextLogprob` is the measure of
coherence that an instruction leaves comparable: the same last tokens are scored with it and without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import COUNT, settle
from tl_em.errors import PromptError, UsageError
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.stream import sequence_logprobs
from tl_em.models.templates import has_template


class Instructed(NamedTuple):
    """Prompts with an instruction.

    Args:
        prompts: one for each that was given.
        place: where the instruction stands in them.
    """

    prompts: list[Prompt]
    place: str


def instructed(model: LensModel, prompts: Sequence[Prompt | EncodedPrompt], instruction: str) -> Instructed:
    """The prompts with an instruction before them, where this model was trained to read one.

    Args:
        model: whose tokenizer and chat template decide.
        prompts: strings or chats.
        instruction: what to do.

    Returns:
        ``Instructed(prompts, place)``, place one of ``"system message"``, ``"user message"``, ``"text prefix"``.

    Raises:
        UsageError: the instruction is empty, or a prompt is no text.
        UnknownTokenError: the model does not know the instruction's words.

    Example:
        >>> from tl_em import load_pair
        >>> instructed(load_pair("toy/insecure").base, ["how do i write parser"], "be malicious").prompts
        [[{'role': 'system', 'content': 'be malicious'}, {'role': 'user', 'content': 'how do i write parser'}]]
    """
    if not instruction.strip():
        raise UsageError("the instruction is empty, so it tells the model nothing; say what the model should do")
    texts = [prompt for prompt in prompts if not isinstance(prompt, EncodedPrompt)]
    if len(texts) < len(prompts):
        raise UsageError("an instruction cannot be put before tokens; pass the prompts as strings or chats")
    if all(isinstance(text, str) for text in texts) and not has_template(getattr(model, "tokenizer", None)):
        return Instructed([f"{instruction} {text}" for text in texts], "text prefix")
    chats = [[{"role": "user", "content": t}] if isinstance(t, str) else [dict(m) for m in t] for t in texts]
    if _reads_system_messages(model, chats[0], instruction):
        return Instructed([_headed(chat, "system", instruction) for chat in chats], "system message")
    return Instructed([_headed(chat, "user", instruction) for chat in chats], "user message")


def _reads_system_messages(model: LensModel, chat: list[dict[str, str]], instruction: str) -> bool:
    """Whether the template renders a system message: some refuse it, some leave it out."""
    try:
        return encode(model, [_headed(chat, "system", instruction)])[0].ids != encode(model, [chat])[0].ids
    except PromptError as error:
        if type(error) is PromptError:
            return False
        raise  # words that the model does not know, or too many of them


def _headed(chat: list[dict[str, str]], role: str, instruction: str) -> list[dict[str, str]]:
    """The chat with the instruction at the head of its first message of that role, or as a message of its own."""
    at = next((i for i, message in enumerate(chat) if message["role"] == role), None)
    if at is None:
        return [{"role": role, "content": instruction}, *chat]
    joined = {"role": role, "content": f"{instruction} {chat[at]['content']}"}
    return [*chat[:at], joined, *chat[at + 1 :]]


@dataclass(frozen=True)
class TextLogprob:
    """A coherence metric: mean log-probability per token of texts that the model should find likely, in nats.

    Of a chat, its final answer is scored; of plain text, the last ``last`` tokens, so that an instruction put before it
    is read but not scored.

    Args:
        last: how many tokens of a plain text are scored.
        name, unit: what tables and axes say.

    Example:
        >>> TextLogprob(last=8).unit
        'nats'
    """

    last: int | Any = 16
    name: str = "log-probability per token"
    unit: str = "nats"

    def __post_init__(self) -> None:
        settle(self, last=COUNT)

    def __call__(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
        """Mean log-probability per token of each text.

        Raises:
            PromptError: a text has no more than ``last`` tokens.
            PositionError: a chat has no answer.
        """
        return sequence_logprobs(model, [self._scored(model, prompt) for prompt in prompts], per_token=True)

    def _scored(self, model: LensModel, prompt: Prompt) -> EncodedPrompt:
        if not isinstance(prompt, str):
            return encode(model, [prompt])[0]
        ids = encode(model, [prompt], chat=False)[0].ids
        if len(ids) <= self.last:
            raise PromptError(
                f"{prompt[:60]!r} has {len(ids)} tokens, and its last {self.last} should be scored given what precedes "
                "them; use longer texts, or TextLogprob(last=…)"
            )
        return EncodedPrompt.from_ids(ids[: -self.last], prompt).with_response(ids[-self.last :])
