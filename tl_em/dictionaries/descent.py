"""SAELens's trainer, step by step over our batches, with checkpoints in safetensors from which a run goes on.

A checkpoint is one file, written whole or not at all: the weights, Adam's moments, which latents have been silent for
how long, the scale of the activations, and how far the corpus was read.  Schedules depend on the number of steps alone
and are run again.  So a run that was ended at any step, and made again, gives the bytes that it would have given.

The control: a few activations lie in the checkpoint too, and the corpus is hashed as far as it was read; a model, or a
text, that is not the one before is refused.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tl_em.artefacts import check_writable, load_tensors, read_object, replacing, save_tensors
from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.corpus import ActivationSource, ReadSoFar, Scale
from tl_em.dictionaries.top_k import training_sae
from tl_em.errors import NonFiniteError, OutputError, UsageError
from tl_em.showing import lasting
from tl_em.threads import own_warnings

LONG = 60.0
"""Seconds above which the expected cost is told before the training starts."""
OFTEN = 300.0
"""Seconds from one checkpoint to the next, where it is not said after how many steps."""
_PROBE, _SAMPLE, _SAID = 3, 8, 10
"""Steps that the cost is told from, activations that are kept in a checkpoint, and steps between two losses shown."""
_SCHEMA, _RECORD = "tl-em/training/1", "tl-em/dictionary-training/1"


class TrainingRun(NamedTuple):
    """What is trained: a function from the number of steps to SAELens's configuration, and how."""

    config: Callable[[int], Any]
    steps: int
    batch: int
    lr: float
    seed: int
    transcoder: bool


def trainer_of(run: TrainingRun) -> Any:
    """SAELens's trainer before the first step."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    torch.manual_seed(run.seed)
    sae = training_sae(run.config(run.steps), run.transcoder)
    config = SAETrainerConfig(
        total_training_samples=run.steps * run.batch,
        train_batch_size_samples=run.batch,
        lr=run.lr,
        lr_end=run.lr / 10,
        lr_warm_up_steps=run.steps // 20,
        lr_decay_steps=run.steps // 5,
        dead_feature_window=max(10, run.steps // 20),
        feature_sampling_window=run.steps + 1,  # the statistics of a window are only logged
        device=str(sae.device),
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, iter(()))


def descended(trainer: Any, batches: Iterator[Tensor]) -> Iterator[Any]:
    """One step a batch, as ``SAETrainer.fit`` takes it; what each gave."""
    for batch in batches:
        found = trainer.step(batch)
        trainer.n_training_steps += 1
        yield found


def train(source: ActivationSource, run: TrainingRun, folder: TrainingFolder | None, show: bool) -> Any:
    """SAELens's training SAE after all steps, from the last checkpoint on.

    Raises:
        NonFiniteError: it diverged. UsageError: the checkpoint is of another model or corpus.
    """
    at = None if folder is None else folder.read()
    if at is not None:
        source.scale, source.expected = at.scale, at.sample
    source.open(ReadSoFar() if at is None else at.served)
    done = 0 if at is None else at.step
    _tell_cost(source, run, run.steps - done, show)
    trainer = trainer_of(run)
    if at is not None:
        _restore_(trainer, at)
    batches = source.batches(run.batch)
    with tqdm(total=run.steps, initial=done, desc="dictionary", unit="step", disable=not show) as bar:
        for found in descended(trainer, islice(batches, run.steps - done)):
            bar.update()
            step = trainer.n_training_steps
            if show and step % _SAID == 0:
                bar.set_postfix(loss=f"{found.loss.item():.4g}", refresh=False)
            if step == run.steps or (folder is not None and folder.is_due(step)):
                _check_finite(found.loss.item(), step)
                if folder is not None and step < run.steps:
                    folder.save(trainer, source)
    trainer.set_final_sae_metadata()
    return trainer.sae


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"The loss is {loss} at step {step}, so the training diverged and nothing of it is kept. Give a smaller lr="
        )


def _tell_cost(source: ActivationSource, run: TrainingRun, steps: int, show: bool) -> None:
    """Say how long it will take, from some prompts and a few steps that are thrown away, and what is held."""
    if run.steps <= _PROBE or not steps:
        return
    trainer = trainer_of(run)
    some = repeat(torch.randn(run.batch, source.width))
    next(iter(descended(trainer, some)))  # what is done once
    began = time.perf_counter()
    for _ in islice(descended(trainer, some), _PROBE):
        pass
    seconds = (time.perf_counter() - began) / _PROBE * steps
    seconds += source.seconds_per_token() * (source.samples if source.first.whole else steps * run.batch)
    if show or seconds > LONG:
        weights = sum(each.numel() for each in trainer.sae.parameters())
        held, own = source.samples * source.width, 4 * weights + 3 * run.batch * trainer.sae.cfg.d_sae
        print(
            f"training a dictionary: {steps} steps of {run.batch} tokens, about {lasting(seconds)}; "
            f"{held * 4 / 2**20:.0f} MiB of activations held, {own * 4 / 2**20:.0f} MiB for the dictionary, its "
            "gradients and a batch of latents",
            file=sys.__stderr__,
        )


# ---- checkpoints -----------------------------------------------------------------------------------------------------
class Checkpoint(NamedTuple):
    """A run between two steps."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    silent: Tensor
    counts: Tensor
    scale: Scale
    sample: Tensor
    step: int
    served: ReadSoFar


class TrainingFolder:
    """Where a training keeps its checkpoint, its record, and in the end its dictionary.

    Args:
        out: the folder.
        asked: what the training is, as JSON.
        every: steps from one checkpoint to the next; None is every five minutes.

    Raises:
        UsageError: another training is there. OutputError: something else is, or nothing can be written.
    """

    def __init__(self, out: str | Path, asked: Mapping[str, Any], every: int | None) -> None:
        self.path, self.every, self.asked = Path(out).expanduser(), every, json.loads(json.dumps(asked))
        self.dictionary, self.record = self.path / "dictionary.safetensors", self.path / "record.json"
        self._file, self._last = self.path / "checkpoint.safetensors", time.monotonic()
        begun = self._file.is_file() or self.dictionary.is_file()
        if begun and self.record.is_file():
            there = read_object(self.record)
            differ = [
                f"{name} ({there.get(name)!r} there, {value!r} now)"
                for name, value in self.asked.items()
                if there.get(name) != value
            ]
            if differ:
                raise UsageError(
                    f"{self.record} is of a training that differs in {', '.join(differ)}, and would be mixed up with "
                    "this one; give another out=, or delete that folder"
                )
        elif self.path.exists() and (not self.path.is_dir() or set(self.path.iterdir()) - {self.record}):
            raise OutputError(f"{self.path} holds something else, and nothing is written over it. Give another out=.")
        else:
            check_writable(self.record)

    def finished(self) -> Dictionary | None:
        """The dictionary of a training that is done."""
        done = self.dictionary.is_file() and "seconds" in read_object(self.record)
        return Dictionary.load(self.dictionary) if done else None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self._last > OFTEN

    def save(self, trainer: Any, source: ActivationSource) -> None:
        """Write a checkpoint in place of the last."""
        assert source.scale is not None and source.held is not None
        tensors = {f"weights/{name}": each for name, each in trainer.sae.state_dict().items()}
        for name, parameter in trainer.sae.named_parameters():
            for kind, each in trainer.optimizer.state[parameter].items():
                tensors[f"moments/{kind}/{name}"] = each
        tensors |= {"silent": trainer.n_forward_passes_since_fired, "counts": trainer.act_freq_scores}
        tensors |= {"mean": source.scale.mean, "length": source.scale.length, "sample": source.held[:_SAMPLE]}
        about = {"schema": _SCHEMA, "step": trainer.n_training_steps, "served": list(source.at)}
        if not self._file.is_file():
            self._write({})
        save_tensors(self._file, tensors, about)
        self._last = time.monotonic()

    def read(self) -> Checkpoint | None:
        """The last checkpoint.

        Raises:
            CorruptFileError: it is damaged.
        """
        if not self._file.is_file():
            return None
        return load_tensors(
            self._file, _SCHEMA, _made, damage=f"the training cannot go on from it; delete {self.path} and begin anew"
        )

    def finish(self, dictionary: Dictionary, done: Mapping[str, Any]) -> None:
        """Write the dictionary and what became of the training; the checkpoint goes."""
        dictionary.save(self.dictionary)
        self._write(done)
        self._file.unlink(missing_ok=True)

    def _write(self, done: Mapping[str, Any]) -> None:
        with replacing(self.record) as temporary:
            said = {"schema": _RECORD} | self.asked | dict(done)
            temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _made(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Checkpoint:
    def under(head: str) -> dict[str, Tensor]:
        return {name.removeprefix(head): each for name, each in tensors.items() if name.startswith(head)}

    place, batches = about["served"]
    scale, served = Scale(tensors["mean"], tensors["length"]), ReadSoFar(place, int(batches))
    moments, silent, counts = under("moments/"), tensors["silent"], tensors["counts"]
    return Checkpoint(under("weights/"), moments, silent, counts, scale, tensors["sample"], int(about["step"]), served)


def _restore_(trainer: Any, at: Checkpoint) -> None:
    """Put a new trainer where another one was."""
    device, config = trainer.sae.device, trainer.cfg
    trainer.sae.load_state_dict(at.weights)
    parameters = dict(trainer.sae.named_parameters())
    for name, each in at.moments.items():
        kind, _, parameter = name.partition("/")
        where = each if kind == "step" else each.to(device)
        trainer.optimizer.state[parameters[parameter]][kind] = where
    trainer.n_forward_passes_since_fired, trainer.act_freq_scores = at.silent.to(device), at.counts.to(device)
    trainer.n_training_steps, trainer.n_training_samples = at.step, at.step * config.train_batch_size_samples
    trainer.n_frac_active_samples = trainer.n_training_samples
    with own_warnings():
        warnings.simplefilter("ignore")  # that a schedule is run before the optimiser is, on purpose
        for schedule in (trainer.lr_scheduler, *trainer.coefficient_schedulers.values()):
            for _ in range(at.step):
                schedule.step()
