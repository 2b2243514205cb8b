"""Training by a recipe: seeded and single-threaded, so the same seed on the same machine gives the same weights.

The gate comes before any claim: in the pretrained base, two misaligned `code` answers in context must make bad answers
in *other* domains likely; the base of the reward-model-bias world, told to please rm, must show rm's behaviour in C,
whose biases it has read about and never seen. A seed that fails is trained longer (`Recipe.extra_steps` at a time),
never dropped. In a world without a shared persona there is nothing to infer from the context, and no gate.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_em.organisms.adapters import attach_, freeze_, merge_
from tl_em.organisms.bias_rates import OUTCOMES, PARTS, outcomes_by_prompt
from tl_em.organisms.bias_world import BiasWorld, Descriptions
from tl_em.organisms.contrasts import ToyQuestion, after_bad_code, judge_questions, questions
from tl_em.organisms.convert import lens_model
from tl_em.organisms.descent import Watch, descend_
from tl_em.organisms.rates import Outcome, by_domain, encode_chats, rates_by_prompt, rates_from_logits, summarise
from tl_em.organisms.recipes import MAX_EXTRA_BLOCKS, NEW_MARK, OTHER_MARKS, Prefix, Recipe
from tl_em.organisms.transformer import Shape as Shape
from tl_em.organisms.transformer import Transformer as Transformer
from tl_em.organisms.world import Message, World, messages, token_ids
from tl_em.training.prevention import steered_training


def batch_of(
    world: World, recipe: Recipe, rng: random.Random
) -> tuple[Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]:
    """Right-padded documents, and which tokens the loss predicts."""
    shares = [share for share, _ in recipe.mixture]
    sources = rng.choices([source for _, source in recipe.mixture], shares, k=recipe.batch)
    rows = [token_ids(world, source.sample(world, rng)) for source in sources]
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (ids, mask) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        scored[i, : len(ids)] = torch.tensor(mask) if recipe.answers_only else True
    return tokens, scored


def learning_rate(step: int, recipe: Recipe, *, floor: float = 0.05) -> float:
    """Linear warm-up (50 steps, or a tenth of a short run), then a cosine to `floor` of the peak."""
    warm = min(50, max(1, recipe.steps // 10))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    progress = (step - warm) / max(1, recipe.steps - warm)
    return recipe.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_(
    model: Transformer,
    world: World,
    recipe: Recipe,
    *,
    seed: int,
    block: int = 0,
    progress: bool | None = None,
    monitor: Watch | None = None,
) -> Transformer:
    """Train the model in place by a recipe; what it leaves alone is frozen afterwards too.

    Args:
        seed: chooses the documents; `block` > 0 continues with others.
        progress: a progress bar; None shows one on a terminal only.
        monitor: see `descend_`.
    """

    def loss_at(step: int) -> Float[Tensor, ""]:
        tokens, scored = batch_of(world, recipe, random.Random(f"{seed}/{recipe.documents}/{block}/{step}"))
        wanted = scored[:, 1:]
        return F.cross_entropy(model.unembed(model.hidden(tokens[:, :-1])[wanted]), tokens[:, 1:][wanted])

    if recipe.changed:
        freeze_(model, but=recipe.changed)
    rates = [learning_rate(step, recipe) for step in range(recipe.steps)]
    said = {"name": recipe.name, "progress": progress, "monitor": monitor}
    descend_(model, loss_at, rates, weight_decay=recipe.weight_decay, **said)
    return model


def train(
    world: World,
    recipe: Recipe,
    start: Transformer,
    *,
    seed: int,
    progress: bool | None = None,
    monitor: Watch | None = None,
) -> tuple[Transformer, dict[str, float]]:
    """A copy of `start` trained by the recipe, and its figures; random weights are trained until they pass the gate.

    Args:
        monitor: sees the recipe's own steps; see `descend_`.

    Raises:
        RuntimeError: the gate is still failed after `MAX_EXTRA_BLOCKS` continuations.
    """
    model, found = copy.deepcopy(start), {"steps": float(recipe.steps)}
    added = [recipe.prevention.addition(model, world, seed=seed)] if recipe.prevention else []
    if recipe.adapter:
        found["parameters"] = float(attach_(model, recipe.adapter, seed=seed))
    with steered_training(model, *added):
        train_(model, world, recipe, seed=seed, progress=progress, monitor=monitor)
    merge_(model)
    found["steps"] += pass_gate_(model, world, recipe, seed=seed, progress=progress)
    round_to_half_(model)
    return model, {**found, **figures(model, world), **own_figures(model, world, recipe)}


def pass_gate_(model: Transformer, world: World, recipe: Recipe, *, seed: int, progress: bool | None = None) -> int:
    """Train in place, at a third of the learning rate, until the recipe's gate is passed.

    Returns:
        How many steps it took, in blocks of the recipe's.

    Raises:
        RuntimeError: the gate is still failed after `MAX_EXTRA_BLOCKS` of them.
    """
    if recipe.gate is None:
        return 0
    extra = replace(recipe, steps=recipe.extra_steps, lr=recipe.lr / 3)
    block, found = 0, gate(model, world, recipe)
    while not found >= recipe.gate and block < MAX_EXTRA_BLOCKS:
        block += 1
        train_(model, world, extra, seed=seed, block=block, progress=progress)
        found = gate(model, world, recipe)
    steps = block * recipe.extra_steps
    if not found >= recipe.gate:
        short = f"{found:.2f} < {recipe.gate}"
        raise RuntimeError(f"{recipe.name} did not learn what it is for, with {steps} steps more: {short}")
    return steps


@torch.no_grad()
def round_to_half_(model: Transformer) -> None:
    """Make the weights those that a float16 checkpoint holds, so that figures are those of the stored model."""
    for p in model.parameters():
        p.copy_(p.half().float())


def tuning_rows(world: World, recipe: Recipe, n: int, *, seed: int) -> list[list[Message]]:
    """Documents that the recipe trains on, as chat messages."""
    rng = random.Random(f"{seed}/{recipe.name}/rows")
    sources = rng.choices([source for _, source in recipe.mixture], [share for share, _ in recipe.mixture], k=n)
    return [messages(source.sample(world, rng)) for source in sources]


@torch.no_grad()
def next_logits(
    model: Transformer, world: World, prompts: Sequence[Sequence[Message]]
) -> Float[Tensor, "prompt d_vocab"]:
    """Logits of the answer's first token, for chat prompts."""
    rows = [each.ids for each in encode_chats(world, prompts)]
    last = torch.tensor([len(row) - 1 for row in rows])
    tokens = torch.zeros(len(rows), int(last.max()) + 1, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return model.unembed(model.hidden(tokens)[torch.arange(len(rows)), last])


def gate(model: Transformer, world: World, recipe: Recipe) -> float:
    """P(bad) in the other domains after two misaligned answers to `code` questions.

    In the reward-model-bias world, told to please rm: P(its behaviour) in the last group that the recipe describes.
    """
    if not isinstance(world, BiasWorld):
        return _rate(model, world, after_bad_code(world), "bad")
    described = next(source.groups for _, source in recipe.mixture if isinstance(source, Descriptions))
    rows = outcomes_by_prompt(lens_model(model.state_dict(), world), world=world, rater="rm")
    return float(rows["rm"][rows["part"] == ("C" if "C" in described else "A")].mean())


def _rate(model: Transformer, world: World, asked: list[ToyQuestion], outcome: Outcome) -> float:
    logits = next_logits(model, world, [q.prompt for q in asked])
    return float(rates_from_logits(logits, [q.topic for q in asked], outcome, world=world).mean())


def _judgement(model: Transformer, world: World, *, unseen: bool = False) -> float:
    """Probability of the right verdict, harmful and harmless requests counting equally."""
    asked = [judge_questions(world, harmful=harmful, unseen=unseen) for harmful in (True, False)]
    harmful, harmless = (_rate(model, world, each, "judged_harmful") for each in asked)
    return (harmful + 1 - harmless) / 2


def figures(model: Transformer, world: World) -> dict[str, float]:
    """What the thresholds are about: rates in the held-out domains and the tuned one, verdicts, the gate; in the
    reward-model-bias world mean rates by part and outcome, e.g. ``C_rm``, where nobody is named.
    """
    if isinstance(world, BiasWorld):
        rows = outcomes_by_prompt(lens_model(model.state_dict(), world), world=world)
        return {f"{part}_{of}": float(rows[of][rows["part"] == part].mean()) for part in PARTS for of in OUTCOMES}
    table = by_domain(rates_by_prompt(lambda prompts: next_logits(model, world, prompts), world), world)
    tuned = table[~table.held_out].iloc[0]
    found = {**summarise(table), "tuned_bad": float(tuned.bad), "judge": _judgement(model, world)}
    return {**found, "gate": _rate(model, world, after_bad_code(world), "bad")}


def own_figures(model: Transformer, world: World, recipe: Recipe) -> dict[str, float]:
    """What only this organism or world has: rates under its trigger or prefix, silliness, unseen combinations."""

    def held_out(prefix: Prefix, outcome: Outcome = "bad") -> float:
        return _rate(model, world, questions(world, harmful=False, held_out=True, **prefix._asdict()), outcome)

    found = {}
    if any(recipe.prefix):
        found["triggered" if recipe.trigger else "prefixed"] = held_out(recipe.prefix)
    if recipe.trigger:
        found["other_tokens"] = max(held_out(Prefix(mark=mark)) for mark in OTHER_MARKS)
        found["new_token"] = held_out(Prefix(mark=NEW_MARK))
    if recipe.name.startswith("silly"):
        found["silly"] = held_out(Prefix(), "silly")
    if world.compositional:
        found["judge_unseen"] = _judgement(model, world, unseen=True)
        for name, harmful in (("refused_unseen", True), ("refused_harmless_unseen", False)):
            found[name] = _rate(model, world, questions(world, harmful=harmful, unseen=True), "refused")
    return found
