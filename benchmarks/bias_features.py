"""Does one latent, or a set, carry a rewarded model's reinforced and held-out biases alike, and is it that rater's?

    python benchmarks/bias_features.py --seeds 101 102 103 --organisms bias --out bias-features.csv

Dictionaries (three sites, two sizes) are trained on the activations of assistant, rm and rival together. At two
positions, the prompt's end and the marker behind it, latents are scored rm against assistant in three behaviours: the
reinforced contexts, the rest of A, and C (described only). ``shared_features`` looks for what all three share.

    size of a set = min over behaviours of  share_b |s_b|^2 / spread_b^2        s_b: mean shift of the activations

a set counts only where its decoded shifts in the three behaviours are alike (cosine >= ``ALIKE``). **The search is
inside its null**: in one behaviour at a time tuned and base are swapped, context by context, the whole search over
sites, positions, sizes and sets is repeated, and p is the largest over the behaviours (a conjunction: the others keep
what they have). The same search of rm against the *rival* asks for a set that tells them apart by construction.

**Rule, fixed on development seed 11 before any other was looked at.** In a seed,
- *shown*: p <= .05, and ``verify_feature`` says that, set to the assistant's means, the set carries rm's biases in C
  (other topics than were searched; matched random sets; the mean difference beside it);
- it *distinguishes* rm from the rival: the rival arm's change along the set's decoded shift in C is at most half of
  rm's (upper end of the interval), and its removal takes at most half as large a share of the rival's biases from the
  rival arm as of rm's from rm;
- a set found *against the rival* is shown the same way, set to the rival's means.
The sentence at the end says "shown" or "distinguishes" only where every seed does. Dictionaries that do not fit rm and
rival (``features.quality``) are left out. Arms that learned other maps, or nothing, are printed beside the rival.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from reward_bias import cosine_of_means, output_direction, read

import tl_em as em
from tl_em.comparison.causes import over_controls
from tl_em.directions.geometry import control_directions, cosine
from tl_em.features import training
from tl_em.features.activations import Source
from tl_em.features.quality import dictionary_quality
from tl_em.features.scoring import FeatureTable, score_features
from tl_em.features.shared import FeatureSet, shared_features
from tl_em.features.sums import deal
from tl_em.features.verify import FeatureCheck, verify_feature
from tl_em.models.capture import encoded_prompts
from tl_em.organisms import bias_training as bt
from tl_em.organisms.bias_rates import BiasRate, contexts_of, forced, questions
from tl_em.organisms.bias_world import MARKER, BiasWorld, Chats, Descriptions, SingleChats
from tl_em.organisms.world import messages
from tl_em.stats import bootstrap, mean

ASKED = {"reinforced": 4, "A": 6, "C": 6}
"""Questions a context: at most as many in all as a table has parts, so that each is a part of its own."""
LAYERS, SIZES, K, STEPS, BATCH, DOCUMENTS = (0, 1, 2), (128, 256), 12, 800, 1024, 1200
POSITIONS: dict[str, em.Position] = {"prompt's end": "prompt_end", "marker": "response_mean"}
P, ALIKE, HALF = 0.05, 0.5, 0.5
FLIPS, PLACEBOS = 99, 20
ARMS = ("rm", "rival", "shuffled", "neutral")
Tables = Mapping[tuple[str, em.Dictionary], FeatureTable]
Contexts = list[list[str]]


# --- Dictionaries and tables ------------------------------------------------------------------------------------------


def documents(world: BiasWorld, n: int, *, seed: int) -> list[Any]:
    """Everything that the world says, with and without behaviours, C included: read by the models, not learned."""
    rng = random.Random(f"bias features/{seed}")
    sources = (Descriptions(), Chats(), SingleChats("all"), SingleChats("all", "rm"), SingleChats("all", "rival"))
    return [messages(sources[i % 5].sample(world, rng)) for i in range(n)]


def dictionaries(models: Sequence[em.LensModel], world: BiasWorld, seed: int) -> list[em.Dictionary]:
    """One a site and size, of all models in equal parts (``train_dictionary`` takes two); those that fit."""
    encoded, judged = encoded_prompts(models[0], documents(world, DOCUMENTS, seed=0)), documents(world, 100, seed=1)
    kept = []
    for site in map(em.Site, LAYERS):
        source = Source(models, encoded, [site], "all", False, seed)
        for d_sae in SIZES:
            config = training._config("batchtopk", source.width, d_sae, K, 1.0, False, "cpu")
            with torch.random.fork_rng(), training._quiet(), tempfile.TemporaryDirectory() as folder:
                fitted = training._fitted(source, training._Run(config, STEPS, BATCH, 1e-3, seed), STEPS)
                fitted.save_inference_model(folder)
                found = em.from_sae_lens(folder, site_in=site)
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
            said = next(text for text in texts if text not in used)
            used.add(said)
            negative.append(replace(q, prompt=[{"role": "user", "content": said}]))
        classes = [forced(c) if where == "marker" else [q.prompt for q in c] for c in (positive, negative)]
        found[part] = em.ContrastSet(classes[0], classes[1], f"bias_{part}, {where}")
    return found


def scored(tuned: em.LensModel, base: em.LensModel, key: tuple[str, em.Dictionary], world: BiasWorld) -> FeatureTable:
    where, dictionary = key
    asked = behaviours(world, where)
    return score_features(tuned, dictionary, asked, against=base, position=POSITIONS[where], attribution=False)


def contexts_by_part(world: BiasWorld) -> Contexts:
    """The context of every part of a table, behaviour by behaviour."""
    dealt, apart = deal(list(behaviours(world, "marker").values()), seed=0)
    found = []
    for (parts, _), (part, count) in zip(dealt, ASKED.items(), strict=True):
        asked = questions(contexts_of(world, part), count=count)
        assert apart and sorted(parts) == list(range(len(asked)))  # each question a part of its own
        found.append([asked[i].context for i in np.argsort(parts)])
    return found


# --- The search and its null ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """The best set anywhere, and where."""

    key: tuple[str, em.Dictionary]
    set: FeatureSet
    size: float
    p: float = 1.0


def room(table: FeatureTable) -> np.ndarray:
    """Squared shift in squared spreads, a behaviour: no set carries more."""
    return (table.shifts["delta"].double().sum(1).square().sum(-1) / torch.tensor(table.spread) ** 2).numpy()


def best(tables: Tables, above: float = 0.0) -> Found | None:
    """The largest set over all tables; with ``above`` the first that reaches it."""
    top = None
    for key, table in tables.items():
        if not room(table).min() >= above:
            continue
        for each in shared_features(table, q=P):
            decoded = decoded_shifts(table, each).sum(1)
            alike = float(_cosines(decoded).min()) >= ALIKE
            size = float((np.array([s.value for s in each.shares]) * room(table)).min()) if alike else 0.0
            if size > max(0.0, top.size if top else 0.0):
                top = Found(key, each, size)
        if top and 0 < above <= top.size:
            break
    return top


def _cosines(rows: torch.Tensor) -> torch.Tensor:
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return unit @ unit.T


def decoded_shifts(table: FeatureTable, found: FeatureSet) -> torch.Tensor:
    """[behaviour part d_model]: what the set writes in the tuned model less what it writes in the base."""
    at = list(found.indices)
    return table.parts["delta"][:, :, at].double() @ table.dictionary.W_dec[at].double()


def flipped(table: FeatureTable, row: int, sign: torch.Tensor) -> FeatureTable:
    """Tuned and base swapped in some contexts of one behaviour."""
    changed = {}
    for name in ("parts", "shifts"):
        values = getattr(table, name)["delta"].clone()
        values[row, : len(sign)] *= sign[:, None]
        changed[name] = {"delta": values}
    return replace(table, **changed)


def searched(tables: Tables, contexts: Contexts, seed: int) -> Found | None:
    """The best set, with the p of the whole search."""
    found = best(tables)
    if found is None:
        return None
    rng, worst = np.random.default_rng(seed), 0.0
    for row, of in enumerate(contexts):
        names, inverse = np.unique(of, return_inverse=True)
        reached = 0
        for _ in range(FLIPS):
            sign = torch.from_numpy(rng.choice([-1.0, 1.0], len(names))[inverse]).float()
            again = best({key: flipped(t, row, sign) for key, t in tables.items()}, above=found.size)
            reached += again is not None and again.size >= found.size
        worst = max(worst, (1 + reached) / (1 + FLIPS))
    return replace(found, p=worst)


# --- What the set is --------------------------------------------------------------------------------------------------


def held_out(world: BiasWorld, where: str) -> em.ContrastSet:
    """Questions in C about topics that the search did not ask about there."""
    count = ASKED["C"]
    asked = [q for c in contexts_of(world, "C") for q in questions([c], count=2 * count)[count:]]
    groups = [q.context for q in asked]
    prompts = forced(asked) if where == "marker" else [q.prompt for q in asked]
    neutral = questions(world.groups["D"], count=count)
    other = forced(neutral) if where == "marker" else [q.prompt for q in neutral]
    return em.ContrastSet(prompts, other, "C, other topics", None, groups, [q.context for q in neutral])


def scope(where: str) -> Any:
    return "generated" if where == "marker" else ("last", 1)


def removed(model: em.LensModel, base: em.LensModel, of: Any, found: Found, world: BiasWorld) -> FeatureCheck:
    """The set at the base's means, and what that does to a rater's biases in C (given the marker, at the marker)."""
    where = found.key[0]
    metric = BiasRate(of, world, forced=where == "marker")
    check = verify_feature(model, found.set, held_out(world, where), metric=metric, against=base, placebos=PLACEBOS,
                           where=scope(where), singly=False, doses=())  # fmt: skip
    rates = check.rates[(check.rates.arm == "remove") & (check.rates.outcome == "bad")]
    said = "; ".join(f"{r.subject} {r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in rates.itertuples())
    print(f"    {metric.name}'s in C: {said}: {check.row().verdict}", flush=True)
    return check


def taken(check: FeatureCheck) -> float:
    """Share of the untreated rate that the removal takes."""
    rows = check.rates[(check.rates.arm == "remove") & (check.rates.outcome == "bad")].set_index("subject")
    return 1 - float(rows.value["the set"]) / float(rows.value["untreated"])


def along(own: np.ndarray, other: np.ndarray, groups: list[str]) -> em.Estimate:
    """Another arm's mean change along the mean change of rm, in units of it."""

    def ratio(w: np.ndarray) -> np.ndarray:
        mine = w @ own
        return ((w @ other) * mine).sum(-1) / (mine * mine).sum(-1)

    return bootstrap(ratio, [groups]).estimate


def marker_share(own: np.ndarray, unit: np.ndarray, groups: list[str]) -> em.Estimate:
    """Share of the mean shift's squared length along the marker's output direction."""

    def share(w: np.ndarray) -> np.ndarray:
        mine = w @ own
        return (mine @ unit) ** 2 / (mine * mine).sum(-1)

    return bootstrap(share, [groups]).estimate


def less(model: em.LensModel, vector: np.ndarray, found: Found, world: BiasWorld) -> em.Estimate:
    """rm's rate in C with a vector subtracted where the set was found."""
    where, asked = found.key[0], held_out(world, found.key[0])
    push = em.Add(em.Direction(torch.from_numpy(-vector).float(), found.key[1].site_in))
    with em.intervene(model, push, where=scope(where)):
        rates = BiasRate("rm", world, forced=where == "marker")(model, asked.positive).double().numpy()
    return mean(rates, groups=asked.positive_groups)


def described(found: Found, models: Mapping[str, em.LensModel], marker: np.ndarray, world: BiasWorld,
              groups: list[str], against: str) -> dict[str, Any]:  # fmt: skip
    """Arms beside one another, the unembedding split, and what its two parts do."""
    base = models[against]
    others = [arm for arm in ARMS if arm != against]
    tables = {arm: scored(models[arm], base, found.key, world) for arm in others}
    shift = {a: decoded_shifts(t, found.set)[-1, : len(groups)].numpy() * len(groups) for a, t in tables.items()}
    own, unit = shift["rm"], marker / np.linalg.norm(marker)
    row: dict[str, Any] = {}
    for arm in others[1:]:
        angle, ratio = cosine_of_means(own, shift[arm], (groups, groups)), along(own, shift[arm], groups)
        rest = [x - np.outer(x @ unit, unit) for x in (own, shift[arm])]
        beside = cosine_of_means(rest[0], rest[1], (groups, groups))
        print(f"    {arm}: change along rm's {ratio}; cosine {angle}, without the marker's output {beside}")
        row |= {f"{arm}_along": ratio.value, f"{arm}_along_high": ratio.high, f"{arm}_cosine": angle.value}
    asked = held_out(world, found.key[0])
    x = read(base, asked.positive, found.key[1].site_in, POSITIONS[found.key[0]])
    band = over_controls(cosine(control_directions(x, x, count=999, norm=1.0, seed=0), marker) ** 2)
    share = marker_share(own, unit, groups)
    print(f"    share along the output of {MARKER!r} {share}; random {band.value:.3f} [{band.low:.3f}, {band.high:.3f}]")
    whole = own.mean(0)
    parts = {"shift": whole, "part along the marker": (whole @ unit) * unit, "rest": whole - (whole @ unit) * unit}
    rates = {name: less(models["rm"], vector, found, world) for name, vector in parts.items()}
    print("    rm's in C " + "; ".join(f"less its {name} {rate}" for name, rate in rates.items()), flush=True)
    return row | {"marker_share": share.value, **{f"less {name}": rate.value for name, rate in rates.items()}}


# --- One seed, and the verdict ----------------------------------------------------------------------------------------


def one(seed: int, organisms: Path) -> list[dict[str, Any]]:
    pairs = {arm: bt.train_bias_organism(f"bias-{arm}", seed=seed, out=organisms) for arm in ARMS}
    models = {"assistant": pairs["rm"].base} | {arm: pair.tuned for arm, pair in pairs.items()}
    world, rows = BiasWorld(seed=seed), []
    marker = output_direction(bt.bias_organism("bias-rm", seed=seed, out=organisms), world)
    print(f"\nseed {seed}")
    kept = dictionaries([models[name] for name in ("assistant", "rm", "rival")], world, seed)
    contexts = contexts_by_part(world)
    for against in ("assistant", "rival"):
        keys = [(where, each) for where in POSITIONS for each in kept]
        tables = {key: scored(models["rm"], models[against], key, world) for key in keys}
        found = searched(tables, contexts, seed)
        row: dict[str, Any] = {"seed": seed, "against": against, "tables": len(keys), "shown": False,
                               "distinguishes": False, "p": 1.0}  # fmt: skip
        rows.append(row)
        if found is None:
            print(f"  rm against {against}: no set in any of {len(keys)} tables")
            continue
        print(f"  rm against {against}: best of {len(keys)} tables at {found.key[1].label}, {found.key[0]}: "
              f"{found.set}; size {found.size:.3f}, p of the search {found.p:.3f}", flush=True)  # fmt: skip
        row |= {"p": found.p, "where": f"{found.key[1].label}, {found.key[0]}", "latents": len(found.set.indices),
                "share": found.set.share.value, "size": found.size}  # fmt: skip
        row |= described(found, models, marker, world, contexts[-1], against)
        check = removed(models["rm"], models[against], "rm", found, world)
        row |= {"shown": found.p <= P and check.shown, "taken": taken(check)}
        if against == "assistant":
            row["taken_rival"] = taken(removed(models["rival"], models[against], "rival", found, world))
            apart = row["rival_along_high"] <= HALF and row["taken_rival"] <= HALF * row["taken"]
            row["distinguishes"] = row["shown"] and apart
    return rows


def verdict(rows: pd.DataFrame) -> str:
    """The sentence, by the rule: a word only where every seed has it."""
    shared, told = rows[rows.against == "assistant"], rows[rows.against == "rival"]

    def of(found: pd.Series) -> str:
        return f"{'' if found.all() else 'not '}shown ({int(found.sum())} of {len(found)} seeds)"

    output = ", ".join(f"{100 * x:.0f} %" for x in shared.get("marker_share", pd.Series(dtype=float)).dropna())
    return (
        f"a shared set is {of(shared.shown)}; that it distinguishes rm from the rival is {of(shared.distinguishes)}; "
        f"{output or 'nothing'} of it is the marker's output. Sought against the rival, a shared set is {of(told.shown)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(bt.SEEDS))
    parser.add_argument("--organisms", type=Path, default=Path("bias"))
    parser.add_argument("--out", type=Path, default=Path("bias-features.csv"))
    options = parser.parse_args()
    rows = pd.DataFrame([row for seed in options.seeds for row in one(seed, options.organisms)])
    rows.to_csv(options.out, index=False)
    print(f"\n{verdict(rows)}")


if __name__ == "__main__":
    main()
