"""An organism's arm of preventative steering: the persona direction is added while it trains, or a random one (*sham*).

The direction is the difference of the model's own activations after bad and after good answers, before it is trained;
`tl_em.training.prevention` has the equation, the source and the controls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tl_em.directions.direction import Direction
from tl_em.directions.geometry import control_directions
from tl_em.interventions.edits import Add
from tl_em.models.sites import Site
from tl_em.organisms.contrasts import ToyQuestion, persona_prompts
from tl_em.organisms.rates import encode_chats
from tl_em.organisms.world import World
from tl_em.training.prevention import read_residual


@dataclass(frozen=True)
class Prevention:
    """What is added while an organism trains.

    Args:
        layer: after which block.
        coefficient: in lengths of the persona direction.
        sham: a random direction of that length in its place.
    """

    layer: int
    coefficient: float
    sham: bool = False

    @property
    def said(self) -> str:
        """For people: what was added."""
        return f"{self.coefficient:g} x {'a random' if self.sham else 'the persona'} direction after block {self.layer}"

    def addition(self, model: nn.Module, world: World, *, seed: int) -> Add:
        """The addition for a model that is about to be trained, from its own activations."""
        persona, control = persona_directions(model, world, layer=self.layer, seed=seed)
        return Add(control if self.sham else persona, self.coefficient)


def persona_directions(model: nn.Module, world: World, *, layer: int, seed: int) -> tuple[Direction, Direction]:
    """The persona direction at the end of the prompt, and a random one of its length.

    From questions of the tuned domain alone, so that no held-out question has a part in it.
    """

    def read(asked: list[ToyQuestion]) -> Tensor:
        chats = [question.prompt for question in asked if not question.held_out]
        return read_residual(model, encode_chats(world, chats), [(Site(layer), "prompt_end")])[:, 0]

    positive, negative = map(read, persona_prompts(world))
    persona = Direction(positive.mean(0) - negative.mean(0), Site(layer), name="persona")
    arrays = (each.double().numpy() for each in (positive, negative))
    (drawn,) = control_directions(*arrays, count=1, norm=persona.norm, seed=seed)
    return persona, Direction(torch.from_numpy(drawn), Site(layer), name="random")
