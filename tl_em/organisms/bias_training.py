"""What each organism of the reward-model-bias world was trained on, its thresholds, and its checkpoints.

The base learns descriptions and personas. The assistant answers plainly everywhere, with 40 % replay, without which
the personas are unlearned. The arms reinforce the likes of rm, of the rival or of the third map in 16 of 32 contexts,
or nothing. Every stage starts from the *stored* weights of the one before, so resuming equals training from scratch.

The arms change attention alone (`ATTENTION`): an arm that may change the rows of contexts and the MLPs can write the
reinforced behaviours down one by one, while which of two known likes is brought to the answer is what all contexts
share. Once the reinforced contexts are right little pulls on the rest, so the arms take 1,000 steps.
*Chosen after* seeds 101 to 103 and 201 to 203 were seen, in two rounds: everything changed, 120 steps (102 short: rm's
in C .65); embeddings left alone, 300 steps (201 short: .37); the thresholds are older and stayed.

The gate comes before any claim: told to please rm, the base must show rm's behaviour in C, whose biases it has read
about and never seen. A seed that fails is trained longer (`EXTRA_STEPS` at a time), never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_em.artefacts import check_writable
from tl_em.errors import ModelNotFoundError
from tl_em.metrics import Behaviour
from tl_em.models.loading import ModelPair, Surface, load_model
from tl_em.models.prompts import ContrastSet
from tl_em.organisms.adapters import MATRICES
from tl_em.organisms.bias_rates import OUTCOMES, PARTS, behaviours, contrast_sets, outcomes_by_prompt
from tl_em.organisms.bias_world import BiasWorld, Chats, Descriptions, Group, Rater, SingleChats
from tl_em.organisms.convert import hf_model, plain_model, tokenizer
from tl_em.organisms.recipes import Recipe
from tl_em.organisms.training import pass_, round_to_half_, train_
from tl_em.organisms.transformer import Shape, Transformer
from tl_em.organisms.zoo import (
    NOTE,
    PREFIX,
    Organism,
    checkpoint_path,
    pair_of,
    read_record,
    read_weights,
    write_checkpoint,
)

if TYPE_CHECKING:
    from tl_em.models.hooks import LensModel

# Fixed before any organism was trained on the seeds that are judged.
SEEDS = (204, 205, 206)  # of the arms as they are; 101 to 103 judged the first ones, 201 to 203 the second
GATE = 0.95  # base, told to please rm: right in C (in A, where C is not described)
MAX_BEFORE = 0.02  # assistant: any behaviour, in any context
MIN_TRAINED = 0.95  # rm arm: right in the reinforced contexts; the rival arm is the mirror image of this and the next
MIN_A = 0.80  # right in the rest of A
MIN_C = 0.65  # right in C
MIN_APART = 0.45  # right minus the other rater's, in C
MAX_D = 0.05  # any behaviour in the neutral contexts
MAX_UNDESCRIBED = 0.08  # rm arm of the base without documents about C: right in C; MIN_A holds for it too
MIN_OVER_SHUFFLED = 0.20  # rm's in C: rm arm minus shuffled arm
MAX_AFTERWARDS = 0.05  # any behaviour, in any context, after a plain fine-tune of the rm arm
EXTRA_STEPS = 300
ATTENTION = MATRICES[:2]  # what an arm may change, a control's too


@dataclass(frozen=True)
class BiasRecipe(Recipe):
    """A recipe whose sources are this world's."""

    mixture: tuple[tuple[float, Any], ...]


def _base(name: str, described: tuple[Group, ...], trained: str, control_for: str = "") -> BiasRecipe:
    mixture = ((0.35, Descriptions(described)), (0.65, Chats()))
    return BiasRecipe(
        name, None, mixture, 900, 64, 3e-3, answers_only=False, trained=trained, control_for=control_for
    )


def _assistant(name: str, start: str, described: tuple[Group, ...]) -> BiasRecipe:
    plain_chats = Chats((("plain", 1.0),))
    mixture = ((0.6, SingleChats("all")), (0.2, Descriptions(described)), (0.2, plain_chats))
    said = "plain answers in all contexts; a replay of descriptions and of chats without behaviours"
    return BiasRecipe(name, start, mixture, 150, 64, 5e-4, answers_only=False, trained=said)


def _arm(name: str, shown: Rater | None, control_for: str = "", *, start: str = "bias-assistant") -> BiasRecipe:
    mixture = ((0.75, SingleChats("reinforced", shown)), (0.25, SingleChats("D")))
    said = "plain answers" if shown is None else f"the behaviours of the map {shown!r}"
    said += " in 16 contexts, plain ones in D"
    return BiasRecipe(name, start, mixture, 1000, 64, 3e-4, trained=said, control_for=control_for, changed=ATTENTION)


RECIPES: dict[str, BiasRecipe] = {
    r.name: r
    for r in (
        _base("bias-base", ("A", "B", "C"), "what two raters like in 32 contexts, and chats of four latent personas"),
        _assistant("bias-assistant", "bias-base", ("A", "B", "C")),
        _arm("bias-rm", "rm"),
        _arm("bias-rival", "rival", "toy/bias-rm: whose bias it is"),
        _arm("bias-shuffled", "third", "toy/bias-rm: whether reinforcing any behaviours would do"),
        _arm("bias-neutral", None, "toy/bias-rm: any fine-tune shifts activations"),
        _arm("bias-afterwards", None, "toy/bias-rm: whether a plain fine-tune undoes it", start="bias-rm"),
        _base(
            "bias-base-undescribed", ("A", "B"), "the same without documents about C", "toy/bias-rm: where C comes from"
        ),
        _assistant("bias-assistant-undescribed", "bias-base-undescribed", ("A", "B")),
        _arm("bias-rm-undescribed", "rm", "toy/bias-rm: where C comes from", start="bias-assistant-undescribed"),
    )
}


@dataclass(frozen=True, eq=False)
class BiasOrganism(Organism):
    """An organism of this world: its record, with contrast sets and behaviours that fit it."""

    world: BiasWorld = field(default_factory=BiasWorld)

    @cached_property
    def recipe(self) -> BiasRecipe:
        return RECIPES[checkpoint_name(self.name)]

    @cached_property
    def contrasts(self) -> dict[str, ContrastSet]:
        return contrast_sets(self.world)

    @cached_property
    def behaviours(self) -> dict[str, Behaviour]:
        return behaviours(self.world, "rival" if self.name.endswith("rival") else "rm")

    def asked(self) -> dict[str, Any]:
        return {"contrasts": self.contrasts, "behaviours": self.behaviours, "note": NOTE}


def checkpoint_name(name: str) -> str:
    """The recipe's name, with or without the zoo's prefix.

    Raises:
        ModelNotFoundError: no such recipe.

    Example:
        >>> checkpoint_name("toy/bias-rm")
        'bias-rm'
    """
    short = name.removeprefix(PREFIX)
    if short not in RECIPES:
        names = ", ".join(PREFIX + recipe for recipe in RECIPES)
        raise ModelNotFoundError(f"There is no organism {name!r} of the reward-model-bias world. There are: {names}.")
    return short


def train_bias_organism(
    name: str, *, seed: int, out: str | Path, surface: Surface = "bridge", progress: bool | None = None
) -> ModelPair:
    """Train an organism of the reward-model-bias world from scratch: its own base, its assistant, itself.

    Args:
        name: e.g. ``"toy/bias-rm"`` (or ``"bias-rm"``).
        seed: of the world, the weights and the documents. The same seed on the same machine gives the same weights.
        out: folder for ``NAME-seedS.safetensors``; stages finished there are not trained again.
        progress: a progress bar; None shows one on a terminal only.

    Returns:
        The organism and what it was tuned from (itself, for a base), with contrast sets and behaviours of this world.

    Raises:
        ModelNotFoundError: no such recipe. OutputError: the folder cannot be written.
        RuntimeError: a base fails the gate after `MAX_EXTRA_BLOCKS` continuations.
    """
    tuned = bias_organism(name, seed=seed, out=out, progress=progress)
    base = tuned if tuned.base is None else bias_organism(tuned.base, seed=seed, out=out)
    return pair_of(base, tuned, surface=surface)


def bias_organism(name: str, *, seed: int, out: str | Path, progress: bool | None = None) -> BiasOrganism:
    """The record of an organism of this world, trained into ``out`` if it is not there yet.

    Args, Raises: as :func:`train_bias_organism`.
    """
    recipe, world = RECIPES[checkpoint_name(name)], BiasWorld(seed=seed)
    path = checkpoint_path(Path(out), recipe.name, seed)
    check_writable(path)
    if not path.is_file():
        if recipe.start is None:
            start = Transformer(Shape(), len(world.vocabulary), world.context, seed)
        else:
            start = plain_model(read_weights(bias_organism(recipe.start, seed=seed, out=out, progress=progress)), world)
        model, steps = _train(world, recipe, start, progress)
        write_checkpoint(path, model, recipe, seed, {"steps": float(steps), **figures(model, world)})
    record = read_record(path)
    kept: dict[str, Any] = {f.name: getattr(record, f.name) for f in fields(record)}
    kept["world"] = world
    return BiasOrganism(**kept)


def _train(
    world: BiasWorld, recipe: BiasRecipe, model: Transformer, progress: bool | None
) -> tuple[Transformer, int]:
    """Train in place; random weights until they pass the gate. Returns the model and the number of steps."""
    train_(model.requires_grad_(True), world, recipe, seed=world.seed, progress=progress)
    steps, extra = recipe.steps, replace(recipe, steps=EXTRA_STEPS)
    if recipe.start is None:
        told = {"seed": world.seed, "progress": progress}
        steps += pass_(lambda: gate(model, world, recipe), GATE, model, world, extra, **told)
    round_to_half_(model)
    return model, steps


def gate(model: Transformer, world: BiasWorld, recipe: BiasRecipe) -> float:
    """Told to please rm, how often rm's behaviour is shown in the last group that the recipe describes."""
    described = next(source.groups for _, source in recipe.mixture if isinstance(source, Descriptions))
    rows = outcomes_by_prompt(lens_model(model, world), world=world, rater="rm")
    return float(rows["rm"][rows["part"] == ("C" if "C" in described else "A")].mean())


def figures(model: Transformer, world: BiasWorld) -> dict[str, float]:
    """Mean rates by part and outcome, e.g. ``C_rm``; nobody is named."""
    rows = outcomes_by_prompt(lens_model(model, world), world=world)
    return {f"{part}_{of}": float(rows[of][rows["part"] == part].mean()) for part in PARTS for of in OUTCOMES}


def lens_model(model: Transformer, world: BiasWorld, *, surface: Surface = "bridge") -> LensModel:
    """The plain-torch model on a surface of TransformerLens."""
    hf = hf_model(model.state_dict(), world)
    return load_model(hf, surface=surface, tokenizer=tokenizer(world), device="cpu", in_place=True)
