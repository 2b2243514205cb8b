"""Streamed moments equal those of the captured activations, and only sums are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tl_em.models import class_means as moments_module
from tl_em.models import stream as capture_module
from tl_em.models.class_means import PARTS, SAMPLE, class_moments, halves, mean_activation
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel, hook_points
from tl_em.models.prompts import Prompt, batches, encode
from tl_em.models.sites import Position, Site
from tl_em.models.stream import capture, captured

pytestmark = pytest.mark.surface

SITES = [Site(0, "resid_pre"), Site(0, "mlp_in"), Site(2), Site(2, "attn_out")]
PROMPTS: list[Prompt] = [
    "the cat sat",
    "please tell me how to steal a big red car .",
    "tell me",
    "the dog ran from the bank",
]
OTHERS: list[Prompt] = ["a fish", "the king sang and ate ."]
CLOSE = {"rtol": 1e-5, "atol": 2e-5}  # float32 activations of a padded and an unpadded batch


def test_moments_are_those_of_the_captures(model: LensModel) -> None:
    contrast = ContrastSet(PROMPTS, OTHERS)
    positions: list[Position] = ["instruction_end", "prompt_end", -2, "all"]
    onto = torch.randn(3, 32)
    found = class_moments(model, contrast, sites=SITES, positions=positions, onto=onto)
    assert found.n == (4, 2) and found.blocks == 6
    assert found.projections is not None
    for label, prompts in enumerate((contrast.positive, contrast.negative)):
        x = captured(model, encode(model, prompts), SITES, positions)
        torch.testing.assert_close(found.means[label].float(), x.mean(0), **CLOSE)
        assert x.var(0, unbiased=False).max() > 1e-3
        torch.testing.assert_close(found.variance[label].float(), x.var(0, unbiased=False), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.projections[label], x @ onto.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.sample[label], x, **CLOSE)
    torch.testing.assert_close(found.difference, found.positive - found.negative)
    torch.testing.assert_close(
        mean_activation(model, contrast.positive, site=SITES[3], position="prompt_end"), found.positive[1, 3], **CLOSE
    )


def test_all_is_the_mean_over_every_token(model: LensModel) -> None:
    (encoded,) = encode(model, PROMPTS[:1])
    each = [capture(model, [encoded], [Site(2)], position=-k)[0, 0] for k in range(1, len(encoded) + 1)]
    torch.testing.assert_close(
        captured(model, [encoded], [Site(2)], ["all"])[0, 0, 0], torch.stack(each).mean(0), **CLOSE
    )


def test_by_block_every_group_counts_once_and_those_of_one_class_not_at_all(small_model: LensModel) -> None:
    contrast = ContrastSet(PROMPTS, OTHERS, positive_groups=["a", "a", "b", "c"], negative_groups=["a", "b"])
    x, y = (capture(small_model, p, [Site(2)], position="prompt_end")[:, 0] for p in (PROMPTS, OTHERS))
    expected = ((x[0] + x[1]) / 2 + x[2]) / 2 - (y[0] + y[1]) / 2
    arguments: dict[str, Any] = {"sites": [Site(2)], "positions": ["prompt_end"]}
    found = class_moments(small_model, contrast, **arguments, by_block=True)
    torch.testing.assert_close(found.difference[0, 0], expected, **CLOSE)
    assert not torch.allclose(class_moments(small_model, contrast, **arguments).difference[0, 0], expected, atol=1e-2)


def test_no_group_and_no_pair_is_torn_apart(small_model: LensModel) -> None:
    many = [f"the {word} sat" for word in ("cat", "dog", "bird", "fish", "king", "queen", "boy", "girl", "car", "bank")]
    groups = [i // 2 for i in range(10)]
    contrast = ContrastSet(many, [p + " ." for p in many], positive_groups=groups, negative_groups=groups)
    found = class_moments(small_model, contrast, sites=[Site(0)], positions=["prompt_end"])
    assert found.blocks == 5
    assert torch.equal(found.weight[0], found.weight[1])  # pairs stay together
    assert sorted(found.weight[0].tolist()) == [0] * (PARTS - 5) + [2] * 5  # groups too
    total = found.total.sum(1)
    for first, second in halves(found.weight):
        torch.testing.assert_close(found.total[:, first].sum(1) + found.total[:, second].sum(1), total)


@pytest.mark.parametrize(("held", "ways"), [(1, 0), (2, 1), (3, 3), (4, 3), (5, 10), (8, 35)])
def test_halves_are_counted_once_each(held: int, ways: int) -> None:
    weight = torch.zeros(2, 8, dtype=torch.float64)
    weight[:, :held] = 1
    found = [tuple(sorted((tuple(a), tuple(b)))) for a, b in halves(weight)]
    assert len(found) == len(set(found)) == ways
    assert all(set(a) | set(b) == set(range(held)) and not set(a) & set(b) for a, b in found)


def test_a_half_without_a_class_is_no_half() -> None:
    weight = torch.zeros(2, 8, dtype=torch.float64)
    weight[0, :4], weight[1, 0] = 1, 1
    assert not list(halves(weight))
    weight[1, 3] = 1
    assert all((0 in a) != (3 in a) for a, _ in halves(weight))


def test_classes_share_batches_and_each_prompt_runs_once(small_model: LensModel) -> None:
    forwards: list[int] = []
    handle = hook_points(small_model)["blocks.0.hook_resid_pre"].register_forward_hook(
        lambda m, a, x: forwards.append(len(x))
    )
    try:
        class_moments(small_model, (PROMPTS, PROMPTS[:3]), sites=SITES, positions=[-1, -2])
    finally:
        handle.remove()
    assert forwards == [7]


def test_memory_does_not_grow_with_the_number_of_prompts(
    small_model: LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a batch hands on is (its prompts, positions, d_model), and only sums and a sample are kept."""
    handed: list[int] = []
    stream: Callable[..., None] = moments_module.stream

    def spy(model: Any, encoded: Any, sites: Any, spans: Any, keep: Any) -> None:
        def counting(site: int, rows: torch.Tensor, x: torch.Tensor) -> None:
            handed.append(x.numel())
            keep(site, rows, x)

        stream(model, encoded, sites, spans, counting)

    monkeypatch.setattr(moments_module, "stream", spy)
    monkeypatch.setattr(capture_module, "batches", lambda encoded, **_: batches(encoded, max_tokens=64))
    kept = []
    for n in (8, 80):
        found = class_moments(small_model, ([*PROMPTS] * n, ["a fish"] * n), sites=[Site(0)], positions=[-1, -2])
        kept.append(sum(x.numel() for x in (found.weight, found.total, found.square, *found.sample)))
        assert max(map(len, found.sample)) == min(SAMPLE, 4 * n)
    assert max(handed) <= 64 * 2 * 32
    assert kept[1] <= kept[0] + 2 * SAMPLE * 2 * 32
