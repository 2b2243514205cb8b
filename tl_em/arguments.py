"""What a caller may pass, checked once where it enters: finite numbers, whole numbers, vectors.

A NaN limit rejects nothing, a fractional layer names no block and a negative temperature is one that nobody asked for:
each runs to the end and gives a number. So numbers are checked at the boundary, in one place, with one kind of message.
A function says what its arguments are by ``@checked(q=FRACTION, seed=SEED)``; numbers of numpy and of torch (of no
axis) are numbers, and enter as Python's own; bools and strings are not.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from tl_em.errors import NonFiniteError, UsageError, WidthError

if TYPE_CHECKING:
    from torch import Tensor

Number = int | float
Check = Callable[[str, Any], Any]
"""Given an argument's name and its value, the value as the package wants it; or raises."""
P = ParamSpec("P")
R = TypeVar("R")


def finite(
    name: str, value: Any, *, low: Number | None = None, high: Number | None = None, open_low: bool = False
) -> float:
    """``value`` as a float: a number, neither NaN nor infinite, within the bounds.

    Args:
        name: of the argument, for the message.
        value: a number of Python, numpy or torch (of no axis).
        low, high: bounds, included.
        open_low: whether ``low`` itself is excluded.

    Raises:
        UsageError: anything else.

    Example:
        >>> finite("q", 0.05, low=0, high=1)
        0.05
        >>> finite("q", float("nan"), low=0, high=1)
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: q=nan is not a finite number: ...
    """
    number = math.nan
    if _is_scalar(value):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(value.detach() if hasattr(value, "detach") else value)
    if not math.isfinite(number):
        raise UsageError(
            f"{name}={_shown(value)} is not a finite number: a comparison with NaN is false in silence, infinity "
            f"limits nothing, and the rest may mean anything. Give {name} a number{_range(low, high, open_low)}."
        )
    if (low is not None and (number < low or (open_low and number == low))) or (high is not None and number > high):
        lies = "not a positive number" if open_low and low == 0 and number <= 0 else "out of range"
        raise UsageError(
            f"{name}={_shown(value)} is {lies}, so the result would mean nothing. "
            f"Give {name} a number{_range(low, high, open_low)}."
        )
    return number


def whole(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """``value`` as an int: a whole number of Python, numpy or torch within the bounds; 1.5 and True are none.

    Raises:
        UsageError: anything else.

    Example:
        >>> whole("layer", 3, low=0)
        3
        >>> whole("layer", 1.5, low=0)
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: layer=1.5 is not a whole number, so it counts nothing. Give layer a whole number >= 0.
    """
    number = None
    if _is_scalar(value):
        with contextlib.suppress(TypeError, ValueError):
            number = operator.index(value)
    wanted = _range(low, high, False)
    if number is None:
        raise UsageError(
            f"{name}={_shown(value)} is not a whole number, so it counts nothing. Give {name} a whole number{wanted}."
        )
    if (low is not None and number < low) or (high is not None and number > high):
        raise UsageError(f"{name}={_shown(value)} is out of range. Give {name} a whole number{wanted}.")
    return number


def vectors(name: str, value: Any, *, axes: int = 1) -> Tensor:
    """``value`` as a tensor: float32, finite, detached, on the CPU, and the package's own.

    Args:
        name: of the argument, for the message.
        value: a tensor of any dtype and device, an array of numpy, or a list of numbers.
        axes: how many it must have.

    Raises:
        UsageError: not numbers. WidthError: another number of axes. NonFiniteError: NaN or infinity, or numbers beyond
            float32.

    Example:
        >>> vectors("direction", [3, 4]).tolist()
        [3.0, 4.0]
    """
    import numpy as np
    import torch

    try:
        value = np.array(value) if isinstance(value, np.ndarray) else value  # of one that is read only torch warns
        given = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
        with torch.inference_mode(False), torch.no_grad():
            given = given.detach().to_dense() if given.layout != torch.strided else given.detach()
            wide = given.to("cpu", torch.float64) if not (given.is_complex() or given.dtype == torch.bool) else None
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        wide = None
    if wide is None:
        raise UsageError(
            f"{name} is {_shown(value)}, which holds no real numbers. Give {name} a tensor, an array or a list of them."
        )
    if wide.ndim != axes:
        raise WidthError(
            f"{name}: {'one vector is' if axes == 1 else 'one row a vector [k d_model] is'} wanted, got shape "
            f"{tuple(wide.shape)}; {_mended(wide.ndim, axes)}"
        )
    with torch.inference_mode(False), torch.no_grad():
        narrow = wide.to(torch.float32, copy=True)
    wrong = int((~torch.isfinite(narrow)).sum())
    if wrong:
        why = "are NaN or infinite" if bool((~torch.isfinite(wide)).any()) else "are beyond what float32 holds"
        raise NonFiniteError(
            f"{name}: {wrong} of {narrow.numel()} entries {why}, so every projection would be; look at the activations "
            "that it was made from with em.capture(...)"
        )
    return narrow


def array_of(shape: tuple[int, ...], found: Any, who: str, *, wanted: str, error: type[Exception] = UsageError) -> Any:
    """What something from outside returned as a float64 array, NaN and all, if it is numbers of this shape.

    Args:
        shape: that is wanted.
        found: a tensor of any dtype and device, an array, or a list.
        who: returned it, for the message.
        wanted: what to return instead, for the message.
        error: of another shape.

    Example:
        >>> array_of((2,), [True, 0.5], "the judge", wanted="let it return a number an answer")
        array([1. , 0.5])
    """
    import numpy as np
    import torch

    try:
        given = found if isinstance(found, torch.Tensor) else torch.as_tensor(np.array(found))
        values = given.detach().to("cpu", torch.float64).numpy()
    except (TypeError, ValueError, RuntimeError) as cause:
        raise UsageError(f"{who} returned a {type(found).__name__} that is not numbers; {wanted}") from cause
    if values.shape != shape:
        raise error(
            f"{who} returned shape {values.shape} in place of {shape}, so it is unknown which value belongs to what; "
            f"{wanted}"
        )
    return values


def _mended(given: int, wanted: int) -> str:
    if given == 0:
        return "give a number for each of the model's d_model axes"
    return "index the one that you mean" if given > wanted else "use vector[None]"


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """``value`` as the ids of one prompt: a list, an array or a tensor of whole numbers, none negative.

    Raises:
        UsageError: anything else.

    Example:
        >>> token_ids("prompts[0]", [5, 7])
        (5, 7)
    """
    return list_of(functools.partial(whole, low=0))(name, value)


def are_numbers(value: Any) -> bool:
    """Whether something is numbers, or a list of them, rather than text or chats: token ids, right or wrong."""
    if isinstance(value, str | bytes) or hasattr(value, "keys"):
        return False
    if hasattr(value, "dtype") and hasattr(value, "ndim"):
        return value.ndim == 0 or getattr(value.dtype, "kind", "i") not in "OUS"
    items = list(value) if isinstance(value, list | tuple) else []
    return isinstance(value, int | float) or (bool(items) and all(isinstance(item, int | float) for item in items))


# --- At the boundary --------------------------------------------------------------------------------------------------

NATURAL: Check = functools.partial(whole, low=0)
COUNT: Check = functools.partial(whole, low=1)
SEED: Check = functools.partial(whole, low=0, high=2**63 - 1)
NOT_NEGATIVE: Check = functools.partial(finite, low=0)
POSITIVE: Check = functools.partial(finite, low=0, open_low=True)
FRACTION: Check = functools.partial(finite, low=0, high=1)


def optional(check: Check) -> Check:
    """The check, of anything but ``None``."""
    return lambda name, value: None if value is None else check(name, value)


def instance_of(kind: type, noun: str, why: str, call: str) -> Check:
    """The check that something is of a class: ``why`` it must be, and the ``call`` that makes one, for the message.

    Example:
        >>> instance_of(dict, "dict", "it names nothing", "{'a': 1}")("options", 3)
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: options=3 is no dict, so it names nothing. Give options {'a': 1}.
    """

    def of_kind(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise UsageError(f"{name}={_shown(value)} is no {noun}, so {why}. Give {name} {call}.")
        return value

    return of_kind


def list_of(check: Check) -> Check:
    """The check, of every item of a list.

    Example:
        >>> list_of(COUNT)("doses", [1, 2.5])
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: doses[1]=2.5 is not a whole number, ...
    """

    def of_each(name: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str | bytes) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) != 1:
            raise UsageError(f"{name}={_shown(value)} is no list, so it is unclear what is meant. Give {name} a list.")
        items: Iterable[Any] = getattr(value, "tolist", lambda: value)()
        return tuple(check(f"{name}[{i}]", item) for i, item in enumerate(items))

    return of_each


def having(noun: str, members: str, why: str, call: str) -> Check:
    """The check that something has these members, whatever its class.

    Example:
        >>> having("path", "name parent", "nothing can be opened", "a path")("out", 3)
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: out=3 is no path, so nothing can be opened. Give out a path.
    """

    def with_members(name: str, value: Any) -> Any:
        kind = type(value)  # first, since an object computes its properties anew, hook_dict of a Bridge from all of it
        if not all(hasattr(kind, member) or hasattr(value, member) for member in members.split()):
            raise UsageError(f"{name}={_shown(value)} is no {noun}, so {why}. Give {name} {call}.")
        return value

    return with_members


def path(name: str, value: Any) -> Any:
    """``value``, if it is a path or a text that can be one.

    Raises:
        UsageError: anything else.

    Example:
        >>> path("out", "report")
        'report'
    """
    given = None
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        given = os.fspath(value)
    if not isinstance(given, str):
        raise UsageError(f"{name}={_shown(value)} is no path, so no file is meant. Give {name} a text or a Path.")
    try:
        os.lstat(given)
    except (OSError, ValueError) as error:  # ValueError: a NUL, or half a character
        if not isinstance(error, OSError) or error.errno == errno.ENAMETOOLONG:
            raise UsageError(
                f"{name}={_shown(given)} cannot be a path ({error.args[-1]}), so no file is meant. Give {name} a "
                "shorter name, of characters that the disk can write."
            ) from error
    return value


def several(name: str, value: Any) -> Any:
    """``value``, if it has items.

    Raises:
        UsageError: anything else.
    """
    if not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise UsageError(f"{name}={_shown(value)} is no list, so it is unclear what is meant. Give {name} a list.")
    return value


def text(name: str, value: Any) -> str:
    """``value``, if it is a text.

    Raises:
        UsageError: anything else.
    """
    if not isinstance(value, str):
        raise UsageError(f"{name}={_shown(value)} is no text, so it names nothing. Give {name} a str.")
    return value


def mapping(name: str, value: Any) -> Any:
    """``value``, if it has keys and values.

    Raises:
        UsageError: anything else.
    """
    if not isinstance(value, Mapping):
        raise UsageError(
            f"{name}={_shown(value)} names nothing, so it is unclear what each is. Give {name} a dict: {{name: …}}."
        )
    return value


_TENSOR = having("tensor", "shape dtype device", "there are no numbers to compute with", "a torch tensor")
NOUNS: dict[str, Check] = {
    "LensModel": having("model with hook points", "cfg hook_dict", "there is nothing to run", "em.load_model(…)"),
    "Model": having("model with hook points", "cfg hook_dict", "there is nothing to run", "em.load_model(…)"),
    "ModelPair": having("pair of models", "base tuned", "there is nothing to compare", "em.load_pair(base, tuned)"),
    "ContrastSet": having(
        "contrast set", "positive negative", "there is no difference to take", "em.ContrastSet(positive, negative)"
    ),
    "Direction": having(
        "direction", "vector site unit", "there is nothing to project on", "em.Direction(vector, site), or one of yours"
    ),
    "Intervention": having("intervention", "edit", "nothing would be done", "em.Ablate(direction), say"),
    "FeatureTable": having("table of latents", "to_pandas", "no latent is known", "em.score_features(…)"),
    "Facts": having("set of facts", "prompts truths", "nothing is asked", "em.evals.Facts(prompts, …)"),
    "Evaluation": having("evaluation", "scores table", "nothing was judged", "em.evaluate(…)"),
    "ForcedChoice": having("forced choice", "questions chosen", "nothing is asked", "em.evals.ForcedChoice(questions)"),
    "pd.DataFrame": having("table", "columns groupby", "it has no rows to read", "a pandas DataFrame"),
    "nn.Module": having("module", "modules parameters", "there is nothing to train", "a torch module"),
    "SparseDictionary": having(
        "dictionary", "encode decode d_sae", "it has no latents", "em.load_dictionary(path), or one of yours"
    ),
    "Site": having("site", "layer stream", "no place in the model is meant", "em.Site(layer)"),
    "AttributionGraph": having("graph", "nodes edges", "there is nothing to draw", "em.attribute(…)"),
    "TextReading": having("reading", "sites each", "there is nothing to show", "em.read(…)"),
    "FeatureCards": having("set of cards", "save", "there is nothing to show", "em.features.feature_cards(…)"),
    "Together": having("grouping", "labels", "it is unknown what belongs together", "contrast.grouped() finds one"),
    "Row": having("row of a report", "verdict", "nothing was claimed", "one of report.verdicts"),
    "Tensor": _TENSOR,
    "World": having("toy world", "domains", "nothing can be asked", "em.organisms.World()"),
    "str | Path": path,
    "str": text,
}
"""What an annotation calls its value, and what that must have; ``Mapping[…]`` is one too."""


def noun_of(annotation: Any) -> Check | None:
    """The check that an annotation asks for by itself, where it names one noun, or that and None.

    Example:
        >>> noun_of("str | Path | None")("out", None), noun_of("int")
        (None, None)
    """
    whole_one = str(annotation)
    whole_one = whole_one if whole_one.startswith("str") else whole_one.removesuffix(" | Any")
    bare = whole_one.removesuffix(" | None")
    found = next((check for form, check in _FORMS if form.fullmatch(bare)), NOUNS.get(bare))
    return optional(found) if found is not None and bare != whole_one else found


def checked(**checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose arguments are checked before anything else happens, defaults excepted.

    Those named here by their checks; all others by what their annotation calls them (``NOUNS``).

    Example:
        >>> @checked(k=COUNT)
        ... def top(values, *, k=3):
        ...     return sorted(values)[-k:]
        >>> top([3, 1, 2], k=1)
        [3]
        >>> top([3, 1, 2], k=0)
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: k=0 is out of range. Give k a whole number >= 1.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        nouns = {name: noun_of(each.annotation) for name, each in parameters.items() if each.kind not in _STARRED}
        every = checks | {name: check for name, check in nouns.items() if check is not None and name not in checks}
        names = list(parameters)
        places = {name: names.index(name) for name in every}

        @functools.wraps(function)
        def boundary(*args: P.args, **kwargs: P.kwargs) -> R:
            given, named = list(args), dict(kwargs)
            for name, check in every.items():
                if name in named:
                    named[name] = check(name, named[name])
                elif places[name] < len(given):
                    given[places[name]] = check(name, given[places[name]])
            return function(*given, **named)  # pyright: ignore[reportCallIssue]

        boundary.__dict__["checks"] = dict(checks)  # what a test reads off every public function
        return boundary

    return decorate


_INSIDE = r"\[[^\[\]]*(\[[^\[\]]*(\[[^\[\]]*\][^\[\]]*)*\][^\[\]]*)*\]"  # brackets in brackets, three deep
_FORMS = (
    (re.compile(f"Mapping{_INSIDE}"), mapping),
    (re.compile(f"Sequence{_INSIDE}"), several),
    (re.compile(r"(Float|Int|Bool)\[Tensor, .*\]"), _TENSOR),
)
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def settle(instance: Any, **checks: Check) -> None:
    """The same for the fields of a frozen dataclass, in its ``__post_init__``."""
    for name, check in checks.items():
        object.__setattr__(instance, name, check(name, getattr(instance, name)))


def _is_scalar(value: Any) -> bool:
    """Neither text nor a truth value, and of no axis: numpy reads an array of one element as a number, and a bool."""
    return (
        not isinstance(value, str | bytes | bytearray | bool)
        and getattr(value, "ndim", 0) == 0
        and "bool" not in str(getattr(value, "dtype", ""))
    )


def _range(low: Number | None, high: Number | None, open_low: bool) -> str:
    if low is not None and high is not None and not open_low:
        return f" from {low} to {high}"
    bounds = [f"{'>' if open_low else '>='} {low}"] if low is not None else []
    bounds += [f"<= {high}"] if high is not None else []
    return f" {' and '.join(bounds)}" if bounds else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
