"""What the fields of a dictionary may be: floats that are finite, an activation that agrees with them, sites in order.

Every check runs when a dictionary is made, whoever made it, so that no reader of a format can leave one out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import whole
from tl_em.errors import NonFiniteError, UsageError, WidthError
from tl_em.models.sites import Site, Stream

Activation = Literal["relu", "jumprelu", "topk"]
if TYPE_CHECKING:
    Weights = Float[Tensor, "..."]
    Count = int
    Where = Site
else:  # what is none of these reaches the checks below, and not a type checker's own error
    Weights = Count = Where = Any
NEEDS: Mapping[str, str] = {"jumprelu": "threshold", "topk": "k"}
"""By activation, the one field that it is not defined without, and that no other activation has."""
_ORDER: tuple[str, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
assert set(_ORDER) == set(get_args(Stream))


def as_floats(name: str, given: Any) -> Tensor:
    """A field as a float32 tensor without a gradient.

    Raises:
        UsageError: not numbers, or integers or booleans (quantised weights without their scale would be taken for
            weights). NonFiniteError: NaN or infinity, also where float32 cannot hold a float64.
    """
    try:
        tensor = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(given).__name__
        raise UsageError(f"{name} is a {kind}, not an array of numbers ({error}); give it a tensor") from error
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.device.type == "meta":
        raise UsageError(
            f"{name} holds {tensor.dtype} ({tensor.layout}, on {tensor.device}), so it may be quantised, a mask or "
            f"empty storage and not weights. If these are the weights, give {name} as dense floats: "
            f"{name}.to_dense().float()"
        )
    tensor = tensor.float()
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(
            f"{name} holds NaN or infinity in float32, so every latent that it touches would mean nothing: load the "
            "dictionary again, or from a file in float32"
        )
    return tensor


def activation_name(given: Any) -> Activation:
    """``"ReLU"``, ``"jump_relu"``, ``"top-k"`` and the like as the name that is used here.

    Raises:
        UsageError: any other.
    """
    plain = given.lower().replace("-", "").replace("_", "").strip() if isinstance(given, str) else None
    for name in get_args(Activation):
        if plain == name:
            return name
    trained = "batchtopk" if plain in ("batchtopk", "matryoshkabatchtopk") else None
    hint = "; after training, batchtopk is a jumprelu with its threshold" if trained else ""
    raise UsageError(f"activation={given!r}; there are {', '.join(get_args(Activation))}{hint}")


def check_agreement(activation: Activation, threshold: Tensor | None, k: Any, d_sae: int) -> int | None:
    """``k`` as an int; raise unless exactly the fields are given that the activation is defined by.

    Raises:
        UsageError: a field is missing or contradicts the activation, is out of range, or below 0.

    Source: JumpReLU_t(z) = z H(z - t) with t > 0, Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    given = {"threshold": threshold, "k": k}
    needs = NEEDS.get(activation)
    if needs and given[needs] is None:
        raise UsageError(f"a {activation} dictionary without {needs} cannot say what is on; pass {needs}=")
    extra = [name for name, value in given.items() if value is not None and name != needs]
    if extra:
        means = next(a for a, n in NEEDS.items() if n == extra[0])
        raise UsageError(
            f"activation={activation!r} and {extra[0]} contradict each other: {extra[0]} belongs to {means!r}, and "
            f"which latents are on depends on it. Pass activation={means!r}, or leave {extra[0]} out"
        )
    if threshold is not None and bool((threshold < 0).any()):
        raise UsageError(
            f"threshold is negative for {int((threshold < 0).sum())} of {d_sae} latents (least "
            f"{float(threshold.min()):.3g}); JumpReLU is defined from 0 on, and libraries differ on what is on below. "
            "Where the code that trained it takes a ReLU too, that is a threshold of 0 for these"
        )
    return None if k is None else whole("k", k, low=1, high=d_sae)


def check_sites(site_in: Any, site_out: Any, skip: bool) -> None:
    """Raise ``UsageError`` unless both are sites, in the order of the computation, and a skip leads to another site."""
    for name, site in (("site_in", site_in), ("site_out", site_out)):
        if not isinstance(site, Site):
            raise UsageError(f"{name}={site!r} is no site; give one, e.g. {name}=em.Site(3, 'resid_post')")
    if (site_out.layer, _ORDER.index(site_out.stream)) < (site_in.layer, _ORDER.index(site_in.stream)):
        raise UsageError(
            f"it reads {site_in} and writes {site_out}, which comes before: nothing that it reads can have an effect "
            "there. Exchange site_in and site_out, or correct their layers"
        )
    if skip and site_in == site_out:
        raise UsageError(
            f"W_skip goes from what a transcoder reads to what it writes, and this one reads and writes {site_in}; "
            "pass site_out= too, or leave W_skip out"
        )


def check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Raise ``WidthError`` unless the shapes belong together."""
    W_enc = tensors["W_enc"]
    d_model, d_sae = W_enc.shape if W_enc.ndim == 2 else (0, 0)
    wanted = {
        "b_enc": (d_sae,), "W_dec": (d_sae, d_model), "b_dec": (d_model,), "threshold": (d_sae,),
        "W_skip": (d_model, d_model),
    }  # fmt: skip
    shapes = {name: tuple(each.shape) for name, each in tensors.items()}
    wrong = {name: shape for name, shape in shapes.items() if wanted.get(name, shape) != shape}
    if wrong or not d_sae or not d_model:
        raise WidthError(
            f"W_enc is {tuple(W_enc.shape)}, read as [d_model d_sae], and {wrong} do not fit it; transpose what is "
            "stored the other way round"
        )


def check_metadata(metadata: Any) -> dict[str, Any]:
    """A copy as JSON has it.

    Raises:
        UsageError: not a mapping of names to what JSON can hold.
    """
    try:
        found = json.loads(json.dumps({**metadata}))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"metadata={metadata!r} cannot be written as JSON ({error}), so it would be lost with the file; give plain "
            "strings, numbers and lists by name"
        ) from error
    return found
