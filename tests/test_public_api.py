"""The public names, what they say of themselves, and what importing the package costs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import tl_em as em

NAMES = [
    "Ablate",
    "Add",
    "AttributionGraph",
    "Behaviour",
    "CacheWarning",
    "Clamp",
    "Comparison",
    "Completion",
    "Conditional",
    "ContrastSet",
    "Dictionary",
    "DictionaryModelWarning",
    "DictionaryQuality",
    "Direction",
    "Erase",
    "Estimate",
    "Facts",
    "Feature",
    "FeatureCards",
    "FeatureCheck",
    "FeatureSet",
    "FeatureTable",
    "GraphDiff",
    "HiddenSteerWarning",
    "LatentGuard",
    "Leace",
    "LensModel",
    "LieReport",
    "Metric",
    "ModelPair",
    "Monitor",
    "NuisanceWarning",
    "Organism",
    "Provenance",
    "Report",
    "Row",
    "ScaleFeature",
    "Selection",
    "Site",
    "SparseDictionary",
    "TextLogprob",
    "TlEmError",
    "UnprovenWarning",
    "attention_view",
    "attribute",
    "attribute_over",
    "audit",
    "behaviour_rates",
    "calibrate",
    "candidate_directions",
    "capture",
    "compare",
    "cosine_matrix",
    "cosines_between",
    "dictionary_quality",
    "difference_in_means",
    "effect_curve",
    "extract_directions",
    "feature_cards",
    "finetuning_shift",
    "from_sae_lens",
    "generate",
    "harmfulness_direction",
    "head_loadings",
    "import_mean_diffs",
    "import_persona_vectors",
    "import_refusal_direction",
    "import_steering_vector",
    "intervene",
    "leace",
    "lie_or_hallucination",
    "load_dictionary",
    "load_graph",
    "load_model",
    "load_pair",
    "logit_difference",
    "logit_lens",
    "mean_activation",
    "orthogonalize_",
    "orthogonalized",
    "place_cells",
    "prefers_truth",
    "principal_angles",
    "projection_difference",
    "proof",
    "refusal_direction",
    "refusal_log_odds",
    "removed_mean",
    "reply_inversion",
    "run_study",
    "score_features",
    "select_candidate",
    "select_direction",
    "shared_features",
    "steered_training",
    "summarise_study",
    "toy_dictionary",
    "train_dictionary",
    "train_organism",
    "untie_embeddings_",
    "verify_feature",
    "verify_features",
]


def test_names_are_pinned() -> None:
    """A name that appears or disappears is a decision: change this list and the changelog together."""
    assert em.__all__ == NAMES == sorted(NAMES)
    assert set(NAMES) <= set(dir(em))


@pytest.mark.parametrize("name", NAMES)
def test_names_exist_and_say_what_they_are(name: str) -> None:
    value = getattr(em, name)
    own = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
    assert inspect.getdoc(own), name
    assert not (own.__doc__ or "").startswith(f"{name}("), f"{name} has only the docstring that dataclass makes"


def test_names_stay_functions_after_every_module_was_imported() -> None:
    for name in NAMES:
        getattr(em, name)
    assert not any(inspect.ismodule(getattr(em, name)) for name in NAMES)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        em.nonsense  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"transformer_lens", "sae_lens", "transformers", "torch", "matplotlib", "pandas", "numpy", "scipy"}
    assert "numpy" in loaded_by("import numpy")
    assert not loaded_by("import tl_em") & heavy
    assert not loaded_by("import tl_em.cli") & heavy


def test_importing_a_name_loads_neither_transformer_lens_nor_matplotlib() -> None:
    heavy = {"transformer_lens", "sae_lens", "transformers", "matplotlib"}
    loaded = loaded_by("import tl_em as em; em.audit; em.load_pair; em.intervene")
    assert "torch" in loaded
    assert not loaded & heavy


def test_help_answers_within_a_second_of_cpu_time() -> None:
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run([sys.executable, '-c', 'import sys; from tl_em.cli import main; "
        'sys.argv = ["tl-em", "--help"]; main()\'], capture_output=True, text=True, check=True)\n'
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "assert 'audit' in done.stdout and 'demo' in done.stdout, done.stdout\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0
