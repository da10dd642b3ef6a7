"""The ways to train on one mesh of replicas and layer-parallel workers, with predicted times and memory.

Steps by windows and MGRIT, and exact ones with layers in turn, are predicted by running them on simulated clocks (`prediction.py`). 1F1B is
torch's own, and simple enough for a formula: its critical path is (microbatches + stages - 1) times a stage's forward and gradient.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter, itemgetter
from typing import Any, Literal

from rayllp.config import TrainConfig
from rayllp.config.run import SWEEPS
from rayllp.control import Controller
from rayllp.engine.optimizer import averages_per_weight
from rayllp.engine.replica_sums import BUCKET_BYTES
from rayllp.mgrit.shares import in_pieces
from rayllp.plan.costs import Costs, Device, LayerModel
from rayllp.plan.prediction import layers_owned, predict_step

MOST_MICROBATCHES = 4
"""Largest number of microbatches per worker that is tried with layers in turn."""
COARSENINGS = (2, 4, 8, 16)
LEVELS = (2, 3, 4)
ITERATIONS = ((1, 1), (2, 1), (2, 2), (3, 3))
USUAL_STRIDE = 1.2
"""A window of W layers rolls on by about this many times √W layers after a sweep: the mean of what was counted in whole trainings, of GPT-2
with Δt = 1/N (2 to 16 workers), with Δt = 1 and in translation (8 workers), which differ from it by up to a half (docs/frontier.md).
"""


@dataclass(frozen=True)
class MGRITSolve:
    """Settings of a layer-parallel solve by MGRIT.

    Attributes:
        coarsening: coarsening factor c_f, the same on all levels.
        levels: number of levels, forward and backward.
        forward, backward: numbers of iterations.
    """

    coarsening: int
    levels: int
    forward: int
    backward: int

    @property
    def text(self) -> str:
        """A description for the user."""
        return f"c_f {self.coarsening}, {self.levels} levels, {self.forward}+{self.backward} iterations"

    def as_list(self) -> list[float]:
        """Return the values as they are stored in a JSON file."""
        return [self.coarsening, self.levels, self.forward, self.backward]


@dataclass(frozen=True)
class WindowSolve:
    """Settings of a layer-parallel solve by windows.

    Attributes:
        length: number of layers in a window.
        forward, backward: numbers of sweeps.
    """

    length: int
    forward: int
    backward: int

    @property
    def text(self) -> str:
        """A description for the user."""
        return f"windows of {self.length}, {self.forward}+{self.backward} sweeps"

    def as_list(self) -> list[float]:
        """Return the values as they are stored in a JSON file, where 0 levels stand for windows."""
        return [self.length, 0, self.forward, self.backward]


@dataclass(frozen=True)
class RollingSolve:
    """Settings of a layer-parallel solve by a rolling window, and what it makes of a network.

    Attributes:
        length: number of layers in the window.
        forward, backward: number of layers by which it rolls on after a sweep, on average.
        measured: whether a run has counted them; False: they are usual ones.
    """

    length: int
    forward: float
    backward: float
    measured: bool = True

    @classmethod
    def usual(cls, length: int) -> "RollingSolve":
        """Return what a window of this length usually does; see `USUAL_STRIDE`."""
        stride = min(float(length), USUAL_STRIDE * math.sqrt(length))
        return cls(length, stride, stride, measured=False)

    @property
    def text(self) -> str:
        """A description for the user."""
        strides = f"{self.forward:.2g} + {self.backward:.2g}" if self.measured else f"about {self.forward:.2g}"
        return f"rolling window of {self.length}, {strides} layers a sweep"

    def sweeps(self, layers: int) -> tuple[float, float]:
        """Return the numbers of sweeps for so many layers, forward and adjoint."""
        return layers / self.forward, layers / self.backward

    def as_list(self) -> list[float]:
        """Return the values as they are stored in a JSON file, where 1 level stands for a rolling window."""
        return [self.length, 1, self.forward, self.backward]


Solve = MGRITSolve | WindowSolve | RollingSolve
Kind = Literal["layer", "pipeline", "in_order", "data"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to train, with its predicted time.

    Attributes:
        kind: layer (by windows or MGRIT); or exact: pipeline (1F1B over blocks of layers), in_order (layers in turn, neighbouring ones on
            different workers), or data (data parallel alone).
        replicas, layer_workers: number of replicas, and of workers in each.
        step_s: seconds per step.
        memory: bytes on the worker that needs most.
        solve: the solver's settings; None for exact ways.
        microbatches: number of microbatches, for kinds pipeline and in_order.
        bias: relative bias of the gradient; 0 for exact ways; None if it was not measured. Of a rolling window probes keep it small.
    """

    kind: Kind
    replicas: int
    layer_workers: int
    step_s: float
    memory: float
    solve: Solve | None = None
    microbatches: int = 1
    bias: float | None = 0.0

    @property
    def devices(self) -> int:
        """Number of devices in use."""
        return self.replicas * self.layer_workers

    def is_usable(self, device: Device, bias_limit: float) -> bool:
        """True if it fits into memory, and its bias is unknown, within the limit or kept small by probes."""
        fits = device.memory is None or self.memory <= device.memory
        return fits and (self.bias is None or self.bias <= bias_limit or isinstance(self.solve, RollingSolve))

    @property
    def text(self) -> str:
        """A description for the user."""
        mesh = f"{self.replicas} × {self.layer_workers}"
        if self.solve is not None:
            return f"layer-parallel {mesh}, {self.solve.text}"
        if self.kind == "data":
            return f"data parallel {mesh}"
        parts = "the whole batch" if self.microbatches == 1 else f"{self.microbatches} microbatches"
        return f"exact, layers in turn {mesh}, {parts}" if self.kind == "in_order" else f"1F1B pipeline {mesh}, {parts}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file, in which layers in turn are a pipeline with `in_order` set."""
        in_order = self.kind == "in_order"
        return {
            "kind": "pipeline" if in_order else self.kind, "data": self.replicas, "layer": self.layer_workers, "step_s": self.step_s,
            "memory": self.memory, "solve": None if self.solve is None else self.solve.as_list(), "microbatches": self.microbatches,
            "in_order": in_order, "bias": self.bias,
        }  # fmt: skip


def mgrit_solves(layers: int) -> Iterator[MGRITSolve]:
    """Yield the settings of MGRIT that this number of layers allows."""
    for coarsening in COARSENINGS:
        for levels in LEVELS:
            if layers > coarsening ** (levels - 1):
                yield from (MGRITSolve(coarsening, levels, *iterations) for iterations in ITERATIONS)


def serial_step_s(costs: Costs, layers: int) -> float:
    """Return the seconds of a step of a network of this many layers on one worker."""
    return layers * (costs.record + costs.full_gradient + costs.update) + costs.enter + costs.enter_gradient + costs.leave


@dataclass(frozen=True)
class MeshPlanner:
    """Predicts the ways to train on one mesh.

    Attributes:
        config: the run's settings.
        model: costs and sizes of a layer.
        device: network and memory of each device.
        replicas: number of replicas; divides the batch.
        layer_workers: number of workers in each replica.
    """

    config: TrainConfig
    model: LayerModel
    device: Device
    replicas: int
    layer_workers: int

    @property
    def batch(self) -> int:
        """Sequences per replica in a step."""
        return self.config.batch_size // self.replicas

    @cached_property
    def costs(self) -> Costs:
        """Costs of a layer at a replica's batch."""
        return self.model.at(self.batch, self.device)

    # Exact ways -----------------------------------------------------------------------------------------------------------------

    def exact_options(self) -> Iterator[Option]:
        """Yield data parallelism if a replica has one worker, else 1F1B and layers in turn, each with its best number of microbatches."""
        if self.layer_workers == 1:
            yield self._data_parallel()
            return
        counts = [count for count in range(1, self.batch + 1) if self.batch % count == 0]
        # 1F1B needs at least as many microbatches as stages.
        pipelines = [self._pipeline(count) for count in counts if count >= self.layer_workers]
        if pipelines:
            yield min(pipelines, key=attrgetter("step_s"))
        in_turn = self._replica_config(WindowSolve(self.layer_workers, 1, 1))
        if in_turn is not None:
            yield self._best_in_order(in_turn, [count for count in counts if count <= MOST_MICROBATCHES * self.layer_workers])

    def _data_parallel(self) -> Option:
        costs, layers = self.costs, self.config.model.layers
        step_s = serial_step_s(costs, layers) + self._replicas_s(layers, layers * costs.full_gradient)
        memory = layers * (self._weight_bytes + self.batch * self.model.graph_bytes)
        return self._option("data", step_s, memory)

    def _pipeline(self, microbatches: int) -> Option:
        """Return 1F1B with this number of microbatches."""
        stages, owned = self.layer_workers, math.ceil(self.config.model.layers / self.layer_workers)
        costs = self.model.at(self.batch / microbatches, self.device)
        ends_s = max(costs.enter + costs.enter_gradient, costs.leave)
        stage_s = owned * (costs.record + costs.full_gradient) + ends_s + 2 * costs.message
        step_s = (microbatches + stages - 1) * stage_s + owned * costs.update
        step_s += self._replicas_s(owned, owned * costs.full_gradient)  # gradients become final in the last microbatch
        graphs = min(microbatches, stages) * self.batch / microbatches
        memory = owned * (self._weight_bytes + graphs * self.model.graph_bytes)
        return self._option("pipeline", step_s, memory, microbatches=microbatches)

    def _best_in_order(self, config: TrainConfig, counts: Sequence[int]) -> Option:
        """Return layers in turn with the best of these numbers of microbatches, the first of which is 1."""
        best, owned = self._in_order(config, counts[0]), max(layers_owned(config))
        for count in counts[1:]:
            costs = self.model.at(self.batch / count, self.device)
            if count * owned * (costs.record + costs.full_gradient) < best.step_s:  # what the busiest worker has to do in any case
                best = min(best, self._in_order(config, count), key=attrgetter("step_s"))
        return best

    def _in_order(self, config: TrainConfig, microbatches: int) -> Option:
        """Return layers in turn on a cyclic placement, with these settings of a replica."""
        costs, owned = self.model.at(self.batch / microbatches, self.device), max(layers_owned(config))
        step_s = predict_step(config, replace(Controller(config).chosen, serial=True), costs, microbatches=microbatches)
        step_s += self._replicas_s(owned, owned * microbatches * costs.full_gradient)
        memory = owned * (self._weight_bytes + self.batch * self.model.graph_bytes)
        return self._option("in_order", step_s, memory, microbatches=microbatches)

    def _option(self, kind: Kind, step_s: float, memory: float, **values: Any) -> Option:
        mesh: dict[str, Any] = {"replicas": self.replicas, "layer_workers": self.layer_workers}
        return Option(kind=kind, **mesh, step_s=step_s, memory=memory, **values)

    # Layer-parallel ways --------------------------------------------------------------------------------------------------------

    def layer_parallel_options(self, solves: Sequence[Solve] | None, known: Mapping[Solve, float], bias_limit: float) -> list[Option]:
        """Return a way for each of `solves`; None: for the settings' solver, and for all solves whose bias is known."""
        tried = self._solves_to_try(known) if solves is None else solves
        options = [self._layer_parallel(solve, known.get(solve)) for solve in tried if not isinstance(solve, MGRITSolve)]
        bounds = [(self._least_s(solve), solve) for solve in tried if isinstance(solve, MGRITSolve)]
        fastest_s = math.inf
        for least_s, solve in sorted(bounds, key=itemgetter(0)):
            if solves is None and solve not in known and least_s >= fastest_s:
                continue  # its lower bound is already slower than the mesh's fastest
            option = self._layer_parallel(solve, known.get(solve))
            options.append(option)
            if option is not None and option.is_usable(self.device, bias_limit):
                fastest_s = min(fastest_s, option.step_s)
        return [option for option in options if option is not None]

    def _solves_to_try(self, known: Mapping[Solve, float]) -> list[Solve]:
        """Return the solves of the settings' solver, then others that a run has measured."""
        workers = self.layer_workers
        rolling = [solve for solve in known if isinstance(solve, RollingSolve) and solve.length == workers]
        if self.config.solver == "mgrit":
            tried: list[Solve] = [*mgrit_solves(self.config.middle_layers), *rolling]
        elif self.config.may_roll:
            tried = [*(rolling or [RollingSolve.usual(workers)])]
        else:
            tried = [*(WindowSolve(workers, *sweeps) for sweeps in SWEEPS), *rolling]
        others = (solve for solve in known if isinstance(solve, MGRITSolve) or (isinstance(solve, WindowSolve) and solve.length == workers))
        return list(dict.fromkeys([*tried, *others]))

    def _least_s(self, solve: MGRITSolve) -> float:
        """Return a lower bound of a step's seconds, much cheaper to compute than a prediction.

        It adds up a coarse solve, what the last worker has left to record, a coarse solve backwards, and the gradients of the first
        worker's layers. Of further iterations it counts only a relaxation each, since the rest overlaps with the first one's coarse solve.
        """
        config, costs, c = self.config, self.costs, solve.coarsening
        chain = 0 if config.mgrit.coarse_step_weight == 0 else math.ceil(config.middle_layers / c ** (solve.levels - 1)) - 1
        last, first = config.middle_layers // self.layer_workers, math.ceil(config.middle_layers / self.layer_workers) + config.buffers.open
        forward_layers, backward_layers = (chain + (count - 1) * (c - 1) for count in (solve.forward, solve.backward))
        forward_s = forward_layers * costs.forward + (last - math.ceil(last / c)) * costs.record
        return forward_s + backward_layers * costs.input_gradient + first * costs.full_gradient

    def _layer_parallel(self, solve: Solve, bias: float | None) -> Option | None:
        """Return a layer-parallel way; None if the settings do not allow it."""
        config, workers = self._replica_config(solve), self.layer_workers
        if config is None:
            return None
        owned = max(layers_owned(config))
        state_bytes = self.batch * self.model.state_bytes
        sweeps = solve.sweeps(len(config.solved_layers)) if isinstance(solve, RollingSolve) else None
        all_gather_s, all_reduce_s = self.device.all_gather_s(state_bytes, workers), self.device.all_reduce_s(state_bytes, workers)
        costs = replace(
            self.costs, all_gather=all_gather_s, all_reduce=all_reduce_s, few_numbers=self.device.all_gather_s(0, workers),
            in_pieces=in_pieces(state_bytes, workers, config.longest_window, rolling=sweeps is not None),
        )  # fmt: skip
        step_s = predict_step(config, Controller(config).chosen, costs, sweeps=sweeps)
        step_s += self._replicas_s(owned, owned * costs.full_gradient)
        interval = solve.coarsening if isinstance(solve, MGRITSolve) else 1
        graphs = interval if config.recompute else owned
        memory = owned * (self._weight_bytes + state_bytes) + self.batch * graphs * self.model.graph_bytes
        return self._option("layer", step_s, memory, solve=solve, bias=bias)

    def _replica_config(self, solve: Solve) -> TrainConfig | None:
        """Return the settings of one replica with this solve; None if they are not allowed."""
        values = self.config.model_dump(mode="json")
        values |= {"workers": self.layer_workers, "mode": "parallel", "mesh": {"data": 1}, "batch_size": self.batch, "microbatches": None}
        values["adaptive"]["ladder"] = None
        if isinstance(solve, MGRITSolve):
            levels = {"forward": solve.levels, "backward": solve.levels}
            iterations = {"forward": solve.forward, "backward": solve.backward}
            values |= {"solver": "mgrit", "windows": {}}
            values["mgrit"] |= {"iterations": iterations, "coarsening": solve.coarsening, "levels": levels}
        else:
            sweeps = {"forward": solve.forward, "backward": solve.backward}
            how = {"tolerance": 0.1} if isinstance(solve, RollingSolve) else {"sweeps": sweeps}
            values |= {"solver": "windows", "mgrit": {}, "windows": {"length": solve.length, **how}}
            values["adaptive"] |= {"consistency": None, "smoothness": 0.0}
        try:
            return TrainConfig.model_validate(values | {"accumulate": 1})
        except ValueError:
            return None

    # Replicas and weights -------------------------------------------------------------------------------------------------------

    @cached_property
    def _weight_bytes(self) -> float:
        """Bytes of a layer's weights and gradients, and of the part of its optimizer state that one worker keeps."""
        settings = self.config.optimizer
        # This neglects that Muon keeps more for norms and biases than for matrices, and Adafactor's factors.
        averages = averages_per_weight(settings)
        kept = averages / self.replicas if settings.sharded else averages
        return self.model.parameter_bytes + (1 + kept) * self.model.trained_bytes

    def _replicas_s(self, layers: int, adjoint_s: float) -> float:
        """Return the seconds that replicas spend on summing gradients and, if optimizer state is sharded, on exchanging updated parameters.

        Args:
            layers: number of layers on the worker.
            adjoint_s: seconds of computation during which gradients become final, so that their buckets are summed in the background.
        """
        device, replicas, size = self.device, self.replicas, layers * self.model.trained_bytes
        last_s = device.all_reduce_s(min(size, BUCKET_BYTES), replicas)
        gather_s = device.all_gather_s(size / replicas, replicas) if self.config.optimizer.sharded else 0.0
        return max(last_s, device.all_reduce_s(size, replicas) - adjoint_s) + gather_s
