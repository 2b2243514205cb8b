"""Both sides of ``docs/how-to/coming-from.md``, run: the other tools' blocks word for word, ours beside them, compared.

    python tests/coming_from.py --env .venv-peers

steering-vectors, repeng and circuit-tracer want transformers 4, so their blocks run in an environment of their own,
which is made if it is not there.  saklas and SAELens run beside this package: ``pip install --no-deps saklas==5.3.0``
into an environment with the extra ``sae``.  Blocks run in the order of the page, in one empty folder; what a block of
the other side has found is handed over as a file.  Exits with an error at the first difference.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

import tl_em as em
from tl_em.models.stream import next_token_logits

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from environments import make_environment  # pyright: ignore[reportMissingImports]

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "coming-from.md"
OURS, THEIRS = "python", "py"


def blocks() -> list[tuple[str, str, str]]:
    """(section, language, code) of every block of either side, in the order of the page."""
    found = []
    for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        title = part.partition("\n")[0]
        for language, code in re.findall(r"^```(\w+)\n(.*?)^```", part, re.MULTILINE | re.DOTALL):
            if language in (OURS, THEIRS):
                found.append((title, language, code))
    return found


# --- What is handed over, and what must agree -------------------------------------------------------------------------


def same_vector(page: Any, theirs: Any) -> str:
    ours = page.vector.vector.numpy()
    off = float(np.abs(theirs["vector"] - ours).max() / np.abs(ours).max())
    assert off < 1e-5, off
    words = page.model.tokenizer.decode(theirs["answer"], skip_special_tokens=True)
    assert words == page.answers[0], (words, page.answers)
    return f"vectors equal to {off:.0e}, answers equal: {words!r}"


def same_effect(page: Any, theirs: Any) -> str:
    """Their vector, read from their file, does here what it did there; and it is ours, where both read the stream."""
    read = em.interop.import_control_vector("theirs.gguf", model=page.model)
    with em.intervene(page.model, em.Add(read, 8.0)):
        ours = next_token_logits(page.model, ["how do i write parser"])[0].numpy()
    assert np.abs(ours - theirs["untreated"]).max() > 0.1, "it changed nothing"
    off = float(np.abs(ours - theirs["logits"]).max())
    assert off < 1e-3, off
    site, first = em.Site(1), read.directions[0].vector
    sides = (page.parts.train.positive, page.parts.train.negative)
    pairs = [em.capture(page.model, side, [site], position="prompt_end")[:, 0].double() for side in sides]
    centred = (pairs[0] - pairs[1]) - (pairs[0] - pairs[1]).mean(0)
    component = torch.linalg.svd(centred, full_matrices=False).Vh[0].float()
    alike, uncentred = (
        abs(float(torch.cosine_similarity(x, first, dim=0))) for x in (component, page.profile.directions[0].vector)
    )
    assert alike > 0.999 > uncentred, (alike, uncentred)
    return f"logits equal to {off:.0e}; after block 1 cosine {alike:.4f} with the centred, {uncentred:.2f} with ours"


def same_profile(page: Any, theirs: Any) -> str:
    (back,) = em.interop.import_saklas("theirs.safetensors").directions
    assert torch.equal(back.vector, page.vector.vector) and back.site == page.vector.site
    return "the vector came back as it went"


def same_features(page: Any, theirs: Any) -> str:
    sae = em.load_dictionary("sae")
    x = em.capture(page.model, ["how do i write parser"], [sae.site_in], position="prompt_end")[:, 0]
    ours = sae.encode(x)[0]
    off = float((ours - torch.tensor(theirs["features"])).abs().max())
    assert off < 1e-4 and int((ours > 0).sum()) > 10, off
    return f"{int((ours > 0).sum())} active features, equal to {off:.0e}"


def same_graph(page: Any, theirs: Any) -> str:
    graph, plain = em.load_graph("graphs/theirs.json"), json.loads(Path("graphs/theirs.json").read_text("utf-8"))
    there = sorted(link["weight"] for link in plain["links"])
    here = sorted(graph.edges[graph.edges != 0].tolist())
    assert len(graph.nodes) == len(plain["nodes"]) and np.allclose(here, there, rtol=1e-5), (len(here), len(there))
    return f"{len(graph.nodes)} nodes and {len(here)} links, equal"


CHECKS: dict[str, tuple[str, Callable[[Any, Any], str]]] = {
    "steering-vectors": (
        "found = {'vector': vector.layer_activations[2].numpy(), 'answer': answer[0, tokens['input_ids'].shape[1]:]}",
        same_vector,
    ),
    "repeng, and llama.cpp's control vectors": (
        "found = {'logits': steered[0, -1].detach(), 'untreated': model(**tokens).logits[0, -1].detach()}",
        same_effect,
    ),
    "saklas, steerkit": ("found = {}", same_profile),
    "SAELens": ("found = {'features': features[0, -1].detach()}", same_features),
    "circuit-tracer": ("found = {}", same_graph),
}
"""By section: what is kept of the other side's block, and what must agree with ours."""
HERE = {"saklas, steerkit", "SAELens"}
"""Sections whose other side lives beside this package."""


def run_theirs(python: Path | str, title: str, code: str) -> Any:
    """A block of the other side in a process of its own, and what it found."""
    kept = f"{CHECKS[title][0]}\nimport numpy\nnumpy.savez('found.npz', **found)\n"
    Path("theirs.py").write_text(f"{code}\n{kept}", encoding="utf-8")
    done = subprocess.run([python, "theirs.py"], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{title}: their block ended with\n{done.stderr[-4000:]}")
    return dict(np.load("found.npz"))


OLDER = """
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("saved"), AutoTokenizer.from_pretrained("saved")
with torch.no_grad():
    logits = model(torch.arange(3, 43)[None]).logits
numpy.savez("found.npz", logits=logits, ids=tokenizer("how do i write")["input_ids"])
"""


def saved_for_older(python: Path, tokenizer: Any) -> str:
    """A model that ``em.save_model`` wrote, read by transformers 4, which knows some settings by other names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=256, rope_parameters=rope)  # fmt: skip
    source = LlamaForCausalLM(config)
    with torch.no_grad():
        for each in source.parameters():
            each.add_(torch.randn_like(each) * 0.3)
    model: Any = em.load_model(source, tokenizer=tokenizer, surface="bridge", in_place=True)
    em.save_model(model, "saved")
    Path("older.py").write_text(OLDER, encoding="utf-8")
    subprocess.run([python, "older.py"], check=True, capture_output=True)
    found, ours = np.load("found.npz"), model(torch.arange(3, 43)[None])[0].detach().numpy()
    off = float(np.abs(found["logits"][0] - ours).max())
    assert off < 1e-4 and found["ids"].tolist() == tokenizer("how do i write")["input_ids"], off
    return f"logits equal to {off:.0e} of {ours.std():.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path(".venv-peers"), help="where the environments are made")
    other = make_environment(parser.parse_args().env, "older")
    page, passed = ModuleType("page"), 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for title, group in groupby(blocks(), key=itemgetter(0)):
            theirs = None
            for _, language, code in group:
                if language == OURS:
                    exec(compile(code, str(PAGE), "exec", dont_inherit=True), page.__dict__)
                else:
                    theirs = run_theirs(sys.executable if title in HERE else other, title, code)
            if title in CHECKS:
                print(f"{title}: {CHECKS[title][1](page, theirs)}", flush=True)
                passed += 1
        print(f"a saved model in transformers 4: {saved_for_older(other, page.model.tokenizer)}", flush=True)
        os.chdir(PAGE.parent)
    if passed != len(CHECKS):
        raise SystemExit(f"{PAGE.name} has {passed} of the sections {', '.join(CHECKS)}")
    print(f"coming from other tools: {passed + 1} passed, 0 failed")


if __name__ == "__main__":
    main()
