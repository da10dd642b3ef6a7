"""The tables of docs/pays.md, by the planner.

    python docs/pays.py        # writes them into docs/pays.md

Eight devices, messages of 20 µs and 10 GB/s, a layer of 28 MB of weights and a state of 2 MB a sequence. Two kinds of device: one that
small batches leave idle, whose layer takes 0.5 ms and 0.1 ms a sequence forward, and one that is busy with a single sequence, 0.6 ms each.
A gradient takes twice a forward.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from rayllp.config import make_config
from rayllp.plan import Costs, Device, LayerModel, MGRITSolve, Option, Plan, Solve, WindowSolve, make_plan

PAGE = Path(__file__).parent / "pays.md"
BEGIN, END = "<!-- tables: made by `python docs/pays.py`, checked by the tests -->\n", "<!-- end of tables -->"
DEVICES = 8
SWEEPS = ((1, 1), (2, 2))
SOLVES: list[Solve] = [
    *(MGRITSolve(c, levels, 1, 1) for c in (2, 4, 8, 16) for levels in (2, 3, 4)),
    *(WindowSolve(length, *sweeps) for length in (2, 4, 8) for sweeps in SWEEPS),
]


def costs(forward: float) -> Costs:
    """A layer's, in seconds; its gradients take twice its forward."""
    return Costs(forward=forward, record=forward, input_gradient=forward, full_gradient=2 * forward)


KINDS = {
    "A device that small batches leave idle": {1: costs(0.6e-3), 64: costs(6.9e-3)},
    "A device that one sequence keeps busy": {1: costs(0.6e-3)},
}


def shortest(solve: Solve) -> int:
    """The number of layers that a solve has to be deeper than."""
    return solve.length if isinstance(solve, WindowSolve) else solve.coarsening ** (solve.levels - 1)


def planned(measured: dict[int, Costs], layers: int, batch: int) -> Plan:
    """All meshes of eight devices, and of fewer."""
    config = make_config({"model": {"layers": layers}, "buffers": {"open": 0, "close": 0}, "batch_size": batch, "workers": 1})
    model = LayerModel(measured=measured, parameter_bytes=28e6, state_bytes=2e6, graph_bytes=6e7)
    deep_enough = [solve for solve in SOLVES if layers > shortest(solve)]
    return make_plan(config, model, Device(), DEVICES, solves=deep_enough)


def is_by_windows(option: Option, sweeps: tuple[int, int]) -> bool:
    """True if the option is by windows with so many sweeps forward and backward."""
    solve = option.solve
    return isinstance(solve, WindowSolve) and (solve.forward, solve.backward) == sweeps


def cell(plan: Plan, wanted: Callable[[Option], bool]) -> tuple[float, str]:
    """The fastest way of a kind: its speed-up over one device, and in words."""
    fastest = next((option for option in plan.options if wanted(option)), None)
    if fastest is None or fastest.devices == 1:
        return 1.0, "one device"
    way = {"in_order": "in turn ", "pipeline": "pipeline ", "data": "replicas ", "layer": ""}[fastest.kind]
    solve = fastest.solve
    settings = f", c_f {solve.coarsening}, {solve.levels} levels" if isinstance(solve, MGRITSolve) else ""
    return plan.serial_s / fastest.step_s, f"{way}{fastest.replicas} × {fastest.layer_workers}{settings}"


def table(measured: dict[int, Costs]) -> Iterable[str]:
    """A row a depth and batch; the fastest is bold."""
    yield "| layers | batch | best exact way | MGRIT, 1+1 | windows, 1+1 | windows, 2+2 |"
    yield "|---|---|---|---|---|---|"
    for layers in (16, 64, 256):
        for batch in (1, 8, 64):
            plan = planned(measured, layers, batch)
            cells = [cell(plan, lambda option: option.solve is None), cell(plan, lambda option: isinstance(option.solve, MGRITSolve))]
            cells += [cell(plan, partial(is_by_windows, sweeps=sweeps)) for sweeps in SWEEPS]
            best = max(factor for factor, _ in cells)
            words = (f"**{factor:.1f}** ({way})" if factor == best else f"{factor:.1f} ({way})" for factor, way in cells)
            yield f"| {layers} | {batch} | " + " | ".join(words) + " |"


def page() -> str:
    """docs/pays.md, with its tables as the planner has them."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tables = "\n".join(f"**{kind}**: speed-up over one device.\n\n" + "\n".join(table(measured)) + "\n" for kind, measured in KINDS.items())
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
