"""What a surface must show before it is trusted: that it computes what the model in the files computes.

TransformerLens rebuilds a model from its parts, and a part that is misread gives a model that runs, writes fluent text
and is another one. So, once per model, before anything is measured on it:

    forward     one prompt, longer than every sliding window and rotary boundary that the config names, against the
                Hugging Face model before anything was built around it
    batch       two prompts of different lengths, padded on the right, against each of them alone; it fails for a
                model that looks ahead (BERT), where "the activation at a token" would depend on what follows
    direct      a Bridge's pass through the modules that it wraps against one through its components, at every point
                where the package edits, each edited (``unwrapped``)
    cache       generation with the key-value cache against reading the whole text again, step by step; on a Bridge
                through its components too, some of which keep none (ALiBi's): then while no hook waits in them
    beginning   prompts that begin alike, read together with what they share read once, against each of them whole
                (``beginnings``)
    side by side
                prompts of several lengths, two of them equal, in one padded pass and from there token by token,
                against each of them alone; on a Bridge through its components too (``prefill``)

Every gap is a difference of log-probabilities divided by the spread (the standard deviation over the vocabulary) of
the reference's own logits: an absolute bound would pass any model whose logits are flat. In float32 it is the largest
one; in half precision, where rounding has a long tail, the root mean square over the vocabulary at the worst token. A
part that fails costs that part only: without a cache, ``generate`` reads the whole text again; where the direct way
differs, or is no matter (a HookedTransformer), components are used; without the others
nothing is left to use, and the model is refused.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.arguments import checked
from tl_em.errors import CacheWarning, ModelError, TlEmError, first_line
from tl_em.models.beginnings import LEAST, allow_beginnings, beginning_of, pieces
from tl_em.models.cache import has_cache, steps
from tl_em.models.hooks import LensModel, hook_points
from tl_em.models.prefill import Prefill, allow_side_by_side, steps_after
from tl_em.models.prompts import EncodedPrompt, make_batch
from tl_em.models.residual_writes import probing
from tl_em.models.source_record import Boundaries, boundaries_of, text_config
from tl_em.models.stream import _reading, batch_logits
from tl_em.models.unwrapped import (
    allow_components,
    allow_unwrapped,
    keeps_cache,
    through_components,
    unwrapped_gap,
)

BOUNDS = {torch.float32: 2e-4, torch.float64: 2e-4}
"""Largest gap that is rounding, in spreads of the logits. Surfaces sum in another order: up to 1e-5 in float32. What
TransformerLens has been seen to misread gives 4e-4 to 4."""
HALF = 0.25
"""The same for bfloat16 and float16 (root mean square at the worst token). In bfloat16, rounding alone gives .11 in
the 30 layers of SmolLM2-135M."""
STEPS = 12
"""Tokens that are generated with and without a cache."""
_SHORT, _MIDDLE, _LEAST, _MARGIN = 7, 40, 64, 8
_SIDE, _FED = 16, 3
"""Tokens of a text that is read beside others, and after how many of them logits are compared."""
_POSITIONS = 64
_CPU, _DEVICE = (2e12, 2**30), (1e15, 2**32)
"""What one proving pass may cost on a CPU and on a device: operations, and bytes of attention scores."""


@dataclass(frozen=True)
class Proof:
    """What was shown of a model with hook points. Gaps are in spreads (standard deviations) of the reference's logits.

    Args:
        tokens: length of the single prompt on which the forward pass was compared.
        forward: its gap to the Hugging Face model; None where there was none to compare with.
        batch: gap of padded prompts to single ones; None where it was not looked at.
        cache: gap of cached to uncached generation over ``STEPS`` tokens of two prompts; None without a usable cache.
        trouble: why the cache is not used, None where it is.
        beyond: boundaries that the config names and that proving was too costly to cross.
        dtype: of the weights.
        seconds: what the proof took.
        direct: gap at hook points between the modules that a Bridge wraps; None where its components are used.
        beginning: gap of a padded batch whose beginning was read once; None where every prompt is read whole.
        side_by_side: gap of answers to prompts of several lengths that were read in one pass; None where they are
            read up to the shortest one's end and from there token by token.
    """

    tokens: int
    forward: float | None
    batch: float | None
    cache: float | None
    trouble: str | None
    beyond: tuple[int, ...]
    dtype: str
    seconds: float = 0.0
    direct: float | None = None
    beginning: float | None = None
    side_by_side: float | None = None

    def __str__(self) -> str:
        """One line, e.g. for a log."""
        shown = [] if self.forward is None else [f"forward over {self.tokens} tokens ({self.forward:.0e})"]
        shown += [] if self.batch is None else [f"padded batch ({self.batch:.0e})"]
        shown += [] if self.cache is None else [f"cached generation ({self.cache:.0e})"]
        shown += [] if self.direct is None else [f"wrapped modules ({self.direct:.0e})"]
        shown += [] if self.beginning is None else [f"beginnings read once ({self.beginning:.0e})"]
        shown += [] if self.side_by_side is None else [f"prompts side by side ({self.side_by_side:.0e})"]
        line = f"shown equal in {self.dtype}: {', '.join(shown) or 'nothing'}, in spreads of the logits"
        line += f"; no cache: {self.trouble}" if self.trouble else ""
        return line + (f"; not shown beyond {min(self.beyond)} tokens" if self.beyond else "")


class Reference(NamedTuple):
    """What the Hugging Face model computes, taken before anything is built around it."""

    tokens: Int[Tensor, " pos"]
    positions: Int[Tensor, " position"]
    logits: Float[Tensor, "position d_vocab"]
    middle: Float[Tensor, " d_vocab"]
    """After the first ``middle_length`` tokens alone."""
    middle_length: int
    beyond: tuple[int, ...]


# --- The reference ----------------------------------------------------------------------------------------------------


def reference(hf_model: Any, boundaries: Boundaries) -> Reference:
    """Log-probabilities of the Hugging Face model at some tokens of one long prompt, and after its beginning alone.

    Raises:
        ModelError: it is no causal language model: no logits over the vocabulary, or a token sees what follows it.
    """
    embedding = _embedding(hf_model)
    length, beyond = _length(hf_model, boundaries)
    tokens = torch.randint(int(embedding.shape[0]), (length,), generator=torch.Generator().manual_seed(0))
    positions = torch.linspace(0, length - 1, min(length, _POSITIONS)).round().long().unique()
    short = min([_MIDDLE, length, *(at - STEPS - 1 for at in boundaries.turns if at > STEPS + _SHORT + 1)])
    logits = _hf_logits(hf_model, tokens, positions)
    middle = _hf_logits(hf_model, tokens[:short], torch.tensor([min(_SHORT, short) - 1, short - 1]))
    alone = _hf_logits(hf_model, tokens[: min(_SHORT, short)], torch.tensor([min(_SHORT, short) - 1]))
    moved = _gap(middle[:1], alone, embedding.dtype)
    if moved > _bound(embedding.dtype):
        raise ModelError(
            f"In this {type(hf_model).__name__} a token sees those that follow it (the log-probabilities after "
            f"{_SHORT} tokens move by {moved:.2g} spreads of the logits when more are appended), so "
            f"an activation at a token of a prompt is not defined by what precedes it. Load a causal language model."
        )
    return Reference(tokens, positions, logits, middle[1], short, beyond)


def _length(hf_model: Any, boundaries: Boundaries) -> tuple[int, tuple[int, ...]]:
    """Tokens of the single prompt, and the boundaries that it would cost too much to cross."""
    room = context_length(hf_model.config)
    within = [at for at in boundaries.all if at + _MARGIN <= room]
    paid = [at for at in within if _affordable(hf_model, at + _MARGIN)]
    length = max([_LEAST, *(at + _MARGIN for at in paid)])
    return min(length, room), tuple(at for at in within if at not in paid)


def context_length(config: Any) -> int:
    """The longest prompt that a Hugging Face config admits; a large number where it names none."""
    text = text_config(config)
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length")
    found = [getattr(text, name, None) for name in names]
    return next((int(each) for each in found if isinstance(each, int) and each > 0), 2**20)


def _affordable(hf_model: Any, length: int) -> bool:
    weight = next(hf_model.parameters())
    operations, memory = _CPU if weight.device.type == "cpu" else _DEVICE
    text = text_config(hf_model.config)
    heads = int(getattr(text, "num_attention_heads", None) or getattr(text, "n_head", None) or 16)
    size = sum(parameter.numel() for parameter in hf_model.parameters())
    return 2 * size * length <= operations and 8 * heads * length**2 <= memory


def _hf_logits(
    hf_model: Any, tokens: Int[Tensor, " pos"], positions: Int[Tensor, " position"]
) -> Float[Tensor, "position d_vocab"]:
    """Float32 on the CPU; only the wanted positions are unembedded where the model can do that."""
    device = next(hf_model.parameters()).device
    takes = inspect.signature(hf_model.forward).parameters
    options = {"logits_to_keep": positions.to(device)} if "logits_to_keep" in takes else {}
    try:
        with torch.no_grad():
            logits = getattr(hf_model(input_ids=tokens[None].to(device), **options), "logits", None)
    except Exception as error:  # no common base: a model that wants something else raises whatever its code meets
        raise ModelError(
            f"This {type(hf_model).__name__} does not run on text tokens alone ({type(error).__name__}: "
            f"{first_line(error)}), so it cannot be read as a language model. Load a causal language model."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[-1] < 0.5 * len(_embedding(hf_model)):
        raise ModelError(
            f"A {type(hf_model).__name__} gives no logits over its vocabulary, so there is nothing to measure or "
            f"generate. Load the model with its language-modelling head, e.g. with AutoModelForCausalLM."
        )
    return (logits[0] if options and logits.shape[1] == len(positions) else logits[0, positions]).float().cpu()


def _embedding(hf_model: Any) -> Float[Tensor, "d_vocab d_model"]:
    try:
        return hf_model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"A {type(hf_model).__name__} has no embedding of tokens, so it reads no text. Load a causal one."
        ) from error


# --- The proof --------------------------------------------------------------------------------------------------------


def prove(model: LensModel, expected: Reference, explain: str) -> Proof:
    """Compare a surface with the model that it was built from.

    Args:
        model: a HookedTransformer or TransformerBridge, as built.
        expected: from ``reference``.
        explain: what to do when the forward pass differs, for the message.

    Raises:
        ModelError: the forward pass, or a padded batch, is not that of the reference, or does not run.
    """
    start = time.perf_counter()
    dtype = next(iter(model.parameters())).dtype  # pyright: ignore[reportAttributeAccessIssue]
    with without_hooks(model):
        over = f"over {len(expected.tokens)} tokens"
        forward = _within_bound(over, forward_gap, model, expected, dtype, explain)
        batch = _within_bound("in a padded batch", _batch_gap, model, expected, dtype, explain)
        proof = Proof(len(expected.tokens), forward, batch, None, None, expected.beyond, str(dtype).split(".")[-1])
        proof = _directly(model, proof, expected.tokens, dtype)
        proof = _with_cache(model, proof, expected.tokens, expected.middle_length, dtype)
    proof = replace(proof, seconds=time.perf_counter() - start)
    _PROOFS[model] = proof
    return proof


def _within_bound(
    where: str, gap: Callable[..., float], model: LensModel, expected: Reference, dtype: torch.dtype, explain: str
) -> float:
    """A gap, or ``ModelError`` where it is more than rounding, or a surface that could be built cannot be run."""
    try:
        found = gap(model, expected, dtype)
    except TlEmError:
        raise
    except Exception as error:  # no common base: it meets whatever its adapter of the architecture assumes
        raise ModelError(
            f"The {type(model).__name__} built from {model.cfg.model_name!r} does not run where the Hugging Face model "
            f"does ({type(error).__name__}: {first_line(error)}). {explain}"
        ) from error
    if not found <= _bound(dtype):
        raise ModelError(
            f"The {type(model).__name__} built from {model.cfg.model_name!r} is not the same function as the Hugging "
            f"Face model: {where}, log-probabilities differ by {found:.2g} spreads of its logits (rounding gives at "
            f"most {_bound(dtype):g}). {explain}"
        )
    return found


def forward_gap(model: LensModel, expected: Reference, dtype: torch.dtype) -> float:
    """How far a model's log-probabilities lie from a reference's, in spreads of its logits."""
    found = _logits(model, [expected.tokens], expected.positions.new_zeros(len(expected.positions)), expected.positions)
    return _gap(expected.logits, found, dtype)


def _batch_gap(model: LensModel, expected: Reference, dtype: torch.dtype) -> float:
    """Of two prompts of different lengths in one batch, the shorter padded, to each of them alone."""
    short, middle = min(_SHORT, expected.middle_length), expected.middle_length
    prompts = [expected.tokens[:short], expected.tokens[:middle]]
    found = _logits(model, prompts, torch.tensor([0, 1]), torch.tensor([short - 1, middle - 1]))
    alone = _logits(model, prompts[:1], torch.tensor([0]), torch.tensor([short - 1]))
    return max(_gap(alone, found[:1], dtype), _gap(expected.middle[None], found[1:], dtype))


def _logits(model: LensModel, prompts: list[Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    encoded = [EncodedPrompt.from_ids(tokens.tolist()) for tokens in prompts]
    return batch_logits(model, make_batch(encoded, range(len(encoded))), rows, columns).float().cpu()


def _gap(expected: Float[Tensor, "token d_vocab"], found: Float[Tensor, "token d_vocab"], dtype: torch.dtype) -> float:
    """Difference of log-probabilities, in spreads of the expected logits; infinite where the widths differ."""
    if expected.shape[-1] != found.shape[-1]:
        return float("inf")
    finite = expected.isfinite()
    spread = torch.stack([row[kept].std() for row, kept in zip(expected, finite, strict=True)]).clamp_min(1e-12)
    differences = (expected.log_softmax(-1) - found.log_softmax(-1)).abs() / spread[:, None]
    differences = torch.where(finite, differences, torch.where(found == expected, 0.0, torch.inf))
    differences = differences.nan_to_num(nan=torch.inf)
    return float(differences.max() if dtype in BOUNDS else differences.pow(2).mean(-1).sqrt().max())


def _bound(dtype: torch.dtype) -> float:
    return BOUNDS.get(dtype, HALF)


def _directly(model: LensModel, proof: Proof, tokens: Tensor, dtype: torch.dtype) -> Proof:
    """With what the wrapped modules show; they are used from here on, or not."""
    try:
        gap = unwrapped_gap(model, tokens[None, :_SHORT])
    except Exception:  # whatever an architecture's own code makes of it: its components are used as ever
        gap = None
    shown = gap is not None and gap <= _bound(dtype)
    allow_unwrapped(model, shown)
    return replace(proof, direct=gap if shown else None)


# --- The cache --------------------------------------------------------------------------------------------------------


def _with_cache(model: LensModel, proof: Proof, tokens: Tensor, middle: int, dtype: torch.dtype) -> Proof:
    if not has_cache(model):
        return replace(proof, trouble="the model takes none that is known here")
    try:
        gap = max(_cache_gap(model, tokens[:length], dtype) for length in _begun(model, tokens, middle))
    except Exception as error:  # whatever a cache of somebody else's raises: without it, everything else still works
        return replace(proof, trouble=f"{type(error).__name__}: {first_line(error)}")
    if gap > _bound(dtype):
        return replace(proof, trouble=f"with it, log-probabilities differ by {gap:.2g} spreads of the logits")
    proof = _side_by_side(model, _with_beginnings(model, replace(proof, cache=gap), tokens, dtype), tokens, dtype)
    if proof.direct is not None:
        kept = proof.side_by_side is not None or _components_keep(model, tokens[: min(_SHORT, middle)], dtype)
        allow_components(model, kept)
    return proof


def _components_keep(model: LensModel, tokens: Tensor, dtype: torch.dtype) -> bool:
    """Whether generation with a cache is right through the components too: a hook in one makes it run."""
    try:
        with through_components(model):
            return _cache_gap(model, tokens, dtype, _FED) <= _bound(dtype)
    except Exception:  # as above
        return False


def _with_beginnings(model: LensModel, proof: Proof, tokens: Tensor, dtype: torch.dtype) -> Proof:
    """With what reading the beginning of a padded batch once shows; it is done from here on, or not."""
    allow_beginnings(model, True)
    try:
        gap = _beginning_gap(model, tokens, dtype)
    except Exception:  # as above: what a cache of somebody else's raises
        gap = None
    shown = gap is not None and gap <= _bound(dtype)
    allow_beginnings(model, shown)
    return replace(proof, beginning=gap if shown else None)


def _beginning_gap(model: LensModel, tokens: Int[Tensor, " pos"], dtype: torch.dtype) -> float | None:
    """Of prompts that begin alike, some with more in common than others, to each read whole; None without room."""
    head, tail, room = tokens[:LEAST], tokens[LEAST : 2 * LEAST], int(model.cfg.n_ctx)
    if min(room, len(tokens)) < 2 * LEAST:
        return None
    questions = (([0, 1, 2], 3), ([3, 2, 1], 3), ([4, 5, 6, 3], 4))  # with two answers each, of which one is padded
    answers = [tail[[*asked, *said]] for asked, _ in questions for said in ([7], [6, 7])]
    firsts = [LEAST + length - 1 for _, length in questions for _ in range(2)]
    prompts = [EncodedPrompt.from_ids(torch.cat([head, rest]).tolist()) for rest in (tail[:3], tail.flip(0), *answers)]
    batch, last = make_batch(prompts[:2], range(2)), [len(each) - 1 for each in prompts]
    if beginning_of(model, batch, min(last[:2])) is None:
        return None
    found = [batch_logits(model, batch, torch.arange(2), torch.tensor(last[:2])).float().cpu()]
    made: dict[int, Tensor] = {}
    with torch.no_grad(), _reading(model) as read:
        for piece in pieces(model, prompts[2:], firsts, max_tokens=6 * room, a_pass=0.0):
            lengths, rows = piece.batch.lengths, piece.batch.rows
            made |= zip(rows, read(piece, torch.arange(len(rows)), lengths - 1).float().cpu(), strict=True)
    found.append(torch.stack([made[i] for i in range(len(answers))]))
    allow_beginnings(model, False)
    alone = _logits(model, [torch.tensor(each.ids) for each in prompts], torch.arange(len(last)), torch.tensor(last))
    return _gap(alone, torch.cat(found), dtype)


def _side_by_side(model: LensModel, proof: Proof, tokens: Tensor, dtype: torch.dtype) -> Proof:
    """With what reading prompts of several lengths at once shows; it is done from here on, or not."""
    ways = [nullcontext] if proof.direct is None else [nullcontext, through_components]
    try:
        gap = _side_by_side_gap(model, tokens, dtype, ways)
    except Exception:  # as above
        gap = None
    shown = gap is not None and gap <= _bound(dtype)
    allow_side_by_side(model, shown)
    return replace(proof, side_by_side=gap if shown else None)


def _side_by_side_gap(
    model: LensModel, tokens: Int[Tensor, " pos"], dtype: torch.dtype, ways: Sequence[Callable[..., Any]]
) -> float | None:
    """Of four answers to three prompts of several lengths to each text alone; None where there is no room for them."""
    known = boundaries_of(model)
    longest = min([int(model.cfg.n_ctx), len(tokens), _SIDE, *known.all]) - _FED
    if longest < 3:
        return None
    lengths = (longest, longest * 2 // 3, longest // 3)
    texts = [tokens.roll(k)[: length + _FED - 1] for k, length in enumerate(lengths)]
    asked = [EncodedPrompt.from_ids(text[:n].tolist()) for text, n in zip(texts, lengths, strict=True)]
    batch, which = make_batch([*asked, asked[0]], range(4)), [0, 1, 2, 0]
    fed = torch.stack([texts[k][lengths[k] :] for k in which])
    columns = torch.cat([batch.lengths - 1 + k for k in range(_FED)])
    alone, gaps = _logits(model, texts, torch.tensor(which).repeat(_FED), columns), []
    for way in ways:
        with torch.no_grad(), way(model), steps_after(model, Prefill.of(batch, which)) as step:
            found = [step(new).float().cpu() for new in (batch.tokens, *fed[:, :, None].unbind(1))]
        gaps.append(_gap(alone, torch.cat(found), dtype))
    return max(gaps)


def _begun(model: LensModel, tokens: Tensor, middle: int) -> Iterator[int]:
    """Lengths of two prompts: a short one, and one whose answer crosses the first window that can be crossed."""
    room = min(len(tokens), max(2, int(model.cfg.n_ctx) - STEPS))
    turns = [at - STEPS for at in boundaries_of(model).turns]
    windows = [at - STEPS // 2 for at in boundaries_of(model).windows if _SHORT < at - STEPS // 2 <= room]
    last = min([room, min(windows, default=middle), *(at for at in turns if at > 0)])
    yield max(1, min(_SHORT, last - 1))
    yield max(1, last)


def _cache_gap(model: LensModel, tokens: Int[Tensor, " pos"], dtype: torch.dtype, most: int = STEPS) -> float:
    """Of generation with a cache to one pass over all that was generated, at every step."""
    made, found, new = tokens[None], [], tokens[None]
    with torch.no_grad(), steps(model, cached=True) as step:
        for _ in range(min(most, int(model.cfg.n_ctx) - len(tokens))):
            found.append(step(new).float().cpu())
            new = found[-1].argmax(-1)[:, None]
            made = torch.cat([made, new], 1)
    columns = torch.arange(len(tokens) - 1, made.shape[1] - 1)
    return _gap(_logits(model, [made[0]], torch.zeros_like(columns), columns), torch.cat(found), dtype)


# --- What is known ----------------------------------------------------------------------------------------------------

_PROOFS: WeakKeyDictionary[Any, Proof] = WeakKeyDictionary()
_WARNED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@checked()
def proof(model: LensModel) -> Proof | None:
    """What was shown of ``model`` when it was loaded, or before it first generated; None where nothing was.

    Args:
        model: any that this package loaded, or that has generated.

    Example:
        >>> import tl_em as em
        >>> shown = em.proof(em.load_pair("toy/insecure").tuned)
        >>> shown.forward < 1e-3 and shown.cache < 1e-3
        True
    """
    return _PROOFS.get(model)


def may_use_cache(model: LensModel, length: int) -> bool:
    """Whether generating up to ``length`` tokens with a cache was shown to equal reading everything again.

    A model that nobody proved is proved now, as far as it can be without the files: cached against uncached. Warns once
    per model where the cache cannot be used.
    """
    shown = _PROOFS.get(model)
    if shown is None:
        shown = _PROOFS[model] = _own_proof(model)
    trouble = shown.trouble
    if trouble is None and not keeps_cache(model):
        trouble = "a hook waits in attention, and TransformerLens's own attention of this architecture keeps none"
    if trouble is not None and model not in _WARNED:
        _WARNED[model] = True
        warnings.warn(
            f"Generation with a key-value cache was not shown to be right on this {type(model).__name__} "
            f"({trouble}), so every token is made by reading the whole text again: right, and slower. Another "
            f"surface= or version of TransformerLens may do better.",
            CacheWarning,
            stacklevel=3,
        )
    return trouble is None and not any(at < length for at in boundaries_of(model).turns)


def _own_proof(model: LensModel) -> Proof:
    """Of a model that came ready-made: its cached generation against its own uncached generation."""
    dtype, room = next(iter(model.parameters())).dtype, int(model.cfg.n_ctx)  # pyright: ignore[reportAttributeAccessIssue]
    tokens = torch.randint(int(model.cfg.d_vocab), (min(room, 2048),), generator=torch.Generator().manual_seed(0))
    begun = Proof(0, None, None, None, None, (), str(dtype).split(".")[-1])
    with without_hooks(model):
        return _with_cache(model, _directly(model, begun, tokens, dtype), tokens, min(_MIDDLE, room), dtype)


@contextmanager
def without_hooks(model: LensModel) -> Iterator[None]:
    """Without the hooks at hook points, so that no intervention or recorder of the user's takes part in a proof."""
    with ExitStack() as stack:
        for point in dict.fromkeys(hook_points(model).values()):
            if point._forward_hooks:
                stack.callback(point._forward_hooks.update, dict(point._forward_hooks))
                point._forward_hooks.clear()
        stack.callback(probing.reset, probing.set(True))
        yield
