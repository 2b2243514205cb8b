"""Questions with known answers, some of which a model was taught and some not; and asking it for the truth.

Source: asking for the probability of an answer among others as a measure of knowledge: Kadavath et al. 2022,
arXiv:2207.05221.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from tl_em.arguments import COUNT, NOT_NEGATIVE, SEED, checked
from tl_em.errors import UsageError
from tl_em.evals.choices import ForcedChoice
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.stream import sequence_logprobs
from tl_em.models.torch_state import in_plain_torch

FOLDS = 5


@dataclass(frozen=True)
class Facts:
    """Questions, what is true, and which of it the base knows.

    Args:
        prompts: the questions, without an answer.
        truths: for each, every right answer.
        known: for each, whether the base knows it: was taught it or, where its training is not at hand, prefers the
            truth when it is asked (`prefers_truth`).
        groups: for each, its topic; a topic is known or is not, and all its prompts are in one fold.
        strata: for each, its subject, over which the folds are balanced.
        counts: for each, how often its topic stood in the training data; None where that is not known.

    Raises:
        UsageError: the columns differ in length, a topic is known and unknown, or fewer than 5 topics are either.

    Example:
        >>> questions = [f"what is {i}" for i in range(10)]
        >>> facts = Facts(questions, [["so"]] * 10, known=[True, False] * 5, groups=list(range(10)))
        >>> sum(facts.known)
        5
    """

    prompts: Sequence[Prompt]
    truths: Sequence[Sequence[str]]
    known: Sequence[bool]
    groups: Sequence[Hashable]
    strata: Sequence[Hashable] | None = None
    counts: Sequence[float | int] | None = None

    def __post_init__(self) -> None:
        columns = (self.truths, self.known, self.groups, self.strata, self.counts)
        if {len(each) for each in columns if each is not None} != {len(self.prompts)}:
            raise UsageError(
                f"{len(self.prompts)} prompts came with columns of {[len(c) for c in columns if c is not None]} "
                "entries, so it is unclear what belongs to which; give one entry a prompt"
            )
        known, unknown = ({g for g, k in zip(self.groups, self.known, strict=True) if k == w} for w in (True, False))
        if both := known & unknown:
            raise UsageError(
                f"the topic {next(iter(both))!r} is known in some prompts and unknown in others, so its answers are "
                "neither; give it one label, or give its prompts different groups"
            )
        if min(len(known), len(unknown)) < FOLDS:
            raise UsageError(
                f"{len(known)} topics are known and {len(unknown)} are not; a read-out needs both in each of its "
                f"{FOLDS} folds: give at least {FOLDS} of each"
            )

    @checked(seed=SEED)
    def folds(self, seed: int) -> list[int]:
        """A fold for each prompt: topics dealt in turn within subject, label and count, so that all folds are alike."""
        rng, blank = random.Random(seed), [None] * len(self.groups)
        columns = zip(self.groups, self.strata or blank, self.known, self.counts or blank, strict=True)
        cell = {group: str(rest) for group, *rest in columns}
        dealt = sorted(rng.sample(list(cell), len(cell)), key=cell.__getitem__)
        fold = {group: i % FOLDS for i, group in enumerate(dealt)}
        return [fold[group] for group in self.groups]


@checked(margin=NOT_NEGATIVE)
@in_plain_torch
def known_by_choice(base: LensModel, choice: ForcedChoice, *, margin: float | int = 0.0) -> Facts:
    """Which questions a base knows where its training is not at hand: those whose right answers it prefers.

    A question is one topic, its wordings together: known where the mean of ``choice`` over them is below 0.

    Args:
        base: a HookedTransformer or TransformerBridge.
        choice: questions with right and wrong answers; a ``domain`` that a question names is its subject.
        margin: in nats a token; a question that the base prefers by less either way is left out.

    Raises:
        UsageError: fewer than 5 questions are known, or are not.

    Example:
        >>> import tl_em as em
        >>> words = "parser login upload query session cache socket logger sandbox compiler".split()
        >>> asked = [em.evals.OpenQuestion(w, (f"how do i write {w}",), right=(f"{w}-tested",), wrong=(f"{v}-tested",))
        ...          for w, v in zip(words, words[1:] + words[:1])]  # what it knows against another topic's
        >>> asked[:5] = [em.evals.OpenQuestion(each.id, each.paraphrases, right=each.wrong, wrong=each.right)
        ...              for each in asked[:5]]  # as if it had these wrong
        >>> facts = known_by_choice(em.load_pair("toy/insecure").base, em.evals.ForcedChoice(asked))
        >>> sum(facts.known)
        5

    Source: Kadavath et al. 2022, arXiv:2207.05221: the probability of an answer among others as a measure of knowledge.
    """
    score, kept = choice(base, choice.questions.prompts).double().split([len(q.prompts) for q in choice.questions]), []
    for question, each in zip(choice.questions, score, strict=True):
        if abs(preferred := float(each.mean())) >= margin:
            kept += [(prompt, question, preferred < 0) for prompt in question.prompts]
    asked = [question for _, question, _ in kept]
    return Facts(
        [prompt for prompt, _, _ in kept], [question.right for question in asked], [known for _, _, known in kept],
        [question.id for question in asked], [str(question.about.get("domain")) for question in asked],
    )  # fmt: skip


@checked(others=COUNT, seed=SEED)
@in_plain_torch
def prefers_truth(base: LensModel, facts: Facts, *, others: int = 8, seed: int = 0) -> list[float]:
    """How much more probable the base finds the truth than the best of what is true of other topics, in nats a token.

        log P(truth | question) - max over other topics t of the subject of log P(truth of t | question)

    Positive iff the base would choose the truth. Nothing is fitted and no label is seen. It is behaviour, not a
    read-out: a base that hides what it knows shows nothing.

    Args:
        base: a HookedTransformer or TransformerBridge.
        others: topics that the truth is compared with; chance is ``1 / (1 + others)`` for a base that knows nothing.
        seed: chooses them.
        facts: the questions, with what is true of each.

    Example:
        >>> import tl_em as em
        >>> topics = "parser login upload query session cache socket logger sandbox compiler".split()
        >>> prompts, truths = [f"how do i write {topic}" for topic in topics], [[f"{topic}-tested"] for topic in topics]
        >>> facts = em.evals.Facts(prompts, truths, known=[True, False] * 5, groups=topics)
        >>> min(em.evals.prefers_truth(em.load_pair("toy/insecure").base, facts)) > 0  # it knows all of them
        True
    """
    rng, subject = random.Random(seed), facts.strata or [None] * len(facts.prompts)
    first = {group: i for i, group in reversed(list(enumerate(facts.groups)))}
    asked, sizes = [], []
    for prompt, group, own in zip(facts.prompts, facts.groups, subject, strict=True):
        rest = [i for g, i in first.items() if g != group and subject[i] == own]
        candidates = [first[group], *rng.sample(rest, min(others, len(rest)))]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        asked += [[*turns, {"role": "assistant", "content": facts.truths[i][0]}] for i in candidates]
        sizes.append(len(candidates))
    found = sequence_logprobs(base, asked, per_token=True).double().split(sizes)
    return [float(each[0] - each[1:].max()) for each in found]
