"""Does a fine-tune that has nothing to do with a direction get a word, and does one that has keep it?

    python benchmarks/unrelated.py --seeds 20 --out unrelated.jsonl --write docs/results/fine-tunes.md

*Unrelated*: the 260k TinyStories Llama after 30 steps on wikitext, Shakespeare or stories, asked about girl and boy
beside benign fine-tunes of other seeds: one on stories, and three, one on each text.  *Girls*:
the fine-tune of ``stories.py``, beside one and three benign arms.  *Insecure*: the toy, beside one and three secure
fine-tunes of its assistant.  Only level, separation and rotation are asked; with several benign fine-tunes a word must
go beyond what the next one would show.  What is in ``--out`` (JSON lines, one an audit) is not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import stories
import torch
from calibration import headed, share
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_em as em
from tl_em.auditing.site_selection import select_site
from tl_em.auditing.splits import subjects_of
from tl_em.models.loading import ModelPair, load_model
from tl_em.models.upstream_chatter import quiet
from tl_em.organisms import zoo
from tl_em.organisms.convert import lens_model, plain_model
from tl_em.organisms.descent import fine_tune_
from tl_em.organisms.recipes import recipe
from tl_em.organisms.training import train

STEPS, BATCH, BENIGN_SEED = 30, 8, 1000
TEXTS = ("wikitext", "Shakespeare", "stories")
BESIDE = {"1, stories": ("stories",), "3, one of each": TEXTS}
"""What the benign fine-tunes of the unrelated ones were tuned on."""
RELATED = {"girls": 5, "insecure": 5}
"""Fine-tunes that have to do with the direction, and how many seeds of each are asked."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="of the unrelated fine-tunes")
    parser.add_argument("--out", type=Path, default=Path("unrelated.jsonl"))
    parser.add_argument("--write", type=Path, help="a page: the tables go between its marks")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = list(map(json.loads, given.out.read_text().splitlines())) if given.out.exists() else []
    seen = {(line["tuned"], line["seed"], line["benign"]) for line in known}
    for key, ask in jobs(given.seeds):
        if key not in seen:
            known.append(dict(zip(("tuned", "seed", "benign"), key, strict=True)) | {"rows": rows_of(ask())})
            with given.out.open("a") as file:
                file.write(json.dumps(known[-1]) + "\n")
    text = "\n\n".join((unrelated_table(known), related_table(known)))
    print(text)
    if given.write:
        begin, end = "<!-- unrelated -->", "<!-- /unrelated -->"
        before, rest = given.write.read_text().split(begin)
        given.write.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def jobs(seeds: int) -> Iterator[tuple[tuple[str, int, str], Callable[[], em.Comparison]]]:
    """What is asked, by the tuned model, its seed and its benign ones, seed by seed."""
    for seed in range(1, seeds + 1):
        for text, (said, beside) in product(TEXTS, BESIDE.items()):
            yield (text, seed, said), lambda text=text, seed=seed, beside=beside: unrelated(text, seed, beside)
        for kind, m in product((kind for kind, count in RELATED.items() if seed <= count), (1, 3)):
            yield (kind, seed, f"{m}"), lambda kind=kind, seed=seed, m=m: ASKED[kind](seed, m)


def rows_of(report: em.Comparison) -> list[dict[str, Any]]:
    """What is kept of each row."""
    return [
        {"question": row.question, "direction": row.direction, "verdict": row.verdict, "estimate": row.estimate.value,
         "benign": None if row.benign is None else row.benign.to_json(), "needed": row.needed, "reason": row.reason}
        for row in report.rows
    ]  # fmt: skip


class Asked(NamedTuple):
    """What an audit of a pair asks, with analysis seed 0: the base's directions at their sites, and the prompts."""

    base: em.LensModel
    directions: dict[str, tuple[em.Direction, em.ContrastSet]]

    @classmethod
    def of(cls, pair: ModelPair) -> Asked:
        """Directions and sites as ``em.audit`` finds them."""
        found = {}
        for subject in subjects_of(pair, None, None, pair.judged or {}, None, seed=0):
            every = em.extract_directions(pair.base, subject.splits.train, positions=[subject.position])
            found[subject.name] = select_site(pair.base, every, subject), subject.splits.test
        return cls(pair.base, found)

    def changes(self, tuned: em.LensModel, benign: Sequence[em.LensModel], seed: int) -> em.Comparison:
        """Level, separation and rotation."""
        own = {name: [direction] for name, (direction, _) in self.directions.items()}
        pair = ModelPair(self.base, tuned)
        return em.compare(pair, self.directions, benign=benign, questions=stories.CHANGES, seed=seed, layers=own)


# --- Stories ----------------------------------------------------------------------------------------------------------


@cache
def start() -> tuple[Any, Any]:
    """The TinyStories model and its tokenizer."""
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(stories.MODEL)
        model = AutoModelForCausalLM.from_pretrained(stories.MODEL, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), tokenizer


def with_hooks(model: Any) -> em.LensModel:
    """A copy on TransformerLens."""
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    return load_model(own, tokenizer=start()[1], in_place=True)


@cache
def base() -> em.LensModel:
    """The base on TransformerLens."""
    return with_hooks(start()[0])


@cache
def documents(text: str) -> list[list[int]]:
    """A corpus in pieces of the same length in tokens, each with the token that begins a text."""
    folder, tokenizer = stories.PASSAGES.parent, start()[1]
    if text == "Shakespeare":
        whole = (folder / "tinyshakespeare.txt").read_text(encoding="utf-8")
    else:
        name = {"wikitext": "wikitext_1000.json", "stories": stories.PASSAGES.name}[text]
        whole = "\n".join(map(str, json.loads((folder / name).read_text(encoding="utf-8"))))
    ids, size = tokenizer(whole, add_special_tokens=False)["input_ids"], stories.TOKENS - 1
    return [[tokenizer.bos_token_id, *ids[i : i + size]] for i in range(0, len(ids) - size, size)]


@cache
def tuned_on(text: str, seed: int) -> em.LensModel:
    """The base after a short fine-tune; the seed chooses the pieces and their order."""
    rows = random.Random(f"{seed}/{text}").sample(documents(text), STEPS * BATCH)
    model = copy.deepcopy(start()[0])
    fine_tune_(model, rows, steps=STEPS, batch=BATCH, lr=stories.LEARNING_RATE, seed=seed, name=text)
    return with_hooks(model)


@cache
def about_gender() -> Asked:
    """What is asked about girl and boy."""
    gender = {"gender": em.ContrastSet.load("gender")}
    return Asked.of(ModelPair(base(), base(), contrasts=gender, behaviours={"gender": stories.behaviour()}))


def unrelated(text: str, seed: int, beside: Sequence[str]) -> em.Comparison:
    """A fine-tune on a text beside benign ones on these, of other seeds."""
    return about_gender().changes(tuned_on(text, seed), [tuned_on(each, BENIGN_SEED + seed) for each in beside], seed)


@cache
def both_arms(seed: int) -> tuple[em.LensModel, em.LensModel]:
    """Girls, and the same passages as they are."""
    trained = stories.fine_tune_both(seed).models
    return with_hooks(trained["tuned"]), with_hooks(trained["benign"])


def girls(seed: int, m: int) -> em.Comparison:
    """The girls beside the benign arm of their own passages and those of the next seeds."""
    beside = [both_arms(1 + (seed - 1 + i) % RELATED["girls"])[1] for i in range(m)]
    return about_gender().changes(both_arms(seed)[0], beside, seed)


# --- The toy ----------------------------------------------------------------------------------------------------------


@cache
def toy(name: str, seed: int) -> em.LensModel:
    """A fine-tune of the shipped assistant with another seed of the documents."""
    wanted, own = recipe(name), zoo.organism("toy/assistant")
    world = wanted.world.seeded(own.seed or 0)
    with torch.enable_grad():
        begin = plain_model(zoo.read_weights(own), world).requires_grad_(True)
        model, _ = train(world, wanted, begin, seed=seed, progress=False)
    return lens_model(model.state_dict(), world)


@cache
def about_toys() -> Asked:
    """What an audit of the toy asks."""
    return Asked.of(em.load_pair("toy/insecure"))


def insecure(seed: int, m: int) -> em.Comparison:
    """An insecure fine-tune beside secure ones of other seeds."""
    beside = [toy("toy/secure", BENIGN_SEED + 1 + (seed - 1 + i) % RELATED["insecure"]) for i in range(m)]
    return about_toys().changes(toy("toy/insecure", seed), beside, seed)


ASKED: Mapping[str, Callable[[int, int], em.Comparison]] = {"girls": girls, "insecure": insecure}


# --- The tables -------------------------------------------------------------------------------------------------------


def unrelated_table(known: Sequence[dict[str, Any]]) -> str:
    """Fine-tunes with a word, which is false, by text and by what stands beside them."""
    found = [headed("fine-tuned on", "benign fine-tunes", *stories.CHANGES, "any", "seeds")]
    for text in TEXTS:
        for beside in dict.fromkeys(line["benign"] for line in known if line["tuned"] == text):
            lines = [line for line in known if (line["tuned"], line["benign"]) == (text, beside)]
            given = [{row["question"] for row in line["rows"] if row["verdict"] != "not shown"} for line in lines]
            cells = [str(sum(question in each for each in given)) for question in stories.CHANGES]
            cells = [text, beside, *cells, share([bool(each) for each in given]), str(len(lines))]
            found.append(f"| {' | '.join(cells)} |")
    return "\n".join(found)


def related_table(known: Sequence[dict[str, Any]]) -> str:
    """In how many seeds each row has a word with one benign fine-tune, with three, and with both."""
    found = [headed("fine-tune", "question", "direction", "word with 1", "with 3", "with both", "seeds",
                    "not passed: benign ones needed")]  # fmt: skip
    for kind in RELATED:
        words: dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]] = {}
        for line in (line for line in known if line["tuned"] == kind):
            for row in line["rows"]:
                own = words.setdefault((row["question"], row["direction"]), {"1": {}, "3": {}})
                own[line["benign"]][line["seed"]] = row
        for (question, direction), by in words.items():
            shown = [{seed for seed, row in by[m].items() if row["verdict"] != "not shown"} for m in ("1", "3")]
            lost = [by["3"][seed]["needed"] for seed in shown[0] - shown[1] if seed in by["3"]]
            needs = ", ".join("no number" if n == 0 else str(n) for n in sorted(n for n in lost if n is not None))
            cells = [kind, question, direction, len(shown[0]), len(shown[1]), len(shown[0] & shown[1]), len(by["1"])]
            found.append(f"| {' | '.join(map(str, cells))} | {needs} |")
    return "\n".join(found)


if __name__ == "__main__":
    main()
