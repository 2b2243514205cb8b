"""Attention patterns of one layer, through circuitsvis, made safe: nothing is asked of the network, tokens stay text.

circuitsvis's own display asks the network at every showing, and a token that holds ``</script>`` ends its script and
runs what follows. Here its local source stands in a sandboxed frame under a Content-Security-Policy that refuses every
request, and ``<`` in the tokens is a look-alike, because they are written into a script. Control: a pattern says where
a head reads, not that what it reads matters; for that, see the heads' nodes in a graph.

Source: https://github.com/TransformerLensOrg/CircuitsVis
"""

from __future__ import annotations

import json
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.errors import UsageError
from tl_em.graph.targets import text_of
from tl_em.graph.view import frame
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.prompts import EncodedPrompt, Prompt, encode

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def attention_pattern(
    model: LensModel, prompt: Prompt | EncodedPrompt, layer: int
) -> Float[Tensor, "head query key"]:
    """Attention pattern of every head of a layer on one prompt, float32.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt: text, chat or encoded prompt.
        layer: block.

    Raises:
        UsageError: no such layer.
    """
    if not 0 <= layer < int(model.cfg.n_layers):
        raise UsageError(f"layer={layer}: the model has layers 0 to {int(model.cfg.n_layers) - 1}; give one of these")
    found: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:
        found.append(x.detach()[0].float().cpu())

    ids = encode(model, [prompt])[0].ids
    with torch.no_grad(), hooked(model, [(f"blocks.{layer}.attn.hook_pattern", keep)]):
        model(torch.tensor([ids]))
    return found[-1]


def attention_view(model: LensModel, prompt: Prompt | EncodedPrompt, layer: int, *, height: int = 520) -> Any:
    """Attention patterns of one layer as a frame for a notebook.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt: text, chat or encoded prompt.
        layer: block; height: of the frame in pixels.

    Returns:
        markup that a notebook shows (``__html__`` and ``_repr_html_``).

    Raises:
        UsageError: no such layer, or circuitsvis is not installed.
    """
    from markupsafe import Markup

    try:
        from circuitsvis.attention import attention_heads
    except ImportError as error:
        raise UsageError("circuitsvis draws attention patterns and is not here: pip install 'tl_em[viz]'") from error
    pattern = attention_pattern(model, prompt, layer)
    tokens = [_inert(text_of(model, token)) for token in encode(model, [prompt])[0].ids]
    source = attention_heads(attention=pattern, tokens=tokens).local_src
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    document = f"<!doctype html><html lang=en><meta charset=utf-8>{policy}<title>Attention</title><body>{source}"
    return Markup(frame(document, f"Attention patterns of layer {layer}", height=height))


def _inert(token: str) -> str:
    """A token that can stand inside a script: brackets as look-alikes, control characters written out."""
    shown = token.replace("<", "‹").replace(">", "›").replace("&", "＆")
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in shown) or "∅"
