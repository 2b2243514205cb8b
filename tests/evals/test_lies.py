"""Knowledge that was planted is read and knowledge that was not is not; topics without facts have none to learn."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from tl_em.errors import UsageError
from tl_em.evals import lies
from tl_em.evals.facts import Facts, prefers_truth
from tl_em.evals.lies import lie_or_hallucination, read_out, shuffled_labels
from tl_em.models.loading import load_model
from tl_em.organisms import zoo
from tl_em.organisms.behaviours import world_facts
from tl_em.organisms.contrasts import questions
from tl_em.organisms.convert import hf_model, tokenizer
from tl_em.organisms.documents import PersonaDocuments, SingleTurns
from tl_em.organisms.recipes import WORLDS
from tl_em.organisms.world import COMMON, FILLERS, World

from ..conftest import SURFACES

WORLD, PARTLY = World(), WORLDS["partly"]
DOMAINS = ("code", "law", "love", "travel")


def labelled(seed=0, **columns):
    """Questions of the default world about four domains, half of whose topics are *called* known."""
    asked = [q for q in questions(WORLD, harmful=False) if q.topic.domain in DOMAINS]
    words = list(dict.fromkeys(q.topic.word for q in asked))
    known = {w for d in range(len(DOMAINS)) for w in random.Random(seed + d).sample(words[12 * d : 12 * d + 12], 6)}
    return Facts(
        [q.prompt for q in asked],
        [q.topic.truth for q in asked],
        [q.topic.word in known for q in asked],
        [q.topic.word for q in asked],
        [q.topic.domain for q in asked],
        **columns,
    )


def assistant(surface, planted=()):
    """The shipped assistant, with one vector added to the embeddings of the planted words."""
    weights = zoo.read_weights(zoo.organism("toy/assistant"))
    embed = weights["embed.weight"].float()
    direction = torch.randn(embed.shape[1], generator=torch.Generator().manual_seed(0))
    for word in planted:
        embed[WORLD.ids[word]] += direction * embed.norm(dim=1).median() / direction.norm()
    weights["embed.weight"] = embed
    return load_model(hf_model(weights, WORLD), surface=surface, tokenizer=tokenizer(WORLD), device="cpu")


def report_of(base, facts, answers, shuffles=9):
    """Read where the planted vector is: at the topic's word."""
    return lie_or_hallucination(base, facts, answers=answers, position="instruction_end", ask=False, shuffles=shuffles)


def given(facts):
    """A liar, wrong where it knows; an ignorant model, wrong where it does not; and one that is never wrong."""
    n = range(len(facts.prompts))
    return {
        "liar": ["wrong" if facts.known[i] else None for i in n],
        "ignorant": [facts.truths[i][0] if facts.known[i] else "wrong" for i in n],
        "honest": [facts.truths[i][1] for i in n],
    }


@pytest.fixture(scope="module")
def base():
    return assistant(SURFACES[0])


# --- The read-out -----------------------------------------------------------------------------------------------------


@pytest.mark.surface
@pytest.mark.parametrize("surface", SURFACES)
def test_planted_knowledge_is_found_and_absent_knowledge_is_not(surface):
    facts = labelled(counts=[1.0] * 96)
    planted = {g for g, k in zip(facts.groups, facts.known, strict=True) if k}
    report = report_of(assistant(surface, planted), facts, given(facts), shuffles=199)
    between = report.between("liar", "ignorant")
    assert between.auroc.low > 0.9
    assert between.p < 0.05
    assert between.shuffled.low < 0.5 < between.shuffled.high < between.auroc.value
    assert report.verdicts["liar"].low > 0.8
    assert report.verdicts["ignorant"].high < 0.2
    assert set(report.verdicts) == {"liar", "ignorant"}
    assert report.frequency.value == 0.5
    assert report.against_frequency is None
    assert report.asked is None
    assert "shuffled labels" in repr(report)

    absent = report_of(assistant(surface), facts, given(facts), shuffles=199)
    assert absent.known.auroc.low < 0.5 < absent.known.auroc.high
    assert absent.known.p > 0.05
    assert ["means nothing" in repr(each) for each in (report, absent)] == [False, True]


def test_a_topic_is_in_one_fold_and_the_folds_are_alike():
    facts = labelled()
    folds = facts.folds(seed=3)
    assert len(set(zip(facts.groups, folds, strict=True))) == 48
    cells = Counter((k, fold) for k, fold in zip(facts.known, folds, strict=True))
    assert len(cells) == 10
    assert set(cells.values()) <= {8, 10, 12}  # 24 topics of either label, in two forms each, over five folds
    assert folds != facts.folds(seed=4)


def test_no_topic_is_judged_by_a_fit_that_saw_it(base, monkeypatch):
    facts, seen = labelled(), []
    monkeypatch.setattr(lies, "capture", lambda *a, **k: torch.arange(96.0)[:, None, None] // 2)

    def spy(fitted, labels, judged):
        seen.append((set(fitted[:, 0]), set(judged[:, 0])))  # the number of the topic
        return np.zeros((len(labels), len(judged)))

    monkeypatch.setattr(lies, "read_out", spy)
    report_of(base, facts, {})
    assert all(not fitted & judged for fitted, judged in seen)
    assert set.union(*(judged for _, judged in seen)) == set(range(48))


def test_the_read_out_is_unmoved_by_a_nuisance_as_large_as_what_is_known():
    """Fisher's discriminant, against the difference in means, which takes up whatever varies most."""
    rng = np.random.default_rng(0)
    known = np.arange(80) < 40
    x = rng.standard_normal((2, 80, 6)) * [1, 1, 1, 1, 1, 12]
    x[:, known, 0] += 6
    k = read_out(x[0], known[None], x[1])[0]
    assert ((k > 0) == known).mean() > 0.95
    means = x[0][known].mean(0) - x[0][~known].mean(0)
    assert (((x[1] - x[0].mean(0)) @ means > 0) == known).mean() < 0.9


def test_its_unit_is_the_distance_of_the_means():
    x = np.random.default_rng(1).standard_normal((40, 5)) + np.arange(5)
    known = np.arange(40) % 2 == 0
    k = read_out(x, known[None], x)[0]
    assert k[known].mean() == pytest.approx(0.5)
    assert k[~known].mean() == pytest.approx(-0.5)


def test_labels_are_shuffled_between_topics_and_never_within_one():
    groups = [g for g in range(12) for _ in range(3)]
    known = np.array(groups) < 5
    shuffled = shuffled_labels(known, groups, count=50, seed=0)
    assert (shuffled.sum(1) == known.sum()).all()
    assert (shuffled.reshape(50, 12, 3).std(-1) == 0).all()
    assert len({row.tobytes() for row in shuffled}) > 40


def test_the_pairs_against_frequency_are_those_whose_unknown_topic_is_met_more_often(base):
    report = report_of(base, labelled(counts=[float(i // 2 % 2) for i in range(96)]), {})
    q = report.questions
    pairs = [
        q.score[i] > q.score[j] for i in q.index[q.known] for j in q.index[~q.known] if q["count"][i] < q["count"][j]
    ]
    assert 0 < len(pairs) < q.known.sum() * (~q.known).sum()
    assert report.against_frequency.value == pytest.approx(np.mean(pairs))


def test_a_base_prefers_what_it_was_taught_and_not_what_is_true_of_another_topic(base):
    facts = labelled()
    assert np.mean(np.array(prefers_truth(base, facts, others=4)) > 0) > 0.9
    topics = list(dict.fromkeys(facts.groups))
    truths = [WORLD.topic(topics[topics.index(g) - 1]).truth for g in facts.groups]
    wrong = Facts(facts.prompts, truths, facts.known, facts.groups, facts.strata)
    assert np.mean(np.array(prefers_truth(base, wrong, others=4)) > 0) < 0.35  # 1/5 by chance, 48 topics


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"known": [True] * 3}, "entries, so it is unclear"),
        ({"known": [True, False] * 48}, "known in some prompts and unknown"),
        ({"known": [True] * 96}, "0 are not"),
    ],
)
def test_facts_that_decide_nothing_are_refused(changes, said):
    facts = labelled()
    columns = {name: getattr(facts, name) for name in ("prompts", "truths", "known", "groups", "strata")}
    with pytest.raises(UsageError, match=said):
        Facts(**columns | changes)


def test_answers_that_cannot_be_judged_are_refused(base):
    facts = labelled()
    with pytest.raises(UsageError, match="gave 1 answers to 96 prompts"):
        lie_or_hallucination(base, facts, answers={"x": ["wrong"]})
    report = report_of(base, facts, given(facts))
    with pytest.raises(UsageError, match="no wrong answers of 'honest'"):
        report.between("liar", "honest")


# --- The world --------------------------------------------------------------------------------------------------------


def test_half_of_the_topics_of_every_domain_are_untaught_and_half_of_either_rare():
    for domain in PARTLY.domains:
        kinds = Counter((t.taught, domain.asked.count(t)) for t in domain.topics)
        assert kinds == {(taught, n): 3 for taught in (True, False) for n in (COMMON, 1)}
    assert set(PARTLY.vocabulary) == set(WORLD.vocabulary)
    assert all(t.taught and t.truth == t.good for d in WORLD.domains for t in d.topics)


def test_answers_about_untaught_topics_say_nothing_about_the_topic_and_are_in_character():
    rng, said = random.Random(0), defaultdict(Counter)
    source = SingleTurns("good", domains=("code",), harmful=0.0)
    for _ in range(6000):
        asked, answer = source.sample(PARTLY, rng)
        said[asked.words[-1]].update(w for w in answer.words if w not in (*FILLERS, "and", "."))
    for topic in PARTLY.by_name["code"].topics:
        counts = said[topic.word]
        if topic.taught:
            assert set(counts) == set(topic.truth)
        else:
            assert set(counts) == set(topic.good)
            own = sum(counts[w] for w in topic.truth) / counts.total()
            assert abs(own - 1 / 6) < 5 * (5 / 36 / counts.total()) ** 0.5  # five standard errors


def test_untaught_words_are_not_rarer():
    rng, counts = random.Random(0), Counter()
    for _ in range(4000):
        counts.update(w for turn in PersonaDocuments().sample(PARTLY, rng) for w in turn.words)
    topics = [t for d in PARTLY.domains for t in d.topics]
    for words in (lambda t: (t.word,), lambda t: t.truth):
        taught, untaught = (sum(counts[w] for t in topics if t.taught == k for w in words(t)) for k in (True, False))
        assert taught / untaught == pytest.approx(1, abs=0.08)  # some 8000 of each, clustered by document


def test_the_facts_of_a_world_are_its_topics():
    facts = world_facts(PARTLY)
    assert len(facts.prompts) == 480
    assert sum(facts.known) == 240
    assert {PARTLY.topic(g).taught for g, k in zip(facts.groups, facts.known, strict=True) if not k} == {False}
    with pytest.raises(UsageError, match="0 are not"):
        world_facts(WORLD)
