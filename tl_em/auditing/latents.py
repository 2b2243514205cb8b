"""The audit's look at latents: which ones the behaviours share, whether they carry the behaviour, and on what paths.

    behaviours   what the pair says (`look_up`; a toy: questions about six domains); else the contrast sets' first parts
    verified on  what the pair says (`held_out`; a toy: three other domains); else the third part of the first set
    graph        base beside tuned on one held-out prompt, towards  logit(what gained most) - logit(what lost most)

The controls are those of ``shared_features`` (a null of its own), ``verify_feature`` (matched random latents, the mean
difference) and of the graph (exact ablation). The prompt of the graph is the one on which the next token's probability
changed most: an illustration, and chosen as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tl_em.auditing.splits import Subject
from tl_em.claims.questions.latents import FeatureCheck, verify_feature
from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.quality import dictionary_quality
from tl_em.features.cards import feature_cards
from tl_em.features.scoring import FeatureTable, score_features
from tl_em.features.shared_latents import FeatureSet, shared_features
from tl_em.graph.build import attribute, leading_nodes
from tl_em.models.contrasts import ContrastSet
from tl_em.models.loading import HeldOut, ModelPair
from tl_em.models.prompts import Prompt
from tl_em.models.stream import next_token_logits
from tl_em.models.token_text import text_of_tokens

if TYPE_CHECKING:
    from tl_em.auditing.report import Report

LEADERS = 3
CARDS = 8
FITTED = 64
"""Prompts, about, on which it is looked at whether the dictionary fits: it costs eight passes over each."""
GRAPH = "Paths through the dictionary, base beside tuned"


def shared_latents(
    report: Report, pair: ModelPair, dictionary: Dictionary, asked: Sequence[Subject], *, seed: int = 0
) -> Report:
    """The report with the latents that the behaviours share, their verification, and a graph of base beside tuned.

    Args:
        report: of the audit.
        pair: base and tuned.
        dictionary: an SAE of their activations.
        asked: the audit's questions, whose contrast sets are the behaviours where the pair has no ``look_up``.
        seed: of splits, placebos and resampling.

    Raises:
        DictionaryFitError: the dictionary does not fit the activations (``em.dictionaries.dictionary_quality``).
    """
    behaviours = pair.look_up or {q.name: q.splits.train for q in asked}
    held_out = HeldOut(*(pair.held_out or (asked[0].splits.test, asked[0].judged)))
    prompts = [prompt for each in behaviours.values() for prompt in (*each.positive, *each.negative)]
    some = prompts[:: max(1, len(prompts) // FITTED)]  # positive and negative of each behaviour
    dictionary_quality(pair.tuned, dictionary, some, against=pair.base, seed=seed).check()
    table = score_features(pair.tuned, dictionary, behaviours, against=pair.base, seed=seed)
    found = shared_features(table, seed=seed)
    checks = _verified(pair, found, next(iter(behaviours.values())), held_out, seed)
    indices = found[0].indices[:CARDS] if found else _leaders(table)
    cards = feature_cards(
        pair.tuned, dictionary, indices, prompts, against=pair.base, table=table, checks=checks, seed=seed
    )
    report = report.with_features(cards, note=_said(found, table))
    if dictionary.is_transcoder or not found:
        return report
    return _with_graph(report, pair, dictionary, held_out.contrast.positive)


def _verified(
    pair: ModelPair, found: Sequence[FeatureSet], fit: ContrastSet, held_out: HeldOut, seed: int
) -> tuple[FeatureCheck, ...]:
    if not found or found[0].dictionary.is_transcoder:
        return ()
    check = verify_feature(
        pair.tuned, found[0], held_out.contrast, metric=held_out.metric, against=pair.base, fit=fit, singly=False,
        seed=seed,
    )  # fmt: skip
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
        + (f" {found[0].said_of_drift[0].upper()}{found[0].said_of_drift[1:]}." if found[0].drifts else "")
    )


def _with_graph(report: Report, pair: ModelPair, dictionary: Dictionary, prompts: Sequence[Prompt]) -> Report:
    change = next_token_logits(pair.tuned, prompts).softmax(-1) - next_token_logits(pair.base, prompts).softmax(-1)
    at = int(change.max(-1).values.argmax())
    target = ([int(change[at].argmax())], [int(change[at].argmin())])
    models = (pair.base, pair.tuned)
    lead = {each for model in models for each in leading_nodes(model, prompts[at], dictionary, target=target)}
    base, tuned = (attribute(model, prompts[at], dictionary, target=target, also=lead) for model in models)
    words = " against ".join(repr(text_of_tokens(getattr(pair.tuned, "tokenizer", None), each)) for each in target)
    note = (
        f"The held-out prompt on which the next token changed most; the target is {words}, what gained most against "
        "what lost most. The page to click through is graph-1.html beside this one, where the report was saved to a "
        "folder."
    )
    return report.with_graph(GRAPH, base.diff(tuned), note=note)
