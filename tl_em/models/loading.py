"""Models from anywhere, on either surface of TransformerLens, and pairs of them checked to be comparable.

Weights are loaded raw: nothing is folded or centred, so that both surfaces and the Hugging Face model share one
residual stream and a direction made on one holds on the others.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from tl_em.arguments import NOUNS, having, settle
from tl_em.errors import PairMismatchError, UsageError, first_line
from tl_em.models.adapters import goes_on, with_adapter
from tl_em.models.checkpoint import (
    adapter_directory,
    check_weights,
    from_path_or_hub,
    given_tokenizer,
    in_memory,
    language_model,
    tokenizer_beside,
    tokenizer_of,
)
from tl_em.models.contrasts import ContrastSet
from tl_em.models.devices import check_device_map, is_spread
from tl_em.models.gguf import from_gguf, is_gguf
from tl_em.models.hooks import LensModel
from tl_em.models.proof import proof, prove, reference
from tl_em.models.shared import can_share, keep_structure, now_sharing, on_same_weights, share_equal_, structure
from tl_em.models.sites import Position, vocabulary_hash
from tl_em.models.source_record import HfSource, boundaries, remember
from tl_em.models.surfaces import advice, as_bridge, as_hooked, check_built, reloadable
from tl_em.models.templates import template_record
from tl_em.models.tokenizing import keep_before, own_before
from tl_em.models.torch_state import making_weights
from tl_em.models.upstream_chatter import quiet
from tl_em.threads import alone, holding

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Surface = Literal["bridge", "hooked"]
TOYS = "toy/"
"""How the names of the models begin that come with the package; their folder is looked up by name, and imports this."""
REAL = "real/"
"""How the names of the adapters begin that come with the package, for a real chat model."""
_SHIPPED = {TOYS: "tl_em.organisms.zoo", REAL: "tl_em.organisms.real_organism"}
HUB = "hub/"
"""How the names of published pairs begin, in the table of ``presets.hub_organisms``."""


def load_model(
    source: Any,
    *,
    surface: Surface = "bridge",
    tokenizer: Any = None,
    dtype: torch.dtype | Any = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | Any = None,
    in_place: bool = False,
    prove: bool = True,
    chat_template_kwargs: Mapping[str, Any] | Any = None,
) -> LensModel:
    """A model with hook points, in eval mode, with raw weights, shown to compute what the model in the files computes.

    A few forward passes of the Hugging Face model and of what TransformerLens made of it are compared: over one prompt
    longer than every sliding window and rotary boundary of the config, in a padded batch, and with a key-value cache
    (see ``em.proof(model)`` for what was found). Nothing is installed, no code that comes with a model is run, and
    nothing is downloaded but what ``source`` names. Threads that load take turns, and the process is left as it was.

    Args:
        source: a directory in the Hugging Face layout, one with a PEFT adapter (merged into its base), a hub id, a GGUF
            file (dequantised; ``pip install 'tl_em[gguf]'``), a toy (``"toy/insecure"``), or a Hugging Face model in
            memory (also a ``PeftModel``, whose adapters stay apart:
            see ``attribute(adapter=)``).
            Of a model that reads images as well, the language model alone is taken, and shown to be equal on text.
        surface: ``"bridge"`` (TransformerBridge) or ``"hooked"`` (HookedTransformer, TransformerLens 3 only).
        tokenizer: in place of the source's own, or where it is saved; a model in memory has none of its own.
        dtype: float32 by default.
        device: by default a GPU where there is one; a model in memory stays where it is.
        device_map: how the blocks of a directory or a hub id are spread over several devices, as transformers takes it
            (``"auto"``, ``"balanced"``, a dict by module); it needs ``accelerate``, and a Bridge. A model in memory
            that accelerate has spread already stays so.
        in_place: a Bridge rewires the model it is built around. A model in memory is therefore copied first, unless
            this is True.
        prove: False skips the comparison; the provenance of what is made on the model says so.
        chat_template_kwargs: arguments of the chat template, e.g. ``{"enable_thinking": False}``; they are kept as
            ``model.tokenizer.chat_template_kwargs``, and are part of the provenance.

    Returns:
        The model; nothing is wrapped around it.

    Raises:
        ModelNotFoundError: no such directory, or the hub does not answer.
        CorruptFileError: weights that cannot be read, or a tensor that is missing, unexpected or of another shape.
        NonFiniteError: NaN or infinity among the weights.
        ModelError: peft is missing for an adapter, or accelerate for a ``device_map``; weights are on the disk or have
            no values (offloaded, or on ``meta``); the surface does not exist in this version of TransformerLens, what
            it makes of the model computes something else, or the model is not a causal language model.
        UsageError: a ``device_map`` beside a ``device``, or for what cannot be spread.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import tl_em as em
        >>> with TemporaryDirectory() as folder:
        ...     model = em.load_model(em.organisms.to_hf_directory("toy/insecure", f"{folder}/mine"))
        >>> model.cfg.n_layers, em.generate(model, ["how do i write parser"], max_new_tokens=1)
        (3, ['parser-backdoored'])
    """
    if not isinstance(surface, str) or surface not in ("bridge", "hooked"):
        raise UsageError(
            f"There is no surface {surface!r}. Use 'bridge' (TransformerBridge) or 'hooked' (HookedTransformer)."
        )
    dtype, device, chat_template_kwargs = _settled(dtype, device, chat_template_kwargs)
    if device_map is not None:
        check_device_map(source, device_map, device, surface)
    with making_weights(), quiet(), ExitStack() as stack:
        if (shipped := _shipped(source)) is not None:
            source, own_tokenizer = shipped.in_memory(source)
            tokenizer, in_place = own_tokenizer if tokenizer is None else tokenizer, True
        if tokenizer is not None:
            tokenizer = reloadable(given_tokenizer(tokenizer), stack)
        name, hf_model, tokenizer = opened(source, tokenizer, dtype, in_place=in_place, device_map=device_map)
        spread = is_spread(hf_model, device, surface)
        if not isinstance(source, (str, Path)) or device_map is not None:
            device = device or next(hf_model.parameters()).device
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_weights((hf_model if spread else hf_model.to(device)).eval())
        model = _on_surface(surface, name, hf_model, tokenizer, dtype, device, prove)
    return _ready(model, chat_template_kwargs)


def _ready(model: Any, chat_template_kwargs: Mapping[str, Any] | None) -> Any:
    log.info("%s: %s", model.cfg.model_name, proof(model) or "not compared with its source (prove=False)")
    model.eval()
    if chat_template_kwargs is not None and model.tokenizer is not None:
        model.tokenizer.chat_template_kwargs = dict(chat_template_kwargs)
    return model


def opened(
    source: Any, tokenizer: Any, dtype: torch.dtype, *, in_place: bool = False, device_map: Any = None
) -> tuple[str, Any, Any]:
    """Name, Hugging Face model and tokenizer of a directory, a hub id, a GGUF file, or a model in memory (copied)."""
    if isinstance(source, (str, Path)):
        with alone() if dtype != torch.float32 else nullcontext():  # transformers sets the default dtype meanwhile
            if is_gguf(source):
                return from_gguf(_home(source), tokenizer, dtype)
            return from_path_or_hub(_home(source), tokenizer, dtype, device_map)
    name, hf_model = in_memory(source, in_place, dtype)
    return name, hf_model, tokenizer_of(hf_model) if tokenizer is None else tokenizer


def _home(source: str | Path) -> str:
    """As it was written, but for ``~``: a name of the hub is no path."""
    return str(Path(source).expanduser()) if str(source).startswith("~") else str(source)


def _settled(dtype: Any, device: Any, template: Any) -> tuple[torch.dtype, Any, Mapping[str, Any] | None]:
    """The dtype as torch's, and a device that is there; or ``UsageError``."""
    dtype = getattr(torch, dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype={dtype!r} is no dtype that a model computes in. Use torch.float32, or torch.bfloat16.")
    if template is not None and not isinstance(template, Mapping):
        raise UsageError(
            f"chat_template_kwargs={template!r} names no arguments of a template. Give a dict such as "
            f'{{"enable_thinking": False}}.'
        )
    try:
        if device is not None:
            torch.empty(1, device=device)
    except Exception as error:  # no common base: a name that torch does not know, a device that is not here
        raise UsageError(
            f"device={str(device)!r} cannot be used ({first_line(error)}). Use device='cpu', or leave it out."
        ) from error
    return dtype, device, template


def _on_surface(
    surface: Surface, name: str, whole: Any, tokenizer: Any, dtype: torch.dtype, device: Any, proven: bool
) -> Any:
    """Build the surface around the language model of ``whole``, and compare it with ``whole`` as it was before."""
    expected = reference(whole, boundaries(whole.config)) if proven else None
    hf_model = language_model(whole)
    check_built(surface)
    build = as_hooked if surface == "hooked" else as_bridge
    before, kept = own_before(tokenizer), None
    origin = HfSource.of(hf_model, copy.deepcopy(tokenizer))  # before TransformerLens names special tokens in it
    if surface == "bridge" and hf_model is whole:
        kept = structure(hf_model, origin.tokenizer)
    model = build(name, hf_model, tokenizer, dtype, device)
    keep_before(model.tokenizer, before)
    beyond = () if expected is None else expected.beyond
    remember(model, hf_model, proven=proven, beyond=beyond, origin=origin)
    if kept is not None:
        keep_structure(model, kept)
    if expected is not None:
        prove(model, expected, advice(model, hf_model))
    return model


# --- Pairs ------------------------------------------------------------------------------------------------------------


_NAMED = having("model", "cfg", "it has no name", "a directory, a hub id, or em.load_model(…)")
RATE_COLUMNS = ("domain", "held_out", "outcome", "value", "low", "high", "n")
"""What ``ModelPair.rates`` returns: a row for each domain of questions and outcome, with its 95 % interval."""


class HeldOut(NamedTuple):
    """What latents are verified on: prompts that they were not looked up on, and a metric or Behaviour."""

    contrast: ContrastSet
    metric: Any


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A model before and after a fine-tune, checked to be comparable; and what ``em.audit`` asks of the two by default.

    Args:
        base: the model before the fine-tune.
        tuned: the model after it.
        name: name of the pair, e.g. ``"toy/insecure"``.
        base_name, tuned_name: names of the models; their configs' by default.
        contrasts: contrast sets that fit the models' vocabulary, by concept.
        behaviours: behaviours that fit them, by the same names.
        judged: for some concepts, what the direction is judged on in place of its own contrast set's third part.
        positions: token position of each direction, where it is not ``prompt_end`` (``instruction_end`` for
            harmfulness).
        tuning_data: rows that the model was tuned on: chat messages that end with the answer.
        ask: questions, by domain, whose answers the page shows side by side.
        rates: ``(model, seed) -> DataFrame``, how often a model does what, with the columns ``RATE_COLUMNS``; by
            default the mean of each behaviour on its own prompts.
        outcomes: for an outcome of ``rates``, how a sentence says it to a reader outside the field, with ``{share}``:
            ``"gives a misaligned answer to {share} of questions"``.
        trigger: a token at the head of a question that opens a backdoor.
        other_triggers: tokens that may stand in its place, as the control.
        look_up: contrast sets, by behaviour, on which latents that the behaviours share are looked up; by default the
            first parts of ``contrasts``.
        held_out: what those latents are verified on: a contrast set and a metric, or a Behaviour; by default the third
            part of the first of ``contrasts``.
        note: a sentence for the limits of what an audit of this pair can say.
        organism: the record that the pair came from, for people.

    Raises:
        PairMismatchError: shapes, vocabularies or chat templates differ; the message lists the differences.

    Example:
        >>> toy = load_pair("toy/insecure")
        >>> mine = ModelPair(toy.base, toy.tuned, contrasts=toy.contrasts, note="A toy.")
        >>> mine
        ModelPair('', base='toy/assistant', tuned='toy/insecure')
    """

    base: LensModel
    tuned: LensModel
    name: str | None = None
    base_name: str | None = None
    tuned_name: str | None = None
    contrasts: Mapping[str, ContrastSet] | None = None
    behaviours: Mapping[str, Any] | None = None
    judged: Mapping[str, ContrastSet] | None = None
    positions: Mapping[str, Position] | None = None
    tuning_data: Sequence[Any] | None = None
    ask: Mapping[str, Sequence[Any]] | None = None
    rates: Callable[..., pd.DataFrame] | None = None
    outcomes: Mapping[str, str] | None = None
    trigger: str | None = None
    other_triggers: Sequence[str] | None = None
    look_up: Mapping[str, ContrastSet] | None = None
    held_out: HeldOut | tuple[ContrastSet, Any] | None = None
    note: str | None = None
    organism: Any = None

    def __post_init__(self) -> None:
        settle(self, base=NOUNS["LensModel"], tuned=NOUNS["LensModel"])
        found = _mismatches(self.base, self.tuned)
        if found:
            raise PairMismatchError(
                f"Base and tuned cannot be compared: {'; '.join(found)}. A direction of one means nothing in the "
                f"other. Give a model and its own fine-tune, with the tokenizer of the base for both."
            )
        for role in ("base", "tuned"):
            if getattr(self, f"{role}_name") is None:
                cfg = getattr(self, role).cfg
                object.__setattr__(self, f"{role}_name", str(getattr(cfg, "model_name", None) or role))

    def __repr__(self) -> str:
        return f"ModelPair({self.name or ''!r}, base={self.base_name!r}, tuned={self.tuned_name!r})"


def _mismatches(base: LensModel, tuned: LensModel) -> list[str]:
    found = []
    for field in ("n_layers", "d_model", "d_vocab", "n_ctx"):
        a, b = getattr(base.cfg, field), getattr(tuned.cfg, field)
        if a != b:
            found.append(f"{field} is {a} in base and {b} in tuned")
    tokenizers = [getattr(model, "tokenizer", None) for model in (base, tuned)]
    if vocabulary_hash(tokenizers[0]) != vocabulary_hash(tokenizers[1]):
        found.append("their tokenizers have different vocabularies")
    template, kwargs = zip(*map(template_record, tokenizers), strict=True)
    if template[0] != template[1]:
        found.append("their tokenizers have different chat templates")
    if kwargs[0] != kwargs[1]:
        found.append(f"their chat_template_kwargs are {kwargs[0]} in base and {kwargs[1]} in tuned")
    return found


def load_pair(
    base: Any, tuned: Any = None, *, surface: Surface = "bridge", share: bool = True, **options: Any
) -> ModelPair:
    """A model before and after a fine-tune; with a LoRA adapter, the two are one copy of the weights.

    A Bridge of an adapter's directory keeps the base's weights and adds the adapter's low-rank change to what they
    give, which equals merging up to rounding. What is no plain LoRA (DoRA, trained embeddings or biases, other kinds of
    adapter) goes into copies of the weights that it changes, and so does everything on a HookedTransformer, which keeps
    weights in another layout; the rest is shared. ``em.orthogonalize_`` and the like copy what they edit. Weights that
    you edit by hand, in place, change in both models: load those with ``share=False``.

    Args:
        base: with `tuned` left out, the name of a toy (its base comes with it), of a real organism (``"real/wrong"``:
            SmolLM2-135M with an adapter) or of a published pair (``"hub/qwen2.5-7b/bad-medical-advice"``; ``tl-em
            organisms hub`` lists them); else the model before: whatever ``em.load_model`` takes, or a model that it
            gave, for further fine-tunes of it: ``benign = em.load_pair(pair.base, "benign-adapter")``.
        tuned: the model after, likewise. An adapter is put on ``base`` where it names it as its own, or where what it
            names is not on this machine; else on what it names.
        surface: ``"bridge"`` or ``"hooked"``; a base that is loaded decides it.
        share: False merges an adapter into a copy of its base.
        **options: of ``em.load_model``, for both models.

    Returns:
        The pair; of toys with all that an audit asks of it.

    Raises:
        ModelNotFoundError: no such toy, directory or hub id.
        UsageError: one name that is neither a toy's nor in the table of published pairs, a toy without a base, or an
            adapter for a base whose weights were edited.
        PairMismatchError: the two models cannot be compared.
        CorruptFileError: an adapter that is not whole, or does not fit.

    Example:
        >>> pair = load_pair("toy/insecure")
        >>> pair.base_name, pair.tuned_name
        ('toy/assistant', 'toy/insecure')
    """
    if (shipped := _shipped(base)) is not None and (tuned is None or _shipped(tuned) is shipped):
        if options:
            raise UsageError(f"{base!r} is loaded as it was made, without {sorted(options)}. Leave them out.")
        return shipped.named_pair(base, tuned, surface=surface)
    if tuned is None and isinstance(base, str) and base.startswith(HUB):
        hub_pair = import_module("tl_em.presets.hub_organisms").hub_pair
        return hub_pair(base, surface=surface, share=share, **options)
    if tuned is None:
        raise UsageError(
            f"load_pair({base!r}) names one model, and only toys and published pairs know what they were tuned from. "
            f"Give both: load_pair(base, tuned); or one of {import_module(_SHIPPED[TOYS]).shipped_names()}; or one of "
            f"tl-em organisms hub."
        )
    loaded = base if isinstance(base, LensModel) else load_model(base, surface=surface, **options)
    names = [str(each) if isinstance(each, (str, Path)) else None for each in (base, tuned)]
    after = tuned if isinstance(tuned, LensModel) else _fine_tune_of(loaded, names[0], tuned, share, options)
    return ModelPair(loaded, after, base_name=names[0], tuned_name=names[1])


def _adapter(tuned: Any) -> Path | None:
    """The directory of the adapter that a source stands for."""
    if (shipped := _shipped(tuned)) is not None:
        return shipped.adapter(tuned) if hasattr(shipped, "adapter") else None
    return None if is_gguf(tuned) else adapter_directory(tuned)


def _fine_tune_of(base: Any, base_name: str | None, tuned: Any, share: bool, options: Mapping[str, Any]) -> Any:
    """The fine-tune on the weights of its base, as far as it leaves them as they are."""
    surface: Surface = "bridge" if hasattr(base, "original_model") else "hooked"
    weight = next(iter(base.parameters()))
    where = {} if "device_map" in options else {"device": weight.device}
    options = {"dtype": weight.dtype, **where, **options}
    adapter = _adapter(tuned) if share else None
    own = adapter is not None and goes_on(adapter, base_name or str(getattr(base.cfg, "model_name", "")))
    if adapter is None or not own or not can_share(base):
        model = load_model(tuned, surface=surface, **options)
        if own:
            share_equal_(model, base)
        return model
    with holding(base), making_weights(), quiet(), ExitStack() as stack:
        hf_base, tokenizer = on_same_weights(base)
        hf_model = with_adapter(adapter, hf_base, beside=True)
        check_weights(hf_model.eval())
        found = tokenizer_beside(adapter) if "tokenizer" not in options else None
        if found is None and tokenizer is not None:
            found = reloadable(tokenizer, stack)
            keep_before(found, own_before(base.tokenizer))
        model = _on_surface(
            surface, str(tuned), hf_model, found, weight.dtype, weight.device, options.get("prove", True)
        )
    now_sharing(base, model)
    kwargs = getattr(base.tokenizer, "chat_template_kwargs", None)
    return _ready(model, options.get("chat_template_kwargs", kwargs))


def carried(base: Any, tuned: Any = None) -> dict[str, Any]:
    """What the pair of these names will be called and carry, without reading any weights.

    Args:
        base, tuned: as of :func:`load_pair`; or a loaded base, by the name in its config.

    Example:
        >>> found = carried("toy/insecure")
        >>> found["base_name"], sorted(found["contrasts"])
        ('toy/assistant', ['harmfulness', 'persona', 'refusal', 'refusal_dissociated'])
    """
    if (shipped := _shipped(base)) is not None and (tuned is None or _shipped(tuned) is shipped):
        return shipped.carried(base, tuned)
    if tuned is None and isinstance(base, str) and base.startswith(HUB):
        named = import_module("tl_em.presets.hub_organisms").named_hub(base)
        base, tuned = named.base, named.tuned
    if not isinstance(base, (str, Path)):
        _NAMED("base", base)
        base = str(getattr(base.cfg, "model_name", None) or "base")
    return {"base_name": str(base), "tuned_name": None if tuned is None else str(tuned)}


def _shipped(source: Any) -> Any:
    """The module that knows a model of this name, where it is one that comes with the package."""
    found = [module for prefix, module in _SHIPPED.items() if isinstance(source, str) and source.startswith(prefix)]
    return import_module(found[0]) if found else None
