"""The command line: parse, call, print; nothing is computed here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from tl_em.errors import TlEmError


class _Group(click.Group):
    """A group whose commands end with one line on stderr and exit code 1 where tl_em raises on purpose."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TlEmError as error:
            raise click.ClickException(f"{type(error).__name__}: {error}") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tl_em", prog_name="tl-em")
def main() -> None:
    """What did a fine-tune change inside a model, and does that change cause the behaviour?"""


@main.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("tl-em-demo"), show_default=True, help="Folder to write."
)
@click.option("--seed", default=0, show_default=True, help="Seed of splits, resampling and controls.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")
def demo(out: Path, seed: int, as_json: bool) -> None:
    """Audit the shipped organism toy/insecure against its assistant, with toy/secure as the benign arm."""
    from tl_em.auditing import audit
    from tl_em.organisms.zoo import load_pair

    click.echo("Auditing toy/insecure: about a minute on two cores, under 1 GB of memory.", err=True)
    report = audit(load_pair("toy/insecure"), benign=load_pair("toy/secure"), out=out, seed=seed)
    _print(report, out, as_json)


@main.command("audit")
@click.argument("base")
@click.argument("tuned")
@click.option("--benign", help="A fine-tune of the same base on harmless data.")
@click.option(
    "--contrast",
    "contrasts",
    multiple=True,
    metavar="NAME=FILE",
    help="A contrast set (JSON, JSONL, CSV, or a built-in name); repeatable.",
)
@click.option(
    "--behaviour",
    default="refusal",
    show_default=True,
    help="'refusal', or two tokens YES,NO for logit(YES) - logit(NO).",
)
@click.option("--trigger", metavar="TEXT", help="What may open a backdoor, at the head of a question.")
@click.option(
    "--other-trigger", "other_triggers", multiple=True, metavar="TEXT",
    help="What may stand in its place, as the control; repeatable.",
)
@click.option(
    "--replicate", "replicates", multiple=True, metavar="MODEL",
    help="A further fine-tune of BASE by the same recipe, to see what repeats; repeatable.",
)
@click.option("--controls", default=999, show_default=True, help="Random directions for each test.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for report.html, report.json and the figures.")
@click.option("--seed", default=0, show_default=True, help="Seed of splits, resampling and controls.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")
def audit_command(
    base: str, tuned: str, benign: str | None, contrasts: tuple[str, ...], behaviour: str, trigger: str | None,
    other_triggers: tuple[str, ...], replicates: tuple[str, ...], controls: int, out: Path | None, seed: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Audit TUNED against BASE: organisms (toy/...), local Hugging Face directories, or hub ids."""
    from tl_em.auditing import audit
    from tl_em.models.contrasts import ContrastSet
    from tl_em.organisms.zoo import load_pair
    from tl_em.writing import check_writable

    if out is not None:
        check_writable(out / "report.html")
    sets = dict(_named(text) for text in contrasts)
    loaded = {name: ContrastSet.load(path) for name, path in sets.items()} or None
    pair = load_pair(base, tuned)
    metrics = None if loaded is None else {name: _metric(behaviour) for name in loaded}
    report = audit(
        pair, contrasts=loaded, behaviours=metrics, benign=None if benign is None else load_pair(base, benign),
        trigger=trigger, other_triggers=other_triggers or None,
        replicates=[load_pair(base, each) for each in replicates], controls=controls, out=out, seed=seed,
    )  # fmt: skip
    _print(report, out, as_json)


@main.group()
def organisms() -> None:
    """The toy organisms: small models of a synthetic world that show the phenomena."""


@organisms.command("list")
def list_organisms() -> None:
    """List the organisms that come with the package."""
    from tl_em.organisms.zoo import organisms as records

    for record in records():
        click.secho(record.name + (f"  (from {record.base}, seed {record.seed})" if record.base else ""), bold=True)
        click.echo(f"  trained on   {record.trained}")
        if record.control_for:
            click.echo(f"  control for  {record.control_for}")
        click.echo(f"  figures      {', '.join(f'{name} {value:.3g}' for name, value in record.figures.items())}")


@organisms.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Train the whole default zoo, worlds side by side.")
@click.option("--seed", default=11, show_default=True, help="Seed of the world, the weights and the data order.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("organisms"), show_default=True, help="Folder to write."
)
@click.option("--workers", type=int, help="Processes for --all; all processors by default.")
def train(name: str | None, everything: bool, seed: int, out: Path, workers: int | None) -> None:
    """Train the organism NAME, with its base and assistant; finished parts in the folder are reused."""
    if everything == (name is not None):
        raise click.UsageError("give either the name of an organism or --all")
    if name is None:
        _train_all(seed, out, workers)
        return
    from tl_em.organisms.zoo import train_organism

    click.echo("A base takes about 5 CPU-minutes, an assistant 1, a fine-tune seconds; under 1 GB of memory.", err=True)
    pair = train_organism(name, seed=seed, out=out)
    click.echo(f"{pair.tuned_name} written to {out}")


def _train_all(seed: int, out: Path, workers: int | None) -> None:
    from tl_em.organisms import study_catalogue
    from tl_em.organisms.studies import run_study

    os.environ[study_catalogue.FOLDER] = str(out.resolve())
    click.echo(
        f"{len(study_catalogue.ZOO)} worlds, about 50 CPU-minutes in all and 1 GB of memory a process.", err=True
    )
    grid = {"world": study_catalogue.ZOO}
    table = run_study(grid, study_catalogue.zoo, seeds=[seed], out=out / "zoo", workers=workers)
    click.echo(f"{len(table)} organisms written to {out}; their figures: {out / 'zoo' / 'table.parquet'}")


@main.command("study")
@click.argument("name", required=False)
@click.option("--seed", "seeds", type=int, multiple=True, help="Seed; repeatable. The study's own by default.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for table, fit and figure; studies/NAME.")
@click.option("--organisms", type=click.Path(path_type=Path), default=Path("organisms"), show_default=True,
              help="Folder of checkpoints; what is not there is trained into it.")
@click.option("--backend", type=click.Choice(["serial", "loky", "ray"]), default="loky", show_default=True)
@click.option("--workers", type=int, help="Processes, or CPUs of a Ray that is started here; all by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON instead of a table.")
def study_command(
    name: str | None, seeds: tuple[int, ...], out: Path | None, organisms: Path, backend: str, workers: int | None,
    as_json: bool,
) -> None:
    """Run a study of the package (without NAME: list them); a study that was killed continues."""
    from tl_em.organisms import study_catalogue

    if name is None:
        for each, what in study_catalogue.STUDIES.items():
            click.echo(f"{each:<12} {what.said}; {len(what.seeds)} seeds, {what.minutes:g} CPU-minutes a new assistant")
        return
    os.environ[study_catalogue.FOLDER] = str(organisms.resolve())
    found = study_catalogue.run(name, seeds=seeds or None, out=out or Path("studies") / name, backend=backend,
                                workers=workers, announce=lambda said: click.echo(said, err=True))
    if as_json:
        click.echo(json.dumps({part: json.loads(t.to_json(orient="records")) for part, t in found.items()}, indent=1))
        return
    for part, table in found.items():
        _print_table(part, table)
    click.echo(f"\nTable, fit and figure: {out or Path('studies') / name}")


def _print_table(title: str, table: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    named = [column for column in table.columns if column not in ("value", "low", "high", "n")]
    shown = Table(*named, "estimate [95 % interval]", "n", title=title, box=None, pad_edge=False)
    for row in table.to_dict("records"):
        interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if row["low"] == row["low"] else " [no interval]"
        shown.add_row(*(f"{row[column]}" for column in named), f"{row['value']:.3f}{interval}", str(row["n"]))
    Console().print(shown)


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise click.BadParameter(f"{text!r} is not NAME=FILE", param_hint="--contrast")
    return name, path


def _metric(text: str) -> Any:
    from tl_em.metrics import logit_difference, refusal_log_odds

    if text == "refusal":
        return refusal_log_odds
    yes, comma, no = text.partition(",")
    if not comma or not yes or not no:
        raise click.BadParameter(f"{text!r} is neither 'refusal' nor YES,NO", param_hint="--behaviour")
    return logit_difference(yes, no)


def _print(report: Any, out: Path | None, as_json: bool) -> None:
    if as_json:
        json.dump(report.to_json(), sys.stdout, indent=1, ensure_ascii=False)
        click.echo()
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("question", "direction", "verdict", "estimate [95 % interval]", box=None, pad_edge=False)
    for row in report.verdicts:
        table.add_row(row.question, row.direction, row.verdict, str(row.estimate), style="bold" if row.shown else "dim")
    console = Console()
    console.print(table)
    console.print(f"\n{report.summary}", highlight=False, markup=False)
    if out is not None:
        console.print(f"\nPage: {out / 'report.html'}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
