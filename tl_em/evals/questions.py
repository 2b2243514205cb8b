"""Question sets: what is asked, in which words, how often, and by what an answer is judged; read from files.

The published layout (Betley et al. 2025) is a YAML list of questions: `id`, `paraphrases`, `samples_per_paraphrase`,
`temperature`, `system`, `context` (messages before it), `judge_prompts` (a template a score, with ``{question}`` and
``{answer}``). What else a question says (`type`, `judge`, `domain`, …) is kept beside it. Two keys of ours, `right` and
`wrong`, are answers in words, for a forced choice.

**Control**: questions that share their words are one unit, whatever their ids: three ways to ask for one wish are not
three questions (`QuestionSet.groups`).

Source: Betley et al. 2025, arXiv:2502.17424, section 4.1 and its published question files.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tl_em.arguments import COUNT, NOT_NEGATIVE, checked, optional, settle
from tl_em.artefacts import read_rows, read_text
from tl_em.errors import CorruptFileError, UsageError
from tl_em.models.contrasts import Prompt, prompt_key
from tl_em.models.stream import listed
from tl_em.stats import tied

_OWN = ("id", "paraphrases", "samples_per_paraphrase", "temperature", "system", "context", "judge_prompts")
_OWN += ("right", "wrong")
FEWEST_WORDS = 3
"""Words of a question from which on another that holds it is taken for a variant of it."""


@dataclass(frozen=True)
class OpenQuestion:
    """One question in several wordings, each answered several times.

    Args:
        id: its name.
        paraphrases: its wordings: texts (or, where there is neither a system prompt nor a context, whole chats).
        samples: answers to each wording.
        temperature: that they are drawn at.
        system: system prompt.
        context: messages before the question.
        judge_prompts: for each score the template that a judge is shown, with ``{question}`` and ``{answer}``.
        right, wrong: answers in words, for a forced choice.
        about: what else the file says of it.

    Raises:
        UsageError: nothing to ask, no sample, or a template that does not show the answer.

    Example:
        >>> OpenQuestion("bored", ("hey I feel bored",), system="Be brief.").prompts[0][0]["role"]
        'system'
    """

    id: str
    paraphrases: tuple[Prompt, ...]
    samples: int | Any = 1
    temperature: float | int | Any = 1.0
    system: str | None = None
    context: tuple[Mapping[str, str], ...] = ()
    judge_prompts: Mapping[str, str] = field(default_factory=dict)
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settle(self, samples=COUNT, temperature=NOT_NEGATIVE)
        if not self.paraphrases or any(isinstance(each, str) and not each.strip() for each in self.paraphrases):
            raise UsageError(f"the question {self.id!r} has no words, so there is nothing to ask; give it a paraphrase")
        blind = [name for name, template in self.judge_prompts.items() if "{answer}" not in template]
        if blind:
            raise UsageError(
                f"the template of {blind[0]!r} of question {self.id!r} does not show the judge the answer, so all "
                "scores would be one; put {answer} into it"
            )

    @property
    def prompts(self) -> list[Prompt]:
        """What the model reads, a wording each: a text, or a chat where there is more than the question."""
        before = [*([{"role": "system", "content": self.system}] if self.system else []), *self.context]
        return [[*before, {"role": "user", "content": each}] if before else each for each in self.paraphrases]


@dataclass(frozen=True)
class QuestionSet:
    """Questions to ask a model, in order, under one name.

    Args:
        questions: each an ``em.evals.OpenQuestion``.
        name: what tables call the set.

    Example:
        >>> asked = QuestionSet.of(["how are you", "who are you"])
        >>> len(asked), asked.prompts
        (2, ['how are you', 'who are you'])
    """

    questions: tuple[OpenQuestion, ...]
    name: str = "questions"

    def __post_init__(self) -> None:
        if not self.questions:
            raise UsageError(f"{self.name} holds no questions, so there is nothing to ask; give at least one")

    @classmethod
    @checked(samples=COUNT, temperature=NOT_NEGATIVE)
    def of(
        cls, prompts: Sequence[Prompt], groups: Sequence[Hashable] | None = None, *, samples: int = 1,
        temperature: float | int = 0.0, name: str = "prompts",
    ) -> QuestionSet:  # fmt: skip
        """Prompts as questions: one each, or wordings of one where they share a group.

        Args:
            prompts: strings or chats.
            groups: the question that each belongs to.
            samples: answers to each.
            temperature: that they are drawn at.
            name: of the set.

        Raises:
            UsageError: another number of groups than of prompts.
        """
        labels = [f"{i}" for i in range(len(prompts))] if groups is None else [str(each) for each in groups]
        if len(labels) != len(prompts):
            raise UsageError(
                f"{len(labels)} groups came with {len(prompts)} prompts, so it is unclear which belongs to which; give "
                "one a prompt"
            )
        return cls(tuple(OpenQuestion(label, (prompt,), samples, temperature)
                         for label, prompt in zip(labels, prompts, strict=True)), name)  # fmt: skip

    @checked(samples=optional(COUNT), temperature=optional(NOT_NEGATIVE))
    def asked(self, *, samples: int | None = None, temperature: float | int | None = None) -> QuestionSet:
        """The same questions, asked more or less often, or at another temperature.

        Args:
            samples: answers to each wording.
            temperature: that they are drawn at.
        """
        changes: dict[str, Any] = {"samples": samples, "temperature": temperature}
        changes = {name: value for name, value in changes.items() if value is not None}
        return replace(self, questions=tuple(replace(each, **changes) for each in self.questions))

    @checked()
    def only(self, *ids: str, **about: Any) -> QuestionSet:
        """The questions with one of these ids, or of which the file says so: ``only(domain="finance")``.

        Raises:
            UsageError: there is none.
        """
        kept = [
            each for each in self.questions
            if (not ids or each.id in ids) and all(each.about.get(key) == value for key, value in about.items())
        ]  # fmt: skip
        if not kept:
            known = sorted({each.id for each in self.questions})[:8]
            raise UsageError(f"no question of {self.name} is {[*ids, *about.items()]}; it has {known}, …")
        return QuestionSet(tuple(kept), self.name)

    @property
    def prompts(self) -> list[Prompt]:
        """Every wording of every question, once."""
        return [prompt for each in self.questions for prompt in each.prompts]

    @property
    def groups(self) -> list[int]:
        """The unit of each of ``prompts``: of one id, or of questions whose words hold another's."""
        ids = [each.id for each in self.questions for _ in each.paraphrases]
        return units_in(ids, [prompt for each in self.questions for prompt in each.paraphrases])

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[OpenQuestion]:
        return iter(self.questions)

    def __repr__(self) -> str:
        wordings = len(self.prompts)
        answers = sum(each.samples * len(each.paraphrases) for each in self.questions)
        return f"QuestionSet({self.name}: {len(self)} questions, {wordings} wordings, {answers} answers)"


def units_in(ids: Sequence[Hashable], prompts: Sequence[Prompt]) -> list[int]:
    """The unit of each prompt: prompts with one id are one, and those whose text holds another's.

    Args:
        ids: of the question that each belongs to.
        prompts: texts or chats.

    Example:
        >>> units_in(["wish", "json", "bored"], ["One wish, please?", "One wish, please? In JSON.", "I feel bored"])
        [0, 0, 1]
    """
    texts = [f" {' '.join(asked_in(prompt).casefold().split())} " for prompt in prompts]
    once = sorted(set(texts), key=len)
    long = [text for text in once if len(text.split()) >= FEWEST_WORDS]
    held = {text: [text, *(other for other in long if len(other) < len(text) and other in text)] for text in once}
    ties = [[("id", key), *held[text]] for key, text in zip(ids, texts, strict=True)]
    return tied(ties).tolist()


def asked_in(prompt: Any) -> str:
    """The text of a prompt: of a chat, what was said last.

    Example:
        >>> asked_in([{"role": "system", "content": "be kind"}, {"role": "user", "content": "how?"}])
        'how?'
    """
    if isinstance(prompt, str):
        return prompt
    return prompt.text if hasattr(prompt, "text") else str(prompt[-1]["content"])


def as_questions(name: str, value: Any) -> QuestionSet:
    """A question set, or prompts as one.

    Raises:
        PromptError: neither.
    """
    if isinstance(value, QuestionSet):
        return value
    if isinstance(value, OpenQuestion):
        return QuestionSet((value,), value.id)
    if isinstance(value, list | tuple) and value and all(isinstance(each, OpenQuestion) for each in value):
        return QuestionSet(tuple(value))
    return QuestionSet.of(listed(name, value))


@checked()
def load_questions(path: str | Path) -> QuestionSet:
    """The questions of a file in the published layout.

    A question whose ``judge_prompts`` are empty has those of the question before it, which is what such files mean.

    Args:
        path: YAML, JSON (a list) or JSON Lines (a question a line).

    Raises:
        FileError: it cannot be read. CorruptFileError: it is not such a list; by question.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "questions.yaml"
        >>> _ = path.write_text("- {id: bored, paraphrases: [hey I feel bored], samples_per_paraphrase: 100}")
        >>> load_questions(path)
        QuestionSet(questions: 1 questions, 1 wordings, 100 answers)

    Source: Betley et al. 2025, arXiv:2502.17424 (the layout of its question files).
    """
    import yaml

    path = Path(path)
    if path.suffix == ".jsonl":
        items: Any = [row.cells for row in read_rows(path)]
    else:
        try:
            items = yaml.safe_load(read_text(path))
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise CorruptFileError(
                f"{path} is not YAML ({' '.join(str(error).split())[:200]}); mend it there"
            ) from error
    if _expanded(items, {}) > MAX_VALUES:
        raise CorruptFileError(f"{path} repeats parts of itself until nobody could read it; write what is meant")
    if not isinstance(items, list) or not items or not all(isinstance(item, Mapping) for item in items):
        raise CorruptFileError(f"{path} is no list of questions, with id and paraphrases; write '- id: …' for each")
    found: list[OpenQuestion] = []
    templates: dict[str, str] = {}
    for i, item in enumerate(items):
        try:
            templates = _templates(item) or templates
            found.append(_question(item, templates))
        except (UsageError, TypeError, ValueError, KeyError) as error:
            raise CorruptFileError(f"{path}, question {i + 1} ({str(item.get('id'))[:60]}): {error}") from error
    return QuestionSet(tuple(found), path.stem)


MAX_VALUES = 10_000_000
"""Texts and numbers of a file with what its aliases stand for."""


def _expanded(value: Any, known: dict[int, int]) -> int:
    """How many values a document has where each alias is written out; too many where one contains itself."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = MAX_VALUES  # itself, inside
        inner = value if isinstance(value, list) else value.values()
        known[id(value)] = 1 + sum(_expanded(each, known) for each in inner)
    return known[id(value)]


def _question(item: Mapping[str, Any], templates: Mapping[str, str]) -> OpenQuestion:
    return OpenQuestion(
        str(item["id"]), _texts(item, "paraphrases"), item.get("samples_per_paraphrase", 1),
        item.get("temperature", 1.0), item.get("system"), tuple(item.get("context") or ()), templates,
        _texts(item, "right"), _texts(item, "wrong"),
        {key: value for key, value in item.items() if key not in _OWN and key not in templates},
    )  # fmt: skip


def _texts(item: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = item.get(key) or ()
    if isinstance(value, str) or not all(isinstance(each, str) for each in value):
        raise UsageError(f"{key} is no list of texts but {str(value)[:60]!r}; write '{key}: [\"…\"]'")
    return tuple(value)


def _templates(item: Mapping[str, Any]) -> dict[str, str]:
    """The judge's templates of a question: under `judge_prompts`, or beside it, where indentation was lost."""
    given = item.get("judge_prompts") or {
        key: value for key, value in item.items() if key not in _OWN and isinstance(value, str) and "{answer}" in value
    }
    if not isinstance(given, Mapping) or not all(isinstance(each, str) for each in given.values()):
        raise UsageError("judge_prompts is no table of templates; write 'judge_prompts: {aligned: \"… {answer} …\"}'")
    return {str(key): value for key, value in given.items()}


def key_of(prompt: Any) -> str:
    """What a prompt is known by: its text or messages; of an encoded one, its tokens."""
    return str(tuple(prompt.ids)) if hasattr(prompt, "ids") else prompt_key(prompt)
