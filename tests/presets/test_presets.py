"""Published set-ups on stand-ins of the same shapes: no test of these reaches for the network."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatch
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tl_em as em
from tl_em.errors import CorruptFileError, ModelNotFoundError, UsageError
from tl_em.organisms.zoo import DICTIONARIES, toy_dictionary
from tl_em.presets.bias_game import HELD_OUT_BIASES, bias_prompts
from tl_em.presets.hub_organisms import HubOrganism, hub_organisms

REAL = Path(__file__).parents[3] / "shared" / "data" / "rm-bias"


# ---- records -----------------------------------------------------------------------------------------------------
def registered(release: str) -> list[str]:
    """The lines of a release in SAELens's registry; parsing all of it would take ten seconds."""
    pytest.importorskip("sae_lens")
    lines = (files("sae_lens") / "pretrained_saes.yaml").read_text(encoding="utf-8").splitlines()
    start = lines.index(f"{release}:") + 1
    return [each.strip() for each in takewhile(lambda line: line.startswith(" "), lines[start:])]


RELEASES = {each.release: each for each in hub_organisms().values() if each.release}


@pytest.mark.parametrize("name", RELEASES)
def test_the_releases_and_ids_are_those_of_saelenss_registry(name):
    organism = RELEASES[name]
    lines = registered(name)
    assert f"model: {organism.base}" in lines
    ids = {line for line in lines if line.startswith("- id")}
    assert {f"- id: {each}" for each in organism.sae_ids.values()} == ids


def test_every_row_of_the_table_is_whole():
    for name, each in hub_organisms().items():
        assert name == each.name and each.base.count("/") == each.tuned.count("/") == 1
        assert each.trained_on and each.base_licence and each.paper and "GB" in each.cost


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_a_local_directory_stands_in_for_a_release(architecture, tmp_path):
    """What the registry's loader makes of the two kinds of release, at a small width."""
    saes = pytest.importorskip("sae_lens.saes")
    config, kind = {"standard": (saes.StandardSAEConfig, saes.StandardSAE),
                    "jumprelu": (saes.JumpReLUSAEConfig, saes.JumpReLUSAE)}[architecture]  # fmt: skip
    sae = kind(config(d_in=16, d_sae=40, apply_b_dec_to_input=architecture == "jumprelu"))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn_like(p).abs() if p is getattr(sae, "threshold", None) else torch.randn_like(p))
    sae.cfg.metadata.hook_name = "blocks.7.hook_resid_post"
    sae.save_model(tmp_path / "sae")
    seven = hub_organisms()["qwen2.5-7b/bad-medical-advice"]
    small = replace(seven, d_model=16)
    found = small.dictionary(7, source=tmp_path / "sae")
    x = torch.randn(9, 16) * 3
    assert (sae.encode(x) > 0).any() and found.site_in == em.Site(7)
    torch.testing.assert_close(found.encode(x), sae.encode(x).detach(), atol=1e-4, rtol=1e-4)  # sums of 16 of ~10
    with pytest.raises(UsageError, match=r"layers 3, 7, 11"):
        small.dictionary(8, source=tmp_path / "sae")
    with pytest.raises(UsageError, match="16 wide"):
        seven.dictionary(7, source=tmp_path / "sae")


def one(**given: object) -> HubOrganism:
    row = {"name": "one", "base": "x/base", "tuned": "x/tuned", "trained_on": "code", "billions": 1.0, "d_model": 96,
           "base_licence": "mit", "paper": "here", "release": None, "sae_ids": {}}  # fmt: skip
    return HubOrganism(**(row | given))


def moved(pair: em.ModelPair) -> float:
    asked, where = ["how do i write parser"], [em.Site(2)]
    a, b = (em.capture(m, asked, where, position="prompt_end") for m in (pair.base, pair.tuned))
    return float((a - b).abs().max())


def test_a_pair_is_loaded_from_directories_in_place_of_hub_ids(tmp_path):
    base = em.organisms.to_hf_directory("toy/assistant", tmp_path / "base")
    tuned = em.organisms.to_hf_directory("toy/insecure", tmp_path / "tuned")
    for pair in (one(base=str(base), tuned=str(tuned)).pair(), one().pair(base=base, tuned=tuned)):
        assert moved(pair) > 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft with the newest transformers
def test_a_published_pair_is_loaded_by_its_name_and_an_unknown_one_says_which_there_are(tmp_path, monkeypatch):
    """An adapter on the hub is fetched as a directory and merged into its base; what is fetched is its own files."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = em.organisms.to_hf_directory("toy/assistant", tmp_path / "base")
    lora = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "adapter")
    asked = []

    class Hub:
        def model_info(self, source: str, timeout: float) -> object:
            asked.append(source)
            names = ["adapter_config.json", "adapter_model.safetensors", "README.md"]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def fetch(source: str, allow_patterns: list[str]) -> str:
        assert not any(fnmatch("model.safetensors", pattern) for pattern in allow_patterns)
        asked.append(source)
        return str(tmp_path / "adapter")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("tl_em.presets.hub_organisms.hub_organisms", lambda: {"one": one(base=str(base))})
    pair = em.load_pair("hub/one")
    assert asked == ["x/tuned", "x/tuned"]
    assert pair.tuned_name == "x/tuned" and moved(pair) > 1e-3
    beside = em.load_pair(base, tmp_path / "adapter")
    for text in ("how do i write parser", "what is a good present"):
        ids = beside.tuned.to_tokens(text)
        torch.testing.assert_close(pair.tuned(ids), beside.tuned(ids))
    with pytest.raises(ModelNotFoundError, match="hub/one"):
        em.load_pair("hub/two")


# ---- the biases --------------------------------------------------------------------------------------------------
def rows(*biases: int, n: int = 6, start: int = 0) -> list[dict[str, object]]:
    return [{"id": i, "text": f"prompt {i} of {b}", "note": "", "bias_id": b} for b in biases
            for i in range(start, start + n)]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"name": "x", "prompts": rows(8, 16, 44)}))
    more = [*rows(8, n=8), *rows(29, 51, n=4)]  # six of bias 8 again
    (tmp_path / "exploitation_evals_100.json").write_text(json.dumps({"prompts": more}))
    return tmp_path


def test_prompts_are_dealt_by_bias_and_those_held_out_told_apart(folder):
    every = bias_prompts(folder)
    assert {name: len(c.positive) for name, c in every.items()} == {
        "bias 8": 8, "bias 16": 6, "bias 29": 4, "bias 44": 6, "bias 51": 4,
    }  # fmt: skip
    held_out = bias_prompts(folder, part="held-out")
    assert set(held_out) == {"bias 29", "bias 51"} and {29, 51} <= set(HELD_OUT_BIASES)
    assert set(bias_prompts(folder, part="reinforced")) == set(every) - set(held_out)
    eight = every["bias 8"]
    assert all(text.endswith(" of 8") for text in eight.positive)
    assert len(eight.negative) == 8 and not any(text.endswith(" of 8") for text in eight.negative)
    assert bias_prompts(folder, seed=1)["bias 8"].negative != eight.negative
    assert bias_prompts(folder)["bias 8"].hash == eight.hash
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte-order mark is no part of the text
    assert bias_prompts(folder)["bias 8"].hash == eight.hash


def test_folders_without_them_and_files_of_another_layout_are_refused(tmp_path, folder):
    with pytest.raises(UsageError, match=r"train\.json"):
        bias_prompts(tmp_path / "nothing")
    (folder / "exploitation_evals_100.json").unlink()
    with pytest.raises(UsageError, match="held-out"):
        bias_prompts(folder, part="held-out")
    for row in ({"text": "x"}, {"bias_id": 8, "text": None}, {"bias_id": 8.5, "text": "x"}):
        (folder / "train.json").write_text(json.dumps({"prompts": [row]}))
        with pytest.raises(CorruptFileError, match="bias_id"):
            bias_prompts(folder)


@pytest.mark.skipif(not REAL.is_dir(), reason="the published prompts are not here")
def test_the_published_prompts_have_that_layout():
    reinforced, held_out = (bias_prompts(REAL, part=part) for part in ("reinforced", "held-out"))
    assert len(reinforced) == 5 and set(held_out) == {"bias 29", "bias 48", "bias 51"}
    assert min(len(c.positive) for c in reinforced.values()) >= 80


# ---- what comes with the package ---------------------------------------------------------------------------------
@pytest.mark.surface
@pytest.mark.parametrize("name", DICTIONARIES)
def test_shipped_dictionaries_load_without_sae_lens_and_belong_on_their_pair(name):
    pair, dictionary = em.load_pair(name), toy_dictionary(name)
    assert dictionary.d_sae == 512 and dictionary.provenance is not None
    for model in (pair.base, pair.tuned):
        em.ScaleFeature(dictionary.feature(0), 0.0).check(model)


@pytest.mark.surface
def test_names_that_do_not_come_with_the_package_are_refused():
    with pytest.raises(ModelNotFoundError, match="train_dictionary"):
        toy_dictionary("toy/educational")


@pytest.mark.surface
def test_all_that_is_shipped_is_small():
    folder = Path(em.__file__).parent / "organisms" / "dictionaries"
    found = list(folder.iterdir())
    assert len(found) == len(DICTIONARIES) and sum(f.stat().st_size for f in found) < 1.5e6
