"""What the planner says of sizes that are not at hand, beside the shapes of the paper's figures 8 and 9.

    python examples/benchmarks/planned.py [--picture docs/images/planned.png]

1. N = 1024 layers on 8 workers, 2 to 4 levels, c_f = 2 to 16, one iteration each way: speed-up over one device (figure 8 there).
2. 64 layers on 16, 32 and 64 devices, batch 32, as replicas times layer-parallel workers: step time by replicas (figure 9 there, a
   parabola). A layer's forward takes 0.5 ms and 0.1 ms a sequence, its gradients as long each: a device that small batches leave idle.
   Its weights are 28 MB, a sequence's state 2 MB; messages take 20 µs and go at 10 GB/s.
"""

import argparse
from pathlib import Path

import rayllp
from rayllp.errors import SettingsError
from rayllp.plan import Costs, Device, LayerModel, MGRITSolve, Option, Solve, WindowSolve, make_plan
from rayllp.plan.options import ITERATIONS, mgrit_solves

DEVICE = Device(latency_s=2e-5, bandwidth=1e10)


def costs(forward: float) -> Costs:
    return Costs(forward=forward, record=forward, input_gradient=forward, full_gradient=2 * forward)


def levels_and_coarsening() -> dict[int, list[tuple[int, float]]]:
    """By levels: c_f and speed-up."""
    config = rayllp.make_config({"model": {"layers": 1024}, "buffers": {"open": 0, "close": 0}, "batch_size": 1, "workers": 1})
    model = LayerModel(measured={1: costs(1e-2)}, state_bytes=2.6e5)
    found: dict[int, list[tuple[int, float]]] = {}
    for levels in (2, 3, 4):
        for c in (2, 4, 8, 16):
            if c ** (levels - 1) >= 1024:
                continue
            try:
                plan = make_plan(config, model, DEVICE, 8, solves=[MGRITSolve(c, levels, 1, 1)])
            except SettingsError:
                continue
            option = next((o for o in plan.options if o.solve is not None and o.layer_workers == 8), None)
            if option is not None:
                found.setdefault(levels, []).append((c, plan.serial_s / option.step_s))
    return found


def replicas_and_workers() -> dict[int, list[tuple[int, float, Solve | None]]]:
    """By devices: replicas, the fastest step on all devices, and its solve; one worker a replica is plain data parallelism."""
    config = rayllp.make_config({"model": {"layers": 64}, "buffers": {"open": 0, "close": 0}, "batch_size": 32, "workers": 1})
    model = LayerModel(
        measured={1: costs(0.6e-3), 32: costs(3.7e-3)}, parameter_bytes=28e6, state_bytes=2e6, graph_bytes=6e7,
    )  # fmt: skip
    found: dict[int, list[tuple[int, float, Solve | None]]] = {}
    windows = [WindowSolve(length, *sweeps) for length in (2, 4, 8, 16, 32, 64) for sweeps in ITERATIONS]
    for devices in (16, 32, 64):
        plan = make_plan(config, model, DEVICE, devices, solves=[*mgrit_solves(64), *windows])
        for replicas in (1, 2, 4, 8, 16, 32):
            mesh = replicas, devices // replicas
            of_mesh = [o for o in plan.options if (o.replicas, o.layer_workers) == mesh and is_shown(o)]
            if of_mesh:
                best = min(of_mesh, key=lambda option: option.step_s)
                found.setdefault(devices, []).append((replicas, best.step_s, best.solve))
    return found


def is_shown(option: Option) -> bool:
    """True for replicas, MGRIT, and windows of as many layers as workers."""
    solve = option.solve
    return option.kind in ("layer", "data") and not (isinstance(solve, WindowSolve) and solve.length != option.layer_workers)


def shown(solve: Solve | None) -> str:
    match solve:
        case MGRITSolve():
            return f"{solve.coarsening}, {solve.levels}"
        case WindowSolve():
            return f"{solve.length}, 0"
    return "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    shapes, parabolas = levels_and_coarsening(), replicas_and_workers()
    print(
        "N = 1024 on 8 workers, 1+1 iterations: speed-up\n\n| levels | "
        + " | ".join(f"c_f {c}" for c in (2, 4, 8, 16))
        + " |\n|---|---|---|---|---|"
    )
    for levels, points in shapes.items():
        known = dict(points)
        print(f"| {levels} | " + " | ".join(f"{known[c]:.2f}" if c in known else "–" for c in (2, 4, 8, 16)) + " |")
    print("\n64 layers, batch 32: step in ms by replicas, with the fastest settings (c_f, levels)\n")
    print("| devices | " + " | ".join(f"{r} replicas" for r in (1, 2, 4, 8, 16, 32)) + " |\n" + "|---" * 7 + "|")
    for devices, row in parabolas.items():
        known_rows = {r: f"{1e3 * s:.1f} ({shown(solve)})" for r, s, solve in row}
        print(f"| {devices} | " + " | ".join(known_rows.get(r, "–") for r in (1, 2, 4, 8, 16, 32)) + " |")
    if arguments.picture:
        draw(shapes, parabolas, arguments.picture)


def draw(shapes: dict[int, list[tuple[int, float]]], parabolas: dict[int, list[tuple[int, float, Solve | None]]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for levels, points in shapes.items():
        left.plot(*zip(*points, strict=True), "o-", label=f"{levels} levels")
    left.set(xscale="log", xlabel="c_f", ylabel="speed-up over one device", title="N = 1024, 8 workers, 1+1, predicted")
    left.set_xticks([2, 4, 8, 16], ["2", "4", "8", "16"])
    for devices, row in parabolas.items():
        right.plot([r for r, _, _ in row], [1e3 * s for _, s, _ in row], "o-", label=f"{devices} devices")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="replicas (the rest: layer-parallel workers)",
        ylabel="step, ms",
        title="N = 64, batch 32, predicted",
    )
    right.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    for axis in (left, right):
        axis.minorticks_off()
        axis.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main()
