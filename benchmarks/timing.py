"""What the benchmarks share: random models, prompts, counters that do not vary, peak memory, interleaved timing.

    ratio = median over rounds of (seconds of a way / seconds of the baseline in the same round)

One thread, process time (on CUDA: wall time between synchronizations), every round runs each way once, the order
reversed in odd rounds; a baseline is measured in the same process, never stored.  Peak memory is that of torch's
allocator, traced allocation by allocation, so it repeats exactly: ``tracemalloc`` does not see torch, and a process's
resident memory depends on what ran before.

This file needs torch and transformers only: ``peers.py`` runs it in an environment without this package.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

Family = Literal["qwen2", "gpt2"]
Way = Callable[[], Any]
Rows = Sequence[Sequence[int]]
T = TypeVar("T")
WORDS, BATCH = 2000, 32


@dataclass(frozen=True)
class Size:
    """A model's size and what it is bound by."""

    name: str
    d_model: int
    layers: int = 12
    directory: str = ""
    """Of a real model; without one the weights are random."""


SIZES = (Size("overhead-bound", 64), Size("matmul-bound", 512))
DEPTHS = tuple(Size(f"L={layers}", 32, layers) for layers in (12, 28, 64))


def device_of(name: str | None) -> torch.device:
    """The device asked for, else CUDA where there is one."""
    torch.set_num_threads(1)
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


# --- Models and prompts -----------------------------------------------------------------------------------------------

_words = [f"w{i}" for i in range(WORDS)]
"""What prompts are made of: every one is one token."""


def word(i: int) -> str:
    """The word of this number."""
    return _words[i]


def real_size(directory: str) -> Size:
    """A real model's size. From now on prompts are made of words that are one token to its tokenizer."""
    config, tokenizer = AutoConfig.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    known = tokenizer.get_vocab()
    whole = sorted(name for name in known if name.isascii() and name.isalpha() and name.islower() and len(name) > 2)
    some = [name for name in whole if len(tokenizer(f"{name} {name}")["input_ids"]) == 2]
    _words[:] = [some[i * len(some) // WORDS] for i in range(WORDS)]
    return Size(Path(directory).resolve().name, config.hidden_size, config.num_hidden_layers, directory)


def sizes(options: Any, all_sizes: Sequence[Any]) -> Sequence[Any]:
    """Those that the command line asks for: one by name, all, or the real model of ``--weights``."""
    if options.weights:
        return (real_size(options.weights),)
    return [size for size in all_sizes if options.size in (None, size.name)]


def make_hf(family: Family, size: Size, device: torch.device, *, context: int = 256) -> Any:
    """A random model, or a real one: weights bfloat16 on CUDA, else float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if size.directory:
        real: Any = AutoModelForCausalLM.from_pretrained(size.directory, attn_implementation="eager").eval()
        with torch.no_grad():
            real.get_output_embeddings().weight[real.config.eos_token_id] = 0.0  # as below
        return real.to(device, dtype)
    torch.manual_seed(0)
    heads = max(2, size.d_model // 64)
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    config: Any = (
        Qwen2Config(
            vocab_size=WORDS + 2, hidden_size=size.d_model, intermediate_size=3 * size.d_model,
            num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
            max_position_embeddings=context, tie_word_embeddings=False, initializer_range=0.05, **ids,
        )
        if family == "qwen2"
        else GPT2Config(
            vocab_size=WORDS + 2, n_embd=size.d_model, n_layer=size.layers, n_head=heads, n_positions=context,
            initializer_range=0.05, tie_word_embeddings=False, **ids,
        )
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[1] = 0.0  # no answer ends early: the end is never the likeliest of 2000
    return model.to(device, dtype)


def make_tokenizer(side: str = "left", *, size: Size | None = None) -> PreTrainedTokenizerFast:
    """Word-level; a word is a token. Of a real model its own."""
    if size is not None and size.directory:
        own = AutoTokenizer.from_pretrained(size.directory, padding_side=side)
        own.chat_template = None  # prompts are plain text
        return own
    vocabulary = {name: i for i, name in enumerate(("<unk>", "<end>", *(f"w{i}" for i in range(WORDS))))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<end>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, **names)


def make_model(family: Family, size: Size, surface: Any, device: torch.device) -> Any:
    """The same model on a surface of TransformerLens."""
    from tl_em.models.loading import load_model
    from tl_em.models.upstream_chatter import quiet

    hf, tokenizer = make_hf(family, size, device), make_tokenizer(size=size)
    with quiet():
        return load_model(hf, surface=surface, tokenizer=tokenizer, in_place=True, device=device, dtype=hf.dtype)


def make_prompts(count: int, *, seed: int, own: int, shortest: int = 12, longest: int = 60) -> list[str]:
    """Random words, lengths drawn evenly, one third of the words from ten that are the class's own."""
    rng = np.random.default_rng(seed)

    def prompt(length: int) -> str:
        words = rng.integers(40, WORDS, length)
        words[::3] = rng.integers(own, own + 10, len(words[::3]))
        return " ".join(word(i) for i in words)

    return [prompt(int(n)) for n in rng.integers(shortest, longest + 1, count)]


# --- The floor --------------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Raised where the unembedding would begin."""


def padded(rows: Rows, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and their mask."""
    width = max(map(len, rows))
    flip = slice(None, None, 1 if side == "right" else -1)
    tokens = [[*row[flip], *[1] * (width - len(row))][flip] for row in rows]
    mask = [[*[1] * len(row), *[0] * (width - len(row))][flip] for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def batched(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """Batches of 32, in the order given."""
    for i in range(0, len(rows), BATCH):
        yield rows[i : i + BATCH]


def sorted_batches(rows: Rows, device: torch.device) -> list[Tensor]:
    """Batches of 32, sorted by length, padded on the right."""
    return [padded(some, "right", device)[0] for some in batched(sorted(rows, key=len, reverse=True))]


@torch.no_grad()
def floor(model: Any, unembedding: torch.nn.Module, batches: Sequence[Tensor]) -> None:
    """All blocks of all batches and nothing else."""

    def stop(module: Any, args: Any) -> None:
        raise _Stop

    handle = unembedding.register_forward_pre_hook(stop)
    try:
        for tokens in batches:
            try:
                model(tokens)
            except _Stop:
                continue
    finally:
        handle.remove()


# --- Counters ---------------------------------------------------------------------------------------------------------


@contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """Forwards, tokens through a block, positions unembedded, and how often ``hook_dict`` was built anew."""
    from tl_em.models.hooks import hook_points

    counts: dict[str, int] = dict.fromkeys(("forwards", "block-tokens", "unembedded", "hook_dict"), 0)
    points = hook_points(model)

    def add(name: str, by: Callable[[Tensor], int]) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            counts[name] += by(out)

        hook.__module__ = "tl_em.counted"  # it only reads, and a stranger's hook would keep prompts of a length apart
        return hook

    def tokens(x: Tensor) -> int:
        return x.shape[0] * x.shape[1]

    ends = [points[f"blocks.{i}.hook_resid_post"] for i in range(model.cfg.n_layers)]
    handles = [end.register_forward_hook(add("block-tokens", tokens)) for end in ends]
    handles.append(points["blocks.0.hook_resid_pre"].register_forward_hook(add("forwards", lambda x: 1)))
    handles.append(model.unembed.register_forward_hook(add("unembedded", tokens)))
    try:
        with _builds(model, counts):
            yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _builds(model: Any, counts: dict[str, int]) -> Iterator[None]:
    """Where ``hook_dict`` is a property, count its evaluations."""
    owner = next((c for c in type(model).__mro__ if isinstance(c.__dict__.get("hook_dict"), property)), None)
    if owner is None:
        yield
        return
    original = owner.__dict__["hook_dict"]

    def build(self: Any) -> Any:
        counts["hook_dict"] += 1
        return original.fget(self)

    owner.hook_dict = property(build)
    try:
        yield
    finally:
        owner.hook_dict = original


def peak_bytes(way: Way, device: torch.device) -> int:
    """The most that torch held at once, beyond what it held before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        way()
    events: Any = trace.profiler
    found = [e for e in events.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())]
    return int(np.maximum.accumulate(np.cumsum([0, *sizes]))[-1])


# --- Timing -----------------------------------------------------------------------------------------------------------


def seconds(way: Way, device: torch.device) -> float:
    """Process time of a call; on CUDA wall time, from an idle device to an idle device."""
    if device.type != "cuda":
        start = time.process_time()
        way()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    way()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def interleaved(ways: Mapping[str, Way], *, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every way in every round; call each way once before."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds):
        for name in list(ways)[:: -1 if i % 2 else 1]:
            found[name].append(seconds(ways[name], device))
    return found


def ratio(times: Sequence[float], base: Sequence[float]) -> str:
    """Median and least ratio to the baseline of the same round.

    Example:
        >>> ratio([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
        '3.000 (2.000)'
    """
    each = [a / b for a, b in zip(times, base, strict=True)]
    return f"{statistics.median(each):.3f} ({min(each):.3f})"


def measured(
    ways: Mapping[str, Way], base: str, rounds: int, device: torch.device, *, only: Sequence[str] = ()
) -> dict[str, dict[str, str]]:
    """By way: peak memory, and time over that of a baseline among them (with seconds, the least)."""
    some = {name: ways[name] for name in ways if not only or name in only or name == base}
    peaks = {name: f"{peak_bytes(way, device) / 2**20:.1f}" for name, way in some.items()}
    times = interleaved(some, rounds=rounds, device=device)
    return {
        name: {"over": ratio(times[name], times[base]), "s": f"{min(times[name]):.2f}", "MiB": peaks[name]}
        for name in some
    }


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print rows under the union of their columns."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    wide = {c: max(len(c), *(len(str(row.get(c, ""))) for row in rows.values())) for c in columns}
    first = max(len(name) for name in rows)
    print(f"\n{title}\n{'':{first}}  " + "  ".join(f"{c:>{wide[c]}}" for c in columns))
    for name, row in rows.items():
        print(f"{name:{first}}  " + "  ".join(f"{row.get(c, '')!s:>{wide[c]}}" for c in columns), flush=True)
