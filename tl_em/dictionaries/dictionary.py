"""Sparse dictionaries as plain tensors: SAEs and transcoders, whoever trained them, with or without sae-lens.

    a = act(x W_enc + b_enc)        x^ = a W_dec + b_dec        act: relu, jumprelu (pre > threshold) or top-k of relu
                                    x^ = a W_dec + b_dec + x W_skip                     for a transcoder with a skip

Options of a file format (a decoder bias taken off the input, rows rescaled by decoder norms, a gate) are folded into
these tensors by its reader (``formats/``), so that every dictionary is encoded and decoded in one way. What cannot be
folded is refused. A *feature* is one latent of one dictionary, named by the dictionary's hash and the index, so that it
is never read from another.

A dictionary is never attached to the model: SAELens replaces the hook point, and hooks there are lost. It is read by
``capture`` and written by delta hooks (``em.ScaleFeature``), which keep what the dictionary does not explain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.arguments import NOUNS, checked, whole
from tl_em.artefacts import load_tensors, save_tensors
from tl_em.dictionaries.checks import (
    Activation,
    Count,
    Weights,
    Where,
    activation_name,
    as_floats,
    check_agreement,
    check_metadata,
    check_on,
    check_shapes,
    check_sites,
)
from tl_em.dictionaries.norms import mlp_norm
from tl_em.errors import FileError, UsageError, WidthError
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Provenance, Site
from tl_em.showing import showable

SCHEMA = "tl-em/dictionary/1"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
_OPTIONAL = ("threshold", "W_skip")
_OF_A_MODEL = ("model_name", "model_from_pretrained_kwargs")
"""Metadata that ``unchecked`` drops."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """An SAE (``site_out`` None) or a transcoder, float32 on the CPU; ``to(device)`` moves it.

    Args:
        W_enc: [d_model d_sae]; b_enc: [d_sae]; W_dec: [d_sae d_model]; b_dec: [d_model].
        activation: ``"relu"``, ``"jumprelu"`` (needs ``threshold``) or ``"topk"`` (needs ``k``), in any case. It
            decides: a field that belongs to another activation is an error.
        site_in: what it reads; ``site_out``: what it writes, where that is another site (a transcoder).
        threshold: [d_sae], or one number for all; a latent is on where its pre-activation is above. Never below 0.
        k: latents that stay on at a token, 1 to d_sae.
        W_skip: [d_model d_model], of a skip transcoder: what goes past the latents.
        name: for people and links, e.g. SAELens's release and id.
        provenance: of the model that it was trained on, where known.
        metadata: what its source says of itself, in the source's words (``model_name``, ``hook_name``, ``prepend_bos``,
            ``context_size``, …); kept in the file, and checked by :meth:`check`.
        site_out: where it writes; None for an SAE, which writes where it reads.

    Raises:
        WidthError: shapes that do not belong together. NonFiniteError: NaN or infinity in any tensor.
        UsageError: an unknown activation, one without what it needs or beside what contradicts it; numbers out of
            range; integers for weights; sites that are none, or whose order is impossible.

    Example:
        >>> eye = torch.eye(2)
        >>> d = Dictionary(eye, torch.zeros(2), eye, torch.zeros(2), activation="topk", k=1, site_in=Site(1))
        >>> d.encode(torch.tensor([[3.0, 4.0]])).tolist(), d.d_sae
        ([[0.0, 4.0]], 2)
    """

    W_enc: Weights  # checked below, with messages that say what to do
    b_enc: Weights
    W_dec: Weights
    b_dec: Weights
    activation: Activation | Any = field(kw_only=True)
    site_in: Where = field(kw_only=True)
    site_out: Where | None = field(default=None, kw_only=True)  # pyright: ignore[reportGeneralTypeIssues]
    threshold: Weights | None = field(default=None, kw_only=True)
    k: Count | None = field(default=None, kw_only=True)
    W_skip: Weights | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    provenance: Provenance | None = field(default=None, kw_only=True)
    metadata: Mapping[str, Any] | Any = field(default_factory=dict, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("activation", activation_name(self.activation))
        for name in (*_TENSORS, *_OPTIONAL):
            if (given := getattr(self, name)) is not None:
                put(name, as_floats(name, given))
        if self.threshold is not None and self.threshold.ndim == 0:
            put("threshold", self.threshold.repeat(self.b_enc.shape[-1] if self.b_enc.ndim else 1))
        put("site_out", self.site_in if self.site_out is None else self.site_out)
        put("metadata", check_metadata(self.metadata))
        check_shapes(self._held)
        check_sites(self.site_in, self.site_out, self.W_skip is not None)
        put("k", check_agreement(self.activation, self.threshold, self.k, self.d_sae))  # pyright: ignore

    @property
    def _held(self) -> dict[str, Tensor]:
        held = {name: getattr(self, name) for name in (*_TENSORS, *_OPTIONAL)}
        return {name: each for name, each in held.items() if each is not None}

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    @property
    def d_model(self) -> int:
        """Width of what it reads."""
        return self.W_dec.shape[1]

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes another site than it reads."""
        return self.site_in != self.site_out

    @property
    def reads(self) -> tuple[Site, ...]:
        """The sites that it reads; one, but of a crosscoder."""
        return self.site_in if isinstance(self.site_in, tuple) else (self.site_in,)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that it reads, then the one that it writes, each once."""
        assert self.site_out is not None
        return tuple(dict.fromkeys((*self.reads, self.site_out)))

    @checked()
    def inputs(self, x: Float[Tensor, "token site d_model"]) -> Float[Tensor, "token *axes d_model"]:
        """What it encodes, of activations at ``sites``."""
        return x[:, : len(self.reads)] if isinstance(self.site_in, tuple) else x[:, 0]

    @checked()
    def outputs(self, x: Float[Tensor, "token site d_model"]) -> Float[Tensor, "token d_model"]:
        """What it writes, of activations at ``sites``."""
        assert self.site_out is not None
        return x[:, self.sites.index(self.site_out)]

    @cached_property
    def hash(self) -> str:
        """Of the weights: what a feature's index means nothing without."""
        digest = hashlib.sha256(f"{self.activation}/{self.k}/{self.site_in}/{self.site_out}".encode())
        for each in (getattr(self, name) for name in (*_TENSORS, *_OPTIONAL)):
            digest.update(b"" if each is None else each.cpu().contiguous().numpy().tobytes())
        if self.metadata.get("before_norm_weight"):  # another tensor under the same site
            digest.update(b"before_norm_weight")
        return digest.hexdigest()[:16]

    @property
    def label(self) -> str:
        """Its name, or what there is to say in its place."""
        return self.name or f"the dictionary at {' and '.join(map(str, self.reads))}"

    @checked()
    def preactivations(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_sae"]:
        """``x W_enc + b_enc``, in float32.

        Raises:
            WidthError: ``x`` has another width.
        """
        self._check_width(x)
        here = self.to(x.device)
        return x.float() @ here.W_enc + here.b_enc

    def _check_width(self, x: Float[Tensor, "*axes width"]) -> None:
        if x.shape[-1] != self.d_model:
            raise WidthError(
                f"the activations are {x.shape[-1]} wide and {self.label} reads {self.d_model}, so it was trained on "
                "another model or site; capture activations at its site_in"
            )

    @checked()
    def encode(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_sae"]:
        """Latent activations, never negative, in float32."""
        before = self.preactivations(x)
        if self.activation == "jumprelu":
            assert self.threshold is not None
            return torch.where(before > self.threshold.to(x.device), before, 0.0).relu()
        if self.activation == "topk":
            assert self.k is not None
            top = before.topk(self.k, dim=-1)
            return torch.zeros_like(before).scatter(-1, top.indices, top.values.relu())
        return before.relu()

    @checked()
    def encode_as(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_sae"]:
        """Activations in the dtype of ``x``, for graphs in float64."""
        on = self.encode(x) > 0
        return torch.where(on, x @ self.W_enc.to(x) + self.b_enc.to(x), 0.0)

    def gradients(
        self, x: Float[Tensor, "node d_model"], latents: Int[Tensor, " node"]
    ) -> Float[Tensor, "node d_model"]:
        """Gradient of one latent that is on at each row of ``x``."""
        return self.W_enc.T[latents]

    @property
    def affine(self) -> bool:
        """Whether a latent that is on is an affine function of what is read."""
        return True

    @checked()
    def decode(self, a: Float[Tensor, "*axes d_sae"]) -> Float[Tensor, "*axes d_model"]:
        """``a W_dec + b_dec``; what a skip adds depends on ``x`` and is not in it."""
        here = self.to(a.device)
        return a.float() @ here.W_dec + here.b_dec

    @checked()
    def reconstruct(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """What it makes of ``x``: decoded latents, and what a skip adds."""
        return self.completed(self.encode(x), x)

    @checked()
    def completed(
        self, a: Float[Tensor, "*axes d_sae"], x: Float[Tensor, "*read d_model"]
    ) -> Float[Tensor, "*axes d_model"]:
        """``decode(a)``, with what a skip adds for this ``x``."""
        decoded = self.decode(a)
        return decoded if self.W_skip is None else decoded + x.float() @ self.W_skip.to(x.device)

    def to(self, device: Any) -> Dictionary:
        """The same dictionary on a device.

        Raises:
            UsageError: no device is called so.
        """
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise UsageError(f"device={str(device)[:40]!r} is no device of torch's. Give 'cpu' or 'cuda'.") from error
        if self.W_dec.device == device:
            return self
        moved = object.__new__(type(self))  # the fields were checked when they were given
        moved.__dict__.update(self.__dict__ | {name: each.to(device) for name, each in self._held.items()})
        return moved

    @checked()
    def at(self, site_in: Site, site_out: Site | None = None) -> Dictionary:
        """The same tensors read elsewhere: an SAE at another site, a transcoder from another (and to ``site_out``).

        Example:
            >>> eye = torch.eye(2)
            >>> d = Dictionary(eye, torch.zeros(2), eye, torch.zeros(2), activation="relu", site_in=Site(1))
            >>> d.at(Site(2)).site_out
            Site(layer=2, stream='resid_post')
        """
        out = site_out or (self.site_out if self.is_transcoder else site_in)
        told = {k: v for k, v in self.metadata.items() if k not in ("before_norm_weight", "module_output")}
        return self._with(site_in=site_in, site_out=out, metadata=told)

    @checked()
    def check(self, model: LensModel) -> Dictionary:
        """Itself, where it belongs on ``model``, by its width, its provenance and what its source says of its model.

        Raises:
            WidthError: another width. ProvenanceError: another kind of model, or weights that were processed otherwise;
                the message has the call that mends it.
        """
        check_on(self.label, self.d_model, self.sites, self.provenance, self.metadata, model)
        return self

    def reading_one_site(self) -> Dictionary:
        """Itself, where it reads one site, as a graph needs.

        Raises:
            UsageError: a crosscoder.
        """
        if len(self.reads) > 1:
            raise UsageError(
                f"{self.label} reads several sites at once: what a latent reads in a later layer would be an edge back "
                "to an earlier node, and a graph with circles has no effects to add up. Give dictionaries that read "
                "one site; of this one em.score_features(model, dictionary, behaviours) says which latents changed"
            )
        return self

    def unchecked(self) -> Dictionary:
        """Without what :meth:`check` compares with a model but its width, for those who know better."""
        told = {key: value for key, value in self.metadata.items() if key not in _OF_A_MODEL}
        return self._with(provenance=None, metadata=told)

    def _with(self, **changes: Any) -> Dictionary:
        return replace(self, **changes)

    @checked()
    def with_norm_of(self, model: LensModel) -> Dictionary:
        """A dictionary of the normalised stream (``ln2.hook_normalized``) as one of ``mlp_in``, for this model.

        ``mlp_in = normalised * w + b`` of the block's norm is folded into the encoder (of an SAE also into the
        decoder), which changes no latent.

        Raises:
            UsageError: it reads another stream than ``mlp_in``. And what ``norms.mlp_norm`` raises.
        """
        if self.site_in.stream != "mlp_in":
            raise UsageError(
                f"{self.label} reads {self.site_in}, and the norm's weight stands between the normalised stream and "
                "mlp_in only; if it was trained on the normalised stream: dictionary.at(em.Site(layer, 'mlp_in'))"
            )
        if self.d_model != int(model.cfg.d_model):
            return self.check(model)  # raises
        weight, bias = (each.to(self.W_enc.device) for each in mlp_norm(model, self.site_in.layer))
        W_enc, shift = self.W_enc / weight[:, None], bias / weight
        changed: dict[str, Any] = {"W_enc": W_enc, "b_enc": self.b_enc - bias @ W_enc}
        if self.W_skip is not None:
            changed |= {"W_skip": self.W_skip / weight[:, None], "b_dec": self.b_dec - shift @ self.W_skip}
        if not self.is_transcoder:
            changed |= {"W_dec": self.W_dec * weight, "b_dec": self.b_dec * weight + bias}
        told = {key: value for key, value in self.metadata.items() if key != "before_norm_weight"}
        return replace(self, **changed, metadata=told | {"norm_of": Provenance.of(model).model})

    def feature(self, index: Count) -> Feature:
        """One latent.

        Raises:
            UsageError: there is no such latent.
        """
        return Feature(self, index)

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write the tensors and what they mean to one safetensors file, whole or not at all.

        Raises:
            OutputError: the path cannot be written.
        """
        assert self.site_out is not None
        about = {
            "schema": SCHEMA, "activation": self.activation, "k": self.k, "name": self.name, "hash": self.hash,
            "site_in": [self.site_in.layer, self.site_in.stream],
            "site_out": [self.site_out.layer, self.site_out.stream],
            "provenance": None if self.provenance is None else self.provenance.to_json(),
            "metadata": dict(self.metadata),
        }  # fmt: skip
        return save_tensors(path, self._held, about)

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> Dictionary:
        """Read what :meth:`save` wrote; needs no sae-lens.

        Raises:
            FileError: there is no such file. CorruptFileError: truncated, changed, or something else.
        """
        if not Path(path).is_file():
            raise FileError(f"There is no file {str(path)!r}; folders are read by em.load_dictionary(folder)")

        def made(tensors: dict[str, Tensor], about: dict[str, Any]) -> Dictionary:
            said = {name: about[name] for name in ("activation", "k", "name")}
            said |= {name: Site(*about[name]) for name in ("site_in", "site_out")}
            origin = None if about["provenance"] is None else Provenance.from_json(about["provenance"])
            found = cls(**tensors, **said, provenance=origin, metadata=about.get("metadata", {}))
            if found.hash != about["hash"]:
                raise ValueError("its weights are not those that were written")
            return found

        damage = "wrong weights would name wrong features: write it again with dictionary.save(path)"
        return load_tensors(path, SCHEMA, made, damage=damage)

    def __repr__(self) -> str:
        kind = "transcoder" if self.is_transcoder else "SAE"
        said = f"{kind}, {self.activation}, d_model={self.d_model}, d_sae={self.d_sae}"
        return showable(f"Dictionary({self.label}, {said})")


@dataclass(frozen=True, eq=False)
class Feature:
    """One latent of one dictionary.

    Args:
        dictionary: an ``em.Dictionary``, or any object with the members of ``em.SparseDictionary``.
        index: of the latent.

    Raises:
        UsageError: there is no such latent.

    Example:
        >>> import tl_em as em
        >>> em.Feature(em.organisms.toy_dictionary("toy/insecure"), 3).index
        3
    """

    dictionary: Dictionary | Any
    index: Count

    def __post_init__(self) -> None:
        NOUNS["SparseDictionary"]("dictionary", self.dictionary)
        index = whole("the index of a latent", self.index)
        if not 0 <= index < self.dictionary.d_sae:
            raise UsageError(f"{self._label} has latents 0 to {self.dictionary.d_sae - 1}, not {index}")
        object.__setattr__(self, "index", index)

    @property
    def _label(self) -> str:
        return str(getattr(self.dictionary, "label", type(self.dictionary).__name__))

    def __repr__(self) -> str:
        return showable(f"Feature({self._label}, {self.index})")
