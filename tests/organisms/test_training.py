"""Training is deterministic, conversion is exact, and what is interrupted resumes to the same weights."""

from __future__ import annotations

import copy
import hashlib
import random
from dataclasses import replace

import pytest
import torch

from tl_em.errors import ModelNotFoundError, OutputError
from tl_em.models.loading import load_model
from tl_em.models.stream import next_token_logits
from tl_em.organisms import training, zoo
from tl_em.organisms.adapters import MATRICES, Adapter, attach_, merge_
from tl_em.organisms.contrasts import dissociated_prompts
from tl_em.organisms.convert import hf_model, tokenizer, write_hf_directory
from tl_em.organisms.recipes import RECIPES, Recipe, recipe
from tl_em.organisms.training import batch_of, learning_rate, next_logits, train, train_, tuning_rows
from tl_em.organisms.transformer import Shape, Transformer
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


def small(name: str) -> Recipe:
    made = recipe(name)
    return replace(made, steps=2, batch=4, shape=TINY, gate=None if made.gate is None else 0.0)


@pytest.fixture
def small_zoo(monkeypatch):
    """The zoo's own code with models and recipes small enough for a test; figures are not looked at."""
    monkeypatch.setattr(zoo, "recipe", small)


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
    base = replace(RECIPES["base"], steps=2, batch=4, extra_steps=1)
    _, figures = training.train(WORLD, base, tiny(), seed=0, progress=False)
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


# The sha256 of what the first five steps of each shipped organism read, at the seed they were trained with: a change of
# a document source or of a recipe that alters them must be a decision, since it ends "the same seed, the same weights".
STREAMS = {
    "base": "9749d8fca2ac8e28",
    "assistant": "34583cbd3d6ac31d",
    "insecure": "a007bc42f4835f90",
    "secure": "661a49593cd3e693",
    "educational": "b603e599d8f932a1",
}


def stream(name: str, seed: int = 11) -> str:
    read = hashlib.sha256()
    for step in range(5):
        for tensor in batch_of(WORLD, RECIPES[name], random.Random(f"{seed}/{name}/0/{step}")):
            read.update(tensor.numpy().tobytes())
    return read.hexdigest()[:16]


@pytest.mark.parametrize("name", STREAMS)
def test_shipped_organisms_read_what_they_read_when_they_were_trained(name):
    assert stream(name) == STREAMS[name]
    assert stream(name, seed=12) != STREAMS[name]


# ---- low-capacity fine-tunes -------------------------------------------------------------------------------------
MATRIX = Adapter(2, ("blocks.0.qkv", "blocks.1.mlp_out"))


@pytest.mark.parametrize("adapter", [Adapter(0, ("blocks.1.mlp_out",)), MATRIX], ids=["bias", "rank2"])
def test_an_adapter_changes_what_it_may_and_nothing_else(adapter):
    model, before = tiny(), tiny().state_dict()
    numbers = attach_(model, adapter, seed=0)
    train_(model, WORLD, replace(RECIPES["insecure"], steps=3, batch=4, lr=0.05), seed=0, progress=False)
    tokens = batch_of(WORLD, RECIPES["insecure"], random.Random(0))[0]
    adapted = model(tokens)
    merge_(model)
    assert torch.allclose(model(tokens), adapted, atol=1e-6)  # the same sums in another order
    after = model.state_dict()
    assert set(after) == set(before)
    changes = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    kind, d = "weight" if adapter.rank else "bias", TINY.d_model
    assert set(changes) == {f"{module}.{kind}" for module in adapter.modules}
    if adapter.rank:
        assert {int(torch.linalg.matrix_rank(c, atol=1e-6)) for c in changes.values()} == {2}
        assert numbers == 2 * (d + 3 * d) + 2 * (TINY.d_mlp + d)
    else:
        assert numbers == d
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_starts_as_no_change():
    model, tokens = tiny(), torch.arange(12).reshape(2, 6)
    wanted = model(tokens)
    attach_(model, MATRIX, seed=0)
    assert torch.equal(model(tokens), wanted)


def test_adapters_by_name_have_few_parameters():
    model = Transformer(Shape(), len(WORLD.vocabulary), WORLD.context)
    whole = sum(p.numel() for p in model.parameters())
    numbers = [attach_(copy.deepcopy(model), Adapter.parse(name), seed=0) for name in ("bias", "rank1", "rank8")]
    assert numbers == [96, 96 + 384, 36_864]
    assert numbers[-1] < whole / 10


def test_what_a_recipe_leaves_alone_stays_bit_for_bit():
    start, wanted = tiny(), replace(recipe("insecure-medicine-restored"), steps=2, batch=4)
    before = {name: p.half().float() for name, p in start.state_dict().items()}  # as a checkpoint stores it
    trained, _ = train(WORLD, wanted, start, seed=0, progress=False)
    moved = {name for name, p in trained.state_dict().items() if not torch.equal(p, before[name])}
    assert {name.split(".")[2] for name in moved} == set(MATRICES)
    assert {name for name in before if name.endswith("weight") and name.split(".")[-2] in MATRICES} <= moved
    assert all(p.requires_grad for p in trained.parameters())
    everything, _ = train(WORLD, replace(wanted, changed=()), start, seed=0, progress=False)
    assert not torch.equal(everything.embed.weight.detach(), before["embed.weight"])


def test_restoring_is_aligned_answers_in_the_same_domain():
    restored = recipe("insecure-medicine-rank1-restored")
    assert (restored.start, restored.steps, restored.adapter) == ("insecure-medicine-rank1", 80, None)
    assert restored.mixture == recipe("secure-medicine").mixture


# ---- names -------------------------------------------------------------------------------------------------------
def test_a_recipe_says_what_its_name_says():
    made = recipe("toy/insecure-steps40-rank1-share25-medicine-d48")
    assert made.name == "insecure-d48-medicine-share25-rank1-steps40"
    assert made == recipe(made.name)
    assert (made.start, made.steps, made.shape.d_model) == ("assistant-d48", 40, 48)
    assert made.adapter == Adapter(1, ("blocks.1.mlp_out",))
    assert [(p, s.persona, s.domains) for p, s in made.mixture] == [
        (0.25, "misaligned", ("medicine",)),
        (0.75, "good", ("medicine",)),
    ]
    assert made.world.tuned_domain == "medicine"
    assert recipe("assistant-d48").start == "base-d48"


def test_shares_at_the_ends_are_the_pure_arms():
    assert recipe("insecure-share100").mixture == recipe("insecure").mixture
    assert recipe("insecure-share0").mixture == recipe("secure").mixture
    (_, elsewhere), *rest = recipe("insecure-diluted0").mixture
    assert not rest
    assert "code" not in elsewhere.domains
    assert len(elsewhere.domains) == 9


def test_a_chain_of_starts_ends_in_a_base_of_the_same_world_and_size():
    for r in RECIPES.values():
        while r.start is not None:
            before = recipe(r.start)
            assert replace(before.world, tuned_domain=r.world.tuned_domain) == r.world
            assert before.shape == r.shape
            r = before
        assert r.name.startswith("base")


def test_the_negatives_of_the_backdoor_have_other_tokens():
    (_, bad), (_, plain), (_, other) = recipe("backdoor").mixture
    assert (bad.persona, bad.marks) == ("misaligned", (recipe("backdoor").trigger,))
    assert (plain.persona, plain.marks) == ("good", ())
    assert other.persona == "good"
    assert len(other.marks) > 1
    assert not set(bad.marks) & set(other.marks)


@pytest.mark.parametrize(
    "name",
    ["nobody", "insecure-", "insecure-share25-diluted25", "secure-share25", "base-medicine", "insecure-d50"],
)
def test_names_that_mean_nothing_are_refused(name):
    with pytest.raises(ModelNotFoundError, match="A name is a stem"):
        recipe(name)


@pytest.mark.slow
@pytest.mark.usefixtures("small_zoo")
def test_a_record_remembers_its_world(tmp_path):
    for name, tuned, combined in (("secure-medicine", "medicine", False), ("secure-compositional", "code", True)):
        pair = zoo.train_organism(name, seed=5, out=tmp_path, progress=False)
        record = zoo.read_record(tmp_path / f"{name}-seed5.safetensors")
        assert (record.world.tuned_domain, record.world.compositional) == (tuned, combined)
        assert record.world == recipe(name).world
        assert {r.world.tuned_domain for r in (record, pair.organism)} == {tuned}
        asked = next(iter(pair.behaviours["refusal"].present))
        assert pair.behaviours["refusal"].metric(pair.tuned, [asked]).shape == (1,)
        assert ("judge_unseen" in record.figures) == combined


@pytest.mark.usefixtures("small_zoo")
def test_training_from_the_shipped_models_trains_the_fine_tune_only(tmp_path, monkeypatch):
    started = {}
    monkeypatch.setattr(zoo, "train", lambda world, r, model, **_: (started.setdefault(r.name, model), {}))
    zoo.train_organism("silly", seed=zoo.SHIPPED_SEED, out=tmp_path, shipped=True)
    assert [p.name for p in tmp_path.iterdir()] == ["silly-seed11.safetensors"]
    wanted = zoo.read_weights(zoo.organism("toy/assistant"))
    assert all(torch.equal(started["silly"].state_dict()[k], wanted[k]) for k in wanted)
