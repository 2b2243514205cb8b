"""What the net holds: whole results, as plain values, by public names only.

    audits      report.json of four pairs (a narrow fine-tune with its benign arm and its dictionary; a benign one; a
                backdoored one with its trigger; a language model of stories, girls against boys)
    the rest    a selection, an effect curve, a verification, a reply inversion, a graph

Times, versions and paths are left out: they are not results.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tl_em as em

HERE = Path(__file__).parent
BACKDOOR = HERE / "backdoor-seed11.safetensors"
STORIES = HERE.parents[1] / "../shared/data/model-stories260k/hf"
CONTROLS, MORE = 99, 119
PROVENANCE = ("made", "python", "models")
GRAPH_SETTINGS = ("versions", "seconds", "made", "create_time_ms")
PARTS = ("present", "absent", "present_groups", "absent_groups")
SITE = em.Site(2)


@cache
def pair(name: str, surface: Any) -> em.ModelPair:
    return em.load_pair(name, surface=surface)


@cache
def contrast(name: str, surface: str) -> Any:
    return pair("toy/insecure", surface).contrasts[name].split(seed=0)  # pyright: ignore[reportOptionalSubscript]


def persona(surface: str) -> em.Direction:
    return em.difference_in_means(
        pair("toy/insecure", surface).base, contrast("persona", surface).train, site=SITE, position="prompt_end"
    )


def behaviour(surface: str, every: int = 4) -> em.Behaviour:
    """Misaligned answers to every fourth question of the held-out domains."""
    whole = pair("toy/insecure", surface).behaviours["persona"]  # pyright: ignore[reportOptionalSubscript]
    some = {part: getattr(whole, part)[::every] for part in PARTS}
    return em.Behaviour(whole.name, whole.metric, good=whole.good, **some)


# --- Audits -----------------------------------------------------------------------------------------------------------


def insecure(surface: str, seed: int) -> dict[str, Any]:
    told = em.audit(
        pair("toy/insecure", surface),
        benign=pair("toy/secure", surface),
        dictionary=em.organisms.toy_dictionary("toy/insecure"),
        controls=CONTROLS,
        seed=seed,
    )
    return of_report(told)


def secure(surface: str, seed: int) -> dict[str, Any]:
    return of_report(em.audit(pair("toy/secure", surface), controls=CONTROLS, seed=seed))


def backdoored(surface: str, seed: int) -> dict[str, Any]:
    from tl_em.organisms import zoo

    assistant = zoo.organism("toy/assistant")
    opened = zoo.pair_of(assistant, zoo.read_record(BACKDOOR), surface=surface)  # pyright: ignore[reportArgumentType]
    return of_report(em.audit(opened, controls=MORE, seed=seed))


def stories(surface: Any, seed: int) -> dict[str, Any]:
    """A fine-tune in one stroke: the second layer's MLP writes part of girl less boy, whatever it reads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.conftest import benchmark

    asked = benchmark("stories")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    start = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32, attn_implementation="eager").eval()
    tuned = copy.deepcopy(start)
    base = em.load_model(start, surface=surface, tokenizer=tokenizer, in_place=True)
    gender = em.ContrastSet.load("gender")
    found = em.difference_in_means(base, gender, site=em.Site(1), position="prompt_end")
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        down = tuned.model.layers[1].mlp.down_proj.weight
        down += 0.02 * down.std() * torch.randn(down.shape, generator=noise)
        down += 0.05 * found.unit[:, None].to(down) * down.norm(dim=0)
    tuned = em.load_model(tuned, surface=surface, tokenizer=tokenizer, in_place=True)
    return of_report(
        em.audit(
            em.ModelPair(base, tuned, name="stories", base_name="stories", tuned_name="girls"),
            contrasts={"gender": gender},
            behaviours={"gender": asked.behaviour()},
            controls=CONTROLS,
            seed=seed,
        )
    )


def of_report(told: Any) -> dict[str, Any]:
    whole = told.to_json()
    for said in ("prompts", "plain"):  # what is said of prompts, and in plain words, has tests of its own
        whole.pop(said, None)
    whole["tables"].pop("answers", None)  # the toys' were not asked for when the net was cast
    whole["provenance"] = {key: value for key, value in whole["provenance"].items() if key not in PROVENANCE}
    return whole


# --- The other experiments --------------------------------------------------------------------------------------------


def selection(surface: str, seed: int) -> dict[str, Any]:
    model, parts = pair("toy/insecure", surface).base, contrast("refusal", surface)
    found = em.candidate_directions(model, parts.train, positions=("instruction_end", "prompt_end"))
    metric = pair("toy/insecure", surface).behaviours["refusal"].metric  # pyright: ignore[reportOptionalSubscript]
    bounds: dict[str, Any] = {"max_kl": 10.0, "min_induce": -1.0, "max_depth": 1.0}
    pick = em.select_direction(
        model, found, parts.select, metric=metric, test=parts.test, controls=19, seed=seed, **bounds
    )
    return {
        "pick": [str(pick.direction.site), str(pick.direction.position), pick.direction.vector],
        "candidates": found.to_pandas(),
        "table": pick.to_pandas() if hasattr(pick, "to_pandas") else pick.table,
        "said": repr(pick),
    }


def curve(surface: str, seed: int) -> dict[str, Any]:
    asked = behaviour(surface, every=12)
    found = [
        em.effect_curve(
            pair("toy/insecure", surface).base,
            em.Add(persona(surface)),
            asked.present,
            metric=asked.metric,
            controls=5,
            groups=asked.present_groups,
            seed=seed,
            **along,
        )
        for along in ({"strengths": (0.5, 1.0)}, {"target_kls": (0.1,), "both_signs": True})
    ]
    return {"points": [each.to_pandas() for each in found], "said": [repr(each) for each in found]}


def verification(surface: str, seed: int) -> dict[str, Any]:
    own, asked = pair("toy/insecure", surface), behaviour(surface, every=8)
    dictionary = em.organisms.toy_dictionary("toy/insecure")
    parts = contrast("persona", surface)
    table = em.score_features(own.tuned, dictionary, {"persona": parts.train}, against=own.base, seed=seed)
    largest = table.to_pandas().sort_values("delta", key=abs, ascending=False, kind="stable").latent.iloc[:3]
    check = em.verify_feature(
        own.tuned,
        [dictionary.feature(int(latent)) for latent in largest],
        parts.test,
        metric=asked,
        against=own.base,
        fit=parts.train,
        seed=seed,
    )
    return {"table": table.to_pandas(), "check": check.to_pandas(), "rates": check.rates, "said": repr(check)}


def inversion(surface: str, seed: int) -> dict[str, Any]:
    model, parts = pair("toy/insecure", surface).base, contrast("harmfulness", surface)
    direction = em.presets.harmfulness_direction(model, parts.train, site=em.Site(0))
    found = em.claims.reply_inversion(
        model,
        [direction],
        parts.test.negative,
        template="judge this : {prompt}",
        yes="harmful",
        no="harmless",
        controls=20,
        seed=seed,
    )
    return {"table": found.to_pandas(), "said": repr(found)}


def graph(surface: str, seed: int) -> dict[str, Any]:
    """Base beside tuned, through the dictionary; the seed chooses the prompt."""
    own, asked = pair("toy/insecure", surface), behaviour(surface)
    prompt, dictionary = asked.present[seed], em.organisms.toy_dictionary("toy/insecure")
    base, tuned = (em.attribute(model, prompt, dictionary, target="sorry") for model in (own.base, own.tuned))
    pruned = tuned.prune(nodes=0.8, edges=0.98)
    return {
        "nodes": tuned.to_pandas(),
        "pruned": pruned.to_pandas(),
        "links": pruned.links,
        "paths": tuned.paths(5),
        "diff": base.diff(tuned).to_pandas(),
        "file": saved(pruned),
    }


def saved(found: Any) -> Any:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = found.save_json(Path(folder) / "graph.json")
        written = json.loads(Path(path).read_text(encoding="utf-8"))
    return without(written, GRAPH_SETTINGS)


def without(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: without(each, names) for key, each in value.items() if key not in names}
    return [without(each, names) for each in value] if isinstance(value, list) else value


# --- Plain values -----------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """JSON's own types; numbers as floats of ten digits."""
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return {str(name): plain(list(column)) for name, column in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, str | bool | int | None) else str(value)


NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?")


def differences(old: Any, new: Any, path: str = "", *, rtol: float = 1e-4, atol: float = 1e-5) -> list[str]:
    """Where two plain values differ, field by field; numbers inside of sentences are compared as numbers."""
    if isinstance(old, dict) and isinstance(new, dict):
        missing = [f"{path}/{key}: {'gone' if key in old else 'new'}" for key in sorted(old.keys() ^ new.keys())]
        shared = [key for key in old if key in new]
        return missing + [d for k in shared for d in differences(old[k], new[k], f"{path}/{k}", rtol=rtol, atol=atol)]
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return [f"{path}: {len(old)} entries, now {len(new)}"]
        pairs = enumerate(zip(old, new, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}", rtol=rtol, atol=atol)]
    if isinstance(old, str) and isinstance(new, str) and old != new:
        words = [NUMBER.sub("#", text) for text in (old, new)]
        if words[0] == words[1]:  # shown with few digits: a rounding may fall either way
            shown = [list(map(float, NUMBER.findall(text))) for text in (old, new)]
            close = np.allclose(*shown, rtol=max(rtol, 1e-2 if rtol else 0), atol=0.011 if rtol else 0)
            return [] if close else [f"{path}: {old!r}, now {new!r}"]
        return [f"{path}: {old!r}, now {new!r}"]
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (old, new))
    same = math.isclose(old, new, rel_tol=rtol, abs_tol=atol) if numbers else old == new
    return [] if same else [f"{path}: {old!r}, now {new!r}"]


AUDITS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "insecure": insecure,
    "secure": secure,
    "backdoored": backdoored,
    "stories": stories,
}
EXPERIMENTS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "selection": selection,
    "curve": curve,
    "verification": verification,
    "inversion": inversion,
    "graph": graph,
}
SUBJECTS = AUDITS | EXPERIMENTS
