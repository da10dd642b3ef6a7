"""The tables of docs/pays.md, by the planner.

    python docs/pays.py        # writes them into docs/pays.md

Eight devices, a layer of 28 MB of weights and a state of 2 MB a sequence. Two kinds of device: one that small batches leave idle, whose
layer takes 0.5 ms and 0.1 ms a sequence forward, and one that is busy with a single sequence, 0.6 ms each. A gradient takes twice a
forward. Messages take 20 µs and go at 10 GB/s, or 5 µs and 200 GB/s.
"""

from collections.abc import Iterable
from pathlib import Path

from rayllp.config import make_config
from rayllp.plan import Costs, Device, LayerModel, MGRITSolve, Plan, RollingSolve, Solve, WindowSolve, make_plan

PAGE = Path(__file__).parent / "pays.md"
BEGIN, END = "<!-- tables: made by `python docs/pays.py`, checked by the tests -->\n", "<!-- end of tables -->"
DEVICES = 8
SOLVES: list[Solve] = [
    *(MGRITSolve(c, levels, 1, 1) for c in (2, 4, 8, 16) for levels in (2, 3, 4)),
    *(WindowSolve(length, 1, 1) for length in (2, 4, 8)),
    *(RollingSolve.usual(length) for length in (2, 4, 8)),
]


def costs(forward: float) -> Costs:
    """A layer's, in seconds; its gradients take twice its forward."""
    return Costs(forward=forward, record=forward, input_gradient=forward, full_gradient=2 * forward)


IDLE, BUSY = {1: costs(0.6e-3), 64: costs(6.9e-3)}, {1: costs(0.6e-3)}
SLOW, FAST = Device(), Device(latency_s=5e-6, bandwidth=2e11)
KINDS = {
    "Devices that small batches leave idle, on a network of 10 GB/s": (IDLE, SLOW),
    "The same, on links of 200 GB/s": (IDLE, FAST),
    "Devices that one sequence keeps busy, on a network of 10 GB/s": (BUSY, SLOW),
}


def shortest(solve: Solve) -> int:
    """The number of layers that a solve has to be deeper than."""
    return solve.coarsening ** (solve.levels - 1) if isinstance(solve, MGRITSolve) else solve.length


def planned(measured: dict[int, Costs], device: Device, layers: int, batch: int) -> Plan:
    """All meshes of eight devices, and of fewer."""
    config = make_config({"model": {"layers": layers}, "buffers": {"open": 0, "close": 0}, "batch_size": batch, "workers": 1})
    model = LayerModel(measured=measured, parameter_bytes=28e6, state_bytes=2e6, graph_bytes=6e7)
    deep_enough = [solve for solve in SOLVES if layers > shortest(solve)]
    return make_plan(config, model, device, DEVICES, solves=deep_enough)


def cell(plan: Plan, kind: type[Solve] | None) -> tuple[float, str]:
    """The fastest way by a kind of solve, None: an exact way: its speed-up over one device, and in words."""
    kinds = type(None) if kind is None else kind
    fastest = next((option for option in plan.options if isinstance(option.solve, kinds)), None)
    if fastest is None or fastest.devices == 1:
        return 1.0, "one device"
    way = {"in_order": "in turn ", "pipeline": "pipeline ", "data": "replicas ", "layer": ""}[fastest.kind]
    solve = fastest.solve
    settings = f", c_f {solve.coarsening}, {solve.levels} levels" if isinstance(solve, MGRITSolve) else ""
    return plan.serial_s / fastest.step_s, f"{way}{fastest.replicas} × {fastest.layer_workers}{settings}"


def table(measured: dict[int, Costs], device: Device) -> Iterable[str]:
    """A row a depth and batch; the faster one of the two ways that are accurate by themselves is bold."""
    yield "| layers | batch | best exact way | a rolling window (the default) | windows, 1+1 | MGRIT, 1+1 |"
    yield "|---|---|---|---|---|---|"
    for layers in (16, 64, 256):
        for batch in (1, 8, 64):
            plan = planned(measured, device, layers, batch)
            cells = [cell(plan, kind) for kind in (None, RollingSolve, WindowSolve, MGRITSolve)]
            accurate = max(factor for factor, _ in cells[:2])
            words = (f"**{factor:.1f}** ({way})" if factor == accurate else f"{factor:.1f} ({way})" for factor, way in cells)
            yield f"| {layers} | {batch} | " + " | ".join(words) + " |"


def page() -> str:
    """docs/pays.md, with its tables as the planner has them."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tables = "\n".join(f"**{kind}**: speed-up over one device.\n\n" + "\n".join(table(*given)) + "\n" for kind, given in KINDS.items())
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
