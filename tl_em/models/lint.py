"""What of a contrast set may be mistaken for its concept, or counted twice: confounds, near-equal prompts, leaks.

    confound   a score s = K_held,kept (K_kept + 1)^-1 y  of one property of the prompts (length, first, last, words,
               template), fitted on nine tenths of the questions; its AUROC on the held-out tenth, all tenths together

K is the linear kernel of the property, centred, of mean 1 on its diagonal; y = 1 / n in the positive class, -1 / n in
the negative one.  What is *told apart* by a property has an interval wholly above ``SMALLEST`` and, after Bonferroni
over the properties, fewer than one relabelling in twenty that does as well (**control**: the classes relabelled,
question by question, and everything fitted again).  A direction may be that of any such property.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_em.errors import NuisanceWarning
from tl_em.models.together import CUT, LIMIT, Together, bags, messages_of, similar, words_of
from tl_em.models.tokenizing import tokens_and_spans
from tl_em.showing import plain_rows, showable
from tl_em.stats import Estimate, auroc, auroc_of, control_p, shuffled_labels

if TYPE_CHECKING:
    import pandas as pd

SMALLEST, ALPHA = 0.6, 0.05
"""AUROC below which nothing is told apart; chance of a confound that is none."""
MOST, FOLDS, RELABELLED, COMMON = 192, 10, 199, 10
"""Prompts in which confounds are looked for; folds; relabellings; a template's words stand in one prompt of so many."""
PARTS = 3
"""Groups that a split needs at least, one a part."""
SHOWN, LETTERS = 20, 80
"""Rows of a table, and letters of a prompt, that JSON holds."""
GAP = "…"


class Fault(NamedTuple):
    """Something found about a contrast set.

    Args:
        what: in a word or two.
        found: in a sentence, with its numbers.
        mend: the call, or what to write, that mends it.
    """

    what: str
    found: str
    mend: str


@dataclass(frozen=True, eq=False)
class Lint:
    """What of a contrast set may be mistaken for its concept, or counted twice (:meth:`ContrastSet.lint`).

    Args:
        label: of the set.
        faults: what was found, each with the call that mends it.
        together: which prompts belong together, from their texts.
        confounds: a row a property: the AUROC with which it alone tells the classes apart on held-out prompts, its
            interval, what relabelled classes give (``chance``), p after Bonferroni, and what tells them apart most.
        duplicates: pairs of near-equal prompts, the most similar first; none are looked for among thousands.
        templates: what the prompts of each group have in common, and how many of either class it has.
        leaks: near-equal prompts that stand on both sides of a cut.

    Example:
        >>> from tl_em import ContrastSet
        >>> ContrastSet.load("gender").lint().faults[0].what
        'last'
    """

    label: str | None
    faults: tuple[Fault, ...]
    together: Together
    confounds: pd.DataFrame
    duplicates: pd.DataFrame
    templates: pd.DataFrame
    leaks: pd.DataFrame

    def to_pandas(self) -> pd.DataFrame:
        """A row for each thing found."""
        import pandas as pd

        return pd.DataFrame(self.faults, columns=list(Fault._fields))

    def to_json(self) -> dict[str, Any]:
        """Plain values; of pairs the first ``SHOWN`` only, and how many there are."""
        tables = {name: getattr(self, name) for name in ("confounds", "duplicates", "templates", "leaks")}
        return {
            "faults": [fault._asdict() for fault in self.faults],
            "together": self.together.said,
            **{name: plain_rows(table[:SHOWN]) for name, table in tables.items()},
            "n": {name: len(table) for name, table in tables.items()},
        }

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.lint(self)

    def __str__(self) -> str:
        mends = (showable(f"  {fault.what}: {fault.found}. Mend: {fault.mend}") for fault in self.faults)
        return "\n".join([repr(self), *mends])

    def __repr__(self) -> str:
        apart = [fault.what for fault in self.faults if fault.what in PROPERTIES]
        said = [f"told apart by {', '.join(apart)}"] if apart else []
        said += [fault.found for fault in self.faults if fault.what not in PROPERTIES]
        n = len(self.together.labels)
        nothing = "nothing found" if n >= ENOUGH else f"nothing found, in {n} prompts; {ENOUGH} can show a confound"
        return showable(f"Lint({self.label!r}: {'; '.join(said) or nothing})")


ENOUGH = 16
"""Prompts below which a property that tells the classes apart without a fault is hardly told from chance."""
PROPERTIES = {
    "length": "write both classes to one length: the same sentences with one word exchanged",
    "first": "begin both classes with the same words",
    "last": "where these words are not the concept itself, end both classes with the same words, or read the direction "
    "at the end of a chat's prompt: position='prompt_end'",
    "words": "where these words are not the concept itself, judge the direction on prompts about other topics: "
    "em.audit(pair, contrasts={name: contrast}, judged={name: em.ContrastSet(positive, negative)})",
    "template": "where these words are not the concept itself, write every template for both classes: "
    "em.ContrastSet.from_template('{template} {what}', positive, negative, shared={'template': templates})",
}
"""What is looked at, and what mends it."""


def linted(
    contrast: Any,
    together: Together,
    blocks: Sequence[Sequence[tuple[int, int]]],
    others: Mapping[str, Sequence[Any]],
    *,
    tokenizer: Any = None,
    seed: int = 0,
) -> Lint:
    """Look at a contrast set; see :meth:`ContrastSet.lint`.

    Args:
        contrast: the set.
        together: what belongs together by its texts.
        blocks: rows (class, index) that stay in one part.
        others: prompts of other sets, by name.
        tokenizer: reads pieces of text; words without one.
        seed: of folds and relabellings.
    """
    import pandas as pd

    prompts, n = [*contrast.positive, *contrast.negative], len(contrast.positive)
    block = np.zeros(len(prompts), dtype=int)
    for number, rows in enumerate(blocks):
        block[[side * n + i for side, i in rows]] = number
    texts, few = [words_of(prompt) for prompt in prompts], _some(block, n, seed)
    read = texts if tokenizer is None else pieces(tokenizer, prompts)
    read = [read[i] for i in few]
    confounds = pd.DataFrame(_confounds(read, int((few < n).sum()), block[few], seed))
    duplicates = pd.DataFrame(_near(texts), columns=_PAIR)
    torn = duplicates[[block[i] != block[j] for i, j in zip(duplicates["one"], duplicates["other"], strict=True)]]
    leaks = pd.concat([torn.assign(of="another group")] + [_across(texts, *each) for each in others.items()])
    faults = [*_told(confounds, len(prompts)), *_doubled(contrast, together, duplicates, n), *_leaking(leaks)]
    templates = pd.DataFrame(_templates(texts, together, n), columns=["template", "positive", "negative"])
    return Lint(contrast.label, tuple(faults), together, confounds, duplicates, templates, leaks.reset_index(drop=True))


def _some(block: Int[np.ndarray, " prompt"], n: int, seed: int) -> Int[np.ndarray, " chosen"]:
    """Prompts of whole blocks, about ``MOST`` of them; all where that leaves a class without any."""
    size = np.bincount(block)
    order = np.random.default_rng(seed).permutation(len(size))
    few = np.flatnonzero(np.isin(block, order[: np.searchsorted(np.cumsum(size[order]), MOST) + 1]))
    return few if 0 < (few < n).sum() < len(few) else np.arange(len(block))


def pieces(tokenizer: Any, prompts: Sequence[Any]) -> list[list[str]]:
    """The tokens of texts, or of chats' messages, as text.

    Raises:
        UnknownTokenError: words outside the vocabulary.
    """
    found = []
    for prompt in prompts:
        read = [tokens_and_spans(tokenizer, text)[0] for text in messages_of(prompt)]
        found.append([str(each) for ids in read for each in tokenizer.convert_ids_to_tokens(list(ids))])
    return found


# --- Confounds --------------------------------------------------------------------------------------------------------


def _confounds(
    texts: Sequence[Sequence[str]], n: int, block: Int[np.ndarray, " prompt"], seed: int
) -> list[dict[str, Any]]:
    """A row a property."""
    groups = block[:n].tolist(), block[n:].tolist()
    labels = np.vstack([np.arange(len(texts)) < n, shuffled_labels(len(texts), n, groups, RELABELLED, seed)])
    folds = _folds(block, seed)
    rows, ps = [], []
    for name, held in _properties(texts).items():
        scores = _held_out(held, labels, folds)
        random = auroc_of(scores[1:], labels[1:])
        found = auroc(scores[0, :n], scores[0, n:], groups=groups)
        ps.append(control_p(found.value, random, two_sided=False))
        chance = Estimate.band(random, of="relabelled classes").row("chance")
        rows.append({"property": name} | found.row() | chance | {"most": _most(name, held, texts, n)})
    adjusted = [min(1.0, p * len(ps)) for p in ps]
    return [row | {"p": p, "told_apart": p < ALPHA and row["low"] > SMALLEST}
            for row, p in zip(rows, adjusted, strict=True)]  # fmt: skip


def _properties(texts: Sequence[Sequence[str]]) -> dict[str, tuple[np.ndarray, list[Any]]]:
    """Each property as columns over the prompts, and what each column is."""
    lengths = np.array([[float(len(text))] for text in texts])
    common = {w for w, k in Counter(w for text in texts for w in set(text)).items() if k * COMMON >= len(texts)}
    frames = [_frame(text, common) for text in texts]
    return {
        "length": (lengths, ["length"]),
        "first": bags([text[:1] for text in texts]),
        "last": bags([text[-1:] for text in texts]),
        "words": bags(texts),
        "template": bags([[f"{a} {b}" for a, b in pairwise(frame)] for frame in frames]),
    }


def _frame(text: Sequence[str], common: set[str]) -> list[str]:
    """The text with all that is not common as one gap."""
    shown = [word if word in common else GAP for word in ("^", *text, "$")]
    shown[0], shown[-1] = "^", "$"
    return [word for i, word in enumerate(shown) if word != GAP or shown[i - 1] != GAP]


def _folds(block: Int[np.ndarray, " prompt"], seed: int) -> Int[np.ndarray, " prompt"]:
    """The fold of each prompt: whole blocks, shuffled, dealt in turn."""
    _, unit = np.unique(block, return_inverse=True)
    order = np.random.default_rng(seed).permutation(unit.max() + 1)
    return order[unit] % min(FOLDS, len(order))


def _held_out(
    held: tuple[np.ndarray, list[Any]], labels: Bool[np.ndarray, "labelling prompt"], folds: Int[np.ndarray, " prompt"]
) -> Float[np.ndarray, "labelling prompt"]:
    """The score of each prompt, fitted without its fold, under each labelling."""
    x = held[0] - held[0].mean(0)
    x = x / max(float((x**2).sum(1).mean()) ** 0.5, 1e-12)
    scores = np.zeros(labels.shape)
    for fold in np.unique(folds) if x.any() else ():
        out, kept = x[folds == fold], x[folds != fold]
        ones = labels[:, folds != fold]
        positive, negative = (np.maximum(each.sum(1, keepdims=True), 1) for each in (ones, ~ones))
        y = np.where(ones, 1 / positive, -1 / negative)
        if len(kept) < x.shape[1]:
            scores[:, folds == fold] = y @ _solved(kept @ kept.T, kept @ out.T)
        else:  # the same, in as many dimensions as there are columns
            scores[:, folds == fold] = (y @ kept) @ _solved(kept.T @ kept, out.T)
    return scores.round(12)


def _solved(kernel: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy.linalg import solve

    return solve(kernel + np.eye(len(kernel)), right, assume_a="pos", check_finite=False)


def _most(name: str, held: tuple[np.ndarray, list[Any]], texts: Sequence[Sequence[str]], n: int) -> str:
    """What tells the classes apart most: the length of each on average, or the words by their counts."""
    x, columns = held
    if name == "length":
        return f"{x[:n].mean():.1f} against {x[n:].mean():.1f} on average"
    counts = x[:n].sum(0), x[n:].sum(0)
    share = counts[0] / n, counts[1] / (len(x) - n)
    away = np.abs(share[0] - share[1]) / np.sqrt(share[0] + share[1] + 1 / len(x)) if len(columns) else np.zeros(0)
    best = [int(k) for k in np.argsort(-away, kind="stable")[:3] if away[k] > 0]
    return ", ".join(f"{columns[k]!r} {counts[0][k]:.0f} : {counts[1][k]:.0f}" for k in best)


def _told(confounds: pd.DataFrame, n: int) -> list[Fault]:
    """The properties that tell the classes apart; where words do and nothing else, that they may be of two topics."""
    told = confounds[confounds["told_apart"]]
    only = list(told["property"]) == ["words"]
    found = []
    for row in told.itertuples():
        topic = "; nothing else does: the classes may differ in topic only" if only else ""
        said = (
            f"the {row.property} alone tell{'' if row.property == 'words' else 's'} the classes apart (AUROC "
            f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}] on held-out prompts, chance {row.chance:.2f} "
            f"[{row.chance_low:.2f}, {row.chance_high:.2f}]; most: {row.most}){topic}"
        )
        found.append(Fault(str(row.property), said, PROPERTIES[str(row.property)]))
    return found


# --- What stands there twice ------------------------------------------------------------------------------------------

_PAIR = ["one", "other", "similarity", "text", "other_text"]


def _near(texts: Sequence[Sequence[str]]) -> list[tuple[int, int, float, str, str]]:
    """Pairs of near-equal prompts by their numbers, the positive prompts first."""
    if len(texts) > LIMIT:
        return []
    alike = similar(texts)
    one, other = np.nonzero(np.triu(alike >= CUT, 1))
    order = np.argsort(-alike[one, other], kind="stable")
    found = [(int(one[k]), int(other[k])) for k in order]
    said = [" ".join(text)[:LETTERS] for text in texts]
    return [(i, j, float(alike[i, j]), said[i], said[j]) for i, j in found]


def _across(texts: Sequence[Sequence[str]], name: str, others: Sequence[Any]) -> pd.DataFrame:
    """Near-equal prompts of two sets."""
    import pandas as pd

    every = [*texts, *(words_of(prompt) for prompt in others)]
    pairs = [p for p in _near(every) if p[0] < len(texts) <= p[1]]
    frame = pd.DataFrame(pairs, columns=_PAIR)
    return frame.assign(other=frame["other"] - len(texts), of=name)


def _templates(texts: Sequence[Sequence[str]], together: Together, n: int) -> list[tuple[str, int, int]]:
    """What the prompts of each group have in common."""
    members: dict[int, list[int]] = {}
    for i, label in enumerate(together.labels):
        members.setdefault(label, []).append(i)
    found = []
    for rows in (rows for rows in members.values() if len(rows) > 1):
        common = set.intersection(*(set(texts[i]) for i in rows))
        frame = _frame(texts[rows[0]], common)[1:-1]
        found.append((" ".join(frame), sum(i < n for i in rows), sum(i >= n for i in rows)))
    return sorted(found, key=lambda each: -(each[1] + each[2]))


def _doubled(contrast: Any, together: Together, duplicates: pd.DataFrame, n: int) -> list[Fault]:
    """Prompts that count less than once, and prompts of both classes."""
    found = []
    both = duplicates[(duplicates["similarity"] == 1) & (duplicates["one"] < n) & (duplicates["other"] >= n)]
    texts = {"".join(map(str, [p])) for p in contrast.positive} & {"".join(map(str, [p])) for p in contrast.negative}
    if len(texts):
        said = f"{len(texts)} prompts stand in both classes, such as {both['text'].iloc[0] if len(both) else ''!r:.60}"
        mend = "em.ContrastSet([p for p in positive if p not in negative], [p for p in negative if p not in positive])"
        found.append(Fault("in both classes", said, mend))
    if not contrast.has_groups and together.said:
        mend = "contrast.grouped(), which em.compare, em.audit and contrast.split() do by themselves"
        found.append(Fault("near-equal", together.said, mend))
    if contrast.has_groups:
        given = len({*(contrast.positive_groups or ()), *(contrast.negative_groups or ())})
        left = len(set(together.labels))
        if left < given:
            said = (
                f"the groups are too fine: near-equal texts lie in different ones, and {given} of them count as {left}"
            )
            mend = "contrast.grouped(join=True)"
            if left < PARTS:
                said += ", too few to split the set"
                mend = "em.ContrastSet(contrast.positive, contrast.negative).grouped(), by near-equal texts alone"
            found.append(Fault("groups", said, mend))
    return found


def _leaking(leaks: pd.DataFrame) -> list[Fault]:
    """Prompts that stand on both sides of a cut."""
    found = []
    for name, rows in leaks.groupby("of", sort=False):
        if name == "another group":
            continue
        said = f"{rows['one'].nunique()} prompts are near-equal to some of {name}, such as {rows['text'].iloc[0]!r:.60}"
        found.append(Fault("leak", said, "contrast.grouped(join=True).split(seed=0), of the whole set"))
    return found


_TOLD_APART, _SURE = 0.8, 1e-3


def warn_of_nuisance(contrast: Any, lengths: Sequence[Sequence[int]]) -> None:
    """Warn when the lengths of the prompts alone tell the classes apart.

    Args:
        contrast: whose prompts they are.
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
