"""The way through the wrapped modules is the way through the components, wherever a hook may wait; and it is taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tl_em.errors import CacheWarning
from tl_em.models import proof, unwrapped
from tl_em.models.cache import steps
from tl_em.models.generate import generate
from tl_em.models.hooks import LensModel, find, hooked
from tl_em.models.loading import load_model
from tl_em.models.sites import Site
from tl_em.models.unwrapped import allow_unwrapped, can_unwrap

from ..conftest import benchmark
from . import zoo

pytestmark = pytest.mark.surface
IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(5))


def components(model: Any) -> list[nn.Module]:
    return [each for each in model.original_model.modules() if unwrapped.WRAPPED in each._modules]


def logits(model: Any, hooks: Any = (), n: int = 4) -> torch.Tensor:
    """Of some cached steps under hooks."""
    new, found = IDS, []
    with torch.no_grad(), hooked(model, list(hooks)), steps(model, cached=True) as step:
        for _ in range(n):
            found.append(step(new))
            new = found[-1].argmax(-1)[:, None]
    return torch.stack(found)


def both(model: Any, hooks: Any = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Through the components, and through what they wrap."""
    assert can_unwrap(model)
    allow_unwrapped(model, False)
    slow = logits(model, hooks)
    allow_unwrapped(model, True)
    return slow, logits(model, hooks)


@pytest.fixture
def bridge() -> Any:
    return load_model(zoo.llama(), surface="bridge")


def test_it_is_shown_for_every_family_of_bridges(make_model: Callable[..., LensModel], family: str) -> None:
    model: Any = make_model(family, "bridge")
    shown = proof.proof(model)
    assert shown is not None and shown.direct is not None and shown.direct < 1e-5
    before = components(model)
    with unwrapped.unwrapped(model):
        assert len(components(model)) < len(before) / 2  # those inside a component that stays are never called
    assert all(a is b for a, b in zip(components(model), before, strict=True))
    slow, fast = both(model)
    assert torch.allclose(slow, fast, atol=1e-4)


@pytest.mark.parametrize("stream", ["resid_pre", "attn_out", "mlp_out", "resid_post"])
def test_an_edit_does_what_it_does_to_a_component(bridge: Any, stream: Any) -> None:
    points = [(Site(layer, stream).hook_name, lambda x, hook: x * 1.3 + 0.2) for layer in range(3)]
    slow, fast = both(bridge, points)
    assert torch.allclose(slow, fast, atol=1e-4)
    assert not torch.allclose(slow, both(bridge)[0], atol=1e-2)  # and it does something


@pytest.mark.filterwarnings("ignore:A forward hook edited")  # TransformerLens says so of a norm
@pytest.mark.parametrize("point", ["attn.hook_pattern", "attn.q.hook_out", "mlp.hook_pre", "ln2.hook_normalized"])
def test_a_component_with_a_hook_between_its_steps_stays(bridge: Any, point: str) -> None:
    name = f"blocks.1.{point}"
    if find(bridge, name) is None:
        pytest.skip("not a point of this TransformerLens")
    slow, fast = both(bridge, [(name, lambda x, hook: x * 0.5)])
    assert torch.allclose(slow, fast, atol=1e-4)
    assert not torch.allclose(slow, both(bridge)[0], atol=1e-3)


def test_what_somebody_put_in_the_place_of_a_hook_point_stays(bridge: Any) -> None:
    class Half(nn.Module):  # as SAELens puts its dictionaries
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    plain = logits(bridge)
    kept = bridge.blocks[1].mlp._modules["hook_out"]
    bridge.blocks[1].mlp._modules["hook_out"] = Half()
    slow, fast = both(bridge)
    bridge.blocks[1].mlp._modules["hook_out"] = kept
    assert torch.allclose(slow, fast, atol=1e-4)
    assert not torch.allclose(slow, plain, atol=1e-3)


def test_everything_is_back_after_an_exception(bridge: Any) -> None:
    before = components(bridge)
    with pytest.raises(ZeroDivisionError), unwrapped.unwrapped(bridge):
        assert components(bridge) != before
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(components(bridge), before, strict=True))


def test_a_component_that_computes_something_else_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one whose norm was folded into the weights: then the wrapped module is another function."""
    real = unwrapped._Between.forward

    def doubled(self: Any, *args: Any, **options: Any) -> Any:
        out = real(self, *args, **options)
        return out * 2 if isinstance(out, torch.Tensor) else (out[0] * 2, *out[1:])

    monkeypatch.setattr(unwrapped._Between, "forward", doubled)
    model: Any = load_model(zoo.llama(), surface="bridge")
    shown = proof.proof(model)
    assert shown is not None and shown.direct is None and shown.cache is not None
    assert not can_unwrap(model)


@pytest.mark.parametrize("flag", ["use_attn_result", "use_split_qkv_input"])
def test_a_gate_that_is_opened_keeps_the_components(bridge: Any, flag: str) -> None:
    assert can_unwrap(bridge)
    if not hasattr(bridge.cfg, flag):
        pytest.skip("no such gate")
    setattr(bridge.cfg, flag, True)
    assert not can_unwrap(bridge)


def test_processed_weights_keep_the_components(bridge: Any) -> None:
    assert can_unwrap(bridge)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert not can_unwrap(bridge)


@pytest.mark.parametrize("name", ["llama", "falcon alibi", "mpt"])
def test_a_hook_in_attention_that_changes_nothing_changes_no_answer(name: str) -> None:
    """TransformerLens 3.9's own attention with ALiBi keeps no keys and values: then without a cache, and it is said."""
    model, prompts = load_model(benchmark("families").named(name).make()), [[5, 9, 30, 7, 8, 41, 17], [3, 4]]
    plain = generate(model, prompts, max_new_tokens=6)  # no warning: the cache is used
    with (
        hooked(model, [("blocks.1.attn.hook_attn_scores", lambda x, hook: None)]),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        assert generate(model, prompts, max_new_tokens=6) == plain
    kept = unwrapped._KEPT[model]
    assert kept or name != "llama"
    assert [(each.category, "a hook waits in attention" in str(each.message)) for each in said] == (
        [] if kept else [(CacheWarning, True)]
    )
    assert generate(model, prompts, max_new_tokens=6) == plain
