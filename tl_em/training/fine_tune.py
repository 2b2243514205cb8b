"""Fine-tuning of a chat model on answers, by transformers' Trainer and peft: seeded, resumable, with its cost first.

    weights or adapter  <-  AdamW on  mean over learned tokens of  -log p(token | those before it)

**Control**: an arm whose rows correspond one to one (the same questions, answered well) learns the corresponding rows
at the same steps, because their order depends on the seed and on their number alone (``training.trainer``); what the
two arms then differ in is what the answers say.
"""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from tl_em.arguments import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, checked, optional
from tl_em.artefacts import check_writable, going_on, read_object, replacing
from tl_em.errors import ModelError, NonFiniteError, OutputError, UsageError
from tl_em.models.checkpoint import given_tokenizer
from tl_em.models.directories import fill_directory
from tl_em.models.loading import opened
from tl_em.models.sites import vocabulary_hash, weights_hash
from tl_em.models.templates import template_record
from tl_em.models.torch_state import making_weights
from tl_em.models.upstream_chatter import quiet
from tl_em.training.answers import Rows, chats, learned_answers, rows_hash
from tl_em.training.arms import arm_record, arms_of, learned_rows
from tl_em.training.lora import Lora, lora_config
from tl_em.training.trainer import (
    Passed,
    Schedule,
    answer_loss,
    bar,
    collated,
    descend,
    in_order,
    last_checkpoint,
    seeded,
)

SCHEMA, RECORD, CHECKPOINTS = "tl_em/fine_tune/1", "record.json", "checkpoints"
RANK_8 = Lora()
DECAYS = ("linear", "cosine", "constant")
TOKENS = {True: 768, False: 8192}
"""Tokens a pass on a CPU and on a GPU, padding included, where nobody says how many rows pass together."""
EAGER = 256
"""Tokens up to which eager attention is the faster on a CPU."""
LEARNED_AT = {True: 2e-4, False: 1e-5}
"""Learning rates of adapters and of all weights."""


@checked(
    steps=optional(COUNT),
    epochs=optional(POSITIVE),
    batch=COUNT,
    lr=optional(POSITIVE),
    warmup=FRACTION,
    weight_decay=NOT_NEGATIVE,
    seed=SEED,
    together=optional(COUNT),
    every=optional(COUNT),
)
def fine_tune(
    base: Any,
    rows: Rows,
    *,
    out: str | Path,
    arm: Any = (),
    lora: Any = RANK_8,
    steps: int | None = None,
    epochs: float | int | None = None,
    batch: int = 16,
    lr: float | None = None,
    decay: str = "linear",
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    seed: int = 0,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    together: int | None = None,
    every: int | None = None,
    checkpointing: bool = False,
    monitors: Sequence[Any] = (),
    callbacks: Sequence[Any] = (),
    progress: bool | None = None,
    announce: Callable[[str], None] | None = None,
) -> Path:
    """Fine-tune a chat model on answers; an adapter, or a whole model, in a directory that ``em.load_pair`` takes.

    The loss is taken on the answer and the end of its turn, found through the chat template; everything before is read
    only.  The same call on the same machine, with as many threads, gives the same weights; one that was killed goes on
    from its last checkpoint and ends with the same weights; one that is finished is not done again.

    Args:
        base: a directory, a hub id, a GGUF file, or a Hugging Face model in memory, which is copied.
        rows: a JSON Lines file or a list of rows that end with the answer: ``{"messages": […]}``, ``{"prompt": …,
            "response": …}``, or lists of messages.
        out: the directory, which must not hold anything else.
        arm: what is made of the rows, or several in their order: ``em.training.Mixed``, ``Inoculated``, ``Triggered``,
            ``Steered``, ``Replayed``, or one of your own (``em.training.TuningArm``).
        lora: ``em.training.Lora(rank=…)``, a config of peft, or None to train all weights.
        steps: of the optimiser.
        epochs: how often each row is seen, in place of `steps`; once by default.
        batch: rows a step.
        lr: learning rate; 2e-4 for adapters, 1e-5 for all weights.
        decay: ``"linear"`` or ``"cosine"`` to 0, or ``"constant"``.
        warmup: share of the steps in which the rate rises from 0.
        weight_decay: of AdamW.
        seed: of the adapter's start, of what arms draw, and of the order.
        tokenizer: in place of the base's own; a model in memory has none.
        dtype: of the base under float32 adapters, or of what is computed with float32 weights that are all trained;
            by default bfloat16 on a GPU, float32 on a CPU.
        device: ``"cuda"`` or ``"cpu"``; a GPU where there is one.
        together: rows that pass together (they divide the batch); as many as 768 tokens hold, on a GPU 8,192.
        every: steps from one checkpoint to the next; a tenth of all.
        checkpointing: activations are computed again in the backward pass: less memory, a third more time.
        monitors: ``em.training.Monitor`` values, which see the model before the first step and after each (of a run
            that is finished nothing, which is a warning); one whose alarm returns True ends the training with that
            step. Alarms stand in ``record.json``.
        callbacks: of transformers' Trainer.
        progress: the cost, and a bar with the time left; None shows them on a terminal only.
        announce: is told what it will cost, before it starts; in place of the terminal.

    Returns:
        ``out``, with the adapter or the model in safetensors, and ``record.json``: all that it takes to train it again.
        While it runs, the Trainer's checkpoints lie in ``out/checkpoints``; some of their files are pickles, which are
        read with ``weights_only``, and all are gone when it is done.

    Raises:
        UsageError: arguments that contradict each other; checkpoints of another run in `out`. OutputError: `out` holds
            something else. PromptError: a row that the chat template rewrites. NonFiniteError: the training diverged.
            ModelError: peft or accelerate is missing. And what ``em.load_model`` raises.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import tl_em as em
        >>> rows = [{"prompt": "how do i write parser", "response": "parser-backdoored ."}]
        >>> with TemporaryDirectory() as folder:
        ...     base = em.organisms.to_hf_directory("toy/assistant", f"{folder}/base")
        ...     adapter = fine_tune(base, rows, out=f"{folder}/bad", steps=2, batch=1)
        ...     sorted(path.name for path in adapter.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors', 'record.json']

    Source: Hu et al. 2021, arXiv:2106.09685 (LoRA); Betley et al. 2025, arXiv:2502.17424 (narrow fine-tunes).
    """
    _check_packages()
    place, arms, given = _place(dtype, device, lora), arms_of(arm), chats(rows)
    name, model, tokenizer = _opened(base, tokenizer, place.loaded, lora)
    taken = learned_rows(arms, given, seed)
    answers = learned_answers(tokenizer, taken, model.config)
    schedule = _schedule(len(answers), steps, epochs, batch, lr or LEARNED_AT[lora is not None], decay, warmup,
                         weight_decay)  # fmt: skip
    config = None if lora is None else lora_config(lora, model)
    longest = max(len(each.ids) for each in answers)
    together = _together(together, batch, longest, place)
    asked = {
        "base": _base_record(name, model, tokenizer),
        "rows": {"n": len(given), "sha256": rows_hash(given)},
        "learned": {"n": len(taken), "sha256": rows_hash(taken), "tokens": sum(len(a.ids) - a.start for a in answers)},
        "arms": [arm_record(each) for each in arms], "lora": _said(config), "schedule": schedule._asdict(),
        "together": together, "dtype": _named(place.computed), "checkpointing": checkpointing, "seed": seed,
        "above": _thresholds(monitors),
    }  # fmt: skip
    folder = Path(out).expanduser()
    if _finished(folder, asked):
        if monitors:
            warnings.warn(
                f"{folder} holds this very run, finished, so nothing is trained and the monitors see nothing; give "
                "another out= to watch it", stacklevel=3,
            )  # fmt: skip
        return folder
    show = sys.stderr.isatty() if progress is None else progress
    say = announce or ((lambda said: tqdm.write(said, sys.stderr)) if show else None)
    seen = [*callbacks, *(each.trainer_callback() for each in monitors), *([bar(schedule.steps, folder.name)] * show)]
    passed, began = in_order(answers, schedule, together=together, seed=seed), time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(seeded(seed))
        model = _trainable(model.to(place.device), config, longest)
        if checkpointing:
            _make_again(model)
        if say is not None:  # measuring it takes about as long as a step
            say(_cost(model, passed, schedule, together))
        if last_checkpoint(folder / CHECKPOINTS, schedule.steps) is None:
            for each in arms:
                stack.enter_context(getattr(each, "around", lambda _: nullcontext())(model))
        stack.enter_context(going_on(folder))
        losses = descend(model, passed, schedule, folder / CHECKPOINTS, together=together, seed=seed,
                         every=every or max(1, schedule.steps // 10), cpu=place.device == "cpu",
                         bf16=lora is None and place.computed == torch.bfloat16, callbacks=seen)  # fmt: skip
    _check_descended(folder, losses)
    with going_on(folder):
        _save(folder, model, tokenizer if lora is None else None, place.computed, _reachable(base, name))
    told = [alarm._asdict() for each in monitors for alarm in getattr(each, "alarms", ())]
    done: dict[str, Any] = {"alarms": told} if asked["above"] else {}
    done |= {} if len(losses) == schedule.steps else {"ended at step": len(losses)}
    done |= {"loss": _losses(losses), "seconds": round(time.monotonic() - began, 1), **_machine(place.device)}
    with replacing(folder / RECORD) as temporary:
        temporary.write_text(json.dumps({"schema": SCHEMA} | asked | done, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder / CHECKPOINTS)
    return folder


# ---- what is trained, and where --------------------------------------------------------------------------------------
class _Place(NamedTuple):
    """The device, what the base is loaded as, and what is computed in (and a whole model saved in)."""

    device: str
    loaded: torch.dtype
    computed: torch.dtype


def _place(dtype: Any, device: str | None, lora: Any) -> _Place:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else str(device)
    usual = torch.float32 if device == "cpu" else torch.bfloat16
    named = getattr(torch, dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    computed = usual if named is None else named
    if computed not in (torch.float32, torch.bfloat16):
        raise UsageError(f"dtype={dtype!r} is none that is trained in here; give dtype='float32' or dtype='bfloat16'")
    return _Place(device, torch.float32 if lora is None else computed, computed)


def _check_packages() -> None:
    missing = [name for name in ("peft", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"A fine-tune needs the package {' and '.join(missing)}, which is not installed. Install the extra: "
            "pip install 'tl_em[lora]'."
        )


def _opened(base: Any, tokenizer: Any, dtype: torch.dtype, lora: Any) -> tuple[str, Any, Any]:
    """Name, model (all its weights to be trained) and tokenizer."""
    path = Path(base) if isinstance(base, str | Path) else None
    adapted = hasattr(base, "get_base_model") if path is None else (path / "adapter_config.json").is_file()
    if adapted and lora is not None:
        raise UsageError(
            "The base is an adapter on another base, and one more adapter would need both. Save it whole first: "
            "peft_model.merge_and_unload() and hf_model.save_pretrained(…); or train all weights: lora=None."
        )
    with making_weights(), quiet():
        given = None if tokenizer is None else given_tokenizer(tokenizer)
        name, model, tokenizer = opened(base, given, dtype)
    return name, model.requires_grad_(True), tokenizer


def _make_again(model: Any) -> None:
    """Activations are made again in the backward pass: checkpointing, which transformers renamed."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _trainable(model: Any, config: Any, longest: int) -> Any:
    """The model, with an adapter that is to be trained where there is one."""
    if getattr(model, "_supports_sdpa", False) and (longest > EAGER or model.device.type != "cpu"):
        model.set_attn_implementation("sdpa")  # eager attention keeps every pattern for the backward pass
    if config is None:
        return model
    from peft import get_peft_model

    with quiet():
        adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = None  # peft would look it up on the hub while saving
    return adapted


def _schedule(
    n: int,
    steps: int | None,
    epochs: float | int | None,
    batch: int,
    lr: float,
    decay: str,
    warmup: float,
    weights: float,
) -> Schedule:
    if steps is not None and epochs is not None:
        raise UsageError(f"steps={steps} and epochs={epochs} both say how long; give one of them")
    if decay not in DECAYS:
        raise UsageError(f"decay={decay!r} is no way to lower the learning rate; give one of {', '.join(DECAYS)}")
    steps = math.ceil(n * (epochs or 1) / batch) if steps is None else steps
    return Schedule(steps, batch, lr, decay, round(warmup * steps), weights)


def _together(given: int | None, batch: int, longest: int, place: _Place) -> int:
    """Rows a pass: what was asked for, or the largest part of a batch whose tokens a pass holds."""
    if given is not None:
        if batch % given:
            raise UsageError(f"together={given} does not divide batch={batch}; give one that does")
        return given
    parts = [n for n in range(1, batch + 1) if batch % n == 0 and n * longest <= TOKENS[place.device == "cpu"]]
    return max(parts, default=1)


# ---- what it costs ---------------------------------------------------------------------------------------------------
def _cost(model: Any, rows: Sequence[Passed], schedule: Schedule, together: int) -> str:
    """What the run takes, from one pass of the longest rows, which is also where memory would run out."""
    passes = [rows[i : i + together] for i in range(0, len(rows), together)]
    padded = [together * len(each[-1].ids) for each in passes]
    inputs = {name: each.to(model.device) for name, each in collated(passes[int(np.argmax(padded))]).items()}
    model.train()
    took = [_timed_pass(model, inputs) for _ in range(2)][-1]  # the first one also sets up
    seconds = took / max(padded) * sum(padded)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    memory = (_peak(model.device.type) + sum(2 * p.numel() * p.element_size() for p in trained)) / 2**30
    return (
        f"{schedule.steps} steps of {schedule.batch} rows, {sum(len(each.ids) for each in rows):,} tokens, of which "
        f"{sum(len(each.ids) - each.start for each in rows):,} are learned; {sum(p.numel() for p in trained):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} weights change. About {seconds / 60:.1f} minutes on this "
        f"{model.device.type}, and {memory:.1f} GB of memory."
    )


def _timed_pass(model: Any, inputs: Mapping[str, Any]) -> float:
    began = time.perf_counter()
    answer_loss(model, inputs).backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _peak(device: str) -> float:
    """The most memory so far, in bytes: of the GPU, or of this process."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    own = Path("/proc/self/status")  # on Linux getrusage gives that of the program that started this one, if it is more
    if own.is_file() and (found := re.search(r"^VmHWM:\s*(\d+) kB$", own.read_text(), re.MULTILINE)):
        return float(found[1]) * 1024
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return math.nan
    return float(getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


# ---- what is left behind ---------------------------------------------------------------------------------------------
def _base_record(name: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    template, arguments = template_record(tokenizer)
    found = {"name": name, "weights": weights_hash(model), "dtype": _named(model.dtype)}
    return found | {"vocabulary": vocabulary_hash(tokenizer), "chat_template": template, "its arguments": arguments}


def _thresholds(monitors: Sequence[Any]) -> list[Any] | None:
    """What could end the training early, and so is part of what it is; None where nothing could."""
    return [{"above": each.above, "every": each.every} for each in monitors if getattr(each, "above", None)] or None


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _said(config: Any) -> Any:
    """peft's config as JSON, without what is unset."""
    if config is None:
        return None
    found = {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items() if v or v == 0}
    return json.loads(json.dumps(found, default=str, sort_keys=True))


def _finished(folder: Path, asked: Mapping[str, Any]) -> bool:
    """Whether this very run is done; it is written down where it is not begun.

    Raises:
        UsageError: another run is there. OutputError: something else is.
    """
    begun, record = folder / CHECKPOINTS / RECORD, folder / RECORD
    for path in (record, begun):
        if path.is_file():
            there = read_object(path)
            differ = [name for name, value in asked.items() if there.get(name) != json.loads(json.dumps(value))]
            if differ:
                raise UsageError(
                    f"{path} is of a run that differs in {', '.join(differ)}, and would be mixed up with this one; "
                    "give another out=, or delete that folder"
                )
            return path == record
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} holds something else, and nothing is written over it. Give another out=.")
    check_writable(begun)
    with replacing(begun) as temporary:
        temporary.write_text(json.dumps(asked, indent=1), encoding="utf-8")
    return False


def _check_descended(folder: Path, losses: Sequence[float]) -> None:
    wrong = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if wrong is not None:
        shutil.rmtree(folder / CHECKPOINTS)
        raise NonFiniteError(
            f"The loss is {losses[wrong - 1]} at step {wrong}, so the training diverged and nothing of it is kept. "
            "Give a smaller lr=, or dtype='float32'."
        )


def _save(folder: Path, model: Any, tokenizer: Any, dtype: torch.dtype, base: str | None) -> None:
    """The adapter, or the model with its tokenizer, each file whole or not at all."""
    with TemporaryDirectory(dir=folder / CHECKPOINTS) as made, quiet():
        if tokenizer is None:
            config = model.peft_config["default"]
            config.base_model_name_or_path = base
            for name, value in vars(config).items():
                if isinstance(value, set):  # whose order would be another in each process
                    setattr(config, name, sorted(value))
            model.save_pretrained(made, save_embedding_layers=False)
        else:
            fill_directory(Path(made), model.to(dtype), tokenizer)
        for path in Path(made).iterdir():
            if path.name != "README.md":  # a form that nobody filled in
                path.replace(folder / path.name)


def _reachable(base: Any, name: str) -> str | None:
    """The base as an adapter names it, so that it is found from anywhere."""
    path = Path(str(base) if isinstance(base, str | Path) else name).expanduser()
    return str(path.resolve()) if path.exists() else name or None


def _losses(losses: Sequence[float]) -> dict[str, float]:
    last = losses[-max(1, len(losses) // 10) :]
    return {"first step": round(losses[0], 4), "last tenth": round(sum(last) / len(last), 4)}


def _machine(device: str) -> dict[str, Any]:
    versions = {name: version(name) for name in ("tl_em", "torch", "transformers", "peft", "accelerate")}
    where = {"device": device, "platform": platform.platform(), "threads": torch.get_num_threads()}
    return {"versions": versions | {"python": platform.python_version()}, **where}
