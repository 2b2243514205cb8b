"""Where something is read or written, and on which model: layers, streams, positions, provenance.

A *site* is a layer and a stream of the residual computation, ``x_pre -> + attn_out -> x_mid -> + mlp_out -> x_post``.
A *position* says which token of a prompt is meant, in words, so that nobody types an index by hand.
A *provenance* is what a direction must still agree with when it meets a model again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

from tl_em.arguments import SEED, checked, instance_of, list_of, optional, settle, whole
from tl_em.artefacts import checked_fields, json_of
from tl_em.errors import CorruptFileError, PositionError, ProvenanceError, UnknownHookError, UsageError, WidthError
from tl_em.models.source_record import was_proven
from tl_em.models.templates import template_record

Stream = Literal["resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"]
Position = Literal["instruction_end", "prompt_end", "response_mean", "all"] | int

_WORD_POSITIONS = ("instruction_end", "prompt_end", "response_mean", "all")
_TEMPLATE = ("chat_template", "chat_template_kwargs")
_READ_ONLY: tuple[Stream, ...] = ("resid_mid", "mlp_in")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the network: a layer and one of its streams.

    Args:
        layer: block index, counted from 0.
        stream: ``resid_pre``, ``attn_out``, ``mlp_out``, ``resid_post`` (read and write), ``resid_mid`` or ``mlp_in``
            (what the MLP reads, after the norm's weight), which are read only.

    Raises:
        UnknownHookError: no such stream, or a negative layer. UsageError: a layer that is no whole number.

    Example:
        >>> Site(3)
        Site(layer=3, stream='resid_post')
        >>> Site(3).hook_name, Site(0, "mlp_in").writable
        ('blocks.3.hook_resid_post', False)
    """

    layer: int | Any
    stream: Stream | Any = "resid_post"

    def __post_init__(self) -> None:
        if not isinstance(self.stream, str) or self.stream not in get_args(Stream):
            raise UnknownHookError(
                f"There is no stream {self.stream!r}, so the site names no hook point. Use one of {get_args(Stream)}."
            )
        settle(self, layer=whole)
        if self.layer < 0:
            raise UnknownHookError(
                f"Layer {self.layer} is negative; layers are counted from 0, so that a site means the same block in "
                f"every model. Use Site(model.cfg.n_layers - {-self.layer}, {self.stream!r})."
            )

    @property
    def hook_name(self) -> str:
        """The name of the hook point on every surface, but for ``mlp_in``: there, see ``hooks.hook_name``."""
        return f"blocks.{self.layer}.{'mlp.hook_in' if self.stream == 'mlp_in' else 'hook_' + self.stream}"

    @property
    def writable(self) -> bool:
        """Whether an edit here changes the residual stream (at ``resid_mid`` a Bridge edits only the MLP's input)."""
        return self.stream not in _READ_ONLY

    def __str__(self) -> str:
        return f"{self.stream}[{self.layer}]"


as_site = instance_of(
    Site, "site", "it is unclear what to read", "em.Site(layer, stream), e.g. em.Site(3, 'resid_post')"
)
as_sites = list_of(as_site)


def as_positions(name: str, value: Any) -> tuple[Position, ...]:
    """``value``, if it is a list of positions.

    Raises:
        UsageError: one position in place of a list. PositionError: no position.
    """
    if isinstance(value, str):
        raise UsageError(f"{name}={value!r}: {name} are a list, e.g. {name}=['prompt_end']")
    return list_of(as_position)(name, value)


def as_position(name: str, value: Any) -> Position:
    """``value`` as a position: see ``check_position``."""
    return check_position(value)


def check_position(position: Any) -> Position:
    """``position``, if it is one of the words or a negative offset (of Python, numpy or torch).

    Raises:
        PositionError: anything else.

    Example:
        >>> check_position("prompt_end"), check_position(-1)
        ('prompt_end', -1)
        >>> check_position(0)
        Traceback (most recent call last):
        ...
        tl_em.errors.PositionError: Position 0 is not negative: ...
    """
    if isinstance(position, str):
        if position not in _WORD_POSITIONS:
            raise PositionError(
                f"There is no position {position!r}. Use one of {_WORD_POSITIONS}, or a negative offset: -1 is "
                f"prompt_end, -2 the token before it."
            )
        return position  # pyright: ignore[reportReturnType]
    try:
        offset = whole("position", position)
    except UsageError as error:
        raise PositionError(
            f"{error} Or use one of the words {_WORD_POSITIONS}: -1 is prompt_end, -2 the token before it."
        ) from None
    if offset >= 0:
        raise PositionError(
            f"Position {position} is not negative: prompts differ in length, so an index from the front means another "
            f"token in each. Use 'instruction_end', or count back from prompt_end (-1)."
        )
    return offset


@dataclass(frozen=True)
class Provenance:
    """On what a result was made: the model, its processing, the data and the versions.

    Args:
        model: name of the model.
        revision: commit of the weights, where known.
        surface: ``"hooked"`` (HookedTransformer) or ``"bridge"`` (TransformerBridge).
        weights: ``"raw"``, ``"folded"`` (norm weights folded into what reads them), ``"centred"`` (writes centred), or
            both: ``"folded+centred"``.
        n_layers, d_model, d_vocab: shape of the model.
        tokenizer: hash of the vocabulary, None without a tokenizer.
        data: hash of the data, where any was used.
        seed: seed, where one was used.
        versions: versions of the libraries.
        proven: whether ``load_model`` showed the model to compute what its source computes; None for a model that came
            ready-made.
        chat_template: hash of the chat template, ``"none"`` without one; None where it was not recorded.
        chat_template_kwargs: arguments that the template was given; None where they were not recorded.
        prompts: hashes of the prompts that were used, as ``contrasts.hashed`` gives them; None where not recorded.

    Example:
        >>> import tl_em as em
        >>> model = em.load_pair("toy/insecure").base
        >>> em.models.Provenance.of(model).d_model
        96
    """

    model: str
    revision: str | None
    surface: Literal["hooked", "bridge"]
    weights: str
    n_layers: int
    d_model: int
    d_vocab: int
    tokenizer: str | None
    data: str | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    proven: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)
    prompts: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, model: Any, data: str | None = None, seed: int | None = None, prompts: str | None = None) -> Provenance:
        """The provenance of something made on ``model`` now."""
        cfg, tokenizer = model.cfg, getattr(model, "tokenizer", None)
        template, kwargs = template_record(tokenizer)
        seed = optional(SEED)("seed", seed)
        return cls(
            model=str(getattr(cfg, "model_name", None) or type(model).__name__),
            revision=_revision(model),
            surface="bridge" if hasattr(model, "original_model") else "hooked",
            weights=_weight_processing(model),
            n_layers=int(cfg.n_layers),
            d_model=int(cfg.d_model),
            d_vocab=int(cfg.d_vocab),
            tokenizer=vocabulary_hash(tokenizer),
            data=data,
            seed=seed,
            versions=dict(_versions()),
            proven=was_proven(model),
            chat_template=template,
            chat_template_kwargs=kwargs,
            prompts=prompts,
        )

    @checked()
    def differences(self, model: Any) -> list[str]:
        """What of ``model`` disagrees with this: shape, tokenizer, chat template and its arguments, weight processing.

        The surface alone does not. The model's name is not compared: to carry a base model's direction to its fine-tune
        is what the package is for. A template that was not recorded is not compared.
        """
        here = Provenance.of(model)
        compared = ("n_layers", "d_model", "d_vocab", "tokenizer", "weights")
        compared += tuple(name for name in _TEMPLATE if None not in (getattr(self, name), getattr(here, name)))
        pairs = [(name, getattr(self, name), getattr(here, name)) for name in compared]
        return [f"{name}: made on {then!r}, this model has {now!r}" for name, then, now in pairs if then != now]

    def to_json(self) -> str:
        """As a JSON object, keys sorted, so that equal provenances are equal strings."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    @checked()
    def from_json(cls, text: str) -> Provenance:
        """Back from ``to_json``.

        Example:
            >>> p = Provenance("toy", None, "bridge", "raw", n_layers=2, d_model=8, d_vocab=20, tokenizer=None)
            >>> Provenance.from_json(p.to_json()) == p
            True
        """
        try:
            return cls(**checked_fields(cls, json_of(text)))
        except (ValueError, TypeError) as error:
            raise CorruptFileError(
                f"This is no provenance record ({error}), so it cannot be checked on which model the result was made. "
                f"Save the result again with this version of tl_em."
            ) from error


def check_belongs(
    label: str,
    width: int,
    provenance: Provenance | None,
    model: Any,
    *,
    template: bool = False,
    again: str = "make it again on this one",
    unchecked: str = "dataclasses.replace(it, provenance=None)",
) -> None:
    """Raise unless something of this width and provenance belongs on this model.

    Args:
        label: what it is, for the message.
        width, provenance: of the thing.
        model: where it is to be used.
        template: whether it was read off prompts, so that another chat template, or other arguments, would have made
            another thing of the same prompts.
        again: how such a thing is made on this model.
        unchecked: what gives the same thing without the check.

    Raises:
        WidthError, ProvenanceError: it belongs elsewhere.
    """
    if width != model.cfg.d_model:
        raise WidthError(
            f"{label} is {width} wide and the model's d_model is {model.cfg.d_model}; it was made on another model: "
            f"{again}"
        )
    found = provenance.differences(model) if provenance is not None else []
    read = [each for each in found if each.startswith(_TEMPLATE)]
    made = [each for each in found if each not in read]
    if made:
        raise ProvenanceError(
            f"{label} was not made on a model like this one: {'; '.join(made)}. Its axes mean something else here: "
            f"{again}, or, if you know better, use {unchecked}"
        )
    if read and template:
        raise ProvenanceError(
            f"{label} was made from prompts as this model is not shown them: {'; '.join(read)}. The same prompts would "
            "give something else here. Load the model with the same template and em.load_model(source, "
            f"chat_template_kwargs=…), or {again}, or, if you know better, use {unchecked}"
        )


_HASHES: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()


def vocabulary_hash(tokenizer: Any) -> str | None:
    """Hash of a tokenizer's vocabulary (token -> id), None without one. Tokens that a loader added do not count.

    TransformerLens gives a tokenizer without an end-of-text token a new one with an id that the model does not have;
    the same vocabulary must hash equal whether or not a model was booted around it.
    """
    if tokenizer is None:
        return None
    known = _HASHES.get(tokenizer)
    if known is not None and known[0] == len(tokenizer):
        return known[1]
    vocabulary = {
        token: index for token, index in tokenizer.get_vocab().items() if not _added_by_loader(token, index, tokenizer)
    }
    digest = hashlib.sha256(json.dumps(sorted(vocabulary.items()), ensure_ascii=True).encode()).hexdigest()[:16]
    _HASHES[tokenizer] = (len(tokenizer), digest)
    return digest


def weights_hash(model: Any) -> str:
    """A hash of every tensor of a model, by name, kind and value."""
    import torch

    digest = hashlib.sha256()
    for name, each in sorted(model.state_dict().items()):
        digest.update(f"{name}/{each.dtype}/{tuple(each.shape)}".encode())
        digest.update(each.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _added_by_loader(token: str, index: int, tokenizer: Any) -> bool:
    return token == "<|endoftext|>" and index >= int(tokenizer.vocab_size)


def _revision(model: Any) -> str | None:
    config = getattr(getattr(model, "original_model", None), "config", None)
    return getattr(config, "_commit_hash", None)


def _weight_processing(model: Any) -> str:
    """Read off the model itself, because a HookedTransformer's state dict may have been processed by anybody."""
    folded = str(getattr(model.cfg, "normalization_type", "") or "").endswith("Pre")
    centred = False
    if hasattr(model, "original_model"):
        folded = centred = bool(
            getattr(model, "compatibility_mode", False) and getattr(model, "_weights_processed", False)
        )
    else:
        weight = model.blocks[0].attn.W_O.detach().float()
        centred = bool(weight.mean(-1).abs().max() <= 1e-5 * weight.abs().mean())
    return "+".join([word for word, holds in (("folded", folded), ("centred", centred)) if holds]) or "raw"


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in ("tl-em", "transformer-lens", "transformers", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
