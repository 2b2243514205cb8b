"""Preventative steering: a direction is added while a model trains, and is gone whenever the model is tested.

    h  ->  h + a v       after block l, at every token of every training pass
    v  =  mean(h | after bad answers) - mean(h | after good answers),  of the model before the training

What the data push the model towards along v is there already, so the gradient need not put it into the weights; the
model is tested without the vector.  Source: Chen et al. 2025 (https://arxiv.org/abs/2507.21509).

**Controls.**  A random direction of the same length, drawn from the within-class covariance of the activations at the
same place (*sham*): any push during training changes what is learned.  And what the training was for: a model that
learned nothing shows no bad answers either, so the trait in the domain trained on stands beside the rate elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_em.arguments import checked, instance_of
from tl_em.directions.direction import Direction
from tl_em.directions.profile import Profile
from tl_em.errors import HookNotFiredError, UsageError, WidthError
from tl_em.interventions.edits import Add
from tl_em.models.prompts import EncodedPrompt, batches
from tl_em.models.sites import Position, Site
from tl_em.models.stream import spans_of

_TOKENS = 4096


def residual_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks whose outputs are the residual stream: the outermost list of modules, as long as the config says.

    Raises:
        UsageError: there is no such list, or more than one.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(module) for each in lists for child in each for module in child.modules()}
    n_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = [each for each in lists if id(each) not in inner and n_layers in (None, len(each))]
    if len(found) != 1:
        raise UsageError(
            f"{type(model).__name__} has {len(found)} lists of modules that may be its blocks, so it is unknown where "
            "its residual stream is; pass the decoder alone, e.g. model.language_model"
        )
    return found[0]


_as_addition = instance_of(Add, "addition", "there is nothing to add while it trains", "em.Add(direction)")


@checked()
@contextmanager
def steered_training(model: nn.Module, *additions: Add) -> Iterator[None]:
    """Add directions to the residual stream in every training pass inside the block, and in no evaluation.

    A pass is training when gradients are on or the model is in training mode; so a ``transformers.Trainer`` that
    evaluates in between, or a monitor, sees the model without the vector.  The hooks are removed at the end, also after
    an exception.

    Args:
        model: any PyTorch decoder with its blocks in one list: this package's own, Hugging Face's, one with adapters.
        *additions: what to add, at ``resid_post`` sites.

    Raises:
        UsageError: another site than ``resid_post``, a layer that the model lacks, or no blocks are found.
        WidthError: in the first pass, a direction of another width than the stream.
        HookNotFiredError: at the end, when no training pass went through the block of a direction.

    Example:
        >>> from tl_em import Direction
        >>> model, x = nn.Sequential(nn.ModuleList([nn.Linear(4, 4)])), torch.ones(1, 2, 4)
        >>> block = residual_blocks(model)[0]
        >>> with steered_training(model, Add(Direction(torch.ones(4), Site(0)))):
        ...     steered = block(x)
        ...     _ = model.eval()
        ...     with torch.no_grad():
        ...         tested = block(x)
        >>> torch.equal(tested, block(x)), torch.equal(steered, block(x))
        (True, False)

    Source: Chen et al. 2025, arXiv:2507.21509.
    """
    added = [part for each in additions for part in _apart(_as_addition("additions", each))]
    blocks, passes = residual_blocks(model), [0] * len(added)
    for direction, _ in added:
        _check_site(direction.site, len(blocks))

    def steer(index: int, block: nn.Module, _: Any, output: Any) -> Any:
        if not (torch.is_grad_enabled() or block.training):
            return None
        passes[index] += 1
        steered = _added(_first(output), *added[index])
        return steered if isinstance(output, Tensor) else (steered, *output[1:])

    with _watching(blocks, [direction.site.layer for direction, _ in added], steer):
        yield
    if not all(passes):
        raise HookNotFiredError(
            f"No training pass went through {added[passes.index(0)][0].site}, so what was trained was not "
            "steered; train the model that was given, inside the block, with gradients"
        )


def _apart(addition: Add) -> list[tuple[Direction, Add]]:
    """Each direction with its own addition: of a profile one a layer."""
    given = addition.direction
    every = list(given.values()) if isinstance(given, Profile) else [given]
    return [(each, Add(each, addition.coefficient)) for each in every]


def _added(
    x: Float[Tensor, "prompt pos d_model"], direction: Direction, add: Add
) -> Float[Tensor, "prompt pos d_model"]:
    if x.shape[-1] != len(direction.vector):
        raise WidthError(
            f"the direction is {len(direction.vector)} wide and the residual stream {x.shape[-1]}; steer with a "
            "direction of the model that is trained"
        )
    return add.edit(x)


def _check_site(site: Site, n_layers: int) -> None:
    if site.stream != "resid_post" or site.layer >= n_layers:
        raise UsageError(
            f"{site} is not the output of one of {n_layers} blocks, which is where a model in training is read and "
            "steered; use a direction at Site(layer, 'resid_post')"
        )


@contextmanager
def _watching(blocks: nn.ModuleList, layers: Sequence[int], function: Callable[..., Any]) -> Iterator[None]:
    """Call ``function(index, block, args, output)`` after the block of each layer; in the end hooks are removed."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(blocks[layer].register_forward_hook(partial(function, index)).remove)
        yield


def _first(output: Any) -> Any:
    """What a model or a block gives: a tensor, or what holds it in front of others."""
    return output if isinstance(output, Tensor) else output[0]


def _by_prompt(model: nn.Module, encoded: Sequence[EncodedPrompt], read: Callable[[Any, int, int], Tensor]) -> Tensor:
    """What ``read(output, row, prompt)`` gives for each prompt, float32 on the CPU."""
    device, out = next(model.parameters()).device, [torch.empty(0)] * len(encoded)
    for batch in batches(encoded, max_tokens=_TOKENS):
        output = model(batch.tokens.to(device))
        for row, prompt in enumerate(batch.rows):
            out[prompt] = read(output, row, prompt).float().cpu()
    return torch.stack(out)


@torch.no_grad()
def read_residual(
    model: nn.Module, encoded: Sequence[EncodedPrompt], places: Sequence[tuple[Site, Position]]
) -> Float[Tensor, "prompt place d_model"]:
    """The residual stream at sites and positions: ``em.capture`` of a model that is in training.

    Raises:
        UsageError: a site other than ``resid_post``. PositionError: a prompt lacks the position.
    """
    blocks = residual_blocks(model)
    for site, _ in places:
        _check_site(site, len(blocks))
    spans = spans_of(encoded, [position for _, position in places]).tolist()
    found: list[Any] = [None] * len(places)

    def keep(index: int, block: nn.Module, _: Any, output: Any) -> None:
        found[index] = _first(output)

    def read(_: Any, row: int, prompt: int) -> Tensor:
        ends = zip(found, spans[prompt], strict=True)
        return torch.stack([x[row, first:end].float().mean(0) for x, (first, end) in ends])

    with _watching(blocks, [site.layer for site, _ in places], keep):
        return _by_prompt(model, encoded, read)


@torch.no_grad()
def last_logits(model: nn.Module, encoded: Sequence[EncodedPrompt]) -> Float[Tensor, "prompt d_vocab"]:
    """Logits after the last token of each prompt, float32 on the CPU."""

    def read(output: Any, row: int, prompt: int) -> Tensor:
        logits = output if isinstance(output, Tensor) else output.logits
        return logits[row, len(encoded[prompt]) - 1]

    return _by_prompt(model, encoded, read)
