"""Attention: which heads carry an edge of a graph, and where the heads of a layer read.

    edge[t, s] = straight + sum_h  (gradient of t at head h's z, no later head on the way) . (change of z_h by s)

Every path from s to t goes through no head, or has a *last* one: so the split is exact, and its parts sum to the edge.
A head that only moves something for a later head to fetch has its part counted with the later one.

Patterns are shown by circuitsvis, made safe: its own display asks the network at every showing, and a token that holds
``</script>`` ends its script and runs what follows. Here its local source stands in a sandboxed frame under a
Content-Security-Policy that refuses every request, and ``<`` in the tokens is a look-alike, because they are written
into a script. Control: a pattern says where a head reads, not that what it reads matters; for that, see the split.

Source: head loadings of Lindsey et al. 2025 ("Tracing attention computation", transformer-circuits.pub); that the split
is by the last head, and therefore additive, is ours. https://github.com/TransformerLensOrg/CircuitsVis
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.arguments import NATURAL, checked
from tl_em.errors import UsageError
from tl_em.graph.build import prepared
from tl_em.graph.cost import Limits
from tl_em.graph.edges import Wiring
from tl_em.graph.gradients import Reader, gradients, linearise
from tl_em.graph.inputs import check_model
from tl_em.graph.latents import is_exact, keeping, latent_plan, listed
from tl_em.graph.nodes import Node
from tl_em.graph.rules import as_rule
from tl_em.graph.rules.base import AnyRule
from tl_em.graph.targets import Target, text_of
from tl_em.models.cache import read_once
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.prompts import EncodedPrompt, Prompt, encode
from tl_em.models.torch_state import in_plain_torch
from tl_em.showing import token_shown

if TYPE_CHECKING:
    import pandas as pd

_STYLE = (
    "html{background:#fff;color-scheme:light}body{margin:8px;color:#1b1f24;font-family:system-ui,sans-serif}"
    "@media (min-height:40000px),(prefers-color-scheme:dark) and (max-height:20000px){"
    "html{filter:invert(1) hue-rotate(180deg);background:#e9e9e9}}"
)
"""circuitsvis draws for a white page only: in the dark it is turned round, hues kept."""
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@checked()
@in_plain_torch
def head_loadings(
    model: LensModel,
    prompt: Any,
    dictionaries: Any,
    *,
    source: Node | str,
    into: Node | str,
    target: Target = None,
    rule: AnyRule | None = None,
    skip: Any = None,
) -> pd.DataFrame:
    """One edge of an exact graph, split over the heads that carry it.

    Args:
        model, prompt, dictionaries (transcoders), target, rule, skip: as given to :func:`tl_em.attribute`.
        source, into: the two nodes, or their ids (``graph.links()`` has them).

    Returns:
        DataFrame with columns layer, head (None for what goes straight through the residual stream) and weight, in the
        edge's units, the largest first; the weights sum to the edge.

    Raises:
        UsageError: no such nodes, or a graph that is not exact. And what ``attribute`` raises.

    Example:
        >>> from tl_em.dictionaries import Dictionary
        >>> from tl_em.models.sites import Site
        >>> from tl_em.graph.build import attribute
        >>> from tl_em import load_pair
        >>> model, eye = load_pair("toy/insecure").base, torch.eye(96)
        >>> given = Dictionary(eye, torch.zeros(96), eye, torch.zeros(96), activation="relu",
        ...                    site_in=Site(1, "mlp_in"), site_out=Site(1, "mlp_out"))
        >>> graph = attribute(model, "how do i write parser", given, target=None, validate=False)
        >>> token, answer = graph.nodes[0], graph.targets[0]
        >>> split = head_loadings(model, "how do i write parser", given, source=token, into=answer)
        >>> bool(abs(split.weight.sum() - graph.edges[graph.index[answer.id], 0]) < 1e-4)
        True

    Source: see the head of this file.
    """
    import pandas as pd

    check_model(model)
    given = listed(dictionaries)
    if not is_exact(given):
        raise UsageError("an edge is a sum over heads only where all else is frozen: pass transcoders of the MLPs")
    rule = as_rule(rule, "transcoders")
    encoded, at = prepared(model, prompt, target, skip)
    plan = latent_plan(model, encoded, given, target, rule=rule, adapter=None, skip=at,
                       limits=Limits(share=1.0))  # fmt: skip
    ids = [each.node.id for each in plan.written] + [node.id for node in plan.goal.nodes]
    ends = [each if isinstance(each, str) else each.id for each in (source, into)]
    if unknown := [each for each in ends if each not in ids]:
        raise UsageError(f"{unknown[0]!r} is no node of this graph; its ids are in graph.index")
    if ids.index(ends[0]) >= len(plan.written):
        raise UsageError(f"{ends[0]!r} is a target: it feeds nothing, so no edge leads out of it; pass it as into=")
    reader, written = _reader_of(plan, ids.index(ends[1])), plan.written[ids.index(ends[0])]
    tokens = torch.tensor(plan.encoded.ids)
    heads = {f"blocks.{layer}.attn.hook_z": layer for layer in range(int(model.cfg.n_layers))}
    cuts, keep = list(plan.passes[0].make().leaves), keeping(plan.sheets)
    closed = linearise(model, tokens, cuts=[*cuts, *heads], reads=[reader.point], rule=rule, keep=keep)
    open_ = linearise(model, tokens, cuts=cuts, reads=list(heads), rule=rule, keep=keep)
    last = gradients(closed, reader)
    rows: list[tuple[int | None, int | None, float]] = []
    if written.point in last:
        rows.append((None, None, float(last[written.point][0, written.node.pos] @ written.vector)))
    for point, layer in heads.items():
        if point in last:
            split = _by_head(last[point], int(model.cfg.n_heads))
            back = gradients(open_, Reader(point, torch.arange(len(split)), split))
            if written.point in back:
                effects = [float(each[written.node.pos] @ written.vector) for each in back[written.point]]
                rows += [(layer, head, effect) for head, effect in enumerate(effects)]
    rows.sort(key=lambda row: -abs(row[2]))
    return pd.DataFrame(rows, columns=["layer", "head", "weight"])


def _by_head(gradient: Tensor, heads: int) -> Tensor:
    """[1 pos head*width] -> [head pos head*width], all but one head 0."""
    _, length, width = gradient.shape
    mask = torch.eye(heads).repeat_interleave(width // heads, dim=1).to(gradient)
    return gradient.expand(heads, length, width) * mask[:, None]


def _reader_of(plan: Wiring, row: int) -> Reader:
    if row >= len(plan.written):
        at: Int[Tensor, " node"] = torch.tensor([row - len(plan.written)])
        return Reader(plan.goal.point, at, plan.goal.vectors[at])
    for reader in plan.passes[0].readers:
        found = (reader.rows == row).nonzero().flatten()
        if len(found):
            positions = None if reader.positions is None else reader.positions[found]
            return Reader(reader.point, reader.rows[found], reader.vectors[found], positions)
    raise UsageError(f"{plan.written[row].node.id!r} reads nothing (a token or an error), so no edge leads into it")


# --- Patterns ---------------------------------------------------------------------------------------------------------


@in_plain_torch
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
        read_once(model, torch.tensor([ids]))
    return found[-1]


@checked(layer=NATURAL)
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
    look_alikes = str.maketrans("<>&", "‹›＆")  # a token stands inside a script
    tokens = [token_shown(text_of(model, token)).translate(look_alikes) for token in encode(model, [prompt])[0].ids]
    source = attention_heads(attention=pattern, tokens=tokens).local_src
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head = f"<meta charset=utf-8>{policy}<title>Attention</title><style>{_STYLE}</style>"
    document = f"<!doctype html><html lang=en><head>{head}</head><body>{source}</body></html>"
    said = f"{len(pattern)} heads on {len(tokens)} tokens"
    return Framed(document, f"Attention patterns of layer {layer}", height, said)
