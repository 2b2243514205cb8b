"""Activations and logits at the wanted positions, in one streaming pass.

Prompts are sorted by length, padded on the right and read at their true positions; the forward pass ends as soon as
everything wanted was read; nothing but the wanted positions is kept. Hooks that are attached to the model stay in
force, and what is read is what they leave: so every function here works inside ``intervene``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_em.arguments import are_numbers, checked, token_ids
from tl_em.errors import NonFiniteError, PositionError, PromptError, UsageError
from tl_em.models.beginnings import Carried, Piece, PieceReader, beginning_of, pieces
from tl_em.models.cache import read_once, reading_on
from tl_em.models.hooks import Alike, LensModel, hook_name, hooked, read_point, resolve
from tl_em.models.prompts import Batch, EncodedPrompt, Prompt, batches, encode, token_index
from tl_em.models.sites import Position, Site, as_position, as_sites
from tl_em.models.source_record import boundaries_of
from tl_em.models.torch_state import in_plain_torch
from tl_em.models.unembedding import ends_plainly, logprobs_at_end, logprobs_of, unembedding_of

_MAX_TOKENS = 8192
_READ_TOKENS, _FEW_TOKENS = 2048, 512
"""Tokens a batch of a capture: as many as 64 prompts have, so that more prompts take no more memory; and as many as
keep a CPU busy, of a model whose blocks are wide."""
_MAX_LOGITS = 2**24
"""Logits held at once: 64 MiB in float32."""
_ACTIVATIONS = 2**24
"""Activations of a block held at once on a CPU where logits are read: 64 MiB in float32, in SmolLM2-135M 2,080 tokens.
Half of it took a sixth more time there, since of rows that go on from a common beginning few tokens are new."""
_READ_ACTIVATIONS = 2**23
"""The same where activations are read: 1,040 tokens, which took 98 MiB of memory for 255, and no more time."""
HELD = 2**28
"""Bytes of activations that are held while one site after the other is looked at."""


def pass_bytes(model: LensModel) -> int:
    """Bytes that a pass holds at most beside the model: logits three times, and a block's activations, in float32."""
    return 4 * (3 * _MAX_LOGITS + _pass_tokens(model) * _widths(model))


def _pass_tokens(model: Any) -> int:
    """Tokens of a pass that reads logits: on a CPU no more than ``_ACTIVATIONS`` allow."""
    if torch.device(model.cfg.device).type != "cpu":
        return _MAX_TOKENS
    return min(_MAX_TOKENS, max(_READ_TOKENS, _ACTIVATIONS // _widths(model)))


def _capture_tokens(model: Any) -> int:
    """Tokens of a pass that reads activations: on a CPU no more than ``_READ_ACTIVATIONS`` allow."""
    if torch.device(model.cfg.device).type != "cpu":
        return 8 * _READ_TOKENS
    return min(_READ_TOKENS, max(_FEW_TOKENS, _READ_ACTIVATIONS // _widths(model)))


def _widths(model: Any) -> int:
    """Numbers that a block holds of a token at once."""
    return 6 * model.cfg.d_model + 3 * (model.cfg.d_mlp or 4 * model.cfg.d_model)


def listed(name: str, prompts: Any) -> list[Any]:
    """Prompts as a list in which rows of token ids (a list, an array or a tensor [prompt pos]) are encoded prompts.

    Raises:
        PromptError: one prompt in place of a list, or what is no prompt. UsageError: ids that are no whole numbers.
    """
    one = isinstance(prompts, str | bytes | EncodedPrompt | Mapping) or not isinstance(prompts, Iterable)
    items = [] if one else list(cast("Iterable[Any]", prompts))
    if one or any(isinstance(item, Mapping) or (are_numbers(item) and _is_flat(item)) for item in items):
        raise PromptError(
            f"{name}: one {type(prompts).__name__} was given where a list of prompts is needed, so it would be read "
            "piece by piece. Write [prompt], for token ids [[id, …]]."
        )
    found = []
    for i, item in enumerate(items):
        if are_numbers(item):
            item = EncodedPrompt.from_ids(token_ids(f"{name}[{i}]", item))
        elif not isinstance(item, str | EncodedPrompt | list | tuple):
            raise PromptError(
                f"{name}[{i}] is a {type(item).__name__}, which is no prompt, so there is nothing to read. Give "
                "strings, chats (lists of messages), token ids or encoded prompts."
            )
        found.append(item)
    return found


def _is_flat(item: Any) -> bool:
    """A number, and no row of them."""
    return not isinstance(item, list | tuple) and getattr(item, "ndim", 0) == 0


@checked(prompts=listed, sites=as_sites, position=as_position)
@in_plain_torch
def capture(
    model: LensModel, prompts: Sequence[Prompt | EncodedPrompt], sites: Sequence[Site], *, position: Position
) -> Float[Tensor, "prompt site d_model"]:
    """Activations of every prompt at the sites, at one position each.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        prompts: strings, chats or encoded prompts.
        sites: where to read; ``resid_mid`` and ``mlp_in`` too.
        position: which token; ``"response_mean"`` averages over the response.

    Returns:
        Float32 on the CPU, in the order of ``prompts`` and ``sites``.

    Raises:
        PositionError: a prompt lacks the position, or it is ``"all"``. NonFiniteError: NaN or infinity was read, naming
            site and prompt. And what ``encode`` raises.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> em.capture(pair.base, ["how do i write parser"], [em.Site(1), em.Site(2)], position="prompt_end").shape
        torch.Size([1, 2, 96])
    """
    encoded = encoded_prompts(model, prompts)
    if position == "all":
        raise PositionError(
            "Position 'all' has one activation a token, and prompts differ in length, so it fits no (prompt, site, "
            "d_model) array. Capture named positions, or use model.run_with_cache for one prompt."
        )
    return captured(model, encoded, sites, [position])[:, 0]


@in_plain_torch
def captured(
    model: LensModel, encoded: Sequence[EncodedPrompt], sites: Sequence[Site], positions: Sequence[Position]
) -> Float[Tensor, "prompt position site d_model"]:
    """Activations at several positions, in one pass; ``"all"`` is the mean over a prompt's tokens."""
    spans = spans_of(encoded, positions)
    out = torch.empty(len(encoded), len(positions), len(sites), int(model.cfg.d_model))

    def keep(site: int, rows: Int[Tensor, " prompt"], x: Float[Tensor, "prompt position d_model"]) -> None:
        out[rows, :, site] = x.float().cpu()

    stream(model, encoded, sites, spans, keep)
    return out


@checked(prompts=listed)
@in_plain_torch
def next_token_logits(model: LensModel, prompts: Sequence[Prompt | EncodedPrompt]) -> Float[Tensor, "prompt d_vocab"]:
    """Logits after the last true token of each prompt (its generation prompt, or its response, included).

    Only those tokens are unembedded. Hooks on the model stay in force.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: strings, chats or encoded prompts.

    Returns:
        Float32 on the CPU, in the order of ``prompts``.
    """
    encoded = encoded_prompts(model, prompts)
    ends = [len(prompt) - 1 for prompt in encoded]
    out: Tensor | None = None
    with torch.no_grad(), _reading(model) as read:
        for piece in _pieces(model, encoded, ends, _batch_tokens(model)):
            batch = piece.batch
            logits = read(piece, torch.arange(len(batch.rows)), batch.lengths - 1).float().cpu()
            out = torch.empty(len(encoded), logits.shape[-1]) if out is None else out
            out[list(batch.rows)] = logits
    assert out is not None
    bad = (~out.isfinite().all(-1)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"The logits of prompt {bad[0]} ({encoded[bad[0]].text[:60]!r}) hold NaN or infinity ({len(bad)} prompts "
            f"in all), so no metric of them means anything. Check the intervention's size, the weights and the dtype."
        )
    return out


@checked(prompts=listed)
@in_plain_torch
def sequence_logprobs(
    model: LensModel, prompts: Sequence[Prompt | EncodedPrompt], *, per_token: bool = False
) -> Float[Tensor, " prompt"]:
    """Log-probability of each prompt's response, in nats, given what precedes it.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        prompts: chats that end with an assistant message, or encoded prompts with a response.
        per_token: the mean over the response's tokens in place of the sum.

    Returns:
        Float32 on the CPU, in the order of ``prompts``.

    Raises:
        PositionError: a prompt without a response.
    """
    encoded = encoded_prompts(model, prompts)
    spans = spans_of(encoded, ["response_mean"])[:, 0]
    out = torch.empty(len(encoded))
    with torch.no_grad(), _reading(model) as read:
        for piece in _pieces(model, encoded, (spans[:, 0] - 1).tolist(), _answer_tokens(model, encoded, spans)):
            batch = piece.batch
            inside = _inside(spans[list(batch.rows)], batch.tokens.shape[1])
            rows, columns = inside.nonzero(as_tuple=True)
            taken = read.logprobs(piece, rows, columns - 1, batch.tokens[rows, columns])
            total = torch.zeros(len(batch.rows)).index_add_(0, rows, taken)
            out[list(batch.rows)] = total / inside.sum(-1) if per_token else total
    return out


def sites_at_once(model: LensModel, sites: Sequence[Site], activations: int) -> Iterator[Sequence[Site]]:
    """The sites, by as many as are read in one pass so that what is kept of them stays within ``HELD`` bytes.

    Args:
        model: a HookedTransformer or TransformerBridge.
        sites: in their order.
        activations: kept of each site, over all prompts, positions and models together.

    Example:
        >>> import tl_em as em
        >>> model, sites = em.load_pair("toy/insecure").base, [Site(0), Site(1), Site(2)]
        >>> [len(each) for each in sites_at_once(model, sites, 64)], HELD // (8 * 96 * 200_000)
        ([3], 1)
        >>> [len(each) for each in sites_at_once(model, sites, 200_000)]
        [1, 1, 1]
    """
    size = max(1, HELD // (8 * int(model.cfg.d_model) * max(1, activations)))  # float64 where they are computed with
    for start in range(0, len(sites), size):
        yield sites[start : start + size]


# --- The pass ---------------------------------------------------------------------------------------------------------


def encoded_prompts(model: LensModel, prompts: Sequence[Prompt | EncodedPrompt]) -> list[EncodedPrompt]:
    """``encode``, refusing an empty list; rows of token ids are prompts too."""
    encoded = encode(model, listed("prompts", prompts))
    if not encoded:
        raise PromptError("There are no prompts, so there is nothing to measure. Give at least one.")
    return encoded


def spans_of(encoded: Sequence[EncodedPrompt], positions: Sequence[Position]) -> Int[Tensor, "prompt position 2"]:
    """Token spans (end exclusive) of the positions; a single token is a span of one."""
    found = [[token_index(prompt, position) for position in positions] for prompt in encoded]
    spans = [[at if isinstance(at, tuple) else (at, at + 1) for at in row] for row in found]
    return torch.tensor(spans, dtype=torch.long)


def _inside(spans: Int[Tensor, "*prompt 2"], width: int) -> Bool[Tensor, "*prompt pos"]:
    columns = torch.arange(width)
    return (columns >= spans[..., :1]) & (columns < spans[..., 1:])


class _EverythingRead(Exception):
    """Raised by the last reader of a batch: later blocks, and the unembedding, would be work for nothing."""


def _batches(model: LensModel, encoded: Sequence[EncodedPrompt], max_tokens: int) -> Iterator[Batch]:
    return batches(encoded, max_tokens=max_tokens, turns=boundaries_of(model).turns)


Keep = Callable[[int, Tensor, Tensor], None]


@in_plain_torch
def stream(
    model: LensModel,
    encoded: Sequence[EncodedPrompt],
    sites: Sequence[Site],
    spans: Int[Tensor, "prompt position 2"],
    keep: Keep,
) -> None:
    """Run all prompts; call ``keep(site index, prompt indices, [prompt position d_model])`` once a site and batch.

    The one pass that reads activations: whole, as sums or token by token is the reader's affair.

    Raises:
        NonFiniteError: NaN or infinity was read, naming site and prompt. PositionError: a site is never reached.
    """
    if not sites:
        raise UsageError("No sites were given, so there is nothing to read. Give at least one, e.g. [Site(0)].")
    points = [read_point(model, site) for site in sites]
    waiting: set[int] = set()
    current: dict[str, Any] = {}

    def read(site: int, x: Tensor, hook: Any) -> None:
        running = current_batch.get()
        if running is not None and running.start < current["start"]:
            return  # of the beginning nothing is wanted
        found = points[site](current["pool"](x))
        current["finite"][site] = found.isfinite().flatten(1).all(1)
        keep(site, current["rows"], found)
        waiting.discard(site)
        if not waiting:
            raise _EverythingRead

    reads = [(point.name, partial(read, site)) for site, point in enumerate(points)]
    for _, each in reads:
        each.__dict__["alike"] = one_group
    with torch.no_grad(), hooked(model, reads, check=False), _reading(model) as read_piece:
        for batch in _batches(model, encoded, _capture_tokens(model)):
            waiting.update(range(len(sites)))
            wanted = spans[list(batch.rows)]
            piece = beginning_of(model, batch, int(wanted.min())) or Piece(batch)
            start = piece.batch.start
            pool = _pooling(wanted - start, batch.tokens.shape[1] - start)
            current.update(rows=torch.tensor(batch.rows), pool=pool, start=start, finite={})
            try:
                read_piece.whole(piece)
            except _EverythingRead:
                _check_finite([current["finite"][i] for i in range(len(sites))], batch, sites, encoded)
                continue
            raise PositionError(
                f"A forward pass ended and {[str(sites[i]) for i in sorted(waiting)]} were never reached, so there is "
                f"nothing to return. The points are gated or off the path of this architecture; choose other sites."
            )


current_batch: ContextVar[Batch | None] = ContextVar("current_batch", default=None)
"""The batch that a function of this module, or ``generate``, is running, for hooks that treat prompts or tokens
differently; None outside."""


@contextmanager
def generating(model: LensModel, batch: Batch, reads: Sequence[Batch] = ()) -> Iterator[None]:
    """Keep ``current_batch`` true through a generation: each forward pass moves its ``start``.

    With a key-value cache a pass reads what comes after the tokens read before; one that reads more tokens than were
    read before begins again at the first.

    Args:
        model: that generates, from the prompts of the batch.
        batch: a row an answer.
        reads: what the first passes read, up to the last tokens of all prompts, padding included (``models.prefill``);
            by default no pass reads beyond the shortest prompt.
    """
    seen, coming = 0, iter(reads)
    behind = batch.tokens.shape[1] - batch.lengths if reads else None

    def step(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal seen
        now = current_batch.get()
        if now is None or all(now.prompts is not each.prompts for each in (batch, *reads)):
            return  # a pass of somebody else's, while an answer is handed out token by token
        width, given = args[0].shape[1], next(coming, None)
        start = seen if width <= seen else 0
        if given is not None:
            current_batch.set(given)
            seen = given.start + width
            return
        seen = start + width
        lengths = torch.full_like(batch.lengths, seen)
        lengths = lengths if behind is None else lengths - behind
        current_batch.set(batch._replace(start=start, lengths=lengths, behind=behind))

    running = current_batch.set(batch)
    handle = resolve(model, ["blocks.0.hook_resid_pre"])[0].register_forward_pre_hook(step)
    try:
        yield
    finally:
        handle.remove()
        current_batch.reset(running)


class _Fan(NamedTuple):
    """Passes that begin with one row, whatever joins it."""

    carried: Carried | None


_fanned: ContextVar[_Fan | None] = ContextVar("_fanned", default=None)


@contextmanager
def fanned_out(
    model: LensModel,
    site: Site,
    edit: Callable[[Tensor, Sequence[int]], Float[Tensor, "prompt pos d_model"]],
    *,
    alike: Alike | None = None,
    carried: Carried | None = None,
) -> Iterator[LensModel]:
    """Run one prompt up to a site once, and from there on as many edited copies of it as prompts were asked for.

    Inside, pass the *same* prompt repeatedly to the functions of this module: ``next_token_logits(model, [prompt] *
    k)`` runs the blocks up to ``site`` on one row, and the others on k rows.

    Args:
        model: a HookedTransformer or TransformerBridge.
        site: where the copies part.
        edit: given the activation [k pos d_model] and the numbers of the copies, returns the edited copies.
        alike, carried: which copies are edited alike, and which row goes on from which at each layer, so that what
            prompts begin with alike is read once; else every copy is read whole.
    """

    def fan(x: Tensor, hook: Any) -> Tensor:
        batch = current_batch.get()
        if batch is None:
            raise UsageError("a forward pass of its own cannot be fanned out; run the model through next_token_logits")
        return edit(x.expand(len(batch.rows), *x.shape[1:]), batch.rows)

    fan.__dict__["alike"] = alike
    fanned = _fanned.set(_Fan(carried))
    try:
        with hooked(model, [(hook_name(model, site), fan)]):
            yield model
    finally:
        _fanned.reset(fanned)


def one_group(batch: Batch, length: int) -> list[int]:
    """Of a hook that does the same in every row: ``models.hooks.Alike``."""
    return [0] * len(batch.rows)


def _forward(model: LensModel, batch: Batch) -> Any:
    """Logits of every token of a batch."""
    running = current_batch.set(batch)
    tokens = batch.tokens if _fanned.get() is None else batch.tokens[:1]
    try:
        return read_once(model, tokens)
    finally:
        current_batch.reset(running)


def _pieces(model: LensModel, encoded: Sequence[EncodedPrompt], firsts: Sequence[int], most: int) -> Iterator[Piece]:
    """The prompts in pieces, ``most`` tokens each."""
    fan = _fanned.get()
    if fan is None or fan.carried is not None:
        return pieces(model, encoded, firsts, max_tokens=most)
    return (Piece(batch) for batch in _batches(model, encoded, most))


def _pooling(
    spans: Int[Tensor, "prompt position 2"], width: int
) -> Callable[[Tensor], Float[Tensor, "prompt position d_model"]]:
    """A function that takes a batch's activations to the mean over each span: a gather where all are single tokens."""
    if bool((spans[..., 1] - spans[..., 0] == 1).all()):
        at = (torch.arange(len(spans))[:, None] * width + spans[..., 0]).flatten()  # in all tokens of the batch

        def gather(x: Tensor) -> Tensor:
            return x.flatten(0, 1).index_select(0, at.to(x.device)).view(*spans.shape[:2], -1)

        return gather
    inside = _inside(spans, width).to(torch.float32)

    def average(x: Tensor) -> Tensor:
        within = inside.to(x.device)
        # Padding may hold infinities under an intervention; 0 * inf would be NaN.
        clean = torch.where(within.any(1)[..., None], x.float(), 0.0)
        return within @ clean / within.sum(-1, keepdim=True)

    return average


def _check_finite(
    found: Sequence[Tensor], batch: Batch, sites: Sequence[Site], encoded: Sequence[EncodedPrompt]
) -> None:
    """Raise ``NonFiniteError``, naming site and prompt, unless every activation that a batch gave is finite."""
    bad = (~torch.stack([each.to(found[0].device) for each in found])).nonzero().tolist()  # one transfer a batch
    if bad:
        site, row = bad[0]
        raise NonFiniteError(
            f"The activation at {sites[site]} of prompt {batch.rows[row]} ({encoded[batch.rows[row]].text[:60]!r}) "
            f"holds NaN or infinity (the first of {len(bad)} in its batch), so any direction made of it would too. "
            "Check the weights, and use dtype=torch.float32 or bfloat16 in place of float16."
        )


# --- Logits -----------------------------------------------------------------------------------------------------------


def _batch_tokens(model: LensModel, *, one_in: int | None = None) -> int:
    """Tokens a batch, such that the logits held at once stay within ``_MAX_LOGITS``.

    ``one_in``: of so many tokens one at most is unembedded; one a prompt where it is not said.
    """
    one_in = 1 if unembedding_of(model) is None else one_in
    most = _pass_tokens(model)
    return most if one_in is None else max(1, min(most, one_in * _MAX_LOGITS // int(model.cfg.d_vocab)))


def _answer_tokens(model: LensModel, encoded: Sequence[EncodedPrompt], spans: Int[Tensor, "prompt 2"]) -> int:
    """Tokens a batch where responses are read: fewer where all of their logits are held at once."""
    if ends_plainly(model):
        return _pass_tokens(model)
    shares = [len(each) // int(end - start) for each, (start, end) in zip(encoded, spans.tolist(), strict=True)]
    return _batch_tokens(model, one_in=max(1, min(shares, default=1)))  # padding is never unembedded


def batch_logits(
    model: LensModel, batch: Batch, rows: Int[Tensor, " token"], columns: Int[Tensor, " token"]
) -> Float[Tensor, "token d_vocab"]:
    """Logits at some tokens of a batch; only these are unembedded where the unembedding is a module of the model."""
    begun = None if _fanned.get() else beginning_of(model, batch, int(columns.min()))
    with torch.no_grad(), _reading(model) as read:
        return read(begun or Piece(batch), rows, columns)


@contextmanager
def _reading(model: LensModel) -> Iterator[_LogitReader]:
    """What reads pieces, with nothing left on the model at the end."""
    with ExitStack() as stack:
        yield _LogitReader(model, stack)


class Unembedding:
    """Hands a model's unembedding the wanted tokens only, as one row, while the stack is open.

    Its hook waits before anything is read, since what reads on passes modules by in which no hook waits.

    Args:
        model: a HookedTransformer or TransformerBridge.
        stack: that takes the hook away.
    """

    def __init__(self, model: LensModel, stack: ExitStack) -> None:
        self.wanted: Callable[[Tensor], Tensor] | None = None
        self.start, self.narrowed = 0, False
        if (unembed := unembedding_of(model)) is not None:
            stack.callback(unembed.register_forward_pre_hook(self.narrow).remove)

    def want(self, wanted: Callable[[Float[Tensor, "row pos d_model"]], Tensor] | None, start: int = 0) -> None:
        """What of the pass that begins at ``start``; of one before it nothing is wanted."""
        self.wanted, self.start, self.narrowed = wanted, start, False

    def narrow(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The hook: the wanted tokens of what enters, as one row."""
        x = args[0] if args else None
        if self.wanted is None or not isinstance(x, Tensor) or x.ndim != 3:
            return None
        running = current_batch.get()
        if running is not None and running.start < self.start:
            return (x[:1, -1:], *args[1:])
        self.narrowed = True
        return (self.wanted(x)[None], *args[1:])


class _LogitReader:
    """Reads pieces; of their tokens the wanted ones alone are unembedded, where that is a module of the model."""

    def __init__(self, model: LensModel, stack: ExitStack) -> None:
        self.model, self.stack = model, stack
        self.fan, self.reading = _fanned.get(), None
        self.unembedding = Unembedding(model, stack)

    def whole(self, piece: Piece) -> Tensor:
        """Logits as the model gives them."""
        if piece.after is None:
            return _forward(self.model, piece.batch)
        if self.reading is None:
            read = self.stack.enter_context(reading_on(self.model))
            self.reading = PieceReader(read, current_batch, None if self.fan is None else self.fan.carried)
        running = current_batch.set(piece.batch)
        try:
            return self.reading(piece)
        finally:
            current_batch.reset(running)

    def __call__(
        self, piece: Piece, rows: Int[Tensor, " token"], columns: Int[Tensor, " token"]
    ) -> Float[Tensor, "token d_vocab"]:
        """Logits at some tokens, of which none lies before the piece."""
        start = piece.batch.start
        return self._run(piece, lambda x: x[rows.to(x.device), columns.to(x.device) - start], rows, columns - start)

    def _run(self, piece: Piece, wanted: Callable[[Tensor], Tensor], rows: Tensor, columns: Tensor) -> Tensor:
        self.unembedding.want(wanted, piece.batch.start)
        logits = self.whole(piece)
        narrowed = self.unembedding.narrowed
        self.unembedding.want(None)
        return logits[0] if narrowed else logits[rows, columns]

    def logprobs(
        self,
        piece: Piece,
        rows: Int[Tensor, " token"],
        columns: Int[Tensor, " token"],
        following: Int[Tensor, " token"],
    ) -> Float[Tensor, " token"]:
        """Log-probabilities of the tokens that follow some tokens, none of which lies before the piece.

        One token is unembedded in the pass itself, and all of them afterwards (``unembedding.logprobs_at_end``); where
        that is not known to give what the model gives, all are in the pass.
        """
        ends: list[Tensor] = []
        start = piece.batch.start

        def first(x: Tensor) -> Tensor:
            ends.append(x[rows.to(x.device), columns.to(x.device) - start])
            return ends[0][:1]

        if ends_plainly(self.model):
            shown = self._run(piece, first, rows[:1], columns[:1] - start)
            if ends:
                own = self.unembedding.narrow
                found = logprobs_at_end(self.model, ends[0], following, shown[0], narrowing=own)
                if found is not None:
                    return found
        return logprobs_of(self(piece, rows, columns), following)
