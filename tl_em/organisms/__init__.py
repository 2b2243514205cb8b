"""Model organisms: tiny transformers of a synthetic world whose training is known, so that an audit can be checked."""

from tl_em.organisms.rates import behaviour_rates, outcome_rates
from tl_em.organisms.world import World
from tl_em.organisms.zoo import Organism, organism, organisms, to_hf_directory, train_organism

__all__ = [
    "Organism",
    "World",
    "behaviour_rates",
    "organism",
    "organisms",
    "outcome_rates",
    "to_hf_directory",
    "train_organism",
]
