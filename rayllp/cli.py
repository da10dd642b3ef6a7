"""The command line: `rayllp` and its commands."""

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rayllp.config import TrainConfig, load_config, load_run_config
from rayllp.errors import DataError, LockedError, RayllpError, SettingsError
from rayllp.version import __version__

FAILED, REFUSED, SIGNALLED = 1, 2, 128
"""Exit codes. 0: everything was done. FAILED: the command began and failed, or found something that needs fixing. REFUSED: nothing was
done, since the command cannot work. SIGNALLED plus a signal's number: that signal stopped it.
"""


class Launcher(StrEnum):
    """What starts the worker processes."""

    ray = "ray"
    mpi = "mpi"


app = typer.Typer(no_args_is_help=True, add_completion=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rayllp {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Train very deep transformers in parallel over their layers, on Ray."""


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file of settings; none: the embedded default")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, such as mgrit.coarsening=8; repeatable")] = None,
    output: Annotated[Path | None, typer.Option(help="run directory; default runs/<date>_<name>")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run directory")] = None,
    launcher: Annotated[Launcher, typer.Option(help="ray: actors of a cluster; mpi: the processes that mpiexec started")] = Launcher.ray,
) -> None:
    """Train a model whose layers are spread over Ray actors, or over the processes that mpiexec started."""
    if resume and (config or output):
        raise typer.BadParameter("--resume takes the run's own settings: give no CONFIG or --output with it; --set changes some of them")
    if resume and overrides:
        from rayllp.models import refuse_unnamed_code

        settings: TrainConfig | None
        settings = changed = load_run_config(resume, overrides)
        named = changed.model.family if any(given.partition("=")[0].strip() == "model.family" for given in overrides) else None
        refuse_unnamed_code(changed, resume, named)
    else:
        settings = None if resume else load_config(config, overrides or [])
    with _stoppable("no step was done"):
        if launcher is Launcher.mpi:
            from rayllp.cluster.mpi_group import train_launched

            result = train_launched(settings, output=output, resume=resume)
            if result is None:  # only rank 0 has the result, and reports it
                return
        else:
            from rayllp.cluster.session import train as run_training

            result = run_training(settings, output=output, resume=resume)
    from rayllp.report.progress import tell

    if result.stopped:
        raise typer.Exit(SIGNALLED + (result.signal or signal.SIGINT))
    others = "".join(f", {name} {value:.4f}" for name, value in result.metrics.items())
    out = Console()
    tell(out, f"validation loss {result.validation_loss:.4f}{others} after {result.steps} steps (exact forward); see {result.directory}")
    if result.sample:
        tell(out, f"sample:\n{result.sample}")


@app.command()
def tune(
    sweep: Annotated[Path | None, typer.Argument(help="YAML file of a sweep; see tune_configs/")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, such as trials=8 or settings.steps=300")] = None,
    output: Annotated[Path | None, typer.Option(help="directory; default runs/<date>_<name>")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with the sweep in this directory")] = None,
) -> None:
    """Search for good settings with Ray Tune. Writes best.yaml, trials.csv and a page with charts."""
    if resume and (sweep or output or overrides):
        raise typer.BadParameter("--resume takes the sweep's own file: give no SWEEP, --output or --set with it")
    if not resume and not sweep:
        raise typer.BadParameter("give a sweep's YAML file (tune_configs/ has some), or --resume DIRECTORY")
    from rayllp.training.interrupt import Stopped, interrupting
    from rayllp.tuning.run import tune as run_sweep
    from rayllp.tuning.sweep import load_sweep

    with _stoppable("what was done is kept; go on with --resume DIRECTORY"), interrupting() as signalled:
        results = run_sweep(load_sweep(sweep, overrides or []) if sweep else None, output=output, resume=resume)
        if number := signalled():
            raise Stopped(number)
    if results.num_terminated < len(results):
        raise typer.Exit(FAILED)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run directory")],
    to: Annotated[Path, typer.Option(help="folder to write, new or empty")],
    step: Annotated[int | None, typer.Option(help="export the checkpoint after this many steps; default: the latest")] = None,
    family: Annotated[str | None, typer.Option(help="the run's model.family, where it names code (module:Class) that you trust")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="for a run with model.lora: write the whole model, not only the adapters")] = False,
) -> None:
    """Write a run's model in transformers' format, or its adapters in peft's, for from_pretrained."""
    from rayllp.checkpoint.export import export as export_model
    from rayllp.models.scaled import loader
    from rayllp.report.card import write_card

    written = export_model(run, to, step, family, merge=merge)
    write_card(run, written, step)
    kind, options = loader(written)
    typer.echo(f"{kind}.from_pretrained({str(written)!r}{options}) loads it")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories; several are drawn over one another")],
    compare: Annotated[
        str | None, typer.Option(help="serial, parallel or adaptive: state how far the others' losses are from that mode's, in %")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="HTML file; default: report.html in the run's directory; for several runs, in the current one")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="write the charts as PNG files to this folder too")] = None,
    title: Annotated[str | None, typer.Option(help="title of the page; default: the runs' names")] = None,
) -> None:
    """Write one HTML page about runs: loss, ρ, bias, time and memory by worker, events, sample, settings. Needs no cluster."""
    from rayllp.report.page import write_report

    written = write_report(runs, output=output, png=png, title=title, baseline=compare)
    for gap in written.comparison.gaps if written.comparison is not None else ():
        typer.echo(gap.sentence(str(compare)))
    pictures = f" and {len(written.pictures)} pictures in {png}" if written.pictures else ""
    typer.echo(f"wrote {written.page} ({written.page.stat().st_size / 1e6:.2f} MB){pictures}")


@app.command()
def suggest_buffers(
    run: Annotated[Path, typer.Argument(help="directory of a run with adaptive.lipschitz_every")],
    factor: Annotated[float, typer.Option(help="a layer is steep beyond this many times the middle layers' median")] = 2.0,
) -> None:
    """Suggest how many layers to make buffers at each end, from each layer's Lipschitz constant."""
    from rayllp.report.buffers import show_suggestion

    show_suggestion(run, factor, Console(highlight=False))


@app.command()
def chaos(
    run: Annotated[Path, typer.Argument(help="directory of a run that is training now")],
    mtbf: Annotated[str, typer.Option(help="mean time between kills, such as 20s, 15m or 1h")],
    seed: Annotated[int, typer.Option(help="seed of the times and of the choice of workers")] = 0,
    limit: Annotated[str | None, typer.Option("--for", help="stop after this time, such as 5m; default: when the run ends")] = None,
) -> None:
    """Kill random workers of a run, to see how it and the cluster recover. Ctrl-C ends this; the run goes on."""
    from rayllp.cluster.chaos import inject_failures
    from rayllp.quantities import DURATIONS, quantity

    limit_s = None if limit is None else quantity(limit, "--for", DURATIONS)
    inject_failures(run, quantity(mtbf, "--mtbf", DURATIONS), seed, limit_s, typer.echo)


@app.command()
def doctor(
    path: Annotated[str | None, typer.Option(help="folder or URL where runs will be written; every node tries to write there")] = None,
) -> None:
    """Check a cluster (versions, GPUs, links between neighbours, shared storage, clocks), and say what to fix."""
    from rayllp.cluster.doctor import run_doctor

    if not run_doctor(path, Console(highlight=False)):
        raise typer.Exit(1)


bench = typer.Typer(no_args_is_help=True, help="Time a model's layers, the links between workers, or a training step.")
app.add_typer(bench, name="bench")
Config = Annotated[Path | None, typer.Argument(help="YAML file of settings; none: the embedded default")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, such as workers=4; repeatable")]
Json = Annotated[Path | None, typer.Option("--json", help="write the figures to this file too")]


@bench.command("step")
def bench_step(
    config: Config = None,
    overrides: Overrides = None,
    emulate: Annotated[
        str | None,
        typer.Option(help="time stand-ins for the layers: 10ms each for forward, input gradient and weight gradient, or 10ms,8ms,6ms"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="number of steps to time")] = 10,
    json: Json = None,
    trace: Annotated[Path | None, typer.Option(help="write the timeline to this file, for ui.perfetto.dev or chrome://tracing")] = None,
    picture: Annotated[Path | None, typer.Option(help="write the timeline to this .png or .svg")] = None,
) -> None:
    """Time a training step: seconds by phase and worker, compared with the schedule's ideal."""
    from rayllp.bench.command import run_step

    run_step(load_config(config, overrides or []), emulate, steps, json, trace, picture, Console(highlight=False))


@bench.command("layers")
def bench_layers(config: Config = None, overrides: Overrides = None, json: Json = None) -> None:
    """Time a layer: seconds of its forward, input gradient and full gradient. Also shows its size in bytes."""
    from rayllp.bench.command import run_layers

    run_layers(load_config(config, overrides or []), json, Console(highlight=False))


@bench.command("links")
def bench_links(config: Config = None, overrides: Overrides = None, json: Json = None) -> None:
    """Time the transfer of a state from one worker to the next: seconds and bandwidth."""
    from rayllp.bench.command import run_links

    run_links(load_config(config, overrides or []), json, Console(highlight=False))


@app.command()
def plan(
    config: Config = None,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, help="number of devices")] = 8,
    batch: Annotated[int | None, typer.Option(min=1, help="sequences per step; default: the config's")] = None,
    costs: Annotated[
        list[Path] | None,
        typer.Option(help="what `rayllp bench layers --json` wrote on such a device, one a batch; default: measured here"),
    ] = None,
    latency: Annotated[str, typer.Option(help="latency of a message between neighbours")] = "20us",
    bandwidth: Annotated[str, typer.Option(help="bandwidth between neighbours")] = "10GB/s",
    memory: Annotated[str | None, typer.Option(help="memory of a device, such as 80GB; default: no limit")] = None,
    run: Annotated[list[Path] | None, typer.Option(help="a run or a sweep whose probes measured biases; repeatable")] = None,
    bias: Annotated[float, typer.Option(help="largest bias that counts as accurate enough")] = 0.2,
    json: Json = None,
) -> None:
    """Predict the speed of every data × layer mesh (layer-parallel, pipeline, data-parallel), and recommend one."""
    from rayllp.bench.command import run_plan
    from rayllp.plan import Device
    from rayllp.quantities import TIMES, quantity

    settings = load_config(config, [*(overrides or []), *([] if batch is None else [f"batch_size={batch}"])])
    device = Device(
        latency_s=quantity(latency, "--latency", TIMES),
        bandwidth=quantity(bandwidth, "--bandwidth", "GB/s MB/s Gb/s"),
        memory=None if memory is None else quantity(memory, "--memory", "GB GiB MB"),
    )
    run_plan(settings, device, devices, costs or [], run or [], bias, json, Console(highlight=False))


@app.command()
def settings() -> None:
    """List every setting with its default and meaning."""
    from rayllp.report.settings import settings_table

    typer.echo(settings_table())


@contextmanager
def _stoppable(what: str) -> Iterator[None]:
    """If a signal stops what is inside, say so in one line, and exit with the signal's exit code."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        number = getattr(stopped, "number", signal.SIGINT)
        _complain(f"stopped by {signal.Signals(number).name}: {what}")
        raise typer.Exit(SIGNALLED + number) from None


def _complain(text: str, style: str | None = None) -> None:
    # Prints as `report.progress.tell` does; importing that would take longer than most commands need to find out that they cannot work.
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False, style=style)


def exit_code(error: RayllpError) -> int:
    """Return REFUSED if the command has to be changed before anything can be done, otherwise FAILED."""
    return REFUSED if isinstance(error, SettingsError | DataError | LockedError) else FAILED


def main() -> None:
    """Run the command line. Errors that rayllp raises on purpose are shown as one message, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # if Δ or → cannot be encoded, a question mark is better than an error
            stream.reconfigure(errors="replace")
    try:
        app()
    except RayllpError as error:
        _complain(f"{type(error).__name__}: {error}", style="red")
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(SIGNALLED + signal.SIGINT)
