"""Choose the data × layer mesh and settings that are fastest on some devices: layer-parallel, 1F1B pipeline, or plain data parallel."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayllp.config import TrainConfig
from rayllp.errors import SettingsError
from rayllp.plan.costs import Device, LayerModel
from rayllp.plan.options import MeshPlanner, Option, RollingSolve, Solve, serial_step_s

WORTH_IT = 1.05
"""An approximate way is advised only if it is more than this many times as fast as the best exact one."""
SHALLOWER = 4
"""Layer-parallel training is compared with a network with this many times fewer middle layers, on one device."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the planner found.

    Attributes:
        serial_s: seconds per step on one device.
        options: all ways that were predicted, fastest first.
        best: the fastest usable one (see `Option.is_usable`), or the best exact one if that is hardly slower.
        exact: the fastest exact one that fits into memory.
        advice: what to do, in sentences.
    """

    serial_s: float
    options: tuple[Option, ...]
    best: Option | None
    exact: Option | None
    advice: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        best, exact = (None if option is None else option.as_dict() for option in (self.best, self.exact))
        options = [option.as_dict() for option in self.options]
        return {"serial_s": self.serial_s, "options": options, "best": best, "exact": exact, "advice": self.advice}


def make_plan(
    config: TrainConfig,
    model: LayerModel,
    device: Device,
    devices: int,
    *,
    biases: Mapping[Solve, float] | None = None,
    bias_limit: float = 0.2,
    solves: Sequence[Solve] | None = None,
) -> Plan:
    """Predict the ways to train on meshes of up to `devices` workers, and advise one.

    Args:
        config: the run's settings.
        model: costs and sizes of a layer.
        device: network and memory of each device.
        devices: number of devices.
        biases: measured biases of the gradient, by solve.
        bias_limit: an approximate way with a larger known bias is not advised.
        solves: which to try on each mesh. By default, those of the settings' solver: a rolling window of as many layers as workers, with
            usual strides unless `biases` has measured ones; fixed windows of that length where the settings ask for these; or of MGRIT
            those with c_f 2 to 16, 2 to 4 levels and 1+1 to 3+3 iterations which the depth allows and which may be the mesh's fastest.
            And those whose bias is known.

    Raises:
        SettingsError: fewer than one device.
    """
    if devices < 1:
        raise SettingsError(f"{devices} devices: give at least one")
    options: list[Option] = []
    for replicas, layer_workers in _meshes(config, devices):
        mesh = MeshPlanner(config, model, device, replicas, layer_workers)
        options += mesh.exact_options()
        if layer_workers > 1:
            options += mesh.layer_parallel_options(solves, biases or {}, bias_limit)
    options.sort(key=lambda option: option.step_s)
    usable = [option for option in options if option.is_usable(device, bias_limit)]
    exact = next((option for option in usable if option.solve is None), None)
    best = next(iter(usable), None)
    if exact is not None and best is not None and exact.step_s <= WORTH_IT * best.step_s:
        best = exact
    costs = model.at(config.batch_size, device)
    serial_s = serial_step_s(costs, config.model.layers)
    advice = _advise(best, exact, serial_s, devices)
    if best is not None and best.devices > 1 and config.middle_layers >= SHALLOWER:
        shallow = config.model.layers - config.middle_layers + config.middle_layers // SHALLOWER
        shallow_s = serial_step_s(costs, shallow)
        if shallow_s < 1.5 * best.step_s:
            advice += (
                f". A network of {shallow} layers takes {1e3 * shallow_s:.4g} ms a step on one device: if it reaches the loss you want, "
                "train that one instead (docs/frontier.md compares both on two tasks)"
            )
    return Plan(serial_s=serial_s, options=tuple(options), best=best, exact=exact, advice=advice)


def _meshes(config: TrainConfig, devices: int) -> Iterator[tuple[int, int]]:
    """Yield meshes (replicas, workers in each): replicas divide the batch, workers are powers of two and the largest possible number."""
    for replicas in range(1, min(config.batch_size, devices) + 1):
        if config.batch_size % replicas == 0:
            most = min(devices // replicas, config.middle_layers)
            yield from ((replicas, workers) for workers in sorted({most, *(2**n for n in range(most.bit_length()))}))


def _advise(best: Option | None, exact: Option | None, serial_s: float, devices: int) -> str:
    if best is None:
        return (
            "nothing fits into the devices' memory: use more devices, a smaller batch, recompute=true, or with replicas "
            "optimizer.sharded=true"
        )

    def praise(option: Option) -> str:
        return f"{option.text}, {1e3 * option.step_s:.4g} ms a step, {serial_s / option.step_s:.3g} times as fast as one device"

    if best.solve is None:
        way = {
            "in_order": "layers in turn (mode=adaptive, adaptive.switch_at=0)", "pipeline": "the pipeline (mode=serial)",
            "data": "plain data parallelism",
        }[best.kind]  # fmt: skip
        return f"use {way} here: {praise(best)}. It is exact, and no layer-parallel setting that is known to be accurate enough is faster"
    idle = f"; {devices - best.devices} devices stay free" if best.devices < devices else ""
    other = "No exact way fits" if exact is None else f"The best exact way is {praise(exact)}"
    return f"layer-parallel pays here: {praise(best)}; {_what_is_known(best)}. {other}{idle}"


def _what_is_known(option: Option) -> str:
    """Return in words what a layer-parallel way's accuracy, or a rolling window's stride, is known from."""
    solve = option.solve
    if isinstance(solve, RollingSolve):
        ask = f"a short run with windows.length={solve.length}, on any number of workers, measures them (--run)"
        return "its strides were measured" if solve.measured else f"its strides are usual ones, and depend on the network: {ask}"
    if option.bias is None:
        return "its bias was not measured: try it with probes"
    return f"its gradient's bias was measured to be {option.bias:.2g}"
