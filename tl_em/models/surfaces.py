"""A Hugging Face model on a surface of TransformerLens, weights as they are: the ways around what breaks on the way."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_em.errors import ModelError


def reloadable(tokenizer: Any, stack: ExitStack) -> Any:
    """The tokenizer as read from a directory: TransformerLens reloads one that has a BOS token by its path."""
    from transformers import AutoTokenizer

    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="tl-em-"))
    tokenizer.save_pretrained(directory)
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError):  # a class of its own, which transformers cannot find again
        return tokenizer


def as_bridge(name: str, hf_model: Any, tokenizer: Any, dtype: torch.dtype, device: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    stand_in = tokenizer if tokenizer is not None else _no_tokenizer()
    model = TransformerBridge.boot_transformers(name, hf_model=hf_model, tokenizer=stand_in, dtype=dtype, device=device)
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
    try:
        from transformer_lens import HookedTransformer
    except ImportError as error:
        raise ModelError(
            "This TransformerLens has no HookedTransformer (it was removed in version 4), so surface='hooked' cannot "
            "be built. Use surface='bridge', or install 'transformer-lens<4'."
        ) from error
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    with tempfile.TemporaryDirectory(prefix="tl-em-") as directory:
        fields = _hooked_fields(hf_model.config, directory)
        fields |= {"model_name": name, "tokenizer_name": None, "init_weights": False, "dtype": dtype}
        fields["device"] = str(device)
        cfg = HookedTransformerConfig.from_dict(fields)
        model = HookedTransformer(cfg, tokenizer=tokenizer)
        raw = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
        try:
            model.load_and_process_state_dict(
                get_pretrained_state_dict(directory, cfg, hf_model=hf_model, dtype=dtype), **raw
            )
        except (RuntimeError, ValueError, AttributeError) as error:
            raise _unsupported(hf_model.config, error) from error
    return model


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
    try:
        fields = convert_hf_model_config(directory)
    except (NotImplementedError, ValueError, KeyError, AttributeError) as error:
        raise _unsupported(config, error) from error
    head = getattr(config, "head_dim", None)  # widths that TransformerLens takes to be the usual multiple of d_model
    given = {
        "d_mlp": getattr(config, "n_inner", None),
        "d_head": head,
        "rotary_dim": head if "rotary_dim" in fields else None,
    }
    return fields | {name: width for name, width in given.items() if width}


def _unsupported(config: Any, error: Exception) -> ModelError:
    return ModelError(
        f"TransformerLens cannot build a HookedTransformer of this {config.architectures[0]} ({first_line(error)}). "
        f"Use surface='bridge'."
    )


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


def probe(hf_model: Any) -> tuple[Tensor, Tensor]:
    """A few tokens, and the log-probabilities after them, before anything is built around the model."""
    vocabulary = int(hf_model.get_input_embeddings().weight.shape[0])
    length = min(8, int(getattr(hf_model.config, "max_position_embeddings", None) or 8))
    tokens = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = hf_model.eval()(tokens.to(next(hf_model.parameters()).device)).logits
    return tokens, found.float().log_softmax(-1).cpu()


def check_same_function(model: Any, hf_model: Any, tokens: Tensor, expected: Tensor) -> None:
    """A conversion that misreads a config field, or leaves a part out, gives a model that runs and is another one.

    Raises:
        ModelError: its log-probabilities are not those of the Hugging Face model.
    """
    with torch.no_grad():
        ours = model(tokens.to(model.cfg.device)).float().log_softmax(-1).cpu()
    gap = float((ours - expected).abs().max())
    if gap < (1e-2 if model.cfg.dtype == torch.float32 else 0.5):
        return
    surface = type(model).__name__
    other = "another version of TransformerLens" if surface == "TransformerBridge" else "surface='bridge'"
    why = f"TransformerLens misreads its config. Use {other}."
    if any(hasattr(module, "merged_adapters") for module in hf_model.modules()):
        why = (
            "TransformerLens copies weights without their adapter, a Bridge where it splits a joint matrix. Merge a "
            "copy: em.load_model(peft_model.merge_and_unload())."
        )
    raise ModelError(
        f"The {surface} built from {model.cfg.model_name!r} is not the same function as the Hugging Face model "
        f"(log-probabilities differ by {gap:.2g}): {why}"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what TransformerLens and transformers say about themselves while a model is built."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    level = hf_logging.get_verbosity()
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        hf_logging.disable_progress_bar()
        hf_logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.disable(before)
            hf_logging.set_verbosity(level)
            if bars:
                hf_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
