"""A question, the case that it is asked of, what was found, and the row that says it: the nouns of a claim.

A question is a value: its words, its unit, its smallest effect of interest, a sentence that asks it, and one method
that measures it on one direction.  Nothing else knows them: page, JSON, command line and glossary render from it, and
``claims.rule`` judges what it finds.

    own gap      g = mean p_base - mean n_base,   p, n the projections of both classes on the base's unit direction
    change       (q_tuned - q_base) / g  of a quantity q of the projections; beyond benign: (q_tuned - q_benign) / g,
                 of several fine-tunes on either side their means (``stats.prediction``)

**Controls.** A finding does not exist without the same effect under controls: ``Case.along_random`` reads a shift along
random directions of the base's pooled within-class covariance and along such of the whole space, and the larger p
counts: where a few dimensions are massive, the first alone point nowhere else.

**Scale.** Where the whole stream grew, every gap did, and nothing that is read from it tells more: ``Case.unscaled``
measures a change once more in a tuned stream divided by ``Case.growth``, the weighted median of how much the
spread within the classes grew.  What is gone then is called *scaled*.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from tl_em.arguments import POSITIVE
from tl_em.directions.direction import Direction
from tl_em.directions.geometry import Activations, control_directions
from tl_em.directions.screening import answers
from tl_em.errors import NoGapError, UsageError
from tl_em.metrics import Behaviour
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.sites import Position, Site
from tl_em.models.stream import capture, sites_at_once
from tl_em.showing import check_names
from tl_em.stats import Estimate, Groups, Prediction, Resampled, beyond_next, bootstrap

Weights = Float[np.ndarray, "resample prompt"]
Statistic = Callable[[Weights, Weights], np.ndarray]
NOT_SHOWN = "not shown"
RANDOM = "random directions of the base's within-class covariance"
SPHERE = "random directions of the whole space"
SCALED = "scaled"
Planted = tuple[Float[np.ndarray, " d_model"], Float[np.ndarray, " d_model"]]
"""What is added to every positive and to every negative prompt."""
Nulls = Mapping[str, Float[np.ndarray, " control"]]
OWN_GAPS = "own gaps"


class Question:
    """A question with a verdict: give it a name, words, a unit, a sentence, and one method that measures it.

    Write a subclass with these attributes and ``measure``, and pass it in:
    ``em.audit(pair, questions=["level", "use", MyQuestion()])``.

    Args:
        name: one word; it heads a column of the page and stands in ``Row.question``.
        words: the verdict where the effect is positive, and where it is negative; ``None`` where that side has no word.
        unit: what the effect is measured in, for axes and tables.
        smallest: smallest effect of interest, in that unit; a word is given only beyond it.
        asks: what is asked, as one sentence.
        measured: what is measured, as one sentence.
        of_change: whether its word says that the fine-tune changed something (then the summary says it).
        of_scale: whether its word may be *scaled*: the change is that of the whole stream.
        plain: what each word, and *not shown*, says to a reader outside the field, with ``{direction}``,
            ``{size}`` and ``{share}`` (the size in per cent).

    Example:
        >>> class Steeper(Question):
        ...     name, words, unit, smallest = "steepness", ("steeper", None), "own gaps", 0.1
        ...     asks = "Is the positive class farther along the direction?"
        ...     def measure(self, case):
        ...         effect, beyond = case.changed(lambda projected, v, w: v @ projected.positive / v.sum(-1))
        ...         null = case.along_random((case.tuned.positive - case.base.positive).mean(0))
        ...         return case.finding(self, effect, controls=null, benign=beyond)
        >>> Steeper().said
        'steeper'
    """

    name: str = ""
    words: tuple[str, str | None] = ("", None)
    unit: str = ""
    smallest: float = 0.1
    asks: str = ""
    measured: str = ""
    of_change: bool = True
    of_scale: bool = False
    plain: ClassVar[Mapping[str, str]] = {}

    def measure(self, case: Case) -> Finding | None:
        """What is found for one direction; ``None`` where there is nothing to ask it with (no behaviour, no data).

        Args:
            case: the direction, the models, the prompts and what was read on them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method measure(case)")

    def seconds(self, case: Case) -> float:
        """About how long ``measure`` will take, from a small part of it; 0 where that is no matter.

        Args:
            case: as for ``measure``.
        """
        return 0.0

    def plant(self, case: Case, size: float, rng: np.random.Generator) -> Planted | None:
        """What moves both classes of the base's stream so that the effect is this large, for ``em.calibration``.

        Args:
            case: the direction, and what was read on its prompts.
            size: of the effect, in the question's unit; at 0 a word is false.
            rng: for what is free.

        Returns:
            What is added to every positive and to every negative prompt; ``None``: it cannot be planted, and nothing
            is said of power.
        """
        return None

    @property
    def said(self) -> str:
        """Its words, for people."""
        words = (*self.words, SCALED if self.of_scale else None)
        return " or ".join(dict.fromkeys(word for word in words if word))

    def __repr__(self) -> str:
        return f"<question {self.name}: {self.said}>"


@dataclass(frozen=True, eq=False)
class Reading:
    """Both classes of a contrast set in one model: activations at one site, or their projections on one direction.

    Args:
        positive, negative: one row a prompt: [prompt d_model], or [prompt] once projected.
    """

    positive: Float[np.ndarray, "prompt *axes"]
    negative: Float[np.ndarray, "other *axes"]

    def project(self, unit: Float[np.ndarray, " d_model"]) -> Reading:
        """Both classes projected on a unit vector."""
        return Reading(self.positive @ unit, self.negative @ unit)

    @property
    def mean_difference(self) -> Float[np.ndarray, "*axes"]:
        """The difference in means."""
        return self.positive.mean(0) - self.negative.mean(0)

    def gap(self, v: Weights, w: Weights) -> Float[np.ndarray, "resample *axes"]:
        """The difference in means, for every draw of weights of the positive and of the negative prompts."""
        return weighted(v, self.positive) - weighted(w, self.negative)

    def balanced(self, v: Weights, w: Weights) -> Float[np.ndarray, "resample *axes"]:
        """The class-balanced mean, for every draw of weights."""
        return (weighted(v, self.positive) + weighted(w, self.negative)) / 2

    def dprime(self, v: Weights, w: Weights) -> Float[np.ndarray, " resample"]:
        """Of projections: the gap over the pooled standard deviation within the classes, for every draw of weights."""
        spread = [weighted(u, z**2) - weighted(u, z) ** 2 for u, z in ((v, self.positive), (w, self.negative))]
        n, m = v.sum(-1), w.sum(-1)
        pooled = (n * spread[0] + m * spread[1]) / np.maximum(n + m - 2, 1)
        return self.gap(v, w) / np.sqrt(np.maximum(pooled, 1e-24))


def numbered(benign: Sequence[Any]) -> dict[str, Any]:
    """Benign fine-tunes by what they are called: *benign*, *benign 2*, …"""
    return {"benign" if i == 1 else f"benign {i}": each for i, each in enumerate(benign, 1)}


def weighted(weights: Weights, x: Float[np.ndarray, "prompt *axes"]) -> Float[np.ndarray, "resample *axes"]:
    """Weighted mean over prompts, for every draw of weights."""
    total = weights.sum(-1)
    return weights @ x / (total if x.ndim == 1 else total[:, None])


def samples(contrast: ContrastSet) -> list[int | Groups]:
    """What the bootstrap draws: the questions of each class, or its prompts where no questions are named."""
    classes = ((contrast.positive, contrast.positive_groups), (contrast.negative, contrast.negative_groups))
    return [len(prompts) if groups is None else list(groups) for prompts, groups in classes]


def readings(
    models: Mapping[str, LensModel], contrast: ContrastSet, sites: Sequence[Site], position: Position
) -> Iterator[dict[str, Reading]]:
    """Both classes at each site in turn, in each model, float64; one pass a model and class for as many sites as are
    held at once, however many there are."""
    classes = contrast.positive, contrast.negative
    kept = len(models) * sum(map(len, classes))
    for some in sites_at_once(next(iter(models.values())), sites, kept):
        acts = {
            name: [capture(model, prompts, some, position=position) for prompts in classes]
            for name, model in models.items()
        }
        for s in range(len(some)):
            yield {name: Reading(*(x[:, s].double().numpy() for x in both)) for name, both in acts.items()}
        del acts


@dataclass(frozen=True, eq=False)
class Case:
    """One direction of one pair, with everything that a question may ask it with.

    Args:
        name: the direction's name.
        direction: the base's direction; ``site`` and ``unit`` are its site and its unit vector.
        contrast: the prompts that it is judged on: it was neither extracted nor selected on them.
        pair: the base and the tuned model.
        base, tuned: activations of both classes at the site, float64.
        benign, replicates: the same of each benign fine-tune, and of each further one by the recipe of ``tuned``.
        benign_models, replicate_models: these models.
        n_controls: how many controls each test has.
        seed: of all resampling and controls.
        behaviour: what the direction may cause.
        tuning_data: rows that the model was tuned on: chats that end with the answer.
        own_answers: call it for the base's own answers to the prompts of the tuning data; made once for all directions.
        read_answers: of a model, rows that end with an answer, and a site: the mean activation over each answer's
            tokens, [row d_model]; each model reads rows once for the sites of all directions.
        together: which prompts were found to belong together, in a sentence; the contrast set has these groups.

    Example:
        >>> import tl_em as em
        >>> class Seen(em.Question):
        ...     name, words, unit, asks = "seen", ("seen", None), "own gaps", "How many prompts were read?"
        ...     def measure(self, case):
        ...         print(case.name, case.site, case.base.positive.shape)
        >>> pair = em.load_pair("toy/insecure")
        >>> parts = pair.contrasts["persona"].split(seed=0)
        >>> persona = em.difference_in_means(pair.base, parts.train, site=em.Site(2), position="prompt_end")
        >>> _ = em.compare(pair, {"persona": (persona, parts.test)}, questions=["level", Seen()], controls=99)
        persona resid_post[2] (60, 96)
    """

    name: str
    direction: Direction
    contrast: ContrastSet
    pair: ModelPair | Any  # or what refuses to be run: claims.calibration
    base: Reading
    tuned: Reading
    benign: tuple[Reading, ...] = ()
    replicates: tuple[Reading, ...] = ()
    benign_models: tuple[LensModel, ...] = ()
    replicate_models: tuple[LensModel, ...] = ()
    n_controls: int = 999
    seed: int = 0
    behaviour: Behaviour | None = None
    tuning_data: Sequence[Any] | None = None
    own_answers: Callable[[], Sequence[str]] = tuple
    read_answers: Callable[[LensModel, Sequence[Any], Site], Activations] = answers
    together: str = ""

    @property
    def site(self) -> Site:
        """Where the direction was read, and is judged."""
        return self.direction.site

    @cached_property
    def unit(self) -> Float[np.ndarray, " d_model"]:
        """Unit vector of the direction."""
        return self.direction.unit.double().numpy()

    @cached_property
    def own_gap(self) -> Estimate:
        """The base's gap along the direction, on its own contrast set, in units of the activations.

        Raises:
            NoGapError: the interval includes 0; nothing can be measured in units of it.
        """
        gap = self.bootstrap(self.base.project(self.unit).gap).estimate
        if not gap.low > 0:
            raise NoGapError(
                f"{self.name} at {self.site}: the gap between its own classes in the base model is "
                f"{gap}, which is not above 0, so changes cannot be measured in units of it. Use more prompts, another "
                "site or position (em.candidate_directions), or a contrast set whose prompts end at the concept"
            )
        return gap

    def bootstrap(self, statistic: Statistic, resamples: int = 2000) -> Resampled:
        """Resample the questions of the contrast set.

        Args:
            statistic: called with weights of the positive [resample, prompt] and of the negative prompts; returns
                [resample].
            resamples: number of draws.
        """
        return bootstrap(statistic, samples(self.contrast), seed=self.seed, resamples=resamples)

    def controls(self) -> Float[np.ndarray, "control d_model"]:
        """Random unit vectors of the base's pooled within-class covariance, drawn once for all questions."""
        return self._controls

    @cached_property
    def _controls(self) -> Float[np.ndarray, "control d_model"]:
        within = self.base.positive, self.base.negative
        return control_directions(*within, count=self.n_controls, norm=1.0, seed=self.seed)

    def along_random(self, shift: Float[np.ndarray, " d_model"]) -> Nulls:
        """What a shift of the activations is along random directions of both kinds, in own gaps.

        Args:
            shift: of the mean, in units of the activations.
        """
        return {kind: vectors @ shift / self.own_gap.value for kind, vectors in self.random.items()}

    @cached_property
    def random(self) -> dict[str, Float[np.ndarray, "control d_model"]]:
        """Random unit vectors of either kind."""
        sphere = np.random.default_rng(self.seed).standard_normal((self.n_controls, len(self.unit)))
        return {RANDOM: self.controls(), SPHERE: sphere / np.linalg.norm(sphere, axis=-1, keepdims=True)}

    def with_tuned(self, tuned: Reading) -> Case:
        """The same case with other activations of the tuned model; what depends on the base alone is not made again."""
        made = replace(self, tuned=tuned)
        kept = ("unit", "own_gap", "_controls", "random")
        made.__dict__.update({name: value for name, value in self.__dict__.items() if name in kept})
        return made

    @cached_property
    def elsewhere(self) -> Planted:
        """How the fine-tune moved the mean of either class, less what of it lies along the direction."""
        moved = [(after - before).mean(0) for before, after in self.classes]
        return moved[0] - (moved[0] @ self.unit) * self.unit, moved[1] - (moved[1] @ self.unit) * self.unit

    @property
    def classes(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """The positive and the negative prompts, each in the base and in the tuned model."""
        return (self.base.positive, self.tuned.positive), (self.base.negative, self.tuned.negative)

    @cached_property
    def growth(self) -> float:
        """How much larger the tuned stream is: the within-class spread's ratio, its median over dimensions.

        Each dimension counts by its spread in the base: where a stream has unused ones, any noise grows them much.
        """

        def spread(reading: Reading) -> np.ndarray:
            return np.sqrt(sum(x.var(0) * len(x) for x in (reading.positive, reading.negative)))

        before, after = spread(self.base), spread(self.tuned)
        varies = (before > 1e-9 * before.max()) & (after > 1e-9 * before)  # one that is still in either says nothing
        if not varies.any():
            return 1.0
        ratio, weight = after[varies] / before[varies], before[varies]
        order = np.argsort(ratio, kind="stable")
        reached = np.cumsum(weight[order])
        return float(ratio[order][np.searchsorted(reached, reached[-1] / 2)])

    @cached_property
    def farther(self) -> float:
        """How much farther tuned moved the means than benign fine-tunes did, off the direction; 1 where it did not."""

        def size(readings: Sequence[Reading]) -> float:
            moved = [np.stack([x.positive.mean(0) - self.base.positive.mean(0),
                               x.negative.mean(0) - self.base.negative.mean(0)]) for x in readings]  # fmt: skip
            off = np.stack(moved) - (np.stack(moved) @ self.unit)[..., None] * self.unit
            return float(np.sqrt((off**2).sum((1, 2)).mean()))

        return max(1.0, size((self.tuned, *self.replicates)) / max(size(self.benign), 1e-300))

    def beyond_benign(
        self, quantity: Callable[[Reading], Statistic], *, per: Statistic | None = None, resamples: int = 2000
    ) -> Resampled | Prediction | None:
        """How far a quantity of the tuned model goes beyond the benign fine-tune, or the next of several.

        Args:
            quantity: of the activations of one model the statistic that is resampled.
            per: what it is divided by.
            resamples: number of draws.
        """
        if not self.benign:
            return None
        own, benign = ([quantity(each) for each in side] for side in ((self.tuned, *self.replicates), self.benign))
        settings = {"seed": self.seed, "resamples": resamples, "farther": self.farther}
        return beyond_next(own, benign, samples(self.contrast), per=per, **settings)

    def changed(
        self, quantity: Callable[[Reading, Weights, Weights], np.ndarray]
    ) -> tuple[Resampled, Resampled | Prediction | None]:
        """The change of a quantity of the projections from base to tuned, and beyond benign fine-tunes, in own gaps.

        Args:
            quantity: called with the projections of one model and the weights of both classes; returns [resample].

        Returns:
            The change, and what of it goes beyond the benign fine-tune, where there is one, or the next of several.
        """
        beyond = self.beyond_benign(
            lambda reading: partial(quantity, reading.project(self.unit)), per=self.base.project(self.unit).gap
        )
        return self._changed(quantity), beyond

    def unscaled(self, quantity: Callable[[Reading, Weights, Weights], np.ndarray]) -> Resampled:
        """The change from base to a tuned model whose stream is divided by :attr:`growth`, in own gaps."""
        return self._changed(quantity, 1 / self.growth)

    def _changed(self, quantity: Callable[..., np.ndarray], factor: float = 1.0) -> Resampled:
        base, tuned = self.base.project(self.unit), self.tuned.project(self.unit)
        tuned = Reading(factor * tuned.positive, factor * tuned.negative)
        return self.bootstrap(lambda v, w: (quantity(tuned, v, w) - quantity(base, v, w)) / base.gap(v, w))

    def finding(
        self,
        question: Question,
        effect: Resampled,
        *,
        controls: ArrayLike | Nulls,
        control: str = RANDOM,
        unit: str = "",
        smallest: float | None = None,
        benign: Resampled | Prediction | Estimate | None = None,
        detail: Mapping[str, Estimate] | None = None,
        table: Sequence[Mapping[str, Any]] = (),
        arms: Sequence[Finding] = (),
        unscaled: Resampled | None = None,
        beside: float | None = None,
    ) -> Finding:
        """What a question found, ready to be judged.

        Args:
            question: the question itself.
            effect: the estimate and its p, from :meth:`bootstrap` or :meth:`changed`.
            controls: the same effect under each control; of several kinds, by what they are: the larger p counts.
            control: what the controls are, in words, where they are of one kind.
            unit, smallest: where they differ from the question's own.
            benign: what of the effect goes beyond benign fine-tunes, from :meth:`changed` or :meth:`beyond_benign`.
            detail: further estimates that belong to it, by name.
            table: rows behind it.
            arms: what else must be found, each beyond its own controls and its own smallest effect, on the same side.
            unscaled: the effect in a stream of the base's size; where it is gone, the word is *scaled*.
            beside: the effect on the prompts of the controls, where these are not all of them.

        Raises:
            UsageError: the effect is no estimate with a p, or a control is not a finite number.
        """
        whose = f"question {question.name!r} about {self.name!r}"
        if not isinstance(effect, Resampled) or not np.isfinite(effect.estimate.value):
            raise UsageError(
                f"{whose}: its effect is {effect!r}, which has no value with an interval and a p, so it cannot be "
                "judged; make it with case.bootstrap(statistic) or case.changed(quantity)"
            )
        kinds = controls if isinstance(controls, Mapping) else {control: controls}
        nulls = {kind: np.asarray(null, dtype=float) for kind, null in kinds.items()}
        for null in nulls.values():
            if null.ndim != 1 or not len(null) or not np.isfinite(null).all():
                raise UsageError(
                    f"{whose}: its controls have the shape {null.shape} and {int(np.sum(~np.isfinite(null)))} that are "
                    "not finite; an effect is judged beside the same number under each control, so give one finite "
                    "number for each, as in case.along_random(shift)"
                )
        if isinstance(benign, Estimate):
            benign = Resampled(benign, float("nan"))
        return Finding(
            question, self.name, self.site, effect, nulls, question.smallest if smallest is None else smallest,
            unit or question.unit, benign, detail or {}, table, tuple(arms), unscaled, beside,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Finding:
    """What was measured for one question about one direction, before it is judged (:meth:`Case.finding` makes it).

    Args:
        question: what was asked.
        direction: the direction's name.
        site: where it was read.
        effect: with its interval and p.
        controls: the same effect under each control, by what the controls are.
        smallest: smallest effect of interest, in the estimate's units.
        unit: the estimate's units, in words.
        benign: the difference in differences against benign fine-tunes, if there are any.
        detail: further estimates that belong to it.
        table: rows behind it, for ``Comparison.tables``.
        arms: what else must be found, on the same side.
        unscaled: the effect in a stream of the base's size.
        beside: the effect on the prompts of the controls, where these are not all of them.
        planned: how many controls of each kind there would have been, had a word stayed in reach; 0: those there are.

    Example:
        >>> import tl_em as em
        >>> class Level(em.Question):
        ...     name, words, unit, asks = "mine", ("more", "less"), "own gaps", "Is there more of it?"
        ...     def measure(self, case):
        ...         effect, _ = case.changed(lambda projected, v, w: projected.balanced(v, w))
        ...         shift = (case.tuned.positive - case.base.positive).mean(0)
        ...         found = case.finding(self, effect, controls=case.along_random(shift))
        ...         print(type(found).__name__, found.estimate.value > 0, len(found.controls))
        ...         return found
        >>> pair = em.load_pair("toy/insecure")
        >>> parts = pair.contrasts["persona"].split(seed=0)
        >>> persona = em.difference_in_means(pair.base, parts.train, site=em.Site(2), position="prompt_end")
        >>> _ = em.compare(pair, {"persona": (persona, parts.test)}, questions=[Level()], controls=99)
        Finding True 2
    """

    question: Question
    direction: str
    site: Site
    effect: Resampled
    controls: Nulls
    smallest: float
    unit: str
    benign: Resampled | Prediction | None = None
    detail: Mapping[str, Estimate] = field(default_factory=dict)
    table: Sequence[Mapping[str, Any]] = ()
    arms: tuple[Finding, ...] = ()
    unscaled: Resampled | None = None
    beside: float | None = None
    planned: int = 0

    @property
    def estimate(self) -> Estimate:
        """The effect with its interval."""
        return self.effect.estimate


@dataclass(frozen=True, eq=False)
class Row:
    """One question about one direction, with its verdict.

    Args:
        question: the question's name.
        direction, site, estimate, unit: as in :class:`Finding`; no site where tokens are judged (*backdoor*).
        verdict: the word that the rule gives, or ``"not shown"``.
        control: what the controls are, how many, the band that holds 95 % of them, and p.
        p: Holm-adjusted p over the directions of this question.
        smallest: smallest effect of interest, in the estimate's units.
        benign: difference in differences against the benign fine-tune; against several a prediction interval.
        reason: what holds, or what does not, in words.
        detail: further estimates that belong to it.
        needed: how many benign fine-tunes, of the spread seen, would have let it pass; 0: no number; None: it passed,
            or there were fewer than two.

    Example:
        >>> e = Estimate(0.42, 0.31, 0.53, n=60, n_effective=60.0, method="bootstrap")
        >>> Row("level", "persona", Site(2), "exaggerated", e, {}, 0.01, 0.1, "own gaps", None, "beyond 0.1", {}).shown
        True
    """

    question: str
    direction: str
    site: Site | None
    verdict: str
    estimate: Estimate
    control: dict[str, Any]
    p: float
    smallest: float
    unit: str
    benign: Estimate | None
    reason: str
    detail: Mapping[str, Estimate]
    needed: int | None = None

    @property
    def shown(self) -> bool:
        """Whether the rule gave a word."""
        return self.verdict != NOT_SHOWN

    def __str__(self) -> str:
        return f"{self.question:<13}{self.direction:<22}{self.verdict:<13}{self.estimate!r}  {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in ``report.json``."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "needed" or self.needed is not None}
        plain["site"] = None if self.site is None else self.site.hook_name
        plain["smallest_effect_of_interest"] = plain.pop("smallest")
        plain["estimate"], plain["benign"] = (each and each.to_json() for each in (self.estimate, self.benign))
        return plain | {"detail": {name: estimate.to_json() for name, estimate in self.detail.items()}}


def check_question(given: Any) -> Any:
    """The question, once it is shown to have all that the rule and the page need of it.

    Raises:
        UsageError: a class in place of a value, no method ``measure``, or a word, unit, sentence or size is missing.
    """
    who = given.__name__ if inspect.isclass(given) else getattr(given, "name", "") or type(given).__name__
    measure, words = getattr(type(given), "measure", None), getattr(given, "words", None)
    sides = list(words) if isinstance(words, tuple | list) else []
    faults = [
        (inspect.isclass(given), "is a class, and a question is a value", f"pass {who}()"),
        (not callable(measure) or measure is Question.measure, "has no method measure, so there is nothing to judge",
         "write measure(self, case) that returns case.finding(self, effect, controls=…)"),
        *((not _is_text(getattr(given, key, None)), f"has {key}={getattr(given, key, None)!r}, and the page shows it",
           f'set {key} = "…" in its class') for key in ("name", "unit", "asks")),
        (len(sides) != 2 or not all(side is None or _is_text(side) for side in sides) or not any(sides)
         or NOT_SHOWN in sides,
         f"has words={words!r}, and a verdict needs the word of a positive effect and that of a negative one",
         'set words = ("more", "less"), with None for a side without a word'),
    ]  # fmt: skip
    for wrong, what, fix in faults:
        if wrong:
            raise UsageError(f"question {who!r} {what}; {fix}")
    check_names([who])
    POSITIVE(f"smallest of question {who!r}", getattr(given, "smallest", None))
    return given


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
