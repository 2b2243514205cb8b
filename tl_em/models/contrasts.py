"""Contrast sets: positive and negative prompts of one concept, and how they are split, saved and loaded.

A direction is fitted on one part, chosen on a second and reported on a third. What belongs together (a pair, a group,
two equal prompts) never falls into two parts: else the third part is no test.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from tl_em.errors import CorruptFileError, EmptyContrastError, FileError, NuisanceWarning, PromptError, UsageError
from tl_em.writing import replacing

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


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
            object.__setattr__(self, name, prompts)
            object.__setattr__(self, f"{name}_groups", None if groups is None else tuple(groups))
            if not prompts:
                raise EmptyContrastError(
                    f"The contrast set {self.label or ''!r} has no {name} prompts, so there is no difference to take. "
                    f"Give both classes at least one prompt: ContrastSet(positive=[…], negative=[…])."
                )
            if groups is not None and len(groups) != len(prompts):
                raise UsageError(
                    f"{name}_groups has {len(groups)} labels for {len(prompts)} prompts; give one a prompt."
                )
        if Counter(map(_key, self.positive)) == Counter(map(_key, self.negative)):
            raise EmptyContrastError(
                f"Both classes of the contrast set {self.label or ''!r} are the same {len(self.positive)} prompts, so "
                f"their difference is exactly zero. Check what was passed as positive= and negative=."
            )

    def __repr__(self) -> str:
        return f"ContrastSet({self.label!r}, {len(self.positive)} positive, {len(self.negative)} negative)"

    def __hash__(self) -> int:
        return hash(self.hash)

    @property
    def hash(self) -> str:
        """Hash of the prompts (not of label, source or groups)."""
        content = json.dumps([[_key(p) for p in self.positive], [_key(p) for p in self.negative]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def split(self, *, train: float = 0.5, select: float = 0.25, test: float = 0.25, seed: int = 0) -> Splits:
        """Three disjoint sets that cover this one, reproducible from the seed.

        Prompts with one group label, equal prompts, and the two prompts of a pair (classes of equal length) stay
        together. Fractions are met as closely as that allows.

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
                f"so nothing could be measured on it. Give more prompts, smaller groups (equal prompts, and pairs, "
                f"stay together too), or another fraction."
            )
        fields = {}
        for side, rows_of_side in zip(("positive", "negative"), kept, strict=True):
            groups = getattr(self, f"{side}_groups")
            fields[side] = [getattr(self, side)[i] for i in rows_of_side]
            fields[f"{side}_groups"] = None if groups is None else [groups[i] for i in rows_of_side]
        return replace(self, **fields)

    @classmethod
    def load(cls, name_or_path: str | Path) -> ContrastSet:
        """A built-in set by name, or a file: JSON with ``positive`` and ``negative``, or JSONL / CSV of prompt, label.

        Args:
            name_or_path: ``"refusal"``, ``"gender"``, or a path. In JSONL and CSV, the label is 1 / 0, true / false or
                positive / negative.

        Raises:
            FileError: neither a file nor a built-in set (the message lists them).
            CorruptFileError: the file does not hold a contrast set.

        Example:
            >>> ContrastSet.load("refusal").label
            'refusal'
        """
        path = Path(name_or_path)
        if not path.is_file():
            built_in = files("tl_em.models") / "data" / f"{name_or_path}.json"
            if str(name_or_path) not in built_in_sets():
                raise FileError(
                    f"There is no file {str(name_or_path)!r}, and no built-in contrast set of that name. Built in: "
                    f"{', '.join(built_in_sets())}. Or pass a JSON file with lists 'positive' and 'negative'."
                )
            return cls(**json.loads(built_in.read_text(encoding="utf-8")))
        try:
            return cls(**_read_fields(path))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, EmptyContrastError):
                raise
            raise CorruptFileError(
                f"{path} does not hold a contrast set ({type(error).__name__}: {error}), so nothing was loaded. "
                f'Expected JSON {{"positive": [...], "negative": [...]}}, or JSONL or CSV with prompt and label.'
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the set as JSON, as ``load`` reads it."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        text = json.dumps({k: v for k, v in record.items() if v is not None}, ensure_ascii=False, indent=1)
        with replacing(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


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


def _frozen(prompt: Prompt) -> Prompt:
    return prompt if isinstance(prompt, str) else tuple(dict(message) for message in prompt)


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt if isinstance(prompt, str) else [dict(message) for message in prompt], sort_keys=True)


def as_prompts(prompts: Any) -> Sequence[Any]:
    """Prompts as a list, not one prompt by mistake: a string would be read letter by letter."""
    if isinstance(prompts, str) or any(isinstance(item, Mapping) for item in prompts):
        raise PromptError(
            "One prompt was given where a list is needed, so it would be read piece by piece. Write [prompt]."
        )
    return list(prompts)


def inseparable(contrast: ContrastSet) -> list[list[tuple[int, int]]]:
    """Rows (class, index) that may not be split: connected by a group label, equal text, or being a pair."""
    rows = [
        (side, i) for side, prompts in enumerate((contrast.positive, contrast.negative)) for i in range(len(prompts))
    ]
    parent = {row: row for row in rows}

    def root(row: tuple[int, int]) -> tuple[int, int]:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    ties: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    paired = len(contrast.positive) == len(contrast.negative)
    groups = (contrast.positive_groups, contrast.negative_groups)
    for side, i in rows:
        ties["text", _key((contrast.positive, contrast.negative)[side][i])].append((side, i))
        labels = groups[side]
        if labels is not None:
            ties["group", labels[i]].append((side, i))
        if paired:
            ties["pair", i].append((side, i))
    for first, *others in ties.values():
        for other in others:
            parent[root(other)] = root(first)
    members: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for row in rows:
        members[root(row)].append(row)
    return list(members.values())


_TOLD_APART, _SURE = 0.8, 1e-3


def warn_of_nuisance(contrast: ContrastSet, lengths: Sequence[Sequence[int]]) -> None:
    """Warn when the lengths of the prompts alone tell the classes apart.

    Args:
        lengths: in tokens, of the positive and of the negative prompts.
    """
    from scipy.stats import mannwhitneyu

    positive, negative = lengths
    result = mannwhitneyu(positive, negative)
    above = float(result.statistic) / (len(positive) * len(negative))
    if max(above, 1 - above) >= _TOLD_APART and result.pvalue < _SURE:
        warnings.warn(
            f"{contrast!r}: a positive prompt is longer than a negative one in {above:.0%} of all pairs "
            f"(Mann-Whitney p = {result.pvalue:.1g}), so a direction may be that of the length; match the prompts, "
            "e.g. the same sentences with one word exchanged",
            NuisanceWarning,
            stacklevel=5,
        )


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


_LABELS = {"1": 1, "true": 1, "positive": 1, "0": 0, "false": 0, "negative": 0}


def _read_fields(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return _by_label(csv.DictReader(text.splitlines()))
    if path.suffix == ".jsonl":
        return _by_label(json.loads(line) for line in text.splitlines() if line.strip())
    record = json.loads(text)
    unknown = set(record) - set(ContrastSet.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    return record


def _by_label(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    classes: tuple[list[Prompt], list[Prompt]] = ([], [])
    for row in rows:
        classes[_LABELS[str(row["label"]).strip().lower()]].append(row["prompt"])
    return {"positive": classes[1], "negative": classes[0]}
