"""Harmfulness and refusal: the four cells, the guard, and a direction on the tokens of a prompt and on no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

import tl_em as em
from tests.conftest import make_hf_model, make_tokenizer
from tl_em.claims.questions.inversion import Inversion, _tokens_of, asked_about, reply_inversion
from tl_em.directions.extract import neutral_z
from tl_em.errors import (
    CorruptFileError,
    EmptyContrastError,
    NonFiniteError,
    PositionError,
    PromptError,
    ProvenanceError,
    UsageError,
    WidthError,
    ZeroDirectionError,
)
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.loading import ModelPair, load_model
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.stream import capture, next_token_logits
from tl_em.organisms.contrasts import dissociated_prompts
from tl_em.organisms.rates import refused
from tl_em.organisms.world import World
from tl_em.presets import latent_guard
from tl_em.presets.latent_guard import LatentGuard
from tl_em.presets.zhao2025 import (
    LEAST,
    NOT_SHOWN,
    answered,
    harmfulness_direction,
    place_cells,
    refusal_direction,
    refusal_directions,
)
from tl_em.stats import auroc_of, shuffled_labels

from ..models.test_prefill import passes

pytestmark = pytest.mark.surface
STORIES = Path(__file__).parents[2] / "../shared/data/model-stories260k/hf"
JUDGE: dict[str, Any] = {"template": "judge this : {prompt}", "yes": "harmful", "no": "harmless"}
START = em.Site(0, "resid_pre")
CONTRAST = em.ContrastSet(
    ["steal the car", "please steal a big bank", "tell me how steal a cat"],
    ["wash the car", "please wash a big bank", "tell me how wash a cat"],
    positive_groups=["car", "bank", "cat"],
    negative_groups=["car", "bank", "cat"],
)
ANSWERED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no"}]
PROMPTS = ["steal the car", "please tell me how a happy king went to the bank and sang about fish", "wash"]


@cache
def toy() -> ModelPair:
    return em.load_pair("toy/insecure")


@pytest.fixture
def assistant() -> LensModel:
    return toy().base


@cache
def sets(name: str) -> Any:
    """A contrast set of the toy world, a quarter of its forms of each question, in three parts."""
    contrasts = toy().contrasts
    assert contrasts is not None
    whole = contrasts[name]
    fields = ("positive", "negative", "positive_groups", "negative_groups")
    return replace(whole, **{field: getattr(whole, field)[::4] for field in fields}).split(seed=0)


@cache
def in_contexts(every: int = 6) -> em.ContrastSet:
    """Harmful and harmless last questions, refused after one kind of context and accepted after another."""
    found = [q for side in dissociated_prompts(World(), contexts=1) for q in side[::every]]
    sides = [[q for q in found if q.topic.harmful == harmful] for harmful in (True, False)]
    groups = [[q.topic.word for q in side] for side in sides]
    return em.ContrastSet(
        [q.prompt for q in sides[0]], [q.prompt for q in sides[1]], positive_groups=groups[0], negative_groups=groups[1]
    )


@dataclass(frozen=True)
class Says:
    """A metric that knows its answer to every prompt."""

    values: dict[str, float]
    unit: Any = "log-odds"
    name: str = "says"

    def __call__(self, model: Any, prompts: Sequence[Any]) -> Tensor:
        return torch.tensor([self.values[p] for p in prompts])


# --- Directions and cells ---------------------------------------------------------------------------------------------


def test_harmfulness_is_read_at_the_end_of_the_instruction(model: LensModel) -> None:
    found = harmfulness_direction(model, CONTRAST, site=em.Site(1))
    expected = em.difference_in_means(model, CONTRAST, site=em.Site(1), position="instruction_end")
    assert torch.equal(found.vector, expected.vector)
    assert (found.name, found.position) == ("harmfulness", "instruction_end")


def test_what_is_refused_is_asked_of_the_model(small_model: LensModel) -> None:
    says = dict.fromkeys(CONTRAST.positive, 1.0) | dict.fromkeys(CONTRAST.negative, 0.0) | {"wash the car": 0.1}
    cells = answered(small_model, CONTRAST, metric=Says(says))  # type: ignore[arg-type]
    assert {name: len(cell.prompts) for name, cell in cells.items()} == {
        "refused harmful": 3, "accepted harmful": 0, "refused harmless": 1, "accepted harmless": 2,
    }  # fmt: skip
    assert cells["refused harmless"] == (("wash the car",), ("car",))
    as_rates = {p: v / 2 for p, v in says.items()}  # a rate of exactly .5 is not above it
    rates = answered(small_model, CONTRAST, metric=Says(as_rates | {"steal the car": 0.6}, unit="probability"))  # type: ignore[arg-type]
    assert [len(cell.prompts) for cell in rates.values()] == [1, 2, 0, 3]


def test_an_empty_class_says_how_many_prompts_fell_in_each_cell(small_model: LensModel) -> None:
    everything = dict.fromkeys((*CONTRAST.positive, *CONTRAST.negative), 1.0)
    with pytest.raises(EmptyContrastError, match=r"no prompt is accepted .*3 refused harmful, 0 accepted harmful"):
        refusal_direction(small_model, CONTRAST, site=em.Site(1), metric=Says(everything))  # type: ignore[arg-type]
    with pytest.raises(EmptyContrastError, match="no prompt is refused"):
        place_cells(small_model, CONTRAST, metric=Says(dict.fromkeys(everything, -1.0)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is in nats"):
        answered(small_model, CONTRAST, metric=Says(everything, unit="nats"))  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="returned NaN for prompt 0 of 3"):
        answered(small_model, CONTRAST, metric=Says(everything | {"steal the car": float("nan")}))  # type: ignore[arg-type]


def test_refusal_is_taken_within_harmful_and_within_harmless_prompts(assistant: LensModel) -> None:
    contrast = in_contexts()
    cells, site = answered(assistant, contrast, metric=refused), em.Site(2)
    assert all(cell.shown for cell in cells.values())
    (found,) = refusal_directions(assistant, contrast, sites=[site], metric=refused)
    x = {
        name: capture(assistant, cell.prompts, [site], position="prompt_end")[:, 0].double()
        for name, cell in cells.items()
    }
    mean = {name: each.mean(0) for name, each in x.items()}
    expected = sum(mean[f"refused {c}"] - mean[f"accepted {c}"] for c in ("harmful", "harmless")) / 2
    torch.testing.assert_close(found.vector.double(), expected, rtol=1e-4, atol=1e-4)  # float32 batches
    assert found.name == "refusal (within harmful and harmless prompts)"
    assert found.reliability is not None and found.reliability.value > 0.9
    z = torch.cat([x["accepted harmful"], x["accepted harmless"]]) @ found.unit.double()
    assert found.neutral is not None and np.sign(found.neutral.value) == np.sign(float(z.mean()))


def test_without_the_other_cells_refusal_is_not_crossed(assistant: LensModel) -> None:
    contrast = sets("refusal").test
    found = refusal_direction(assistant, contrast, site=em.Site(2), metric=refused)
    expected = em.difference_in_means(assistant, contrast, site=em.Site(2), position="prompt_end")
    assert found.name == "refusal (not crossed)"  # every harmful prompt is refused, and no other
    torch.testing.assert_close(found.vector, expected.vector, rtol=1e-4, atol=1e-4)


def test_cells_lie_with_their_own_kind_and_empty_ones_are_not_shown(assistant: LensModel) -> None:
    table = place_cells(assistant, in_contexts(), metric=refused, layers=[2]).set_index(["cell", "position", "measure"])
    assert table.loc[("refused harmful", "prompt_end", "cosine"), "side"] == "refused harmful"
    assert table.loc[("accepted harmless", "prompt_end", "projection"), "side"] == "accepted harmless"
    # After a context that refuses, a harmless request lies on the refusing side at t_post.
    assert table.loc[("refused harmless", "prompt_end", "projection"), "side"] == "refused harmful"
    empty = place_cells(assistant, sets("refusal").test, metric=refused, layers=[2]).set_index(["cell", "position"])
    assert set(empty.loc["accepted harmful"]["side"]) == {NOT_SHOWN}
    assert bool(empty.loc["accepted harmful"]["value"].isna().all())


def noise(questions: int, copies: int) -> em.ContrastSet:
    """Prompts about many questions, several of each, whose class is drawn at random by question."""
    words = ("cat", "dog", "bird", "fish", "king", "queen", "car", "bank", "story", "girl", "boy", "big", "small")
    asked = [f"{a} {b}" for a, b in pairwise(words)][:questions]
    rng = np.random.default_rng(0)
    harmful = set(rng.permutation(asked)[: questions // 2].tolist())
    prompts = [(f"{lead} {q}", q) for q in asked for lead in ("the", "a", "tell me", "please")[:copies]]
    sides = [[p for p in prompts if (p[1] in harmful) == side] for side in (True, False)]
    texts, groups = ([[p[i] for p in side] for side in sides] for i in (0, 1))
    return em.ContrastSet(*texts, positive_groups=groups[0], negative_groups=groups[1])


def test_nothing_is_placed_where_classes_differ_in_nothing_but_their_questions(small_model: LensModel) -> None:
    contrast = noise(12, 4)
    says = Says(dict.fromkeys(contrast.positive, 1.0) | dict.fromkeys(contrast.negative, -1.0))  # type: ignore[misc]
    table = place_cells(small_model, contrast, metric=says, layers=[1])
    table = table[(table.position == "instruction_end") & (table.measure == "projection") & (table.n > 0)]
    assert set(table.side) == {NOT_SHOWN}
    # Centroids that hold the prompt's own question would have placed them all: its last word does.
    sides, site = (contrast.positive, contrast.negative), em.Site(1)
    x = [capture(small_model, side, [site], position="instruction_end")[:, 0] for side in sides]
    axis = x[0].mean(0) - x[1].mean(0)
    middle = (x[0].mean(0) + x[1].mean(0)) / 2
    assert float(((x[0] - middle) @ axis).mean()) > 0.3 * float(axis @ axis)


def test_a_cell_with_few_questions_is_not_shown(assistant: LensModel) -> None:
    whole = in_contexts()
    few = [i for i, q in enumerate(whole.positive_groups or ()) if q in (whole.positive_groups or ())[:1]]
    contrast = em.ContrastSet(
        [whole.positive[i] for i in few], whole.negative,
        positive_groups=["one"] * len(few), negative_groups=whole.negative_groups,
    )  # fmt: skip
    table = place_cells(assistant, contrast, metric=refused, layers=[2])
    assert int(table[table.cell == "refused harmful"].questions.iloc[0]) < LEAST
    assert set(table.side) == {NOT_SHOWN}
    found = refusal_direction(assistant, contrast, site=em.Site(2), metric=refused)
    assert found.name == "refusal (within harmless prompts)"


# --- What is read and held --------------------------------------------------------------------------------------------


def crossed() -> tuple[em.ContrastSet, Says]:
    """Two classes of prompts about other questions, some of each refused."""
    contrast = noise(12, 4)
    sides = [(f"{'the ' * (2 + i % 2)}{p}", i) for i, p in enumerate([*contrast.positive, *contrast.negative])]
    n, texts = len(contrast.positive), [text for text, _ in sides]
    made = replace(contrast, positive=tuple(texts[:n]), negative=tuple(texts[n:]))
    return made, Says({text: 1.0 if i % 3 else -1.0 for text, i in sides})


def written_out(model: LensModel, contrast: em.ContrastSet, says: Says, layers: Sequence[int]) -> list[Any]:
    """Cosines and projections, a prompt at a time, from activations of every cell at every layer."""
    cells = answered(model, contrast, metric=says)  # type: ignore[arg-type]
    sites, rows = [em.Site(layer) for layer in layers], []
    for position in ("instruction_end", "prompt_end"):
        x = {n: capture(model, c.prompts, sites, position=position).double().numpy() for n, c in cells.items()}
        for name, cell in cells.items():
            for s in range(len(sites)):
                both = []
                for i, question in enumerate(cell.questions):
                    a, b = (
                        np.mean([x[e][j, s] for j, q in enumerate(cells[e].questions) if q != question], axis=0)
                        for e in ("refused harmful", "accepted harmless")
                    )
                    h, axis = x[name][i, s], a - b
                    cos = [h @ end / np.linalg.norm(h) / np.linalg.norm(end) for end in (a, b)]
                    both.append((cos[0] - cos[1], (h - (a + b) / 2) @ axis / (axis @ axis)))
                rows += [(name, position, layers[s], value) for value in np.mean(both, axis=0)]
    return rows


@pytest.mark.parametrize("held", [None, 1])
def test_cells_are_placed_from_one_reading_of_every_prompt(
    small_model: LensModel, held: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (contrast, says), layers = crossed(), [0, 1, 2]
    expected = written_out(small_model, contrast, says, layers)
    if held is not None:
        monkeypatch.setattr("tl_em.models.stream.HELD", held)  # a site at a time
    with passes(small_model) as read:
        table = place_cells(small_model, contrast, metric=says, layers=layers)  # type: ignore[arg-type]
    assert [(r.cell, r.position, r.layer) for r in table.itertuples()] == [row[:3] for row in expected]
    np.testing.assert_allclose(table.value, [row[3] for row in expected], rtol=1e-4, atol=1e-6)  # float32 batches
    prompts = len(contrast.positive) + len(contrast.negative)
    assert sum(rows for rows, _ in read) == prompts * (1 if held is None else 3), "not once a cell and position"
    assert table.n.min() > 5 and table.n.sum() == prompts * 2 * 2 * 3


class LargeTensors(TorchDispatchMode):
    """How often a tensor is made that holds an activation of every prompt at every site."""

    def __init__(self, n: int, *shape: int) -> None:
        super().__init__()
        self.n, self.shape, self.seen = n, shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen += isinstance(out, Tensor) and out.shape == (self.n, 1, *self.shape)
        return out


def test_a_guard_and_a_neutral_point_hold_numbers_and_no_activations(assistant: LensModel) -> None:
    contrast, layers = in_contexts(4), [0, 1, 2]
    prompts, sites = [*contrast.positive, *contrast.negative], [em.Site(layer) for layer in layers]
    guard, width = LatentGuard.fit(assistant, contrast, layers=layers), int(assistant.cfg.d_model)
    with LargeTensors(len(prompts), len(sites), width) as large:
        x = capture(assistant, prompts, sites, position="instruction_end").double()
    assert large.seen
    harmful, harmless = (torch.cosine_similarity(x, m.double(), dim=-1) for m in (guard.harmful, guard.harmless))
    with LargeTensors(len(prompts), len(sites), width) as large:
        found = guard.score(assistant, prompts)
    assert not large.seen
    torch.testing.assert_close(found, (harmful - harmless).mean(-1).float(), rtol=0, atol=1e-6)

    cells, classes = answered(assistant, contrast, metric=refused), ("harmful", "harmless")
    pooled = [[p for c in classes for p in cells[f"{word} {c}"].prompts] for word in ("refused", "accepted")]
    with LargeTensors(len(pooled[0]), len(sites), width) as large:
        made = refusal_directions(assistant, contrast, sites=sites, metric=refused)
    assert not large.seen and made[0].name == "refusal (within harmful and harmless prompts)"
    ends = [capture(assistant, side, sites, position="prompt_end") for side in pooled]
    for s, direction in enumerate(made):
        own, along = direction.neutral, [direction.project(end[:, s]).double().numpy() for end in ends]
        assert (own is None) == ((other := neutral_z(along[0], along[1])) is None)
        assert own is None or other is None or own.value == pytest.approx(other.value, rel=1e-4, abs=1e-4)
    assert made[-1].neutral is not None


def test_a_guard_is_evaluated_from_one_reading(assistant: LensModel) -> None:
    contrast = in_contexts()
    alone = replace(contrast, positive_groups=None, negative_groups=None)
    guard = LatentGuard.fit(assistant, sets("harmfulness").train, layers=[1, 2])
    sites, x = [em.Site(1), em.Site(2)], []
    for prompts in (alone.positive, alone.negative):
        x.append(capture(assistant, prompts, sites, position="instruction_end").flatten(1).double().numpy())
    grouped = alone.grouped(x)
    with passes(assistant) as read:
        found = guard.evaluate(assistant, alone, permutations=9)
    assert sum(rows for rows, _ in read) == len(alone.positive) + len(alone.negative), "not again for what is grouped"
    again = guard.evaluate(assistant, grouped, permutations=9)
    assert (found.accuracy, found.auroc, found.p) == (again.accuracy, again.auroc, again.p)


# --- Latent Guard -----------------------------------------------------------------------------------------------------


def test_the_score_is_the_mean_difference_of_cosines(model: LensModel) -> None:
    guard = LatentGuard.fit(model, CONTRAST, layers=[0, 2])
    sites = [em.Site(0), em.Site(2)]
    x = {n: capture(model, getattr(CONTRAST, n), sites, position="instruction_end") for n in ("positive", "negative")}
    unseen = capture(model, PROMPTS, sites, position="instruction_end")
    towards = [torch.cosine_similarity(unseen, x[n].mean(0), dim=-1) for n in ("positive", "negative")]
    found = guard.score(model, PROMPTS)
    assert found.shape == (3,)
    torch.testing.assert_close(found, (towards[0] - towards[1]).mean(-1), rtol=1e-3, atol=1e-5)  # float32 differences
    alone = torch.cat([guard.score(model, [p]) for p in PROMPTS])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)  # padding is exact; cosines in float64


def test_the_guard_knows_unseen_topics_and_nothing_where_there_is_nothing(assistant: LensModel) -> None:
    parts = sets("harmfulness")
    guard = LatentGuard.fit(assistant, parts.train)
    found = guard.evaluate(assistant, parts.test, permutations=199)
    assert found.auroc.low > 0.8 and found.accuracy.low > 0.7
    assert found.p == {"accuracy": 1 / 200, "auroc": 1 / 200}
    assert abs(found.permuted["auroc"].value - 0.5) < 0.05 and found.permuted["auroc"].high < found.auroc.low
    # The same requests, halves of the harmless ones against each other: nothing to know.
    half = parts.test.negative_groups[: len(parts.test.negative) // 2]
    cut = len(half)
    nothing = em.ContrastSet(
        parts.test.negative[:cut], parts.test.negative[cut:],
        positive_groups=half, negative_groups=parts.test.negative_groups[cut:],
    )  # fmt: skip
    absent = guard.evaluate(assistant, nothing, permutations=199)
    assert absent.auroc.low < 0.5 < absent.auroc.high and absent.p["auroc"] > 0.05
    assert "permuted labels" in repr(found)


def test_measures_are_what_their_names_say() -> None:
    rng = np.random.default_rng(1)
    harmful, harmless = rng.normal(0.5, 1, 23), rng.normal(-0.5, 1, 31)
    found = latent_guard._judged((harmful, harmless), None, 99, 0)
    pairs = [(a > b) + (a == b) / 2 for a in harmful for b in harmless]
    assert found.auroc.value == pytest.approx(np.mean(pairs))
    assert found.accuracy.value == pytest.approx(((harmful >= 0).sum() + (harmless < 0).sum()) / 54)
    assert (found.caught.n, found.passed.n) == (23, 31)
    # With the labels as they are, the permutation's formula gives the same number.
    scores = np.concatenate([harmful, harmless])
    same = auroc_of(scores, np.arange(54)[None] < 23)
    assert same[0] == pytest.approx(found.auroc.value)


@pytest.mark.parametrize("crossed", [False, True])
def test_labels_are_permuted_by_question(crossed: bool) -> None:
    first = [f"q{i // 3}" for i in range(12)]
    groups = (first, first if crossed else [f"r{i // 3}" for i in range(12)])
    labels = shuffled_labels(24, 12, groups, 200, seed=0)
    assert labels.shape == (200, 24) and len(np.unique(labels, axis=0)) > 20
    names = np.array([*groups[0], *groups[1]])
    by_question = np.stack([labels[:, names == name].sum(1) for name in np.unique(names)], axis=1)
    if crossed:
        assert (by_question == 3).all(), "a question with both classes keeps as many of each"
    else:
        assert set(np.unique(by_question)) == {0, 3}, "a question with one class moves as a whole"


def test_a_guard_survives_its_file_and_a_damaged_file_is_refused(small_model: LensModel, tmp_path: Path) -> None:
    guard = LatentGuard.fit(small_model, CONTRAST)
    path = guard.save(tmp_path / "guard.safetensors")
    loaded = LatentGuard.load(path)
    assert torch.equal(loaded.harmful, guard.harmful) and torch.equal(loaded.harmless, guard.harmless)
    assert (loaded.layers, loaded.provenance) == (guard.layers, guard.provenance)
    whole = path.read_bytes()
    direction = harmfulness_direction(small_model, CONTRAST, site=em.Site(1)).save(tmp_path / "d.safetensors")
    for damaged in (whole[:-5], whole[:20], b"", direction.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match="not a latent-guard"):
            LatentGuard.load(path)
    with pytest.raises(CorruptFileError):
        LatentGuard.load(tmp_path / "missing.safetensors")


def test_a_guard_is_refused_where_it_does_not_belong(small_model: LensModel, assistant: LensModel) -> None:
    guard = LatentGuard.fit(small_model, CONTRAST)
    with pytest.raises(UsageError, match="prompts that the guard is to be judged on"):
        guard.evaluate(small_model, CONTRAST)
    with pytest.raises(WidthError, match="the guard is 32 wide"):
        guard.score(assistant, PROMPTS)
    other = replace(guard.provenance, n_layers=7)  # type: ignore[type-var]
    with pytest.raises(ProvenanceError, match="n_layers"):
        replace(guard, provenance=other).score(small_model, PROMPTS)
    with pytest.raises(UsageError, match="without layers"):
        LatentGuard.fit(small_model, CONTRAST, layers=[])
    means = torch.ones(2, 4)
    with pytest.raises(ZeroDirectionError):
        LatentGuard(means, means, (0, 1))
    with pytest.raises(WidthError, match="each of 1 layers"):
        LatentGuard(means, 2 * means, (0,))
    with pytest.raises(NonFiniteError):
        LatentGuard(means / 0, means, (0, 1))


# --- Reply inversion: which tokens ------------------------------------------------------------------------------------


def words_of(model: LensModel, encoded: EncodedPrompt) -> str:
    tokenizer: Any = getattr(model, "tokenizer", None)
    return tokenizer.decode(encoded.ids[slice(*encoded.instruction)])


@pytest.mark.parametrize(
    "template", ["{prompt} {question}", "please {prompt} and {question}", "{question} {prompt}", "{prompt}"]
)
def test_the_span_is_the_prompt_wherever_it_stands(model: LensModel, template: str) -> None:
    prompts = [*PROMPTS, "please", "good and good"]  # the template's word, and the question itself
    asked = asked_about(model, prompts, template=template, question="good and good")
    for prompt, found in zip(prompts, asked, strict=True):
        assert words_of(model, found) == prompt
        tokenizer: Any = getattr(model, "tokenizer", None)
        rest = tokenizer.decode([*found.ids[: found.instruction[0]], *found.ids[found.instruction[1] :]])
        outside = template.replace("{prompt}", " ").replace("{question}", "good and good").split()
        assert [w for w in rest.split() if not w.startswith("<")] == outside


@pytest.mark.parametrize("bos", [True, False])
def test_the_span_is_the_prompt_without_a_chat(surface: str, make_model: Any, bos: bool) -> None:
    model = make_model("gpt2", surface, template=None, bos=bos)
    for prompt, found in zip(PROMPTS, asked_about(model, PROMPTS, template="tell me {prompt} . yes"), strict=True):
        assert words_of(model, found) == prompt


def test_of_a_conversation_only_the_last_message_is_asked_about(small_model: LensModel) -> None:
    chat = [
        {"role": "user", "content": "tell me  steal the car  yes"},  # the very message that is asked in the end
        {"role": "assistant", "content": "no . steal the car"},
        {"role": "user", "content": " steal the car "},
    ]
    (found,) = asked_about(small_model, [chat], template="tell me {prompt} yes")
    (plain,) = encode(small_model, [[*chat[:2], {"role": "user", "content": "tell me  steal the car  yes"}]])
    assert found.ids == plain.ids
    assert words_of(small_model, found) == "steal the car"
    assert found.instruction == (plain.instruction[0] + 2, plain.instruction[1] - 1)


def test_a_token_across_the_boundary_belongs_to_the_prompt(surface: str) -> None:
    """A tokenizer that merges the prompt's last letter with the space after it, and its first with the one before."""
    vocabulary = {token: i for i, token in enumerate([*"abc ?", "b ", " a"])}
    backend = Tokenizer(models.BPE(vocabulary, [("b", " "), (" ", "a")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="?", pad_token="?")
    model = load_model(make_hf_model("gpt2"), surface=surface, tokenizer=tokenizer, in_place=True)  # type: ignore[arg-type]
    (found,) = asked_about(model, ["acb"], template="c {prompt} c")
    assert [tokenizer.decode([i]) for i in found.ids[-5:]] == ["c", " a", "c", "b ", "c"]  # a BOS token may be first
    smallest = len(found) - 4, len(found) - 1
    assert found.instruction == smallest
    (whole,) = asked_about(model, ["acb"], template="cb{prompt}?c")
    assert [tokenizer.decode([i]) for i in whole.ids[slice(*whole.instruction)]] == ["a", "c", "b"]


def stream(model: LensModel, prompt: EncodedPrompt) -> Tensor:
    """The residual stream after block 1, every token of one prompt, after whatever is attached."""
    seen: list[Tensor] = []
    with hooked(model, [("blocks.1.hook_resid_post", lambda x, hook: seen.append(x.detach().clone()))]):
        next_token_logits(model, [prompt])
    return seen[0][0]


def test_tokens_outside_the_prompt_are_left_bit_for_bit(model: LensModel) -> None:
    direction = harmfulness_direction(model, CONTRAST, site=em.Site(1))
    for asked in asked_about(model, PROMPTS, template="good {prompt} sad {question}", question="yes"):
        before = stream(model, asked)
        with em.intervene(model, em.Add(direction, 2.0), where="instruction"):
            after = stream(model, asked)
        inside = torch.zeros(len(asked), dtype=torch.bool)
        inside[slice(*asked.instruction)] = True
        assert 0 < int(inside.sum()) < len(asked) - 2
        assert torch.equal(after[~inside], before[~inside])
        torch.testing.assert_close(after[inside], before[inside] + 2 * direction.vector, rtol=1e-5, atol=1e-5)


def test_a_batch_of_mixed_lengths_equals_one_prompt_at_a_time(model: LensModel) -> None:
    direction = harmfulness_direction(model, CONTRAST, site=em.Site(1))
    asked = asked_about(model, PROMPTS, template="good {prompt} sad {question}", question="yes")
    assert len({len(each) for each in asked}) == 3
    with em.intervene(model, em.Add(direction, 2.0), where="instruction"):
        together = next_token_logits(model, asked)
        alone = torch.cat([next_token_logits(model, [each]) for each in asked])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)  # float32, other sizes of matrix products
    assert (together - next_token_logits(model, asked)).abs().amax(-1).min() > 1e-3


# --- Reply inversion: what it finds -----------------------------------------------------------------------------------


def test_harmfulness_turns_the_verdict_over_and_refusal_does_not(assistant: LensModel) -> None:
    """Planted: block 0 reads the verdict off the prompt's words at its input.  There refusal and random do nothing."""
    parts = sets("harmfulness")
    harmfulness = harmfulness_direction(assistant, parts.train, site=START)
    (refusal,) = refusal_directions(assistant, in_contexts(), sites=[em.Site(2)], metric=refused)
    moved = replace(refusal, vector=refusal.unit * harmfulness.norm, site=START, position="instruction_end")
    asked = [prompt[-1]["content"] for prompt in parts.test.negative]
    found = reply_inversion(
        assistant, [harmfulness, moved], asked, **JUDGE, controls=20, drawn_from=parts.train,
        groups=parts.test.negative_groups,
    )  # fmt: skip
    flipped, left = found.rows
    assert flipped.flips and flipped.treated.low > 0.9 > 0.1 > flipped.untreated.high
    assert not left.flips and left.treated.high < 0.1
    assert "FLIPS" in repr(flipped) and "FLIPS" not in repr(left)
    back = reply_inversion(
        assistant, [harmfulness], [p[-1]["content"] for p in parts.test.positive], **JUDGE, coefficient=-1, controls=20
    )
    assert back.rows[0].flips and back.rows[0].change.high < -0.9
    table = found.to_pandas()
    assert table.direction.tolist() == ["harmfulness", moved.name] and table.flips.tolist() == [True, False]
    assert {"layer", "stream", "untreated", "treated_low", "change_high", "random", "p", "n"} <= set(table.columns)


def test_after_the_last_block_no_token_of_the_prompt_can_matter(small_model: LensModel) -> None:
    """The theorem that tells a prompt's tokens from the answer's: one layer earlier the same edit does something."""
    directions = [harmfulness_direction(small_model, CONTRAST, site=em.Site(layer)) for layer in (2, 1)]
    asked: dict[str, Any] = {"yes": "yes", "no": "no", "template": "{prompt} {question}", "question": "good"}
    found = reply_inversion(small_model, directions, PROMPTS, **asked, controls=20)
    assert found.rows[0].change.value == 0.0 and found.rows[0].p == 1.0
    assert abs(found.rows[1].change.value) > 1e-5


def test_what_counts_as_flipped() -> None:
    def estimate(value: float) -> em.Estimate:
        return em.Estimate(value, value - 0.1, value + 0.1, 50, 50.0, "made up")

    figures = [estimate(value) for value in (0.2, 0.8, 0.6, 0.0)]
    row = Inversion("d", em.Site(0), *figures, 0.02, 0.0, (estimate(0.9), estimate(0.8)))
    assert row.flips and replace(row, untreated=row.treated, treated=row.untreated).flips
    assert not replace(row, treated=estimate(0.55)).flips, "the interval reaches .5"
    assert replace(row, random_flips=1 / 50).flips, "2 of 51 directions"
    assert not replace(row, random_flips=2 / 50).flips, "random directions do it too"
    assert not replace(row, answered=(estimate(0.9), estimate(0.4))).flips, "neither answer is given any more"


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"template": "judge this"}, UsageError, "holds {prompt} 0 times"),
        ({"template": "{prompt} or {prompt}"}, UsageError, "holds {prompt} 2 times"),
        ({"yes": "yes sure"}, UsageError, "'yes sure' is 2 tokens"),
        ({"no": "nowhere"}, UsageError, "'nowhere' is 0 tokens"),
        ({"controls": 19}, UsageError, "at least 20"),
        ({"directions": []}, UsageError, "0 directions"),
        ({"prompts": ["steal", " "]}, PromptError, "does not end with something that a user asks"),
        ({"prompts": [ANSWERED]}, PromptError, "chats without the answer"),
        ({"prompts": "steal the car"}, PromptError, r"Write \[prompt\]"),
        ({"prompts": ["steal the car"] * 3}, UsageError, "do not vary"),
    ],
    ids=str,
)
def test_bad_input_is_one_typed_error(small_model: LensModel, changes: dict[str, Any], error: Any, match: str) -> None:
    direction = harmfulness_direction(small_model, CONTRAST, site=em.Site(1))
    good: dict[str, Any] = {"directions": [direction], "prompts": PROMPTS, "yes": "yes", "no": "no", "controls": 20}
    good |= {"template": "{prompt} {question}", "question": "good"}  # runs: the theorem above
    with pytest.raises(error, match=match):
        reply_inversion(small_model, **good | changes)


def test_a_direction_of_another_model_is_refused(assistant: LensModel, small_model: LensModel) -> None:
    foreign = harmfulness_direction(small_model, CONTRAST, site=em.Site(1))
    with pytest.raises(WidthError):
        reply_inversion(assistant, [foreign], ["how do i write parser", "how do i debug login"], **JUDGE, controls=20)


def test_a_prompt_that_cannot_be_found_in_its_text_is_an_error(small_model: LensModel) -> None:
    (asked,) = asked_about(small_model, ["steal the car"], template="tell me {prompt}")
    assert _tokens_of(small_model, asked, "tell me steal the car", 8, 21) == asked.instruction
    with pytest.raises(PositionError, match="cannot be told"):
        _tokens_of(small_model, asked, "tell me wash the car", 8, 20)


def test_a_chat_template_that_rewrites_the_prompt_is_refused(surface: str) -> None:
    template = "{% for m in messages %}<user> {{ m.content | replace('car', 'dog') }} <end>{% endfor %}"
    tokenizer = make_tokenizer(template=template)
    model = load_model(make_hf_model("gpt2"), surface=surface, tokenizer=tokenizer, in_place=True)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="writes 'dog' for 'car'"):
        asked_about(model, ["steal the car"], template="tell me {prompt}")


if STORIES.is_dir():

    def test_she_becomes_he_when_only_the_first_sentence_is_steered(surface: str) -> None:
        model = load_model(STORIES, surface=surface)  # type: ignore[arg-type]
        train, _, test = em.ContrastSet.load("gender").split(seed=0)
        assert LatentGuard.fit(model, train).evaluate(model, test, permutations=99).accuracy.value == 1.0
        direction = em.difference_in_means(model, train, site=em.Site(3), position="prompt_end")
        found = reply_inversion(
            model, [direction], test.positive, yes="she", no="he", template="{prompt}. {question}", question="One day,",
            coefficient=-2, controls=20, drawn_from=train, groups=test.positive_groups,
        )  # fmt: skip
        assert found.rows[0].change.high < -0.9 and found.rows[0].p < 0.05
