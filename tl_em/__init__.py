"""tl_em: what did a narrow fine-tune change inside a model, and does that change cause the broad behaviour?

Every public name is loaded when it is first used, so that ``import tl_em`` loads neither torch nor TransformerLens.
``__init__.pyi`` says where each lives.  The names of an ordinary day are on ``tl_em`` itself; the others in the folder
that they belong to: ``em.graph.head_loadings``, ``em.interop.import_steering_vector``.
"""

from typing import Any

import lazy_loader

__version__ = "0.1.0"

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_MOVED = {
    "CacheWarning": "errors",
    "DictionaryModelWarning": "errors",
    "DictionaryQuality": "dictionaries",
    "Facts": "evals",
    "FeatureCards": "features",
    "FeatureCheck": "claims",
    "GraphDiff": "graph",
    "HiddenSteerWarning": "errors",
    "LatentGuard": "presets",
    "Leace": "interventions",
    "LieReport": "evals",
    "Monitor": "training",
    "NuisanceWarning": "errors",
    "Provenance": "models",
    "TextLogprob": "claims",
    "UnprovenWarning": "errors",
    "attention_view": "graph",
    "attribute_over": "graph",
    "cosine_matrix": "directions",
    "cosines_between": "directions",
    "dictionary_quality": "dictionaries",
    "feature_cards": "features",
    "finetuning_shift": "directions",
    "from_sae_lens": "interop",
    "harmfulness_direction": "presets",
    "head_loadings": "graph",
    "import_mean_diffs": "interop",
    "import_persona_vectors": "interop",
    "import_refusal_direction": "interop",
    "import_steering_vector": "interop",
    "leace": "interventions",
    "lie_or_hallucination": "evals",
    "logit_lens": "directions",
    "orthogonalized": "interventions",
    "place_cells": "presets",
    "prefers_truth": "evals",
    "principal_angles": "directions",
    "projection_difference": "directions",
    "refusal_direction": "presets",
    "removed_mean": "interventions",
    "reply_inversion": "claims",
    "steered_training": "training",
    "summarise_study": "organisms",
    "toy_dictionary": "organisms",
    "train_dictionary": "dictionaries",
    "verify_features": "claims",
}
"""Names that stood here once, and the folder that they are in now."""


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        return _attribute(name)
    import warnings

    place = _MOVED[name]
    warnings.warn(f"em.{name} is now em.{place}.{name}; write that", DeprecationWarning, stacklevel=2)
    return getattr(_attribute(place), name)
