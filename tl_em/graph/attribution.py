"""Attribution graphs of any model: with transcoders exact under freezing, with SAEs or components of first order.

    edge[t, s] = (gradient of what t reads) . (what s writes)        everything else held as ``freeze`` says

Node totals follow from the edges alone: a latent that is on passes a change of its pre-activation on as it is, so

    total[s] = edge[target, s] + sum_t edge[t, s] / activation[t] * total[t]

Every graph is validated by exact ablation (``validation``) unless that is declined: an attribution is a prediction.

Source: Ameisen et al. 2025; Marks et al. 2024, arXiv:2403.19647 (SAE graphs with error nodes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_em.errors import PromptError, UsageError
from tl_em.graph.adapters import base_of
from tl_em.graph.components import component_plan
from tl_em.graph.freeze import Rule
from tl_em.graph.graph import AttributionGraph
from tl_em.graph.latents import latent_plan, listed
from tl_em.graph.plan import CHUNK, MAX_BYTES, drawn
from tl_em.graph.targets import Target, completed, text_of
from tl_em.graph.validation import validated
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, Prompt, encode

MAX_NODES = 8000


def attribute(
    model: LensModel,
    prompt: Prompt | EncodedPrompt | Sequence[int] | Tensor,
    dictionaries: Any = None,
    *,
    target: Target,
    rule: Rule | None = None,
    against: Any = None,
    adapter: LensModel | bool | None = None,
    skip: Sequence[int] | None = None,
    chunk: int = CHUNK,
    max_nodes: int = MAX_NODES,
    max_bytes: int = MAX_BYTES,
    validate: bool = True,
    seed: int = 0,
) -> AttributionGraph:
    """How a prompt becomes a target: nodes, the direct effects between them, and how well ablation agrees.

    Args:
        model: a HookedTransformer or TransformerBridge in float32 or float64; hooks on it stay in force.
        prompt: text, a chat, an encoded prompt, or token ids.
        dictionaries: transcoders (exact graph) or SAEs (first order), one a site; None: heads, MLPs and embeddings.
        target: a token (text or id) or a list of them, a tuple (yes, no) for a logit difference (either may be a list,
            whose mean is taken), a Direction (projection at its own site and position), a ``Completion``; None takes
            the likeliest next tokens.
        rule: what gradients hold fixed: ``"frozen"`` (norm scales, patterns), ``"relp"`` (and MLPs by secants),
            ``"plain"``, ``"ig"`` (components: plain, averaged on the way from ``against``). By default ``"frozen"`` for
            transcoders, ``"plain"`` for SAEs, ``"ig"`` for components.
        against: components only: what a node is compared with, the prompt of equal length that it is replaced by,
            ``"zero"``, ``"mean"`` (over this prompt's tokens), or a tuple of prompts (mean over their tokens).
        adapter: the model before its fine-tune; what the fine-tune adds to each block's writes, on this model's own
            inputs, becomes nodes of its own. True: of this model's unmerged peft adapters, which are off meanwhile and
            on again afterwards (what peft trained beside them, by ``bias=`` or ``modules_to_save=``, counts as base).
        skip: positions without latents and errors; by default a leading BOS token.
        chunk: readers at once, made smaller where the memory would not do.
        max_nodes: with more active latents only those of the largest estimated effect are shown; the others are part
            of the error nodes.
        max_bytes: of memory for gradients and edges.
        validate: whether to ablate nodes for ``validation``.
        seed: of the random parts of the validation.

    Returns:
        The graph, whole: prune it before you look at it.

    Raises:
        UsageError: a dtype below float32, contradicting arguments. GraphTooLargeError: no room.
        WidthError, ProvenanceError: a dictionary or direction of another model. ModelError: ``adapter=True`` without
            unmerged adapters, or with ones that take no part in the pass. And what ``encode`` raises.

    Example:
        >>> from tl_em.organisms.zoo import load_pair
        >>> model = load_pair("toy/insecure").base
        >>> graph = attribute(model, model.tokenizer.convert_tokens_to_ids(["<user>", "how"]), target=None, chunk=64,
        ...     validate=False)
        >>> {node.kind for node in graph.nodes} == {"token", "head", "mlp", "logit"}
        True

    Source: see the head of this file.
    """
    _check_dtype(model)
    encoded, skipped = prepared(model, prompt, target, skip)
    base = base_of(model, adapter)
    if dictionaries is None:
        plan = component_plan(model, encoded, target, rule=rule, against=against, adapter=base, chunk=chunk,
                              max_bytes=max_bytes)  # fmt: skip
    else:
        if against is not None or rule == "ig":
            raise UsageError("against= and rule='ig' are for components; with dictionaries leave both out")
        given = listed(dictionaries)
        plan = latent_plan(model, encoded, given, target, rule=rule, adapter=base, skip=skipped, max_nodes=max_nodes)
    graph = drawn(model, plan, chunk=chunk, max_bytes=max_bytes)
    if not validate:
        return graph
    return validated(model, graph, plan, seed=seed)


def prepared(
    model: LensModel, prompt: Any, target: Target, skip: Sequence[int] | None
) -> tuple[EncodedPrompt, tuple[int, ...]]:
    """The prompt as it is run, and the positions that have no latents."""
    encoded = completed(model, encoded_prompt(model, prompt), target)
    return encoded, _skipped(model, encoded) if skip is None else tuple(range(len(encoded))[at] for at in skip)


def encoded_prompt(model: LensModel, prompt: Any) -> EncodedPrompt:
    """A prompt in any form, as tokens."""
    if isinstance(prompt, Tensor):
        prompt = prompt.flatten().tolist()
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(isinstance(each, int) for each in prompt):
        if not prompt:
            raise PromptError("The prompt has no tokens, so there is nothing to attribute to. Give at least one.")
        ids: list[int] = list(prompt)  # pyright: ignore[reportAssignmentType]
        prompt = EncodedPrompt.from_ids(ids, " ".join(text_of(model, each) for each in ids))
    return encode(model, [prompt])[0]


def _check_dtype(model: LensModel) -> None:
    dtype = next(iter(model.parameters())).dtype  # pyright: ignore[reportAttributeAccessIssue]
    if dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"the model is in {dtype}, in which attributions do not reproduce (some 30 % off); load it once more for "
            "this: em.load_model(source, dtype=torch.float32)"
        )


def _skipped(model: LensModel, encoded: EncodedPrompt) -> tuple[int, ...]:
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    return (0,) if bos is not None and encoded.ids[0] == bos else ()
