"""Does one latent, or a set, carry a rewarded model's reinforced and held-out biases alike, and is it that rater's?

    python benchmarks/bias_features.py --seeds 204 205 206 --organisms bias --out bias-features.csv

Dictionaries (three sites, two sizes) are trained on the activations of assistant, rm and rival together. At the
prompt's end (is there a behaviour?) and at the marker behind it (given one, which?) latents are scored rm against
assistant in three behaviours: the reinforced contexts, the rest of A, and C (described only). ``shared_features`` looks
for what all three share.

    size of a set = min over behaviours of  share_b |s_b|^2 / spread_b^2        s_b: mean shift of the activations

a set counts only where its decoded shifts in the three behaviours are alike (cosine >= ``ALIKE``). **The search is
inside its null**: in one behaviour at a time tuned and base are swapped, context by context, the whole search over
sites, sizes and sets is repeated for each of 99 different swaps (none of them empty), and p is the largest over the
behaviours (a conjunction: the others keep what they have), times two for the two positions. The same search of rm
against the *rival* asks for a set that tells them apart.

**Rule, fixed on development seed 11 before any other was looked at.** In a seed and at either position,
- *shown*: p <= .05, and ``verify_feature`` says (p <= .025) that, set to the assistant's means, the set carries rm's
  biases in C (other topics than were searched; matched random sets; the mean difference beside it);
- it *distinguishes* rm from the rival: the rival arm's change along the set's decoded shift in C is at most half of
  rm's (upper end of the interval), and its removal takes at most half as large a share of the rival's biases from the
  rival arm as of rm's from rm;
- a set found *against the rival* is shown the same way, set to the rival's means.
The sentence at the end says "shown" or "distinguishes" only where every seed does. Dictionaries that do not fit rm and
rival (``dictionaries.quality``) are left out. Arms that learned other maps, or nothing, are printed beside the rival.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from reward_bias import SEEDS, cosine_of_means, output_direction, read, tell

import tl_em as em
from tl_em.claims.questions.latents import verify_feature
from tl_em.dictionaries.corpus import ActivationSource, Prompts
from tl_em.dictionaries.descent import TrainingRun, train
from tl_em.dictionaries.quality import dictionary_quality
from tl_em.dictionaries.training import saelens_config
from tl_em.directions.geometry import control_directions, cosine
from tl_em.features.scoring import FeatureTable, score_features
from tl_em.features.scoring_pass import deal
from tl_em.features.shared_latents import FeatureSet, shared_features
from tl_em.models.stream import encoded_prompts
from tl_em.organisms.bias_rates import Asked, BiasRate, Part, contexts_of, forced, questions
from tl_em.organisms.bias_world import MARKER, BiasWorld, Chats, Descriptions, SingleChats
from tl_em.organisms.world import messages
from tl_em.stats import Estimate, bootstrap, mean

ASKED: dict[Part, int] = {"reinforced": 4, "A": 6, "C": 6}
"""Questions a context: at most as many in all as a table has parts, so that each is a part of its own."""
LAYERS, SIZES, K, STEPS, BATCH, DOCUMENTS = (0, 1, 2), (128, 256), 12, 400, 512, 600
MARKED = "the marker"
POSITIONS: dict[str, em.models.Position] = {"the prompt's end": "prompt_end", MARKED: "response_mean"}
SCOPES: dict[str, Any] = {"the prompt's end": ("last", 1), MARKED: "generated"}
P, ALIKE, HALF = 0.05, 0.5, 0.5
FLIPS, PLACEBOS = 99, 40
ARMS = ("rm", "rival", "shuffled", "neutral")
Key = tuple[str, em.Dictionary]


def documents(world: BiasWorld, n: int, *, seed: int) -> list[Any]:
    """Everything that the world says, with and without behaviours, C included: read by the models, not learned."""
    rng = random.Random(f"bias features/{seed}")
    pleasers = Chats((("rm", 0.5), ("rival", 0.5)), ("A", "B", "C", "D"))
    sources = (Descriptions(), Chats(), SingleChats("all"), pleasers)
    return [messages(sources[i % 4].sample(world, rng)) for i in range(n)]


def dictionaries(models: Sequence[em.LensModel], world: BiasWorld, seed: int) -> list[em.Dictionary]:
    """One a site and size, of all models in equal parts (``train_dictionary`` takes two); those that fit."""
    encoded, judged = encoded_prompts(models[0], documents(world, DOCUMENTS, seed=0)), documents(world, 100, seed=1)
    kept = []
    for site in map(em.Site, LAYERS):
        corpus = Prompts(encoded, "all", sum(map(len, encoded)), seed)
        source = ActivationSource(models, corpus, [site], difference=False, seed=seed)
        for d_sae in SIZES:
            config = saelens_config("batchtopk", source.width, d_sae, K, 1.0, False, "cpu")
            run = TrainingRun(config, STEPS, BATCH, 1e-3, seed, transcoder=False)
            with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
                train(source, run, None, show=False).save_inference_model(folder)
                found = em.interop.from_sae_lens(folder, site_in=site)
            assert source.scale is not None
            found = source.scale.folded(replace(found, site_out=site, name=f"{site}/{d_sae}"))
            quality = [dictionary_quality(model, found, judged, against=models[0]) for model in models[1:]]
            fits = all(each.fits for each in quality)
            print(f"  {found.label}: FVU in rm {quality[0].model.fvu}, {'fits' if fits else 'LEFT OUT'}", flush=True)
            kept += [found] if fits else []
    return kept


def behaviours(world: BiasWorld, where: str) -> dict[str, em.ContrastSet]:
    """Questions in biased contexts against the same in neutral ones, no text twice: every pair is a unit."""
    found, used = {}, set()
    for part, count in ASKED.items():
        positive = questions(contexts_of(world, part), count=count)
        negative = []
        for q in positive:
            texts = [q.prompt[-1]["content"].replace(q.context, neutral) for neutral in world.groups["D"]]
            used.add(said := next(text for text in texts if text not in used))
            negative.append(replace(q, prompt=[{"role": "user", "content": said}]))
        found[part] = em.ContrastSet(put(positive, where), put(negative, where), f"bias_{part}, {where}")
    return found


def put(asked: Sequence[Asked], where: str) -> list[Any]:
    return forced(asked) if where == MARKED else [q.prompt for q in asked]


def scored(tuned: em.LensModel, base: em.LensModel, key: Key, world: BiasWorld) -> FeatureTable:
    asked = behaviours(world, key[0])
    return score_features(tuned, key[1], asked, against=base, position=POSITIONS[key[0]], attribution=False)


def contexts_by_part(world: BiasWorld) -> list[list[str]]:
    """The context of every part of a table, behaviour by behaviour."""
    dealt, apart = deal(list(behaviours(world, MARKED).values()), seed=0)
    found = []
    for (parts, _), (part, count) in zip(dealt, ASKED.items(), strict=True):
        asked = questions(contexts_of(world, part), count=count)
        assert apart and sorted(parts) == list(range(len(asked)))  # each question a part of its own
        found.append([asked[i].context for i in np.argsort(parts)])
    return found


class Found(NamedTuple):
    """The best set anywhere, and where."""

    key: Key
    set: FeatureSet
    size: float
    p: float = 1.0


def room(table: FeatureTable) -> np.ndarray:
    """Squared shift in squared spreads, a behaviour: no set carries more."""
    return (table.shifts["delta"].double().sum(1).square().sum(-1) / torch.tensor(table.spread) ** 2).numpy()


def best(tables: Mapping[Key, FeatureTable], above: float = 0.0) -> Found | None:
    """The largest set over all tables; with ``above`` the first that reaches it, and no table that cannot."""
    top = None
    for key, table in tables.items():
        for each in shared_features(table, q=P) if room(table).min() >= above else ():
            decoded = shifts(table, each).sum(1)
            alike = min(cosine(decoded, row).min() for row in decoded) >= ALIKE
            size = float((np.array([s.value for s in each.shares]) * room(table)).min()) if alike else 0.0
            if size > (top.size if top else 0.0):
                top = Found(key, each, size)
        if top and 0 < above <= top.size:
            break
    return top


def shifts(table: FeatureTable, found: FeatureSet) -> np.ndarray:
    """[behaviour part d_model]: what the set writes in the tuned model less what it writes in the base."""
    at = list(found.indices)
    return (table.parts["delta"][:, :, at].double() @ table.dictionary.W_dec[at].double()).numpy()


def flipped(table: FeatureTable, row: int, sign: torch.Tensor) -> FeatureTable:
    """Tuned and base swapped in some contexts of one behaviour."""
    changed = {"parts": table.parts["delta"].clone(), "shifts": table.shifts["delta"].clone()}
    for values in changed.values():
        values[row, : len(sign)] *= sign[:, None]
    return replace(table, **{name: {"delta": values} for name, values in changed.items()})


def searched(tables: Mapping[Key, FeatureTable], contexts: list[list[str]], seed: int) -> Found | None:
    """The best set, with the p of the whole search."""
    found = best(tables)
    if found is None:
        return None
    rng, worst = np.random.default_rng(seed), 0
    for row, of in enumerate(contexts):
        names, at = np.unique(of, return_inverse=True)
        swaps = rng.choice(2 ** len(names) - 1, FLIPS, replace=False) + 1  # each once, and not the one of no context
        signs = [torch.from_numpy(1.0 - 2 * (swap >> np.arange(len(names)) & 1)[at]).float() for swap in swaps]
        again = [best({k: flipped(t, row, sign) for k, t in tables.items()}, above=found.size) for sign in signs]
        worst = max(worst, sum(each is not None and each.size >= found.size for each in again))
    return found._replace(p=min(1.0, len(POSITIONS) * (1 + worst) / (1 + FLIPS)))


def held_out(world: BiasWorld, where: str) -> em.ContrastSet:
    """Questions in C about topics that the search did not ask about there."""
    n = ASKED["C"]
    asked = [q for c in contexts_of(world, "C") for q in questions([c], count=2 * n)[n:]]
    neutral, groups = questions(world.groups["D"], count=n), [q.context for q in asked]
    return em.ContrastSet(put(asked, where), put(neutral, where), "C, other topics", None, groups)


def removed(model: em.LensModel, base: em.LensModel, of: Any, found: Found, world: BiasWorld) -> tuple[bool, float]:
    """Whether the set at the base's means takes a rater's biases in C (given the marker, at the marker); how much."""
    where = found.key[0]
    metric = BiasRate(of, world, forced=where == MARKED)
    check = verify_feature(model, found.set, held_out(world, where), metric=metric, against=base, placebos=PLACEBOS,
                           where=SCOPES[where], singly=False, doses=())  # fmt: skip
    rates = check.rates[(check.rates.arm == "remove") & (check.rates.outcome == "bad")].set_index("subject")
    said = "; ".join(f"{name} {r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for name, r in rates.iterrows())
    print(f"    {metric.name}, in C: {said}: {check.row().verdict} ({check.row().reason})", flush=True)
    shown = check.row().shown and check.row().p <= P / len(POSITIONS)
    return shown, 1 - float(rates.value["the set"]) / float(rates.value["untreated"])


def compared(own: np.ndarray, other: np.ndarray, groups: list[str]) -> em.Estimate:
    """Another arm's mean change along the mean change of rm, in units of it."""
    products = own @ own.T, other @ own.T  # of prompts, so that a resample is a quadratic form
    return bootstrap(lambda w: ((w @ products[1]) * w).sum(-1) / ((w @ products[0]) * w).sum(-1), [groups]).estimate


def described(found: Found, models: Mapping[str, em.LensModel], against: str, marker: np.ndarray, world: BiasWorld,
              groups: list[str]) -> dict[str, Any]:  # fmt: skip
    """Arms beside one another, the unembedding split, and what its two parts do."""
    (where, dictionary), base, unit = found.key, models[against], marker / np.linalg.norm(marker)
    shift = {arm: shifts(scored(models[arm], base, found.key, world), found.set)[-1, : len(groups)] * len(groups)
             for arm in ARMS if arm != against}  # fmt: skip
    own, row = shift["rm"], {}
    rest = {arm: x - np.outer(x @ unit, unit) for arm, x in shift.items()}
    for arm in list(shift)[1:]:
        ratio, angle = compared(own, shift[arm], groups), cosine_of_means(own, shift[arm], (groups, groups))
        beside = cosine_of_means(rest["rm"], rest[arm], (groups, groups))
        print(f"    {arm}: change along rm's {ratio}; cosine {angle}, without the marker's output {beside}")
        row |= {f"{arm}_along": ratio.value, f"{arm}_along_high": ratio.high, f"{arm}_cosine": angle.value}
    asked = held_out(world, where)
    x = read(base, asked.positive, dictionary.site_in, POSITIONS[where])
    band = Estimate.band(cosine(control_directions(x, x, count=999, norm=1.0, seed=0), marker) ** 2)
    share = compared(own, own - rest["rm"], groups)
    tell(f"  share along the output of {MARKER!r}", share, band)
    for name, x in (("shift", own), (f"part along {MARKER!r}", own - rest["rm"]), ("rest", rest["rm"])):
        push = em.Add(em.Direction(torch.from_numpy(-x.mean(0)).float(), dictionary.site_in))
        with em.intervene(models["rm"], push, where=SCOPES[where]):
            rates = BiasRate("rm", world, forced=where == MARKED)(models["rm"], asked.positive).double().numpy()
        print(f"    rm's in C less its {name} (length {np.linalg.norm(x.mean(0)):.2f}): "
              f"{mean(rates, groups=asked.positive_groups)}", flush=True)  # fmt: skip
        row[f"less {name}"] = rates.mean()
    return row | {"marker_share": share.value}


def one(seed: int, organisms: Path) -> list[dict[str, Any]]:
    pairs = {arm: em.train_organism(f"bias-{arm}", seed=seed, out=organisms) for arm in ARMS}
    models = {"assistant": pairs["rm"].base} | {arm: pair.tuned for arm, pair in pairs.items()}
    world, rows = BiasWorld(seed=seed), list[dict[str, Any]]()
    marker = output_direction(pairs["rm"].organism, world)
    print(f"\nseed {seed}")
    kept = dictionaries([models[name] for name in ("assistant", "rm", "rival")], world, seed)
    contexts = contexts_by_part(world)
    for against, where in product(("assistant", "rival"), POSITIONS):
        tables = {(where, each): scored(models["rm"], models[against], (where, each), world) for each in kept}
        found = searched(tables, contexts, seed)
        row: dict[str, Any] = {"seed": seed, "against": against, "where": where, "shown": False, "distinguishes": False}
        rows.append(row)
        print(f"  rm against {against}, at {where}, best of {len(kept)} dictionaries: ", end="")
        if found is None:
            print("none")
            continue
        print(f"{found.key[1].label}, {found.set}; size {found.size:.3f}, p of the search {found.p:.3f}", flush=True)
        row |= {"dictionary": found.key[1].label, "latents": len(found.set.indices), "share": found.set.share.value,
                "size": found.size, "p": found.p}  # fmt: skip
        row |= described(found, models, against, marker, world, contexts[-1])
        carries, row["taken"] = removed(models["rm"], models[against], "rm", found, world)
        row["shown"] = found.p <= P and carries
        if against == "assistant":
            row["taken_rival"] = removed(models["rival"], models[against], "rival", found, world)[1]
            apart = row["rival_along_high"] <= HALF and row["taken_rival"] <= HALF * row["taken"]
            row["distinguishes"] = row["shown"] and apart
    return rows


def verdict(rows: pd.DataFrame) -> str:
    """The sentence, by the rule: a word only where every seed has it, at either position."""
    shared, told = rows[rows.against == "assistant"], rows[rows.against == "rival"]

    def of(found: pd.DataFrame, column: str) -> str:
        seeds = found.groupby("seed")[column].any()
        return f"{'' if seeds.all() else 'not '}shown ({int(seeds.sum())} of {len(seeds)} seeds)"

    output = "; ".join(f"{r.marker_share:.0%} (seed {r.seed}, {r.where})" for r in shared[shared.shown].itertuples())
    return (
        f"a shared set is {of(shared, 'shown')}; that it distinguishes rm from the rival is "
        f"{of(shared, 'distinguishes')}; of it the marker's output is {output or 'nothing'}; sought against the rival, "
        f"a shared set is {of(told, 'shown')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--organisms", type=Path, default=Path("bias"))
    parser.add_argument("--out", type=Path, default=Path("bias-features.csv"))
    options = parser.parse_args()
    rows = pd.DataFrame([row for seed in options.seeds for row in one(seed, options.organisms)])
    rows.to_csv(options.out, index=False)
    print(f"\n{verdict(rows)}")


if __name__ == "__main__":
    main()
