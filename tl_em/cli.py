"""The command line: parse, call, print; nothing is computed here."""

from __future__ import annotations

import json
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
@click.option("--controls", default=999, show_default=True, help="Random directions for each test.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for report.html, report.json and the figures.")
@click.option("--seed", default=0, show_default=True, help="Seed of splits, resampling and controls.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")
def audit_command(
    base: str, tuned: str, benign: str | None, contrasts: tuple[str, ...], behaviour: str, controls: int, out: Path |
        None,
    seed: int, as_json: bool,
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
        controls=controls, out=out, seed=seed,
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
@click.argument("name")
@click.option("--seed", default=11, show_default=True, help="Seed of the world, the weights and the data order.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("organisms"), show_default=True, help="Folder to write."
)
def train(name: str, seed: int, out: Path) -> None:
    """Retrain the organism NAME, with its base and assistant; finished parts in the folder are reused."""
    from tl_em.organisms.zoo import train_organism

    click.echo("A base takes about 5 CPU-minutes, an assistant 1, a fine-tune seconds; under 1 GB of memory.", err=True)
    pair = train_organism(name, seed=seed, out=out)
    click.echo(f"{pair.tuned_name} written to {out}")


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
