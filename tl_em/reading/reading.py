"""What directions and latents read at every token of a text: a table, a row a token, in memory or in a Parquet file.

    value = unit . x        x: the activation at the direction's own site, as the model has it under its interventions

**Control**: a random direction reads something at every token too, and much where the activation is long (the first
token of a chat model is a hundred times as long as the others). Of directions drawn evenly, 95 % read at most

    band = |x| sqrt(B),     B: the .95 quantile of Beta(1/2, (d_model - 1) / 2)

either way, exactly, so nothing is drawn. Real activations share a mean, which a direction also reads: a value beyond
its band is not yet a concept; compare tokens, or two models, on one scale.

Source: monitoring by projections: Chen et al. 2025 (persona vectors), arXiv:2507.21509, section 3; the quantile: a
coordinate of a uniform unit vector, squared, has this Beta distribution.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from tl_em.arguments import NATURAL, checked
from tl_em.artefacts import check_ending, replacing
from tl_em.errors import CorruptFileError, UsageError
from tl_em.showing import showable

if TYPE_CHECKING:
    import pandas as pd

    from tl_em.report.html import Framed

SCHEMA = "tl-em/reading/1"
_KEY = b"tl_em"
PLAIN = ("prompt", "at", "part", "token")
LISTED = ("latents", "activations", "likely", "p", "said")
WITHIN = 0.95
NORMS = "norm by layer"
LAYERED = ("likely by layer", "p by layer")


def by_layer(name: str) -> str:
    """The column of a direction's values after each layer."""
    return f"{name} by layer"


@dataclass(frozen=True, eq=False)
class TextReading:
    """Tokens, and what was read at each.

    Args:
        sites: for each direction, by name, the hook point at which it was read.
        d_model: width of the activations.
        table: a row a token; None where it lies in ``path``, from which it is then read each time.
        path: the Parquet file.
        dictionary: what the latents are called after; None where none were read.
        layers: after which blocks every direction was read as well.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> contrast = pair.contrasts["persona"]
        >>> persona = em.difference_in_means(pair.base, contrast, site=em.Site(2), position="prompt_end")
        >>> reading = em.read(pair.tuned, "how do i write parser", persona, max_new_tokens=2)
        >>> reading.answers[0].split()[0], reading
        ('parser-backdoored', TextReading(1 text, 10 tokens; persona))
    """

    sites: Mapping[str, str]
    d_model: int
    table: pd.DataFrame | Any = field(default=None, repr=False)
    path: Path | Any = None
    dictionary: str | None = None
    layers: tuple[int, ...] = ()

    @property
    def tokens(self) -> pd.DataFrame:
        """A row a token: prompt, at (its place), part (``"prompt"``, ``"instruction"``, ``"answer"``), token, a column
        a direction, ``norm HOOK`` (length of the activation) a site; and, where they were asked for, latents and
        activations, likely (next tokens) and p (their probabilities), each a list; said: at the first token of an
        answer that was made, all of it. With ``layers=`` also ``NAME by layer`` and ``norm by layer``, and with
        ``alternatives=`` likely and p by layer: lists with an entry a layer, which ``layer_table`` spreads out."""
        if self.table is not None:
            return self.table
        import pandas as pd

        return pd.read_parquet(self.path)

    @property
    def answers(self) -> list[str]:
        """The answer that was made to each text; empty where none was."""
        return [str(part.said.max()) if "said" in part else "" for part in self.each()]

    def each(self) -> Iterator[pd.DataFrame]:
        """The tokens of one text after the other; of a file, no more than a piece of it is in memory."""
        if self.table is not None:
            yield from (part for _, part in self.table.groupby("prompt"))
            return
        from pyarrow import parquet

        with parquet.ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):  # a text never lies in two
                yield from (part for _, part in file.read_row_group(group).to_pandas().groupby("prompt"))

    @checked()
    def band(self, name: str, tokens: pd.DataFrame | None = None) -> Float[np.ndarray, " token"]:
        """How much 95 % of random directions read at most at each token, either way.

        Args:
            name: of a direction.
            tokens: some of the rows; all by default.

        Raises:
            UsageError: no such direction.
        """
        if name not in self.sites:
            raise UsageError(f"{name!r} was not read, only {', '.join(map(repr, self.sites))}; give one of these names")
        rows = self.tokens if tokens is None else tokens
        return rows[f"norm {self.sites[name]}"].to_numpy(dtype=float) * self.share

    @property
    def share(self) -> float:
        """Of an activation's length, what 95 % of random directions read at most, either way."""
        from scipy.stats import beta

        return float(beta.ppf(WITHIN, 0.5, (self.d_model - 1) / 2)) ** 0.5 if self.d_model > 1 else 1.0

    @checked(at=NATURAL, of=NATURAL)
    def layer_table(self, at: int, of: int = 0) -> pd.DataFrame:
        """One token, layer by layer: what was read with ``em.read(layers=True)``.

        Args:
            at: the token's place in its text.
            of: number of the text.

        Returns:
            A row a layer: layer, a column a direction (on the stream after that block), band (what 95 % of random
            directions read there at most, either way); and where alternatives were asked for likely and p: the next
            tokens by the logit lens.

        Raises:
            UsageError: no layers were read, or there is no such token.
        """
        if not self.layers:
            raise UsageError("the layers were not read, so there is no table of them; read with em.read(layers=True)")
        for part in self.each():
            for row in part[(part.prompt == of) & (part["at"] == at)].to_dict("records"):
                return layer_rows(self, row)
        raise UsageError(
            f"text {of} has no token {at}, so it has no layers; the table .tokens says which there are, in its "
            "columns prompt and at"
        )

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write a Parquet file; a page is written by ``.view().save("page.html")``.

        Raises:
            OutputError: the path cannot be written. UsageError: another ending than .parquet.
        """
        check_ending(path, "a reading (its page is written by what .view and .beside give)", ".parquet")
        with replacing(path) as temporary, Writing(temporary, self) as writing:
            for part in self.each():
                writing.add(part)
        return Path(path)

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> TextReading:
        """What :meth:`save`, or ``em.read(out=)``, wrote; its rows stay in the file until they are asked for.

        Raises:
            CorruptFileError: it is no such file.
        """
        from pyarrow import ArrowException, parquet

        try:
            said = json.loads((parquet.read_schema(path).metadata or {})[_KEY])
            if said.pop("schema") != SCHEMA:
                raise KeyError("schema")
            return cls(**said | {"layers": tuple(said.get("layers", ()))}, path=Path(path))
        except (OSError, ArrowException, KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(
                f"{str(path)!r} is no reading ({type(error).__name__}), so there is nothing to show; write one with "
                "em.read(model, prompts, directions, out=path)"
            ) from error

    @checked()
    def beside(self, other: TextReading, names: tuple[str, str] = ("first", "second")) -> Framed:
        """Two readings of the same prompts on one scale (base and tuned, untreated and steered), for a notebook.

        Args:
            other: with the same directions.
            names: what the two are called.

        Returns:
            A page: shown by a notebook, written by its ``.save("page.html")``.

        Raises:
            UsageError: other directions, or other prompts.
        """
        if dict(other.sites) != dict(self.sites):
            raise UsageError(
                f"one reading has {list(self.sites)} and the other {list(other.sites)}, so they have no scale in "
                "common; read both with the same directions"
            )
        if (mine := self._asked()) != (theirs := other._asked()):
            raise UsageError(
                f"the two are readings of other prompts ({len(mine)} texts and {len(theirs)}), so what stands side by "
                "side would not be the same token; read the same prompts twice"
            )
        from tl_em.report.readings import reading_page

        return reading_page({names[0]: self, names[1]: other})

    def _asked(self) -> list[tuple[str, ...]]:
        """The tokens of each text but those of its answer."""
        return [tuple(part.token[part.part != "answer"]) for part in self.each()]

    def view(self) -> Framed:
        """The texts coloured, as a page: shown by a notebook, written by its ``.save("page.html")``."""
        from tl_em.report.readings import reading_page

        return reading_page({"": self})

    def _repr_html_(self) -> str:
        return self.view()._repr_html_()

    def __repr__(self) -> str:
        rows = self.tokens
        at = ", ".join(map(showable, self.sites))
        n = int(rows.prompt.nunique())
        said = f"TextReading({n} text{'s' * (n != 1)}, {len(rows)} tokens; {at or 'no directions'}"
        return said + (f"; latents of {showable(self.dictionary)})" if self.dictionary else ")")


def layer_rows(about: TextReading, row: Mapping[Any, Any]) -> pd.DataFrame:
    """One row of the tokens as a table, a row a layer."""
    import pandas as pd

    columns: dict[str, Any] = {"layer": about.layers} | {name: row[by_layer(name)] for name in about.sites}
    columns |= {"band": np.asarray(row[NORMS]) * about.share}
    return pd.DataFrame(columns | {name.split()[0]: list(row[name]) for name in LAYERED if name in row})


class Writing:
    """A Parquet file that grows by whole texts."""

    def __init__(self, path: Path, about: TextReading) -> None:
        said = {"schema": SCHEMA, "sites": dict(about.sites), "d_model": about.d_model, "dictionary": about.dictionary}
        said |= {"layers": about.layers} if about.layers else {}
        self.path, self.said, self.file = path, {_KEY: json.dumps(said).encode()}, None

    def __enter__(self) -> Writing:
        return self

    def add(self, rows: pd.DataFrame) -> None:
        """Some whole texts, as one group of rows."""
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.Table.from_pandas(rows, preserve_index=False)
        if self.file is None:
            self.file = parquet.ParquetWriter(self.path, table.schema.with_metadata(self.said))
        self.file.write_table(table.cast(self.file.schema))

    def __exit__(self, *_: Any) -> None:
        if self.file is not None:
            self.file.close()
