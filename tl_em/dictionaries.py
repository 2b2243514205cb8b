"""Sparse dictionaries as plain tensors: SAEs and transcoders, whoever trained them, with or without sae-lens.

    a = act(x W_enc + b_enc)        x^ = a W_dec + b_dec        act: relu, jumprelu (pre > threshold) or top-k of relu
                                    x^ = a W_dec + b_dec + x W_skip                     for a transcoder with a skip

Options of a file format (a decoder bias taken off the input, rows rescaled by decoder norms) are folded into these
four tensors, so that every dictionary is encoded and decoded in one way. What cannot be folded is refused. A *feature*
is one latent of one dictionary, named by the dictionary's hash and the index, so that it is never read from another.

A dictionary is never attached to the model: SAELens replaces the hook point, and hooks there are lost. It is read by
``capture`` and written by delta hooks (``em.ScaleFeature``), which keep what the dictionary does not explain.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.errors import CorruptFileError, NonFiniteError, UsageError, WidthError
from tl_em.models.sites import Provenance, Site, Stream
from tl_em.writing import replacing

Activation = Literal["relu", "jumprelu", "topk"]
SCHEMA = "tl-em/dictionary/1"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
_OPTIONAL = ("threshold", "W_skip")


@runtime_checkable
class SparseDictionary(Protocol):
    """What the package needs of a dictionary: anything with these members will do."""

    W_enc: Tensor
    W_dec: Tensor
    d_sae: int
    site_in: Site
    site_out: Site

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, a: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Dictionary:
    """An SAE (``site_out`` None) or a transcoder, float32 on the CPU; ``to(device)`` moves it.

    Args:
        W_enc: [d_model d_sae]; b_enc: [d_sae]; W_dec: [d_sae d_model]; b_dec: [d_model].
        activation: ``"relu"``, ``"jumprelu"`` (needs ``threshold``) or ``"topk"`` (needs ``k``).
        site_in: what it reads; ``site_out``: what it writes, where that is another site (a transcoder).
        threshold: [d_sae]; a latent is on where its pre-activation is above.
        k: latents that stay on at a token.
        W_skip: [d_model d_model], of a skip transcoder: what goes past the latents.
        name: for people and links, e.g. SAELens's release and id.
        provenance: of the model that it was trained on, where known.

    Raises:
        WidthError: shapes that do not belong together. NonFiniteError: NaN or infinity.
        UsageError: an unknown activation, or one without what it needs.

    Example:
        >>> eye = torch.eye(2)
        >>> d = Dictionary(eye, torch.zeros(2), eye, torch.zeros(2), activation="topk", k=1, site_in=Site(1))
        >>> d.encode(torch.tensor([[3.0, 4.0]])).tolist(), d.d_sae
        ([[0.0, 4.0]], 2)
    """

    W_enc: Float[Tensor, "..."]  # shapes are checked below, with a message that says what to do
    b_enc: Float[Tensor, "..."]
    W_dec: Float[Tensor, "..."]
    b_dec: Float[Tensor, "..."]
    activation: Activation | str = field(kw_only=True)
    site_in: Site = field(kw_only=True)
    site_out: Site | None = field(default=None, kw_only=True)  # pyright: ignore[reportGeneralTypeIssues]
    threshold: Float[Tensor, "..."] | None = field(default=None, kw_only=True)
    k: int | None = field(default=None, kw_only=True)
    W_skip: Float[Tensor, "..."] | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    provenance: Provenance | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in (*_TENSORS, *_OPTIONAL):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, torch.as_tensor(given).detach().float())
        object.__setattr__(self, "site_out", self.site_out or self.site_in)
        self._check_shapes()
        if self.activation not in get_args(Activation):
            raise UsageError(f"activation={self.activation!r}; there are {', '.join(get_args(Activation))}")
        needs = {"jumprelu": "threshold", "topk": "k"}.get(str(self.activation))
        if needs and getattr(self, needs) is None:
            raise UsageError(f"a {self.activation} dictionary without {needs} cannot say what is on; pass {needs}=")
        for name in _TENSORS:
            if not torch.isfinite(getattr(self, name)).all():
                raise NonFiniteError(f"{name} of {self.label} holds NaN or infinity: load it again, or in float32")

    def _check_shapes(self) -> None:
        d_model, d_sae = self.W_enc.shape if self.W_enc.ndim == 2 else (0, 0)
        wanted = {"b_enc": (d_sae,), "W_dec": (d_sae, d_model), "b_dec": (d_model,)}
        if self.threshold is not None:
            wanted["threshold"] = (d_sae,)
        if self.W_skip is not None:
            wanted["W_skip"] = (d_model, d_model)
        shapes = {name: tuple(getattr(self, name).shape) for name in wanted}
        wrong = {name: shape for name, shape in shapes.items() if shape != wanted[name]}
        if wrong or not d_sae:
            raise WidthError(
                f"W_enc is {tuple(self.W_enc.shape)}, read as [d_model d_sae], and {wrong} do not fit it; transpose "
                "what is stored the other way round"
            )

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def d_model(self) -> int:
        """Width of what it reads."""
        return self.W_enc.shape[0]

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes another site than it reads."""
        return self.site_in != self.site_out

    @cached_property
    def hash(self) -> str:
        """Of the weights: what a feature's index means nothing without."""
        digest = hashlib.sha256(f"{self.activation}/{self.k}/{self.site_in}/{self.site_out}".encode())
        for each in (getattr(self, name) for name in (*_TENSORS, *_OPTIONAL)):
            digest.update(b"" if each is None else each.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def label(self) -> str:
        """Its name, or what there is to say in its place."""
        return self.name or f"the dictionary at {self.site_in}"

    def preactivations(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_sae"]:
        """``x W_enc + b_enc``, in float32.

        Raises:
            WidthError: ``x`` has another width.
        """
        if x.shape[-1] != self.d_model:
            raise WidthError(
                f"the activations are {x.shape[-1]} wide and {self.label} reads {self.d_model}, so it was trained on "
                "another model or site; capture activations at its site_in"
            )
        here = self.to(x.device)
        return x.float() @ here.W_enc + here.b_enc

    def encode(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_sae"]:
        """Latent activations, never negative, in float32."""
        before = self.preactivations(x)
        if self.threshold is not None:
            return torch.where(before > self.threshold.to(x.device), before, 0.0).relu()
        if self.k is not None:
            top = before.topk(self.k, dim=-1)
            return torch.zeros_like(before).scatter(-1, top.indices, top.values.relu())
        return before.relu()

    def decode(self, a: Float[Tensor, "*axes d_sae"]) -> Float[Tensor, "*axes d_model"]:
        """``a W_dec + b_dec``; what a skip adds depends on ``x`` and is not in it."""
        here = self.to(a.device)
        return a.float() @ here.W_dec + here.b_dec

    def to(self, device: Any) -> Dictionary:
        """The same dictionary on a device."""
        device = torch.device(device)
        if self.W_enc.device == device:
            return self
        held = {name: getattr(self, name) for name in (*_TENSORS, *_OPTIONAL)}
        return replace(self, **{name: None if each is None else each.to(device) for name, each in held.items()})

    def feature(self, index: int) -> Feature:
        """One latent.

        Raises:
            UsageError: there is no such latent.
        """
        return Feature(self, index)

    def save(self, path: str | Path) -> Path:
        """Write the tensors and what they mean to one safetensors file, whole or not at all.

        Raises:
            OutputError: the path cannot be written.
        """
        from safetensors.torch import save_file

        assert self.site_out is not None
        about = {
            "schema": SCHEMA, "activation": self.activation, "k": self.k, "name": self.name, "hash": self.hash,
            "site_in": [self.site_in.layer, self.site_in.stream],
            "site_out": [self.site_out.layer, self.site_out.stream],
            "provenance": None if self.provenance is None else self.provenance.to_json(),
        }  # fmt: skip
        held = {name: getattr(self, name) for name in (*_TENSORS, *_OPTIONAL)}
        tensors = {name: each.cpu().contiguous() for name, each in held.items() if each is not None}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"tl_em": json.dumps(about)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Dictionary:
        """Read what :meth:`save` wrote; needs no sae-lens.

        Raises:
            CorruptFileError: missing, truncated, changed, or something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {})["tl_em"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            if about["schema"] != SCHEMA:
                raise KeyError(f"schema {about['schema']!r}")
            sites: list[tuple[int, Stream]] = [about["site_in"], about["site_out"]]
            found = cls(
                **tensors, activation=about["activation"], k=about["k"], name=about["name"],
                site_in=Site(*sites[0]), site_out=Site(*sites[1]),
                provenance=None if about["provenance"] is None else Provenance.from_json(about["provenance"]),
            )  # fmt: skip
            if found.hash != about["hash"]:
                raise ValueError("its weights are not those that were written")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(
                f"{path} is not a dictionary that this version can read ({type(error).__name__}: {error}); wrong "
                "weights would name wrong features: write it again with dictionary.save(path)"
            ) from error
        return found

    def __repr__(self) -> str:
        kind = "transcoder" if self.is_transcoder else "SAE"
        return f"Dictionary({self.label}, {kind}, {self.activation}, d_model={self.d_model}, d_sae={self.d_sae})"


@dataclass(frozen=True, eq=False)
class Feature:
    """One latent of one dictionary.

    Raises:
        UsageError: there is no such latent.
    """

    dictionary: Dictionary
    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.dictionary.d_sae:
            raise UsageError(f"{self.dictionary.label} has latents 0 to {self.dictionary.d_sae - 1}, not {self.index}")

    def __repr__(self) -> str:
        return f"Feature({self.dictionary.label}, {self.index})"


# ---- SAELens -----------------------------------------------------------------------------------------------------
def sae_lens() -> Any:
    """The module, imported without the warnings of deprecated modules that it imports in its turn.

    Raises:
        UsageError: it is not installed, or not with a TransformerLens that it works with.
    """
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import sae_lens as module  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            "this needs SAELens, which is not installed (or not with a TransformerLens that it works with): "
            "pip install 'tl-em[sae]'. Dictionaries that are trained already need no SAELens: em.Dictionary.load(path)"
        ) from error
    return module


def from_sae_lens(source: Any, sae_id: str | None = None, *, site_in: Site | None = None) -> Dictionary:
    """An SAE or transcoder of SAELens as a Dictionary.

    Args:
        source: an SAE object; a local directory that SAELens wrote; or a release of its registry (downloads), with
            ``sae_id``.
        site_in: where it reads, where its metadata do not say, or say it in a way that no site has.

    Raises:
        UsageError: an option that four tensors cannot hold (normalised inputs, reshaped heads), or no site.

    Source of the options: SAELens 6.54.
    """
    if isinstance(source, str | Path):
        SAE = sae_lens().SAE
        local = Path(source)
        source = SAE.load_from_disk(local) if local.is_dir() else SAE.from_pretrained(str(source), sae_id or "")
    cfg = source.cfg
    for option in ("normalize_activations", "reshape_activations"):
        if (value := getattr(cfg, option, "none")) not in ("none", None):
            raise UsageError(
                f"this dictionary has {option}={value!r}, which its tensors alone do not hold, so what is "
                "read with them would be wrong; use a release without it"
            )
    kind = str(cfg.architecture())
    of = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "transcoder": "relu",
          "jumprelu_transcoder": "jumprelu", "skip_transcoder": "relu"}.get(kind)  # fmt: skip
    if of is None or (of == "relu" and getattr(cfg, "activation_fn", "relu") not in ("relu", None)):
        raise UsageError(f"SAELens architecture {kind!r} is not supported; convert it to relu, jumprelu or topk")
    W_enc, b_enc, W_dec, b_dec = (getattr(source, name).detach().float() for name in _TENSORS)
    if getattr(cfg, "apply_b_dec_to_input", False):
        b_enc = b_enc - b_dec @ W_enc
    norms = W_dec.norm(dim=-1) if getattr(cfg, "rescale_acts_by_decoder_norm", False) else None
    if norms is not None:  # SAELens divides by them again when it decodes
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    threshold = getattr(source, "threshold", None) if of == "jumprelu" else None
    return Dictionary(
        W_enc, b_enc, W_dec, b_dec,
        activation=of,
        threshold=threshold,
        k=int(cfg.k) if of == "topk" else None,
        W_skip=None if (skip := getattr(source, "W_skip", None)) is None else skip.detach().T,
        site_in=site_in or _site(cfg.metadata, "hook_name"),
        site_out=_site(cfg.metadata, "hook_name_out") if "transcoder" in kind else None,
        name=_named(cfg.metadata, sae_id),
    )  # fmt: skip


_STREAMS: dict[str, Stream] = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out", "hook_mlp_in": "mlp_in",
    "ln2.hook_normalized": "mlp_in", "mlp.hook_in": "mlp_in",
}  # fmt: skip


def _site(metadata: Any, key: str) -> Site:
    said = str(getattr(metadata, key, None) or "")
    blocks, _, rest = said.partition(".")
    layer, _, hook = rest.partition(".")
    if blocks != "blocks" or not layer.isdigit() or hook not in _STREAMS:
        raise UsageError(f"{key} is {said!r}, which names no site of this package; pass site_in=em.Site(layer, stream)")
    return Site(int(layer), _STREAMS[hook])


def _named(metadata: Any, sae_id: str | None) -> str | None:
    neuronpedia = getattr(metadata, "neuronpedia_id", None)
    return str(neuronpedia) if neuronpedia else sae_id
