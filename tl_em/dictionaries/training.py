"""Train a dictionary on the activations of a model, of its base, of both, or on what the fine-tune changed.

    SAE          |x - x^|^2,  x^ = act(x W_enc + b_enc) W_dec + b_dec          x at ``site``
    transcoder   |y - y^|^2,  y^ = act(x W_enc + b_enc) W_dec + b_dec          y at ``site_out``
    difference   x = tuned - base on the same tokens (Δ-activations: latents of the change itself)

The loop is SAELens's own (``SAETrainer``: its losses, its auxiliary loss for dead latents, its conversion of BatchTopK
to a threshold); SAELens trains no transcoder, so its top-k loss is given another target. Nothing is logged, nothing but
the result is kept. Activations are captured by our streaming pass, centred and scaled to the length ``sqrt(d_model)``
for training, and the scale is folded into the four tensors afterwards, which changes no latent.

The control: a dictionary says something about a model only where it fits that model
(``dictionaries.quality.dictionary_quality``), and its latents only beside random latents treated the same.

Source: top-k and its auxiliary loss, Gao et al. 2024, arXiv:2406.04093; BatchTopK, Bussmann et al. 2024,
arXiv:2412.06410; JumpReLU towards a target L0, McDougall et al. 2025 (Gemma Scope 2); transcoders, Dunefsky et al.
2024, arXiv:2406.11944; SAELens 6.54.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tl_em.arguments import COUNT, NOT_NEGATIVE, POSITIVE, SEED, checked, optional
from tl_em.dictionaries import Dictionary, from_sae_lens, sae_lens
from tl_em.dictionaries.corpus import ActivationSource
from tl_em.errors import UsageError
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, Prompt
from tl_em.models.sites import Position, Provenance, Site, as_position, as_site
from tl_em.models.stream import encoded_prompts
from tl_em.models.torch_state import in_plain_torch, making_weights

TrainedActivation = Literal["topk", "batchtopk", "jumprelu", "relu"]
Mix = Literal["tuned", "base", "both", "difference"]
LONG = 60.0
"""Seconds above which the expected cost is told before the training starts."""
_PROBE = 8
"""Steps that the cost is told from."""


@checked(
    site=as_site,
    d_sae=COUNT,
    k=COUNT,
    site_out=optional(as_site),
    position=as_position,
    steps=COUNT,
    batch=COUNT,
    lr=POSITIVE,
    sparsity=NOT_NEGATIVE,
    seed=SEED,
)
@in_plain_torch
def train_dictionary(
    model: LensModel,
    site: Site,
    corpus: Sequence[Prompt | EncodedPrompt],
    *,
    d_sae: int,
    activation: TrainedActivation | str = "topk",
    k: int = 16,
    against: LensModel | None = None,
    mix: Mix | str = "tuned",
    site_out: Site | None = None,
    position: Position = "all",
    steps: int = 4000,
    batch: int = 1024,
    lr: float = 1e-3,
    sparsity: float = 1.0,
    seed: int = 0,
) -> Dictionary:
    """Train a sparse dictionary with SAELens's trainer.

    Args:
        model: the fine-tuned model (or any one).
        site: where it reads.
        corpus: prompts; of documents (chats that end with an answer) every token is a sample.
        d_sae: number of latents.
        activation: ``"topk"``; ``"batchtopk"`` (k on average; a JumpReLU dictionary afterwards); ``"jumprelu"``;
            ``"relu"`` (an L1 penalty).
        k: latents on at a token; for JumpReLU the number that is aimed at, for ReLU without meaning.
        against: the base model, which every ``mix`` but ``"tuned"`` needs.
        mix: whose activations: the model's, the base's, both in equal parts, or model minus base at the same token.
        site_out: what it shall write, for a transcoder (``"topk"`` and ``"batchtopk"``).
        position: the tokens that are samples: ``"all"`` is every one of them, but a first token that all prompts share.
        steps: of the optimiser, each on ``batch`` tokens (at most all there are) at the learning rate ``lr``.
        sparsity: weight of the penalty of JumpReLU and ReLU.
        seed: of the weights and the order; the same seed on the same machine gives the same dictionary.
        batch: tokens a step.
        lr: the learning rate; SAELens's own default without one.

    Returns:
        A Dictionary with the provenance of the model that was read (of ``model``, where it was both).

    Raises:
        UsageError: sae-lens is not installed; a mix without ``against``; an activation, or numbers, that cannot be
            trained. And what ``capture`` raises.

    Example:
        >>> from tl_em import load_pair
        >>> pair = load_pair("toy/insecure")
        >>> d = train_dictionary(pair.tuned, Site(1), pair.contrasts["persona"].positive[:32], d_sae=32, k=4, steps=3)
        >>> d.activation, d.d_sae, d.site_in.layer
        ('topk', 32, 1)

    Source: Gao et al. 2024, arXiv:2406.04093; Wang et al. 2025, arXiv:2506.19823 (dictionaries for model diffing).
    """
    config = _config(activation, int(model.cfg.d_model), d_sae, k, sparsity, site_out is not None, model.cfg.device)
    if mix not in get_args(Mix) or (mix != "tuned" and against is None):
        raise UsageError(f"mix={mix!r} needs the base model beside the tuned one, or is none of {get_args(Mix)}; pass "
                         "against=pair.base")  # fmt: skip
    sites = [site] if site_out is None else [site, site_out]
    models = {"tuned": [model], "base": [against], "both": [model, against], "difference": [model, against]}[mix]
    source = ActivationSource(models, encoded_prompts(model, corpus), sites, position, mix == "difference", seed)
    run = _Run(config, steps, min(batch, source.tokens), lr, seed)
    with making_weights(), torch.random.fork_rng(), _quiet(), tempfile.TemporaryDirectory() as folder:
        _tell_cost(source, run)
        trained = _fitted(source, run, steps)
        trained.save_inference_model(folder)
        found = from_sae_lens(folder, site_in=site).to("cpu")
    made = Provenance.of(models[0], data=f"{mix} activations, corpus {_hash(source.encoded)}", seed=seed)
    name = f"{made.model}/{site}/{activation}-{d_sae}-{mix}"
    return source.scale.folded(replace(found, site_out=site_out or site, name=name, provenance=made))


# ---- SAELens -----------------------------------------------------------------------------------------------------
class _Run(NamedTuple):
    config: Any
    steps: int
    batch: int
    lr: float
    seed: int


def _config(
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


def _sae(config: Any, transcoder: bool) -> Any:
    """SAELens's SAE for a configuration; a transcoder is one whose loss has the second half of a sample as target."""
    from sae_lens.saes import BatchTopKTrainingSAE, TopKTrainingSAE  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainingSAE, TrainStepOutput  # pyright: ignore[reportMissingImports]

    kind: Any = TrainingSAE.get_sae_class_for_architecture(config.architecture())
    if not transcoder:
        return kind(config)

    class Transcoder(kind):
        def training_forward_pass(self, step_input: Any) -> Any:
            read, target = step_input.sae_in.chunk(2, dim=-1)
            acts, before = self.encode_with_hidden_pre(read)
            written = self.decode(acts)
            loss = (written - target).pow(2).sum(-1).mean()
            dead = self.calculate_topk_aux_loss(target, written, before, step_input.dead_neuron_mask)
            if isinstance(self, BatchTopKTrainingSAE):
                self.update_topk_threshold(acts)
            losses = {"mse_loss": loss, "auxiliary_reconstruction_loss": dead}
            return TrainStepOutput(target, written, acts, before, loss + dead, losses)

    assert issubclass(kind, TopKTrainingSAE)
    return Transcoder(config)


def _fitted(source: ActivationSource, run: _Run, steps: int, batches: Iterator[Tensor] | None = None) -> Any:
    """SAELens's training SAE after so many steps."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.mixing_buffer import mixing_buffer  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    torch.manual_seed(run.seed)
    sae = _sae(run.config(steps), len(source.sites) > 1)
    config = SAETrainerConfig(
        total_training_samples=steps * run.batch,
        train_batch_size_samples=run.batch,
        lr=run.lr,
        lr_end=run.lr / 10,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        dead_feature_window=max(10, steps // 20),
        feature_sampling_window=steps + 1,  # the statistics of a window are only logged
        device=str(sae.device),
        logger=LoggingConfig(log_to_wandb=False),
    )
    own = mixing_buffer(max(source.buffer, run.batch), run.batch, source.chunks())
    return SAETrainer(config, sae, batches or own).fit()


def _tell_cost(source: ActivationSource, run: _Run) -> None:
    """Say how long it will take, from the capture so far and a few steps that are thrown away."""
    if run.steps <= _PROBE:
        return
    some = repeat(torch.randn(run.batch, source.width))
    _fitted(source, run, 1, some)  # what is done once
    began = time.perf_counter()
    _fitted(source, run, _PROBE, some)
    seconds = (time.perf_counter() - began) / _PROBE * run.steps
    seconds += source.seconds_per_token * (source.tokens if source.fits else run.steps * run.batch)
    if seconds > LONG:
        held = min(source.tokens, source.buffer) * source.width * 4 / 2**20
        print(
            f"training a dictionary: {run.steps} steps of {run.batch} tokens, about {seconds / 60:.0f} min, "
            f"{held:.0f} MiB of activations held",
            file=sys.__stderr__,
        )


def _quiet() -> Any:
    """SAELens draws its bars on stderr; none where that is no terminal."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def _hash(encoded: Sequence[EncodedPrompt]) -> str:
    return hashlib.sha256(repr([each.ids for each in encoded]).encode()).hexdigest()[:16]
