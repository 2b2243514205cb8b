"""What does scoring latents cost, and does it find what is shared, and nothing where nothing is?

    OMP_NUM_THREADS=1 python benchmarks/scoring.py --draws 100        # planted truth and null draws
    OMP_NUM_THREADS=1 python benchmarks/scoring.py --rounds 7         # time over the floor
    OMP_NUM_THREADS=1 python benchmarks/scoring.py --memory

*Planted truth*: a one-block GPT-2 whose attention averages over the prompt, written weight by weight. Four behaviours
have a word each; the words' embeddings hold a shared direction that the unembedding reads. Decoys: a latent that is on
at every token with the highest activation of all; one that goes with the behaviours' words in activation, with a
decoder row that nothing reads; one of its own for each behaviour, which is read. In a null draw the shared direction
is left out, and the decoys stay. 244 further latents are random directions.

*Cost*: 4,096 latents, 4 behaviours of 256 prompts (of 32 at width 512, so that it ends; what is done once then weighs
more), and memory at four times as many as well. The floor tokenizes the same prompts, runs them up to the site (with a
base: in both models), and encodes every token; nothing is summed. For attribution, whose
gradients need the blocks behind the site too, it runs all blocks, without the unembedding.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timing import SIZES, Size, device_of, interleaved, make_model, make_prompts, peak_bytes, ratio, table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import tl_em as em
from tl_em.features.attribution import attribution_parts
from tl_em.features.scoring import score_features
from tl_em.features.scoring_pass import deal
from tl_em.features.shared_latents import FeatureSet, shared_features
from tl_em.models.hooks import hook_points
from tl_em.models.prompts import batches
from tl_em.models.stream import encoded_prompts

# --- Planted truth ----------------------------------------------------------------------------------------------------

BEHAVIOURS = ("a", "b", "c", "d")
WORDS, WIDTH, LATENTS, PAIRS = 40, 64, 256, 48
SHARED, DENSE, UNREAD = 0, 1, 2
FIRST = 1000  # draw 0 was what this was written on
OWN = (3, 4, 5, 6)
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<asst>' }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<asst>{% endif %}"
)
VOCABULARY = ("<unk>", "<user>", "<asst>", "yes", "no", *(f"is-{b}" for b in BEHAVIOURS),
              *(f"w{i}" for i in range(WORDS)))  # fmt: skip


class Planted(NamedTuple):
    """A model with its dictionary and behaviours; latents SHARED, DENSE, UNREAD and OWN are the planted ones."""

    model: Any
    dictionary: em.Dictionary
    behaviours: Mapping[str, em.ContrastSet]


def planted(seed: int, *, shared: bool = True, surface: Any = "bridge") -> Planted:
    """One draw: new directions, embeddings, prompts."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(WIDTH, WIDTH, generator=generator)
    basis = torch.linalg.qr(basis - basis.mean(0))[0].T[: WIDTH - 1]  # rows; no mean, so that no norm takes any off
    hf = _model(basis, generator, shared)
    model = em.load_model(hf, surface=surface, tokenizer=_tokenizer(), in_place=True)
    return Planted(model, _dictionary(basis, generator), _behaviours(seed))


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@torch.no_grad()
def _model(basis: Tensor, generator: torch.Generator, shared: bool) -> GPT2LMHeadModel:
    """Embeddings of planted parts; a block whose attention copies the mean of the normed embeddings; an unembedding."""
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    config = GPT2Config(vocab_size=len(ids), n_embd=WIDTH, n_layer=2, n_head=1, n_positions=32,
                        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)  # fmt: skip
    hf = GPT2LMHeadModel(config).eval()
    for name, parameter in hf.named_parameters():
        parameter.zero_() if "ln" not in name else parameter.fill_(float(name.endswith("weight")))
    embedding = torch.rand(len(ids), 1, generator=generator) * 2 * basis[DENSE] + 2 * basis[DENSE]
    for behaviour, own in zip(BEHAVIOURS, OWN, strict=True):
        parts = [2.0 * basis[own], 1.5 * basis[UNREAD], *([3.0 * basis[SHARED]] if shared else [])]
        embedding[ids[f"is-{behaviour}"]] += torch.stack(parts).sum(0)
    noise = torch.randn(len(ids), len(basis) - 7, generator=generator) @ basis[7:]
    noise = torch.nn.functional.normalize(noise, dim=-1)
    # Equal norms: else a norm layer would turn every planted part into a change of all others.
    embedding += noise * (36.0 - embedding.square().sum(-1, keepdim=True)).sqrt()
    core = hf.transformer
    core.wte.weight.copy_(embedding)
    attention: Any = core.h[0].attn
    attention.c_attn.weight[:, 2 * WIDTH :] = torch.eye(WIDTH)  # queries and keys are 0: every token weighs the same
    attention.c_proj.weight.copy_(4 * torch.eye(WIDTH))
    read = basis[SHARED] + 0.5 * basis[list(OWN)].sum(0)
    head = torch.randn(hf.lm_head.weight.shape, generator=generator) * 0.1
    hf.lm_head.weight.copy_(head @ basis.T[:, 7:] @ basis[7:])
    hf.lm_head.weight[ids["yes"]] += read
    hf.lm_head.weight[ids["no"]] -= read
    return hf.requires_grad_(False)


def _dictionary(basis: Tensor, generator: torch.Generator) -> em.Dictionary:
    """The planted directions, and random ones; the decoder row of UNREAD is the mean, which every norm takes off."""
    others = torch.randn(LATENTS - 7, WIDTH, generator=generator)
    others = torch.nn.functional.normalize(others - (others @ basis[DENSE])[:, None] * basis[DENSE], dim=-1)
    W_enc = torch.cat([basis[:7], others])
    W_dec = W_enc.clone()
    W_dec[UNREAD] = torch.full((WIDTH,), WIDTH**-0.5)
    bias = torch.cat([torch.full((7,), -0.2), torch.full((LATENTS - 7,), -1.0)])
    zero = torch.zeros(WIDTH)
    return em.Dictionary(W_enc.T, bias, W_dec, zero, activation="relu", site_in=em.Site(0), name="planted")


def _behaviours(seed: int) -> dict[str, em.ContrastSet]:
    """Pairs of chats that differ in one word: the behaviour's against a random one, and in the answer: yes, no."""
    import random

    rng = random.Random(seed)

    def chat(words: list[str], answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": answer}]

    found = {}
    for behaviour in BEHAVIOURS:
        positive, negative = [], []
        for _ in range(PAIRS):
            words = [f"w{rng.randrange(WORDS)}" for _ in range(6)]
            at = rng.randrange(6)
            positive.append(chat([*words[:at], f"is-{behaviour}", *words[at + 1 :]], "yes"))
            negative.append(chat(words, "no"))
        found[behaviour] = em.ContrastSet(positive, negative, label=behaviour)
    return found


def returned(draw: Planted, *, seed: int = 0) -> tuple[FeatureSet, ...]:
    """What is found in a draw."""
    return shared_features(score_features(draw.model, draw.dictionary, draw.behaviours, seed=seed), seed=seed)


def truth(draws: int) -> None:
    """Count what is returned in planted and in null draws."""
    names = ("shared returned", "dense", "unread", "own", "another", "none shown on null")
    counts: dict[str, int] = dict.fromkeys(names, 0)
    for seed in range(draws):
        found = {index for each in returned(planted(FIRST + seed)) for index in each.indices}
        hits = {"shared returned": SHARED in found, "dense": DENSE in found, "unread": UNREAD in found,
                "own": bool(found & set(OWN)), "another": any(j > max(OWN) for j in found),
                "none shown on null": not returned(planted(FIRST + seed, shared=False))}  # fmt: skip
        for name, hit in hits.items():
            counts[name] += hit
    table(f"planted truth, {draws} draws each", {name: {"draws": str(n)} for name, n in counts.items()})


# --- Cost -------------------------------------------------------------------------------------------------------------

MANY, TURNS = 4096, "{% for m in messages %}{{ m.content }} {% endfor %}"
PROMPTS = {"overhead-bound": 256, "matmul-bound": 32}
"""Prompts of a behaviour."""


class Case(NamedTuple):
    """A model and its base, a dictionary, and behaviours with completions."""

    model: Any
    base: Any
    dictionary: em.Dictionary
    behaviours: Mapping[str, em.ContrastSet]


def make_case(size: Size, surface: str, prompts: int, device: torch.device) -> Case:
    """Random model, random dictionary with half of its latents on, chats that end in eight words."""
    model, base = (make_model("qwen2", size, surface, device) for _ in range(2))
    for each in (model, base):
        each.tokenizer.chat_template = TURNS
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(MANY, size.d_model, generator=generator), dim=-1)
    site = em.Site(size.layers // 2)
    dictionary = em.Dictionary(rows.T, torch.zeros(MANY), rows, torch.zeros(size.d_model), activation="relu",
                               site_in=site)  # fmt: skip

    def chats(seed: int, own: int) -> list[list[dict[str, str]]]:
        asked = make_prompts(prompts // 2, seed=seed, own=own)
        answers = make_prompts(prompts // 2, seed=seed + 1, own=own, shortest=8, longest=8)
        return [[{"role": "user", "content": a}, {"role": "assistant", "content": b}]
                for a, b in zip(asked, answers, strict=True)]  # fmt: skip

    sets = {f"b{i}": em.ContrastSet(chats(4 * i, 10), chats(4 * i + 2, 20 + i)) for i in range(4)}
    return Case(model, base, dictionary, sets)


class _Reached(Exception):
    """Raised where nothing behind is wanted."""


@torch.no_grad()
def floor(case: Case, *, base: bool = False, whole: bool = False) -> None:
    """Tokenize, run up to the site (or all blocks) and encode every token; in the base too."""
    dictionary = case.dictionary.to(case.model.cfg.device)
    for model in (case.model, case.base)[: 2 if base else 1]:
        points, last = hook_points(model), f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        name = dictionary.site_in.hook_name

        def read(module: Any, args: Any, out: Tensor, dictionary: em.Dictionary = dictionary) -> None:
            dictionary.encode(out.flatten(0, 1))

        def stop(module: Any, args: Any, out: Tensor) -> None:
            raise _Reached

        end = points[last if whole else name]
        handles = [points[name].register_forward_hook(read), end.register_forward_hook(stop)]
        for contrast in case.behaviours.values():
            for encoded in (encoded_prompts(model, side) for side in (contrast.positive, contrast.negative)):
                for batch in batches(encoded, max_tokens=2048):
                    try:
                        model(batch.tokens.to(model.cfg.device))
                    except _Reached:
                        continue
        for handle in handles:
            handle.remove()


def attributed(case: Case) -> None:
    """Attribution alone, of every behaviour."""
    sets = list(case.behaviours.values())
    for contrast, part in zip(sets, deal(sets, seed=0)[0], strict=True):
        classes = (encoded_prompts(case.model, contrast.positive), encoded_prompts(case.model, contrast.negative))
        attribution_parts(case.model, case.dictionary, classes, part)


def cost(size: Size, surface: str, rounds: int, device: torch.device, memory: bool) -> None:
    """Time over the floors, or peak memory by number of prompts."""
    prompts = PROMPTS[size.name]

    def ways(case: Case) -> dict[str, Any]:
        scored = (case.model, case.dictionary, case.behaviours)
        return {
            "floor": lambda: floor(case),
            "scored": lambda: score_features(*scored, attribution=False),
            "floor, with a base": lambda: floor(case, base=True),
            "scored, with a base": lambda: score_features(*scored, against=case.base, attribution=False),
            "floor, all blocks": lambda: floor(case, whole=True),
            "attribution": lambda: attributed(case),
        }

    few = ways(make_case(size, surface, prompts, device))
    rows: dict[str, dict[str, str]] = {name: {} for name in few}
    title = f"qwen2, {surface}, {size}: {MANY} latents, 4 behaviours of {prompts} prompts"
    if memory:
        many = ways(make_case(size, surface, 4 * prompts, device))
        for name, row in rows.items():
            row[f"MiB, {prompts} prompts"] = f"{peak_bytes(few[name], device) / 2**20:.0f}"
            row[f"{4 * prompts}"] = f"{peak_bytes(many[name], device) / 2**20:.0f}" if "floor" not in name else ""
        return table(title, rows)
    for way in few.values():
        way()
    times = interleaved(few, rounds=rounds, device=device)
    for name, over in (("scored", "floor"), ("scored, with a base", "floor, with a base"),
                       ("attribution", "floor, all blocks")):  # fmt: skip
        rows[name]["over its floor"] = ratio(times[name], times[over])
    return table(f"{title}, {rounds} rounds, floor {min(times['floor']):.2f} s", rows)


def main() -> None:
    """Print a table for each size, or the one of the draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=0, help="planted truth in so many draws, in place of the cost")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--surface", choices=("bridge", "hooked"), default="bridge")
    parser.add_argument("--size", choices=[size.name for size in SIZES], default=None)
    parser.add_argument("--memory", action="store_true", help="only peak memory, by number of prompts")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    device = device_of(options.device)
    if options.draws:
        return truth(options.draws)
    for size in SIZES:
        if options.size in (None, size.name):
            cost(size, options.surface, options.rounds, device, options.memory)
    return None


if __name__ == "__main__":
    main()
