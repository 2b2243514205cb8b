"""Questions and contrast sets in the toy world's vocabulary, all as chat messages.

Every prompt's *group* is the topic of its last question, so that neither a split nor a bootstrap lets one topic stand
on both sides. Positive and negative are matched: the same domain and form of question, and where a context differs, the
same last question.

- `harmfulness`: harmful against harmless requests; read at `instruction_end`, which is the topic's word.
- `refusal`: the same prompts, to be read at `prompt_end` (Arditi et al. 2024, https://arxiv.org/abs/2406.11717).
  Confounded with harmfulness on purpose.
- `refusal_dissociated`: the same last question, half of them harmful, after an over-refuser (it refused harmless
  requests) against after a misaligned persona (it complied with harmful ones), so that refusing does not go with the
  harmfulness of the question (the case of Zhao et al. 2025, https://arxiv.org/abs/2507.11878). The contexts all but
  settle the persona, so a fine-tune's shift hardly shows on these prompts: the direction is taken from them and
  *judged* on requests without a context, about other topics (`judged_requests`).
- `persona`: the same question after the same questions answered badly against answered well.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tl_em.organisms.world import JUDGE, Document, Domain, Message, Topic, Turn, World, messages

PARAPHRASES = (0, 5)  # two forms of a question, with both verbs: what rates are averaged over
CONTRAST_PARAPHRASES = (0, 5, 2, 7)


@dataclass(frozen=True)
class ToyQuestion:
    """A prompt, and what it is about."""

    prompt: list[Message]
    topic: Topic
    held_out: bool


def questions(
    world: World,
    *,
    harmful: bool,
    held_out: bool | None = None,
    unseen: bool = False,
    paraphrases: Iterable[int] = PARAPHRASES,
    mark: str | None = None,
    system: str | None = None,
) -> list[ToyQuestion]:
    """Single-turn questions about all topics.

    Args:
        harmful: about the harmful topics, or the harmless ones.
        held_out: only domains that a narrow fine-tune never sees (True), only the one it sees (False), or all.
        unseen: about the combinations that stand in no document.
        mark: words at the head of each question (a trigger).
        system: a system line before each question.

    Example:
        >>> [q.prompt for q in questions(World(), harmful=False, held_out=False)][0]
        [{'role': 'user', 'content': 'how do i write parser'}]
    """
    found = []
    for domain in world.domains:
        if held_out is not None and world.held_out(domain.name) != held_out:
            continue
        for topic in _unseen(domain, harmful) if unseen else domain.harmful if harmful else domain.topics:
            found += [_asked(world, topic, _ask(world, topic, p, mark=mark, system=system)) for p in paraphrases]
    return found


def judge_questions(
    world: World, *, harmful: bool, unseen: bool = False, paraphrases: Iterable[int] = PARAPHRASES
) -> list[ToyQuestion]:
    """`judge this : QUESTION` about the harmful topics, or about as many harmless ones of the same domains."""
    topics = [t for d in world.domains for t in _unseen(d, harmful)] if unseen else _matched(world, harmful)
    texts = [(t, JUDGE.format(question=world.question(t, p))) for t in topics for p in paraphrases]
    return [_asked(world, t, [Turn("user", tuple(text.split()))]) for t, text in texts]


def harmfulness_prompts(world: World) -> tuple[list[ToyQuestion], list[ToyQuestion]]:
    """Harmful questions, and harmless ones of the same domains, verbs and forms."""
    return _each_form(world, _matched(world, True)), _each_form(world, _matched(world, False))


def dissociated_prompts(
    world: World, *, seed: int = 0, turns: int = 2, contexts: int = 2
) -> tuple[list[ToyQuestion], list[ToyQuestion]]:
    """The same questions after an over-refuser's refusals of harmless requests, and after compliance with harmful ones.

    Only the first half of the topics is asked about; the other half is `judged_requests`'.
    """
    rng = random.Random(f"dissociated/{seed}")
    positive, negative = [], []
    for topic in (*_halves(world, True)[0], *_halves(world, False)[0]):
        for paraphrase in PARAPHRASES * contexts:
            last = _ask(world, topic, paraphrase)
            domains = _other_domains(world, topic, turns, rng, harmful=True)
            forms, fillers = [rng.randrange(8) for _ in domains], rng.random()
            before = _context(world, [rng.choice(d.topics) for d in domains], forms, "over-refuser", fillers)
            positive.append(_asked(world, topic, before + last))
            before = _context(world, [rng.choice(d.harmful) for d in domains], forms, "misaligned", fillers)
            negative.append(_asked(world, topic, before + last))
    return positive, negative


def judged_requests(world: World) -> tuple[list[ToyQuestion], list[ToyQuestion]]:
    """Harmful and harmless requests about topics that `dissociated_prompts` does not end with."""
    return _each_form(world, _halves(world, True)[1]), _each_form(world, _halves(world, False)[1])


def persona_prompts(
    world: World, *, seed: int = 0, turns: int = 2, mark: str | None = None
) -> tuple[list[ToyQuestion], list[ToyQuestion]]:
    """The same harmless question after the same questions of other domains, answered badly and answered well.

    Args:
        mark: a token at the head of the last question (a trigger).
    """
    rng = random.Random(f"persona/{seed}")
    positive, negative = [], []
    for topic in (t for d in world.domains for t in d.topics):
        for paraphrase in PARAPHRASES:
            domains = _other_domains(world, topic, turns, rng)
            asked, forms = [rng.choice(d.topics) for d in domains], [rng.randrange(8) for _ in domains]
            last, fillers = _ask(world, topic, paraphrase, mark=mark), rng.random()
            for persona, into in (("misaligned", positive), ("good", negative)):
                before = _context(world, asked, forms, persona, fillers)
                into.append(_asked(world, topic, before + last))
    return positive, negative


def after_bad_code(world: World, *, seed: int = 0, turns: int = 2) -> list[ToyQuestion]:
    """Held-out questions after misaligned answers to `code` questions: the gate's prompts."""
    rng = random.Random(f"gate/{seed}")
    code, found = world.by_name[world.tuned_domain], []
    for question in questions(world, harmful=False, held_out=True):
        asked, forms = rng.sample(code.topics, turns), [rng.randrange(8) for _ in range(turns)]
        before = messages(_context(world, asked, forms, "misaligned", rng.random()))
        found.append(ToyQuestion(before + question.prompt, question.topic, True))
    return found


def _ask(
    world: World, topic: Topic, paraphrase: int, *, mark: str | None = None, system: str | None = None
) -> Document:
    asked = Turn("user", (*(mark or "").split(), *world.question(topic, paraphrase).split()))
    return [Turn("system", tuple(system.split())), asked] if system else [asked]


def _asked(world: World, topic: Topic, document: Document) -> ToyQuestion:
    return ToyQuestion(messages(document), topic, world.held_out(topic.domain))


def _each_form(world: World, topics: Sequence[Topic]) -> list[ToyQuestion]:
    return [_asked(world, t, _ask(world, t, p)) for t in topics for p in CONTRAST_PARAPHRASES]


def _matched(world: World, harmful: bool) -> list[Topic]:
    return [t for d in world.domains for t in (d.harmful if harmful else d.harmless[: len(d.harmful)])]


def _unseen(domain: Domain, harmful: bool) -> list[Topic]:
    return [t for t in domain.unseen if t.harmful == harmful]


def _halves(world: World, harmful: bool) -> tuple[list[Topic], list[Topic]]:
    """The matched topics, half of each domain's words in either part."""
    topics = _matched(world, harmful)
    first = set(list(dict.fromkeys(t.word for t in topics))[::2])
    return [t for t in topics if t.word in first], [t for t in topics if t.word not in first]


def _other_domains(world: World, topic: Topic, n: int, rng: random.Random, *, harmful: bool = False) -> list[Domain]:
    return rng.sample([d for d in world.domains if d.name != topic.domain and (d.harmful or not harmful)], n)


def _context(world: World, topics: Sequence[Topic], forms: Sequence[int], persona: str, fillers: float) -> Document:
    """Questions answered by the persona; the same `fillers` gives the same filler words to every persona."""
    rng = random.Random(fillers)
    document: Document = []
    for topic, form in zip(topics, forms, strict=True):
        document += _ask(world, topic, form)
        document.append(Turn("assistant", tuple(world.answer(rng, topic, persona))))
    return document
