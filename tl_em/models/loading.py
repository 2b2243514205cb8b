"""Models from anywhere, on either surface of TransformerLens, and pairs of them checked to be comparable.

Weights are loaded raw: nothing is folded or centred, so that both surfaces and the Hugging Face model share one
residual stream and a direction made on one holds on the others.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tl_em.errors import CorruptFileError, ModelError, ModelNotFoundError, NonFiniteError, PairMismatchError, UsageError
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import ContrastSet
from tl_em.models.sites import vocabulary_hash
from tl_em.models.surfaces import as_bridge, as_hooked, check_same_function, first_line, probe, quiet, reloadable

Surface = Literal["bridge", "hooked"]


def load_model(
    source: Any,
    *,
    surface: Surface = "bridge",
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    in_place: bool = False,
) -> LensModel:
    """A model with hook points, in eval mode, with raw weights.

    Args:
        source: a directory in the Hugging Face layout, one with a PEFT adapter (merged into its base), a hub id, or a
            Hugging Face model in memory (also a ``PeftModel``, whose adapters stay apart: see ``attribute(adapter=)``).
        surface: ``"bridge"`` (TransformerBridge) or ``"hooked"`` (HookedTransformer, TransformerLens 3 only).
        tokenizer: in place of the source's own; a model in memory has none of its own.
        dtype: float32 by default.
        device: by default a GPU where there is one; a model in memory stays where it is.
        in_place: a Bridge rewires the model it is built around. A model in memory is therefore copied first, unless
            this is True.

    Returns:
        The model; nothing is wrapped around it.

    Raises:
        ModelNotFoundError: no such directory, or the hub does not answer.
        CorruptFileError: weights that cannot be read.
        NonFiniteError: NaN or infinity among the weights.
        ModelError: peft is missing for an adapter, the surface does not exist in this version of TransformerLens, or
            what it makes of the model computes something else.
    """
    if surface not in ("bridge", "hooked"):
        raise UsageError(
            f"There is no surface {surface!r}. Use 'bridge' (TransformerBridge) or 'hooked' (HookedTransformer)."
        )
    dtype = torch.float32 if dtype is None else dtype
    with quiet(), ExitStack() as stack:
        if tokenizer is not None:
            tokenizer = reloadable(tokenizer, stack)
        if isinstance(source, (str, Path)):
            name, hf_model, tokenizer = _from_path_or_hub(str(source), tokenizer, dtype)
        else:
            name, hf_model = _in_memory(source, in_place, dtype)
            tokenizer = _tokenizer_of(hf_model) if tokenizer is None else tokenizer
            device = device or next(hf_model.parameters()).device
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_weights(hf_model.to(device))
        expected = probe(hf_model)
        build = as_hooked if surface == "hooked" else as_bridge
        model = build(name, hf_model, tokenizer, dtype, device)
        check_same_function(model, hf_model, *expected)
    model.eval()
    return model


# --- The Hugging Face model -------------------------------------------------------------------------------------------


def _from_path_or_hub(source: str, tokenizer: Any, dtype: torch.dtype) -> tuple[str, Any, Any]:
    path = Path(source)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        return _merged_adapter(path, tokenizer, dtype)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"The directory {source!r} has neither config.json nor adapter_config.json, so it holds no Hugging Face "
            f"model. Save one there with hf_model.save_pretrained({source!r})."
        )
    if not path.is_dir() and _looks_like_path(source):
        raise ModelNotFoundError(f"There is no directory {source!r}. Check the path, or give a hub id such as 'gpt2'.")
    if not path.is_dir():
        _check_hub(source)
    return source, _hf_model(source, dtype), tokenizer if tokenizer is not None else _hf_tokenizer(source)


def _looks_like_path(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or not source


def _check_hub(source: str) -> None:
    """Ask the hub once, unless the model is cached: transformers would retry for most of a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            HfApi().model_info(source, timeout=20)
    except Exception as error:  # no common base: a bad name, no network, no such model, no access
        raise _not_found(source, error) from error


def _hf_model(source: str, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager")
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CorruptFileError(
            f"The weights or the config of {source!r} cannot be read ({error}). Copy or download them again."
        ) from error
    except OSError as error:
        raise _not_found(source, error) from error
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{source!r} cannot be loaded as a causal language model ({error}). Check config.json and its weights."
        ) from error


def _not_found(source: str, error: Exception) -> ModelError | CorruptFileError:
    path = Path(source)
    if path.is_dir() and any(path.glob("*.safetensors")):
        return CorruptFileError(
            f"The weights in {source!r} cannot be read ({first_line(error)}). Copy or download them again."
        )
    if path.is_dir():
        return ModelNotFoundError(
            f"The directory {source!r} holds no readable weights ({first_line(error)}). Save the model there again."
        )
    return ModelNotFoundError(
        f"There is no directory {source!r}, and the hub gives no model of that name ({first_line(error)}). Check the "
        f"spelling and the network; offline, download it elsewhere (hf download {source}) and pass the directory."
    )


def _hf_tokenizer(source: str) -> Any:
    """The source's own tokenizer, None where it has none (models of symbols)."""
    from transformers import AutoTokenizer

    directory = Path(source)
    if directory.is_dir() and not any(directory.glob("*token*")) and not any(directory.glob("vocab*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except json.JSONDecodeError as error:
        raise CorruptFileError(
            f"The tokenizer of {source!r} cannot be read ({error}). Copy or download it again."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{source!r} has no tokenizer that can be loaded ({first_line(error)}). Pass one with tokenizer=."
        ) from error


def _merged_adapter(path: Path, tokenizer: Any, dtype: torch.dtype) -> tuple[str, Any, Any]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(
            f"{str(path)!r} holds a PEFT adapter, and the package peft, which merges it into its base, is not "
            f"installed. Install the extra: pip install 'tl-em[lora]'."
        ) from error
    try:
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise CorruptFileError(
            f"{path / 'adapter_config.json'} names no base model ({error!r}). Save the adapter again."
        ) from error
    if not Path(str(base)).is_dir() and (path / str(base)).is_dir():
        base = path / str(base)
    _, hf_base, base_tokenizer = _from_path_or_hub(str(base), tokenizer, dtype)
    try:
        merged = PeftModel.from_pretrained(hf_base, str(path)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CorruptFileError(
            f"The adapter in {str(path)!r} does not fit its base {str(base)!r} ({first_line(error)})."
        ) from error
    own = tokenizer is None and (path / "tokenizer_config.json").is_file()
    return str(path), merged, _hf_tokenizer(str(path)) if own else base_tokenizer


def _in_memory(source: Any, keep: bool, dtype: torch.dtype) -> tuple[str, Any]:
    if hasattr(source, "get_base_model"):  # a PeftModel: the model inside, its adapters with it
        source = source.get_base_model()
    config = getattr(source, "config", None)
    if config is None or not isinstance(source, torch.nn.Module):
        raise UsageError(
            f"A {type(source).__name__} is neither a path, a hub id nor a Hugging Face model, so there is nothing to "
            f"load. A TransformerLens model needs no loading: use it as it is."
        )
    hf_model: Any = source if keep else copy.deepcopy(source)
    if not getattr(config, "architectures", None):
        hf_model.config.architectures = [type(source).__name__]
    return str(getattr(config, "name_or_path", "") or type(source).__name__), hf_model.to(dtype)


def _tokenizer_of(hf_model: Any) -> Any:
    """The tokenizer of where a model in memory came from, if that can still be reached."""
    name = str(getattr(hf_model.config, "name_or_path", "") or "")
    try:
        if name and not Path(name).is_dir():
            _check_hub(name)
        return _hf_tokenizer(name) if name else None
    except (ModelNotFoundError, CorruptFileError):
        return None


def check_weights(model: torch.nn.Module) -> None:
    """Raise ``NonFiniteError``, naming the parameter, when a weight is NaN or infinite.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = layer.weight.data.fill_(float("nan"))
        >>> check_weights(layer)
        Traceback (most recent call last):
        ...
        tl_em.errors.NonFiniteError: The parameter 'weight' holds 4 ...
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.sum())):  # one pass; counted exactly only where something is wrong
            wrong = int((~torch.isfinite(parameter)).sum())
            if wrong:
                raise NonFiniteError(
                    f"The parameter {name!r} holds {wrong} values that are NaN or infinite, so would everything "
                    f"computed from it. The training diverged or the file is damaged: load another checkpoint."
                )


# --- Pairs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A model before and after a fine-tune, checked to be comparable.

    Args:
        base: the model before the fine-tune.
        tuned: the model after it.
        name: name of the pair, e.g. ``"toy/insecure"``.
        base_name, tuned_name: names of the models; their configs' by default.
        contrasts: contrast sets that fit the models' vocabulary, by concept.
        behaviours: behaviours that fit them, by the same names.
        organism: the record that the pair came from.

    Raises:
        PairMismatchError: shapes, vocabularies or chat templates differ; the message lists the differences.
    """

    base: LensModel
    tuned: LensModel
    name: str | None = None
    base_name: str | None = None
    tuned_name: str | None = None
    contrasts: Mapping[str, ContrastSet] | None = None
    behaviours: Mapping[str, Any] | None = None
    organism: Any = None

    def __post_init__(self) -> None:
        found = _mismatches(self.base, self.tuned)
        if found:
            raise PairMismatchError(
                f"Base and tuned cannot be compared: {'; '.join(found)}. A direction of one means nothing in the "
                f"other. Give a model and its own fine-tune, with the tokenizer of the base for both."
            )
        for role in ("base", "tuned"):
            if getattr(self, f"{role}_name") is None:
                cfg = getattr(self, role).cfg
                object.__setattr__(self, f"{role}_name", str(getattr(cfg, "model_name", None) or role))

    def __repr__(self) -> str:
        return f"ModelPair({self.name or ''!r}, base={self.base_name!r}, tuned={self.tuned_name!r})"


def _mismatches(base: LensModel, tuned: LensModel) -> list[str]:
    found = []
    for field in ("n_layers", "d_model", "d_vocab", "n_ctx"):
        a, b = getattr(base.cfg, field), getattr(tuned.cfg, field)
        if a != b:
            found.append(f"{field} is {a} in base and {b} in tuned")
    tokenizers = [getattr(model, "tokenizer", None) for model in (base, tuned)]
    if vocabulary_hash(tokenizers[0]) != vocabulary_hash(tokenizers[1]):
        found.append("their tokenizers have different vocabularies")
    if getattr(tokenizers[0], "chat_template", None) != getattr(tokenizers[1], "chat_template", None):
        found.append("their tokenizers have different chat templates")
    return found
