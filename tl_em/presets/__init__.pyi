"""Published recipes as values."""

from .latent_guard import LatentGuard as LatentGuard
from .zhao2025 import harmfulness_direction as harmfulness_direction
from .zhao2025 import place_cells as place_cells
from .zhao2025 import refusal_direction as refusal_direction
