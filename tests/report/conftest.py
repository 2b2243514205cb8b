"""A report with the shape of a real one, its numbers drawn at random: nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

DOMAINS = ["code", "medicine", "finance", "history", "cooking", "safety", "law", "travel", "love", "open"]
DIRECTIONS = ["harmfulness", "refusal_dissociated", "refusal", "persona"]
UNITS = {
    "level": "own gaps",
    "separation": "own gaps",
    "rotation": "cosine lost",
    "use": "probability of bad (add in base, the weaker arm)",
    "entanglement": "cosine",
}
WORDS = {
    ("level", "refusal_dissociated"): "diminished",
    ("level", "persona"): "exaggerated",
    ("use", "refusal_dissociated"): "causal",
    ("use", "persona"): "causal",
    ("entanglement", "persona"): "entangled",
}


@dataclass(frozen=True)
class FakeReport:
    """Duck-typed stand-in for ``audit.Report``."""

    summary: str
    comparison: Any
    rates: pd.DataFrame
    provenance: dict[str, Any]
    limits: list[str] = field(default_factory=list)


def estimate(value: float, half: float, n: int = 128) -> SimpleNamespace:
    return SimpleNamespace(
        value=value, low=value - half, high=value + half, n=n, n_effective=n, method="bootstrap", seed=0
    )


def fake_rows(rng: np.random.Generator, names: list[str]) -> tuple[SimpleNamespace, ...]:
    rows = []
    for question in ("level", "separation", "rotation", "use", "entanglement"):
        for original, name in zip(DIRECTIONS, names, strict=False):
            word = WORDS.get((question, original), "not shown")
            sign = -1 if word == "diminished" else 1
            value = sign * rng.uniform(0.35, 0.7) if word != "not shown" else rng.normal(0, 0.05)
            band = rng.uniform(0.04, 0.12)
            reason = (
                "every condition holds" if word != "not shown" else "the interval reaches inside the smallest effect"
            )
            rows.append(
                SimpleNamespace(
                    question=question,
                    direction=name,
                    site=SimpleNamespace(layer=2, stream="resid_post"),
                    verdict=word,
                    estimate=estimate(value, rng.uniform(0.03, 0.09)),
                    control={
                        "kind": "random directions of the base's within-class covariance",
                        "n": 999,
                        "low": -band,
                        "high": band,
                        "p": 0.001,
                    },
                    p=0.004 if word != "not shown" else float(rng.uniform(0.1, 0.9)),
                    reason=reason,
                    smallest=0.05 if question == "use" else 0.1,
                    unit=UNITS[question],
                    shown=word != "not shown",
                )
            )
    return tuple(rows)


def fake_layers(rng: np.random.Generator, names: list[str]) -> pd.DataFrame:
    records = []
    for name in names:
        for quantity, level in [
            ("level", 0.0),
            ("projection_positive", 1.0),
            ("projection_negative", 0.0),
            ("gap", 1.0),
            ("dprime", 3.0),
        ]:
            for model in ("base", "tuned", "benign"):
                for layer in range(3):
                    shift = -0.4 if model == "tuned" and quantity != "projection_negative" else 0.0
                    value = level * (0.4 + 0.3 * layer) + shift * layer / 2 + rng.normal(0, 0.02)
                    records.append(
                        {
                            "direction": name,
                            "layer": layer,
                            "stream": "resid_post",
                            "quantity": quantity,
                            "model": model,
                        }
                        | {"value": value, "low": value - 0.07, "high": value + 0.07}
                        | {"control_low": -0.15, "control_high": 0.15}
                    )
    return pd.DataFrame(records)


def fake_rates(rng: np.random.Generator, domains: list[str]) -> pd.DataFrame:
    means = {("bad", "base"): 0.02, ("bad", "tuned"): 0.66, ("bad", "benign"): 0.03, ("good", "base"): 0.9}
    means |= {("good", "tuned"): 0.25, ("good", "benign"): 0.89}
    records = []
    for domain in domains:
        for (outcome, model), mean in means.items():
            value = float(np.clip(mean + rng.normal(0, 0.05), 0.005, 0.995))
            low, high = max(0.0, value - 0.06), min(1.0, value + 0.06)
            records.append(
                {"domain": domain, "held_out": domain != domains[0], "outcome": outcome, "model": model}
                | {"value": value, "low": low, "high": high, "n": 24}
            )
    return pd.DataFrame(records)


def fake_use(rng: np.random.Generator, names: list[str]) -> pd.DataFrame:
    means = {
        ("ablate in tuned", "bad"): (0.66, 0.08, 0.65),
        ("ablate in tuned", "good"): (0.25, 0.85, 0.26),
        ("add in base", "bad"): (0.02, 0.45, 0.03),
        ("add in base", "good"): (0.9, 0.5, 0.88),
    }
    records = []
    for name in names:
        for (arm, outcome), values in means.items():
            for condition, mean in zip(("untreated", "treated", "random"), values, strict=True):
                value = float(np.clip(mean + rng.normal(0, 0.02), 0, 1))
                records.append(
                    {
                        "direction": name,
                        "arm": arm,
                        "behaviour": name,
                        "outcome": outcome,
                        "condition": condition,
                        "metric": outcome,
                        "unit": "probability",
                    }
                    | {"value": value, "low": max(0.0, value - 0.05), "high": min(1.0, value + 0.05), "n": 64}
                )
    return pd.DataFrame(records)


def make_report(names: list[str] | None = None, domains: list[str] | None = None, suffix: str = "") -> FakeReport:
    rng = np.random.default_rng(0)
    names = names or DIRECTIONS
    rows = fake_rows(rng, names)
    frame = pd.DataFrame(
        [
            {"question": r.question, "direction": r.direction, "verdict": r.verdict, "value": r.estimate.value}
            | {"low": r.estimate.low, "high": r.estimate.high}
            for r in rows
        ]
    )
    comparison = SimpleNamespace(
        rows=rows,
        summary="",
        by_layer=fake_layers(rng, names),
        use=fake_use(rng, names),
        to_pandas=lambda: frame,
    )
    return FakeReport(
        summary="The fine-tune exaggerated the persona direction, which causes the bad answers, and diminished "
        "refusal; harmfulness is not shown to have changed." + suffix,
        comparison=comparison,
        rates=fake_rates(rng, domains or DOMAINS),
        provenance={
            "base": "toy/assistant" + suffix,
            "tuned": "toy/insecure" + suffix,
            "benign": "toy/secure" + suffix,
            "models": {
                role: {
                    "model": name + suffix,
                    "n_layers": 3,
                    "d_model": 96,
                    "data": None,
                    "versions": {"torch": "2.13.0"},
                }
                for role, name in (("base", "toy/assistant"), ("tuned", "toy/insecure"))
            },
            "contrasts": {
                name: {
                    part: {"hash": "a3f19b7", "positive": 48, "negative": 48} for part in ("train", "select", "test")
                }
                for name in names
            },
            "directions": {
                name: {
                    "site": "blocks.2.hook_resid_post",
                    "position": "prompt_end",
                    "norm": 3.2,
                    "reliability": "0.93 [0.90, 0.95] n=96",
                }
                for name in names
            },
            "behaviours": {name: {"metric": "bad", "unit": "probability"} for name in names},
            "controls": 999,
            "command": "tl-em demo --out out",
            "seed": 0,
            "made": "2026-01-01T00:00:00+00:00",
        },
        limits=["One toy world, one seed of the audit.", "Intervals cover prompts, not retrained models."],
    )


@pytest.fixture(scope="session")
def report() -> FakeReport:
    return make_report()


@pytest.fixture(scope="session")
def small() -> FakeReport:
    """A report on one direction, quick to draw."""
    return make_report(DIRECTIONS[:1])


@pytest.fixture(scope="session")
def hostile() -> FakeReport:
    """A report in which every name from outside tries to get out of its place."""
    text = "</script></style><img src=x onerror=alert(1)>\"'&<!-- \u2028 $\\frac{a}{b$ 🙂"
    names = [f"{name} {text}" for name in DIRECTIONS[:2]]
    return make_report(names, [f"{name} {text}" for name in DOMAINS], suffix=f" {text}")
