"""What a hook's name means in the library that wrote it, as a site of this package, or that no site reads it.

    blocks.5.hook_mlp_in           TransformerLens: the stream before the second norm       resid_mid
    blocks.5.mlp.hook_in           what the MLP reads, after the norm's weight              mlp_in
    blocks.5.ln2.hook_normalized   normalised, before the norm's weight                     mlp_in / weight
    model.layers.5.pre_feedforward_layernorm.output   Hugging Face's modules (Gemma)        mlp_in
    layers.5.mlp                   a module: its output; of a transcoder input and output   mlp_out

One word means different tensors in different libraries, so a name is never taken for the site that it resembles:
``tests/dictionaries/test_hook_names.py`` compares each with TransformerLens's own cache.

Source: SAELens 6.54, circuit-tracer 0.5.0, sparsify (its trainer's hook), dictionary_learning, Gemma Scope 2's configs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tl_em.errors import UsageError
from tl_em.models.sites import Site, Stream


class Place(NamedTuple):
    """Where a dictionary reads or writes.

    Args:
        site: the nearest site.
        before_weight: whether it is that of ``mlp_in`` before the norm's weight and bias.
        module: whether it is a module's own output, which a norm behind the module would still change.
    """

    site: Site
    before_weight: bool = False
    module: bool = False


_LENS: Mapping[str, Stream] = {
    "hook_resid_pre": "resid_pre", "hook_in": "resid_pre", "hook_resid_mid": "resid_mid", "hook_mlp_in": "resid_mid",
    "hook_resid_post": "resid_post", "hook_out": "resid_post", "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out",
    "attn.hook_out": "attn_out", "mlp.hook_out": "mlp_out", "mlp.hook_in": "mlp_in", "ln2.hook_normalized": "mlp_in",
}  # fmt: skip
_HUGGING_FACE: Mapping[str, Stream] = {
    "": "resid_post", "output": "resid_post", "input": "resid_pre", "mlp.input": "mlp_in",
    "mlp": "mlp_out", "self_attn": "attn_out", "attention": "attn_out", "attn": "attn_out",
    "pre_feedforward_layernorm": "mlp_in", "pre_feedforward_layernorm.input": "resid_mid",
    "post_feedforward_layernorm": "mlp_out",
}  # fmt: skip
"""A module's name is its output's."""
_BEFORE_WEIGHT = ("ln2.hook_normalized",)
_MODULES = ("attn.hook_out", "mlp.hook_out", "mlp", "self_attn", "attention", "attn")
_TRAINER: Mapping[str, Stream] = {
    "resid_pre": "resid_pre", "resid_mid": "resid_mid", "resid_post": "resid_post", "attn_out": "attn_out",
    "attention_out": "attn_out", "mlp_in": "mlp_in", "mlp_out": "mlp_out",
}  # fmt: skip
"""Words that dictionary_learning's scripts put before ``_layer_5``."""
_OPEN = ("post_attention_layernorm",)
"""Modules that are the MLP's norm in one architecture and the attention's in another."""
_BLOCK = re.compile(r"(?:(?:transformer|gpt_neox|model|language_model|base_model)\.)*(?:layers|h)\.(\d+)(?:\.(.+))?")


def place(name: str, field: str) -> Place | None:
    """What a name means; None where it is none of the libraries' names, and only the user can know.

    Args:
        name: of the hook point or module, as the source has it.
        field: of the source's configuration, for the message.

    Raises:
        UsageError: a tensor that no site reads, such as one head's output.

    Example:
        >>> place("blocks.5.hook_mlp_in", "hook_name").site, place("blocks.5.mlp.hook_in", "hook_name").site
        (Site(layer=5, stream='resid_mid'), Site(layer=5, stream='mlp_in'))
    """
    lens = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    trainer = re.fullmatch(r"(\w+)_layer_?(\d+)", name)
    if trainer and trainer[1] in _TRAINER:
        return Place(Site(int(trainer[2]), _TRAINER[trainer[1]]))
    hugging_face = None if lens else _BLOCK.fullmatch(name)
    found = lens or hugging_face
    if found is None:
        return None
    layer, rest = int(found[1]), found[2] or ""
    if hugging_face and rest.split(".")[0] in _OPEN:
        return None
    table, own = _LENS if lens else _HUGGING_FACE, rest if lens else rest.removesuffix(".output")
    if own not in table:
        raise UsageError(
            f"{field} is {name!r}, which names no site of this package (heads, keys, neurons and what the attention "
            "reads are none): another tensor read in its place would name wrong latents. Train one where it can be "
            f"read: em.dictionaries.train_dictionary(model, em.Site({layer}, 'attn_out'), corpus, d_sae=512)"
        )
    return Place(Site(layer, table[own]), own in _BEFORE_WEIGHT, own in _MODULES)


def placed(name: Any, field: str, given: Any, argument: str) -> Place:
    """Where it reads or writes: what the source says, or where it says nothing that is known, what the caller says.

    Args:
        name: as the source has it; None or empty where it says nothing.
        field: of the source's configuration.
        given: the caller's site, or None.
        argument: its name, ``"site_in"`` or ``"site_out"``.

    Raises:
        UsageError: nobody says it, or both do and disagree.
    """
    if given is not None and not isinstance(given, Site):
        raise UsageError(f"{argument}={given!r} is no site; give one, e.g. {argument}=em.Site(3, 'resid_post')")
    said = place(str(name), field) if name else None
    if said is None:
        if given is None:
            raise UsageError(
                f"{field} is {name!r}, which names no site that is known here, and a dictionary read elsewhere than "
                f"where it was trained names wrong latents. Pass {argument}=em.Site(layer, stream) of where it was; "
                "em.dictionaries.dictionary_quality(model, dictionary, prompts) says whether a neighbouring point fits "
                "better"
            )
        return Place(given)
    if given is not None and given != said.site:
        raise UsageError(
            f"{argument}={given!r}, but {field} is {name!r}, which is {said.site!r}: one of the two is wrong. Leave "
            f"{argument} out, or, if you know better than the file, move what was loaded: dictionary.at(em.{given!r})"
        )
    return said


class Sites(NamedTuple):
    """Where the caller says that a dictionary reads and writes; None where its source shall say it."""

    site_in: Any = None
    site_out: Any = None

    def read(self, name: Any, field: str) -> Place:
        """Where it reads: see :func:`placed`."""
        return placed(name, field, self.site_in, "site_in")

    def written(self, name: Any, field: str) -> Place:
        """Where it writes: see :func:`placed`."""
        return placed(name, field, self.site_out, "site_out")
