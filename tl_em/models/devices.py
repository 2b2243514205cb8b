"""Models on several devices: transformers and accelerate spread them, TransformerLens and this package leave them so.

Inputs go to the device of the embedding (``cfg.device``), activations are read where they are made and added up where
the sums are.  Weights that accelerate fetches from the disk, or from the CPU beside a GPU, while a module runs are not
there when a Bridge's component, or a hook, reads them: such a model would compute something else, or fail far from its
cause, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tl_em.errors import ModelError, UsageError

_WHOLE = "device='cpu', or a device_map of GPUs alone"
_NO_PLACE = ("disk", "meta")


def check_device_map(source: Any, device_map: Any, device: Any, surface: str) -> None:
    """Raise unless what a source holds can be spread so, before anything is loaded.

    Raises:
        UsageError: it cannot. ModelError: accelerate is missing.

    Example:
        >>> check_device_map("gpt2", {"transformer": "cpu", "lm_head": "disk"}, None, "bridge")
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: device_map= puts lm_head on the disk, ...
    """
    if not isinstance(device_map, str | Mapping) or not device_map:
        raise UsageError(
            f"device_map={device_map!r} spreads nothing. Give 'auto', 'balanced', or a dict from the names of modules "
            "to devices."
        )
    if device is not None:
        raise UsageError(
            f"device={str(device)!r} puts the whole model on one device and device_map= spreads it; give one of them"
        )
    if surface == "hooked":
        raise UsageError(
            "A HookedTransformer copies the weights into a layout of its own, on one device. Use surface='bridge' for "
            "a model on several."
        )
    if (
        not isinstance(source, str | Path)
        or Path(source).suffix == ".gguf"
        or str(source).startswith(("toy/", "real/"))
    ):
        raise UsageError(
            f"device_map= is for a directory or a hub id, which transformers loads block by block, not for this "
            f"{type(source).__name__ if not isinstance(source, str | Path) else repr(str(source))}. Leave it out; a "
            "model in memory stays where accelerate.dispatch_model put it."
        )
    lost = (
        [name for name, place in device_map.items() if str(place) in _NO_PLACE]
        if isinstance(device_map, Mapping)
        else []
    )
    if lost:
        raise UsageError(
            f"device_map= puts {lost[0] or 'everything'} on the {device_map[lost[0]]}, where no hook finds its weights "
            f"while it runs. Give {_WHOLE}."
        )
    if find_spec("accelerate") is None:
        raise ModelError(
            "device_map= needs the package accelerate, which is not installed. Install the extra: pip install "
            "'tl_em[lora]'."
        )


def check_there(hf_model: Any) -> None:
    """Raise ``ModelError`` where a weight has no values: on ``meta``, or offloaded by accelerate.

    Example:
        >>> import torch
        >>> check_there(torch.nn.Linear(2, 2, device="meta"))
        Traceback (most recent call last):
        ...
        tl_em.errors.ModelError: The weights of this Linear are on the meta device: they have shapes and no values. ...
    """
    if not any(parameter.is_meta for parameter in hf_model.parameters()):
        return
    name = type(hf_model).__name__
    if any(hasattr(module, "_hf_hook") for module in hf_model.modules()):
        raise ModelError(
            f"accelerate keeps weights of this {name} elsewhere (on the disk, or on the CPU beside a GPU) and fetches "
            f"them while a module runs, so hooks and components would read weights that are not there. Load it whole: "
            f"em.load_model(source, …) with {_WHOLE}."
        )
    raise ModelError(
        f"The weights of this {name} are on the meta device: they have shapes and no values. Load them, e.g. with "
        f"{name}.from_pretrained(…)."
    )


def is_spread(hf_model: Any, device: Any, surface: str) -> bool:
    """Whether accelerate moves what runs through a model, which then is to be left where it is.

    Raises:
        ModelError: a weight is not there. UsageError: it was to be moved, or copied into a HookedTransformer.
    """
    check_there(hf_model)
    spread = any(hasattr(module, "_hf_hook") for module in hf_model.modules())
    if spread and (device is not None or surface == "hooked"):
        asked = f"device={str(device)!r}" if device is not None else "surface='hooked'"
        raise UsageError(
            f"accelerate has spread this {type(hf_model).__name__} over devices, and {asked} would gather it on one. "
            "Leave that out; or take its hooks off first: accelerate.hooks.remove_hook_from_submodules(hf_model)."
        )
    return spread
