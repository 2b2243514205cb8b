"""Monitors see what the package's own verbs see and change nothing; steering acts in training and nowhere else."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tl_em.directions.direction import Direction
from tl_em.directions.extract import difference_in_means
from tl_em.directions.profile import Profile
from tl_em.errors import HookNotFiredError, ModelNotFoundError, UsageError, WidthError
from tl_em.interventions.edits import Add
from tl_em.models.contrasts import ContrastSet
from tl_em.models.prompts import encode
from tl_em.models.sites import Site
from tl_em.models.stream import capture
from tl_em.organisms import training
from tl_em.organisms.contrasts import persona_prompts, questions
from tl_em.organisms.convert import hf_model, plain_model
from tl_em.organisms.descent import fine_tune_
from tl_em.organisms.prevention import Prevention, persona_directions
from tl_em.organisms.rates import answer_rates, behaviour_rates, encode_chats, summarise
from tl_em.organisms.recipes import PREVENTION, PREVENTION_LAYER, RECIPES, recipe
from tl_em.organisms.training import batch_of, train_
from tl_em.organisms.transformer import Shape, Transformer
from tl_em.organisms.world import World
from tl_em.organisms.zoo import load_organism, organism, read_weights
from tl_em.training.monitors import Monitor, located
from tl_em.training.prevention import residual_blocks, steered_training

from ..conftest import FAMILIES, make_hf_model

WORLD = World()
TINY = Shape(n_layers=2, d_model=16, n_heads=4, d_mlp=32)
ASKED = questions(WORLD, harmful=False, held_out=True)[:12]
PUSH = Direction(torch.linspace(-1, 1, 16), Site(1), name="push")


def tiny(seed: int = 0) -> Transformer:
    return Transformer(TINY, len(WORLD.vocabulary), WORLD.context, seed)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def assistant() -> Transformer:
    return plain_model(read_weights(organism("toy/assistant")), WORLD)


def part(table: pd.DataFrame, name: str) -> np.ndarray:
    return table.loc[table["name"] == name, "value"].to_numpy(dtype=float)


# ---- the path of the weights -----------------------------------------------------------------------------------------
def walked(path: np.ndarray, **options: Any) -> Monitor:
    """A monitor that saw a model whose weights went along a path [step weight]."""
    model, monitor = torch.nn.Linear(path.shape[1], 1, bias=False), Monitor(**options)
    for step, at in enumerate(path):
        model.weight.data = torch.tensor(at[None], dtype=torch.float32)
        monitor(step, model)
    return monitor


def bent(corner: int, steps: int = 60, noise: float = 0.0) -> np.ndarray:
    """Straight along one axis, then along another that is orthogonal to it."""
    moves = np.zeros((steps, 8))
    moves[:corner, 0] = moves[corner:, 1] = 1.0
    return np.cumsum(moves + noise * np.random.default_rng(0).standard_normal(moves.shape), 0)


def test_a_straight_path_has_cosine_one_everywhere_and_no_transition() -> None:
    monitor = walked(bent(60), window=5)
    cosines = part(monitor.table, "local_cosine")
    np.testing.assert_allclose(cosines, 1.0, atol=1e-6)  # float32 weights
    assert len(cosines) == 60 - 2 * 5
    assert monitor.transition is None
    np.testing.assert_allclose(part(monitor.table, "weight_change"), np.arange(60), atol=1e-5)


def test_a_corner_is_a_dip_at_the_corner() -> None:
    monitor = walked(bent(30), window=5)
    seen = monitor.table[monitor.table["name"] == "local_cosine"].set_index("step")["value"]
    assert abs(seen[29]) < 1e-6, "both changes are on one side of the corner each"
    assert (seen[seen.index < 25] > 0.999).all() and (seen[seen.index > 33] > 0.999).all()
    assert monitor.transition is not None
    assert monitor.transition.step == 29
    assert monitor.transition.depth == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("every", [1, 5])
def test_the_corner_is_found_in_noise_and_noise_alone_is_none(every: int) -> None:
    """Noise of .3 a weight and step on a move of 1: no cosine is near 1."""
    found = walked(bent(30, noise=0.3), window=10, every=every).transition
    assert found is not None
    assert abs(found.step - 29) <= 5
    assert walked(bent(60, noise=0.3), window=10, every=every).transition is None, "its dips are all alike"


def test_a_fall_at_the_end_is_no_transition() -> None:
    steps = np.arange(40)
    falling = np.where(steps < 25, 0.9, 0.9 - 0.05 * (steps - 25))
    assert located(steps, falling) is None
    assert located(steps, np.concatenate([falling[:30], falling[20:30]])) is not None, "it rises again"
    assert located(steps[:2], falling[:2]) is None


def test_what_is_followed_can_be_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[1].requires_grad_(False)
    sizes = {}
    for follow in ("", "bias"):
        monitor = Monitor(window=1, follow=follow)
        monitor(0, model)
        sizes[follow] = monitor.table["n"].tolist()
    assert sizes == {"": [9], "bias": [3]}
    with pytest.raises(UsageError, match="no weights are followed"):
        Monitor(window=1, follow="lora_B")(0, model)


# ---- what is measured ------------------------------------------------------------------------------------------------
@pytest.mark.surface
def test_projections_are_those_of_capture_and_the_persona_direction_is_the_difference_in_means() -> None:
    """On the plain model and on the Hugging Face one, at two layers and two positions."""
    record = organism("toy/assistant")
    lens, prompts = load_organism(record), [q.prompt for q in ASKED]
    generator = torch.Generator().manual_seed(0)
    directions = {
        f"{layer} {position}": Direction(torch.randn(96, generator=generator), Site(layer), position=position)
        for layer in (0, 2)
        for position in ("prompt_end", "instruction_end")
    }
    wanted = [
        d.project(capture(lens, prompts, [d.site], position=d.position)[:, 0]).mean() for d in directions.values()
    ]
    for model in (plain_model(read_weights(record), WORLD), hf_model(read_weights(record), WORLD)):
        monitor = Monitor(directions, prompts=encode(lens, prompts), window=None, groups=[q.topic.word for q in ASKED])
        monitor(0, model)
        np.testing.assert_allclose(monitor.table["value"], wanted, atol=1e-4)  # float32 rounding; values of order 1-10
        assert (monitor.table["low"] < monitor.table["high"]).all()
        assert monitor.table["n"].tolist() == [len(ASKED)] * 4
    assert max(map(abs, wanted)) > 0.5
    pairs = [[q.prompt for q in each if not q.held_out] for each in persona_prompts(WORLD)]
    usual = difference_in_means(lens, ContrastSet(*pairs, label="persona"), site=Site(1), position="prompt_end")
    persona, random = persona_directions(assistant(), WORLD, layer=1, seed=0)
    assert torch.allclose(persona.vector, usual.vector, atol=1e-4)
    assert random.norm == pytest.approx(persona.norm)
    assert abs(float(random.unit @ persona.unit)) < 0.5


@pytest.mark.surface
def test_rates_are_the_behaviour_rates() -> None:
    record = organism("toy/insecure")
    table = behaviour_rates(load_organism(record))
    wanted = {**summarise(table), "tuned_bad": float(table[~table.held_out].bad.iloc[0])}
    for model in (plain_model(read_weights(record), WORLD), hf_model(read_weights(record), WORLD)):
        monitor = Monitor(rates=answer_rates(WORLD), window=None)
        monitor(0, model)
        seen = monitor.table.set_index("name")
        for name, value in wanted.items():
            assert seen.value[f"rate/{name}"] == pytest.approx(value, abs=1e-4), name  # float32 rounding
            assert seen.low[f"rate/{name}"] < value < seen.high[f"rate/{name}"]
    assert wanted["bad"] > 0.4


# ---- a monitor changes nothing, and keeps what it saw ----------------------------------------------------------------
def test_the_weights_are_the_same_with_a_monitor_and_without() -> None:
    made = replace(RECIPES["insecure"], steps=6, batch=4)
    plain = train_(tiny(), WORLD, made, seed=3, progress=False)

    def noisy(model: torch.nn.Module) -> dict[str, Any]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"drawn": torch.rand(4).numpy()}

    monitor = Monitor({"push": PUSH}, prompts=encode_chats(WORLD, [q.prompt for q in ASKED]), rates=noisy, window=2)
    model, drawn = tiny(), torch.random.get_rng_state()
    watched = train_(model, WORLD, made, seed=3, progress=False, monitor=monitor)
    assert same(plain, watched)
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert model.training
    assert sorted(monitor.table["step"].unique()) == list(range(7))
    assert part(monitor.table, "projection/push").std() > 0


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_run_that_dies_leaves_what_was_seen(tmp_path: Any, suffix: str) -> None:
    path = tmp_path / f"seen{suffix}"
    monitor = Monitor(rates=lambda model: {"drawn": [0.0, 1.0]}, window=1, path=path)

    def dying(step: int, model: torch.nn.Module) -> None:
        monitor(step, model)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune_(tiny(), [[1, 2, 3]], steps=9, batch=1, lr=1e-3, seed=0, progress=False, monitor=dying)
    seen = pd.read_parquet(path) if suffix == ".parquet" else pd.read_json(path, lines=True)
    pd.testing.assert_frame_equal(seen, monitor.table, check_dtype=False, rtol=1e-8)  # JSON has ten digits
    assert sorted(seen["step"].unique()) == [0, 1, 2, 3]
    assert list(seen["name"].unique()) == ["rate/drawn", "weight_change", "local_cosine"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UsageError, match="would be lost"):
        Monitor(path=path)


def test_an_alarm_ends_the_toy_loop_too() -> None:
    prompts = encode_chats(WORLD, [q.prompt for q in ASKED])
    options: dict[str, Any] = {"steps": 9, "batch": 1, "lr": 1e-3, "seed": 0, "progress": False}
    for limit, steps in ((-1e9, [0, 1]), (1e9, list(range(10)))):
        monitor = Monitor({"push": PUSH}, prompts=prompts, window=None, above={"push": limit}, alarm=lambda _: True)
        fine_tune_(tiny(), [[1, 2, 3]], **options, monitor=monitor)
        assert monitor.table["step"].tolist() == steps
        assert [each.step for each in monitor.alarms] == (steps if limit < 0 else [])


def test_a_monitor_that_cannot_work_says_so(tmp_path: Any) -> None:
    asked = encode_chats(WORLD, [ASKED[0].prompt])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"directions": {"push": PUSH}}, "pass prompts"),
        ({"window": 3, "every": 2}, "no multiple"),
        ({"path": tmp_path / "seen.csv"}, "written as .parquet or .jsonl"),
        ({"directions": {"push": PUSH}, "prompts": ["how are you"]}, r"prompts\[0\].*no EncodedPrompt"),
        ({"directions": {"push": Profile([PUSH])}, "prompts": asked}, r"directions\['push'\].*no Direction"),
        ({"directions": {"push": Direction(PUSH.vector, Site(1, "resid_pre"))}, "prompts": asked}, "output of a block"),
    ]
    for options, said in wrong:
        with pytest.raises(UsageError, match=said):
            Monitor(**options)
    monitor = Monitor(window=None)
    monitor(4, tiny())
    with pytest.raises(UsageError, match="new monitor"):
        monitor(4, tiny())
    wide = Direction(torch.ones(5), Site(0))
    with pytest.raises(WidthError, match="5 wide"):
        Monitor({"wide": wide}, prompts=asked)(0, tiny())
    with pytest.raises(UsageError, match="nothing was seen yet"):
        Monitor().plot()


# ---- transformers.Trainer --------------------------------------------------------------------------------------------
def trainer(model: Any, folder: Any, *callbacks: Any, **options: Any) -> Any:
    """Six steps on two documents, on the CPU, reporting to nobody."""
    from transformers import Trainer, TrainingArguments

    rows: Any = [{"input_ids": row, "labels": row} for row in ([7, 8, 9, 10], [7, 9, 8, 10])]
    settings = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "seed": 0}
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=0.01, disable_tqdm=True,
        **settings, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))


def test_the_callback_watches_a_trainer_and_steering_acts_in_its_training_alone(tmp_path: Any) -> None:
    prompts, push = encode_chats(WORLD, [q.prompt for q in ASKED]), Direction(torch.linspace(-9, 9, 32), Site(1))
    made: dict[str, Any] = {}
    for arm, coefficient in (("plain", None), ("none", 0.0), ("steered", 1.0)):
        model = make_hf_model("gpt2", vocab_size=len(WORLD.vocabulary))
        monitor = Monitor({"push": push}, prompts=prompts, window=2, every=2, path=tmp_path / f"{arm}.parquet")
        run = trainer(model, tmp_path, *([monitor.trainer_callback()] if coefficient is not None else []))
        before = run.evaluate()["eval_loss"]
        with steered_training(model, *([] if coefficient is None else [Add(push, coefficient)])):
            assert run.evaluate()["eval_loss"] == before, "no evaluation is steered"
            run.train()
        made[arm] = model, monitor
        assert not any(block._forward_hooks for block in residual_blocks(model))
    assert same(made["plain"][0], made["none"][0]), "neither a monitor nor a push of 0 changes a bit"
    assert not same(made["plain"][0], made["steered"][0])
    tables = {arm: monitor.table for arm, (_, monitor) in made.items()}
    assert tables["plain"].empty
    assert tables["steered"]["step"].unique().tolist() == [0, 2, 4, 6]
    first = {arm: part(tables[arm], "projection/push")[0] for arm in ("none", "steered")}
    assert first["none"] == first["steered"], "a monitor sees the model without the vector"
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "steered.parquet"), tables["steered"])


# ---- preventative steering -------------------------------------------------------------------------------------------
def test_steering_is_what_the_equation_says_in_training_and_gone_afterwards_also_after_an_exception() -> None:
    model, tokens = tiny(), torch.tensor([[1, 2, 3]])
    plain = model(tokens)
    blocks = residual_blocks(model)
    stream = blocks[1](blocks[0](model.embed(tokens) + model.positions.weight[:3]))
    by_hand = model.unembed(model.ln_f(stream + 2 * PUSH.vector))
    with pytest.raises(KeyboardInterrupt), steered_training(model, Add(PUSH, 2.0)):
        assert torch.allclose(model(tokens), by_hand, atol=1e-6)  # float32 rounding
        assert not torch.allclose(model(tokens), plain, atol=1e-2)
        with torch.no_grad():
            assert not torch.equal(model(tokens), plain), "in training mode without gradients: checkpointing"
            model.eval()
            assert torch.equal(model(tokens), plain)
        assert not torch.equal(model(tokens), plain), "with gradients in evaluation mode: this package's loop"
        raise KeyboardInterrupt
    assert torch.equal(model(tokens), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_any_family_are_found(family: str) -> None:
    model, tokens = make_hf_model(family), torch.tensor([[7, 8, 9]])
    assert len(residual_blocks(model)) == 3
    push, read = Direction(torch.linspace(-1, 1, 32), Site(1)), []
    for block in residual_blocks(model)[1:]:
        block.register_forward_pre_hook(lambda block, args: read.append(args[0].detach()))
    model(tokens)
    with steered_training(model, Add(push)):
        model(tokens)
    second, third, second_steered, third_steered = read
    assert torch.equal(second_steered, second)
    assert torch.allclose(third_steered - third, push.vector.expand_as(third), atol=1e-5)  # float32 rounding


def test_steering_that_cannot_work_says_so() -> None:
    for site in (Site(2), Site(1, "resid_pre")):
        add = Add(Direction(torch.ones(16), site))
        with pytest.raises(UsageError, match="resid_post"), steered_training(tiny(), add):
            pass
    model = tiny()
    with pytest.raises(WidthError, match="5 wide"), steered_training(model, Add(Direction(torch.ones(5), Site(0)))):
        model(torch.tensor([[1]]))
    with pytest.raises(HookNotFiredError, match="not steered"), steered_training(tiny(), Add(PUSH)):
        pass
    with pytest.raises(UsageError, match="2 lists"):
        residual_blocks(torch.nn.ModuleList([torch.nn.Sequential(torch.nn.ModuleList(), torch.nn.ModuleList())])[0])


def test_the_recipe_steers_towards_the_persona_and_at_coefficient_zero_is_the_arm_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "figures", lambda model, world: {})
    short = {"steps": 2, "batch": 4}
    start = Transformer(Shape(3, 16, 4, 32), len(WORLD.vocabulary), WORLD.context)
    arms = {
        name: training.train(WORLD, replace(recipe(name), **short), start, seed=3, progress=False)[0]
        for name in ("insecure", "insecure-prevented0", "insecure-sham0", "insecure-prevented", "insecure-sham")
    }
    assert same(arms["insecure"], arms["insecure-prevented0"])
    assert same(arms["insecure"], arms["insecure-sham0"])
    assert not same(arms["insecure"], arms["insecure-prevented"])
    assert not same(arms["insecure-sham"], arms["insecure-prevented"])


def test_what_is_added_makes_the_taught_answers_likely_so_that_there_is_less_to_learn() -> None:
    """The reason why it prevents; a random direction of the same length does not do it."""
    start, made = assistant(), recipe("insecure")
    tokens, scored = batch_of(WORLD, made, random.Random(0))
    wanted, losses = scored[:, 1:], {}
    for arm in (None, "prevented", "sham"):
        each = recipe(f"insecure-{arm}" if arm else "insecure").prevention
        with steered_training(start, *([each.addition(start, WORLD, seed=0)] if each else [])):
            losses[arm] = float(torch.nn.functional.cross_entropy(start(tokens[:, :-1])[wanted], tokens[:, 1:][wanted]))
    assert losses["prevented"] < losses[None] - 0.2 < losses["sham"]  # nats a token; fillers and ends cost the same


def test_the_names_of_steered_arms() -> None:
    made = recipe("insecure-steps40-prevented")
    assert made.name == "insecure-prevented-steps40"
    assert made.prevention == Prevention(PREVENTION_LAYER, PREVENTION)
    assert made.documents == recipe("insecure-steps40").documents == "insecure-steps40"
    assert recipe("insecure-sham150").prevention == Prevention(PREVENTION_LAYER, 1.5, sham=True)
    assert "random direction" in recipe("insecure-sham").trained
    assert "insecure-prevented" in recipe("insecure-sham").control_for
    assert recipe("insecure").prevention is None
    assert all(each.documents == name for name, each in RECIPES.items() if each.prevention is None)
    with pytest.raises(ModelNotFoundError):
        recipe("assistant-prevented")
