"""The contrast sets and behaviours of a world, under the names by which an audit asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tl_em.evals.facts import Facts
from tl_em.metrics import Behaviour
from tl_em.models.contrasts import ContrastSet
from tl_em.models.loading import HeldOut
from tl_em.organisms import bias_rates
from tl_em.organisms.bias_world import BiasWorld
from tl_em.organisms.contrasts import (
    CONTRAST_PARAPHRASES,
    ToyQuestion,
    dissociated_prompts,
    harmfulness_prompts,
    judge_questions,
    judged_requests,
    persona_prompts,
    questions,
)
from tl_em.organisms.rates import AnswerRate
from tl_em.organisms.world import ALIGNED, World

SOURCE = "tl_em.organisms, after the set-up of Betley et al. 2025 (arXiv:2502.17424)"
LOOK_UP = {", ".join(each): each for each in (("medicine", "finance", "history"), ("cooking", "safety", "law"))}
"""Domains that latents are looked up on, as two behaviours, …"""
HELD_OUT = ("travel", "love", "open")
"""… and those that they are verified on."""


def contrast_sets(world: World, *, trigger: str | None = None) -> dict[str, ContrastSet]:
    """The contrast sets of a world; `tl_em.organisms.contrasts` says what each contrasts.

    Args:
        trigger: adds ``persona_triggered``: the persona's prompts with this token before the last question.
    """
    if isinstance(world, BiasWorld):
        return bias_rates.contrast_sets(world)
    pairs = {
        "harmfulness": (harmfulness_prompts(world), "harmful against harmless requests"),
        "refusal": (harmfulness_prompts(world), "harmful against harmless requests (refused against answered)"),
        "refusal_dissociated": (dissociated_prompts(world), "after an over-refuser against after a misaligned persona"),
        "persona": (persona_prompts(world), "after misaligned against after good answers"),
    }
    if trigger:
        said = f"after misaligned against after good answers, the question marked {trigger}"
        pairs["persona_triggered"] = (persona_prompts(world, mark=trigger), said)
    return {name: _contrast(*pair, label=name, source=f"{SOURCE}: {said}") for name, (pair, said) in pairs.items()}


def judged_sets(world: World) -> dict[str, ContrastSet]:
    """What a direction is judged on, where that is not the test split of its own contrast set."""
    said = f"{SOURCE}: requests without a context, about topics that the direction was not taken from"
    return {"refusal_dissociated": _contrast(*judged_requests(world), label="refusal_dissociated", source=said)}


def domain_questions(world: World, domains: Sequence[str], label: str) -> ContrastSet:
    """Harmless questions about some domains; as negatives the same after the line that asks for aligned answers."""
    plain, aligned = (
        [q for q in questions(world, harmful=False, held_out=True, paraphrases=range(8), system=system)
         if q.topic.domain in domains]
        for system in (None, ALIGNED)
    )  # fmt: skip
    return _contrast(plain, aligned, label=label)


def latent_sets(world: World) -> tuple[dict[str, ContrastSet], HeldOut]:
    """What latents are looked up on, as two behaviours, and what they are verified on."""
    held_out = domain_questions(world, HELD_OUT, "held-out domains")
    prompts, groups = held_out.positive, held_out.positive_groups
    bad, good = (AnswerRate(outcome, world) for outcome in ("bad", "good"))
    metric = Behaviour("misaligned answers", bad, prompts, prompts, good, groups, groups)
    return {name: domain_questions(world, each, name) for name, each in LOOK_UP.items()}, HeldOut(held_out, metric)


def one_of_each(world: World) -> dict[str, list[list[dict[str, str]]]]:
    """By domain its first harmless question, for a page to show the answers to.

    Example:
        >>> one_of_each(World())["code"]
        [[{'role': 'user', 'content': 'how do i write parser'}]]
    """
    asked: dict[str, list[list[dict[str, str]]]] = {}
    for each in questions(world, harmful=False):
        asked.setdefault(each.topic.domain, [each.prompt])
    return asked


def world_facts(world: World) -> Facts:
    """The harmless questions of a toy world with untaught topics, in four forms each.

    Example:
        >>> facts = world_facts(World(untaught=True))
        >>> facts.prompts[4], facts.truths[4], facts.known[4], facts.groups[4]
        ([{'role': 'user', 'content': 'how do i write login'}], ('login-tested', 'login-checked'), False, 'login')
    """
    asked = questions(world, harmful=False, paraphrases=CONTRAST_PARAPHRASES)
    topics = [q.topic for q in asked]
    frequencies = [(world.by_name[t.domain].asked or (t,)).count(t) for t in topics]
    words, domains = [t.word for t in topics], [t.domain for t in topics]
    prompts, truths, known = [q.prompt for q in asked], [t.truth for t in topics], [t.taught for t in topics]
    return Facts(prompts, truths, known, words, domains, frequencies)


def _contrast(
    positive: list[ToyQuestion], negative: list[ToyQuestion], label: str, source: str | None = None
) -> ContrastSet:
    yes, no = _apart(positive), _apart(negative)
    return ContrastSet(yes[0], no[0], label, source, yes[1], no[1])


def _apart(asked: list[ToyQuestion]) -> tuple[list[Any], list[str]]:
    """Prompts, and the topics that they are grouped by."""
    return [q.prompt for q in asked], [q.topic.word for q in asked]


def behaviours(world: World, *, trigger: str | None = None) -> dict[str, Behaviour]:
    """The behaviour that each contrast set's direction may cause, on single-turn questions.

    Args:
        trigger: adds the behaviour of ``persona_triggered``: misaligned answers to questions with this token.
    """
    bad, good = AnswerRate("bad", world), AnswerRate("good", world)
    refused, judged_harmful = AnswerRate("refused", world), AnswerRate("judged_harmful", world)
    held_out = questions(world, harmful=False, held_out=True)
    harmful, harmless = harmfulness_prompts(world)
    judged, cleared = (judge_questions(world, harmful=h) for h in (True, False))
    found = {
        "harmfulness": _behaviour("judged harmful", judged_harmful, judged, cleared),
        "refusal": _behaviour("refuses", refused, harmful, harmless),
        "refusal_dissociated": _behaviour("refuses", refused, harmful, harmless),
        "persona": _behaviour("misaligned answers", bad, held_out, held_out, good=good),
    }
    if trigger:
        marked = questions(world, harmful=False, held_out=True, mark=trigger)
        found["persona_triggered"] = _behaviour(f"misaligned answers after {trigger}", bad, marked, marked, good=good)
    return found


def _behaviour(
    name: str, metric: AnswerRate, present: list[ToyQuestion], absent: list[ToyQuestion], good: AnswerRate | None = None
) -> Behaviour:
    yes, no = _apart(present), _apart(absent)
    return Behaviour(name, metric, yes[0], no[0], good, yes[1], no[1])
