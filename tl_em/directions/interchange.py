"""Directions that others have published, read into :class:`Direction`: what their indices mean, and nothing executed.

    refusal_direction    direction.pt [d_model], direction_metadata.json {pos, layer}      input of block ``layer``
                         mean_diffs.pt [pos layer d_model], positions counted from the end  input of each block
    persona_vectors      TRAIT_response_avg_diff.pt [layer d_model], n_layers + 1 of them   ``hidden_states[layer]``
    steering-vectors     SteeringVector(layer_activations {layer: [d_model]}, layer_type)   output of that module

``hidden_states[0]`` is the input of block 0, ``hidden_states[l]`` the output of block l - 1; the last one, in Hugging
Face's models, has passed the final norm, so it is no stream of the network and is left out.  Rows at which both classes
read the same token hold rounding of a zero and are left out as well.

Files are read by ``read_pt``, which runs no code of theirs.  A published vector does not say how well its data
supported it: there is no reliability and, unless a model is given, no provenance.  A model that is given is taken, at
your word, for the one that the vectors were made on; what can be checked is its shape, and that its weights are raw, as
they are in those libraries.

Sources: Arditi et al. 2024, arXiv:2406.11717; Chen et al. 2025, arXiv:2507.21509; and their code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import checked, optional
from tl_em.artefacts import json_of, read_text
from tl_em.directions.direction import Direction
from tl_em.directions.profile import Profile, as_directed
from tl_em.errors import CorruptFileError, ProvenanceError, UsageError, WidthError
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, Provenance, Site, Stream, as_position
from tl_em.pt_files import read_pt

_ROUNDING = 1e-6
"""A row that is shorter than this share of the file's longest is rounding of a difference that is 0."""
_METHOD = "difference_in_means"
_TOKENS: dict[str, Position] = {"response_avg": "response_mean", "prompt_last": "prompt_end", "prompt_avg": "all"}
_STREAMS: dict[str, Stream] = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}


def import_refusal_direction(path: str | Path, *, model: LensModel | None = None, name: str = "refusal") -> Direction:
    """The direction that a run of refusal_direction selected.

    Args:
        path: folder of the run, or ``direction.pt`` with ``direction_metadata.json`` beside it.
        model: the model of that run; its shape is checked, and it becomes the provenance.
        name: name of the direction.

    Returns:
        A Direction at ``resid_pre`` of the published layer and the published position.

    Raises:
        CorruptFileError: a file is missing or damaged, holds something else, or NaN.
        WidthError, ProvenanceError: not made on a model like the one given.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import json, torch
        >>> import tl_em as em
        >>> with TemporaryDirectory() as folder:  # as a run of refusal_direction leaves it
        ...     torch.save(torch.ones(96), Path(folder) / "direction.pt")
        ...     _ = Path(folder, "direction_metadata.json").write_text(json.dumps({"pos": -1, "layer": 2}))
        ...     found = em.interop.import_refusal_direction(folder)
        >>> str(found.site), found.vector.shape
        ('resid_pre[2]', torch.Size([96]))

    Source: arXiv:2406.11717 and the repository andyrdt/refusal_direction.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    vector = tensor_in(folder / "direction.pt", axes=1)
    about = folder / "direction_metadata.json"
    try:
        record = json_of(read_text(about))
        position, layer = record["pos"], record["layer"]
        if type(position) is not int or type(layer) is not int or position >= 0 or layer < 0:
            raise ValueError(f"pos={position!r}, layer={layer!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{about} does not say at which position and layer direction.pt was read ({type(error).__name__}: "
            f"{error}), and at another it means nothing; get the whole folder of the run"
        ) from error
    origin = published_origin(model, vector.shape[-1], last=layer)
    return Direction(vector, Site(layer, "resid_pre"), position, name, origin, _METHOD)


def import_mean_diffs(
    path: str | Path, *, model: LensModel | None = None, name: str = "refusal"
) -> tuple[Direction, ...]:
    """All differences in means of a run of refusal_direction: the candidates that it selected from.

    Args:
        path: folder of the run, or ``mean_diffs.pt``.
        model: the model of that run, as for :func:`import_refusal_direction`.
        name: name of the directions.

    Returns:
        Directions at ``resid_pre``, positions outermost; those that are 0 up to rounding are left out.

    Raises:
        CorruptFileError, WidthError, ProvenanceError: as :func:`import_refusal_direction`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> import tl_em as em
        >>> with TemporaryDirectory() as folder:
        ...     torch.save(torch.ones(1, 3, 96), f"{folder}/mean_diffs.pt")  # position, layer, d_model
        ...     found = em.interop.import_mean_diffs(f"{folder}/mean_diffs.pt")
        >>> [str(each.site) for each in found]
        ['resid_pre[0]', 'resid_pre[1]', 'resid_pre[2]']
    """
    inside = Path(path) / "generate_directions" / "mean_diffs.pt"
    stack = tensor_in(inside if inside.is_file() else Path(path), axes=3)
    positions, layers, width = stack.shape
    made = name, published_origin(model, width, layers=layers), _METHOD
    return tuple(
        Direction(stack[p, layer], Site(layer, "resid_pre"), p - positions, *made) for p, layer in _not_zero(stack)
    )


@checked(position=optional(as_position))
def import_persona_vectors(
    path: str | Path, *, position: Position | None = None, model: LensModel | None = None, name: str | None = None
) -> dict[int, Direction]:
    """The persona vectors of one trait, at every layer.

    Args:
        path: ``TRAIT_response_avg_diff.pt``, ``TRAIT_prompt_last_diff.pt`` or ``TRAIT_prompt_avg_diff.pt``.
        position: where they were read, for a file of another name.
        model: the model that they were made on, as for :func:`import_refusal_direction`.
        name: name of the directions; by default the trait in the file's name.

    Returns:
        Directions by the file's own layer number l, which stands for the output of block l - 1.

    Raises:
        UsageError: neither the file's name nor ``position`` says where they were read.
        CorruptFileError, WidthError, ProvenanceError: as :func:`import_refusal_direction`.

    Example:
        >>> import tempfile, torch
        >>> import tl_em as em
        >>> path = f"{tempfile.mkdtemp()}/evil_response_avg_diff.pt"
        >>> torch.save(torch.ones(4, 96), path)  # hidden state, d_model
        >>> sorted(em.interop.import_persona_vectors(path))
        [0, 1, 2]

    Source: arXiv:2507.21509 and its code.
    """
    path = Path(path)
    named = re.fullmatch(r"(.+?)_?(response_avg|prompt_last|prompt_avg)_diff", path.stem)
    if position is None and named is None:
        raise UsageError(
            f"{path.name} does not say over which tokens its vectors are means; pass position='response_mean' (or "
            "'prompt_end'), or keep the published name, TRAIT_response_avg_diff.pt"
        )
    trait, tokens = (named[1], named[2]) if named else (path.stem, "response_avg")
    stack = tensor_in(path, axes=2)
    origin = published_origin(model, stack.shape[-1], layers=len(stack) - 1)
    made = position or _TOKENS[tokens], name or trait, origin, _METHOD
    sites = [Site(0, "resid_pre"), *map(Site, range(len(stack)))]
    return {layer: Direction(stack[layer], sites[layer], *made) for (layer,) in _not_zero(stack[:-1])}


@checked(position=as_position)
def import_steering_vector(
    vector: Any, *, position: Position = "prompt_end", model: LensModel | None = None, name: str | None = None
) -> dict[int, Direction]:
    """A ``SteeringVector`` of the package steering-vectors (or anything with its two attributes), at every layer.

    Outputs of ``self_attn`` and ``mlp`` are ``attn_out`` and ``mlp_out`` where no norm follows them.

    Args:
        vector: an object with ``layer_activations`` {layer: [d_model]} and ``layer_type``.
        position: at which token it was read; the object does not say.  The package's default is the last one.
        model: the model that it was made on, as for :func:`import_refusal_direction`; layers counted from the end need
            it.
        name: name of the directions.

    Returns:
        Directions by layer.

    Raises:
        UsageError: not such an object, a layer type that is no stream, or a negative layer without a model.
        WidthError, NonFiniteError, ZeroDirectionError: what it holds is no direction.
        ProvenanceError: not made on a model like the one given.

    Example:
        >>> from types import SimpleNamespace
        >>> made = SimpleNamespace(layer_activations={3: torch.ones(8)}, layer_type="mlp")
        >>> import_steering_vector(made, name="truth")
        {3: Direction(truth, mlp_out[3], 'prompt_end', d_model=8, norm=2.83)}
    """
    layers, kind = getattr(vector, "layer_activations", None), getattr(vector, "layer_type", None)
    if not isinstance(layers, Mapping) or not layers or kind not in _STREAMS:
        raise UsageError(
            f"a {type(vector).__name__} with layer_type={kind!r} holds no direction of the residual stream or of what "
            f"is written to it; pass a SteeringVector with layers, of type {', '.join(_STREAMS)}"
        )
    found: dict[int, Direction] = {}
    for layer, x in sorted(layers.items()):
        if layer < 0 and model is None:
            raise UsageError(f"layer {layer} is counted from the end, which needs the number of layers; pass model=")
        row = torch.as_tensor(x)
        row = row.reshape(-1) if row.numel() == row.shape[-1] else row
        depth = layer + int(model.cfg.n_layers) if layer < 0 and model is not None else layer
        origin = published_origin(model, row.shape[-1], last=depth)
        found[depth] = Direction(row, Site(depth, _STREAMS[kind]), position, name, origin)
    return found


@checked(directed=as_directed)
def export_steering_vector(directed: Profile | Direction | Any) -> dict[str, Any]:
    """A profile, or one direction, as the arguments of a ``SteeringVector`` of the package steering-vectors.

    That package has no file format of its own (its objects are pickled, and this package writes no pickles), so the
    object is made where it is wanted: ``SteeringVector(**em.interop.export_steering_vector(profile))``.

    Args:
        directed: at ``resid_post``, or at ``resid_pre`` beyond the first layer, which is what the block before gives;
            or at ``attn_out`` or ``mlp_out``, which are outputs of ``self_attn`` and ``mlp`` where no norm follows.

    Returns:
        ``{"layer_activations": {layer: [d_model]}, "layer_type": …}``.

    Raises:
        UsageError: the input of the first block, or a stream that is no module's output.

    Example:
        >>> import tl_em as em
        >>> profile = em.Profile([em.Direction(torch.ones(2), em.Site(layer)) for layer in (3, 4)])
        >>> made = em.interop.export_steering_vector(profile)
        >>> made["layer_type"], sorted(made["layer_activations"])
        ('decoder_block', [3, 4])

    Source: the package steering-vectors, 0.12.
    """
    directions = directed.directions if isinstance(directed, Profile) else (directed,)
    stream = directions[0].site.stream
    kind = next((kind for kind, theirs in _STREAMS.items() if theirs == stream), "decoder_block")
    at = {each.site.layer if kind != "decoder_block" else block_of(each.site): each.vector for each in directions}
    return {"layer_activations": at, "layer_type": kind}


def block_of(site: Site) -> int:
    """The block whose output a site is: where libraries that hook Hugging Face's blocks add a vector.

    Raises:
        UsageError: it is no block's output.
    """
    after = {"resid_post": site.layer, "resid_pre": site.layer - 1}.get(site.stream, -1)
    if after < 0:
        raise UsageError(
            f"{site} is no output of a block, and that is where other libraries add vectors; export directions at "
            "em.Site(layer), or an edited model: em.bake_(model, em.Add(direction)), em.save_model(model, folder)"
        )
    return after


# --- Reading and checking ---------------------------------------------------------------------------------------------


def tensor_in(path: Path, *, axes: int) -> Float[Tensor, "..."]:
    """The one floating-point tensor in a file, float32 on the CPU, with so many axes and finite."""
    found = read_pt(path)
    dense = isinstance(found, Tensor) and found.is_floating_point() and found.layout == torch.strided
    if not dense or found.ndim != axes or 0 in found.shape:
        what = f"shape {tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise CorruptFileError(
            f"{path} holds {what}, not floating-point numbers with {axes} axes; it is another file than its name says"
        )
    if not torch.isfinite(found).all():
        raise CorruptFileError(
            f"{path} holds {int((~torch.isfinite(found)).sum())} values that are NaN or infinite, and so would every "
            "projection; the run that wrote it failed: get another"
        )
    return found.float()


def of_layers(
    rows: Mapping[int, Float[Tensor, " d_model"]],
    path: str | Path,
    model: LensModel | None,
    position: Position,
    name: str | None,
    method: str | None,
) -> Profile:
    """A profile of what is added to the outputs of blocks, by block; vectors of 0 are left out.

    Raises:
        CorruptFileError: there is none, their widths differ, or one is not finite.
        WidthError, ProvenanceError: not made on the model that is given.
    """
    widths = {len(row) for row in rows.values()}
    some = {layer: row for layer, row in sorted(rows.items()) if bool(row.any())}
    if len(widths) != 1 or not some or not all(bool(row.isfinite().all()) for row in rows.values()):
        raise CorruptFileError(
            f"{str(path)!r} holds {len(rows)} vectors of the widths {sorted(widths)}, {len(rows) - len(some)} of them "
            "0, or NaN among them, so they are no directions of a model; get the file again"
        )
    origin = published_origin(model, widths.pop(), last=max(rows))
    return Profile([Direction(row, Site(layer), position, name, origin, method) for layer, row in some.items()])


def _not_zero(stack: Float[Tensor, "..."]) -> list[tuple[int, ...]]:
    """Indices of the vectors that are more than rounding."""
    length = stack.norm(dim=-1)
    return [tuple(row) for row in (length > _ROUNDING * length.max()).nonzero().tolist()]


def published_origin(
    model: LensModel | None, width: int, *, layers: int | None = None, last: int | None = None
) -> Provenance | None:
    """The provenance of vectors made on ``model``, once its shape agrees; None without a model.

    Args:
        model: on which they were made, at the caller's word.
        width: of the vectors.
        layers: of how many layers there are some.
        last: the last layer of which there are some.

    Raises:
        WidthError, ProvenanceError: not made on a model like this one.
    """
    if model is None:
        return None
    origin = Provenance.of(model)
    if width != origin.d_model:
        raise WidthError(
            f"the vectors are {width} wide and the model's d_model is {origin.d_model}: they were made on another model"
        )
    if (layers is not None and layers != origin.n_layers) or (last is not None and not 0 <= last < origin.n_layers):
        raise ProvenanceError(
            f"the vectors are of {f'{layers} layers' if layers is not None else f'layer {last}'} and the model has "
            f"{origin.n_layers}: they were made on another model"
        )
    if origin.weights != "raw":
        raise ProvenanceError(
            f"the vectors were made on raw weights and this model's are {origin.weights}, in which a direction may "
            "point elsewhere; load the model with em.load_model(...), which leaves them as they are"
        )
    return origin
