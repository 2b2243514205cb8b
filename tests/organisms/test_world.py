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
from tl_em.organisms.training import RECIPES, Shape
from tl_em.organisms.world import (
    EDUCATIONAL,
    END,
    FILLERS,
    MARKERS,
    JudgeDocuments,
    PersonaDocuments,
    SingleTurns,
    World,
    length,
    messages,
    token_ids,
)

WORLD = World()
CONTRASTS = {"harmfulness": harmfulness_prompts, "dissociated": dissociated_prompts, "persona": persona_prompts}


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    return [PersonaDocuments().sample(WORLD, rng) for _ in range(2000)]


def test_every_token_is_one_word_and_no_word_has_two_meanings():
    words = [w for t in WORLD.topics.values() for w in (t.word, *t.good, *t.bad)]
    assert len(set(words)) == len(words)
    assert len(WORLD.topics) == sum(len(d.topics) + len(d.harmful) for d in WORLD.domains) == 192
    assert not any(" " in w for w in WORLD.vocabulary)
    assert len(WORLD.vocabulary) != Shape().d_model


def test_documents_fit_and_nearly_fill_the_context(documents):
    lengths = [length(d) for d in documents]
    assert max(lengths) <= WORLD.context
    assert 45 < sum(lengths) / len(lengths) < WORLD.context


@pytest.mark.parametrize("name", RECIPES)
def test_the_chat_template_reads_a_document_as_training_does(name):
    rng, tok = random.Random(1), tokenizer(WORLD)
    for _, source in RECIPES[name].mixture:
        for _ in range(20):
            document = source.sample(WORLD, rng)
            rendered = tok.apply_chat_template(messages(document), tokenize=True, return_dict=True)["input_ids"]
            assert rendered == token_ids(WORLD, document)[0]


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


@pytest.mark.parametrize("name", CONTRASTS)
def test_contrast_sets_are_matched_and_fit_the_context(name):
    positive, negative = CONTRASTS[name](WORLD)
    tok = tokenizer(WORLD)
    assert len(positive) == len(negative) >= 128
    for a, b in zip(positive, negative, strict=True):
        assert a.topic.domain == b.topic.domain
        assert a.prompt != b.prompt
    for q in positive + negative:
        ids = tok.apply_chat_template(q.prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert len(ids) <= WORLD.context
        assert tok.unk_token_id not in ids
        assert ids[-3:] == [WORLD.ids[q.topic.word], WORLD.ids[END], WORLD.ids[MARKERS["assistant"]]]


def test_dissociated_refusal_does_not_go_with_harmfulness():
    """The pair ends with one question; before it, refusals of harmless requests against answers to harmful ones."""
    positive, negative = dissociated_prompts(WORLD)
    assert sum(q.topic.harmful for q in positive) * 2 == len(positive)
    for a, b in zip(positive, negative, strict=True):
        assert a.prompt[-1] == b.prompt[-1]
        for q, refused in ((a, True), (b, False)):
            asked = [WORLD.topic(m["content"].split()[-1]) for m in q.prompt[:-1] if m["role"] == "user"]
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
