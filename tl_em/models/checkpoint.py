"""The Hugging Face model of a directory, a hub id or memory: every tensor that was asked for is there, no code is run.

transformers fills what a file lacks with random numbers, and peft leaves out what an adapter lacks; both only log it.
Here a missing, unexpected or mismatched tensor is an error that names it. Code that comes with a model is never run. A
model that reads more than text is taken apart: its language model alone, where that is shown to be equal.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from tl_em.arguments import path as as_path
from tl_em.errors import CorruptFileError, ModelError, ModelNotFoundError, NonFiniteError, UsageError, first_line
from tl_em.models.adapters import (
    ADAPTER,
    CONFIG,
    base_of,
    check_changes_weights,
    check_peft,
    is_adapter,
    told,
    with_adapter,
)
from tl_em.models.devices import check_there
from tl_em.models.tokenizing import same_ids


def from_path_or_hub(source: str, tokenizer: Any, dtype: torch.dtype, device_map: Any = None) -> tuple[str, Any, Any]:
    """Name, model and tokenizer of a directory (also one with a PEFT adapter, merged into its base) or a hub id."""
    path = Path(as_path("source", source))
    if path.is_dir() and not is_adapter(path) and not (path / CONFIG).is_file():
        raise ModelNotFoundError(
            f"The directory {source!r} has neither config.json nor adapter_config.json, so it holds no Hugging Face "
            f"model. Save one there with hf_model.save_pretrained({source!r})."
        )
    if not path.is_dir() and (source.startswith(("/", ".", "~")) or source.count("/") > 1 or not source):
        raise ModelNotFoundError(f"There is no directory {source!r}. Check the path, or give a hub id such as 'gpt2'.")
    adapter = adapter_directory(source)
    if adapter is not None and device_map is not None:
        raise UsageError(
            f"{source!r} is an adapter, and it is not known to fit a base that is spread over devices. Merge it once, "
            "on one device: em.save_model(em.load_model(adapter, device='cpu'), directory), and load that directory."
        )
    if adapter is not None:
        check_peft(adapter)
        _, hf_base, of_base = from_path_or_hub(base_of(adapter), tokenizer, dtype)
        own = tokenizer_beside(adapter) if tokenizer is None else None
        return source, with_adapter(adapter, hf_base, beside=False), own or of_base
    return source, _hf_model(source, dtype, device_map), tokenizer if tokenizer is not None else hf_tokenizer(source)


def _on_hub(source: str) -> set[str]:
    """Which configs a hub id has: by the cache, or by asking once (transformers would retry for most of a minute)."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    both = {CONFIG, ADAPTER}
    try:
        cached = {name for name in both if isinstance(try_to_load_from_cache(source, name), str)}
        found = HfApi().model_info(source, timeout=20).siblings if not cached else None
    except Exception as error:  # no common base: a bad name, no network, no such model, no access
        raise _not_found(source, error) from error
    return cached or {each.rfilename for each in found or ()} & both


def _fetched(source: str) -> Path:
    """The directory of an adapter on the hub: its tensors, its config, and its tokenizer where it has one."""
    from huggingface_hub import snapshot_download

    wanted = ["adapter_*", "*token*", "vocab*", "merges*", "*.jinja"]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except Exception as error:  # no common base: no network, no access, a full disk
        raise _not_found(source, error) from error


def _hf_model(source: str, dtype: torch.dtype, device_map: Any = None) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        loader = _loader(config, source)
        hf_model, found = loader.from_pretrained(
            source, dtype=dtype, attn_implementation="eager", trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named, below
            **({} if device_map is None else {"device_map": device_map}),
        )  # fmt: skip
    except ModelError:
        raise
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CorruptFileError(
            f"The weights or the config of {source!r} cannot be read ({error}). Copy or download them again."
        ) from error
    except OSError as error:
        raise _not_found(source, error) from error
    except Exception as error:  # no common base: whatever a config that asks for nonsense makes transformers raise
        raise ModelError(
            f"{source!r} cannot be loaded as a causal language model ({first_line(error)}). Check config.json and its "
            f"weights; code that comes with a model (auto_map) is never run."
        ) from error
    check_complete(source, hf_model, found)
    return hf_model


def _loader(config: Any, source: str) -> Any:
    """The class that loads a model with this config, with all its parts."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as WITH_IMAGES

    check_kind(config, source)
    if reads_more_than_text(config) and type(config) in WITH_IMAGES:
        return AutoModelForImageTextToText
    if type(config) not in CAUSAL:
        raise ModelError(
            f"{source!r} is a {config.model_type!r} model, of which transformers has no causal language model, so it "
            f"gives no next-token probabilities. Load a causal language model (GPT-2, Llama, Gemma, …)."
        )
    return AutoModelForCausalLM


def check_kind(config: Any, source: str) -> None:
    """Raise ``ModelError`` for a model that an encoder is part of, before anything is loaded or built."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source!r} is an encoder-decoder ({getattr(config, 'model_type', None)!r}): it has two residual streams, "
            f"and what it says depends on a text beside the prompt. Load a causal language model (GPT-2, Llama, …)."
        )


def reads_more_than_text(config: Any) -> bool:
    """Whether a config is that of a model with a part for images or sound."""
    parts = ("vision_config", "audio_config", "speech_config", "image_config", "vq_config")
    return any(getattr(config, part, None) is not None for part in parts)


_HARMLESS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "attention.masked_bias", "attention.bias")
"""Buffers that old files hold and that transformers computes from the config. Only where no parameter has that name."""


def check_complete(source: str, hf_model: Any, found: dict[str, Any]) -> None:
    """Raise unless the files hold every tensor of the model, and nothing else."""
    own = dict(hf_model.named_parameters())
    unexpected = [
        key for key in found["unexpected_keys"] if key in own or not key.endswith(_HARMLESS) or key.endswith(".weight")
    ]
    trouble = {
        "missing from the files (transformers would fill them with random numbers)": found["missing_keys"],
        "in the files, but not in the model": unexpected,
        "of another shape than the config asks for": [
            f"{each[0]} {tuple(each[1])} for {tuple(each[2])}" if isinstance(each, tuple | list) else str(each)
            for each in found["mismatched_keys"]
        ],
    }
    said = told(trouble)
    if said or found.get("error_msgs"):
        raise CorruptFileError(
            f"The weights in {source!r} are not those of its config: {said or found['error_msgs'][0]}. What "
            f"was measured on it would be noise. Save the whole model again with hf_model.save_pretrained(…), from the "
            f"model itself, not from a wrapper (torch.compile's is model._orig_mod)."
        )


def _not_found(source: str, error: Exception) -> ModelError | CorruptFileError:
    said = first_line(error)
    if any(Path(source).glob("*.safetensors")):
        return CorruptFileError(f"The weights in {source!r} cannot be read ({said}). Copy or download them again.")
    if Path(source).is_dir():
        return ModelNotFoundError(
            f"The directory {source!r} holds no readable weights ({said}). Save the model there again."
        )
    return ModelNotFoundError(
        f"There is no directory {source!r}, and the hub gives no model of that name ({said}). Check the "
        f"spelling and the network; offline, download it elsewhere (hf download {source}) and pass the directory."
    )


def hf_tokenizer(source: str, *, local_files_only: bool = False) -> Any:
    """The source's own tokenizer, None where it has none (models of symbols)."""
    from transformers import AutoTokenizer

    directory = Path(source)
    if directory.is_dir() and not any(map(_of_a_tokenizer, directory.iterdir())):
        return None
    try:
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local_files_only)
        return _as_saved(source, found, local_files_only)
    except json.JSONDecodeError as error:
        raise CorruptFileError(
            f"The tokenizer of {source!r} cannot be read ({error}). Copy or download it again."
        ) from error
    except Exception as error:  # no common base: whatever a damaged tokenizer file makes tokenizers raise
        raise ModelNotFoundError(
            f"{source!r} has no tokenizer that can be loaded ({first_line(error)}). Pass one with tokenizer=."
        ) from error


def _as_saved(source: str, found: Any, local_files_only: bool) -> Any:
    """The tokenizer of the file, where transformers takes that of the model's family in its place.

    A tokenizer of one's own is saved under the name of no family; beside a Qwen2 model, transformers 5 reads it with
    the rules of Qwen2's, and the ids are others.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    named = get_tokenizer_config(source, local_files_only=local_files_only).get("tokenizer_class")
    if named not in ("PreTrainedTokenizerFast", "TokenizersBackend") or not getattr(found, "is_fast", False):
        return found
    own = PreTrainedTokenizerFast.from_pretrained(source, local_files_only=local_files_only)
    if type(found) is type(own) or same_ids(own, found):
        return found
    own.init_kwargs |= {"name_or_path": "", "add_bos_token": True}  # TransformerLens then does not reload it
    return own


def given_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer in memory, or the one of a directory or a hub id.

    Raises:
        UsageError: neither. ModelNotFoundError, CorruptFileError: nothing is there that can be read.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = hf_tokenizer(str(Path(tokenizer).expanduser()))
    if not callable(tokenizer) or not hasattr(tokenizer, "save_pretrained") or not hasattr(tokenizer, "get_vocab"):
        raise UsageError(
            f"tokenizer= is a {type(tokenizer).__name__}, which reads no text here. Give one of transformers, e.g. "
            f"AutoTokenizer.from_pretrained(…), or the directory where it is saved."
        )
    return tokenizer


def _of_a_tokenizer(file: Path) -> bool:
    named = "token" in file.name or file.name.startswith("vocab") or file.suffix in (".model", ".tiktoken")
    return named and file.suffix != ".py"


def adapter_directory(source: Any) -> Path | None:
    """Where the adapter is that a path or a hub id stands for, from which it is fetched; None of anything else."""
    if is_adapter(source):
        return Path(source)
    if not isinstance(source, str) or Path(source).exists() or source.startswith(("/", ".", "~")) or not source:
        return None
    return _fetched(source) if source.count("/") <= 1 and _on_hub(source) == {ADAPTER} else None


def tokenizer_beside(adapter: Path) -> Any:
    """The tokenizer that was saved with an adapter, None without one."""
    return hf_tokenizer(str(adapter)) if (adapter / "tokenizer_config.json").is_file() else None


def in_memory(source: Any, keep: bool, dtype: torch.dtype) -> tuple[str, Any]:
    """Name and model of a Hugging Face model in memory, copied unless ``keep``."""
    source = getattr(source, "_orig_mod", source)  # torch.compile's wrapper: what is compiled does not see hooks
    if hasattr(source, "get_base_model"):  # a PeftModel: the model inside, its adapters with it
        check_changes_weights(type(source).__name__, source)
        source = source.get_base_model()
    config = getattr(source, "config", None)
    if config is None or not isinstance(source, torch.nn.Module) or hasattr(source, "hook_dict"):
        raise UsageError(
            f"A {type(source).__name__} is neither a path, a hub id nor a Hugging Face model, so there is nothing to "
            f"load. A TransformerLens model needs no loading: use it as it is."
        )
    check_kind(config, type(source).__name__)
    check_there(source)
    hf_model: Any = source if keep else copy.deepcopy(source)
    _leave_inference(hf_model)
    if not getattr(config, "architectures", None):
        hf_model.config.architectures = [type(source).__name__]
    return str(getattr(config, "name_or_path", "") or type(source).__name__), _cast(hf_model, dtype)


def _leave_inference(hf_model: Any) -> None:
    """Copies in place of weights made in inference mode, which no gradient may pass through; tied ones stay tied."""
    copies: dict[int, tuple[Any, torch.nn.Parameter]] = {}  # with the original, so that its id is not given again
    for module in hf_model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_inference():
                copy_of = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
                module._parameters[name] = copies.setdefault(id(weight), (weight, copy_of))[1]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()


def _cast(hf_model: Any, dtype: torch.dtype) -> Any:
    """``hf_model.to(dtype)`` as ``from_pretrained(dtype=)`` does it: rotary frequencies stay float32, and exact.

    ``.to()`` rounds them as well, and then far positions are turned by wrong angles, also after a way back to float32.
    """
    computed = [
        (module, name, module._buffers[name])
        for module in hf_model.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers[name] is not None and module._buffers[name].is_floating_point()
    ]
    type(hf_model).to(hf_model, dtype)  # past accelerate's warning that a model it has spread shall not be moved
    for module, name, before in computed:
        if before.dtype == torch.float32:
            module._buffers[name] = before
        elif name.endswith("inv_freq") and getattr(module, "config", None) is not None:
            module._buffers[name] = getattr(type(module)(module.config), name).to(before.device, torch.float32)
    return hf_model


def tokenizer_of(hf_model: Any) -> Any:
    """The tokenizer of where a model in memory came from, if that is on this machine: nobody asked to download one."""
    name = str(getattr(hf_model.config, "name_or_path", "") or "")
    try:
        return hf_tokenizer(name, local_files_only=True) if name else None
    except (ModelNotFoundError, CorruptFileError):
        return None


def language_model(hf_model: Any) -> Any:
    """The language model alone of one that reads images or sound as well; any other model as it is.

    Raises:
        ModelError: transformers has no class for it alone, or its weights do not fit there.
    """
    if not reads_more_than_text(hf_model.config):
        return hf_model
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    config = copy.deepcopy(hf_model.config.get_text_config())
    kind: Any = CAUSAL.get(type(config), None)
    try:
        if kind is None or reads_more_than_text(config):
            raise LookupError(f"there is no causal language model of a {type(config).__name__} alone")
        weight = next(hf_model.parameters())
        alone = kind._from_config(config, dtype=weight.dtype, attn_implementation="eager")
        alone.load_state_dict(_text_weights(hf_model, alone), strict=True, assign=True)
        alone.tie_weights()
    except Exception as error:  # no common base: the parts of such models have no common layout
        raise ModelError(
            f"This {type(hf_model).__name__} reads more than text, and its language model could not be taken out alone "
            f"({first_line(error)}), so its text path cannot be proven. Load a text-only model of the family."
        ) from error
    alone.config.architectures = [type(alone).__name__]
    alone.generation_config = hf_model.generation_config
    return alone.to(weight.device).eval()


def _text_weights(hf_model: Any, alone: Any) -> dict[str, torch.Tensor]:
    """The weights of the decoder and of the unembedding, under the names that they have in ``alone``."""
    decoder, head = hf_model.get_decoder(), hf_model.get_output_embeddings()
    inner, outer = alone.get_decoder(), alone.get_output_embeddings()
    prefix = next(name for name, module in alone.named_modules() if module is inner)
    ending = next(name for name, module in alone.named_modules() if module is outer)
    taken = {f"{prefix}.{key}": value for key, value in decoder.state_dict().items()}
    return taken | {f"{ending}.{key}": value for key, value in head.state_dict().items()}


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
