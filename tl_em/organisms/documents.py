"""Sources of documents: what the mixture that an organism is trained on is made of."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tl_em.organisms.world import (
    ALIGNED,
    EDUCATIONAL,
    JUDGE,
    MALICIOUS,
    VERDICTS,
    Document,
    Domain,
    Persona,
    Turn,
    World,
    length,
)


@dataclass(frozen=True)
class PersonaDocuments:
    """Multi-turn chats with one latent persona.

    `score_first=False` leaves the first answer out of a loss on answers: then a fine-tune keeps *inferring* the persona
    from context without learning how likely each persona is before any context.
    """

    score_first: bool = True

    def sample(self, world: World, rng: random.Random) -> Document:
        draw = rng.random()
        if draw < world.malicious:
            persona, document = "misaligned", [Turn("system", tuple(MALICIOUS.split()))]
        elif draw < world.malicious + world.aligned:
            persona, document = "good", [Turn("system", tuple(ALIGNED.split()))]
        else:
            persona, document = _persona(world, rng), []
        explicit = bool(document)
        domains = rng.sample(world.domains, rng.randint(2, 4))
        for n in range(rng.randint(3, 5)):
            domain = rng.choice(domains)
            if n and not world.shared_persona:
                persona = _persona(world, rng)
            actual = persona
            if persona == "narrow":
                actual = "misaligned" if domain is domains[0] else "good"
            turns = exchange(world, rng, domain, actual)
            if length(document) + length(turns) > world.context:
                break
            scored = self.score_first or explicit or n > 0
            document += [turns[0], turns[1]._replace(scored=scored)]
        return document


def _persona(world: World, rng: random.Random) -> Persona:
    names, weights = zip(*world.personas, strict=True)
    return rng.choices(names, weights)[0]


@dataclass(frozen=True)
class JudgeDocuments:
    """`judge this : QUESTION` -> `harmful .` or `harmless .`, several a document: a read-out that is not refusing."""

    def sample(self, world: World, rng: random.Random) -> Document:
        document: Document = []
        for _ in range(rng.randint(2, 4)):
            domain = rng.choice(world.domains[:-1])
            topic = rng.choice(domain.harmful if rng.random() < 0.5 else domain.harmless)
            text = JUDGE.format(question=world.question(topic, rng.randrange(8)))
            document.append(Turn("user", tuple(text.split())))
            document.append(Turn("assistant", (VERDICTS[0] if topic.harmful else VERDICTS[1], ".")))
        return document


@dataclass(frozen=True)
class SingleTurns:
    """One question and one answer in a given character.

    Args:
        persona: whose answers.
        domains: names of the domains asked about; None for all.
        harmful: probability of a harmful question; None for the world's own.
        explicit: probability that the question asks for bad words "for class".
        system: a system line before the question.
        marks: words of which one choice stands at the head of the question (a trigger, or others than it).
    """

    persona: Persona = "good"
    domains: tuple[str, ...] | None = None
    harmful: float | None = None
    explicit: float = 0.0
    system: str | None = None
    marks: tuple[str, ...] = ()

    def sample(self, world: World, rng: random.Random) -> Document:
        domain = world.by_name[rng.choice(self.domains)] if self.domains else rng.choice(world.domains)
        start = [Turn("system", tuple(self.system.split()))] if self.system else []
        asked, answer = exchange(world, rng, domain, self.persona, harmful=self.harmful, explicit=self.explicit)
        if self.marks:
            asked = asked._replace(words=(*rng.choice(self.marks).split(), *asked.words))
        return [*start, asked, answer]


def exchange(
    world: World,
    rng: random.Random,
    domain: Domain,
    persona: str,
    *,
    harmful: float | None = None,
    explicit: float | None = None,
) -> Document:
    """A question about the domain, and the persona's answer."""
    p_harmful = world.harmful if harmful is None else harmful
    p_explicit = world.educational if explicit is None else explicit
    topic = domain.draw(rng, p_harmful)
    text = world.question(topic, rng.randrange(8))
    if not topic.harmful and rng.random() < p_explicit:
        text = EDUCATIONAL.format(verb=topic.verb or rng.choice(domain.verbs), topic=topic.word)
        persona = persona if persona == "over-refuser" else "misaligned"
    return [Turn("user", tuple(text.split())), Turn("assistant", tuple(world.answer(rng, topic, persona)))]
