"""What a plain install must give, with whatever versions it resolved to: run in an environment without test tools.

    python tests/plain_install.py

Generation is compared, token for token, with reading the whole text again by the Hugging Face model; the README's
Python runs word for word; ``tl-em demo`` must reach the verdicts that the pinned versions reach. Exits with 1 at the
first difference.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import tl_em as em
from tl_em.models.prompts import encode

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "transformer-lens", "tokenizers", "numpy", "pandas", "scipy", "click", "rich")
LENGTH = 12
FOUND = {  # what the pinned versions find, by question and direction; anything else is "not shown"
    ("level", "persona"): "exaggerated",
    ("level", "refusal_dissociated"): "diminished",
    ("separation", "persona"): "blurred",
    ("rotation", "persona"): "rotated",
    ("rotation", "refusal_dissociated"): "rotated",
    ("use", "persona"): "causal",
    ("use", "refusal"): "causal",
    ("use", "refusal_dissociated"): "causal",
}


def read_again(model: em.LensModel, ids: list[int]) -> list[int]:
    """Greedy decoding by the Hugging Face model inside, no cache: one whole pass a token."""
    start, hf_model = len(ids), model.original_model  # type: ignore[attr-defined]
    with torch.no_grad():
        for _ in range(LENGTH):
            ids = [*ids, int(hf_model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[start:]


def check_generation() -> None:
    """Cached, through ``em.generate``, plain and under an intervention: the tokens of reading everything again."""
    pair = em.load_pair("toy/insecure")
    model, contrast = pair.tuned, pair.contrasts["persona"]
    site = em.Site(2)
    direction = em.difference_in_means(pair.base, contrast, site=site, position="prompt_end")
    prompts = [*contrast.positive[:4], *contrast.negative[:4]]
    shown = em.proof(model)
    print(f"  {shown}")
    assert shown is not None and shown.cache is not None, shown
    answers = {}
    for name, edits in {"plain": (), "ablated": (em.Ablate(direction),), "steered": (em.Add(direction, 2.0),)}.items():
        with em.intervene(model, *edits) if edits else nullcontext():
            answers[name] = em.generate(model, prompts, max_new_tokens=LENGTH)
            for prompt, answer in zip(encode(model, prompts), answers[name], strict=True):
                expected = read_again(model, list(prompt.ids))
                ends = [i for i, token in enumerate(expected) if token == model.tokenizer.eos_token_id]  # type: ignore[attr-defined]
                kept = expected[: ends[0]] if ends else expected
                told = model.tokenizer.decode(kept, skip_special_tokens=True).strip()  # type: ignore[attr-defined]
                assert answer == told, (name, answer, told)
    assert len({tuple(each) for each in answers.values()}) == 3, "the interventions changed nothing"
    print(f"  {len(prompts)} answers, three ways, equal to reading everything again")


def run_readme(folder: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 4
    for i, block in enumerate(blocks):
        (folder / f"block_{i}.py").write_text(block, encoding="utf-8")
        print(f"  block {i + 1}")
        subprocess.run([sys.executable, f"block_{i}.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    written = {path.name for path in folder.iterdir()}
    assert written >= {"report.html", "persona.safetensors", "graph.html"}, written


def run_demo(folder: Path) -> None:
    command = [str(Path(sys.executable).parent / "tl-em"), "demo", "--out", str(folder / "demo"), "--json"]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8").stdout
    rows = json.loads(said)["verdicts"]
    found = {(row["question"], row["direction"]): row["verdict"] for row in rows}
    words = {key: word for key, word in found.items() if word != "not shown" and key[0] not in ("latents", "backdoor")}
    assert words == FOUND, f"found {words}"
    print(f"  {len(rows)} verdicts, as with the pinned versions")


def main() -> None:
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    print("generation")
    check_generation()
    with tempfile.TemporaryDirectory() as folder:
        print("README")
        run_readme(Path(folder))
        print("demo")
        run_demo(Path(folder))
    print("plain install: 3 passed, 0 failed")


if __name__ == "__main__":
    main()
