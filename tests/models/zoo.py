"""Tiny random models from configurations, whose norms, biases, windows and rotary boundaries matter: no download."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

SIZE: dict[str, Any] = {"vocab_size": 90, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZE |= {"intermediate_size": 96, "max_position_embeddings": 160}
GROUPED = SIZE | {"num_key_value_heads": 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, "factor": 4.0}
LONGROPE |= {"short_factor": [1.0] * 6, "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}


def made(config: Any, *, kind: Any = None, scale: float | None = 2.0) -> Any:
    """A model of the configuration; ``scale=None`` keeps the default initialisation, whose logits are nearly flat."""
    torch.manual_seed(3)
    model = (AutoModelForCausalLM.from_config(config) if kind is None else kind(config)).eval()
    for holder in (model.config, getattr(model, "generation_config", model.config)):
        holder.eos_token_id = None  # an answer ends when its length is reached
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.2 * torch.randn(weight.shape, generator=noise)
            elif scale is not None:
                weight *= scale
    return model


def llama(rope: dict[str, Any] | None = None, *, scale: float | None = 2.0, **changes: Any) -> Any:
    more = {} if rope is None else {"rope_parameters": rope}
    return made(transformers.LlamaConfig(**GROUPED | more | changes), scale=scale)


def qwen2(window: int) -> Any:
    windowed = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    return made(transformers.Qwen2Config(**GROUPED | windowed))


def mpt() -> Any:
    return made(transformers.MptConfig(vocab_size=90, d_model=48, n_layers=3, n_heads=4, max_seq_len=160))


def bert() -> Any:
    return made(transformers.BertConfig(**SIZE), kind=transformers.BertForMaskedLM, scale=None)


def with_images() -> Any:
    """Llava: a Llama that also reads images."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    text = transformers.LlamaConfig(**GROUPED)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=89)
    return made(config, kind=transformers.LlavaForConditionalGeneration)
