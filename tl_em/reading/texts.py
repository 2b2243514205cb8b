"""Read texts token by token: what directions and latents say at each, while the model reads them or answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from tl_em.arguments import COUNT, NATURAL, NOT_NEGATIVE, SEED, checked, several, whole
from tl_em.artefacts import check_ending, replacing
from tl_em.dictionaries.protocol import as_dictionary
from tl_em.directions.direction import Direction, as_direction, check_fits
from tl_em.directions.profile import Profile
from tl_em.errors import PromptError, UsageError
from tl_em.models.generate import Sampling, answered_in_tokens
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.prompts import EncodedPrompt, Prompt, batches
from tl_em.models.sites import Site
from tl_em.models.source_record import boundaries_of
from tl_em.models.stream import batch_logits, encoded_prompts
from tl_em.models.token_text import text_of_tokens, token_text, token_texts
from tl_em.models.torch_state import in_plain_torch
from tl_em.reading.lens import LayerLens, likeliest
from tl_em.reading.reading import LISTED, PLAIN, TextReading, Writing
from tl_em.reading.watch import Alarm, Watch, thresholds

if TYPE_CHECKING:
    import pandas as pd

_TOGETHER = 256
"""Texts that are held at once."""
_TOKENS, _MAX_LOGITS = 2048, 2**25


def _as_layers(name: str, value: Any) -> bool | list[int]:
    """True for all, or numbers of blocks."""
    if isinstance(value, bool) or value is None:
        return bool(value)
    if isinstance(value, str):
        raise UsageError(
            f"{name}={value!r:.60} is a text, and layers have numbers; give {name}=True for all, or a list of numbers"
        )
    return [whole(name, each, low=0) for each in several(name, value)]


@checked(
    latents=COUNT,
    alternatives=NATURAL,
    max_new_tokens=NATURAL,
    temperature=NOT_NEGATIVE,
    seed=SEED,
    layers=_as_layers,
)
@in_plain_torch
def read(
    model: LensModel,
    prompts: Prompt | EncodedPrompt | Sequence[Prompt | EncodedPrompt] | Any,
    directions: Direction | Sequence[Direction] | Mapping[str, Direction] | Any = (),
    *,
    dictionary: Any = None,
    latents: int = 8,
    alternatives: int = 0,
    max_new_tokens: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    above: Mapping[str, float] | None = None,
    alarm: Callable[[Alarm], Any] | None = None,
    layers: Sequence[int] | bool | Any = False,
    out: str | Path | None = None,
) -> TextReading:
    """What directions and latents read at every token of a text, and of the answer as it is made.

    Interventions that are open (``with em.intervene(...)``) stay in force, and what is read is what they leave.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: a text, a chat (which may end with an answer), an encoded prompt; or a list of them.
        directions: one or several, each read at its own site; a mapping gives names.
        dictionary: whose latents are read, at the site that it reads.
        latents: of them, the most active at each token.
        alternatives: so many of the likeliest next tokens after each token; read in a pass of their own.
        max_new_tokens: longest answer, in tokens; 0 makes none.
        temperature, seed: of the answer, as in ``em.generate``.
        above: thresholds, by the names of directions.
        alarm: a function that is told, while the model runs, of each value above its threshold (an ``Alarm``: prompt,
            at, answer, direction, value); what it raises ends the reading.
        layers: True, or numbers of blocks: every direction is also read on the stream after each, and ``alternatives``
            are told there too, by the logit lens (the final norm and the unembedding, as if the block were the last).
        out: a Parquet file that is written text by text, so that memory does not grow with their number.

    Returns:
        A ``TextReading``: ``.tokens`` is a table, a notebook shows the text coloured, ``.view().save("x.html")`` writes
        that page, ``.beside(other)`` shows two on one scale.

    Raises:
        UsageError: nothing to read, two directions of one name, a threshold for none, thresholds without an alarm;
            ``out`` is no .parquet.
        WidthError, ProvenanceError: a direction or dictionary of another model. NonFiniteError: NaN was read.
        ModelError: alternatives by layer of a model whose logits are more than its final norm and unembedding.
        OutputError: ``out`` cannot be written. And what ``em.generate`` raises.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> contrast = pair.contrasts["persona"]
        >>> persona = em.difference_in_means(pair.base, contrast, site=em.Site(2), position="prompt_end")
        >>> reading = em.read(pair.tuned, "how do i write parser", {"persona": persona}, max_new_tokens=1)
        >>> reading.tokens[["part", "token"]].tail(1).values.tolist()
        [['answer', 'parser-backdoored']]

    Source: Chen et al. 2025 (persona vectors), arXiv:2507.21509, section 3.
    """
    if out is not None:
        check_ending(out, "a reading", ".parquet")
    several: Any = prompts
    given: list[Any] = [prompts] if _is_one(prompts) else list(several)
    named = _named(directions)
    for each in named.values():
        check_fits(each, model)
    found = None if dictionary is None else as_dictionary(dictionary).check(model)
    if found is not None and not isinstance(found.site_in, Site):
        raise UsageError("a crosscoder reads several sites at once, and here one is read; give one of a single site")
    if not named and found is None and not alternatives:
        raise UsageError("there is nothing to read at the tokens; pass a direction, dictionary= or alternatives=5")
    read_after = _layers(layers, int(model.cfg.n_layers))
    limits = thresholds(above, alarm, named)
    watch = Watch(model, named, found, latents, limits, alarm, layers=read_after)
    sampling = Sampling(float(temperature))
    about = TextReading({n: d.site.hook_name for n, d in named.items()}, int(model.cfg.d_model),
                    dictionary=None if found is None else found.label, layers=read_after)  # fmt: skip
    together = max(1, _TOGETHER // max(1, len(read_after)))
    with ExitStack() as stack:
        writing = None
        if out is not None:
            temporary = stack.enter_context(replacing(out))
            writing = stack.enter_context(Writing(temporary, about))
        starts = range(0, len(given), together)
        bar = tqdm(starts, desc="reading", unit=f"{together} texts", disable=None if len(starts) > 1 else True)
        tables = []
        for start in bar:
            watch.first = start
            texts = encoded_prompts(model, given[start : start + together])
            rows = _rows(watch, texts, max_new_tokens, alternatives, sampling, seed, start)
            tables.append(rows) if writing is None else writing.add(rows)
    if out is not None:
        return TextReading.load(out)
    import pandas as pd

    return replace(about, table=pd.concat(tables, ignore_index=True))


def _is_one(prompts: Any) -> bool:
    if isinstance(prompts, str | EncodedPrompt):
        return True
    if not isinstance(prompts, Sequence) or not prompts:
        raise PromptError(
            f"a {type(prompts).__name__} of nothing that is a text gives nothing to read; pass a string, the messages "
            "of a chat, or a list of them"
        )
    return isinstance(prompts[0], Mapping)


def _layers(given: Any, n: int) -> tuple[int, ...]:
    found = given if isinstance(given, list) else list(range(n))[: n * given]
    if beyond := [each for each in found if each >= n]:
        raise UsageError(f"layers={found} names {beyond[0]}, and the model has {n} blocks; pass numbers below {n}")
    return tuple(sorted(set(found)))


def _named(directions: Any) -> dict[str, Direction]:
    named = _by_name(directions)
    if taken := set(named) & {*PLAIN, *LISTED}:
        raise UsageError(
            f"a direction is called {min(taken)!r}, as a column of every reading is, so one would hide the other; "
            "rename it: direction.renamed(name)"
        )
    return named


def _by_name(directions: Any) -> dict[str, Direction]:
    if isinstance(directions, Profile):
        directions = list(directions.values())
    if isinstance(directions, Mapping):
        return {str(name): as_direction(f"directions[{name!r}]", each) for name, each in directions.items()}
    if isinstance(directions, str | bytes) or not isinstance(directions, Iterable):
        directions = as_direction("directions", directions)
    given = [directions] if isinstance(directions, Direction) else list(directions)
    each = [as_direction(f"directions[{i}]", one) for i, one in enumerate(given)]
    names = [one.name or one.method or "direction" for one in each]
    if len(set(names)) < len(names):
        names = [f"{name} at {one.site}" for name, one in zip(names, each, strict=True)]
    if len(set(names)) < len(names):
        raise UsageError(
            f"several directions are called {names[0]!r}, so nobody could tell their columns apart; give them as "
            "{name: direction}"
        )
    return dict(zip(names, each, strict=True))


def _rows(
    watch: Watch, texts: Sequence[EncodedPrompt], new: int, alternatives: int, sampling: Sampling, seed: int, start: int
) -> pd.DataFrame:
    """A row a token of some texts, and of their answers."""
    import pandas as pd

    model, said = watch.model, [""] * len(texts)
    if new:
        seeds = [(seed, start + i) for i in range(len(texts))]
        room = int(model.cfg.n_ctx) - max(map(len, texts))
        # one token more than is kept: the last that is made is never read
        with hooked(model, [] if alternatives else watch.hooks()):
            longest = min(new + 1, max(room, new))
            made = answered_in_tokens(model, texts, seeds, max_new_tokens=longest, sampling=sampling)
        ids = [each[:new] for _, each in made]
        said = [text_of_tokens(getattr(model, "tokenizer", None), each).strip() for each in ids]
        texts = [text.with_response(answer) if answer else text for text, answer in zip(texts, ids, strict=True)]
    likely = _read_whole(watch, texts, alternatives) if alternatives or not new else None
    columns = watch.read_at([len(text) for text in texts])
    tables = []
    for i, (text, own) in enumerate(zip(texts, columns, strict=True)):
        places = np.arange(len(text))
        part = np.where((places >= text.instruction[0]) & (places < text.instruction[1]), "instruction", "prompt")
        first = len(text) if text.response is None else text.response[0]
        part = np.where(places < first, part, "answer").tolist()
        head: dict[str, Any] = {"prompt": start + i, "at": places, "part": part, "token": _tokens(model, text)}
        if new:
            head["said"] = np.where(places == text.prompt_end + 1, said[i], "")
        tables.append(pd.DataFrame(head | {k: v if v.ndim == 1 else list(v) for k, v in own.items()} | (
            {} if likely is None or not alternatives else likely[i])))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def _tokens(model: LensModel, text: EncodedPrompt) -> list[str]:
    return list(token_texts(getattr(model, "tokenizer", None), text.ids))


def _read_whole(watch: Watch, texts: Sequence[EncodedPrompt], alternatives: int) -> list[dict[str, Any]]:
    """Run the texts as they are; and the likeliest tokens after each token, where they are asked for."""
    model, found = watch.model, [dict[str, Any]() for _ in texts]
    tokenizer = getattr(model, "tokenizer", None)
    most = min(_TOKENS, _MAX_LOGITS // int(model.cfg.d_vocab)) if alternatives else _TOKENS
    lens = LayerLens(model, watch.layers if alternatives else (), alternatives)
    with hooked(model, [*watch.hooks(), *lens.hooks()]):
        for batch in batches(texts, max_tokens=max(1, most), turns=boundaries_of(model).turns):
            every = torch.arange(len(batch.rows))
            rows = torch.repeat_interleave(every, batch.lengths) if alternatives else every
            places = [torch.arange(int(n)) for n in batch.lengths] if alternatives else [batch.lengths - 1]
            logits = batch_logits(model, batch, rows, torch.cat(places))
            if not alternatives:
                continue
            p, best = likeliest(logits, alternatives)
            layered = lens.taken(tokenizer, p.cpu())
            for row, prompt in enumerate(batch.rows):
                mine = (rows == row).to(p.device)
                words = [[token_text(tokenizer, t) for t in each] for each in best[mine].tolist()]
                found[prompt] = {"likely": words, "p": p[mine].double().tolist()}
                found[prompt] |= {name: [each[i] for i in mine.nonzero()] for name, each in layered.items()}
    return found
