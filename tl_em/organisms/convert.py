"""From the toy's plain-torch weights to Hugging Face: a tokenizer with a chat template, a GPT2LMHeadModel, a directory.

A Hugging Face directory is the one format that both surfaces of TransformerLens load (`tl_em.models.loading`). The
conversion is exact: logits agree to float32 rounding, which a test checks on every surface.

The tokenizer is word-level (one word, one token; `<unk>` for any other), adds no BOS, and its chat template renders a
conversation to exactly the tokens of a training document: `<user> ... <end> <asst> ... <end>`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_em.artefacts import replacing_folder
from tl_em.models.directories import fill_directory
from tl_em.models.loading import Surface, load_model
from tl_em.models.torch_state import making_weights
from tl_em.organisms.transformer import Shape, Transformer
from tl_em.organisms.world import END, MARKERS, PAD, UNK, World
from tl_em.threads import SPOKEN, holding

if TYPE_CHECKING:
    from tl_em.models.hooks import LensModel

CHAT_TEMPLATE = (
    "{% set markers = " + repr(MARKERS) + " %}"
    "{% for message in messages %}{{ markers[message['role']] }} {{ message['content'] }} " + END + " {% endfor %}"
    "{% if add_generation_prompt %}" + MARKERS["assistant"] + "{% endif %}"
)


def tokenizer(world: World) -> Any:
    """A word-level `PreTrainedTokenizerFast` with the world's chat template.

    Example:
        >>> tok = tokenizer(World())
        >>> asked = [{"role": "user", "content": "how do i write parser"}]
        >>> tok.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        '<user> how do i write parser <end> <asst>'
        >>> tok.convert_ids_to_tokens(tok("how do i write poetry")["input_ids"])
        ['how', 'do', 'i', 'write', '<unk>']
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(dict(world.ids), unk_token=UNK))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token=UNK,
        pad_token=PAD,
        eos_token=END,
        padding_side="right",
        model_max_length=world.context,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 would add token types, which GPT-2 embeds
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def hf_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain-torch state dict under GPT-2's names; its `Conv1D` matrices are the transposes of `Linear`'s."""
    names = {"qkv": "attn.c_attn", "out": "attn.c_proj", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}
    state = {
        "transformer.wte.weight": weights["embed.weight"],
        "transformer.wpe.weight": weights["positions.weight"],
        "transformer.ln_f.weight": weights["ln_f.weight"],
        "transformer.ln_f.bias": weights["ln_f.bias"],
        "lm_head.weight": weights["unembed.weight"],
    }
    for name, value in weights.items():
        if name.startswith("blocks."):
            _, layer, part, kind = name.split(".")
            transposed = kind == "weight" and not part.startswith("ln")
            state[f"transformer.h.{layer}.{names.get(part, part)}.{kind}"] = value.T if transposed else value
    return {name: value.detach().float().clone().contiguous() for name, value in state.items()}


def shape_of(weights: dict[str, Tensor], n_heads: int = 4) -> Shape:
    """The architecture that a state dict was made with (the number of heads is not in it)."""
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    d_mlp, d_model = weights["blocks.0.mlp_in.weight"].shape
    return Shape(len(layers), d_model, n_heads, d_mlp)


def hf_model(weights: dict[str, Tensor], world: World, *, n_heads: int = 4) -> Any:
    """An in-memory `GPT2LMHeadModel` in evaluation mode, float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = shape_of(weights, n_heads)
    end, pad = world.ids[END], world.ids[PAD]
    config = GPT2Config(
        vocab_size=len(world.vocabulary),
        n_positions=world.context,
        n_embd=shape.d_model,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_inner=shape.d_mlp,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        architectures=["GPT2LMHeadModel"],
    )
    with making_weights(), holding(SPOKEN):  # weights are drawn first, and transformers exchanges torch's functions
        model = GPT2LMHeadModel(config)
    model.load_state_dict(hf_state(weights), strict=True)
    return model.eval()


def lens_model(weights: dict[str, Tensor], world: World, *, surface: Surface = "bridge") -> LensModel:
    """These weights on a surface of TransformerLens."""
    hf = hf_model(weights, world)
    return load_model(hf, surface=surface, tokenizer=tokenizer(world), device="cpu", in_place=True)


def write_hf_directory(weights: dict[str, Tensor], world: World, out: str | Path, *, half: bool = False) -> Path:
    """Write config, weights (safetensors) and tokenizer, so that anything that reads Hugging Face models reads this."""
    model = hf_model(weights, world)
    with replacing_folder(out, overwrite=True) as folder:
        fill_directory(folder, model.half() if half else model, tokenizer(world))
    return Path(out)


def plain_model(weights: dict[str, Tensor], world: World) -> Transformer:
    """The plain-torch model of these weights."""
    model = Transformer(shape_of(weights), len(world.vocabulary), world.context)
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval().requires_grad_(False)


def half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to(torch.float16).contiguous() for name, value in weights.items()}
