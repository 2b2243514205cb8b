"""SAELens: its objects, its directories (``cfg.json`` and ``sae_weights.safetensors``) and its registry.

    a = act((x - b_dec) W_enc + b_enc)      where ``apply_b_dec_to_input``, else act(x W_enc + b_enc)

A directory is read without SAELens, by the rules of its loader (also of files from before version 6); a release of the
registry needs SAELens and downloads. Options that change what is computed are folded in, or refused by name.

Source: SAELens 6.54 (``saes/``, ``loading/pretrained_sae_loaders.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.formats import reading
from tl_em.dictionaries.formats.reading import refuse
from tl_em.dictionaries.hook_names import Sites
from tl_em.errors import CorruptFileError, FileError, TlEmError, UsageError
from tl_em.threads import own_warnings

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_KINDS: Mapping[str, str] = {
    "standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "gated": "jumprelu", "transcoder": "relu",
    "skip_transcoder": "relu", "jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu",
}  # fmt: skip
_METADATA = (
    "model_name", "model_class_name", "hook_name", "hook_name_out", "hf_hook_name", "hf_hook_name_out", "context_size",
    "prepend_bos", "exclude_special_tokens", "seqpos_slice", "dataset_path", "model_from_pretrained_kwargs",
    "sae_lens_version", "sae_lens_training_version", "neuronpedia_id", "is_dataset_tokenized",
)  # fmt: skip
_PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "log_threshold", "W_skip", "b_gate", "b_mag", "r_mag",
               "scaling_factor", "finetuning_scaling_factor")  # fmt: skip
_OLD = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_UNFAITHFUL = {
    "mntss_clt_layer_transcoder": "it is one layer of a cross-layer transcoder, whose decoders SAELens adds up; use a "
    "per-layer transcoder",
}
"""Converters of the registry that give something else than the source has."""
_NORMALISED = {
    "expected_average_only_in": "its inputs are scaled by one number that its file does not hold. Where the number is "
    "published, sae.fold_activation_norm_scaling_factor(number), and pass the SAE object; else ",
    "covariance_whitening": "its inputs are whitened by matrices that its file does not hold. Where they are "
    "published, sae.fold_activation_whitening(mean, matrix, inverse), and pass the SAE object; else ",
}
_TRAIN = "train one: em.dictionaries.train_dictionary(model, site, corpus, d_sae=512)"


def from_directory(folder: Path, sites: Sites, name: str | None = None) -> Dictionary:
    """A directory that ``sae.save_model(folder)`` wrote.

    Raises:
        FileError, CorruptFileError: a file is missing or damaged. UsageError: an option that is not held, or no site.
    """
    cfg, tensors = reading.read_json(folder / CONFIG), reading.read_safetensors(folder / WEIGHTS)
    return converted(cfg, tensors, folder, sites, name)


def from_object(sae: Any, sites: Sites, name: str | None = None) -> Dictionary:
    """An SAE of SAELens in memory, or what has its members.

    Raises:
        UsageError: it is none; an option that is not held, or no site.
    """
    cfg = getattr(sae, "cfg", None)
    if cfg is None or getattr(sae, "W_enc", None) is None:
        raise UsageError(
            f"a {type(sae).__name__} is no SAE of SAELens, nor a directory or release of one; give one of these, or "
            "em.load_dictionary(path) for the files of other libraries"
        )
    said = {name: value for name, value in vars(cfg).items() if not name.startswith("_")}
    said["metadata"] = dict(vars(said["metadata"])) if getattr(cfg, "metadata", None) is not None else {}
    said["architecture"] = str(cfg.architecture()) if callable(getattr(cfg, "architecture", None)) else None
    tensors = {p: t.detach() for p in _PARAMETERS if isinstance(t := getattr(sae, p, None), Tensor)}
    state = {p: t for p, t in sae.state_dict().items() if p not in tensors} if hasattr(sae, "state_dict") else {}
    return converted(said, {**tensors, **state}, "this SAE", sites, name)


def from_registry(release: str, sites: Sites, sae_id: str | None) -> Dictionary:
    """An SAE of SAELens's registry, or of a hub repository that SAELens wrote; downloads what is not cached.

    Raises:
        UsageError: SAELens is missing; no such release or id; a converter that changes what the SAE is.
        FileError: the hub cannot be reached, or does not have it. CorruptFileError: what it has is damaged.
    """
    import warnings

    module = sae_lens()
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name  # pyright: ignore

    if sae_id is None:
        raise UsageError(f"{release!r} is no directory, and a release of SAELens's registry needs an id: pass sae_id=")
    try:
        converter = str(get_conversion_loader_name(release))
        if converter in _UNFAITHFUL:
            raise refuse("conversion", converter, _UNFAITHFUL[converter])
        with own_warnings():  # it says which processing it wants; Dictionary.check compares it
            warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
            sae = module.SAE.from_pretrained(release, sae_id)
    except TlEmError:
        raise
    except Exception as error:  # no common base: registry, hub, network, JSON, safetensors, torch
        raise _not_had(release, sae_id, error) from error
    return from_object(sae, sites, sae_id)


def _not_had(release: str, sae_id: str, error: Exception) -> TlEmError:
    said = (str(error) or type(error).__name__).splitlines()[0]
    what = f"{sae_id!r} of {release!r} cannot be had ({type(error).__name__}: {said})"
    if isinstance(error, ValueError) and "not found" in said:
        return UsageError(f"{what}; it is neither a directory nor in SAELens's registry: check release and sae_id")
    if isinstance(error, OSError):  # the hub's own errors, and those of the network, are OSErrors
        return FileError(
            f"{what}. Without a connection, download its folder elsewhere and em.load_dictionary(folder); check the "
            "name and the access otherwise"
        )
    return CorruptFileError(f"{what}; delete what was cached of it and download it again")


# ---- what its settings mean --------------------------------------------------------------------------------------
def converted(
    cfg: Mapping[str, Any], tensors: reading.Tensors, path: Any, sites: Sites, name: str | None = None
) -> Dictionary:
    """Settings and parameters of SAELens as a Dictionary."""
    cfg = _flat(cfg)
    kind = _kind(cfg)
    _check_options(cfg)
    reading.check_known(tensors, _PARAMETERS, path)
    transcoder = "transcoder" in kind
    found = _tensors(kind, tensors, path)
    reading.check_size((cfg.get("d_in"), cfg.get("d_sae")), found["W_enc"], path)
    if transcoder and cfg.get("d_out") not in (None, len(found["W_enc"])):
        raise refuse("d_out", cfg["d_out"], f"it writes another width than it reads ({len(found['W_enc'])}), and no "
                     "two sites differ")  # fmt: skip
    if bool(cfg.get("rescale_acts_by_decoder_norm", False)) and kind == "topk":
        found = reading.rescaled(found)
    read = sites.read(*_name(cfg, "hook_name"))
    if not transcoder and sites.site_out not in (None, read.site):
        raise UsageError(f"{path} is an SAE, which writes what it reads ({read.site}); leave site_out out")
    metadata = {key: _plain(cfg[key]) for key in _METADATA if cfg.get(key) is not None}
    return reading.made(
        path, found, read=read, written=sites.written(*_name(cfg, "hook_name_out")) if transcoder else None,
        metadata={"format": "sae_lens", **metadata},
        # b_dec is where an SAE's inputs are centred; before version 6 that was the default
        off_input=not transcoder and bool(cfg.get("apply_b_dec_to_input", True)),
        activation=_KINDS[kind], k=cfg.get("k") if kind == "topk" else None,
        name=str(cfg["neuronpedia_id"]) if cfg.get("neuronpedia_id") else name,
    )  # fmt: skip


def _flat(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of every version under the names of the newest."""
    metadata = cfg.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise CorruptFileError(f"the metadata of this SAE are a {type(metadata).__name__}; copy its cfg.json again")
    found = {_OLD.get(str(key), str(key)): value for key, value in {**metadata, **cfg}.items() if key != "metadata"}
    options = found.get("activation_fn_kwargs") or {}
    if found.get("activation_fn") == "topk" and found.get("architecture", "standard") in ("standard", "topk", None):
        found |= {"architecture": "topk", "k": options.get("k", found.get("k"))}
        if options.get("signed"):
            raise refuse("activation_fn_kwargs", options, f"signed latents may be negative, and none here is; {_TRAIN}")
    if isinstance(found.get("normalize_activations"), bool):
        found["normalize_activations"] = "expected_average_only_in" if found["normalize_activations"] else "none"
    return found


def _kind(cfg: Mapping[str, Any]) -> str:
    kind = str(cfg.get("architecture") or "standard")
    if kind not in _KINDS:
        raise refuse(
            "architecture", kind,
            "its tensors do not say the same as relu, jumprelu or topk. A checkpoint of training is converted by "
            f"sae.save_inference_model(folder); else {_TRAIN}",
        )  # fmt: skip
    function = cfg.get("activation_fn")
    if function not in ("relu", "topk", None) or (function == "topk" and kind != "topk"):
        raise refuse("activation_fn", function, f"only relu, jumprelu and topk are encoded here; {_TRAIN}")
    return kind


def _check_options(cfg: Mapping[str, Any]) -> None:
    """Refuse what changes the reading of an SAE and cannot be folded into its tensors."""
    normalised = cfg.get("normalize_activations")
    if normalised not in ("none", None):
        why = _NORMALISED.get(str(normalised), "each token is normalised by itself, which no tensor holds; ")
        raise refuse("normalize_activations", normalised, why + _TRAIN)
    shaped = cfg.get("reshape_activations")
    if shaped not in ("none", None):
        raise refuse("reshape_activations", shaped, f"it reads heads side by side, and no site holds them; {_TRAIN}")
    for field in ("hook_head_index", "hook_head_index_out"):
        if cfg.get(field) is not None:
            raise refuse(field, cfg[field], f"it reads one head, and no site holds one; {_TRAIN}")
    if not _every_token(cfg.get("seqpos_slice")):
        raise refuse(
            "seqpos_slice", cfg["seqpos_slice"],
            "it was trained on those tokens of a context alone, and every token is read here. If it may be read "
            "everywhere: sae.cfg.metadata.seqpos_slice = None, and pass the SAE object",
        )  # fmt: skip


def _every_token(given: Any) -> bool:
    try:
        return given is None or slice(*given).indices(10**6) == (0, 10**6, 1)
    except (TypeError, ValueError):
        return False


def _tensors(kind: str, tensors: reading.Tensors, path: Any) -> dict[str, Tensor]:
    for field in ("scaling_factor", "finetuning_scaling_factor"):
        if field in tensors and bool((tensors[field].float() - 1).abs().max() > 1e-6):
            raise refuse(
                field, "a tensor of factors", "each latent is rescaled after encoding; multiply W_dec's rows by it, "
                "and make the dictionary with em.Dictionary(…)",
            )  # fmt: skip
    held = reading.taken(tensors, ("W_dec", "b_dec"), path)
    if kind == "gated":
        values = reading.gated(*reading.taken(tensors, ("W_enc", "b_gate", "b_mag", "r_mag"), path).values())
        return held | dict(zip(("W_enc", "b_enc", "threshold"), values, strict=True))
    held |= reading.taken(tensors, ("W_enc", "b_enc"), path)
    if _KINDS[kind] == "jumprelu":
        log = "log_threshold" in tensors
        (given,) = reading.taken(tensors, ["log_threshold" if log else "threshold"], path).values()
        held["threshold"] = given.float().exp() if log else reading.from_zero(given)
    if "skip" in kind:
        held["W_skip"] = reading.taken(tensors, ("W_skip",), path)["W_skip"].T  # stored [d_out d_in]
    return held


def _name(cfg: Mapping[str, Any], field: str) -> tuple[Any, str]:
    """The hook's name and its field: Hugging Face's where the source gives it, because SAELens's own is its guess."""
    true = f"hf_{field}"
    return (cfg[true], true) if cfg.get(true) else (cfg.get(field), field)


def _plain(value: Any) -> Any:
    """A value of the metadata as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def sae_lens() -> Any:
    """The module, imported without the warnings of deprecated modules that it imports in its turn.

    Raises:
        UsageError: it is not installed, or not with a TransformerLens that it works with.

    Example:
        >>> import importlib.util
        >>> importlib.util.find_spec("sae_lens") is None or sae_lens().__name__ == "sae_lens"
        True
    """
    import warnings

    try:
        with own_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import sae_lens as module  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            "this needs SAELens, which is not installed (or not with a TransformerLens that it works with): "
            "pip install 'tl-em[sae]'. Dictionaries that lie in files need no SAELens: em.load_dictionary(path)"
        ) from error
    return module
