"""A number a prompt that is a weighted sum over responses: said as a value, so that others can run the responses.

    m(prompt) = sum over its responses r of  weight(r) * log P(r | prompt) / |r|          |r|: tokens

A metric that has ``responses(model, prompts)`` is measured under many directions at once (``interventions.many``):
each response is a row of its own, and what lies before the edit is run once for all directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.stream import sequence_logprobs


@dataclass(frozen=True, eq=False)
class Responses:
    """Responses to prompts, and what each counts.

    Args:
        encoded: prompts that end with a response.
        of: the number of the prompt that each of them answers.
        weights: what the mean log-probability of each response's tokens is multiplied by.
        n_prompts: how many prompts there are.

    Example:
        >>> Responses([EncodedPrompt.from_ids([1]).with_response([2])] * 3, [0, 0, 1], [1.0, -1.0, 2.0], 2).summed(
        ...     torch.tensor([[-1.0, -3.0, -4.0]])
        ... ).tolist()
        [[2.0, -8.0]]
    """

    encoded: Sequence[EncodedPrompt]
    of: Sequence[int]
    weights: Sequence[float]
    n_prompts: int

    def summed(self, found: Float[Tensor, "*axes response"]) -> Float[Tensor, "*axes prompt"]:
        """The sum for each prompt, of a number a response."""
        weights = torch.tensor(self.weights, dtype=found.dtype)
        out = torch.zeros(*found.shape[:-1], self.n_prompts, dtype=found.dtype)
        return out.index_add_(-1, torch.tensor(self.of, dtype=torch.long), found * weights)

    def measure(self, model: LensModel) -> Float[Tensor, " prompt"]:
        """The number for each prompt, of a model with the hooks that are on it."""
        return self.summed(mean_logprob(model, self.encoded))


def mean_logprob(model: LensModel, encoded: Sequence[EncodedPrompt]) -> Float[Tensor, " response"]:
    """The mean log-probability of each response's tokens, in nats: ``models.stream.sequence_logprobs``."""
    return sequence_logprobs(model, encoded, per_token=True)
