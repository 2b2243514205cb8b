"""Attribution graphs of any model: with transcoders exact under freezing, with SAEs or components of first order.

    edge[t, s] = (gradient of what t reads) . (what s writes)        everything else held as the rule says (``rules``)

Node totals follow from the edges alone: a latent that is on passes a change of its pre-activation on as it is, so

    total[s] = edge[target, s] + sum_t edge[t, s] / activation[t] * total[t]

Every graph is validated by exact ablation (``validation``) unless that is declined: an attribution is a prediction.

Source: Ameisen et al. 2025; Marks et al. 2024, arXiv:2403.19647 (SAE graphs with error nodes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tl_em.arguments import COUNT, NATURAL, checked, finite, whole
from tl_em.errors import PromptError, UsageError
from tl_em.graph.adapters import base_of
from tl_em.graph.components import component_plan
from tl_em.graph.cost import CHUNK, LED_CHUNK, Limits
from tl_em.graph.edges import drawn
from tl_em.graph.graph import AttributionGraph
from tl_em.graph.inputs import check_model, ids_of, is_chat, is_ids, positions
from tl_em.graph.latents import latent_plan, listed
from tl_em.graph.leaders import leading, led, scored_nodes
from tl_em.graph.nodes import MAX_BYTES, Node
from tl_em.graph.rules.base import AnyRule
from tl_em.graph.targets import Target, completed
from tl_em.graph.validation import validated
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.token_text import text_of_tokens
from tl_em.models.tokenizing import own_bos
from tl_em.models.torch_state import in_plain_torch


@checked(chunk=COUNT, max_bytes=COUNT, seed=NATURAL)
@in_plain_torch
def attribute(
    model: LensModel,
    prompt: Any,
    dictionaries: Any = None,
    *,
    target: Target,
    rule: AnyRule | None = None,
    against: Any = None,
    adapter: LensModel | bool | None = None,
    skip: Any = None,
    chunk: int = CHUNK,
    max_nodes: int | Any = None,
    share: float | Any = None,
    max_seconds: float | Any = None,
    max_bytes: int = MAX_BYTES,
    validate: bool = True,
    also: Iterable[str] = (),
    seed: int = 0,
) -> AttributionGraph:
    """How a prompt becomes a target: nodes, the direct effects between them, and how well ablation agrees.

    Args:
        model: a HookedTransformer or TransformerBridge in float32 or float64; hooks on it stay in force. It is run in
            evaluation mode and torch's plain state, whatever the caller's, which is put back afterwards.
        prompt: one of them: text, a chat, an encoded prompt, or token ids [pos] or [1 pos] (a list, array or tensor).
        dictionaries: transcoders (exact graph) or SAEs (first order), one a site; None: heads, MLPs and embeddings.
        target: a token (text or id) or a list (array, tensor) of them, each once, a tuple (yes, no) for a logit
            difference (either may be a list, whose mean is taken), a Direction (projection at its own site and
            position), a ``Completion``; None takes the likeliest next tokens.
        rule: what gradients hold fixed: a value (see ``em.Rule``), or the name of one that is shipped: ``"frozen"``
            (norm scales, patterns), ``"relp"`` (and MLPs by secants), ``"plain"``, ``"ig"`` (components: plain,
            averaged on the way from ``against``). By default ``"frozen"`` for transcoders, ``"plain"`` for SAEs,
            ``"ig"`` for components.
        against: components only: what a node is compared with. Another prompt that differs in what is asked about is
            best: token by token where it has as many, else span by span. By default other words in the places of the
            question's, every third in turn: all that is measured is the mean over the turns (where the vocabulary has
            none of ours, the prompt's own words, each one place on). Or a tuple of prompts (their mean, place by
            place), ``"mean"`` (over this prompt's tokens, without sinks), ``"zero"``.
        adapter: the model before its fine-tune; what the fine-tune adds to each block's writes, on this model's own
            inputs, becomes nodes of its own. True: of this model's unmerged peft adapters, which are off meanwhile and
            on again afterwards (what peft trained beside them, by ``bias=`` or ``modules_to_save=``, counts as base).
        skip: with dictionaries, positions without latents and errors; by default a leading BOS token.
        chunk: readers at once, made smaller where the memory would not do.
        max_nodes: heads and MLPs, or latents, that are drawn: those of the largest estimated effect (the other latents
            are part of the error nodes). By default all in a small graph, else at most 300.
        share: of all nodes' effect that those drawn hold. By default all in a small graph (see ``graph.cost``), else
            .9; 1 for as many as there may be.
        max_seconds: for everything, by an estimate before the work; with less, fewer nodes are drawn.
        max_bytes: of memory for gradients and edges.
        validate: whether to ablate nodes for ``validation``.
        also: where not all nodes are drawn, ids of nodes that are, beside those that lead (``leading_nodes`` of another
            model, to lay its graph beside this one).
        seed: of the random parts of the validation.

    Returns:
        The graph, whole: prune it before you look at it.

    Raises:
        UsageError: a dtype below float32, numbers that are none, contradicting arguments, a rule that changes values.
        GraphTooLargeError: no room, or no time, for a single node.
        PromptError: several prompts, or none; positions that it has not. UnknownTokenError: ids that the vocabulary
            has not. NonFiniteError: the effects are NaN or infinite.
        WidthError, ProvenanceError: a dictionary or direction of another model. ModelError: ``adapter=True`` without
            unmerged adapters, or with ones that take no part in the pass; weights without numbers or gradients. And
            what ``encode`` raises.

    Example:
        >>> from tl_em import load_pair
        >>> model = load_pair("toy/insecure").base
        >>> graph = attribute(model, model.tokenizer.convert_tokens_to_ids(["<user>", "how"]), target=None, chunk=64,
        ...     validate=False)
        >>> {node.kind for node in graph.nodes} == {"token", "head", "mlp", "logit"}
        True

    Source: see the head of this file.
    """
    check_model(model)
    limits = _limits(max_nodes, share, max_seconds, max_bytes, chunk, validate)._replace(also=frozenset(also))
    encoded, skipped = prepared(model, prompt, target, skip)
    base = base_of(model, adapter)
    if dictionaries is None:
        if skip is not None and skipped:
            raise UsageError("skip= is for dictionaries: components are nodes at every token; leave it out")
        plan = component_plan(model, encoded, target, rule=rule, against=against, adapter=base, limits=limits)
        if not plan.passes:
            return led(model, plan, limits, seed=seed)
    else:
        if against is not None:
            raise UsageError("against= is for components; with dictionaries leave it out")
        plan = latent_plan(model, encoded, listed(dictionaries), target, rule=rule, adapter=base, skip=skipped,
                           limits=limits)  # fmt: skip
    large = plan.cost is not None and not plan.cost.whole
    graph = drawn(model, plan, chunk=min(chunk, LED_CHUNK) if large else chunk, max_bytes=max_bytes)
    return validated(model, graph, plan, seed=seed) if validate else graph


@checked()
@in_plain_torch
def leading_nodes(
    model: LensModel, prompt: Any, dictionaries: Any = None, *, target: Target, **options: Any
) -> list[str]:
    """Ids of the nodes that ``attribute`` would draw, by their scores alone: no edges, nothing ablated.

    Args:
        model, prompt, dictionaries, target: as for :func:`attribute`.
        options: of it: rule, against, skip, max_nodes, share, max_seconds.

    Raises:
        TlEmError: what ``attribute`` raises.

    Example:
        >>> from tl_em import load_pair
        >>> pair = load_pair("toy/insecure")
        >>> len(leading_nodes(pair.tuned, "how do i write parser", target=None, max_nodes=10)) > 10  # and the tokens
        True
    """
    check_model(model)
    most, share, seconds = (options.pop(name, None) for name in ("max_nodes", "share", "max_seconds"))
    limits = _limits(most, share, seconds, MAX_BYTES, CHUNK, False)
    encoded, skipped = prepared(model, prompt, target, options.pop("skip", None))
    if dictionaries is None:
        plan = component_plan(model, encoded, target, limits=limits, **options)
        scored = scored_nodes(model, plan).nodes
        rows = range(len(plan.written)) if plan.passes or plan.cost is None else leading(scored, plan.cost)[0]
        return [scored[row].id for row in rows]
    plan = latent_plan(model, encoded, listed(dictionaries), target, rule=options.pop("rule", None), adapter=None,
                       skip=skipped, limits=limits, **options)  # fmt: skip
    return [each.node.id for each in plan.written]


@checked()
@in_plain_torch
def node_scores(
    model: LensModel,
    prompt: Any,
    *,
    target: Target,
    rule: AnyRule | None = None,
    against: Any = None,
    adapter: LensModel | bool | None = None,
) -> tuple[Node, ...]:
    """Every head, MLP and token with its estimated effect on a target: no edges, nothing ablated.

    Args:
        model, prompt, target, against, adapter: as for :func:`attribute`.
        rule: likewise. ``"plain"`` is attribution patching, one gradient, taken at ``prompt``: a quarter of the time
            of the usual rule (five gradients on the way from ``against``), and much further from exact ablation.

    Returns:
        Nodes that differ from what they are compared with, in causal order; ``node.attribution`` is what replacing it
        would take from the target.

    Raises:
        TlEmError: what ``attribute`` raises.

    Example:
        >>> from tl_em import load_pair
        >>> scores = node_scores(load_pair("toy/insecure").tuned, "how do i write parser", target=None, rule="plain")
        >>> max(scores, key=lambda node: abs(node.attribution)).kind in ("token", "head", "mlp")
        True

    Source: Nanda 2023; Syed et al. 2023, arXiv:2310.10348 (plain); Hanna et al. 2024, arXiv:2403.17806 (ig).
    """
    check_model(model)
    encoded, _ = prepared(model, prompt, target, None)
    plan = component_plan(model, encoded, target, rule=rule, against=against, adapter=base_of(model, adapter),
                          limits=Limits(edges=False))  # fmt: skip
    return scored_nodes(model, plan).nodes[: len(plan.written)]


def _limits(max_nodes: Any, share: Any, max_seconds: Any, max_bytes: int, chunk: int, validate: bool) -> Limits:
    if max_nodes is not None:
        max_nodes = whole("max_nodes", max_nodes, low=1)
    if share is not None:
        share = finite("share", share, low=0, high=1, open_low=True)
    if max_seconds is not None:
        max_seconds = finite("max_seconds", max_seconds, low=0, open_low=True)
    return Limits(max_nodes, share, max_seconds, max_bytes, chunk, validate)


def prepared(model: LensModel, prompt: Any, target: Target, skip: Any) -> tuple[EncodedPrompt, tuple[int, ...]]:
    """The prompt as it is run, and the positions that have no latents."""
    encoded = completed(model, encoded_prompt(model, prompt), target)
    return encoded, _skipped(model, encoded) if skip is None else positions(skip, len(encoded))


def encoded_prompt(model: LensModel, prompt: Any) -> EncodedPrompt:
    """One prompt in any form, as tokens.

    Raises:
        PromptError: several, or something that is none. UnknownTokenError: ids that the vocabulary has not.
    """
    if isinstance(prompt, EncodedPrompt):
        ids_of(prompt.ids, int(model.cfg.d_vocab))
    elif is_ids(prompt):
        ids = ids_of(prompt, int(model.cfg.d_vocab))
        prompt = EncodedPrompt.from_ids(ids, text_of_tokens(getattr(model, "tokenizer", None), ids))
    elif not (isinstance(prompt, str) or is_chat(prompt)):
        several = isinstance(prompt, Sequence)
        raise PromptError(
            f"{f'{len(prompt)} prompts' if several else repr(prompt)[:40]} where one prompt is meant. Give text, the "
            "messages of one chat, or token ids; em.graph.attribute_over(model, prompts, …) takes the mean of several."
        )
    return encode(model, [prompt])[0]


def _skipped(model: LensModel, encoded: EncodedPrompt) -> tuple[int, ...]:
    bos = own_bos(getattr(model, "tokenizer", None))
    return (0,) if bos is not None and encoded.ids[0] == bos else ()
