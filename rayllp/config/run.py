"""The settings of a run, and the values that follow from several of them."""

from itertools import accumulate
from typing import Literal, Self

from pydantic import Field, PositiveInt, ValidationError

from rayllp.config.base import Settings
from rayllp.config.blocks import default_blocks, torchbraid_blocks
from rayllp.config.data import DataSettings
from rayllp.config.groups import (
    RUNG,
    AdaptiveSettings,
    ByDirection,
    CheckpointSettings,
    EvalSettings,
    MeshSettings,
    MGRITSettings,
    OptimizerSettings,
    ProfileSettings,
    Relaxation,
    WindowSettings,
    WorkerRange,
)
from rayllp.config.network import BufferSettings, ModelSettings, NestedSettings, StepSettings
from rayllp.errors import SettingsError, fault_text
from rayllp.mgrit import Hierarchy, SolverOptions, build_hierarchy
from rayllp.mgrit.placement import Placement
from rayllp.mgrit.windows import equal_windows

TIMED_STEP = 3
"""Number of the exact step, among the first ones of a run, whose timeline is recorded."""
SWEEPS = ((1, 1), (2, 1), (2, 2), (3, 3))
"""Forward and backward sweeps of the default ladder for windows. One sweep more costs at least a fifth of a step and gains one order."""
CONSISTENCY = 0.3
"""Default weight of the consistency penalty in mode adaptive; probes move it from there."""
EXACT_FROM = 0.8
"""Share of the steps after which mode adaptive trains exactly, which removes the effects of biased gradients."""
EXACT_FROM_WINDOWS = 0.95
"""The same share for windows of a ladder, which are solved more accurately before that (adaptive.late_from). A rolling one is accurate
enough to the end.
"""

MAY_DIFFER = set(
    "name workers resize_check_s mesh device channel receive_timeout_s hang_timeout_s snapshot_every spare_workers max_failures eval "
    "checkpoint recompute microbatches timeline_every log_to profile".split()
)
"""Settings that may change when a run is resumed from its checkpoints, without making it another kind of run."""


class RunSettings(Settings):
    """All settings of a run, and what follows from them. The rules over several groups are checked by `TrainConfig`."""

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
    solver: Literal["windows", "mgrit", "torchbraid"] = Field(
        "windows",
        description="windows: layers in turn on all workers; mgrit: neighbouring layers on one worker, several levels "
        "(arXiv:2601.09026); torchbraid: that package's, where it is installed (docs/torchbraid.md)",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where the cluster has enough of them")
    recompute: bool = Field(
        False,
        description="keep states only (of MGRIT those at C-points) and recompute graphs in the adjoint: less memory, more time",
    )
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
    max_failures: int = Field(10, ge=0, description="failures that a run survives within an hour: workers or nodes lost")
    mode: Literal["parallel", "serial", "adaptive"] = Field("adaptive", description="adaptive: as parallel as the gradient's bias allows")
    windows: WindowSettings = WindowSettings()
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
        """Number of workers that share the layers of one replica, P."""
        workers = self.workers.max if isinstance(self.workers, WorkerRange) else self.workers
        return self.mesh.layer or max(1, (workers or 2 * self.mesh.data) // self.mesh.data)

    @property
    def world(self) -> int:
        """Total number of workers."""
        return self.mesh.data * self.layer_workers

    @property
    def fewest_workers(self) -> int:
        """Smallest number of workers with which the run trains: `world`, or the lower end of a range."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.world

    def with_workers(self, count: int) -> Self:
        """Return settings for a fixed number of workers: the largest in the range, up to `count`, for which the blocks are possible.

        With several replicas, the number of replicas changes and each keeps its number of workers.

        Raises:
            SettingsError: no number in the range up to `count` is possible.
        """
        if not isinstance(self.workers, WorkerRange):
            return self
        values, failure = self.model_dump(), "the range ends above that"
        # The number of workers may change nothing but the time, so what defaults from it is fixed here.
        values["adaptive"] |= {"consistency": self.consistency, "steer": self.steers}
        if self.solver == "windows":
            values["windows"]["length"] = self.windows.length or self.longest_window
        step = self.layer_workers if self.mesh.data > 1 else 1
        most = min(count, self.workers.max)
        for size in range(most - most % step, self.workers.min - 1, -step):
            if self.mesh.data > 1:
                values["mesh"] |= {"data": size // step, "layer": step}
            try:
                return type(self).model_validate(values | {"workers": size})
            except ValidationError as error:
                failure = fault_text(error.errors()[0])
        raise SettingsError(f"workers {self.workers.min} to {min(count, self.workers.max)} do not serve: {failure}; change workers.min")

    @property
    def middle_layers(self) -> int:
        """Number of layers between the buffers, N."""
        return self.model.layers - self.buffers.open - self.buffers.close

    @property
    def solved_layers(self) -> range:
        """The layers of the parallel solve, by index in the whole network: the middle ones, or all if workers take layers in turn.

        A window of one layer is as exact as a buffer, and there no worker waits for the gradients of its parameters.
        """
        buffers, layers = self.buffers, self.model.layers
        return range(layers) if self.placement == "cyclic" else range(buffers.open, layers - buffers.close)

    @property
    def middle_step(self) -> float:
        """Δt of a middle layer."""
        value = self.step.middle
        return float(value.partition("/")[0]) / self.middle_layers if isinstance(value, str) else value

    @property
    def step_sizes(self) -> tuple[float, ...]:
        """Δt of each layer, buffers included."""
        buffers, middle = self.buffers, (self.middle_step,) * self.middle_layers
        return (self.step.buffer,) * buffers.open + middle + (self.step.buffer,) * buffers.close

    @property
    def replica_batch(self) -> int:
        """Number of sequences per replica in a step."""
        return self.batch_size // self.mesh.data

    @property
    def shards_optimizer(self) -> bool:
        """True if optimizer state is divided among replicas: it is set, and there are several."""
        return self.optimizer.sharded and self.mesh.data > 1

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of middle layers of each worker."""
        if self.mesh.blocks:
            return self.mesh.blocks
        if self.solver == "torchbraid":
            return torchbraid_blocks(self.middle_layers, self.layer_workers)
        whole = self.needs_whole_intervals
        return default_blocks(self.middle_layers, self.layer_workers, self.fine_coarsening, whole_intervals=whole)

    @property
    def placement(self) -> Literal["blocks", "cyclic"]:
        """How the layers of the solve are assigned: neighbouring ones to one worker (blocks), or layer n to worker n mod P (cyclic)."""
        return "cyclic" if self.solver == "windows" and self.mode != "serial" else "blocks"

    @property
    def cyclic_placement(self) -> Placement:
        """Which worker has which layer of the solve, where they take layers in turn."""
        return Placement.cyclic(len(self.solved_layers), self.layer_workers)

    @property
    def iterations(self) -> ByDirection:
        """Iterations of the solver, or sweeps of windows, in mode parallel."""
        return self.windows.sweeps if self.solver == "windows" else self.mgrit.iterations

    @property
    def longest_window(self) -> int:
        """Largest number of layers that a window solve evaluates at once."""
        given = self.windows.length
        return max(given) if isinstance(given, tuple) else given or self.layer_workers

    @property
    def window_lengths(self) -> tuple[int, ...]:
        """Lengths of windows that do not roll. Buffer layers are windows of one layer."""
        given, buffers = self.windows.length, self.buffers
        middle = given if isinstance(given, tuple) else equal_windows(self.middle_layers, self.longest_window)
        return (1,) * buffers.open + middle + (1,) * buffers.close

    @property
    def rolls(self) -> bool:
        """True if layer-parallel steps are solved by a rolling window (`rayllp/mgrit/rolling.py`)."""
        given = self.mode == "parallel" and self.solver == "windows" and self.windows.tolerance is not None
        return given or self.chooses_tolerance

    @property
    def chooses_tolerance(self) -> bool:
        """True if the controller chooses the tolerance of a rolling window."""
        return self.mode == "adaptive" and self.may_roll and self.adaptive.rule == "bias" and self.adaptive.probe_every > 0

    @property
    def may_roll(self) -> bool:
        """True if windows would roll in mode adaptive, with probes."""
        given = isinstance(self.windows.length, tuple) or self.adaptive.ladder is not None
        return self.solver == "windows" and self.windows.rolling and not given

    @property
    def drops_slow_rungs(self) -> bool:
        """True if the controller gives up rungs that are no faster than exact steps: windows, and the default ladder."""
        return self.mode == "adaptive" and self.solver == "windows" and self.adaptive.ladder is None

    def layers_of(self, rank: int) -> tuple[int, ...]:
        """Return the layers of the solve that a worker of the layer group owns, ascending, counted from the solve's first."""
        if self.placement == "cyclic":
            return self.cyclic_placement.owned(rank)
        start = sum(self.blocks[:rank])
        return tuple(range(start, start + self.blocks[rank]))

    @property
    def fine_coarsening(self) -> int:
        """Coarsening factor c_f between the finest level and the next."""
        return self.mgrit.coarsening if isinstance(self.mgrit.coarsening, int) else self.mgrit.coarsening[0]

    @property
    def ladder(self) -> tuple[tuple[int, int, Relaxation | None], ...]:
        """The controller's rungs from cheap to expensive: iterations or sweeps forward (0: serial) and backward, and relaxation.

        Relaxation None stands for mgrit.relaxation.fine. Exact training follows the last rung. A rolling window is the one rung besides,
        whose numbers of sweeps mean nothing.
        """
        if self.adaptive.ladder is not None:
            return tuple(_read_rung(rung) for rung in self.adaptive.ladder)
        if self.chooses_tolerance:
            return ((1, 1, None),) if self.longest_window > 1 else ()
        if self.solver == "windows" and self.mode == "adaptive":
            return tuple((forward, backward, None) for forward, backward in SWEEPS if min(forward, backward) < self.longest_window)
        forward, backward = self.iterations.forward, self.iterations.backward
        if self.solver == "windows":
            return ((forward, backward, None),)
        if self.mgrit.levels.forward == 1:
            return (0, backward, None), (0, backward + 1, None)
        # Most of a gradient's bias comes from inexact states, so another forward iteration helps first.
        return (forward, backward, None), (forward + 1, backward, None), (forward + 1, backward + 1, None)

    @property
    def rung_levels(self) -> int:
        """Number of levels in a rung's forward solve, unless that is serial. A ladder may use it even if mgrit.levels.forward is 1."""
        levels = self.mgrit.levels
        return levels.forward if levels.forward > 1 else max(2, levels.backward)

    @property
    def consistency(self) -> float:
        """Weight of the consistency penalty at the start of training."""
        if self.adaptive.consistency is not None:
            return self.adaptive.consistency
        if self.solver == "windows":  # a window's error does not come from differing weights
            return 0.0
        watched = self.mode == "adaptive" and self.adaptive.rule != "convergence"
        if not watched or self.layer_workers > len(self.coarse_lengths) or (self.mesh.blocks and not self.has_whole_intervals):
            return 0.0
        return CONSISTENCY

    @property
    def steers(self) -> bool:
        """True if probes adjust the weight of the consistency penalty."""
        return self.consistency > 0 and self.adaptive.rule != "convergence" and self.adaptive.steer is not False

    def records_timeline(self, step: int) -> bool:
        """Return True if the step's timeline is to be recorded, which it is not if the step is a probe.

        It is for the middle one of every `timeline_every` steps, since a run's first step is slow, and for one of the exact steps that are
        timed at the start.
        """
        every = self.timeline_every
        # If exact steps are timed at the start, one timeline tells how long all workers' computation takes together.
        return bool(every) and (step % every == every // 2 or (self.drops_slow_rungs and step == TIMED_STEP))

    @property
    def switch_at(self) -> int | float | None:
        """The step, or share of the steps, from which training is exact whatever probes find; None: there is no such step."""
        at = self.adaptive.switch_at
        if at is not None or self.mode != "adaptive" or self.chooses_tolerance:
            return at
        return EXACT_FROM_WINDOWS if self.solver == "windows" else EXACT_FROM

    @property
    def switch_step(self) -> int | None:
        """`switch_at` as a step."""
        return None if self.switch_at is None else self._as_step(self.switch_at)

    @property
    def late_step(self) -> int:
        """`adaptive.late_from` as a step."""
        return self._as_step(self.adaptive.late_from)

    def _as_step(self, step_or_share: int | float) -> int:
        return round(step_or_share * self.steps) if isinstance(step_or_share, float) else step_or_share

    @property
    def needs_whole_intervals(self) -> bool:
        """True if some setting requires every coarse interval to be on one worker."""
        return self.consistency > 0

    @property
    def has_whole_intervals(self) -> bool:
        """True if every coarse interval is on one worker."""
        return not any(begin % self.fine_coarsening for begin in [0, *accumulate(self.blocks)][:-1])

    @property
    def coarse_lengths(self) -> tuple[int, ...]:
        """Number of layers in each coarse interval of the finest level."""
        c, N = self.fine_coarsening, self.middle_layers
        return tuple(min(start + c, N) - start for start in range(0, N, c))

    def hierarchy(self, levels: int) -> Hierarchy:
        """Return the forward hierarchy over the middle layers."""
        return build_hierarchy(blocks=self.blocks, levels=levels, coarsening=self.mgrit.coarsening)

    @property
    def rounding(self) -> float:
        """Relative rounding error of the increment that a layer adds to its state; 0 if it is computed in the state's own dtype."""
        return 2.0**-8 if self.dtype == "bfloat16" else 0.0

    def solver_options(self, iterations: int, relaxation: Relaxation | None = None) -> SolverOptions:
        """Return the solver's options for this number of iterations; `relaxation`, if given, replaces the settings' on the finest level."""
        settings = self.mgrit
        return SolverOptions(
            iterations=iterations,
            relaxation=(relaxation or settings.relaxation.fine, settings.relaxation.coarse),
            cycle=settings.cycle,
            coarse_step_weight=settings.coarse_step_weight,
            initial_guess=settings.initial_guess,
            tolerance=settings.tolerance,
            rounding=self.rounding,
            # If one direction has a single level, it has no intervals, and needs the graphs of single layers from the other direction.
            batched=settings.batched and min(settings.levels.forward, settings.levels.backward) > 1,
        )


def _read_rung(rung: str) -> tuple[int, int, Relaxation | None]:
    match = RUNG.fullmatch(rung)
    assert match is not None
    forward, backward, relaxation = match.groups()
    return int(forward), int(backward), relaxation  # type: ignore[return-value]
