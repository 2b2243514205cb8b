"""transformers' Trainer on answers: the rows of every step are settled beforehand, and only answers are scored.

    loss of a step  =  sum over its learned tokens of  -log p(token | those before it)  /  their number

Each row is seen once before any is seen again, in an order that depends on the seed and on the number of rows alone.
Within a step, rows of similar length pass together, which changes no sum.  Logits are computed at the answers only:
of 49,000 words they are most of the memory.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from tl_em.artefacts import json_of
from tl_em.threads import RANDOM, holding
from tl_em.training.answers import LearnedAnswer

IGNORED = -100


class Schedule(NamedTuple):
    """How many steps, of how many rows, at which rates."""

    steps: int
    batch: int
    lr: float
    decay: str
    warmup: int
    weight_decay: float
    clip: float = 1.0


class Passed(NamedTuple):
    """A row as a pass reads it, with the weight of each of its learned tokens in the loss of the pass."""

    ids: tuple[int, ...]
    start: int
    weight: float


def in_order(answers: Sequence[LearnedAnswer], schedule: Schedule, *, together: int, seed: int) -> list[Passed]:
    """The rows of all steps, one after the other; within a step by their length.

    Args:
        answers: what is learned, by row.
        schedule: of which steps and rows a step are read.
        together: rows a pass, of which several make a step.
        seed: of the order.

    Example:
        >>> rows = [LearnedAnswer(tuple(range(n)), 1) for n in (2, 5, 3)]
        >>> found = in_order(rows, Schedule(3, 1, 1e-4, "linear", 0, 0.0), together=1, seed=0)
        >>> sorted(len(each.ids) for each in found)
        [2, 3, 5]
    """
    rng, order = np.random.default_rng(seed), list[int]()
    while len(order) < schedule.steps * schedule.batch:
        order += rng.permutation(len(answers)).tolist()
    found = []
    for step in range(schedule.steps):
        rows = [answers[i] for i in order[step * schedule.batch : (step + 1) * schedule.batch]]
        weight = schedule.batch / together / sum(len(ids) - start for ids, start in rows)
        found += [Passed(*row, weight) for row in sorted(rows, key=lambda row: len(row.ids))]
    return found


def collated(rows: Sequence[Passed]) -> dict[str, Tensor]:
    """Rows as one batch, padded on the right; the positions whose next tokens are learned, and those tokens."""
    width = max(len(row.ids) for row in rows)
    tokens = torch.tensor([[*row.ids, *[row.ids[-1]] * (width - len(row.ids))] for row in rows])
    lengths = torch.tensor([len(row.ids) for row in rows])[:, None]
    starts = torch.tensor([max(row.start, 1) for row in rows])[:, None]
    at = torch.arange(int(starts.min()), int(lengths.max()))
    learned = (at >= starts) & (at < lengths)
    return {
        "input_ids": tokens,
        "attention_mask": (torch.arange(width) < lengths).long(),
        "kept": at - 1,
        "labels": tokens[:, at].where(learned, IGNORED),
        "weight": torch.tensor([row.weight for row in rows])[:1],
    }


def answer_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """The loss of one pass, in nats, weighted so that the passes of a step average to its mean over learned tokens."""
    return _lost(model, inputs).sum() * inputs["weight"][0]


def _lost(model: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, " token"]:
    """-log p of every learned token, row by row."""
    read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    inner = getattr(model, "get_base_model", lambda: model)()
    if "logits_to_keep" in signature(inner.forward).parameters:
        logits = model(**read, logits_to_keep=inputs["kept"], use_cache=False).logits
    else:
        logits = model(**read, use_cache=False).logits[:, inputs["kept"]]
    learned = inputs["labels"] != IGNORED
    return F.cross_entropy(logits[learned].float(), inputs["labels"][learned], reduction="none")


@torch.no_grad()
def answer_logprobs(model: Any, answers: Sequence[LearnedAnswer], *, together: int = 8) -> list[float]:
    """Mean log-probability of each answer's tokens, and of the end of its turn, in nats."""
    order, found = sorted(range(len(answers)), key=lambda i: len(answers[i].ids)), [0.0] * len(answers)
    for first in range(0, len(order), together):
        rows = order[first : first + together]
        inputs = collated([Passed(*answers[i], 1.0) for i in rows])
        lost = _lost(model, {name: each.to(model.device) for name, each in inputs.items()})
        lengths = [len(answers[i].ids) - max(answers[i].start, 1) for i in rows]
        for i, each in zip(rows, lost.split(lengths), strict=True):
            found[i] = -float(each.mean())
    return found


def descend(
    model: nn.Module,
    rows: Sequence[Passed],
    schedule: Schedule,
    folder: Path,
    *,
    together: int,
    seed: int,
    every: int,
    cpu: bool,
    bf16: bool,
    callbacks: Sequence[Any],
) -> list[float]:
    """Train in place by transformers' Trainer, from the last whole checkpoint in the folder on; the losses by step."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class InOrder(Trainer):
        """Takes the rows as they come, and scores answers."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(rows)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super()._save_checkpoint(*args, **kwargs)
            for path in set(folder.glob("checkpoint-*")) - {last_checkpoint(folder)}:
                shutil.rmtree(path)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return answer_loss(model, inputs)

    settings = TrainingArguments(
        output_dir=str(folder), max_steps=schedule.steps, per_device_train_batch_size=together,
        gradient_accumulation_steps=schedule.batch // together, learning_rate=schedule.lr,
        lr_scheduler_type="constant_with_warmup" if schedule.decay == "constant" else schedule.decay,
        warmup_steps=schedule.warmup, weight_decay=schedule.weight_decay, max_grad_norm=schedule.clip,
        optim="adamw_torch", seed=seed, data_seed=seed, logging_steps=1, logging_nan_inf_filter=False,
        save_strategy="steps", save_steps=every, report_to="none", disable_tqdm=True, use_cpu=cpu,
        bf16=bf16, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    settings._n_gpu = min(settings.n_gpu, 1)  # DataParallel would cut up what belongs to all rows
    trainer: Any = InOrder(model=model, args=settings, train_dataset=rows, data_collator=collated,  # pyright: ignore
                           callbacks=list(callbacks))  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = False  # the mean over the passes of a step is the Trainer's
    last = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return [float(each["loss"]) for each in trainer.state.log_history if "loss" in each]


def last_checkpoint(folder: Path, at_least: int = 0) -> Path | None:
    """The newest checkpoint of `at_least` so many steps, written to its end: the Trainer's state is its last file."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _whole(path)]
    last = max(found, key=_step, default=None)
    return None if last is None or _step(last) < at_least else last


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _whole(path: Path) -> bool:
    try:
        return "global_step" in json_of(path.read_text(encoding="utf-8"))
    except ValueError:
        return False


def bar(steps: int, name: str) -> Any:
    """A progress bar as a callback of the Trainer: steps, the loss, the time left."""
    from transformers import TrainerCallback

    class StepBar(TrainerCallback):
        """tqdm's."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.shown = tqdm(total=steps, initial=state.global_step, desc=name, unit="step")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                self.shown.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
                self.shown.update(state.global_step - self.shown.n)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.shown.close()

    return StepBar()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Everything random begins at the seed and sums are made in one order; afterwards the caller's state is back.

    One thread at a time, also while others load: random numbers that two draw are neither's.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with holding(RANDOM), torch.random.fork_rng(devices=devices):
        states = random.getstate(), np.random.get_state()  # noqa: NPY002  # what transformers seeds
        strict = torch.are_deterministic_algorithms_enabled()
        warn = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warn)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
