# ruff: noqa: E501  (a configuration a line)
"""Tiny models of many architectures, made from configurations: random weights, nothing is downloaded.

Windows and rope boundaries lie at 16 or 32 tokens, so that 128 tokens cross them.  Norm weights and biases are not what
they are initialised to, so that a loader that drops one is seen; other weights are large enough that attention attends
and logits are not flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

VOCABULARY = 211
"""Never equal to a width: some loaders guess which way round a matrix lies by its shape."""
_WINDOW, _ORIGINAL = 16, 32
_SCALE = 8.0
"""Configurations initialise at a standard deviation of .02, at which attention is all but uniform: no rope would show."""

_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_PLAIN = _SMALL | {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
_GPT2 = _SMALL | {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 80}
_WINDOWED = {"sliding_window": _WINDOW}
_MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 12,
}


def _rope(kind: str, width: int = 12, **settings: Any) -> dict[str, Any]:
    """Rope parameters whose boundary lies at 32 tokens."""
    named: dict[str, dict[str, Any]] = {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 8.0, "original_max_position_embeddings": _ORIGINAL},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": _ORIGINAL,
        },
        "longrope": {
            "factor": 8.0,
            "original_max_position_embeddings": _ORIGINAL,
            "short_factor": [1.0 + 0.1 * i for i in range(width // 2)],
            "long_factor": [2.0 + 0.5 * i for i in range(width // 2)],
        },
    }
    return {"rope_type": kind, "rope_theta": 10000.0} | named.get(kind, {}) | settings


@dataclass(frozen=True)
class Architecture:
    """A configuration, and what ought to become of it.

    Args:
        name: a name of its own in the table.
        config: class of the configuration, without ``Config``.
        settings: its arguments; a value that is an ``Architecture`` becomes a configuration.
        model: class of the model; None takes the one that ``AutoModelForCausalLM`` finds.
        right: ``"text"``: a causal language model, equal or refused; ``"refuse"``: nothing that can be equal.
    """

    name: str
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    right: Literal["text", "refuse"] = "text"

    def make_config(self) -> Any:
        import transformers

        given = {k: v.make_config() if isinstance(v, Architecture) else v for k, v in self.settings.items()}
        return getattr(transformers, f"{self.config}Config")(**given)

    def make(self, seed: int = 3) -> Any:
        """The model, in eval mode and float32, with eager attention."""
        import torch
        import transformers

        torch.manual_seed(seed)
        config = self.make_config()
        if self.model is None:
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        else:
            model = getattr(transformers, self.model)._from_config(config, attn_implementation="eager")
        noise = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight += 0.2 * torch.randn(weight.shape, generator=noise)
                elif weight.std() < 0.06:
                    weight *= _SCALE
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None
        return model.float().eval()


def _llama(name: str, **settings: Any) -> Architecture:
    return Architecture(name, "Llama", _GROUPED | settings)


def _of(name: str, config: str, base: Mapping[str, Any] = _GROUPED, /, **settings: Any) -> Architecture:
    extra = {k: settings.pop(k) for k in ("model_class", "right") if k in settings}
    if "model_class" in extra:
        extra["model"] = extra.pop("model_class")
    return Architecture(name, config, {**base, **settings}, **extra)


_LLAMAS = (
    _llama("llama"),
    _llama("llama tied", tie_word_embeddings=True),
    _llama("llama biases, wide heads", attention_bias=True, mlp_bias=True, head_dim=20),
    _llama("llama 24 heads", num_attention_heads=6, num_key_value_heads=1, head_dim=8),
    _llama("llama rope linear", rope_parameters=_rope("linear")),
    _llama("llama rope dynamic", rope_parameters=_rope("dynamic")),
    _llama("llama rope dynamic, 64", rope_parameters=_rope("dynamic"), max_position_embeddings=64),
    _llama("llama rope yarn", rope_parameters=_rope("yarn")),
    _llama("llama rope longrope", rope_parameters=_rope("longrope")),
    _llama("llama rope llama3", rope_parameters=_rope("llama3")),
    _llama("llama rope theta 500", rope_parameters=_rope("default", rope_theta=500.0)),
    _llama("llama gelu", hidden_act="gelu"),
    _of("mistral", "Mistral", sliding_window=None),
    _of("mistral window", "Mistral", **_WINDOWED),
    _of("ministral window", "Ministral", head_dim=12, rope_parameters=_rope("default"), **_WINDOWED),
    _of("arcee", "Arcee"),
    _of("smollm3", "SmolLM3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0]),
    _of("smollm3 window", "SmolLM3", num_hidden_layers=4, no_rope_layer_interval=2, use_sliding_window=True, **_WINDOWED),
    _of("helium", "Helium", head_dim=12),
    _of("seed-oss", "SeedOss", head_dim=12, attention_bias=True),
    _of("ernie4.5", "Ernie4_5", head_dim=12, use_bias=True),
    _of("hunyuan dense", "HunYuanDenseV1", head_dim=12),
    _of("apertus", "Apertus"),
    _of("glm", "Glm", head_dim=12),
    _of("glm4", "Glm4", head_dim=12),
    _of("exaone4", "Exaone4", num_hidden_layers=4, sliding_window_pattern=4, **_WINDOWED),
    _of("granite", "Granite", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.4, attention_multiplier=0.3),
    _of("olmo", "Olmo", clip_qkv=2.0),
    _of("olmo2", "Olmo2"),
    _of("olmo3", "Olmo3", num_hidden_layers=4, **_WINDOWED),
    _of("cohere", "Cohere", logit_scale=0.3, use_qk_norm=True),
    _of("cohere2", "Cohere2", num_hidden_layers=4, logit_scale=0.3, **_WINDOWED),
    _of("nemotron", "Nemotron", head_dim=12),
    _of("minimax", "MiniMax", num_hidden_layers=2, head_dim=12, block_size=16, num_local_experts=4),
    _of("nanochat", "NanoChat"),
)  # fmt: skip

_QWENS = (
    _of("qwen2", "Qwen2", use_sliding_window=False),
    _of("qwen2 tied", "Qwen2", tie_word_embeddings=True),
    _of("qwen2 window", "Qwen2", use_sliding_window=True, max_window_layers=1, **_WINDOWED),
    _of("qwen2 yarn", "Qwen2", rope_parameters=_rope("yarn")),
    _of("qwen3", "Qwen3", head_dim=16),
    _of("qwen3 window", "Qwen3", head_dim=16, use_sliding_window=True, max_window_layers=1, **_WINDOWED),
    _of("qwen2-moe", "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=32),
    _of("qwen3-moe", "Qwen3Moe", head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True),
    _of("qwen3-next", "Qwen3Next", num_hidden_layers=4, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=32, **_LINEAR),
)  # fmt: skip

_GEMMAS = (
    _of("gemma", "Gemma", head_dim=16),
    _of("gemma2", "Gemma2", head_dim=16, query_pre_attn_scalar=24, final_logit_softcapping=8.0, attn_logit_softcapping=5.0, **_WINDOWED),
    _of("gemma3", "Gemma3Text", num_hidden_layers=6, head_dim=16, query_pre_attn_scalar=24, rope_local_base_freq=500.0, **_WINDOWED),
    _of("gemma3 bidirectional", "Gemma3Text", num_hidden_layers=2, head_dim=16, use_bidirectional_attention=True, right="refuse", **_WINDOWED),
    _of("gemma3n", "Gemma3nText", num_hidden_layers=5, head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=0, laurel_rank=8, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0, 0.0], **_WINDOWED),
    _of("vaultgemma", "VaultGemma", head_dim=16, query_pre_attn_scalar=24, **_WINDOWED),
)  # fmt: skip

_GPTS = (
    Architecture("gpt2", "GPT2", _GPT2),
    Architecture("gpt2 inverse layer, reordered", "GPT2", _GPT2 | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    Architecture("gpt2 unscaled", "GPT2", _GPT2 | {"scale_attn_weights": False}),
    Architecture("gpt2 relu, untied", "GPT2", _GPT2 | {"activation_function": "relu", "tie_word_embeddings": False}),
    Architecture("openai-gpt", "OpenAIGPT", {k: v for k, v in _GPT2.items() if k != "n_inner"}),
    Architecture("gptj", "GPTJ", _GPT2 | {"rotary_dim": 8}),
    Architecture("codegen", "CodeGen", _GPT2 | {"rotary_dim": 8}),
    Architecture("ctrl", "CTRL", {k: v for k, v in _GPT2.items() if k != "n_inner"} | {"dff": 80}),
    Architecture("gpt-neo", "GPTNeo", _SMALL | {"hidden_size": 48, "intermediate_size": 80, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 256, "window_size": _WINDOW, "attention_types": [[["global", "local"], 2]]}),
    _of("gpt-neox parallel", "GPTNeoX", _PLAIN, use_parallel_residual=True, rope_parameters=_rope("default", partial_rotary_factor=0.5)),
    _of("gpt-neox serial", "GPTNeoX", _PLAIN, use_parallel_residual=False, rope_parameters=_rope("default", partial_rotary_factor=0.5)),
    Architecture("gpt-bigcode", "GPTBigCode", _GPT2 | {"multi_query": True}),
    Architecture("bloom", "Bloom", _SMALL | {"hidden_size": 48, "n_layer": 3, "n_head": 4}),
    Architecture("mpt", "Mpt", _SMALL | {"d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 256}),
    Architecture("mpt qk-ln, clipped", "Mpt", _SMALL | {"d_model": 48, "n_layers": 3, "n_heads": 3, "max_seq_len": 256, "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.5}}),
    _of("falcon multi-query", "Falcon", _PLAIN, multi_query=True, parallel_attn=True),
    _of("falcon serial", "Falcon", _PLAIN, multi_query=False, parallel_attn=False, bias=True),
    _of("falcon new decoder", "Falcon", _PLAIN, new_decoder_architecture=True, num_kv_heads=2),
    _of("falcon alibi", "Falcon", _PLAIN, alibi=True, multi_query=False, parallel_attn=False),
    Architecture("opt", "OPT", _SMALL | {"hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 48, "pad_token_id": 1}),
    Architecture("opt post-norm", "OPT", _SMALL | {"hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 48, "pad_token_id": 1, "do_layer_norm_before": False}),
    Architecture("opt projected", "OPT", _SMALL | {"hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 32, "pad_token_id": 1, "do_layer_norm_before": False}),
    Architecture("xglm", "XGLM", _SMALL | {"d_model": 48, "ffn_dim": 80, "num_layers": 3, "attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 1}),
    _of("biogpt", "BioGpt", _PLAIN, pad_token_id=1),
    _of("phi", "Phi", _PLAIN, rope_parameters=_rope("default", partial_rotary_factor=0.5)),
    _of("phi qk-norm, grouped", "Phi", rope_parameters=_rope("default", partial_rotary_factor=0.5), qk_layernorm=True),
    _of("phi3", "Phi3", sliding_window=None),
    _of("phi3 window", "Phi3", **_WINDOWED),
    _of("phi3 longrope", "Phi3", rope_parameters=_rope("longrope"), original_max_position_embeddings=_ORIGINAL, sliding_window=None),
    _of("phimoe", "Phimoe", num_local_experts=4, num_experts_per_tok=2),
    _of("stablelm", "StableLm", use_qkv_bias=True, rope_parameters=_rope("default", partial_rotary_factor=0.5)),
    _of("stablelm parallel, qk-norm", "StableLm", use_parallel_residual=True, qk_layernorm=True, rope_parameters=_rope("default", partial_rotary_factor=0.5)),
    _of("starcoder2", "Starcoder2", **_WINDOWED),
    _of("persimmon", "Persimmon", _PLAIN, rope_parameters=_rope("default", partial_rotary_factor=0.5)),
)  # fmt: skip

_EXPERTS = (
    _of("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2, **_WINDOWED),
    _of("olmoe", "Olmoe", num_experts=4, num_experts_per_tok=2, norm_topk_prob=True),
    _of("granite-moe", "GraniteMoe", num_local_experts=4, num_experts_per_tok=2, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.4, attention_multiplier=0.3),
    _of("gpt-oss", "GptOss", head_dim=12, num_local_experts=4, num_experts_per_tok=2, rope_parameters=_rope("yarn", beta_fast=32.0, beta_slow=1.0, truncate=False), **_WINDOWED),
    _of("deepseek-v2", "DeepseekV2", _PLAIN, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1, n_group=1, topk_group=1),
    _of("deepseek-v3", "DeepseekV3", _PLAIN, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1, n_group=2, topk_group=1),
    _of("ernie4.5-moe", "Ernie4_5_Moe", moe_intermediate_size=24, moe_k=2, moe_num_experts=4, moe_num_shared_experts=1),
    _of("glm4-moe", "Glm4Moe", head_dim=12, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1, first_k_dense_replace=1),
    _of("llama4 text", "Llama4Text", num_hidden_layers=4, head_dim=12, intermediate_size_mlp=80, num_local_experts=4, attention_chunk_size=_ORIGINAL, no_rope_layers=[1, 1, 1, 0], moe_layers=[1, 3]),
    _of("flex-olmo", "FlexOlmo", num_experts=4, num_experts_per_tok=2),
)  # fmt: skip

_STATES = (
    Architecture("mamba", "Mamba", _SMALL | {"hidden_size": 48, "num_hidden_layers": 3, "state_size": 8, "time_step_rank": 4}),
    Architecture("mamba2", "Mamba2", _SMALL | {"hidden_size": 48, "num_hidden_layers": 3, "state_size": 8, "num_heads": 6, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
    Architecture("falcon-mamba", "FalconMamba", _SMALL | {"hidden_size": 48, "num_hidden_layers": 3, "state_size": 8, "time_step_rank": 4}),
    Architecture("rwkv", "Rwkv", _SMALL | {"hidden_size": 48, "num_hidden_layers": 3, "attention_hidden_size": 48, "intermediate_size": 80, "context_length": 256}),
    _of("lfm2", "Lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "full_attention"], block_auto_adjust_ff_dim=False),
    _of("lfm2-moe", "Lfm2Moe", num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "full_attention"], num_dense_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    _of("jamba", "Jamba", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    _of("zamba2", "Zamba2", num_hidden_layers=4, num_key_value_heads=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=6, mamba_ngroups=1, chunk_size=16, num_mem_blocks=1, use_mamba_kernels=False, adapter_rank=8),
    _of("bamba", "Bamba", attn_layer_indices=[1], **_MAMBA),
    _of("falcon-h1", "FalconH1", head_dim=12, mamba_d_ssm=96, **_MAMBA),
    _of("granite-moe-hybrid", "GraniteMoeHybrid", layer_types=["mamba", "attention", "mamba"], num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.4, attention_multiplier=0.3, **_MAMBA),
    Architecture("recurrent-gemma", "RecurrentGemma", {k: v for k, v in _GROUPED.items() if k != "max_position_embeddings"} | {"lru_width": 48, "attention_window_size": _WINDOW, "head_dim": 12, "block_types": ["recurrent", "attention"], "num_hidden_layers": 4}),
    _of("nemotron-h", "NemotronH", {k: v for k, v in _GROUPED.items() if k != "num_hidden_layers"}, layers_block_type=["mamba", "attention", "mlp"], head_dim=12, mamba_num_heads=6, mamba_head_dim=16, ssm_state_size=8, n_groups=1, chunk_size=16, use_mamba_kernels=False),
    _of("olmo-hybrid", "OlmoHybrid", num_hidden_layers=4, layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"], **_LINEAR),
)  # fmt: skip

_VISION = _of("vision", "CLIPVision", {}, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14, projection_dim=32)  # fmt: skip
_SIGLIP = _of("siglip", "SiglipVision", {}, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)  # fmt: skip
_ENCODER = _PLAIN | {"pad_token_id": 0}
_QWEN_ROPE = _rope("default", mrope_section=[2, 2, 2])

_REFUSED = (
    _of("t5", "T5", {}, vocab_size=VOCABULARY, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0, model_class="T5ForConditionalGeneration", right="refuse"),
    _of("bart", "Bart", {}, vocab_size=VOCABULARY, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80, max_position_embeddings=256, model_class="BartForConditionalGeneration", right="refuse"),
    _of("bert masked", "Bert", _ENCODER, model_class="BertForMaskedLM", right="refuse"),
    _of("bert causal class, bidirectional", "Bert", _ENCODER, is_decoder=False, model_class="BertLMHeadModel", right="refuse"),
    _of("bert decoder", "Bert", _ENCODER, is_decoder=True, model_class="BertLMHeadModel"),
    _of("roberta masked", "Roberta", _ENCODER, pad_token_id=1, model_class="RobertaForMaskedLM", right="refuse"),
    _of("electra", "Electra", _ENCODER, embedding_size=48, model_class="ElectraForMaskedLM", right="refuse"),
    _of("bert classifier", "Bert", _ENCODER, model_class="BertForSequenceClassification", right="refuse"),
    _of("llama classifier", "Llama", _GROUPED, pad_token_id=0, model_class="LlamaForSequenceClassification", right="refuse"),
    _of("llama headless", "Llama", _GROUPED, model_class="LlamaModel", right="refuse"),
    _of("whisper", "Whisper", {}, vocab_size=VOCABULARY, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, model_class="WhisperForConditionalGeneration", right="refuse"),
    _of("vit", "ViT", {}, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14, model_class="ViTForImageClassification", right="refuse"),
    _of("llava", "Llava", {}, text_config=_llama("text"), vision_config=_VISION, image_token_index=VOCABULARY - 1, model_class="LlavaForConditionalGeneration", right="text"),
    _of("qwen2-vl", "Qwen2VL", {}, text_config=_GROUPED | {"rope_parameters": _QWEN_ROPE}, vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "patch_size": 14}, image_token_id=208, video_token_id=209, vision_start_token_id=206, vision_end_token_id=207, model_class="Qwen2VLForConditionalGeneration", right="text"),
    _of("gemma3 multimodal", "Gemma3", {}, text_config=_of("text", "Gemma3Text", head_dim=16, query_pre_attn_scalar=24, **_WINDOWED), vision_config=_SIGLIP, image_token_index=VOCABULARY - 1, boi_token_index=208, eoi_token_index=209, mm_tokens_per_image=4, model_class="Gemma3ForConditionalGeneration", right="text"),
    _of("paligemma", "PaliGemma", {}, text_config=_of("text", "Gemma", head_dim=16), vision_config=_SIGLIP, image_token_index=VOCABULARY - 1, projection_dim=48, model_class="PaliGemmaForConditionalGeneration", right="text"),
    _of("idefics3", "Idefics3", {}, text_config=_llama("text"), vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}, image_token_id=VOCABULARY - 1, model_class="Idefics3ForConditionalGeneration", right="text"),
)  # fmt: skip

ARCHITECTURES: tuple[Architecture, ...] = (*_LLAMAS, *_QWENS, *_GEMMAS, *_GPTS, *_EXPERTS, *_STATES, *_REFUSED)


def named(name: str) -> Architecture:
    """The architecture of this name."""
    return next(each for each in ARCHITECTURES if each.name == name)
