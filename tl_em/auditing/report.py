"""The report: what an audit found, as tables, words, JSON and a page; and what is added to it afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tl_em.arguments import COUNT, checked
from tl_em.auditing.plan import EXPLORATORY, Plan
from tl_em.claims.calibration import Calibration
from tl_em.claims.claim import Row
from tl_em.claims.compare import Comparison
from tl_em.claims.consistency import Consistency
from tl_em.claims.questions.backdoor import Backdoor
from tl_em.errors import UsageError
from tl_em.showing import json_shown, plain_rows, slug

if TYPE_CHECKING:
    import pandas as pd

    from tl_em.features.cards import FeatureCards
    from tl_em.graph.graph import AttributionGraph, GraphDiff
    from tl_em.models.lint import Lint
    from tl_em.report.plain import Clause

SCHEMA = "tl-em/report/1"


class Section(NamedTuple):
    """A table of a study, its figure or the function that draws it, and a sentence for the reader."""

    table: pd.DataFrame
    plot: Any
    note: str


OTHERS = {".csv", ".doc", ".docx", ".ipynb", ".md", ".parquet", ".pdf", ".png", ".svg", ".txt"}
"""Endings of files that a report is not written as."""


def ending_of(path: str | Path) -> str:
    """What a report is written as there: ``".json"``, ``".html"``, ``".htm"``, or else a folder.

    Raises:
        UsageError: the ending of a file of another kind.

    Example:
        >>> ending_of("a/report.html"), ending_of("a/run-0.1")
        ('.html', '.1')
    """
    ending = "" if Path(path).is_dir() else Path(path).suffix.lower()
    if ending in OTHERS:
        raise UsageError(
            f"{str(path)!r} ends like a file that a report is not written as, and a folder of that name would mislead. "
            "Pass a folder for page, record and figures, or a path that ends in .html or .json."
        )
    return ending


@dataclass(frozen=True, eq=False)
class Report:
    """What an audit found: verdicts, a sentence that sums them up, tables and figures, and the page.

    Args:
        comparison: the judged rows and the tables behind them.
        rates: behaviour before and after, with intervals.
        provenance: models, data hashes, seed, versions, and the call that reproduces it.
        limits: what the page does not show.
        backdoor: what a trigger opens, where one was given.
        consistency: what several fine-tunes have in common, where there were several.
        studies: results of ``em.run_study`` that :meth:`with_study` added, and graphs, by name.
        features, features_note: latents, their cards and what was verified about them, of :meth:`with_features`.
        graphs: those that :meth:`with_graph` added, by name.
        plan: what was to be asked, where that was written down.
        calibration: how often this audit would be wrong, and what it would have found, where that was measured.
        lint: what of each contrast set may be mistaken for its concept, or counted twice, by direction.
        answers: what each model says to the same questions: domain, asked, and a column a model; last, where one was
            measured, the tuned model's with a direction taken out.
        outcomes: how a reader outside the field is told of the outcomes of ``rates`` (``ModelPair.outcomes``).
        note: a sentence of the pair's own about what it cannot say.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> report = em.audit(pair, contrasts={"persona": pair.contrasts["persona"]}, questions=["level"], controls=99)
        >>> report.verdicts[0].direction, report.verdicts[0].verdict
        ('persona', 'exaggerated')
    """

    comparison: Comparison
    rates: pd.DataFrame
    provenance: dict[str, Any]
    limits: tuple[str, ...]
    backdoor: Backdoor | None = None
    consistency: Consistency | None = None
    studies: Mapping[str, Section] = field(default_factory=dict)
    features: FeatureCards | None = None
    features_note: str = ""
    graphs: Mapping[str, AttributionGraph | GraphDiff] = field(default_factory=dict)
    calibration: Calibration | None = None
    plan: Plan | None = None
    lint: Mapping[str, Lint] = field(default_factory=dict)
    answers: pd.DataFrame | None = None
    outcomes: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def plain(self) -> tuple[Clause, ...]:
        """What was found in words for a reader outside the field: clauses with ``about``, ``text`` and ``figures``."""
        from tl_em.report.plain import clauses

        return clauses(self)

    @property
    def verdicts(self) -> tuple[Row, ...]:
        """One row for each question and direction; after them those of the backdoor."""
        return (*self.comparison.rows, *(() if self.backdoor is None else self.backdoor.rows))

    @property
    def summary(self) -> str:
        """A sentence for each direction, the backdoor, the other fine-tunes and each verified set of latents."""
        parts = (self.comparison, self.backdoor, self.consistency)
        checks = () if self.features is None else self.features.checks
        said = [part.summary for part in parts if part is not None]
        return " ".join([*said, *(f"{check.label}: {check.verdict}." for check in checks)]).strip()

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name; those of a backdoor, of other fine-tunes and of studies only where there are any."""
        found = {"rates": self.rates, "by_layer": self.comparison.by_layer, "use": self.comparison.use}
        found |= {f"question_{name}": table for name, table in self.comparison.tables.items()}
        for name, part in (("backdoor", self.backdoor), ("consistency", self.consistency)):
            kept = {} if part is None else {key: getattr(part, key) for key in part.__dataclass_fields__}
            found |= {f"{name}_{key}": table for key, table in kept.items() if hasattr(table, "to_json")}
        found |= {} if self.answers is None else {"answers": self.answers}
        if self.features is not None:
            found["features"] = self.features.to_pandas()
            found |= {f"feature_check_{i}": check.to_pandas() for i, check in enumerate(self.features.checks, 1)}
        return found | {f"study_{name}": study.table for name, study in self.studies.items()}

    @checked()
    def status(self, row: Row) -> str:
        """``"planned"`` where a plan has it, else ``"exploratory"``."""
        return EXPLORATORY if self.plan is None else self.plan.status(row)

    @property
    def registration(self) -> str:
        """Whether what was asked was written down before."""
        if self.plan is None:
            return "Exploratory: what is asked was not written down before the tuned model was read (em.plan)."
        return self.plan.said(self.verdicts)

    @checked()
    def with_study(self, name: str, table: pd.DataFrame, *, plot: Any = None, note: str = "") -> Report:
        """The report with a section for a study: its table and, where there is one, its figure.

        Args:
            name: what the section is called.
            table: from ``em.run_study`` or ``em.organisms.summarise_study``.
            plot: ``(table, width=inches) -> Figure``, or a matplotlib Figure.
            note: a sentence for the reader: what was varied, what the control is.
        """
        return replace(self, studies={**self.studies, name: Section(table, plot, note)})

    @checked()
    def with_features(self, cards: FeatureCards, *, note: str = "") -> Report:
        """The report with a section for latents: what was verified about them, and a row for each.

        Args:
            cards: from ``em.features.feature_cards(…, checks=[em.verify_feature(…), …])``.
            note: a sentence for the reader: how they were found.
        """
        return replace(self, features=cards, features_note=note)

    @checked()
    def with_calibration(self, calibration: Calibration) -> Report:
        """The report with its error rates and its power, from ``em.calibration`` with the arguments of the audit."""
        return replace(self, calibration=calibration)

    @checked(rows=COUNT)
    def with_graph(self, name: str, graph: AttributionGraph | GraphDiff, *, note: str = "", rows: int = 20) -> Report:
        """The report with the figure of a graph and its largest nodes; saved to a folder, its page stands beside.

        Args:
            name: what the section is called.
            graph: one graph, or ``base_graph.diff(tuned_graph)``.
            note: a sentence for the reader: which prompt, and why this one.
            rows: of the table of nodes, or of changes, the largest first.
        """
        from tl_em.graph import captions
        from tl_em.report.graphs import graph as figure

        table = graph.to_pandas()
        size = "change" if "change" in table else "attribution"
        table = table.reindex(table[size].abs().sort_values(ascending=False).index).head(rows)
        figures = "; ".join(f"{what} {value}" for what, value, _ in captions.validation(graph))
        said = [note, captions.warning(graph), f"{figures}." if figures else ""]
        added = replace(self, graphs={**self.graphs, name: graph})
        plot = partial(_drawn, figure, graph)
        return added.with_study(name, table, plot=plot, note=" ".join(filter(None, said)))

    def to_json(self) -> dict[str, Any]:
        """The report as plain values (schema ``tl-em/report/1``)."""
        added = {} if self.calibration is None else {"calibration": self.calibration.to_json()}
        rows = [row.to_json() for row in self.verdicts]
        if self.plan is not None:
            added["plan"] = self.plan.to_json()
            rows = [row | {"status": self.status(own)} for row, own in zip(rows, self.verdicts, strict=True)]
        return {
            "schema": SCHEMA,
            "summary": self.summary,
            "plain": [each._asdict() for each in self.plain],
            "verdicts": rows,
            "tables": {name: plain_rows(table) for name, table in self.tables.items()},
            "prompts": {
                name: {"counted": self.comparison.together.get(name, ""), **each.to_json()}
                for name, each in self.lint.items()
            },
            "limits": list(self.limits),
            "provenance": self.provenance,
            **added,
        }

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write the page to an ``.html`` file, the record to a ``.json`` file, or into a folder both with all figures.

        Args:
            path: ends in ``.html`` or ``.json``; anything else is a folder, whatever dots its name has.

        Raises:
            UsageError: the ending of a file of another kind.
            OutputError: the path cannot be written.
        """
        from tl_em.report import html, page, plots

        path = Path(path)
        ending = ending_of(path)
        if ending == ".json":
            return html.write(path, json_shown(self.to_json(), indent=1))
        if ending in (".html", ".htm"):
            return html.write(path, page.render(self))
        html.write(path / "report.json", json_shown(self.to_json(), indent=1))
        for name, figure in plots.figures(self).items():
            for suffix in ("svg", "png"):
                plots.save(figure, path / "figures" / f"{slug(name)}.{suffix}")
        if self.features is not None:
            self.features.save(path / "features.html")
        for i, graph in enumerate(self.graphs.values(), 1):
            graph.save_html(path / f"graph-{i}.html")
        return html.write(path / "report.html", page.render(self))

    def plot(self, *, width: float | str | Any = 7.0) -> Any:
        """The verdicts as a forest plot (a matplotlib Figure).

        Args:
            width: inches, or ``"column"`` or ``"text"`` of a paper.
        """
        return self.comparison.plot(width=width)

    def _repr_html_(self) -> str:
        from tl_em.report import html, page

        return html.frame(
            page.render(self), "Audit of a fine-tune", height=800, scripts=False, instead='report.save("report.html")'
        )

    def __repr__(self) -> str:
        return repr(self.comparison)


def _drawn(figure: Any, graph: Any, table: Any, *, width: float = 7.0) -> Any:
    """The figure of a graph, called as that of a study is: the table is drawn from the same graph."""
    return figure(graph, width=width)
