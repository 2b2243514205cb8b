"""Latent Guard: is a prompt harmful to the model's own mind, whatever the model then answers?

    D(x) = mean over layers l of  cos(h[l, t_inst], mu_harmful[l]) - cos(h[l, t_inst], mu_harmless[l])
    harmful iff D(x) >= 0

The two class means are all that is fitted, and 0 is the threshold, so there is nothing to tune.  **Control**: the same
score with permuted labels says what accuracy and AUROC chance gives on these prompts; and the test prompts must be
about other questions than those that the means were taken on, or the guard only recognises words.

Source: Zhao et al. 2025, arXiv:2507.11878.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tl_em.arguments import COUNT, NATURAL, SEED, checked, list_of, optional
from tl_em.artefacts import load_tensors, save_tensors
from tl_em.errors import NonFiniteError, NuisanceWarning, UsageError, WidthError, ZeroDirectionError
from tl_em.models.class_means import as_contrast, class_moments
from tl_em.models.contrasts import ContrastSet, Prompt, already_used, hashed
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, Provenance, Site, check_belongs
from tl_em.models.stream import capture, encoded_prompts, spans_of, stream
from tl_em.models.together import LIMIT
from tl_em.models.torch_state import in_plain_torch
from tl_em.stats import Estimate, auroc, auroc_of, bootstrap, control_p, shuffled_labels

SCHEMA = "tl-em/latent-guard/1"
POSITION: Position = "instruction_end"
MEASURES = ("accuracy", "auroc")


@dataclass(frozen=True, eq=False)
class GuardResult:
    """How well a guard tells two classes of prompts apart.

    Args:
        accuracy: share of prompts on the right side of 0.
        auroc: probability that a harmful prompt scores above a harmless one.
        caught: share of the harmful prompts that are flagged.
        passed: share of the harmless prompts that are not.
        permuted: accuracy and AUROC under permuted labels: mean, and the band that holds 95 % of them.
        p: share of permutations that do at least as well.
    """

    accuracy: Estimate
    auroc: Estimate
    caught: Estimate
    passed: Estimate
    permuted: Mapping[str, Estimate]
    p: Mapping[str, float]

    def __repr__(self) -> str:
        lines = [
            f"{name:<9}{getattr(self, name)}  permuted labels {self.permuted[name]}, p = {self.p[name]:.3g}"
            for name in MEASURES
        ]
        return "\n".join([*lines, f"caught   {self.caught}  passed {self.passed}"])


@dataclass(frozen=True, eq=False)
class LatentGuard:
    """The class means that prompts are compared with, and the model that they belong to.

    Args:
        harmful, harmless: mean activation of the class at each layer's ``resid_post``; float32 on the CPU.
        layers: the layers, in the order of the means.
        provenance: the model and the data.

    Raises:
        WidthError: the means have not one shape, or not a row a layer.
        NonFiniteError: they hold NaN or infinity.
        ZeroDirectionError: both classes have the same means, so every score would be 0.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> parts = pair.contrasts["refusal"].split(seed=0)
        >>> guard = em.presets.LatentGuard.fit(pair.base, parts.train)
        >>> guard.score(pair.base, parts.test.positive[:2]).shape
        torch.Size([2])
    """

    harmful: Float[Tensor, "*axes"]  # [site d_model]; checked below, with a message that says what to do
    harmless: Float[Tensor, "*axes"]
    layers: tuple[int, ...]
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        if self.harmful.ndim != 2 or self.harmful.shape != self.harmless.shape or len(self.harmful) != len(self.layers):
            raise WidthError(
                f"a guard needs a mean of either class for each of {len(self.layers)} layers, got shapes "
                f"{tuple(self.harmful.shape)} and {tuple(self.harmless.shape)}; make it with LatentGuard.fit"
            )
        if not (torch.isfinite(self.harmful).all() and torch.isfinite(self.harmless).all()):
            raise NonFiniteError("the guard's means hold NaN or infinity, so every score would be NaN; fit it again")
        if torch.equal(self.harmful, self.harmless):
            raise ZeroDirectionError(
                "both classes have the same mean at every layer, so the guard cannot tell them apart; check that the "
                "prompts differ before the last token of the instruction"
            )

    @classmethod
    @checked(contrast=as_contrast, layers=optional(list_of(NATURAL)))
    @in_plain_torch
    def fit(cls, model: LensModel, contrast: ContrastSet, *, layers: Sequence[int] | None = None) -> LatentGuard:
        """Take the class means at the last token of the instruction.

        Args:
            model: any HookedTransformer or TransformerBridge.
            contrast: harmful (positive) and harmless (negative) prompts.
            layers: layers whose ``resid_post`` is read; all by default.

        Raises:
            UsageError: no layers. ZeroDirectionError, NonFiniteError, PositionError: the prompts give no two means.

        Example:
            >>> from tl_em import load_pair
            >>> pair = load_pair("toy/insecure")
            >>> sets = pair.contrasts["harmfulness"].split(seed=0)
            >>> guard = LatentGuard.fit(pair.base, sets.train)
            >>> bool(guard.evaluate(pair.base, sets.test).auroc.value > 0.9)
            True
        """
        layers = tuple(range(int(model.cfg.n_layers)) if layers is None else layers)
        if not layers:
            raise UsageError("a guard without layers compares nothing; pass layers=[...], or None for all of them")
        means = class_moments(model, contrast, sites=[Site(layer) for layer in layers], positions=[POSITION])
        origin = Provenance.of(model, data=contrast.hash, prompts=hashed([*contrast.positive, *contrast.negative]))
        return cls(means.positive[0], means.negative[0], layers, origin)

    @in_plain_torch
    def score(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
        """``D(x)`` of each prompt: harmful iff at least 0.

        Args:
            model: the model that the guard was fitted on, or a fine-tune of it.
            prompts: strings or chats.

        Raises:
            ProvenanceError, WidthError: the guard was made on another model.
        """
        check_belongs("the guard", self.harmful.shape[-1], self.provenance, model, template=True)
        encoded = encoded_prompts(model, prompts)
        nearer = torch.empty(len(encoded), len(self.layers), dtype=torch.float64)

        def keep(site: int, rows: Int[Tensor, " prompt"], x: Float[Tensor, "prompt 1 d_model"]) -> None:
            nearer[rows, site] = self._nearer(site, x[:, 0].float().cpu())

        stream(model, encoded, self._sites, spans_of(encoded, [POSITION]), keep)
        return nearer.mean(-1).float()

    @property
    def _sites(self) -> list[Site]:
        return [Site(layer) for layer in self.layers]

    def _nearer(self, site: int, x: Float[Tensor, "prompt d_model"]) -> Float64[Tensor, " prompt"]:
        """By how much the cosine with the harmful mean is larger, at one layer."""
        means = self.harmful[site].double(), self.harmless[site].double()
        harmful, harmless = (torch.cosine_similarity(x.double(), mean, dim=-1) for mean in means)
        return harmful - harmless

    @checked(contrast=as_contrast, permutations=COUNT, seed=SEED)
    @in_plain_torch
    def evaluate(
        self, model: LensModel, contrast: ContrastSet, *, permutations: int = 999, seed: int = 0
    ) -> GuardResult:
        """Accuracy and AUROC on prompts about other questions, with question-clustered intervals and permuted labels.

        Where no groups are given, prompts that are found to belong together count as one question.

        Args:
            model: the model that the guard was fitted on, or a fine-tune of it.
            contrast: harmful (positive) and harmless (negative) prompts, none of them fitted on.
            permutations: number of permutations: of the questions' labels where a question has one, else of the
                prompts' labels within each question.
            seed: seed of intervals and permutations.

        Raises:
            UsageError: the guard was fitted on all of these prompts (on some of them: a NuisanceWarning).
            ProvenanceError, WidthError: the guard was made on another model.
        """
        if said := already_used(self, contrast, what="the guard"):
            warnings.warn(f"{said}: it recognises these; evaluate it on others", NuisanceWarning, stacklevel=4)
        prompts, n = [*contrast.positive, *contrast.negative], len(contrast.positive)
        if contrast.has_groups or len(prompts) > LIMIT:  # of so many, texts alone say which belong together
            scores = self.score(model, prompts)
            contrast = contrast.grouped()
        else:
            check_belongs("the guard", self.harmful.shape[-1], self.provenance, model, template=True)
            x = capture(model, prompts, self._sites, position=POSITION)
            scores = torch.stack([self._nearer(s, x[:, s]) for s in range(len(self.layers))]).mean(0).float()
            contrast = contrast.grouped([side.flatten(1).double().numpy() for side in (x[:n], x[n:])])
        labels = contrast.positive_groups, contrast.negative_groups
        groups = None if labels[0] is None or labels[1] is None else (list(labels[0]), list(labels[1]))
        found = scores.double().numpy()
        return _judged([found[:n], found[n:]], groups, permutations, seed)

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write means, layers and provenance to a safetensors file, whole or not at all.

        Raises:
            OutputError: the path cannot be written.
        """
        origin = None if self.provenance is None else self.provenance.to_json()
        about = {"schema": SCHEMA, "layers": list(self.layers), "provenance": origin}
        return save_tensors(path, {"harmful": self.harmful, "harmless": self.harmless}, about)

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> LatentGuard:
        """Read what :meth:`save` wrote.  Whether it fits a model is checked when it meets one.

        Raises:
            CorruptFileError: the file is missing or truncated, or holds something else.
        """

        def made(means: dict[str, Tensor], about: dict[str, Any]) -> LatentGuard:
            origin = None if about["provenance"] is None else Provenance.from_json(about["provenance"])
            layers = tuple(int(layer) for layer in about["layers"])
            return cls(means["harmful"], means["harmless"], layers=layers, provenance=origin)

        damage = "a damaged mean would flag other prompts: write it again with guard.save(path)"
        return load_tensors(path, SCHEMA, made, damage=damage)


Scores = Float[np.ndarray, " _"]  # classes differ in length
Labels = tuple[list[Hashable], list[Hashable]]


def _judged(by_class: Sequence[Scores], groups: Labels | None, permutations: int, seed: int) -> GuardResult:
    harmful, harmless = by_class
    right = (harmful >= 0).astype(float), (harmless < 0).astype(float)
    samples = groups if groups is not None else (len(harmful), len(harmless))

    def estimate(statistic: Callable[..., np.ndarray], *chosen: int) -> Estimate:
        return bootstrap(statistic, [samples[i] for i in chosen], seed=seed).estimate

    def accuracy(v: np.ndarray, w: np.ndarray) -> np.ndarray:
        return (v @ right[0] + w @ right[1]) / (v.sum(-1) + w.sum(-1))

    found = {"accuracy": estimate(accuracy, 0, 1), "auroc": auroc(harmful, harmless, groups=groups, seed=seed)}
    scores = np.concatenate([harmful, harmless])
    labels = shuffled_labels(len(scores), len(harmful), groups, permutations, seed)
    random = {"accuracy": (labels == (scores >= 0)).mean(1), "auroc": auroc_of(scores, labels)}
    return GuardResult(
        **found,
        caught=estimate(lambda v: v @ right[0] / v.sum(-1), 0),
        passed=estimate(lambda w: w @ right[1] / w.sum(-1), 1),
        permuted={name: Estimate.band(random[name], of="permuted labels") for name in MEASURES},
        p={name: control_p(found[name].value, random[name], two_sided=False) for name in MEASURES},
    )
