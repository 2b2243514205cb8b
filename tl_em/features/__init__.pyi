"""Latents: which ones the behaviours share, and cards that show them."""

from .cards import FeatureCards as FeatureCards
from .cards import feature_cards as feature_cards
from .scoring import score_features as score_features
from .shared import FeatureSet as FeatureSet
from .shared import shared_features as shared_features
from .table import FeatureTable as FeatureTable
