"""Directions: extracted, compared, read as tokens."""

from .candidates import candidate_directions as candidate_directions
from .direction import Direction as Direction
from .direction import Projection as Projection
from .extract import difference_in_means as difference_in_means
from .extract import extract_directions as extract_directions
from .geometry import cosines_between as cosines_between
from .geometry import principal_angles as principal_angles
from .lens import logit_lens as logit_lens
from .screening import finetuning_shift as finetuning_shift
from .screening import projection_difference as projection_difference
from .similarity import cosine_matrix as cosine_matrix
