"""What happens while a model trains: projections, behaviour rates, and where the path of its weights turns.

    projection(t)    =  mean over prompts of r'h(t)                     r: unit direction, h: the stream at its site
    local cosine(t)  =  cos(w(t) - w(t - k), w(t + k) - w(t))           w: the weights that are followed, as one vector

On a straight path the local cosine is 1, and it dips where the path turns: a *rotation*, which in rank-1 fine-tunes
came shortly before the behaviour changed.  The source takes both differences from w(t), which is the same number with
the other sign.  Source: Turner et al. 2025 (https://arxiv.org/abs/2506.11613), section on the phase transition.

**Control.**  Every path dips: batches differ, and where nothing is left to learn the weights wander (a fine-tune on
answers that the model gives already has deeper dips than one that changes its persona).  So a rotation is named only
where one dip rises again on *both* sides by `LEAST_DIP` and is `STANDS_OUT` times as deep as the next.  It is a place
on the path of the weights; that it has to do with the behaviour is for the rates beside it and a benign run to show.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from re import search
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_em.arguments import COUNT, SEED, checked, instance_of, list_of, optional
from tl_em.artefacts import check_ending, check_writable, replacing
from tl_em.directions.direction import Direction, as_direction
from tl_em.errors import UsageError
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.sites import Position, Site
from tl_em.reading.watch import Alarm, thresholds
from tl_em.showing import showable
from tl_em.stats import Estimate, Groups, mean
from tl_em.threads import RANDOM, holding
from tl_em.training.prevention import read_residual

LEAST_DIP, STANDS_OUT = 0.1, 2.0
Rates = Callable[[nn.Module], Mapping[str, Estimate | Any]]


class Transition(NamedTuple):
    """Where the path of the weights turns: the step, the local cosine there, and how far it rises on both sides."""

    step: int
    local_cosine: float
    depth: float


_as_tokens = instance_of(
    EncodedPrompt,
    "EncodedPrompt",
    "it is unknown where its tokens end",
    "what tl_em.models.prompts.encode(model, prompts) gives, with the model before it is trained",
)


class Monitor:
    """Watches a model that trains, in this package's loop or a ``transformers.Trainer``, without changing the training.

    It measures the model in evaluation mode, without gradients and without preventative steering, and leaves the
    model's modes and torch's random state as they were: the same seed gives the same weights with and without it.

    Args:
        directions: name -> direction at a ``resid_post`` site; the projection on the unit vector is measured.
        prompts: what is projected, as tokens: ``tl_em.models.prompts.encode(model, prompts)``.
        groups: one label a prompt; prompts of one question are resampled together.
        rates: called with the model; gives, by name, an Estimate or one number a prompt; toys have
            ``tl_em.organisms.rates.answer_rates()``.
        every: steps from one look to the next.
        window: k of the local cosine, in steps; None for no local cosine.
        follow: which weights: a pattern found in the names of parameters, e.g. ``"lora_B"``; by default all that are
            trained. ``2 window / every + 1`` copies are kept, in float32 on the CPU.
        path: a ``.parquet`` or ``.jsonl`` file, replaced as a whole after every look, so that a killed run keeps what
            was seen.
        above: thresholds of the projections, by the names of directions.
        alarm: a function that is told of each mean projection above its threshold, at each look (an ``Alarm`` with the
            step); where it returns True, the training ends with that step, and what it raises ends it at once.
        seed: of the resampling.

    Raises:
        UsageError: thresholds for none, or without an alarm; directions without prompts, or at another site than
            ``resid_post``, prompts that are no tokens, a window that is no multiple of `every`, a path that exists
            already or has another suffix. OutputError: a path that cannot be written.

    Example:
        >>> path = torch.nn.Linear(1, 1, bias=False)
        >>> monitor = Monitor(window=1)
        >>> for step in range(4):
        ...     ends = monitor(step, path)
        ...     path.weight.data += 0.5
        >>> monitor.table[monitor.table.name == "local_cosine"][["step", "value"]].values.tolist()
        [[1.0, 1.0], [2.0, 1.0]]

    Source: Turner et al. 2025, arXiv:2506.11613; projections: Chen et al. 2025, arXiv:2507.21509.
    """

    @checked(every=COUNT, window=optional(COUNT), seed=SEED, prompts=list_of(_as_tokens))
    def __init__(
        self,
        directions: Mapping[str, Direction] | Any | None = None,
        *,
        prompts: Sequence[EncodedPrompt] | Any = (),
        groups: Groups | None = None,
        rates: Rates | None = None,
        every: int = 1,
        window: int | None = 10,
        follow: str = "",
        path: str | Path | None = None,
        above: Mapping[str, float] | None = None,
        alarm: Callable[[Alarm], Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.directions = {str(k): as_direction(f"directions[{k!r}]", v) for k, v in dict(directions or {}).items()}
        self.prompts, self.groups, self.rates = list(prompts), groups, rates
        self.every, self.window, self.follow, self.seed = every, window, follow, seed
        self.path = None if path is None else Path(path)
        self.above, self.alarm = thresholds(above, alarm, self.directions), alarm
        self.alarms: list[Alarm] = []
        """What was told so far."""
        self._check()
        self._rows: list[tuple[Any, ...]] = []
        self._start: Tensor | None = None
        self._seen: deque[tuple[int, Tensor]] = deque(maxlen=1 if window is None else 2 * window // every + 1)

    def _check(self) -> None:
        for each in self.directions.values():
            if each.site.stream != "resid_post":
                raise UsageError(
                    f"{each.site} is not the output of a block, which is where a model in training is read; use a "
                    "direction at em.Site(layer)"
                )
        if self.directions and not self.prompts:
            raise UsageError("directions without prompts project nothing; pass prompts=encode(model, prompts)")
        if self.window is not None and self.window % self.every:
            raise UsageError(
                f"window={self.window} is no multiple of every={self.every}, so the weights of steps t - k and t + k "
                "would not be seen; change one of them, or pass window=None"
            )
        if self.path is None:
            return
        check_ending(self.path, "what a monitor saw", ".parquet", ".jsonl")
        if self.path.exists():
            raise UsageError(f"{self.path} holds what an earlier run saw and would be lost; pass another path")
        check_writable(self.path)

    def __call__(self, step: int, model: nn.Module) -> bool:
        """Look at the model, if the step is one to look at; a training loop calls this before step 1 and after each.

        Returns:
            Whether the alarm wants the training to end.

        Raises:
            UsageError: a step that was seen already (a monitor belongs to one run), or `follow` matches nothing.
        """
        if step % self.every:
            return False
        if self._seen and step <= self._seen[-1][0]:
            raise UsageError(f"step {step} comes after step {self._seen[-1][0]}; make a new monitor for each run")
        with measuring(model):
            found: dict[str, Any] = dict(self._projections(model))
            found |= {f"rate/{name}": values for name, values in self.rates(model).items()} if self.rates else {}
        for name, values in found.items():
            e = values if isinstance(values, Estimate) else mean(values, seed=self.seed)
            self._rows.append((step, name, *e.row().values()))
        self._follow(step, model)
        self._write()
        return self._tell(step)

    def _tell(self, step: int) -> bool:
        values = {name: value for at, name, value, *_ in self._rows if at == step}
        above = [Alarm(None, None, False, name, value, step) for name, limit in self.above.items()
                 if (value := float(values[f"projection/{name}"])) > limit]  # fmt: skip
        self.alarms += above
        answers = [self.alarm(each) for each in above]  # pyright: ignore
        return any(answer is True for answer in answers)

    def _write(self) -> None:
        if self.path is None:
            return
        with replacing(self.path) as temporary:
            if self.path.suffix.lower() == ".parquet":
                self.table.to_parquet(temporary, index=False)
            else:
                self.table.to_json(temporary, orient="records", lines=True)

    def _projections(self, model: nn.Module) -> Iterator[tuple[str, Estimate]]:
        if not self.directions:
            return
        places: list[tuple[Site, Position]] = [(each.site, each.position) for each in self.directions.values()]
        x = read_residual(model, self.prompts, places)
        for i, (name, each) in enumerate(self.directions.items()):
            along = each.project(x[:, i]).double().numpy()
            yield f"projection/{name}", mean(along, groups=self.groups, seed=self.seed)

    def _follow(self, step: int, model: nn.Module) -> None:
        """Remember the weights; with those of ``t - k`` and ``t + k`` known, so is the local cosine of ``t``."""
        if self.window is None:
            self._seen.append((step, torch.empty(0)))
            return
        here = followed(model, self.follow)
        self._start = here if self._start is None else self._start
        self._seen.append((step, here))
        change, at = float((here - self._start).double().norm()), dict(self._seen)
        self._rows.append((step, "weight_change", change, math.nan, math.nan, len(here)))
        middle, first = step - self.window, step - 2 * self.window
        if first in at and middle in at:
            value = local_cosine(at[first], at[middle], here)
            self._rows.append((middle, "local_cosine", value, math.nan, math.nan, len(here)))

    @property
    def table(self) -> pd.DataFrame:
        """What was seen: step, name, value, low, high, n; without an interval where nothing was sampled.

        Names: ``projection/NAME``, ``rate/NAME``, ``weight_change`` (the distance from the first look) and
        ``local_cosine``, which is known `window` steps after its step.
        """
        rows = pd.DataFrame(self._rows, columns=["step", "name", "value", "low", "high", "n"])
        return rows.sort_values("step", kind="stable", ignore_index=True)

    @property
    def transition(self) -> Transition | None:
        """The deepest rotation on the path of the weights; None where none stands out."""
        seen = self.table
        seen = seen[seen["name"] == "local_cosine"]
        return located(seen["step"].to_numpy(), seen["value"].to_numpy(dtype=float))

    def plot(self, *, width: float | str | Any = 7.0) -> Any:
        """Rates, projections and the local cosine over the steps, with the transition.

        Args:
            width: inches, or ``"column"`` or ``"text"`` of a paper.

        Raises:
            UsageError: nothing was seen yet.
        """
        from tl_em.report.curves import training

        if not self._rows:
            raise UsageError("nothing was seen yet, so there is nothing to draw; train with monitors=[monitor] first")
        return training(self.table, transition=self.transition, width=width)

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.plotted(self)

    def __repr__(self) -> str:
        seen = self.table
        names = ", ".join(dict.fromkeys(seen["name"]))
        if not names:
            return "Monitor(nothing seen yet)"
        return showable(f"Monitor(steps {seen['step'].min()} to {seen['step'].max()}: {names})")

    def trainer_callback(self) -> Any:
        """A ``transformers.TrainerCallback``: ``Trainer(..., callbacks=[monitor.trainer_callback()])``.

        On several processes the first one looks, at its own copy of the model; a model whose weights are spread over
        processes (FSDP, ZeRO 3) cannot be looked at so.
        """
        from transformers import TrainerCallback

        def look(args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and self(state.global_step, model):
                control.should_training_stop = True

        looks = {"on_train_begin": staticmethod(look), "on_step_end": staticmethod(look)}
        return type("MonitorCallback", (TrainerCallback,), looks)()


# ---- the path of the weights -----------------------------------------------------------------------------------------
def followed(model: nn.Module, pattern: str = "") -> Float[Tensor, " weight"]:
    """The trained parameters whose names hold the pattern (a regular expression), as one vector.

    Raises UsageError where there are none.
    """
    chosen = [p for name, p in model.named_parameters() if p.requires_grad and search(pattern, name)]
    if not chosen:
        raise UsageError(
            f"no trained parameter has {pattern!r} in its name, so no weights are followed; look at named_parameters()"
        )
    return torch.cat([p.detach().float().cpu().flatten() for p in chosen])


def local_cosine(
    before: Float[Tensor, " weight"], here: Float[Tensor, " weight"], after: Float[Tensor, " weight"]
) -> float:
    """Cosine of the change before and the change after; NaN where one of them is none."""
    first, second = (here - before).double(), (after - here).double()
    scale = float(first.norm() * second.norm())
    return float(first @ second) / scale if scale > 0 else math.nan


def located(steps: Sequence[int] | np.ndarray, cosines: Float[np.ndarray, " step"]) -> Transition | None:
    """The deepest dip of the local cosine, if it stands out from the others; of two alike, neither.

    Example:
        >>> located(range(7), np.array([0.9, 0.9, 0.8, 0.2, 0.7, 0.9, 0.9])).step
        3
        >>> located(range(7), np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])) is None
        True
    """
    from scipy.signal import find_peaks

    known = np.isfinite(cosines)
    steps, cosines = np.asarray(steps)[known], np.asarray(cosines)[known]
    dips, found = find_peaks(-cosines, prominence=0)
    order = np.argsort(-found["prominences"], kind="stable")
    depths = [*found["prominences"][order], 0.0, 0.0]
    if depths[0] < LEAST_DIP or depths[0] < STANDS_OUT * depths[1]:
        return None
    deepest = dips[order[0]]
    return Transition(int(steps[deepest]), float(cosines[deepest]), float(depths[0]))


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, torch's random state kept; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.no_grad(), holding(RANDOM), torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
