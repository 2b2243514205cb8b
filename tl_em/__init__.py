"""tl_em: what did a narrow fine-tune change inside a model, and does that change cause the broad behaviour?

The public names are loaded when they are first used, so that ``import tl_em`` loads neither torch nor TransformerLens.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_em.auditing.audit import audit as audit
    from tl_em.auditing.report import Report as Report
    from tl_em.claims.compare import Comparison as Comparison
    from tl_em.claims.compare import compare as compare
    from tl_em.claims.criteria import select_candidate as select_candidate
    from tl_em.claims.curve import effect_curve as effect_curve
    from tl_em.claims.dose import calibrate as calibrate
    from tl_em.claims.instructions import TextLogprob as TextLogprob
    from tl_em.claims.latent_checks import FeatureCheck as FeatureCheck
    from tl_em.claims.questions.inversion import reply_inversion as reply_inversion
    from tl_em.claims.questions.latents import verify_feature as verify_feature
    from tl_em.claims.questions.latents import verify_features as verify_features
    from tl_em.claims.rule import Row as Row
    from tl_em.claims.selection import Selection as Selection
    from tl_em.claims.selection import select_direction as select_direction
    from tl_em.dictionaries.dictionary import Dictionary as Dictionary
    from tl_em.dictionaries.dictionary import Feature as Feature
    from tl_em.dictionaries.loading import from_sae_lens as from_sae_lens
    from tl_em.dictionaries.loading import load_dictionary as load_dictionary
    from tl_em.dictionaries.protocol import SparseDictionary as SparseDictionary
    from tl_em.dictionaries.quality import DictionaryQuality as DictionaryQuality
    from tl_em.dictionaries.quality import dictionary_quality as dictionary_quality
    from tl_em.dictionaries.training import train_dictionary as train_dictionary
    from tl_em.directions.angles import cosines_between as cosines_between
    from tl_em.directions.angles import principal_angles as principal_angles
    from tl_em.directions.candidates import candidate_directions as candidate_directions
    from tl_em.directions.direction import Direction as Direction
    from tl_em.directions.extract import difference_in_means as difference_in_means
    from tl_em.directions.extract import extract_directions as extract_directions
    from tl_em.directions.interchange import import_mean_diffs as import_mean_diffs
    from tl_em.directions.interchange import import_persona_vectors as import_persona_vectors
    from tl_em.directions.interchange import import_refusal_direction as import_refusal_direction
    from tl_em.directions.interchange import import_steering_vector as import_steering_vector
    from tl_em.directions.lens import logit_lens as logit_lens
    from tl_em.directions.screening import finetuning_shift as finetuning_shift
    from tl_em.directions.screening import projection_difference as projection_difference
    from tl_em.directions.similarity import cosine_matrix as cosine_matrix
    from tl_em.errors import CacheWarning as CacheWarning
    from tl_em.errors import DictionaryModelWarning as DictionaryModelWarning
    from tl_em.errors import HiddenSteerWarning as HiddenSteerWarning
    from tl_em.errors import NuisanceWarning as NuisanceWarning
    from tl_em.errors import TlEmError as TlEmError
    from tl_em.errors import UnprovenWarning as UnprovenWarning
    from tl_em.features.cards import FeatureCards as FeatureCards
    from tl_em.features.cards import feature_cards as feature_cards
    from tl_em.features.scoring import score_features as score_features
    from tl_em.features.shared import FeatureSet as FeatureSet
    from tl_em.features.shared import shared_features as shared_features
    from tl_em.features.table import FeatureTable as FeatureTable
    from tl_em.graph.attention import attention_view as attention_view
    from tl_em.graph.build import attribute as attribute
    from tl_em.graph.diff import GraphDiff as GraphDiff
    from tl_em.graph.exchange import load_graph as load_graph
    from tl_em.graph.graph import AttributionGraph as AttributionGraph
    from tl_em.graph.heads import head_loadings as head_loadings
    from tl_em.graph.over_prompts import attribute_over as attribute_over
    from tl_em.graph.targets import Completion as Completion
    from tl_em.interventions.conditions import Conditional as Conditional
    from tl_em.interventions.edits import Ablate as Ablate
    from tl_em.interventions.edits import Add as Add
    from tl_em.interventions.edits import Clamp as Clamp
    from tl_em.interventions.intervene import intervene as intervene
    from tl_em.interventions.latents import ScaleFeature as ScaleFeature
    from tl_em.interventions.removed_mean import removed_mean as removed_mean
    from tl_em.interventions.subspaces import Erase as Erase
    from tl_em.interventions.subspaces import Leace as Leace
    from tl_em.interventions.subspaces import leace as leace
    from tl_em.interventions.weights import orthogonalize_ as orthogonalize_
    from tl_em.interventions.weights import orthogonalized as orthogonalized
    from tl_em.interventions.weights import untie_embeddings_ as untie_embeddings_
    from tl_em.metrics import Behaviour as Behaviour
    from tl_em.metrics import Metric as Metric
    from tl_em.metrics import logit_difference as logit_difference
    from tl_em.metrics import refusal_log_odds as refusal_log_odds
    from tl_em.models.generate import generate as generate
    from tl_em.models.hooks import LensModel as LensModel
    from tl_em.models.loading import ModelPair as ModelPair
    from tl_em.models.loading import load_model as load_model
    from tl_em.models.means import mean_activation as mean_activation
    from tl_em.models.prompts import ContrastSet as ContrastSet
    from tl_em.models.proof import proof as proof
    from tl_em.models.sites import Provenance as Provenance
    from tl_em.models.sites import Site as Site
    from tl_em.models.stream import capture as capture
    from tl_em.organisms.facts import Facts as Facts
    from tl_em.organisms.facts import prefers_truth as prefers_truth
    from tl_em.organisms.lies import LieReport as LieReport
    from tl_em.organisms.lies import lie_or_hallucination as lie_or_hallucination
    from tl_em.organisms.monitors import Monitor as Monitor
    from tl_em.organisms.prevention import steered_training as steered_training
    from tl_em.organisms.rates import behaviour_rates as behaviour_rates
    from tl_em.organisms.studies import run_study as run_study
    from tl_em.organisms.studies import summarise_study as summarise_study
    from tl_em.organisms.zoo import Organism as Organism
    from tl_em.organisms.zoo import load_pair as load_pair
    from tl_em.organisms.zoo import train_organism as train_organism
    from tl_em.presets.latent_guard import LatentGuard as LatentGuard
    from tl_em.presets.setups import toy_dictionary as toy_dictionary
    from tl_em.presets.zhao2025 import harmfulness_direction as harmfulness_direction
    from tl_em.presets.zhao2025 import place_cells as place_cells
    from tl_em.presets.zhao2025 import refusal_direction as refusal_direction
    from tl_em.stats import Estimate as Estimate

__version__ = "0.1.0"

_HOME = {
    "Ablate": "interventions.edits",
    "Add": "interventions.edits",
    "AttributionGraph": "graph.graph",
    "Behaviour": "metrics",
    "CacheWarning": "errors",
    "Clamp": "interventions.edits",
    "Comparison": "claims.compare",
    "Completion": "graph.targets",
    "Conditional": "interventions.conditions",
    "ContrastSet": "models.prompts",
    "Dictionary": "dictionaries.dictionary",
    "DictionaryModelWarning": "errors",
    "DictionaryQuality": "dictionaries.quality",
    "Direction": "directions.direction",
    "Erase": "interventions.subspaces",
    "Estimate": "stats",
    "Facts": "organisms.facts",
    "Feature": "dictionaries.dictionary",
    "FeatureCards": "features.cards",
    "FeatureCheck": "claims.latent_checks",
    "FeatureSet": "features.shared",
    "FeatureTable": "features.table",
    "GraphDiff": "graph.diff",
    "HiddenSteerWarning": "errors",
    "LatentGuard": "presets.latent_guard",
    "Leace": "interventions.subspaces",
    "LensModel": "models.hooks",
    "LieReport": "organisms.lies",
    "Metric": "metrics",
    "ModelPair": "models.loading",
    "Monitor": "organisms.monitors",
    "NuisanceWarning": "errors",
    "Organism": "organisms.zoo",
    "Provenance": "models.sites",
    "Report": "auditing.report",
    "Row": "claims.rule",
    "ScaleFeature": "interventions.latents",
    "Selection": "claims.selection",
    "Site": "models.sites",
    "SparseDictionary": "dictionaries.protocol",
    "TextLogprob": "claims.instructions",
    "TlEmError": "errors",
    "UnprovenWarning": "errors",
    "attention_view": "graph.attention",
    "attribute": "graph.build",
    "attribute_over": "graph.over_prompts",
    "audit": "auditing.audit",
    "behaviour_rates": "organisms.rates",
    "calibrate": "claims.dose",
    "candidate_directions": "directions.candidates",
    "capture": "models.stream",
    "compare": "claims.compare",
    "cosine_matrix": "directions.similarity",
    "cosines_between": "directions.angles",
    "dictionary_quality": "dictionaries.quality",
    "difference_in_means": "directions.extract",
    "effect_curve": "claims.curve",
    "extract_directions": "directions.extract",
    "feature_cards": "features.cards",
    "finetuning_shift": "directions.screening",
    "from_sae_lens": "dictionaries.loading",
    "generate": "models.generate",
    "harmfulness_direction": "presets.zhao2025",
    "head_loadings": "graph.heads",
    "import_mean_diffs": "directions.interchange",
    "import_persona_vectors": "directions.interchange",
    "import_refusal_direction": "directions.interchange",
    "import_steering_vector": "directions.interchange",
    "intervene": "interventions.intervene",
    "leace": "interventions.subspaces",
    "lie_or_hallucination": "organisms.lies",
    "load_dictionary": "dictionaries.loading",
    "load_graph": "graph.exchange",
    "load_model": "models.loading",
    "load_pair": "organisms.zoo",
    "logit_difference": "metrics",
    "logit_lens": "directions.lens",
    "mean_activation": "models.means",
    "orthogonalize_": "interventions.weights",
    "orthogonalized": "interventions.weights",
    "place_cells": "presets.zhao2025",
    "prefers_truth": "organisms.facts",
    "principal_angles": "directions.angles",
    "proof": "models.proof",
    "projection_difference": "directions.screening",
    "refusal_direction": "presets.zhao2025",
    "refusal_log_odds": "metrics",
    "removed_mean": "interventions.removed_mean",
    "reply_inversion": "claims.questions.inversion",
    "run_study": "organisms.studies",
    "score_features": "features.scoring",
    "select_candidate": "claims.criteria",
    "select_direction": "claims.selection",
    "shared_features": "features.shared",
    "steered_training": "organisms.prevention",
    "summarise_study": "organisms.studies",
    "toy_dictionary": "presets.setups",
    "train_dictionary": "dictionaries.training",
    "train_organism": "organisms.zoo",
    "untie_embeddings_": "interventions.weights",
    "verify_feature": "claims.questions.latents",
    "verify_features": "claims.questions.latents",
}
"""Where each public name lives."""

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tl_em' has no attribute {name!r}")
    value = getattr(import_module(f"tl_em.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
