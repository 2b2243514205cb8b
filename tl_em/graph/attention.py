"""Attention patterns of one layer, through circuitsvis, made safe: nothing is asked of the network, tokens stay text.

circuitsvis's own display asks the network at every showing, and a token that holds ``</script>`` ends its script and
runs what follows. Here its local source stands in a sandboxed frame under a Content-Security-Policy that refuses every
request, and ``<`` in the tokens is a look-alike, because they are written into a script. Control: a pattern says where
a head reads, not that what it reads matters; for that, see the heads' nodes in a graph.

Source: https://github.com/TransformerLensOrg/CircuitsVis
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.errors import UsageError
from tl_em.graph.targets import text_of
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.prompts import EncodedPrompt, Prompt, encode
from tl_em.showing import token_shown

_STYLE = (
    "html{background:#fff;color-scheme:light}body{margin:8px;color:#1b1f24;font-family:system-ui,sans-serif}"
    "@media (min-height:40000px),(prefers-color-scheme:dark) and (max-height:20000px){"
    "html{filter:invert(1) hue-rotate(180deg);background:#e9e9e9}}"
)
"""circuitsvis draws for a white page only: in the dark it is turned round, hues kept."""
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def attention_pattern(model: LensModel, prompt: Prompt | EncodedPrompt, layer: int) -> Float[Tensor, "head query key"]:
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
        a page that a notebook shows in a frame, and ``.save("page.html")`` writes; as text it is one line.

    Raises:
        UsageError: no such layer, or circuitsvis is not installed.

    Example:
        >>> import tl_em as em
        >>> page = em.graph.attention_view(em.load_pair("toy/insecure").tuned, "how do i write parser", 0)
        >>> "parser" in page._repr_html_()
        True
    """
    from tl_em.report.html import Framed

    try:
        from circuitsvis.attention import attention_heads
    except ImportError as error:
        raise UsageError("circuitsvis draws attention patterns and is not here: pip install 'tl_em[viz]'") from error
    pattern = attention_pattern(model, prompt, layer)
    tokens = [_inert(text_of(model, token)) for token in encode(model, [prompt])[0].ids]
    source = attention_heads(attention=pattern, tokens=tokens).local_src
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head = f"<meta charset=utf-8>{policy}<title>Attention</title><style>{_STYLE}</style>"
    document = f"<!doctype html><html lang=en><head>{head}</head><body>{source}</body></html>"
    said = f"{len(pattern)} heads on {len(tokens)} tokens"
    return Framed(document, f"Attention patterns of layer {layer}", height, said)


def _inert(token: str) -> str:
    """A token that can stand inside a script: brackets as look-alikes, what would not show as a sign."""
    return token_shown(token).replace("<", "‹").replace(">", "›").replace("&", "＆")
