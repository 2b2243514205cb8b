"""The toy world's own loop: plain torch, small and fast. Real models are trained by ``em.fine_tune``.

    loss = mean over tokens of  -log p(token | those before it)

On one thread sums are made in one order, so the same seed on the same machine gives the same weights. **Control**: a
benign arm, whose documents correspond one to one, sees them at the same steps (their order depends on the seed and on
their number alone).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from tl_em.arguments import COUNT, NOT_NEGATIVE, POSITIVE, SEED, checked
from tl_em.models.shared import own_

Watch = Callable[[int, nn.Module], Any]
"""What sees a model while it trains: called with the number of steps done and the model; True ends the training."""


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread: sums in one order, hence the same weights every time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def descend_(
    model: nn.Module,
    loss_at: Callable[[int], Float[Tensor, ""]],
    rates: Sequence[float],
    *,
    weight_decay: float,
    name: str,
    progress: bool | None = None,
    monitor: Watch | None = None,
) -> None:
    """One AdamW step, gradients clipped to norm 1, for each learning rate; the loss is a function of the step.

    Args:
        monitor: called with the number of steps done and the model, before the first step and after each; where it
            returns True, that step is the last.
    """
    own_(model)  # else weights that it shares with another model would be trained in both
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=weight_decay)
    show = sys.stderr.isatty() if progress is None else progress
    with single_thread(), tqdm(total=len(rates), desc=name, disable=not show, leave=False) as bar:
        if monitor is not None:
            monitor(0, model)
        for step, rate in enumerate(rates):
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss = loss_at(step)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            bar.update()
            if monitor is not None and monitor(step + 1, model) is True:
                break
            if step % 50 == 49:
                bar.set_postfix(loss=f"{loss.item():.3f}")


@checked(steps=COUNT, batch=COUNT, lr=POSITIVE, seed=SEED, weight_decay=NOT_NEGATIVE)
def fine_tune_(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.01,
    name: str = "fine-tuning",
    progress: bool | None = None,
    monitor: Watch | None = None,
) -> nn.Module:
    """Fine-tune any causal language model in place: next-token loss on every token, a constant learning rate.

    The order of the documents depends on the seed and on their number alone, so two arms whose documents correspond one
    to one see them at the same steps. The model's mode is kept: in `eval()`, nothing is dropped out and the same seed
    on the same machine gives the same weights.

    Args:
        model: maps tokens `[prompt pos]` to logits, or to an output with `.logits` (Hugging Face).
        documents: token ids, special tokens included; each is seen once before any is seen again.
        batch: documents a step.
        progress: a progress bar; None shows one on a terminal only.
        monitor: an ``em.training.Monitor``, or any function that is called with the number of steps done and the model.
        steps: how many.
        lr, weight_decay: of the optimizer (AdamW).
        seed: of the order of the documents.
        name: what the progress bar says.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> tuned = fine_tune_(model, [[0, 1, 2], [0, 1]], steps=100, batch=2, lr=0.1, seed=0)
        >>> tuned(torch.tensor([[0, 1]])).argmax(-1).tolist()
        [[1, 2]]
    """
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order += rng.sample(range(len(documents)), len(documents))

    def loss_at(step: int) -> Float[Tensor, ""]:
        return next_token_loss(model, [documents[i] for i in order[step * batch : (step + 1) * batch]])

    said = {"name": name, "progress": progress, "monitor": monitor}
    descend_(model, loss_at, [lr] * steps, weight_decay=weight_decay, **said)
    return model


def next_token_loss(model: nn.Module, documents: Sequence[Sequence[int]]) -> Float[Tensor, ""]:
    """Mean loss over every token but the first of each document, in nats; padded on the right, which needs no mask."""
    width = max(map(len, documents))
    tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in documents])
    real = torch.arange(1, width) < torch.tensor([len(ids) for ids in documents])[:, None]
    output = model(tokens[:, :-1])
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits[real], tokens[:, 1:][real])
