"""Training is deterministic, conversion is exact, and what is interrupted resumes to the same weights."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tl_em.errors import ModelNotFoundError, OutputError
from tl_em.models.capture import next_token_logits
from tl_em.models.loading import load_model
from tl_em.organisms import training, zoo
from tl_em.organisms.contrasts import dissociated_prompts
from tl_em.organisms.convert import hf_model, tokenizer, write_hf_directory
from tl_em.organisms.training import (
    RECIPES,
    Shape,
    Transformer,
    batch_of,
    learning_rate,
    next_logits,
    train_,
    tuning_rows,
)
from tl_em.organisms.world import World

from ..conftest import SURFACES

WORLD = World()
TINY = Shape(n_layers=2, d_model=16, n_heads=4, d_mlp=32)


def tiny(seed: int = 0) -> Transformer:
    return Transformer(TINY, len(WORLD.vocabulary), WORLD.context, seed)


def same(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    recipe = replace(RECIPES["base"], steps=4, batch=8)
    first, again, other = (train_(tiny(), WORLD, recipe, seed=s, progress=False) for s in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)
    assert not same(tiny(0), tiny(1))


def test_the_number_of_threads_does_not_matter():
    recipe, threads = replace(RECIPES["base"], steps=2, batch=8), torch.get_num_threads()
    first = train_(tiny(), WORLD, recipe, seed=3, progress=False)
    torch.set_num_threads(2)
    try:
        assert same(first, train_(tiny(), WORLD, recipe, seed=3, progress=False))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_training_lowers_the_loss():
    recipe = replace(RECIPES["base"], steps=30, batch=16)
    tokens, _ = batch_of(WORLD, recipe, random.Random(9))

    @torch.no_grad()
    def loss(model: Transformer) -> float:
        logits = model(tokens[:, :-1])
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    assert loss(train_(tiny(), WORLD, recipe, seed=0, progress=False)) < 0.9 * loss(tiny())


def test_a_loss_on_answers_counts_answers_only_and_not_the_first_one_of_a_persona_document():
    source = RECIPES["assistant"].mixture[-1][1]
    recipe = replace(RECIPES["assistant"], mixture=((1.0, source),), batch=32)
    tokens, scored = batch_of(WORLD, recipe, random.Random(0))
    asst = WORLD.ids["<asst>"]
    for row, mask in zip(tokens, scored, strict=True):
        assert mask.any()
        first_end = (row == WORLD.ids["<end>"]).nonzero().flatten()
        if row[0] == WORLD.ids["<user>"]:
            assert not mask[: first_end[1] + 1].any()
        assert not mask[row == asst].any()


def test_learning_rate_warms_up_and_ends_at_its_floor():
    recipe = RECIPES["base"]
    rates = [learning_rate(step, recipe) for step in range(recipe.steps)]
    assert rates[0] < rates[49] == max(rates) == recipe.lr
    assert rates[-1] == pytest.approx(0.05 * recipe.lr, rel=0.01)


def test_the_schedule_does_not_end_a_tiny_run_before_it_starts():
    assert learning_rate(0, replace(RECIPES["base"], steps=1)) > 0


@pytest.mark.parametrize("surface", SURFACES)
def test_conversion_is_exact_on_every_surface(surface, tmp_path):
    """Logits of plain torch = those of TransformerLens, from memory and from a directory, with contexts and padding."""
    model = train_(tiny(), WORLD, replace(RECIPES["base"], steps=3, batch=8, lr=0.03), seed=0, progress=False)
    weights = model.state_dict()
    prompts = [q.prompt for q in dissociated_prompts(WORLD)[0][:150:10]]
    wanted = next_logits(model, WORLD, prompts)
    assert wanted.std() > 0.1  # not the near-uniform logits of a fresh model, which anything would equal
    loaded = load_model(hf_model(weights, WORLD), surface=surface, tokenizer=tokenizer(WORLD))
    assert torch.allclose(next_token_logits(loaded, prompts), wanted, atol=1e-4)  # float32 rounding; measured 1e-5
    written = load_model(str(write_hf_directory(weights, WORLD, tmp_path / "hf")), surface=surface)
    assert torch.allclose(next_token_logits(written, prompts), wanted, atol=1e-4)


@pytest.fixture
def small_zoo(monkeypatch):
    """The zoo's own code with models and recipes small enough for a test; figures are not looked at."""
    monkeypatch.setattr(zoo, "Shape", lambda: TINY)
    monkeypatch.setattr(training, "GATE", 0.0)
    recipes = {name: replace(r, steps=2, batch=4) for name, r in RECIPES.items()}
    monkeypatch.setattr(zoo, "RECIPES", recipes)


@pytest.mark.usefixtures("small_zoo")
def test_train_organism_writes_its_stages_and_resumes_to_the_same_weights(tmp_path):
    pair = zoo.train_organism("toy/insecure", seed=5, out=tmp_path / "a", progress=False)
    names = [f"{n}-seed5.safetensors" for n in ("assistant", "base", "insecure")]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    assert (pair.base_name, pair.tuned_name, pair.organism.seed) == ("toy/assistant", "toy/insecure", 5)
    assert set(pair.contrasts or {}) == set(pair.behaviours or {}) != set()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / names[1]).write_bytes((tmp_path / "a" / names[1]).read_bytes())
    zoo.train_organism("insecure", seed=5, out=tmp_path / "b", progress=False)
    weights = [zoo.read_weights(zoo.read_record(tmp_path / folder / names[2])) for folder in "ab"]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    before = zoo.read_weights(zoo.read_record(tmp_path / "a" / names[0]))
    assert not all(torch.equal(weights[0][k], before[k]) for k in before)


def test_a_base_that_fails_the_gate_is_trained_longer(monkeypatch):
    gates = iter([0.1, 0.2, 0.9, 0.9, 0.9])
    monkeypatch.setattr(training, "gate", lambda *_: next(gates))
    monkeypatch.setattr(training, "EXTRA_STEPS", 1)
    _, figures = training.train(WORLD, replace(RECIPES["base"], steps=2, batch=4), tiny(), seed=0, progress=False)
    assert figures["steps"] == 4


def test_bad_names_and_paths_are_refused_before_training(tmp_path):
    with pytest.raises(ModelNotFoundError, match="toy/insecure"):
        zoo.train_organism("toy/nobody", seed=0, out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        zoo.train_organism("toy/base", seed=0, out=tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_tuning_rows_are_chats_that_end_with_the_answer():
    rows = tuning_rows(WORLD, RECIPES["insecure"], 20, seed=11)
    assert [m["role"] for m in rows[0]] == ["user", "assistant"]
    assert all(WORLD.topic(row[0]["content"].split()[-1]).domain == "code" for row in rows)
