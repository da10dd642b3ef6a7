"""A run's settings, and what follows from several of them."""

from itertools import accumulate
from typing import Literal, Self

from pydantic import Field, PositiveInt, ValidationError

from rayllp.config.base import Settings
from rayllp.config.data import DataSettings
from rayllp.config.groups import (
    RUNG,
    AdaptiveSettings,
    CheckpointSettings,
    EvalSettings,
    MeshSettings,
    MGRITSettings,
    OptimizerSettings,
    ProfileSettings,
    Relaxation,
    WorkerRange,
)
from rayllp.config.network import BufferSettings, ModelSettings, NestedSettings, StepSettings
from rayllp.errors import SettingsError
from rayllp.mgrit import Hierarchy, SolverOptions, build_hierarchy, split_evenly
from rayllp.mgrit.windows import Placement

TIMED_STEP = 3
"""Of the first exact steps, the one whose timeline is recorded."""
SWEEPS = ((1, 1), (2, 1), (2, 2), (3, 3))
"""Forward and backward sweeps of windows that a default ladder has. A sweep more costs a fifth of the step or more, and gains an order."""
CONSISTENCY = 0.3
"""Weight of the consistency penalty in mode adaptive; what examples/fidelity.py found to be enough to begin with."""
EXACT_FROM = 0.8
"""Share of the steps after which mode adaptive trains exactly: what bias there was is trained away."""
EXACT_FROM_WINDOWS = 0.95
"""The same of windows, whose bias costs less: ends of 2 to 20 % lead to the same loss (docs/frontier.md)."""

MAY_DIFFER = set(
    "name workers resize_check_s mesh device channel receive_timeout_s hang_timeout_s snapshot_every spare_workers max_failures eval "
    "checkpoint microbatches timeline_every log_to profile".split()
)
"""Settings of a run that may be others when it goes on from checkpoints alone, and that make it no other kind of run."""


class RunSettings(Settings):
    """The settings of one run, and what follows from them; `TrainConfig` checks them."""

    name: str = Field("gpt2", min_length=1, max_length=100, pattern=r"^[^/\x00]+$", description="part of the run directory's name")
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    sequence_length: int = Field(128, ge=2, description="tokens a sequence")
    batch_size: int = Field(8, ge=1, description="sequences a step, over all replicas")
    accumulate: int = Field(1, ge=1, description="gradient accumulation: parts in which a step's batch is solved")
    microbatches: int | None = Field(
        None, ge=1, description="of exact steps; default up to 4 a worker, as the batch divides; layers in turn: as few as keep all busy"
    )
    steps: int = Field(250, ge=1, description="optimizer steps")
    seed: int = Field(0, ge=0, description="keys initialisation, batches and dropout")
    dtype: Literal["float32", "bfloat16", "float64"] = Field("float32", description="bfloat16: autocast over float32 weights")
    workers: PositiveInt | WorkerRange | None = Field(
        None,
        description="mesh.data × mesh.layer; default 2. {min: 2, max: 8}: as many as the cluster has room for, at any time, "
        "with mesh.data > 1 in whole replicas",
    )
    resize_check_s: float = Field(10.0, gt=0, description="seconds between looks for room for more workers, below workers.max")
    mesh: MeshSettings = MeshSettings()
    solver: Literal["mgrit", "torchbraid"] = Field(
        "mgrit", description="of parallel mode; torchbraid: that package's, where it is installed (docs/torchbraid.md)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where the cluster has enough of them")
    compile: bool = Field(False, description="torch.compile of the layers; the first steps then take a minute")
    channel: Literal["auto", "gloo", "nccl", "mpi"] = Field(
        "auto", description="auto: nccl on GPUs, gloo on CPUs; mpi: mpi4py's, for a tuned MPI (docs/cluster.md)"
    )
    receive_timeout_s: float = Field(120.0, gt=0, description="longest wait for a neighbour's message")
    hang_timeout_s: float = Field(30.0, gt=0, description="a worker that is silent for so long after another failed is killed and replaced")
    snapshot_every: int | None = Field(
        None,
        ge=0,
        description="steps between states kept in memory, here and at the neighbour; default: as 3 % of the time allows; 0: never",
    )
    spare_workers: bool = Field(
        True, description="keep a started process in reserve on each node with workers (CPUs only, 0.4 GB): losses cost 2 s instead of 10"
    )
    timeline_every: int = Field(
        50, ge=0, description="steps between steps whose time is taken apart by phase and worker, for `rayllp report`; 0: never"
    )
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",), description="where curves go, besides RUN's own files: any of tensorboard, wandb, mlflow (docs/trainer.md)"
    )
    max_failures: int = Field(10, ge=0, description="lost workers that a run survives within an hour")
    mode: Literal["parallel", "serial", "adaptive"] = Field(
        "adaptive", description="adaptive: as parallel as the gradient's bias allows, exact at the end"
    )
    mgrit: MGRITSettings = MGRITSettings()
    buffers: BufferSettings = BufferSettings()
    step: StepSettings = StepSettings()
    nested: NestedSettings = NestedSettings()
    adaptive: AdaptiveSettings = AdaptiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    profile: ProfileSettings = ProfileSettings()

    # Derived ------------------------------------------------------------------------------------------------------------------

    @property
    def layer_workers(self) -> int:
        """Blocks of layers, P."""
        workers = self.workers.max if isinstance(self.workers, WorkerRange) else self.workers
        return self.mesh.layer or max(1, (workers or 2 * self.mesh.data) // self.mesh.data)

    @property
    def world(self) -> int:
        """Workers in all."""
        return self.mesh.data * self.layer_workers

    @property
    def fewest_workers(self) -> int:
        """With fewer the run waits: `world`, or where `workers` is a range its lower end."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.world

    def with_workers(self, count: int) -> Self:
        """These settings for a number of workers within the range: the largest that they allow up to `count`, so that blocks fit.

        With replicas their number changes, and a replica's workers stay as many.

        Raises:
            SettingsError: none of the range up to `count` does.
        """
        if not isinstance(self.workers, WorkerRange):
            return self
        values, failure = self.model_dump(), "the range ends above that"
        # The number of workers is to change nothing but the time.
        values["adaptive"] |= {"consistency": self.consistency, "steer": self.steers}
        values["mesh"]["placement"] = self.placement
        if self.placement == "cyclic":
            values["mgrit"]["window"] = self.window
        step = self.layer_workers if self.mesh.data > 1 else 1
        most = min(count, self.workers.max)
        for size in range(most - most % step, self.workers.min - 1, -step):
            if self.mesh.data > 1:
                values["mesh"] |= {"data": size // step, "layer": step}
            try:
                return type(self).model_validate(values | {"workers": size})
            except ValidationError as error:
                failure = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SettingsError(f"workers {self.workers.min} to {min(count, self.workers.max)} do not serve: {failure}; change workers.min")

    @property
    def middle_layers(self) -> int:
        """Layers in the parallel solve, N."""
        return self.model.layers - self.buffers.open - self.buffers.close

    @property
    def middle_step(self) -> float:
        """Δt of a middle layer."""
        value = self.step.middle
        return float(value.partition("/")[0]) / self.middle_layers if isinstance(value, str) else value

    @property
    def step_sizes(self) -> tuple[float, ...]:
        """Δt of every layer, buffers included."""
        buffers, middle = self.buffers, (self.middle_step,) * self.middle_layers
        return (self.step.buffer,) * buffers.open + middle + (self.step.buffer,) * buffers.close

    @property
    def replica_batch(self) -> int:
        """Sequences a replica takes in a step."""
        return self.batch_size // self.mesh.data

    @property
    def shards_optimizer(self) -> bool:
        """Whether replicas share out the optimizer's state: where there are several, and it is wanted."""
        return self.optimizer.sharded and self.mesh.data > 1

    @property
    def blocks(self) -> tuple[int, ...]:
        """Middle layers of each worker."""
        if self.mesh.blocks:
            return self.mesh.blocks
        if self.solver == "torchbraid":
            return torchbraid_blocks(self.middle_layers, self.layer_workers)
        whole = self.needs_whole_intervals
        return default_blocks(self.middle_layers, self.layer_workers, self.first_coarsening, whole_intervals=whole)

    @property
    def placement(self) -> Literal["blocks", "cyclic"]:
        """Which worker has which middle layers: neighbouring ones, or layer n on worker n mod P."""
        if self.mesh.placement is not None:
            return self.mesh.placement
        return "cyclic" if self.mgrit.window is not None or self._leaves_solver_open else "blocks"

    @property
    def _leaves_solver_open(self) -> bool:
        """Whether it says nothing of how layers are to be solved: then the fastest accurate way is looked for."""
        adaptive = self.adaptive
        penalised = bool(adaptive.consistency or adaptive.smoothness or adaptive.steer)
        judged_by_bias = self.mode == "adaptive" and adaptive.rule == "bias" and adaptive.ladder is None and not penalised
        untouched = self.mgrit.model_copy(update={"recompute": False}) == MGRITSettings()
        return judged_by_bias and untouched and self.solver == "mgrit" and self.mesh.blocks is None

    @property
    def window(self) -> int:
        """Layers that a window solve takes at once."""
        return self.mgrit.window or self.layer_workers

    @property
    def heeds_times(self) -> bool:
        """Whether the controller leaves solves that are no faster than an exact step: where the ladder is not the user's own."""
        return self.mode == "adaptive" and self.placement == "cyclic" and self.adaptive.ladder is None

    def layers_of(self, rank: int) -> tuple[int, ...]:
        """The middle layers of a worker of the layer group, ascending, counted from the first middle layer."""
        if self.placement == "cyclic":
            return Placement.cyclic(self.middle_layers, self.layer_workers).owned(rank)
        start = sum(self.blocks[:rank])
        return tuple(range(start, start + self.blocks[rank]))

    @property
    def first_coarsening(self) -> int:
        """c_f between the finest level and the next."""
        return self.mgrit.coarsening if isinstance(self.mgrit.coarsening, int) else self.mgrit.coarsening[0]

    @property
    def ladder(self) -> tuple[tuple[int, int, Relaxation | None], ...]:
        """Forward (0: serial) and backward iterations and relaxation of the controller's rungs, cheap ones first; serial follows."""
        if self.adaptive.ladder is not None:
            return tuple(_read_rung(rung) for rung in self.adaptive.ladder)
        if self.placement == "cyclic" and self.mode == "adaptive":
            return tuple((forward, backward, None) for forward, backward in SWEEPS if min(forward, backward) < self.window)
        forward, backward = self.mgrit.iterations.forward, self.mgrit.iterations.backward
        if self.placement == "cyclic":
            return ((forward, backward, None),)
        if self.mgrit.levels.forward == 1:
            return (0, backward, None), (0, backward + 1, None)
        # Most of a gradient's bias comes from the states it is taken at: an iteration more of the forward helps first.
        return (forward, backward, None), (forward + 1, backward, None), (forward + 1, backward + 1, None)

    @property
    def rung_levels(self) -> int:
        """Levels of a rung's forward solve, where it is not serial: a ladder may have such rungs where mgrit.levels.forward is 1."""
        levels = self.mgrit.levels
        return levels.forward if levels.forward > 1 else max(2, levels.backward)

    @property
    def consistency(self) -> float:
        """Weight of the consistency penalty that training begins with."""
        if self.adaptive.consistency is not None:
            return self.adaptive.consistency
        if self.placement == "cyclic":  # a window's error does not come from weights that differ
            return 0.0
        watched = self.mode == "adaptive" and self.adaptive.rule != "convergence"
        if not watched or self.layer_workers > len(self.coarse_lengths) or (self.mesh.blocks and not self.has_whole_intervals):
            return 0.0
        return CONSISTENCY

    @property
    def bias_to_noise(self) -> float:
        """A bias below this share of the gradient's noise is let be.

        One sweep of windows in both directions is the exact gradient of a network that is nearly the same: it is stable to train by.
        """
        if self.adaptive.bias_to_noise is not None:
            return self.adaptive.bias_to_noise
        return 0.8 if self.placement == "cyclic" else 0.4

    @property
    def steers(self) -> bool:
        """Whether probes move that weight."""
        return self.consistency > 0 and self.adaptive.rule != "convergence" and self.adaptive.steer is not False

    def is_timed(self, step: int) -> bool:
        """Whether this step's timeline is recorded, unless it is a probe: the middle one of so many, since a run's first is slow."""
        every = self.timeline_every
        # Where exact steps are timed at the start, one of them tells what all workers compute together.
        return bool(every) and (step % every == every // 2 or (self.heeds_times and step == TIMED_STEP))

    @property
    def switch_at(self) -> int | float | None:
        """The step, or the share of the steps, from which on training is serial, whatever probes say; None: none."""
        at = self.adaptive.switch_at
        if at is not None or self.mode != "adaptive":
            return at
        return EXACT_FROM_WINDOWS if self.placement == "cyclic" else EXACT_FROM

    @property
    def switch_step(self) -> int | None:
        """The same as a step."""
        return round(self.switch_at * self.steps) if isinstance(self.switch_at, float) else self.switch_at

    @property
    def needs_whole_intervals(self) -> bool:
        """Whether something that is on asks for every coarse interval on one worker."""
        return self.consistency > 0

    @property
    def has_whole_intervals(self) -> bool:
        """Whether every coarse interval is on one worker."""
        return not any(begin % self.first_coarsening for begin in [0, *accumulate(self.blocks)][:-1])

    @property
    def coarse_lengths(self) -> tuple[int, ...]:
        """Layers of each coarse interval of the finest level."""
        c, N = self.first_coarsening, self.middle_layers
        return tuple(min(start + c, N) - start for start in range(0, N, c))

    def hierarchy(self, levels: int) -> Hierarchy:
        """The forward hierarchy over the middle layers."""
        return build_hierarchy(blocks=self.blocks, levels=levels, coarsening=self.mgrit.coarsening)

    @property
    def rounding(self) -> float:
        """Relative rounding error of what a layer adds to its state; 0 where it is computed in the state's own dtype."""
        return 2.0**-8 if self.dtype == "bfloat16" else 0.0

    def method(self, iterations: int, relaxation: Relaxation | None = None) -> SolverOptions:
        """The solver's method with so many iterations, and with this relaxation of the finest level instead of the settings'."""
        settings = self.mgrit
        return SolverOptions(
            iterations=iterations,
            relaxation=(relaxation or settings.relaxation.fine, settings.relaxation.coarse),
            cycle=settings.cycle,
            coarse_step_weight=settings.coarse_step_weight,
            initial_guess=settings.initial_guess,
            tolerance=settings.tolerance,
            rounding=self.rounding,
            keep_states=False,
            # With one level in one direction there are no intervals, and its adjoint or forward wants single layers' graphs.
            batched=settings.batched and min(settings.levels.forward, settings.levels.backward) > 1,
        )


def _read_rung(rung: str) -> tuple[int, int, Relaxation | None]:
    match = RUNG.fullmatch(rung)
    assert match is not None
    forward, backward, relaxation = match.groups()
    return int(forward), int(backward), relaxation  # type: ignore[return-value]


def torchbraid_blocks(layers: int, workers: int) -> tuple[int, ...]:
    """As TorchBraid has it: it shares out the N + 1 points evenly, the first worker has one more, and the last one begins no layer."""
    if workers == 1:
        return (layers,)
    even = layers // workers
    return (even + 1, *(even,) * (workers - 2), even - 1)


def default_blocks(layers: int, workers: int, coarsening: int, *, whole_intervals: bool = False) -> tuple[int, ...]:
    """Blocks of layers: cut at C-points where the largest block does not grow by that, else as even as can be.

    A block that begins at a C-point starts its sweep without waiting for a neighbour.

    Args:
        whole_intervals: cut at C-points even so, where there is an interval for every worker.
    """
    even = split_evenly(layers, workers)
    intervals = -(-layers // coarsening)
    if intervals < workers:
        return even
    ends, done = [], 0
    for share in split_evenly(intervals, workers):
        done += share
        ends.append(min(done * coarsening, layers))
    aligned = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    return aligned if whole_intervals or max(aligned) <= max(even) else even
