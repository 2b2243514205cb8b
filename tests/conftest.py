"""Small random models of four families on every surface that this TransformerLens has, and a word-level tokenizer;
benchmarks as modules, and a browser."""

from __future__ import annotations

import _posixsubprocess
import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tests.visits import chromium
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model

gc.disable()  # until the tests are collected: what is imported stays, and looking at it took a quarter of the time

FAMILIES = ("gpt2", "llama", "qwen2", "gemma2")
SURFACES = ("hooked", "bridge") if int(version("transformer-lens").split(".")[0]) < 4 else ("bridge",)

VOCABULARY = (
    "the a cat dog bird fish girl boy king queen sat ran saw ate sang went on in to from big small red blue happy sad "
    "please tell me how steal wash car bank story about and . , yes no sorry cannot help sure here is be good bad"
)
WORDS = VOCABULARY.split()
SPECIAL = ("<pad>", "<unk>", "<bos>", "<user>", "<asst>", "<sys>", "<end>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} "
    "{{ {'user': '<user>', 'assistant': '<asst>', 'system': '<sys>'}[m.role] }} {{ m.content | trim }} <end>"
    "{% endfor %}{% if add_generation_prompt %} <asst>{% endif %}"
)


def make_tokenizer(*, template: str | None = CHAT_TEMPLATE, bos: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; with a BOS token, it is the case in which TransformerLens adds one of its own accord."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<end>"} | ({"bos_token": "<bos>"} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def make_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A config of the family: width 32, never equal to the vocabulary's size."""
    size: dict[str, Any] = {"vocab_size": len(SPECIAL) + len(WORDS)}
    size |= {"bos_token_id": 2, "eos_token_id": 6, "pad_token_id": 0}
    if family == "gpt2":
        return GPT2Config(**size | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64} | changes)
    size |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
    if family == "llama":
        return LlamaConfig(**size | {"tie_word_embeddings": False} | changes)
    if family == "qwen2":
        return Qwen2Config(**size | {"tie_word_embeddings": True} | changes)
    return Gemma2Config(**size | {"query_pre_attn_scalar": 8, "sliding_window": 8} | changes)


def make_hf_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random Hugging Face model whose norm weights and biases are not what they are initialised to."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        scale = 0.3 if "embed" in name or "wte" in name else 0.15
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


@cache
def cached_model(
    family: str, surface: str, seed: int = 0, template: str | None = CHAT_TEMPLATE, bos: bool = True
) -> LensModel:
    """A model that tests share: leave it as you found it."""
    tokenizer = make_tokenizer(template=template, bos=bos)
    return load_model(make_hf_model(family, seed), surface=surface, tokenizer=tokenizer, in_place=True)


@cache
def benchmark(name: str) -> ModuleType:
    """A script of ``benchmarks/`` as a module."""
    folder = Path(__file__).parents[1] / "benchmarks"
    spec = spec_from_file_location(f"benchmarks_{name}", folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(folder))  # for what it imports from its own folder
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


LOOPBACK = ("127.0.0.1", "::1", "localhost", "0.0.0.0")
SPEAKS = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
STARTS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork", "os.forkpty", "fork_exec")
OF_THE_MACHINE = (
    "platform.py from_subprocess", "context.py _count_physical_cores_linux", "font_manager.py _get_fontconfig_fonts",
    "connection.py _has_ipv6", "sae_lens/evals.py get_git_hash",
)  # fmt: skip
"""Functions of Python, loky, matplotlib, urllib3 and SAELens that ask about it, most of them at import."""
EXAMPLES_THAT_SERVE = ("tl_em.serving.server.RunningServer", "tl_em.serving.server.serve")
_alone = [False]
"""Whether the test that runs may start no process and no server."""
_refused: list[str] = []


def _stay_here(event: str, given: tuple[Any, ...]) -> None:
    """No test reaches beyond this machine; on it, only those marked ``starts`` start a process, serve or ask."""
    if event == "socket.connect" and isinstance(given[1], tuple) and str(given[1][0]) not in LOOPBACK:
        raise PermissionError(f"no test reaches beyond this machine, and one would {given[1][0]}")
    if _alone[0] and event in (*SPEAKS, *STARTS):
        frame = sys._getframe()
        while frame := frame.f_back:
            if f"{frame.f_code.co_filename} {frame.f_code.co_name}".endswith(OF_THE_MACHINE):
                return
        _refused.append(f"{event} {given}")
        raise PermissionError(f"only a test marked 'starts' may do this: {_refused[-1]}")


def _audited_fork_exec(*given: Any) -> int:
    """What ``multiprocessing`` and loky call, which no audit event tells of."""
    sys.audit("fork_exec", given[0])
    return _fork_exec(*given)


_fork_exec = _posixsubprocess.fork_exec


def pytest_configure() -> None:
    """Here alone: workers and benchmarks import this module as well."""
    _posixsubprocess.fork_exec = _audited_fork_exec
    sys.addaudithook(_stay_here)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name in EXAMPLES_THAT_SERVE:
            item.add_marker(pytest.mark.starts("a server"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _alone[0] = not any(item.get_closest_marker(each) for each in ("starts", "browser"))
    try:
        return (yield)
    finally:
        _alone[0] = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A test fails for what it was refused, also where the code under test took the error for one of its own."""
    _refused.clear()
    found = yield
    assert not _refused, f"only a test marked 'starts' may do this: {_refused}"
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as each:
        yield each


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LensModel]:
    """``make_model(family, surface, seed=, template=, bos=)``: shared models, made once."""
    return cached_model


@pytest.fixture(scope="session", params=SURFACES)
def surface(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def model(family: str, surface: str) -> LensModel:
    """Every family on every surface."""
    return cached_model(family, surface)


@pytest.fixture(scope="session")
def small_model(surface: str) -> LensModel:
    """One family (GPT-2) on every surface, for what does not depend on the architecture."""
    return cached_model("gpt2", surface)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
