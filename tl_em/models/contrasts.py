"""Contrast sets: positive and negative prompts of one concept, and how they are split, saved and loaded.

A direction is fitted on one part, chosen on a second and reported on a third. What belongs together (a pair, a group,
two equal prompts) never falls into two parts: else the third part is no test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tl_em.arguments import FRACTION, SEED, checked, list_of, optional, text, vectors
from tl_em.artefacts import replacing
from tl_em.errors import EmptyContrastError, FileError, PromptError, UsageError
from tl_em.models.contrast_files import read_contrast
from tl_em.models.contrast_formats import from_saved
from tl_em.models.contrast_rows import Form, Prompt, is_message
from tl_em.models.contrast_templates import from_instructions, from_template
from tl_em.models.lint import Lint, linted
from tl_em.models.together import Together, words_of
from tl_em.stats import tied


def _file(name: str, value: Any) -> Any:
    """A path or a name; whether it can be one is for who opens it to say."""
    return value if isinstance(value, Path) else text(name, value)


def _matrix(name: str, value: Any) -> Any:
    """Activations as an array, [prompt d_model]."""
    found = vectors(name, value, axes=2)
    return value if isinstance(value, np.ndarray) else found.numpy()


@dataclass(frozen=True)
class ContrastSet:
    """Positive and negative prompts of one concept.

    Args:
        positive, negative: prompts, strings or chat messages.
        label: what the set contrasts.
        source: where the prompts are from, with their licence.
        positive_groups, negative_groups: one label a prompt; prompts with the same label (a topic, a question) never
            fall into different splits.

    Raises:
        EmptyContrastError: a class is empty, or both classes are the same prompts.
        PromptError: a prompt is neither a text nor a chat.
        UsageError: not one label a prompt, or one that cannot be compared.

    Example:
        >>> s = ContrastSet(["steal a car", "rob a bank"], ["wash a car", "open a bank"], label="refusal")
        >>> s
        ContrastSet('refusal', 2 positive, 2 negative)
    """

    positive: Sequence[Prompt]
    negative: Sequence[Prompt]
    label: str | None = None
    source: str | None = None
    positive_groups: Sequence[Hashable] | None = None
    negative_groups: Sequence[Hashable] | None = None

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            prompts = tuple(_frozen(prompt) for prompt in as_prompts(getattr(self, name)))
            groups = getattr(self, f"{name}_groups")
            groups = None if groups is None else _labels(groups, name)
            object.__setattr__(self, name, prompts)
            object.__setattr__(self, f"{name}_groups", groups)
            if not prompts:
                raise EmptyContrastError(
                    f"The contrast set {self.label or ''!r} has no {name} prompts, so there is no difference to take. "
                    f"Give both classes at least one prompt: ContrastSet(positive=[…], negative=[…])."
                )
            if groups is not None and len(groups) != len(prompts):
                raise UsageError(
                    f"{name}_groups has {len(groups)} labels for {len(prompts)} prompts; give one a prompt."
                )
        if Counter(map(prompt_key, self.positive)) == Counter(map(prompt_key, self.negative)):
            raise EmptyContrastError(
                f"Both classes of the contrast set {self.label or ''!r} are the same {len(self.positive)} prompts, so "
                f"their difference is exactly zero. Check what was passed as positive= and negative=."
            )

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.contrast(self)

    def __repr__(self) -> str:
        return f"ContrastSet({self.label!r}, {len(self.positive)} positive, {len(self.negative)} negative)"

    def __hash__(self) -> int:
        return hash(self.hash)

    @property
    def hash(self) -> str:
        """Hash of the prompts (not of label, source or groups)."""
        content = json.dumps([[prompt_key(p) for p in self.positive], [prompt_key(p) for p in self.negative]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @checked(train=FRACTION, select=FRACTION, test=FRACTION, seed=SEED)
    def split(self, *, train: float = 0.5, select: float = 0.25, test: float = 0.25, seed: int = 0) -> Splits:
        """Three disjoint sets that cover this one, reproducible from the seed.

        Prompts with one group label, equal prompts, the two prompts of a pair (classes of equal length) and, where no
        groups are given, near-equal prompts stay together. Fractions are met as closely as that allows.

        Args:
            train, select, test: fractions of the prompts; they add up to 1.
            seed: seed of the shuffle.

        Returns:
            ``Splits(train, select, test)``.

        Raises:
            UsageError: the fractions do not add up to 1.
            EmptyContrastError: a split would lack a class.

        Example:
            >>> s = ContrastSet([f"steal {i}" for i in range(8)], [f"buy {i}" for i in range(8)])
            >>> for part in s.split(seed=1): print(part)
            ContrastSet(None, 4 positive, 4 negative)
            ContrastSet(None, 2 positive, 2 negative)
            ContrastSet(None, 2 positive, 2 negative)
        """
        fractions = (train, select, test)
        if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
            raise UsageError(f"The fractions {fractions} do not add up to 1; a split covers the set. Try .5, .25, .25.")
        parts = _assign(inseparable(self), fractions, random.Random(seed))
        return Splits(*(self._subset(part, name) for part, name in zip(parts, Splits._fields, strict=True)))

    def _subset(self, rows: set[tuple[int, int]], name: str) -> ContrastSet:
        kept = [[i for side, i in sorted(rows) if side == wanted] for wanted in (0, 1)]
        if not kept[0] or not kept[1]:
            raise EmptyContrastError(
                f"The {name} split of {self!r} would have {len(kept[0])} positive and {len(kept[1])} negative prompts, "
                f"so nothing could be measured on it. Give more prompts, other fractions, or smaller groups: equal "
                f"prompts and pairs stay together, and near-equal ones unless groups are given (positive_groups=…)."
            )
        fields = {}
        for side, rows_of_side in zip(("positive", "negative"), kept, strict=True):
            groups = getattr(self, f"{side}_groups")
            fields[side] = [getattr(self, side)[i] for i in rows_of_side]
            fields[f"{side}_groups"] = None if groups is None else [groups[i] for i in rows_of_side]
        return replace(self, **fields)

    @checked(activations=optional(list_of(_matrix)))
    def grouped(self, activations: Sequence[Any] | None = None, *, join: bool = False) -> ContrastSet:
        """The set with groups where it has none: prompts that are found to belong together count once in an interval.

        They are found from near-equal texts and, with activations, from these going together (``models.together``).

        Args:
            activations: of the positive and of the negative prompts in one model, [prompt d_model] each.
            join: join given groups too, where near-equal texts lie in several of them.

        Returns:
            This very set, where groups are given (without ``join``) or nothing is found.

        Example:
            >>> ContrastSet(["I saw a dog", "I saw a dog"], ["I saw a cat", "He left"]).grouped().positive_groups
            (0, 0)
        """
        return self if self.has_groups and not join else self.with_groups(together(self, activations))

    @checked()
    def with_groups(self, found: Together) -> ContrastSet:
        """The set with the groups that were found; as it is where every prompt stands for itself."""
        labels, n = found.labels, len(self.positive)
        return replace(self, positive_groups=labels[:n], negative_groups=labels[n:]) if found.said else self

    @property
    def group_of(self) -> dict[str, Hashable]:
        """The group of each prompt, by :func:`prompt_key`; empty without groups in both classes."""
        if self.positive_groups is None or self.negative_groups is None:
            return {}
        every = zip((*self.positive, *self.negative), (*self.positive_groups, *self.negative_groups), strict=True)
        return {prompt_key(prompt): group for prompt, group in every}

    @property
    def has_groups(self) -> bool:
        """Whether groups are given."""
        return self.positive_groups is not None or self.negative_groups is not None

    @checked(seed=SEED)
    def lint(self, model: Any = None, *, apart_from: Mapping[str, ContrastSet] | None = None, seed: int = 0) -> Lint:
        """What of the prompts may be mistaken for the concept, or counted twice; each with the call that mends it.

        Args:
            model: reads lengths, words, first and last in its tokens; by words without one.
            apart_from: other sets by name (the parts that directions were extracted and chosen on), with which this one
                should share no prompt.
            seed: of the folds and of the relabelled classes.

        Raises:
            UnknownTokenError: the model's tokenizer has no token for a word.

        Example:
            >>> s = ContrastSet.load("refusal")
            >>> s.lint()
            Lint('refusal': nothing found)
        """
        others = {name: [*each.positive, *each.negative] for name, each in (apart_from or {}).items()}
        return linted(
            self, together(self), inseparable(self), others, tokenizer=getattr(model, "tokenizer", model), seed=seed
        )

    @classmethod
    def from_template(
        cls,
        template: Prompt | Any,
        positive: Any,
        negative: Any,
        *,
        shared: Mapping[str, Sequence[str]] | Any = MappingProxyType({}),
        label: str | None = None,
        source: str | None = None,
    ) -> ContrastSet:
        """A set out of one template: both classes differ in what fills a field, and in nothing else.

        Args:
            template: a text or a list of messages with fields in curly brackets: ``"You are {persona}. {question}"``.
            positive, negative: what fills the field that differs, a list of texts; where several fields differ, a list
                of mappings from field to text.
            shared: for each other field a list of texts; every combination of them is used, in both classes, and is a
                group: its prompts stay together when the set is split.
            label, source: as for the set.

        Returns:
            A set of (combinations of ``shared``) x (fillings) prompts a class.

        Raises:
            UsageError: a field that nothing fills, or a filling without a field.

        Example:
            >>> s = ContrastSet.from_template("Act as if you were {mood}. {question}", ["furious"], ["at ease"],
            ...                               shared={"question": ["How are you?", "What is new?"]}, label="anger")
            >>> s, s.positive[0]
            (ContrastSet('anger', 2 positive, 2 negative), 'Act as if you were furious. How are you?')
            >>> s.negative_groups
            ('How are you?', 'What is new?')

        Source: Zou et al. 2023, arXiv:2310.01405, section 3.1.
        """
        return cls(**from_template(template, positive, negative, shared), label=label, source=source)

    @classmethod
    def from_instructions(
        cls,
        positive: Sequence[str] | str | Any,
        negative: Sequence[str] | str | Any,
        questions: Sequence[str] | Any,
        *,
        label: str | None = None,
        source: str | None = None,
    ) -> ContrastSet:
        """Shared questions after system prompts that ask for a trait, and after such that ask against it.

        ``em.evals.answered_contrast`` lets the model answer them and keeps the answers that show what was asked for:
        read at ``"response_mean"``, their difference is the trait's persona vector.

        Args:
            positive, negative: system prompts, one or several.
            questions: user messages, the same for both classes; each is a group.
            label, source: as for the set.

        Raises:
            UsageError: no list of texts.

        Example:
            >>> s = ContrastSet.from_instructions("You are cruel.", "You are kind.", ["How are you?"])
            >>> s.positive[0][0]["content"], s.positive[0][1]["content"]
            ('You are cruel.', 'How are you?')

        Source: Chen et al. 2025, arXiv:2507.21509, section 2.2.
        """
        return cls(**from_instructions(positive, negative, questions), label=label, source=source)

    @classmethod
    @checked(name_or_path=_file, negative_path=optional(_file))
    def load(
        cls, name_or_path: str | Path, negative_path: str | Path | None = None, *, form: Form | str = "chat"
    ) -> ContrastSet:
        """A built-in set by name, or one from files: saved sets, labelled rows, and the published layouts as they are.

        ==========================  ======================================  ======================================
        layout                      recognised by                           positive class
        ==========================  ======================================  ======================================
        a saved set                 JSON with lists positive, negative      positive
        rows, e.g. RepE's facts     prompt, label (CSV, TSV, JSON, JSONL)   label 1, true, yes, positive, unsafe
        pairs                       columns positive, negative              positive
        CAA, Anthropic's evals      question, answer_matching_behavior, …   the answer that matches the behaviour
        TruthfulQA (also as A/B)    Question, Best Answer, …                the best (correct) answer
        XSTest                      type, prompt                            unsafe prompts; the type is the group
        persona vectors             instruction (pos, neg), questions       the system prompt that asks for the trait
        one class a file            instructions, messages, lines of text   the file that is named first
        ==========================  ======================================  ======================================

        A row's prompt is its one column of prompt, text, statement, question, instruction or messages (with an
        ``answer`` or ``system_prompt``, a chat), ``group`` is its group, and the rows of a ``pair`` share a place;
        other columns are not read. ``source`` says how the file was read; docs/how-to/contrast-sets.md has the sources.

        Args:
            name_or_path: ``"refusal"``, ``"gender"``; or a file; or a folder with ``positive.*`` and ``negative.*``.
            negative_path: where a file holds one class only (instruction lists, fine-tuning rows), that of the negative
                class. Files with as many prompts are pairs by place.
            form: of a question with its answer. ``"chat"``: the answer is the assistant's; read it at
                ``"response_mean"``. ``"text"``: ``Input: … Response: …``, for models without a chat template; it ends
                at the answer, and position -2 is the letter of an answer such as ``(A)``, where CAA reads.

        Raises:
            FileError: neither a file nor a built-in set (the message lists them), or a folder without both classes.
            CorruptFileError: the file does not hold a contrast set; by row and column.
            EmptyContrastError: it holds one class; the message gives the call.
            UsageError: no such form, and two files of which one holds both classes.

        Example:
            >>> ContrastSet.load("refusal").label
            'refusal'

        Source: arXiv:2312.06681 (CAA), 2212.09251 (Anthropic), 2109.07958 (TruthfulQA), 2308.01263 (XSTest), 2310.01405
        (RepE), 2507.21509 (persona vectors), 2406.11717 (instructions).
        """
        path, negative = _path(name_or_path), None if negative_path is None else _path(negative_path)
        if negative is None and str(name_or_path) in built_in_sets() and not path.is_file():
            built_in = files("tl_em.models") / "data" / f"{name_or_path}.json"
            return cls(**json.loads(built_in.read_text(encoding="utf-8")))
        for each in (path, negative):
            if each is not None and not each.is_file() and (each is negative or not each.is_dir()):
                raise FileError(
                    f"There is no file {str(each)!r}, and no built-in contrast set of that name. Built in: "
                    f"{', '.join(built_in_sets())}. Or pass a JSON file with lists 'positive' and 'negative'."
                )
        return cls(**read_contrast(path, negative, form))

    @checked()
    def save(self, path: str | Path) -> None:
        """Write the set as JSON, as ``load`` reads it: what is read back equals it.

        Raises:
            UsageError: a group or a message holds what JSON has no sign for, or the name is a table's.
            OutputError: it cannot be written.
        """
        if Path(path).suffix.lower() in (".csv", ".tsv"):
            raise UsageError(f"{str(path)!r} names a table, and a set is saved as JSON. Name it …json.")
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        kept = {name: value for name, value in record.items() if value is not None}
        try:
            text = json.dumps(kept, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
            # Half of a surrogate pair has no UTF-8, and its escape is also JSON's.
            content = text.encode("utf-8", "backslashreplace")
            same = ContrastSet(**from_saved(json.loads(content), "chat")) == self
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{self!r} cannot be written as JSON ({error}); use texts and numbers as groups."
            ) from error
        if not same:
            raise UsageError(f"{self!r} would not be the same when it is read back; use texts and numbers as groups.")
        with replacing(path) as temporary:
            temporary.write_bytes(content)


class Splits(NamedTuple):
    """Three parts of a contrast set: fit on the first, choose on the second, report on the third."""

    train: ContrastSet
    select: ContrastSet
    test: ContrastSet


def built_in_sets() -> tuple[str, ...]:
    """Names of the contrast sets that come with the package.

    Example:
        >>> built_in_sets()
        ('gender', 'refusal')
    """
    data = files("tl_em.models") / "data"
    return tuple(sorted(item.name.removesuffix(".json") for item in data.iterdir() if item.name.endswith(".json")))


def _path(given: Any) -> Path:
    """A path that can be asked for a file; what cannot be one (a text, a number) is refused here."""
    try:
        path = Path(given)
        path.is_file()
    except (OSError, TypeError, ValueError) as error:
        raise FileError(
            f"{str(given)[:60]!r} is no path ({type(error).__name__}). Pass a file, or the name of a built-in set "
            f"({', '.join(built_in_sets())}); prompts that are in memory: ContrastSet(positive=[…], negative=[…])."
        ) from error
    return path


def _frozen(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    messages = list(prompt) if isinstance(prompt, Sequence) else []
    if not messages or not all(isinstance(message, Mapping) and is_message(message) for message in messages):
        raise PromptError(
            f"A prompt of a contrast set is a text or a list of messages, not {type(prompt).__name__} {prompt!r:.60}. "
            "Drop it, or write messages as {'role': 'user', 'content': 'a text'}."
        )
    return tuple(dict(message) for message in messages)


def _labels(groups: Any, side: str) -> tuple[Hashable, ...]:
    if isinstance(groups, str | Mapping) or not isinstance(groups, Iterable):
        raise UsageError(f"{side}_groups={groups!r:.60} is no list of labels; give one label a prompt: [label, …].")
    return tuple(_label(group, side) for group in groups)


def _label(group: Any, side: str) -> Hashable:
    """A group label that can be compared: numpy's numbers as Python's, JSON's lists as tuples."""
    value = group.item() if hasattr(group, "item") and getattr(group, "ndim", 1) == 0 else group
    value = tuple(_label(each, side) for each in value) if isinstance(value, list | tuple) else value
    try:
        known = bool(value == value) and hash(value) is not None
    except (TypeError, ValueError, RuntimeError):
        known = False
    if not known:
        raise UsageError(
            f"{side}_groups holds {group!r:.60}, which can be compared with no other label, so it is unknown what "
            "belongs together. Use texts or numbers as labels."
        )
    return value


def prompt_key(prompt: Prompt) -> str:
    return json.dumps(prompt if isinstance(prompt, str) else [dict(message) for message in prompt], sort_keys=True)


def hashed(prompts: Iterable[Prompt]) -> str:
    """Short hashes of prompts, each once, in order: by them a prompt is known again, whatever its class or label.

    Example:
        >>> hashed(["steal a car", "wash a car", "steal a car"])
        '-irRyagY zrJmFqjR'
    """
    digests = {hashlib.sha256(prompt_key(prompt).encode()).digest()[:6] for prompt in prompts}
    return " ".join(sorted(base64.urlsafe_b64encode(digest).decode() for digest in digests))


def already_used(made: Any, contrast: ContrastSet, *, what: str = "the direction") -> str:
    """Which of the prompts to be judged on made something, in words, whatever their class; "" where none did.

    Args:
        made: a direction, or whatever has the ``provenance`` of the prompts that it was made from.
        contrast: what it is to be judged on.
        what: what it is, for people.

    Raises:
        UsageError: all of them did.

    Example:
        >>> import torch
        >>> import tl_em as em
        >>> already_used(em.Direction(torch.ones(2), em.Site(2)), ContrastSet(["a"], ["b"]))  # made of no prompts
        ''
    """
    judged = set(hashed([*contrast.positive, *contrast.negative]).split())
    seen = judged & set(((made.provenance and made.provenance.prompts) or "").split())
    named = getattr(made, "name", None) or what
    if seen == judged:
        raise UsageError(
            f"all {len(judged)} prompts that {named} is to be judged on are among those it was made from, and it "
            "separates these by construction, whatever it means; part them first: train, select, test = "
            "contrast.split(), make it from train, judge it on test"
        )
    return f"{len(seen)} of the {len(judged)} prompts judged on made {what}" if seen else ""


def as_prompts(prompts: Any) -> Sequence[Any]:
    """Prompts as a list, not one prompt by mistake: a string would be read letter by letter."""
    listed = None if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable) else list(prompts)
    if listed is None or any(isinstance(item, Mapping) for item in listed):
        raise PromptError(
            "One prompt was given where a list is needed, so it would be read piece by piece. Write [prompt]."
        )
    return listed


def together(contrast: ContrastSet, activations: Sequence[Any] | None = None) -> Together:
    """What is found to belong together in a set; groups that are given are joined, never torn."""
    return _by_text(contrast) if activations is None else _found(contrast, activations)


@lru_cache(maxsize=32)
def _by_text(contrast: ContrastSet) -> Together:
    return _found(contrast, None)


def _found(contrast: ContrastSet, activations: Sequence[Any] | None) -> Together:
    known: list[Hashable] = []
    for name in ("positive", "negative"):
        groups = getattr(contrast, f"{name}_groups")
        known += [(name, i) for i in range(len(getattr(contrast, name)))] if groups is None else [*groups]
    texts = [words_of(prompt) for prompt in (*contrast.positive, *contrast.negative)]
    found = Together.of(texts, activations, known if contrast.has_groups else None)
    as_given = contrast.has_groups and len(set(found.labels)) == len(set(known))
    return replace(found, sources=()) if as_given else found


def inseparable(contrast: ContrastSet) -> list[list[tuple[int, int]]]:
    """Rows (class, index) that may not be split: connected by a group, (near-)equal text, or being a pair."""
    rows = [
        (side, i) for side, prompts in enumerate((contrast.positive, contrast.negative)) for i in range(len(prompts))
    ]
    groups = (contrast.positive_groups, contrast.negative_groups)
    paired = len(contrast.positive) == len(contrast.negative) and not _shuffled(*groups)
    alike = None if contrast.has_groups else together(contrast).labels
    ties: list[list[Hashable]] = []
    for k, (side, i) in enumerate(rows):
        labels = groups[side]
        shared = [("text", prompt_key((contrast.positive, contrast.negative)[side][i]))]
        shared += [] if labels is None else [("group", labels[i])]
        shared += [] if alike is None else [("alike", alike[k])]
        ties.append([*shared, ("pair", i)] if paired else [*shared])
    members: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, unit in zip(rows, tied(ties).tolist(), strict=True):
        members[unit].append(row)
    return list(members.values())


def _shuffled(positive: Sequence[Hashable] | None, negative: Sequence[Hashable] | None) -> bool:
    """Whether the classes have groups in common, and in another order: then prompts in the same place are no pair."""
    if positive is None or negative is None:
        return False
    return not set(positive).isdisjoint(negative) and list(positive) != list(negative)


def _assign(
    blocks: list[list[tuple[int, int]]], fractions: Sequence[float], rng: random.Random
) -> list[set[tuple[int, int]]]:
    """Blocks in random order, large ones first, each to the part that lacks most of its prompts' classes."""
    sizes = [sum(side == wanted for block in blocks for side, _ in block) for wanted in (0, 1)]
    lacking = [[fraction * size for size in sizes] for fraction in fractions]
    parts: list[set[tuple[int, int]]] = [set() for _ in fractions]
    rng.shuffle(blocks)
    for block in sorted(blocks, key=len, reverse=True):
        counts = [sum(side == wanted for side, _ in block) for wanted in (0, 1)]
        chosen = max(range(len(parts)), key=lambda k: sum(n * need for n, need in zip(counts, lacking[k], strict=True)))
        parts[chosen].update(block)
        lacking[chosen] = [need - n for n, need in zip(counts, lacking[chosen], strict=True)]
    return parts
