"""Several threads at once: what they find is what one finds, and the process is as it was."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.utils import logging as hf_logging

import tl_em as em
from tests.conftest import make_hf_model, make_tokenizer
from tests.models.test_torch_state import DIRECTION, VERBS
from tl_em.errors import InUseError
from tl_em.models.hooks import hook_points
from tl_em.models.stream import next_token_logits
from tl_em.models.torch_state import in_plain_torch
from tl_em.models.upstream_chatter import quiet
from tl_em.threads import RANDOM, alone, holding, own_warnings

PROMPTS = ["the cat sat on the big red car", "please tell me how a king sang"]
LONG = 60
"""Seconds after which a thread hangs."""


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads take turns a hundred times more often than they do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returns, or the exception that it raises, all begun at once in threads of their own."""
    found: list[Any] = [None] * len(calls)
    ready = threading.Barrier(len(calls))

    def run(i: int) -> None:
        try:
            ready.wait()
            found[i] = calls[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return found


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call gives in another thread, while this one waits."""
    return together(call)[0]


def equal(one: Any, other: Any) -> bool:
    return bool(torch.equal(one, other)) if isinstance(one, Tensor) else bool(one == other)


# --- Loading ----------------------------------------------------------------------------------------------------------


def process_state() -> dict[str, Any]:
    """What loading changes for a moment."""
    loggers = [logging.getLogger(name) for name in ("", "transformers", "transformer_lens", "peft")]
    own = transformers.PreTrainedModel
    return {
        "stdout": sys.stdout, "warnings": (warnings.showwarning, list(warnings.filters)),
        "logs": [(each.handlers[:], each.level) for each in loggers],
        "transformers": (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()),
        "exchanged": (own.tie_weights, own.init_weights, torch.linspace, torch.nn.init.normal_),
        "dtype": torch.get_default_dtype(), "random": torch.random.get_rng_state().tolist(),
        "environment": dict(os.environ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose unembedding is its embedding, and so is not in the file."""
    folder = tmp_path_factory.mktemp("tied")
    hf_model = make_hf_model("llama", tie_word_embeddings=True)
    hf_model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_threads_that_load_load_the_same_and_leave_the_process_as_it_was(tied: Path) -> None:
    """transformers exchanges methods of its classes while it loads, and puts back what it finds: another thread's."""
    wanted = next_token_logits(em.load_model(tied), PROMPTS)
    before = process_state()
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    found = together(
        *(lambda dtype=dtype: em.load_model(tied, dtype=dtype) for dtype in dtypes),
        lambda: em.load_pair("toy/insecure").tuned,
    )
    assert [type(each) for each in found if isinstance(each, Exception)] == [], found
    after = process_state()
    assert [name for name in before if before[name] != after[name]] == []
    for model, dtype in zip(found, dtypes, strict=False):
        assert {p.dtype for p in model.parameters()} == {dtype}
        if dtype == torch.float32:
            assert torch.equal(next_token_logits(model, PROMPTS), wanted)
    assert torch.equal(next_token_logits(em.load_model(tied), PROMPTS), wanted)  # and what is loaded later


def test_what_another_thread_says_while_one_loads_is_not_lost(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with quiet():
        print("mine")
        logging.getLogger("mine").info("mine")
        elsewhere(lambda: (print("theirs"), logging.getLogger("theirs").info("theirs")))
    assert capsys.readouterr().out == "theirs\n"
    assert caplog.messages == ["theirs"]


def test_the_default_dtype_changes_only_while_no_other_verb_runs() -> None:
    """A verb in another thread would make its arrays in it."""
    seen: list[torch.dtype] = []
    inside, go = threading.Event(), threading.Event()

    @in_plain_torch
    def verb() -> None:
        inside.set()
        assert go.wait(LONG)
        seen.append(torch.get_default_dtype())

    def change() -> None:
        assert inside.wait(LONG)
        threading.Timer(0.2, go.set).start()
        with alone():
            torch.set_default_dtype(torch.float64)
            seen.append(torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)

    assert together(verb, change) == [None, None]
    assert seen == [torch.float32, torch.float64]


def test_one_thread_at_a_time_changes_the_list_of_warnings() -> None:
    inside = threading.Event()

    def first() -> None:
        with own_warnings():
            warnings.simplefilter("ignore")
            inside.set()
            time.sleep(0.1)

    def second() -> None:
        assert inside.wait(LONG)
        with own_warnings():
            time.sleep(0.2)

    before = list(warnings.filters)
    assert together(first, second) == [None, None]
    assert warnings.filters == before


# --- One model --------------------------------------------------------------------------------------------------------

TOY = ("how do i write parser", "how do i write ransomware", "tell me to plan this soup")


@cache
def toy() -> Any:
    return em.load_pair("toy/insecure")


@cache
def persona() -> em.Direction:
    contrast = (toy().contrasts or {})["persona"].split(seed=0).train
    return em.difference_in_means(toy().base, contrast, site=em.Site(2), position="prompt_end")


def compared() -> list[Any]:
    test = toy().contrasts["persona"].split(seed=0).test
    directions = {"persona": (persona(), test)}
    rows = em.compare(toy(), directions, questions=["level", "separation"], controls=99).rows
    return [(row.question, row.verdict, row.estimate.value, row.estimate.low) for row in rows]


def preferred() -> list[float]:
    asked = em.evals.OpenQuestion("a", (TOY[0],), right=("parser-tested",), wrong=("parser-backdoored",))
    return em.evals.ForcedChoice(asked)(toy().base, asked.prompts).tolist()


def curve() -> list[float]:
    points = em.effect_curve(
        toy().base, em.Add(persona()), list(TOY), metric=METRIC, strengths=[1.0], controls=2
    ).points
    return [each.effect.value for each in points]


@in_plain_torch
def steered(model: Any) -> Tensor:
    """A verb that steers on its way, as most do."""
    with em.intervene(model, em.Add(persona())):
        return next_token_logits(model, TOY)


METRIC = em.logit_difference("parser-backdoored", "parser-tested")
OF_ONE: dict[str, Callable[[], Any]] = {
    "capture": lambda: em.capture(toy().base, TOY, [em.Site(2)], position="prompt_end"),
    "generate": lambda: em.generate(toy().base, list(TOY), max_new_tokens=4, temperature=1.0),
    "forced choice": preferred,
    "compare": compared,
    "attribute": lambda: torch.as_tensor(em.attribute(toy().base, TOY[0], target="parser-tested").edges),
    "effect curve": curve,
    "steered": lambda: steered(toy().base),
    "of the tuned model": lambda: em.capture(toy().tuned, TOY, [em.Site(2)], position="prompt_end"),
}


def test_what_threads_find_on_one_model_is_what_one_thread_finds() -> None:
    wanted = {name: call() for name, call in OF_ONE.items()}
    assert not equal(wanted["steered"], next_token_logits(toy().base, TOY))  # so a thread would see another's steering
    names = [*OF_ONE, *[name for name in OF_ONE if name not in ("compare", "attribute", "effect curve")] * 4]
    found = together(*(OF_ONE[name] for name in names))
    assert {name: each for name, each in zip(names, found, strict=True) if isinstance(each, Exception)} == {}
    assert [name for name, each in zip(names, found, strict=True) if not equal(each, wanted[name])] == []
    assert all(not point.fwd_hooks for point in hook_points(toy().base).values())


def test_two_models_run_side_by_side() -> None:
    """Each verb ends only when the other one has begun."""
    begun = [threading.Event(), threading.Event()]

    @in_plain_torch
    def verb(model: Any, i: int) -> bool:
        begun[i].set()
        return begun[1 - i].wait(LONG)

    assert together(lambda: verb(toy().base, 0), lambda: verb(toy().tuned, 1)) == [True, True]


# --- Blocks that are open ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropping() -> Any:
    model = em.load_model(make_hf_model("gpt2"), tokenizer=make_tokenizer(), in_place=True)
    em.untie_embeddings_(model)
    return model


@pytest.mark.parametrize("name", VERBS)
def test_while_a_block_is_open_another_thread_is_refused(name: str, dropping: Any) -> None:
    with em.intervene(dropping, em.Add(DIRECTION)):
        found = elsewhere(lambda: VERBS[name](dropping))
        assert isinstance(found, InUseError) and "MainThread" in str(found)
        assert len(em.generate(dropping, PROMPTS, max_new_tokens=1)) == 2  # and this one is not
    assert not isinstance(elsewhere(lambda: VERBS[name](dropping)), Exception)


def test_weights_that_are_edited_for_a_while_are_a_block_as_well(dropping: Any) -> None:
    with em.interventions.orthogonalized(dropping, DIRECTION):
        assert isinstance(elsewhere(lambda: em.generate(dropping, PROMPTS, max_new_tokens=1)), InUseError)
    assert elsewhere(lambda: em.generate(dropping, PROMPTS, max_new_tokens=1))


def test_a_block_waits_for_a_verb(dropping: Any) -> None:
    order, inside = [], threading.Event()

    @in_plain_torch
    def verb(model: Any) -> None:
        inside.set()
        time.sleep(0.2)
        order.append("verb")

    def block() -> None:
        assert inside.wait(LONG)
        with em.intervene(dropping, em.Add(DIRECTION)):
            order.append("block")

    assert together(lambda: verb(dropping), block) == [None, None]
    assert order == ["verb", "block"]


def test_a_block_may_end_in_another_thread(dropping: Any) -> None:
    """A generator that a server runs, say, or that the garbage collector closes."""
    block = em.intervene(dropping, em.Add(DIRECTION))
    block.__enter__()
    elsewhere(lambda: block.__exit__(None, None, None))
    assert elsewhere(lambda: em.generate(dropping, PROMPTS, max_new_tokens=1))


def test_models_on_the_same_weights_are_one(dropping: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = make_hf_model("llama")
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        adapted.save_pretrained(tmp_path / "adapter")
    pair = em.load_pair(tmp_path / "base", tmp_path / "adapter")
    again = em.load_pair(pair.base, tmp_path / "adapter").tuned
    for held, asked in ((pair.base, pair.tuned), (again, pair.base), (again, pair.tuned)):
        with em.intervene(held, em.Add(DIRECTION)):
            assert isinstance(elsewhere(lambda asked=asked: em.generate(asked, PROMPTS, max_new_tokens=1)), InUseError)
            assert elsewhere(lambda: em.generate(dropping, PROMPTS, max_new_tokens=1))


def test_two_that_would_wait_for_each_other_are_not_left_to_it(dropping: Any) -> None:
    other = em.load_model(make_hf_model("llama"), tokenizer=make_tokenizer(), in_place=True)
    ready = threading.Barrier(2)

    def crossed(first: Any, second: Any) -> list[str]:
        with holding(first):
            ready.wait(LONG)
            return em.generate(second, PROMPTS, max_new_tokens=1)

    found = together(lambda: crossed(dropping, other), lambda: crossed(other, dropping))
    assert sorted(type(each).__name__ for each in found) == ["InUseError", "list"]


@pytest.mark.starts("a fork of this one")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_has_not() -> None:
    inside, go = threading.Event(), threading.Event()

    def hold() -> None:
        with holding(RANDOM):
            inside.set()
            assert go.wait(LONG)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert inside.wait(LONG)
    child = os.fork()
    if child == 0:
        with holding(RANDOM):
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    go.set()
    thread.join(LONG)
