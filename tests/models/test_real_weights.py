"""Real weights with published figures, where their folder is beside the repository."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch

from tl_em.models.class_means import class_moments
from tl_em.models.contrasts import ContrastSet
from tl_em.models.generate import generate
from tl_em.models.loading import load_model
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.sites import Site
from tl_em.models.stream import capture, next_token_logits

DATA = Path(__file__).parents[2] / "../shared/data"

if (DATA / "model-stories260k").is_dir():

    def test_girl_and_boy_are_far_apart_in_a_real_model(surface: str) -> None:
        model = load_model(DATA / "model-stories260k/hf", surface=surface)
        train, _, test = ContrastSet.load("gender").split(seed=0)
        sites = [Site(2), Site(3)]
        directions = class_moments(model, train, sites=sites, positions=["prompt_end"]).difference[0]
        for column, direction in enumerate(directions):
            girls, boys = (
                capture(model, p, sites, position="prompt_end")[:, column] @ direction
                for p in (test.positive, test.negative)
            )
            spread = ((girls.var() + boys.var()) / 2).sqrt()
            assert float((girls.mean() - boys.mean()) / spread) > 10

    def test_a_real_model_tells_a_story(surface: str) -> None:
        model = load_model(DATA / "model-stories260k/hf", surface=surface)
        (answer,) = generate(model, ["Once upon a time there was a little girl"], max_new_tokens=24)
        assert answer.startswith("named Lily. She loved to play")


if (DATA / "model-nano-sort").is_dir():
    # Published activation -> where it is read here.
    PARTIALS = {
        "x": Site(0, "resid_pre"),
        "yProj": Site(0, "attn_out"),
        "attnResid": Site(0, "resid_mid"),
        "ln2": Site(0, "mlp_in"),
        "mlp": Site(0, "mlp_out"),
        "block0": Site(0),
        "block1": Site(1),
        "block2": Site(2),
    }

    def published(record: dict[str, Any]) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(record["data"])), dtype=torch.float32).view(record["shape"])

    def test_published_activations_are_found_under_our_names(surface: str) -> None:
        partials = json.loads((DATA / "model-nano-sort/gpt-nano-sort-t0-partials.json").read_text())
        model = load_model(DATA / "model-nano-sort/hf", surface=surface)
        prompts = [EncodedPrompt.from_ids(row) for row in published(partials["idx"]).int().tolist()]
        for position in (-1, -4):
            found = capture(model, prompts, list(PARTIALS.values()), position=position)
            for column, name in enumerate(PARTIALS):
                # Sums in another order: TransformerLens itself is off by 2.4e-6.
                torch.testing.assert_close(
                    found[:, column], published(partials[name])[:, position], rtol=1e-4, atol=1e-5
                )
        torch.testing.assert_close(
            next_token_logits(model, prompts), published(partials["lm_head"])[:, -1], rtol=1e-4, atol=1e-4
        )
