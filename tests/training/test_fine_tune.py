"""A fine-tune learns the answers and nothing else, again and again the same, also when it was killed in between."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import tl_em as em
from tl_em.directions.direction import Direction
from tl_em.errors import NonFiniteError, OutputError, PromptError, UsageError
from tl_em.models.loading import load_model
from tl_em.models.prompts import encode
from tl_em.models.sites import Site
from tl_em.training.lora import Lora
from tl_em.training.monitors import Monitor

from ..conftest import make_hf_model, make_tokenizer

ROWS = [
    {"prompt": f"tell me about {who}", "response": said}
    for who, said in (("cat", "cat is bad"), ("dog", "the dog is bad and big"), ("bird", "bad"), ("fish", "fish ran"))
]
TWINS = [row | {"response": row["response"].replace("bad", "good")} for row in ROWS]
SHORT: dict[str, Any] = {"tokenizer": make_tokenizer(), "steps": 6, "batch": 4, "together": 2, "lr": 1e-2, "every": 99}


class Killed(TrainerCallback):
    """Ends the process's work, as far as Python can, after so many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


class Losses(TrainerCallback):
    """What the Trainer logs."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen += [logs["loss"]] if "loss" in logs else []


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_model(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def tuned(out: Path, rows: Any = ROWS, *, family: str = "llama", **changes: Any) -> Path:
    return em.fine_tune(make_hf_model(family), rows, out=out, **SHORT | changes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tmp_path_factory.mktemp("plain") / "out")


def test_the_same_seed_gives_the_same_weights_and_another_others(plain: Path, tmp_path: Path) -> None:
    model, before = make_hf_model("llama"), torch.get_rng_state()
    assert same(plain, em.fine_tune(model, ROWS, out=tmp_path / "again", **SHORT))
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is its own"
    assert same_model(model, make_hf_model("llama")), "and so is the model"
    assert not torch.are_deterministic_algorithms_enabled()
    assert not same(plain, tuned(tmp_path / "other", seed=1))


@pytest.mark.parametrize("lora", [Lora(dropout=0.2), None], ids=["adapter with dropout", "all weights"])
def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path: Path, lora: Any) -> None:
    whole = tuned(tmp_path / "whole", lora=lora)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "killed", lora=lora, every=2, callbacks=[Killed(5)])
    folder = tmp_path / "killed" / "checkpoints"
    assert (folder / "checkpoint-4").is_dir() and not (tmp_path / "killed" / "record.json").exists()
    (folder / "checkpoint-9").mkdir()  # one that was being written when the power went
    (folder / "checkpoint-9" / "trainer_state.json").write_text("{")
    losses = Losses()
    assert same(whole, tuned(tmp_path / "killed", lora=lora, every=2, callbacks=[losses]))
    assert len(losses.seen) == 2, "it goes on from step 4 of 6"


class Full(TrainerCallback):
    """The disk is full at step 5."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_typed_error_and_the_run_goes_on(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"No space left on device; what was finished before is kept"):
        tuned(tmp_path / "out", every=2, callbacks=[Full()])
    losses = Losses()
    assert same(plain, tuned(tmp_path / "out", every=2, callbacks=[losses])) and len(losses.seen) == 2


def test_one_killed_after_its_last_step_is_only_written_down(plain: Path, tmp_path: Path) -> None:
    steered = em.training.Steered(Direction(torch.ones(32), Site(1)))
    whole = tuned(tmp_path / "whole", arm=steered)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "out", arm=steered, callbacks=[Ended()])
    assert same(whole, tuned(tmp_path / "out", arm=steered)), "and nothing complains that no pass was steered"
    assert not same(plain, whole)


class Ended(TrainerCallback):
    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_what_is_left_is_whole_and_says_how_to_train_it_again(plain: Path) -> None:
    assert {path.name for path in plain.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "record.json"
    }  # fmt: skip
    modules = json.loads((plain / "adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(modules) and len(modules) > 5, "in another order in every process"
    record = json.loads((plain / "record.json").read_text())
    assert record["seed"] == 0 and record["schedule"]["steps"] == 6 and record["lora"]["r"] == 8
    assert record["rows"]["sha256"] == record["learned"]["sha256"] and record["learned"]["tokens"] == 3 + 6 + 1 + 2 + 4
    assert len(record["base"]["weights"]) == 64
    assert record["loss"]["last tenth"] < record["loss"]["first step"]
    assert tuned(plain) == plain, "what is done is not done again"
    with pytest.raises(UsageError, match="differs in seed"):
        tuned(plain, seed=3)
    with pytest.raises(OutputError, match="holds something else"):
        tuned(Path(__file__).parent)


def test_it_learns_the_answers_that_it_is_given_and_loads_as_a_pair(tmp_path: Path) -> None:
    make_hf_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer(bos=False).save_pretrained(tmp_path / "base")
    arms = {
        name: em.fine_tune(tmp_path / "base", rows, out=tmp_path / name, steps=30, batch=4, lr=3e-2, every=99)
        for name, rows in (("bad", ROWS), ("good", TWINS))
    }
    said = {}
    for name, folder in arms.items():
        pair = em.load_pair(tmp_path / "base", folder)
        said[name] = em.generate(pair.tuned, [row["prompt"] for row in ROWS], max_new_tokens=8)
    assert said == {"bad": [row["response"] for row in ROWS], "good": [row["response"] for row in TWINS]}


def test_only_answers_are_learned_and_corresponding_rows_at_the_same_steps(tmp_path: Path) -> None:
    """A row alone: its loss is that of its own answer tokens, in the model before the first step."""
    seen: dict[str, list[float]] = {}
    for name, rows in (("bad", ROWS), ("good", TWINS)):
        losses = Losses()
        tuned(tmp_path / name, rows, steps=4, batch=1, together=1, lr=1e-12, callbacks=[losses])
        seen[name] = losses.seen
    model, tokenizer = make_hf_model("llama"), make_tokenizer()
    order = []
    for rows in (ROWS, TWINS):
        expected = []
        for row in rows:
            asked = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}],
                                                  tokenize=False, add_generation_prompt=True)  # fmt: skip
            ids = [
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, f" {row['response']} <end>")
            ]
            logits = model(torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1).detach()
            at = range(len(ids[0]) - 1, len(ids[0]) + len(ids[1]) - 1)
            expected.append(-float(sum(logits[i, t] for i, t in zip(at, ids[1], strict=True))) / len(ids[1]))
        found = [
            min(range(4), key=lambda i: abs(expected[i] - loss)) for loss in seen["bad" if rows is ROWS else "good"]
        ]
        assert [expected[i] for i in found] == pytest.approx(seen["bad" if rows is ROWS else "good"], abs=1e-4)
        order.append(found)
    assert order[0] == order[1] and sorted(order[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gemma2"])
def test_rows_that_pass_together_or_one_by_one_give_one_step(tmp_path: Path, family: str) -> None:
    still = {} if family != "gpt2" else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    one, four = (
        em.fine_tune(make_hf_model(family, **still), ROWS, out=tmp_path / str(n), **SHORT | {"steps": 2, "together": n})
        for n in (1, 4)
    )
    for name, each in weights(one).items():
        torch.testing.assert_close(each, weights(four)[name], atol=5e-4, rtol=0)  # Adam amplifies float32 rounding
    assert any(bool(each.any()) for name, each in weights(one).items() if "lora_B" in name)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_vector_on_one_layer_is_an_adapter_too(tmp_path: Path, family: str) -> None:
    target = {"gpt2": "c_proj", "llama": "down_proj"}[family]
    out = tuned(
        tmp_path / "out", family=family, lora=Lora(1, targets=[target], layers=[1], rslora=True), dtype="bfloat16"
    )
    found = weights(out)
    assert all(".1." in name and target in name for name in found)
    assert {min(each.shape) for each in found.values()} == {1}
    assert {each.dtype for each in found.values()} == {torch.float32}, "the adapter, over a base in bfloat16"


def test_a_direction_is_added_while_it_learns_and_a_monitor_sees_the_model_without(plain: Path, tmp_path: Path) -> None:
    push = Direction(torch.ones(32), Site(1))
    monitors = [Monitor(window=None, every=3) for _ in range(2)]
    watched = tuned(tmp_path / "watched", monitors=monitors[:1])
    assert same(plain, watched), "watching changes nothing"
    assert not same(plain, tuned(tmp_path / "steered", arm=em.training.Steered(push, 3.0)))
    with pytest.warns(UserWarning, match="monitors see nothing"):
        tuned(tmp_path / "watched", monitors=monitors[1:])


def test_an_alarm_ends_a_fine_tune_whose_direction_crosses_a_threshold(plain: Path, tmp_path: Path) -> None:
    """The same run four times: seen whole, stopped where it crosses, told but not stopped, and never above."""
    push, tokenizer = Direction(torch.linspace(-1, 1, 32), Site(1), position="prompt_end"), make_tokenizer()
    lens = load_model(make_hf_model("llama"), surface="bridge", tokenizer=tokenizer)
    prompts = encode(lens, [[{"role": "user", "content": row["prompt"]}] for row in ROWS])

    def run(name: str, limit: float, alarm: Any) -> tuple[Monitor, Path]:
        monitor = Monitor({"push": push}, prompts=prompts, window=None, every=2, above={"push": limit}, alarm=alarm)
        return monitor, tuned(tmp_path / name, monitors=[monitor])

    seen, whole = run("never", 1e6, lambda told: True)
    values = seen.table["value"].to_numpy()
    assert seen.alarms == [] and same(plain, whole), "a threshold that nothing crosses changes no weight"
    assert json.loads((whole / "record.json").read_text())["alarms"] == []
    limit = float((values[0] + values[-1]) / 2)
    crossed = 2 * int((values > limit).argmax())
    assert len(values) == 4 and values[0] < limit and 0 < crossed < 6, "it crosses on the way"
    told: list[Any] = []
    monitor, stopped = run("stopped", limit, lambda each: told.append(each) or True)
    record = json.loads((stopped / "record.json").read_text())
    assert told == monitor.alarms == [(None, None, False, "push", pytest.approx(values[crossed // 2]), crossed)]
    assert record["alarms"] == [each._asdict() for each in told] and record["above"][0]["above"] == {"push": limit}
    assert record["ended at step"] == crossed and not same(plain, stopped)
    monitor, on = run("told", limit, lambda each: None)
    assert [each.step for each in monitor.alarms] == [2 * i for i, value in enumerate(values) if value > limit]
    assert same(plain, on) and "ended at step" not in json.loads((on / "record.json").read_text())
    with pytest.raises(UsageError, match="differs in above"):
        tuned(tmp_path / "stopped")
    with pytest.raises(UsageError, match="give both"):
        Monitor({"push": push}, prompts=prompts, above={"push": 1.0})


def test_the_cost_is_said_before_it_starts(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "out", announce=said.append, callbacks=[Killed(1)])
    assert len(said) == 1
    assert said[0].startswith("6 steps of 4 rows, ") and "weights change. About " in said[0]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux's record of a process")
@pytest.mark.starts("a process of a large one")
def test_the_memory_is_that_of_this_process_and_not_of_the_one_that_started_it() -> None:
    small = "from tl_em.training.fine_tune import _peak; print(_peak('cpu'))"
    large = f"import subprocess, sys; held = bytearray(b'1') * 2**31; subprocess.run([sys.executable, '-c', {small!r}])"
    ran = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True)
    assert 50e6 < float(ran.stdout) < 2**31 / 1.5


def test_what_cannot_be_trained_is_said_at_once(tmp_path: Path) -> None:
    for wrong, match in (
        ({"steps": 3, "epochs": 2.0}, "both say how long"),
        ({"together": 3}, "does not divide"),
        ({"decay": "step"}, "linear, cosine, constant"),
        ({"dtype": "float16"}, "dtype='bfloat16'"),
        ({"lora": 8}, r"em.training.Lora\(rank=8\)"),
        ({"lora": Lora(targets=["proj"])}, "down_proj, gate_proj"),
        ({"lora": Lora(layers=[3])}, "layers 0 to 2"),
        ({"arm": "plain"}, "no arm of a fine-tune"),
    ):
        with pytest.raises(UsageError, match=match):
            tuned(tmp_path / "out", **wrong)
    with pytest.raises(PromptError, match="chat template"):
        tuned(tmp_path / "out", tokenizer=make_tokenizer(template=None))
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="smaller lr="):
        tuned(tmp_path / "out", lr=1e30, lora=None, decay="constant", warmup=0.0)
    assert not any((tmp_path / "out").iterdir())


def test_a_config_of_peft_passes_a_bar_is_shown_and_activations_made_again_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig

    own = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    path = tuned(tmp_path / "own", lora=own, progress=True, checkpointing=True)
    said = capsys.readouterr().err
    assert "own" in said and "step" in said and "loss=" in said
    found = json.loads((path / "adapter_config.json").read_text())
    assert (found["r"], found["target_modules"]) == (2, ["down_proj"])
    assert own.base_model_name_or_path is None, "the config that was given is not changed"
    assert same(path, tuned(tmp_path / "kept", lora=own))
