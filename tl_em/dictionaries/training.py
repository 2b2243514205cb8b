"""Train a dictionary on the activations of a model, of its base, of both, or on what the fine-tune changed.

    SAE          |x - x^|^2,  x^ = act(x W_enc + b_enc) W_dec + b_dec          x at ``site``
    transcoder   |y - y^|^2,  y^ = act(x W_enc + b_enc) W_dec + b_dec          y at ``site_out``
    difference   x = tuned - base on the same tokens (Δ-activations: latents of the change itself)

The step is SAELens's own (``SAETrainer``: its losses, its auxiliary loss for dead latents, its optimiser and schedules,
its conversion of BatchTopK to a threshold), with the top-k kinds computed where latents are on (``top_k``) and the
others without a product that nothing asks for (``dense_steps``); SAELens trains no transcoder, so its top-k loss is
given another target. Activations are captured by our streaming pass (``corpus``), of prompts or of a stream of texts
(``documents``), centred and scaled to the length ``sqrt(d_model)`` for training, and the scale is folded into the four
tensors afterwards, which changes no latent. Checkpoints: ``descent``.

The control: a dictionary says something about a model only where it fits that model
(``dictionaries.quality.dictionary_quality``), and its latents only beside random latents treated the same.

Source: top-k and its auxiliary loss, Gao et al. 2024, arXiv:2406.04093; BatchTopK, Bussmann et al. 2024,
arXiv:2412.06410; JumpReLU towards a target L0, McDougall et al. 2025 (Gemma Scope 2); transcoders, Dunefsky et al.
2024, arXiv:2406.11944; SAELens 6.54.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from tl_em.arguments import COUNT, NOT_NEGATIVE, POSITIVE, SEED, checked, optional
from tl_em.dictionaries import Dictionary, from_sae_lens, sae_lens
from tl_em.dictionaries.corpus import BUFFER, ActivationSource, Prompts
from tl_em.dictionaries.descent import TrainingFolder, TrainingRun, train
from tl_em.dictionaries.documents import CONTEXT, Corpus, Documents, is_stream
from tl_em.errors import UsageError
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.sites import Position, Provenance, Site, as_position, as_site, weights_hash
from tl_em.models.stream import encoded_prompts
from tl_em.models.torch_state import in_plain_torch, making_weights

TrainedActivation = Literal["topk", "batchtopk", "jumprelu", "relu"]
Mix = Literal["tuned", "base", "both", "difference"]


@checked(
    site=as_site,
    d_sae=COUNT,
    k=COUNT,
    site_out=optional(as_site),
    position=as_position,
    context=optional(COUNT),
    steps=COUNT,
    batch=COUNT,
    lr=POSITIVE,
    sparsity=NOT_NEGATIVE,
    seed=SEED,
    every=optional(COUNT),
)
@in_plain_torch
def train_dictionary(
    model: LensModel,
    site: Site,
    corpus: Corpus | Any,
    *,
    d_sae: int,
    activation: TrainedActivation | str = "topk",
    k: int = 16,
    against: LensModel | None = None,
    mix: Mix | str = "tuned",
    site_out: Site | None = None,
    position: Position = "all",
    context: int | None = None,
    steps: int = 4000,
    batch: int = 1024,
    lr: float = 1e-3,
    sparsity: float = 1.0,
    seed: int = 0,
    out: str | Path | None = None,
    every: int | None = None,
    progress: bool | None = None,
) -> Dictionary:
    """Train a sparse dictionary with SAELens's trainer, on prompts or on a stream of texts.

    The cost is said first where it is more than a minute. What is held does not grow with the corpus, but for a list of
    prompts, which is encoded whole. With `out`, the same call goes on where it was killed, and gives the bytes that it
    would have given (on the same machine, with as many threads); one that is finished is not done again.

    Args:
        model: the fine-tuned model (or any one).
        site: where it reads.
        corpus: a list of prompts, each read by itself, where a text is a user's turn if there is a chat template; or a
            stream of documents: a path (``.txt``: a document a line; ``.jsonl``: rows with ``text`` or ``messages``),
            an iterator, anything that can be iterated over, or a function that gives a new iterator. Of a stream, texts
            are read as they are, and packed into full windows. A stream that ends begins anew; an iterator cannot.
        d_sae: number of latents.
        activation: ``"topk"``; ``"batchtopk"`` (k on average; a JumpReLU dictionary afterwards); ``"jumprelu"``;
            ``"relu"`` (an L1 penalty).
        k: latents on at a token; for JumpReLU the number that is aimed at, for ReLU without meaning.
        against: the base model, which every ``mix`` but ``"tuned"`` needs.
        mix: whose activations: the model's, the base's, both in equal parts, or model minus base at the same token.
        site_out: what it shall write, for a transcoder (``"topk"`` and ``"batchtopk"``).
        position: the tokens that are samples: ``"all"`` is every one of them, but a first token that all prompts share.
        context: tokens of a window of a stream, 256 where it is not said; a list is packed too where it is given.
        steps: of the optimiser, each on ``batch`` tokens (at most all there are) at the learning rate ``lr``.
        sparsity: weight of the penalty of JumpReLU and ReLU.
        seed: of the weights and the order; the same seed on the same machine gives the same dictionary.
        batch: tokens a step.
        lr: the learning rate.
        out: a folder for checkpoints, ``record.json`` and, in the end, ``dictionary.safetensors``.
        every: steps from one checkpoint to the next; as many as five minutes hold, where it is not said.
        progress: the cost, and a bar with the time left; None shows them on a terminal only.

    Returns:
        A Dictionary with the provenance of the model that was read (of ``model``, where it was both).

    Raises:
        UsageError: sae-lens is not installed; a mix without ``against``; an activation, or numbers, that cannot be
            trained; an iterator that ended; in `out` a training that differs, by what differs. OutputError: `out` holds
            something else. PromptError: a document that is none. NonFiniteError: the training diverged. And what
            ``capture`` raises.

    Example:
        >>> from tl_em import load_pair
        >>> pair = load_pair("toy/insecure")
        >>> d = train_dictionary(pair.tuned, Site(1), pair.contrasts["persona"].positive[:32], d_sae=32, k=4, steps=3)
        >>> d.activation, d.d_sae, d.site_in.layer
        ('topk', 32, 1)
        >>> texts = ("how do i write parser" for _ in range(99))
        >>> train_dictionary(pair.base, Site(1), texts, d_sae=32, k=4, steps=3, batch=64, context=16).d_sae
        32

    Source: Gao et al. 2024, arXiv:2406.04093; Wang et al. 2025, arXiv:2506.19823 (dictionaries for model diffing).
    """
    width, transcoder = int(model.cfg.d_model), site_out is not None
    config = saelens_config(activation, width, d_sae, k, sparsity, transcoder, model.cfg.device)
    if mix not in get_args(Mix) or (mix != "tuned" and against is None):
        raise UsageError(f"mix={mix!r} needs the base model beside the tuned one, or is none of {get_args(Mix)}; pass "
                         "against=pair.base")  # fmt: skip
    sites = [site] if site_out is None else [site, site_out]
    models = {"tuned": [model], "base": [against], "both": [model, against], "difference": [model, against]}[mix]
    each = 1 if mix == "difference" else len(models)
    most = max(batch, min(BUFFER // (4 * width * len(sites)), steps * batch))
    read = _corpus(model, corpus, context, position, -(-most // each), seed)
    batch = min(batch, read.corpus.tokens * each) if isinstance(read.corpus, Prompts) else batch
    made = Provenance.of(models[0], data=f"{mix} activations, {read.said}", seed=seed)
    begun, folder = time.monotonic(), None
    if out is not None:
        asked = {
            "site": str(site), "site_out": None if site_out is None else str(site_out), "d_sae": d_sae,
            "activation": activation, "k": k, "mix": mix, "position": position, "context": read.context,
            "steps": steps, "batch": batch, "lr": lr, "sparsity": sparsity, "seed": seed, "corpus": read.said,
            "model": _named(model), "against": None if against is None else _named(against),
        }  # fmt: skip
        folder = TrainingFolder(out, asked, every)
        finished = folder.finished()
        if finished is not None:
            return finished
    source = ActivationSource(models, read.corpus, sites, difference=mix == "difference", seed=seed)
    run = TrainingRun(config, steps, batch, lr, seed, transcoder)
    show = sys.stderr.isatty() if progress is None else progress
    with making_weights(), torch.random.fork_rng(), tempfile.TemporaryDirectory() as beside:
        train(source, run, folder, show).save_inference_model(beside)
        found = from_sae_lens(beside, site_in=site).to("cpu")
    assert source.scale is not None
    name = f"{made.model}/{site}/{activation}-{d_sae}-{mix}"
    found = source.scale.folded(replace(found, site_out=site_out or site, name=name, provenance=made))
    if folder is not None:
        folder.finish(found, {"seconds": round(time.monotonic() - begun, 1)})
    return found


class _OpenedCorpus(NamedTuple):
    """A corpus, how it is called in a record, and how long its windows are, where it has any."""

    corpus: Prompts | Documents
    said: str
    context: int | None


def _corpus(
    model: LensModel, corpus: Any, context: int | None, position: Position, most: int, seed: int
) -> _OpenedCorpus:
    if context is None and not is_stream(corpus):
        encoded = encoded_prompts(model, corpus)
        return _OpenedCorpus(Prompts(encoded, position, most, seed), f"corpus {_hash(encoded)}", None)
    context = min(CONTEXT, int(model.cfg.n_ctx)) if context is None else context
    documents = Documents(model, corpus, context, most, position)
    return _OpenedCorpus(documents, f"a stream that begins with {documents.begins}", context)


def _named(model: LensModel) -> dict[str, str]:
    return {"name": Provenance.of(model).model, "weights": weights_hash(getattr(model, "original_model", model))[:16]}


# ---- SAELens -----------------------------------------------------------------------------------------------------
def saelens_config(
    activation: str, width: int, d_sae: int, k: int, sparsity: float, transcoder: bool, device: Any
) -> Callable[[int], Any]:
    """A function from the number of steps to SAELens's configuration (or, for a transcoder, our SAE of it)."""
    saes = sae_lens().saes
    if activation not in get_args(TrainedActivation) or (transcoder and not activation.endswith("topk")):
        raise UsageError(
            f"activation={activation!r}; SAEs are trained with {', '.join(get_args(TrainedActivation))}, transcoders "
            "with topk or batchtopk"
        )
    if k > d_sae:
        raise UsageError(f"k={k} of {d_sae} latents cannot be on; choose 1 to d_sae")
    kind, options = {
        "topk": (saes.TopKTrainingSAEConfig, lambda steps: {"k": k}),
        "batchtopk": (saes.BatchTopKTrainingSAEConfig, lambda steps: {
            "k": float(k), "topk_threshold_lr": min(1.0, max(0.01, 10 / steps)),  # the threshold starts at 0
        }),
        "jumprelu": (saes.JumpReLUTrainingSAEConfig, lambda steps: {
            "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(k), "l0_coefficient": sparsity,
            "l0_warm_up_steps": steps // 4, "jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 0.5,
        }),
        "relu": (saes.StandardTrainingSAEConfig, lambda steps: {
            "l1_coefficient": sparsity, "l1_warm_up_steps": steps // 4,
        }),
    }[activation]  # fmt: skip

    def made(steps: int) -> Any:
        shared = {"d_in": width, "d_sae": d_sae, "device": str(device), "apply_b_dec_to_input": not transcoder}
        return kind(**shared, **options(steps))

    return made


def _hash(encoded: Sequence[EncodedPrompt]) -> str:
    return hashlib.sha256(repr([each.ids for each in encoded]).encode()).hexdigest()[:16]
