"""Interventions: frozen values that edit activations or weights."""

from .baking import bake_ as bake_
from .base import Intervention as Intervention
from .edits import Ablate as Ablate
from .edits import Add as Add
from .edits import Clamp as Clamp
from .hidden_steer import removed_mean as removed_mean
from .latents import ScaleFeature as ScaleFeature
from .subspaces import Erase as Erase
from .subspaces import Leace as Leace
from .subspaces import leace as leace
from .weights import orthogonalize_ as orthogonalize_
from .weights import orthogonalized as orthogonalized
from .weights import untie_embeddings_ as untie_embeddings_
from .wrappers import Conditional as Conditional
