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
    "Calibration",
    "Clamp",
    "Comparison",
    "Completion",
    "Conditional",
    "ContrastSet",
    "Dictionary",
    "Direction",
    "Erase",
    "Estimate",
    "Feature",
    "FeatureSet",
    "FeatureTable",
    "Intervention",
    "LensModel",
    "Method",
    "Metric",
    "ModelPair",
    "Organism",
    "Plan",
    "Profile",
    "Question",
    "Report",
    "Row",
    "Rule",
    "ScaleFeature",
    "Selection",
    "Site",
    "SparseDictionary",
    "TlEmError",
    "attribute",
    "audit",
    "bake_",
    "behaviour_rates",
    "calibrate",
    "calibration",
    "candidate_directions",
    "capture",
    "compare",
    "difference_in_means",
    "effect_curve",
    "evaluate",
    "extract_directions",
    "fine_tune",
    "generate",
    "intervene",
    "load_dictionary",
    "load_graph",
    "load_model",
    "load_pair",
    "logit_difference",
    "mean_activation",
    "orthogonalize_",
    "plan",
    "proof",
    "read",
    "refusal_log_odds",
    "run_study",
    "save_model",
    "score_features",
    "select_candidate",
    "select_direction",
    "serve",
    "shared_features",
    "stream",
    "train_organism",
    "untie_embeddings_",
    "verify_feature",
]
FOLDERS = {
    "claims": ["Case", "FeatureCheck", "Finding", "TextLogprob", "Use", "reply_inversion", "verify_features"],
    "dictionaries": ["DictionaryQuality", "dictionary_quality", "train_dictionary"],
    "directions": [
        *("Projection", "cosine_matrix", "cosines_between", "finetuning_shift"),
        *("logit_lens", "principal_angles", "projection_difference"),
    ],
    "errors": [
        *("AdapterBaseWarning", "CacheWarning", "DictionaryModelWarning", "HiddenSteerWarning", "NuisanceWarning"),
        "UnprovenWarning",
    ],
    "evals": [
        *("Agreement", "EndpointJudge", "Evaluation", "Facts", "ForcedChoice", "Judged", "LieReport", "LocalJudge"),
        *("Misaligned", "ModelJudge", "OpenQuestion", "Phrases", "QuestionSet", "TextClassifier", "agreement"),
        *("corrected", "known_by_choice", "lie_or_hallucination", "load_judged", "load_questions", "prefers_truth"),
    ],
    "features": ["FeatureCards", "feature_cards"],
    "graph": ["GraphDiff", "attention_view", "attribute_over", "head_loadings", "leading_nodes", "node_scores"],
    "interop": [
        *("described", "upload_graph", "upload_latents"),
        *("export_control_vector", "export_layer_vectors", "export_saklas", "export_steering_vector"),
        *("export_steerkit", "from_sae_lens", "import_control_vector", "import_gguf", "import_layer_vectors"),
        *("import_mean_diffs", "import_persona_vectors"),
        *("import_refusal_direction", "import_saklas", "import_steering_vector", "import_steerkit"),
    ],
    "interventions": ["Leace", "leace", "orthogonalized", "removed_mean"],
    "metrics": ["Metric"],
    "models": ["Provenance"],
    "organisms": [
        *("StudyData", "audit_each", "evaluate_each", "fine_tune_", "run_real", "shared_value", "summarise_study"),
        "toy_dictionary",
    ],
    "presets": ["LatentGuard", "harmfulness_direction", "place_cells", "refusal_direction"],
    "reading": ["Alarm", "TextReading"],
    "serving": ["RunningServer", "SteeringDial"],
    "stats": ["Estimate"],
    "training": [
        *("Inoculated", "Lora", "Mixed", "Monitor", "Replayed", "Steered", "Triggered", "TuningArm"),
        "steered_training",
    ],
}
"""What is not on ``tl_em`` itself, by the folder that it is in."""


def test_names_are_pinned() -> None:
    """A name that appears or disappears is a decision: change this list and the changelog together."""
    assert sorted(NAMES) == NAMES
    assert em.__all__ == sorted([*NAMES, *FOLDERS])  # pyright: ignore[reportAttributeAccessIssue]
    assert set(NAMES) <= set(dir(em))


@pytest.mark.parametrize("name", NAMES)
def test_names_exist_and_say_what_they_are(name: str) -> None:
    value = getattr(em, name)
    own = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
    assert inspect.getdoc(own), name
    assert not (own.__doc__ or "").startswith(f"{name}("), f"{name} has only the docstring that dataclass makes"


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_hold_the_names_that_are_not_on_the_package(folder: str) -> None:
    for name in FOLDERS[folder]:
        value = getattr(getattr(em, folder), name)
        assert inspect.getdoc(value), name
        assert name in dir(getattr(em, folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_name_of_a_folder_is_that_of_a_file_in_it(folder: str) -> None:
    """Else ``em.models.proof`` would be the function or the module, by which of them was asked for first."""
    import pkgutil

    place = getattr(em, folder)
    files = {found.name for found in pkgutil.iter_modules(getattr(place, "__path__", []))}
    assert not files & set(getattr(place, "__all__", ()))


@pytest.mark.starts("Python, to see what is said at a first import")
def test_a_name_that_moved_still_works_and_says_where_it_is() -> None:
    code = "import tl_em as em\nassert em.head_loadings is em.graph.head_loadings"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "DeprecationWarning: em.head_loadings is now em.graph.head_loadings; write that" in done.stderr


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


@pytest.mark.starts("Python, to see what an import brings")
def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"transformer_lens", "sae_lens", "transformers", "torch", "matplotlib", "pandas", "numpy", "scipy"}
    assert "numpy" in loaded_by("import numpy")
    assert not loaded_by("import tl_em") & heavy
    assert not loaded_by("import tl_em.cli") & heavy


@pytest.mark.starts("Python, to see what an import brings")
def test_importing_a_name_loads_neither_transformer_lens_nor_matplotlib() -> None:
    heavy = {"transformer_lens", "sae_lens", "transformers", "matplotlib"}
    loaded = loaded_by("import tl_em as em; em.audit; em.load_pair; em.intervene")
    assert "torch" in loaded
    assert not loaded & heavy


@pytest.mark.starts("the command, for its time")
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
