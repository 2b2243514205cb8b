"""A Hugging Face model on a surface of TransformerLens, weights as they are: the ways around what breaks on the way."""

from __future__ import annotations

import copy
import json
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tl_em.errors import ModelError, first_line
from tl_em.models.tokenizing import same_ids


def reloadable(tokenizer: Any, stack: ExitStack) -> Any:
    """The tokenizer as read from a directory: TransformerLens reloads one that has a BOS token by its path."""
    from transformers import AutoTokenizer

    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="tl-em-"))
    tokenizer.save_pretrained(directory)
    try:
        found = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception:  # a class of its own, which transformers cannot find again; it raises what it likes
        found = None
    if found is not None and same_ids(tokenizer, found):
        return found
    kept = copy.deepcopy(tokenizer)
    kept.init_kwargs |= {"name_or_path": "", "add_bos_token": True}  # TransformerLens then does not reload it
    return kept


def check_built(surface: str) -> None:
    """Raise ``ModelError`` where this TransformerLens does not have the surface."""
    if surface == "hooked" and not _has_hooked():
        raise ModelError(
            "This TransformerLens has no HookedTransformer (it was removed in version 4), so surface='hooked' cannot "
            "be built. Use surface='bridge', or install 'transformer-lens<4'."
        )


def _has_hooked() -> bool:
    return find_spec("transformer_lens.HookedTransformer") is not None


def as_bridge(name: str, hf_model: Any, tokenizer: Any, dtype: torch.dtype, device: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    stand_in = tokenizer if tokenizer is not None else _no_tokenizer()
    kind, options = type(hf_model).__name__, {"dtype": dtype, "device": device, "trust_remote_code": False}
    try:
        model = TransformerBridge.boot_transformers(name, hf_model=hf_model, tokenizer=stand_in, **options)
    except Exception as error:  # no common base: an architecture without an adapter, a field that it does not expect
        other = "surface='hooked', or " if _has_hooked() else ""
        raise ModelError(
            f"TransformerLens cannot build a TransformerBridge of this {kind} ({type(error).__name__}: "
            f"{first_line(error)}). Try {other}another version of TransformerLens."
        ) from error
    if tokenizer is None:
        model.tokenizer = None
    return model


def _no_tokenizer() -> Any:
    """Given none, TransformerLens goes looking for one, and transformers invents one with an empty vocabulary."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), eos_token="<unk>"
    )


def as_hooked(name: str, hf_model: Any, tokenizer: Any, dtype: torch.dtype, device: Any) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    with tempfile.TemporaryDirectory(prefix="tl-em-") as directory:
        raw = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
        try:
            fields = _hooked_fields(hf_model.config, directory) | {"model_name": name, "tokenizer_name": None}
            fields |= {"init_weights": False, "dtype": dtype, "device": str(device)}
            cfg = HookedTransformerConfig.from_dict(fields)
            model = HookedTransformer(cfg, tokenizer=tokenizer)
            weights = get_pretrained_state_dict(directory, cfg, hf_model=hf_model, dtype=dtype)
            model.load_and_process_state_dict(weights, **raw)
        except Exception as error:  # no common base: it assumes fields and modules that an architecture may lack
            raise ModelError(
                f"TransformerLens cannot build a HookedTransformer of this {hf_model.config.architectures[0]} "
                f"({first_line(error)}). Try surface='bridge'."
            ) from error
    return model


def to_hooked_weights(hf_model: Any, cfg: Any) -> dict[str, torch.Tensor]:
    """A Hugging Face model's weights under a HookedTransformer's names, as TransformerLens converts them."""
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    with tempfile.TemporaryDirectory(prefix="tl-em-") as directory:
        return get_pretrained_state_dict(directory, cfg, hf_model=hf_model, dtype=cfg.dtype)


def _hooked_fields(config: Any, directory: str) -> dict[str, Any]:
    """TransformerLens's configuration of a Hugging Face one. TransformerLens takes the architecture from the *path*
    where that contains a family's name, so the config is put into a directory with a neutral one."""
    from transformer_lens.loading_from_pretrained import convert_hf_model_config

    if config.architectures[0] == "Gemma2ForCausalLM":  # known there by published names only
        return _gemma2_fields(config)
    record = config.to_dict()
    if "n_positions" in record:  # TransformerLens reads GPT-2's context under a name that newer configs lack
        record.setdefault("n_ctx", record["n_positions"])
    (Path(directory) / "config.json").write_text(json.dumps(record, default=str), encoding="utf-8")
    fields = convert_hf_model_config(directory)
    head = getattr(config, "head_dim", None)  # widths that TransformerLens takes to be the usual multiple of d_model
    given = {"d_mlp": getattr(config, "n_inner", None), "d_head": head}
    given["rotary_dim"] = head if "rotary_dim" in fields else None
    return fields | {name: width for name, width in given.items() if width}


def _gemma2_fields(config: Any) -> dict[str, Any]:
    return {
        "original_architecture": "Gemma2ForCausalLM",
        "d_model": config.hidden_size,
        "d_head": config.head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.rms_norm_eps,
        "d_vocab": config.vocab_size,
        "act_fn": config.hidden_activation,
        "initializer_range": config.initializer_range,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_base": (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0),
        "use_attn_scale": True,
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "window_size": config.sliding_window,
        "use_local_attn": True,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
        "gated_mlp": True,
        "final_rms": True,
        "use_normalization_before_and_after": True,
    }


def advice(model: Any, hf_model: Any) -> str:
    """What to do where a surface turns out to compute something else than the model that it was built from."""
    if any(hasattr(module, "merged_adapters") for module in hf_model.modules()):
        return (
            "TransformerLens copies weights without their adapter, a Bridge where it splits a joint matrix. Merge a "
            "copy: em.load_model(peft_model.merge_and_unload())."
        )
    other = "hooked" if hasattr(model, "original_model") and _has_hooked() else "bridge"
    tried = "" if other == "bridge" and hasattr(model, "original_model") else f"surface={other!r}, or "
    return f"TransformerLens misreads its config. Try {tried}another version of TransformerLens."
