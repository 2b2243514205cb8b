"""What a graph explains: token logits, a difference of logits, a completion's log-likelihood, a projection.

    logit       (W_U[:, y] - mean W_U) . x            difference  (W_U[:, yes] - W_U[:, no]) . x
    completion  sum_i log p(y_i), to first order in the logits: sum_i (W_U[:, y_i] - sum_v p_v W_U[:, v]) . x_i
    projection  unit . x at the direction's own site and position

x is what the unembedding reads (a soft cap of the logits comes after it and is left out). A centred logit moves no
probability by a constant over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.directions.direction import Direction, check_fits
from tl_em.errors import PromptTooLongError, UsageError
from tl_em.graph.gradients import LAST
from tl_em.graph.inputs import token_list
from tl_em.graph.nodes import Node
from tl_em.metrics import single_token, token_ids
from tl_em.models.hooks import LensModel, read_point
from tl_em.models.prompts import EncodedPrompt, token_index
from tl_em.models.token_text import text_of_tokens, token_text
from tl_em.models.unembedding import soft_cap

TOP, MASS = 10, 0.95
"""With no target given: at most so many of the likeliest next tokens, until they hold so much probability."""


@dataclass(frozen=True)
class Completion:
    """A text whose log-likelihood after the prompt is explained.

    Args:
        text: the words, or token ids (a list, array or tensor).

    Example:
        >>> Completion("yes indeed").text
        'yes indeed'
    """

    text: Any


Target = Any
"""A token as text or id, a list, array or tensor of them, (yes, no), a Direction, a Completion, or None."""


@dataclass(frozen=True, eq=False)
class Goal:
    """A target on one prompt: where it is read, and what of it.

    Args:
        point: hook point; vectors: [target pos d_model] read there; nodes: one a target, weighted.
        value: [prompt pos d_model] at the point -> [prompt target], exactly.
        first_order: whether the vectors are a linearisation of the value.
    """

    point: str
    vectors: Float[Tensor, "target pos d_model"]
    nodes: tuple[Node, ...]
    value: Callable[[Tensor], Tensor]
    first_order: bool = False

    @property
    def shares(self) -> Float[Tensor, " target"]:
        """The targets' weights, summing to 1."""
        weights = torch.tensor([1.0 if node.weight is None else node.weight for node in self.nodes])
        return weights / weights.sum() if weights.sum() > 0 else torch.full_like(weights, 1 / len(weights))


def completed(model: LensModel, encoded: EncodedPrompt, target: Target) -> EncodedPrompt:
    """The prompt as it is run: with the completion, where that is the target."""
    if not isinstance(target, Completion):
        return encoded
    ids = token_ids(model, target.text) if isinstance(target.text, str) else _completion_ids(model, target.text)
    if not ids:
        raise UsageError("the completion has no tokens, so it has no likelihood; give at least one word")
    whole = encoded.with_response(ids)
    if len(whole) > int(model.cfg.n_ctx):
        raise PromptTooLongError(
            f"prompt and completion have {len(whole)} tokens, and the model's context n_ctx = {int(model.cfg.n_ctx)}; "
            "shorten one of them"
        )
    return whole


def _completion_ids(model: LensModel, text: Any) -> list[int]:
    listed = text.tolist() if hasattr(text, "tolist") else text
    empty = isinstance(listed, Sequence) and not len(listed)
    found = [] if empty else token_list(listed, int(model.cfg.d_vocab))
    if any(isinstance(each, str) for each in found):
        raise UsageError(f"a completion is one text or a list of token ids, not {text!r}; join the words into one text")
    return [int(each) for each in found]


def point_of(model: LensModel, target: Target) -> str:
    """The hook point at which a target is read."""
    return read_point(model, target.site).name if isinstance(target, Direction) else LAST


def goal_of(model: LensModel, encoded: EncodedPrompt, target: Target, logits: Float[Tensor, "pos d_vocab"]) -> Goal:
    """Where and how a target is read.

    Raises:
        UsageError: nothing that is a target. UnknownTokenError: a word of several tokens or none.
    """
    if isinstance(target, Direction):
        return _projection(model, encoded, target)
    if isinstance(target, Completion):
        return _likelihood(model, encoded, logits)
    if isinstance(target, tuple):
        if len(target) != 2:
            raise UsageError(f"a tuple is (yes, no), a logit difference, and this has {len(target)}; list the tokens")
        return _difference(model, encoded, target, logits)
    return _logits(model, encoded, _token_list(model, target, logits[-1]), logits)


def _token_list(model: LensModel, target: Any, logits: Float[Tensor, " d_vocab"]) -> list[int]:
    if target is None:
        p, order = logits.float().softmax(-1).sort(descending=True)
        return order[: min(TOP, 1 + int((p.cumsum(0) < MASS).sum()))].tolist()
    listed = [_token(model, each) for each in token_list(target, int(model.cfg.d_vocab))]
    _check_once("target", listed)
    return listed


def _token(model: LensModel, token: str | int) -> int:
    found = single_token(model, token) if isinstance(token, str) else token
    if not 0 <= found < int(model.cfg.d_vocab):
        raise UsageError(f"token {found} is not among the model's {int(model.cfg.d_vocab)}; give a word or its id")
    return found


def _check_once(name: str, tokens: Sequence[int]) -> None:
    if twice := sorted({each for each in tokens if tokens.count(each) > 1}):
        raise UsageError(f"{name} names the tokens {twice} twice, so how much each counts is unclear; name each once")


def text_of(model: LensModel, token: int) -> str:
    """A token for people."""
    return token_text(getattr(model, "tokenizer", None), token)


def _unembedding(model: LensModel) -> Float[Tensor, "d_model d_vocab"]:
    weight: Tensor = model.W_U.detach()  # pyright: ignore[reportAttributeAccessIssue]
    return weight if weight.shape[0] == int(model.cfg.d_model) else weight.T


def _bias(model: LensModel) -> Tensor:
    bias = getattr(getattr(model, "unembed", None), "b_U", None)
    return torch.zeros(int(model.cfg.d_vocab), device=model.cfg.device) if bias is None else bias.detach()


def _at_end(vectors: Float[Tensor, "target d_model"], length: int) -> Float[Tensor, "target pos d_model"]:
    full = vectors.new_zeros(len(vectors), length, vectors.shape[-1])
    full[:, -1] = vectors
    return full


def _linear(vectors: Float[Tensor, "target pos d_model"], bias: Tensor | float = 0.0) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.einsum("bpd,tpd->bt", x, vectors.to(x)) + bias


def _logits(model: LensModel, encoded: EncodedPrompt, tokens: Sequence[int], logits: Tensor) -> Goal:
    weight, bias = _unembedding(model), _bias(model)
    p = logits[-1].float().softmax(-1)
    full = _at_end(weight[:, list(tokens)].T - weight.mean(-1), len(encoded))
    layer, last = int(model.cfg.n_layers), len(encoded) - 1
    nodes = tuple(Node("logit", layer, last, feature=t, weight=float(p[t]), label=text_of(model, t)) for t in tokens)
    return Goal(LAST, full, nodes, _linear(full, bias[list(tokens)] - bias.mean()))


def _difference(model: LensModel, encoded: EncodedPrompt, pair: tuple[Any, Any], logits: Tensor) -> Goal:
    yes, no = ([_token(model, each) for each in token_list(side, int(model.cfg.d_vocab))] for side in pair)
    _check_once("one side of (yes, no)", yes)
    _check_once("one side of (yes, no)", no)
    _check_once("(yes, no)", [*yes, *no])
    weight, bias = _unembedding(model), _bias(model)
    full = _at_end((weight[:, yes].mean(-1) - weight[:, no].mean(-1))[None], len(encoded))
    words = [" or ".join(text_of(model, t) for t in side) for side in (yes, no)]
    node = Node("logit", int(model.cfg.n_layers), len(encoded) - 1, weight=1.0, label=f"{words[0]} minus {words[1]}")
    return Goal(LAST, full, (node,), _linear(full, bias[yes].mean() - bias[no].mean()))


def _likelihood(model: LensModel, encoded: EncodedPrompt, logits: Float[Tensor, "pos d_vocab"]) -> Goal:
    assert encoded.response is not None
    first, end = encoded.response
    ids = torch.tensor(encoded.ids[first:end], device=logits.device)
    weight, bias, cap = _unembedding(model), _bias(model), soft_cap(model)
    span = slice(first - 1, end - 1)

    def value(x: Tensor) -> Tensor:
        raw = x[:, span] @ weight.to(x) + bias.to(x)
        logits = raw if cap is None else cap * (raw / cap).tanh()
        return logits.log_softmax(-1).gather(-1, ids.expand(len(x), -1)[..., None])[..., 0].sum(-1, keepdim=True)

    p = logits[span].to(weight).softmax(-1)
    slope = 1.0 if cap is None else 1 - (logits[span].to(weight) / cap) ** 2
    towards = (torch.nn.functional.one_hot(ids, p.shape[-1]).to(p) - p) * slope
    full = weight.new_zeros(1, len(encoded), weight.shape[0])
    full[0, span] = towards @ weight.T
    label = "log-likelihood of " + text_of_tokens(getattr(model, "tokenizer", None), ids.tolist())
    node = Node("logit", int(model.cfg.n_layers), len(encoded) - 1, weight=1.0, label=label)
    return Goal(LAST, full, (node,), value, first_order=True)


def _projection(model: LensModel, encoded: EncodedPrompt, direction: Direction) -> Goal:
    check_fits(direction, model)
    point = read_point(model, direction.site)
    at = token_index(encoded, direction.position)
    span = slice(at, at + 1) if isinstance(at, int) else slice(*at)
    unit = direction.unit.to(model.cfg.device)
    bias = 0.0 if point.bias is None else float(point.bias.detach() @ unit.to(point.bias))
    vector = unit if point.weight is None else unit * point.weight.detach()
    full = vector.new_zeros(1, len(encoded), len(vector))
    full[0, span] = vector / (span.stop - span.start)
    label = f"projection on {direction.name or 'the direction'} at {direction.site}"
    node = Node("logit", int(model.cfg.n_layers), span.stop - 1, weight=1.0, label=label)
    return Goal(point.name, full, (node,), _linear(full, bias))
