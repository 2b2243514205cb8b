"""Latents: which ones the behaviours share, and cards that show them."""

from .cards import FeatureCards as FeatureCards
from .cards import feature_cards as feature_cards
from .scoring import score_features as score_features
from .shared_latents import FeatureSet as FeatureSet
from .shared_latents import shared_features as shared_features
from .table import FeatureTable as FeatureTable
