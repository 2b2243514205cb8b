"""A model, edited weights and all, as an ordinary Hugging Face directory that anything loads; shown to be equal.

    weights on a surface  ->  the class and config that the model came from  ->  config, tokenizer, safetensors

What the surface holds is put back under Hugging Face's names: a Bridge wraps the very tensors, of a HookedTransformer
the conversion is run backwards (``unhooked``).  Low-rank changes that stand beside their matrices are added in.  Where
an edit gave a weight a bias (``em.bake_``) that the class has only on demand, the config asks for it, and biases that
nobody set are 0.  What was tied and no longer is equal is written untied.

The control: the directory is read back as a stranger would read it, and its logits are compared with the model's, over
a prompt longer than every window of the config.  Only then does it take its place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_em.arguments import checked
from tl_em.artefacts import check_folder, replacing_folder
from tl_em.errors import ModelError, TlEmError, UsageError, first_line
from tl_em.models.checkpoint import check_weights
from tl_em.models.directories import fill_directory
from tl_em.models.hooks import LensModel, attached_names
from tl_em.models.loading import opened
from tl_em.models.proof import BOUNDS, HALF, forward_gap, proof, reference, without_hooks
from tl_em.models.shared import AdaptedLinear
from tl_em.models.sites import Provenance
from tl_em.models.source_record import HfSource, boundaries, hf_source_of
from tl_em.models.tokenizing import same_ids
from tl_em.models.torch_state import making_weights
from tl_em.models.unhooked import hf_weights
from tl_em.models.upstream_chatter import quiet
from tl_em.threads import alone, holding

_SAME = 1e-5
"""Largest difference of log-probabilities, in spreads of the logits, between a float32 model and what was written of
it: rounding of sums in another order. Where the surface itself is farther from what it was made of, as a deep
HookedTransformer is (2e-5 in 30 layers), twice that; where an adapter is merged (2.4e-5 in 30 layers), or nothing was
shown when the model was loaded, the bound of loading."""


@checked()
def save_model(model: LensModel | Any, out: str | Path, *, overwrite: bool | Any = False) -> Path:
    """Write a model as it is now as a Hugging Face directory: config, tokenizer with its chat template, safetensors.

    ``transformers.AutoModelForCausalLM.from_pretrained(out)`` loads it, and so does everything that reads such
    directories: vLLM, llama.cpp's converter, ``em.load_model``. Edits of the weights are in it: ``em.orthogonalize_``,
    ``em.bake_``, ``em.untie_embeddings_``, a LoRA adapter (merged), and your own. Hooks are not: bake them first.

    The directory is read back before it is put in its place, and its logits are compared with the model's: in float32
    at most 1e-5 of their spread apart. Rounding adds up to more in some deep models: for a HookedTransformer twice what
    lay between it and its source when it was loaded is allowed, and for a merged adapter, or a model that was never
    compared with its source, what ``em.load_model`` allows (2e-4). If they are not, nothing is left behind.

    Args:
        model: a HookedTransformer or TransformerBridge from ``em.load_model``, ``em.load_pair`` or a fine-tune; also a
            Bridge that TransformerLens booted. In the dtype that it has.
        out: the directory to write.
        overwrite: replace a directory that holds a model.

    Returns:
        The directory.

    Raises:
        OutputError: ``out`` holds something, or cannot be written. UsageError: hooks are on the model.
        ModelError: the model was not loaded by this package and does not say what it came from, its weights were folded
            or centred, its class has no place for an edit, or what is read back computes something else.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> contrast, site = pair.contrasts["persona"], em.Site(2)
        >>> persona = em.difference_in_means(pair.base, contrast, site=site, position="prompt_end")
        >>> em.orthogonalize_(pair.tuned, persona)
        >>> with TemporaryDirectory() as folder:
        ...     again = em.load_model(em.save_model(pair.tuned, f"{folder}/edited"))
        >>> asked = ["how do i write parser"]
        >>> em.generate(again, asked, max_new_tokens=8) == em.generate(pair.tuned, asked, max_new_tokens=8)
        True
    """
    if not isinstance(overwrite, bool):
        raise UsageError(f"overwrite={overwrite!r} is neither True nor False, so it is unclear what may go; give one.")
    check_folder(out, overwrite=overwrite)
    if names := attached_names(model):
        raise UsageError(
            f"Hooks are on this model at {', '.join(names[:3])} (an open em.intervene block, say), and a directory "
            "holds weights alone, so what they do would be missing from it. Put the edit into the weights with "
            "em.bake_(model, intervention) or em.orthogonalize_(model, direction), or leave the block, and save then."
        )
    with holding(model), making_weights(), quiet():
        origin, dtype = _origin(model), next(iter(model.parameters())).dtype  # pyright: ignore[reportAttributeAccessIssue]
        with alone() if dtype != torch.float32 else nullcontext():
            whole = _assembled(origin, _weights(model, origin), dtype)
        check_weights(whole)
        with replacing_folder(out, overwrite=overwrite) as folder:
            fill_directory(folder, whole, origin.tokenizer)
            del whole
            _check_same(model, folder, origin.tokenizer, dtype)
    return Path(out)


# --- What the model came from -----------------------------------------------------------------------------------------


def _origin(model: Any) -> HfSource:
    """Class, config and tokenizer to write the model with."""
    processing = Provenance.of(model).weights
    if processing != "raw":
        raise ModelError(
            f"This model's weights are {processing}: norms or means were worked into them, which no Hugging Face class "
            "has a place for, and cannot be taken out again. Load the model with em.load_model(source), which leaves "
            "weights as they are, edit that one, and save it."
        )
    kept, inner = hf_source_of(model), getattr(model, "original_model", None)
    if kept is None and inner is None:
        raise ModelError(
            "This HookedTransformer does not say which Hugging Face model it was made of, so neither its config nor "
            "its tokenizer is known. Load it with em.load_model(source, surface='hooked'), and put your weights into "
            "that one."
        )
    if inner is not None:  # the config of a Bridge is the model's own: an edit may have changed it
        tokenizer = kept.tokenizer if kept is not None else getattr(model, "tokenizer", None)
        kept = HfSource.of(inner, tokenizer)
    assert kept is not None
    template = getattr(getattr(model, "tokenizer", None), "chat_template", None)
    if kept.tokenizer is not None and template is not None and template != kept.tokenizer.chat_template:
        kept = kept._replace(tokenizer=copy.deepcopy(kept.tokenizer))
        kept.tokenizer.chat_template = template
    return kept


def _weights(model: Any, origin: HfSource) -> dict[str, Tensor]:
    """Every tensor by its Hugging Face name, on the CPU; what has other names as well has those too."""
    inner = getattr(model, "original_model", None)
    found = hf_weights(model, origin, empty(origin)) if inner is None else _unwrapped(inner)
    return {name: value.detach().to("cpu") for name, value in found.items()}


_WRAPPED = "._original_component"


def _unwrapped(hf_model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a Bridge wraps, low-rank changes added in, by the names that they had before."""
    found = {name.replace(_WRAPPED, ""): value for name, value in hf_model.state_dict().items()}
    for path, module in hf_model.named_modules():
        if hasattr(module, "get_delta_weight"):  # peft's layers, which load_model leaves in a PeftModel in memory
            layer: Any = module
            active = [each for each in layer.active_adapters if not layer.disable_adapters and not layer.merged]
            wide = torch.promote_types(layer.get_base_layer().weight.dtype, torch.float32)
            changes = [layer.get_delta_weight(each).detach().to(wide) for each in active]
            name, base = path.replace(_WRAPPED, ""), layer.get_base_layer()
            found[f"{name}.weight"] = sum(changes, base.weight.detach().to(wide)).to(base.weight.dtype)
            if base.bias is not None:
                found[f"{name}.bias"] = base.bias
    return found


# --- Into the class ---------------------------------------------------------------------------------------------------


def empty(origin: HfSource, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of the class without values, its unembedding apart from its embedding."""
    config = copy.deepcopy(origin.config)
    for name, value in {"_name_or_path": "", "tie_word_embeddings": False, **changes}.items():
        setattr(config, name, value)
    kind: Any = origin.kind
    with torch.device("meta"):
        return kind._from_config(config, dtype=dtype, attn_implementation="eager").eval()


def _assembled(origin: HfSource, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A Hugging Face model that holds the weights."""
    plain = empty(origin, dtype)
    extra = [name for name in _new_biases(plain, weights) if bool(weights[name].any())]
    model = plain if not extra else _with_biases(origin, dtype, extra)
    names = set(model.state_dict())
    optional = names - set(plain.state_dict())
    missing = sorted(names - set(weights) - optional)
    if missing:
        raise ModelError(
            f"The model holds no {missing[0]} ({len(missing)} such tensors), which a {origin.kind.__name__} has, so "
            "the directory would be another model. Load it with the other surface= of em.load_model, edit and save it."
        )
    state = {name: weights[name] if name in weights else _zeros(model, name, dtype) for name in names}
    _tie_(model, state, tied=bool(getattr(origin.config, "tie_word_embeddings", False)))
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    if origin.generation_config is not None:
        model.generation_config = copy.deepcopy(origin.generation_config)
    return model


def _zeros(model: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    return torch.zeros(model.state_dict()[name].shape, dtype=dtype)


def _new_biases(plain: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Biases of layers that have none in this class."""
    without = [path for path, module in plain.named_modules() if getattr(module, "bias", 0) is None]
    return [name for path in without if (name := f"{path}.bias") in weights]


def _with_biases(origin: HfSource, dtype: torch.dtype, wanted: Sequence[str]) -> Any:
    """The class with those of its switches on that give it these biases."""
    for names in _switches(origin.config):
        model = empty(origin, dtype, **dict.fromkeys(names, True))
        if set(wanted) <= set(model.state_dict()):
            return model
    raise ModelError(
        f"{wanted[0]} was given a value (em.bake_ does that), and a {origin.kind.__name__} has no such bias, nor a "
        "switch in its config that gives it one, so what was baked cannot be written. Apply it while the model runs, "
        "with em.intervene(model, em.Add(direction)), or give it to llama.cpp: em.interop.export_control_vector(...)."
    )


def _switches(config: Any) -> Iterator[tuple[str, ...]]:
    """Sets of a config's switches for biases that are off, the smallest first."""
    off = [name for name, value in vars(config).items() if name.endswith("bias") and value is False]
    for count in range(1, len(off) + 1):
        yield from combinations(off, count)


def _tie_(model: Any, state: dict[str, Tensor], *, tied: bool) -> None:
    """One tensor for embedding and unembedding, and a config that says so, where they were one and are still equal."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    if not tied or id(inner) not in paths or id(outer) not in paths:
        return
    names = [f"{paths[id(module)]}.weight" for module in (inner, outer)]
    one, other = (state[name].float() for name in names)
    if one.shape == other.shape and float((one - other).abs().max()) <= 1e-6 * float(one.abs().max()):
        state[names[1]] = state[names[0]]
        model.config.tie_word_embeddings = True


# --- Is it the same? --------------------------------------------------------------------------------------------------


def _check_same(model: Any, folder: Path, tokenizer: Any, dtype: torch.dtype) -> None:
    """Raise ``ModelError`` unless what a stranger reads from the folder computes what the model computes."""
    try:
        _, again, read = opened(str(folder), None, dtype)
        expected = reference(again.to(next(iter(model.parameters())).device).eval(), boundaries(again.config))
        with without_hooks(model):
            gap = forward_gap(model, expected, dtype)
    except TlEmError as error:
        raise ModelError(
            f"What was written of the model cannot be read back ({first_line(error)}), so nothing was left. Load it "
            "with the other surface= of em.load_model, edit and save that."
        ) from error
    bound = _bound(model, dtype)
    if not gap <= bound:
        raise ModelError(
            "What was written of the model is another model: read back, its log-probabilities differ from its own "
            f"by {gap:.1e} spreads of the logits (rounding gives at most {bound:g}), so nothing was left. After an "
            "edit by hand of a matrix that a Bridge keeps in parts, say: load it with the other surface= of "
            "em.load_model, edit and save that."
        )
    if tokenizer is not None and (read is None or not same_ids(tokenizer, read)):
        raise ModelError(
            "The tokenizer that is read back from what was written reads text otherwise than the model's own, so "
            "nothing was left. Pass one that transformers can find again: em.load_model(source, tokenizer=directory)."
        )


def _bound(model: Any, dtype: torch.dtype) -> float:
    """The largest gap that is rounding."""
    shown = proof(model)
    if dtype not in BOUNDS:
        return HALF
    if shown is None or shown.forward is None or _has_low_rank(model):
        return BOUNDS[dtype]
    return max(_SAME, 2 * shown.forward)


def _has_low_rank(model: Any) -> bool:
    """Whether a change stands beside a matrix: added to it, the sum is rounded once more, in every layer."""
    inner = getattr(model, "original_model", model)
    return any(isinstance(each, AdaptedLinear) or hasattr(each, "get_delta_weight") for each in inner.modules())
