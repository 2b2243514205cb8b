"""What the fields of a dictionary may be, and on which model it belongs.

When a dictionary is made, whoever made it: floats that are finite, an activation that agrees with them, sites in order.
When it meets a model:

    width        d_model must agree
    provenance   as for a direction: shape, tokenizer, weight processing
    processing   fold_ln and center_writing_weights of the source, where it says them, against the model's own
    before_norm_weight   reads the normalised stream: right on folded weights, else refused with the call that mends it
    module_output        a module's own output is what the block writes only where no norm stands behind it
    model_name   a fine-tune carries another name, so another name is a warning, and the measure is dictionary_quality
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import whole
from tl_em.errors import DictionaryModelWarning, NonFiniteError, ProvenanceError, UsageError, WidthError
from tl_em.models.hooks import LensModel, find
from tl_em.models.sites import Provenance, Site, Stream, check_belongs

Activation = Literal["relu", "jumprelu", "topk"]
if TYPE_CHECKING:
    Weights = Float[Tensor, "..."]
    Count = int
    Where = Site
else:  # what is none of these reaches the checks below, and not a type checker's own error
    Weights = Count = Where = Any
NEEDS: Mapping[str, str] = {"jumprelu": "threshold", "topk": "k"}
"""By activation, the one field that it is not defined without, and that no other activation has."""
_ORDER: tuple[str, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
assert set(_ORDER) == set(get_args(Stream))
_PROCESSING = {"fold_ln": "folded", "center_writing_weights": "centred"}
_TRAIN = "em.dictionaries.train_dictionary(model, site, corpus, d_sae=512)"


def as_floats(name: str, given: Any) -> Tensor:
    """A field as a float32 tensor without a gradient.

    Raises:
        UsageError: not numbers, or integers or booleans (quantised weights without their scale would be taken for
            weights). NonFiniteError: NaN or infinity, also where float32 cannot hold a float64.
    """
    try:
        tensor = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(given).__name__
        raise UsageError(f"{name} is a {kind}, not an array of numbers ({error}); give it a tensor") from error
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.device.type == "meta":
        raise UsageError(
            f"{name} holds {tensor.dtype} ({tensor.layout}, on {tensor.device}), so it may be quantised, a mask or "
            f"empty storage and not weights. If these are the weights, give {name} as dense floats: "
            f"{name}.to_dense().float()"
        )
    tensor = tensor.float()
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(
            f"{name} holds NaN or infinity in float32, so every latent that it touches would mean nothing: load the "
            "dictionary again, or from a file in float32"
        )
    return tensor


def activation_name(given: Any) -> Activation:
    """``"ReLU"``, ``"jump_relu"``, ``"top-k"`` and the like as the name that is used here.

    Raises:
        UsageError: any other.
    """
    plain = given.lower().replace("-", "").replace("_", "").strip() if isinstance(given, str) else None
    for name in get_args(Activation):
        if plain == name:
            return name
    trained = "batchtopk" if plain in ("batchtopk", "matryoshkabatchtopk") else None
    hint = "; after training, batchtopk is a jumprelu with its threshold" if trained else ""
    raise UsageError(f"activation={given!r}; there are {', '.join(get_args(Activation))}{hint}")


def check_agreement(activation: Activation, threshold: Tensor | None, k: Any, d_sae: int) -> int | None:
    """``k`` as an int; raise unless exactly the fields are given that the activation is defined by.

    Raises:
        UsageError: a field is missing or contradicts the activation, is out of range, or below 0.

    Source: JumpReLU_t(z) = z H(z - t) with t > 0, Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    given = {"threshold": threshold, "k": k}
    needs = NEEDS.get(activation)
    if needs and given[needs] is None:
        raise UsageError(f"a {activation} dictionary without {needs} cannot say what is on; pass {needs}=")
    extra = [name for name, value in given.items() if value is not None and name != needs]
    if extra:
        means = next(a for a, n in NEEDS.items() if n == extra[0])
        raise UsageError(
            f"activation={activation!r} and {extra[0]} contradict each other: {extra[0]} belongs to {means!r}, and "
            f"which latents are on depends on it. Pass activation={means!r}, or leave {extra[0]} out"
        )
    if threshold is not None and bool((threshold < 0).any()):
        raise UsageError(
            f"threshold is negative for {int((threshold < 0).sum())} of {d_sae} latents (least "
            f"{float(threshold.min()):.3g}); JumpReLU is defined from 0 on, and libraries differ on what is on below. "
            "Where the code that trained it takes a ReLU too, that is a threshold of 0 for these"
        )
    return None if k is None else whole("k", k, low=1, high=d_sae)


def check_sites(site_in: Any, site_out: Any, skip: bool) -> None:
    """Raise ``UsageError`` unless both are sites, in the order of the computation, and a skip leads to another site.

    Of several sites that are read at once (a crosscoder's) no order is asked.
    """
    reads: list[Any] = list(site_in) if isinstance(site_in, tuple) and site_in else [site_in]
    for name, site in (*(("site_in", site) for site in reads), ("site_out", site_out)):
        if not isinstance(site, Site):
            raise UsageError(f"{name}={site!r} is no site; give one, e.g. {name}=em.Site(3, 'resid_post')")
    if len(reads) > 1:
        return
    if (site_out.layer, _ORDER.index(site_out.stream)) < (reads[0].layer, _ORDER.index(reads[0].stream)):
        raise UsageError(
            f"it reads {site_in} and writes {site_out}, which comes before: nothing that it reads can have an effect "
            "there. Exchange site_in and site_out, or correct their layers"
        )
    if skip and site_in == site_out:
        raise UsageError(
            f"W_skip goes from what a transcoder reads to what it writes, and this one reads and writes {site_in}; "
            "pass site_out= too, or leave W_skip out"
        )


def check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Raise ``WidthError`` unless the shapes belong together."""
    W_enc = tensors["W_enc"]
    d_model, d_sae = W_enc.shape if W_enc.ndim == 2 else (0, 0)
    wanted = {
        "b_enc": (d_sae,), "W_dec": (d_sae, d_model), "b_dec": (d_model,), "threshold": (d_sae,),
        "W_skip": (d_model, d_model),
    }  # fmt: skip
    shapes = {name: tuple(each.shape) for name, each in tensors.items()}
    wrong = {name: shape for name, shape in shapes.items() if wanted.get(name, shape) != shape}
    if wrong or not d_sae or not d_model:
        raise WidthError(
            f"W_enc is {tuple(W_enc.shape)}, read as [d_model d_sae], and {wrong} do not fit it; transpose what is "
            "stored the other way round"
        )


def check_metadata(metadata: Any) -> dict[str, Any]:
    """A copy as JSON has it.

    Raises:
        UsageError: not a mapping of names to what JSON can hold.
    """
    try:
        found = json.loads(json.dumps({**metadata}))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"metadata={metadata!r} cannot be written as JSON ({error}), so it would be lost with the file; give plain "
            "strings, numbers and lists by name"
        ) from error
    return found


# ---- on a model --------------------------------------------------------------------------------------------------
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
    again = f"load one of this model, or train it, {_TRAIN}"
    check_belongs(label, width, provenance, model, template=True, again=again, unchecked="dictionary.unchecked()")
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
