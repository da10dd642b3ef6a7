"""`TrainConfig`: what `rayllp train` reads from YAML and what `rayllp.train` takes; what follows from it, and rules over several settings.

Every rule that needs no data and no cluster is checked here. Names are fixed (docs/design.md): other tools set them by `--set key=value`.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from rayllp.config.groups import (
    RUNG,
    AdaptiveSettings,
    BufferSettings,
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    MeshSettings,
    MGRITSettings,
    ModelSettings,
    NestedSettings,
    OptimizerSettings,
    ProfileSettings,
    Relaxation,
    Settings,
    StepSettings,
    WorkerRange,
)
from rayllp.errors import SettingsError
from rayllp.mgrit import Hierarchy, SolverOptions, build_hierarchy, split_evenly
from rayllp.mgrit.windows import Placement
from rayllp.nested import stages
from rayllp.sizes import with_pretrained_sizes

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


class TrainConfig(Settings):
    """One run. `TrainConfig()` is the embedded default."""

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

    def with_workers(self, count: int) -> "TrainConfig":
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

    # Rules over several settings ----------------------------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_the_pretrained(cls, values: Any) -> Any:
        return with_pretrained_sizes(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        self._check_mesh()
        self._check_batch()
        if any(not 0 <= step < self.steps for step in self.profile.steps):
            raise ValueError(f"profile.steps {list(self.profile.steps)}: a run of {self.steps} steps has steps 0 to {self.steps - 1}")
        self._check_torchbraid()
        self._check_consistency()
        self._check_cyclic()
        try:
            climbs = any(forward for forward, _, _ in self.ladder)
            solved = {self.mgrit.levels.forward, self.mgrit.levels.backward, *([self.rung_levels] if climbs else [])}
            for levels in () if self.placement == "cyclic" or self.mode == "serial" else solved:
                self.hierarchy(levels)
            stages(self)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self

    def _check_mesh(self) -> None:
        mesh, N, P = self.mesh, self.middle_layers, self.layer_workers
        if N < 1:
            raise ValueError(
                f"{self.buffers.open} + {self.buffers.close} buffer layers leave {N} of {self.model.layers} layers for the middle: "
                "raise model.layers or lower buffers.open and buffers.close"
            )
        if isinstance(self.workers, WorkerRange):
            if mesh.data == 1 and (mesh.layer or mesh.blocks):
                raise ValueError(
                    "workers as a range decides how layers are shared out: leave out mesh.layer and mesh.blocks, or set mesh.data to the "
                    "most replicas, whose number is then what changes"
                )
            if mesh.data > 1 and (self.workers.max != self.world or self.workers.min % P):
                raise ValueError(
                    f"replicas of {P} workers come and go as a whole: make workers.max mesh.data × mesh.layer = {mesh.data} × {P}, and "
                    f"workers.min a multiple of {P}; they are {self.workers.max} and {self.workers.min}"
                )
        elif self.workers is not None and self.workers != self.world:
            raise ValueError(
                f"workers={self.workers} is not mesh.data × mesh.layer = {mesh.data} × {P}: leave one of them out"
                if mesh.layer
                else f"workers={self.workers} does not divide by mesh.data={mesh.data}"
            )
        if P > N:
            raise ValueError(f"{P} layer-parallel workers for {N} middle layers: use at most {N} (workers or mesh.layer), or more layers")
        if mesh.blocks and (len(mesh.blocks) != P or sum(mesh.blocks) != N or min(mesh.blocks) < 1):
            raise ValueError(f"mesh.blocks {mesh.blocks} must be {P} positive numbers that add up to the {N} middle layers")

    def _check_consistency(self) -> None:
        if self.needs_whole_intervals and not self.has_whole_intervals:
            c = self.first_coarsening
            raise ValueError(
                f"adaptive.consistency needs every coarse interval on one worker, but blocks {self.blocks} cut intervals of {c}: "
                f"set mesh.blocks to multiples of {c} (the last may be any), or workers, buffers or mgrit.coarsening so that they are"
            )

    def _check_cyclic(self) -> None:
        """What windows cannot do, and what only they can."""
        if self.placement == "blocks":
            if self.mgrit.window is not None:
                raise ValueError(
                    f"mgrit.window={self.mgrit.window} is of a cyclic placement, and mesh.placement is blocks: leave one of them out"
                )
            return
        adaptive, mgrit = self.adaptive, self.mgrit
        refused = {
            "mesh.blocks shares out neighbouring layers: leave it out": self.mesh.blocks is not None,
            "solver: torchbraid keeps neighbouring layers together: set solver: mgrit": self.solver == "torchbraid",
            "adaptive.consistency is for coarse steps by an interval's first layer, which windows do not take: leave it out": (
                bool(adaptive.consistency)
            ),
            "adaptive.smoothness wants neighbouring layers on one worker: leave it out": adaptive.smoothness > 0,
            "mgrit.batched sweeps the intervals of a block: leave it out": mgrit.batched,
            "mgrit.tolerance ends iterations of MGRIT, not sweeps of a window: leave it out": mgrit.tolerance is not None,
            "a rung with a serial forward or FCF-relaxation is MGRIT's; windows take sweeps, such as 2+1": (
                any(forward == 0 or relaxation is not None for forward, _, relaxation in self.ladder)
            ),
        }
        for reason, holds in refused.items():
            if holds:
                raise ValueError(f"mesh.placement: cyclic: {reason}; or set mesh.placement: blocks")

    def _check_torchbraid(self) -> None:
        """What TorchBraid cannot do is refused here; it would go on with wrong numbers, or wait for ever."""
        if self.solver != "torchbraid":
            return
        mgrit, N, P = self.mgrit, self.middle_layers, self.layer_workers
        factors = (mgrit.coarsening,) if isinstance(mgrit.coarsening, int) else mgrit.coarsening
        refused = {
            "talks by MPI alone: set channel: mpi": self.channel != "mpi",
            "has no controller: set mode: parallel (or serial), or solver: mgrit": self.mode == "adaptive",
            f"wants middle layers in equal blocks of at least 2, and {N} on {P} workers are not: change model.layers, buffers or workers": (
                N % P > 0 or N == P > 1
            ),
            "decides itself which worker has which layers: leave mesh.blocks out, and workers a number": (
                bool(self.mesh.blocks) or isinstance(self.workers, WorkerRange)
            ),
            "solves states of one tensor, and an encoder–decoder has two: set solver: mgrit": self.model.task == "translation",
            "sends float32 alone: set dtype: float32": self.dtype != "float32",
            "has V-cycles alone: set mgrit.cycle: V": mgrit.cycle != "V",
            "has one coarse operator: set mgrit.coarse_step_weight: 1": mgrit.coarse_step_weight != 1,
            f"keeps layers by one coarsening factor, not {factors}: set mgrit.coarsening to a number": len(set(factors)) > 1,
            "has no tolerance here: leave mgrit.tolerance out": mgrit.tolerance is not None,
            "keeps every graph, and sweeps interval after interval: leave mgrit.recompute and mgrit.batched out": (
                mgrit.recompute or mgrit.batched
            ),
            "measures no convergence factor for probes: set adaptive.probe_every: 0": self.adaptive.probe_every > 0,
            "knows no consistency penalty: leave adaptive.consistency out": self.consistency > 0,
        }
        for reason, holds in refused.items():
            if holds:
                raise ValueError(f"solver: torchbraid {reason}")

    def _check_batch(self) -> None:
        encoder = self.model.encoder_layers
        if encoder is not None and encoder >= self.model.layers:
            raise ValueError(f"model.encoder_layers={encoder} leaves no decoder layer of model.layers={self.model.layers}: lower it")
        if self.batch_size % self.mesh.data:
            raise ValueError(f"batch_size {self.batch_size} does not divide by mesh.data={self.mesh.data}")
        if self.replica_batch % self.accumulate:
            raise ValueError(f"a replica's {self.replica_batch} sequences do not divide into accumulate={self.accumulate} parts")
        if self.microbatches and self.replica_batch // self.accumulate % self.microbatches:
            raise ValueError(f"{self.replica_batch // self.accumulate} sequences do not divide into microbatches={self.microbatches}")


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
