"""Does a dictionary belong on the model that it meets?  Width, provenance, and what its source says of its model.

    width        d_model must agree
    provenance   as for a direction: shape, tokenizer, weight processing
    processing   fold_ln and center_writing_weights of the source, where it says them, against the model's own
    before_norm_weight   reads the normalised stream: right on folded weights, else refused with the call that mends it
    module_output        a module's own output is what the block writes only where no norm stands behind it
    model_name   a fine-tune carries another name, so another name is a warning, and the measure is dictionary_quality
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tl_em.errors import DictionaryModelWarning, ProvenanceError, WidthError
from tl_em.models.hook_points import find
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Provenance, Site

_PROCESSING = {"fold_ln": "folded", "center_writing_weights": "centred"}
_TRAIN = "em.dictionaries.train_dictionary(model, site, corpus, d_sae=512)"


def check_on(
    label: str,
    width: int,
    sites: Sequence[Site],
    provenance: Provenance | None,
    metadata: Mapping[str, Any],
    model: LensModel,
) -> None:
    """Raise unless a dictionary of these sites and this origin belongs on ``model``; warn of another model's name.

    Raises:
        WidthError: another width. ProvenanceError: another shape, tokenizer or weight processing.
    """
    if width != int(model.cfg.d_model):
        raise WidthError(
            f"{label} is {width} wide and the model's d_model is {model.cfg.d_model}; it was made on another model: "
            f"load one of this model, or train it, {_TRAIN}"
        )
    found = provenance.differences(model) if provenance is not None else []
    if found:
        raise ProvenanceError(
            f"{label} was not made on a model like this one: {'; '.join(found)}. Its latents mean something else here. "
            f"Train one on this model, {_TRAIN}, or, if you know better, use dictionary.unchecked()"
        )
    here = Provenance.of(model)
    _check_processing(label, metadata, here.weights, model)
    if metadata.get("before_norm_weight") and "folded" not in here.weights:
        raise ProvenanceError(
            f"{label} reads the normalised stream before the norm's weight ({metadata.get('hook_name')!r}), and on "
            "this model's raw weights mlp_in lies after it. Fold the weight in: dictionary.with_norm_of(model)"
        )
    if metadata.get("module_output"):
        _check_module(label, sites, model)
    _warn_of_name(label, metadata.get("model_name"), here.model)


def _check_processing(label: str, metadata: Mapping[str, Any], weights: str, model: LensModel) -> None:
    said = metadata.get("model_from_pretrained_kwargs") or {}
    layer_norm = str(getattr(model.cfg, "normalization_type", None) or "LN").startswith("LN")
    for option, word in _PROCESSING.items():
        if option not in said or (option == "center_writing_weights" and not layer_norm):  # RMSNorms are never centred
            continue
        wanted, present = bool(said[option]), word in weights
        if wanted == present:
            continue
        if not wanted:
            fix = "load the model with em.load_model(source), which leaves the weights raw"
        elif hasattr(model, "enable_compatibility_mode") and all(said.get(each, True) for each in _PROCESSING):
            fix = "fold and centre this Bridge's weights: model.enable_compatibility_mode()"
        else:
            options = ", ".join(f"{each}={said[each]!r}" for each in _PROCESSING if each in said)
            fix = (
                "load it as it was trained: transformer_lens.HookedTransformer.from_pretrained_no_processing("
                f"{metadata.get('model_name')!r}, {options})"
            )
        raise ProvenanceError(
            f"{label} was trained with {option}={said[option]!r} (model_from_pretrained_kwargs), and this model's "
            f"weights are {weights}, so its activations are others; {fix}"
        )


def _check_module(label: str, sites: Sequence[Site], model: LensModel) -> None:
    norms = {"attn_out": "ln1_post", "mlp_out": "ln2_post"}
    for site in sites:
        name = f"blocks.{site.layer}.{norms.get(site.stream, '')}.hook_normalized"
        if site.stream in norms and find(model, name) is not None:
            raise ProvenanceError(
                f"{label} was trained on the output of a module, and in this model a norm ({norms[site.stream]}) "
                f"stands between it and {site}, so another tensor is read here. Train one at {site}: "
                f"em.dictionaries.train_dictionary(model, em.Site({site.layer}, {site.stream!r}), corpus, d_sae=512)"
            )


def _warn_of_name(label: str, said: Any, here: str) -> None:
    if said and not same_name(str(said), here):
        warnings.warn(
            f"{label} was made on {said!r} and this model is called {here!r}. On a fine-tune of it that is right; on "
            "another model its latents mean nothing. Measure it: em.dictionaries.dictionary_quality(model, dictionary, "
            "prompts); or say that you know, with dictionary.unchecked()",
            DictionaryModelWarning,
            stacklevel=4,
        )


def same_name(one: str, other: str) -> bool:
    """Whether two names of models may be one model's: the last part of one holds that of the other.

    Example:
        >>> same_name("gpt2-small", "openai-community/gpt2"), same_name("pythia-70m", "gpt2")
        (True, False)
    """
    a, b = (re.sub(r"[^a-z0-9]", "", name.rstrip("/").split("/")[-1].lower()) for name in (one, other))
    return bool(a and b) and (a in b or b in a)
