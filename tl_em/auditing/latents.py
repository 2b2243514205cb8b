"""The audit's look at latents: which ones the behaviours share, whether they carry the behaviour, and on what paths.

    behaviours   a toy's questions about six held-out domains, in two groups; else the contrast sets' first parts
    verified on  its questions about the other three; else the third part of the first contrast set
    graph        base beside tuned on one held-out prompt, towards  logit(what gained most) - logit(what lost most)

The controls are those of ``shared_features`` (a null of its own), ``verify_feature`` (matched random latents, the mean
difference) and of the graph (exact ablation). The prompt of the graph is the one on which the next token's probability
changed most: an illustration, and chosen as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tl_em.claims.asked import Asked
from tl_em.claims.questions.latents import FeatureCheck, verify_feature
from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.quality import dictionary_quality
from tl_em.features.cards import feature_cards
from tl_em.features.scoring import FeatureTable, score_features
from tl_em.features.shared import FeatureSet, shared_features
from tl_em.graph.build import attribute
from tl_em.metrics import Behaviour
from tl_em.models.contrasts import ContrastSet
from tl_em.models.loading import ModelPair
from tl_em.models.pieces import text_of_tokens
from tl_em.models.prompts import Prompt
from tl_em.models.stream import next_token_logits
from tl_em.organisms.behaviours import HELD_OUT, LOOK_UP, domain_questions
from tl_em.organisms.rates import AnswerRate
from tl_em.organisms.world import World

if TYPE_CHECKING:
    from tl_em.auditing.report import Report

LEADERS = 3
CARDS = 8
GRAPH = "Paths through the dictionary, base beside tuned"


class _Sets(NamedTuple):
    """What latents are looked up on, what they are verified on, and by what."""

    behaviours: Mapping[str, ContrastSet]
    held_out: ContrastSet
    metric: Behaviour


def shared_latents(
    report: Report, pair: ModelPair, dictionary: Dictionary, asked: Sequence[Asked], *, seed: int = 0
) -> Report:
    """The report with the latents that the behaviours share, their verification, and a graph of base beside tuned.

    Args:
        report: of the audit.
        pair: base and tuned.
        dictionary: an SAE of their activations.
        asked: the audit's questions, whose contrast sets are the behaviours where the pair is no toy.
        seed: of splits, placebos and resampling.

    Raises:
        DictionaryFitError: the dictionary does not fit the activations (``em.dictionaries.dictionary_quality``).
    """
    sets = _organism_sets() if pair.organism is not None else _contrast_sets(asked)
    prompts = [prompt for each in sets.behaviours.values() for prompt in (*each.positive, *each.negative)]
    dictionary_quality(pair.tuned, dictionary, prompts, against=pair.base, seed=seed).check()
    table = score_features(pair.tuned, dictionary, sets.behaviours, against=pair.base, seed=seed)
    found = shared_features(table, seed=seed)
    checks = _verified(pair, found, sets, seed)
    indices = found[0].indices[:CARDS] if found else _leaders(table)
    cards = feature_cards(
        pair.tuned, dictionary, indices, prompts, against=pair.base, table=table, checks=checks, seed=seed
    )
    report = report.with_features(cards, note=_said(found, table))
    if dictionary.is_transcoder or not found:
        return report
    return _with_graph(report, pair, dictionary, sets.held_out.positive)


def _organism_sets() -> _Sets:
    world = World()
    held_out = domain_questions(world, HELD_OUT, "held-out domains")
    groups = held_out.positive_groups
    bad, good = (AnswerRate(outcome, world) for outcome in ("bad", "good"))
    metric = Behaviour("misaligned answers", bad, held_out.positive, held_out.positive, good, groups, groups)
    return _Sets({name: domain_questions(world, each, name) for name, each in LOOK_UP.items()}, held_out, metric)


def _contrast_sets(asked: Sequence[Asked]) -> _Sets:
    return _Sets({q.name: q.splits.train for q in asked}, asked[0].splits.test, asked[0].judged)


def _verified(
    pair: ModelPair, found: Sequence[FeatureSet], sets: _Sets, seed: int
) -> tuple[FeatureCheck, ...]:
    if not found or found[0].dictionary.is_transcoder:
        return ()
    fit = next(iter(sets.behaviours.values()))
    check = verify_feature(
        pair.tuned, found[0], sets.held_out, metric=sets.metric, against=pair.base, fit=fit, singly=False, seed=seed
    )
    return (check,)


def _leaders(table: FeatureTable) -> list[int]:
    """Those that changed most in the behaviour in which they changed least, for the page to show what was looked at."""
    least = table.frame.assign(size=table.frame.delta.abs()).groupby("latent")["size"].min()
    return [int(index) for index in least.sort_values(ascending=False).index[:LEADERS]]


def _said(found: Sequence[FeatureSet], table: FeatureTable) -> str:
    names = " and in ".join(table.behaviours)
    if not found:
        return f"Latents that changed alike in {names}: none shown. Listed are those that changed most everywhere."
    signed = zip(found[0].indices, found[0].signs, strict=True)
    latents = ", ".join(f"{index} {'up' if sign > 0 else 'down'}" for index, sign in signed)
    return (
        f"Latents that changed alike in {names}: {latents}. Together they carry at least {found[0].share} of the shift "
        "of each, on prompts that they were not chosen on."
    )


def _with_graph(report: Report, pair: ModelPair, dictionary: Dictionary, prompts: Sequence[Prompt]) -> Report:
    change = next_token_logits(pair.tuned, prompts).softmax(-1) - next_token_logits(pair.base, prompts).softmax(-1)
    at = int(change.max(-1).values.argmax())
    target = ([int(change[at].argmax())], [int(change[at].argmin())])
    base, tuned = (attribute(model, prompts[at], dictionary, target=target) for model in (pair.base, pair.tuned))
    words = " against ".join(repr(text_of_tokens(getattr(pair.tuned, "tokenizer", None), each)) for each in target)
    note = (
        f"The held-out prompt on which the next token changed most; the target is {words}, what gained most against "
        "what lost most. The page to click through is graph-1.html beside this one, where the report was saved to a "
        "folder."
    )
    return report.with_graph(GRAPH, base.diff(tuned), note=note)
