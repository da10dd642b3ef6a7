"""Sweeps and jobs on real clusters, started by hand: `make test ARGS="-m study tests/test_tuning_study.py -s"`."""

import contextlib
import csv
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import ray

import rayllp
from rayllp.tuning.sweep import load_sweep, make_sweep
from tests.test_train import living_actors, placement_groups, read, wait_until
from tests.test_tuning import SMALL

pytestmark = pytest.mark.study
HERE = Path(__file__).parent.parent
SMOKE = HERE / "tune_configs" / "smoke.yaml"


@pytest.fixture
def four_cpus():
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def nothing_is_left():
    assert not placement_groups()
    wait_until(lambda: not living_actors(), 30)


@pytest.mark.usefixtures("four_cpus")
def test_the_smoke_sweep(tmp_path):
    began = time.monotonic()
    rayllp.tune(load_sweep(SMOKE), output=tmp_path / "out")
    took = time.monotonic() - began
    nothing_is_left()
    rows = list(csv.DictReader((tmp_path / "out" / "trials.csv").open()))
    assert len(rows) == 6
    # What a trial took beyond its steps and evaluations, on the clock of its own process.
    overheads = [float(row["time_total_s"]) - float(row["seconds"]) for row in rows]
    print(f"6 trials in {took:.0f} s; beyond training: {sorted(round(value, 1) for value in overheads)} s; {[r['state'] for r in rows]}")
    assert took < 180


def finished(folder):
    return [path for path in folder.glob("trials/*/evals.jsonl") if read(path)[-1]["step"] == 150]


def going(folder):
    """Return the trials that have a checkpoint."""
    return {path.parts[-4] for path in folder.glob("trials/*/checkpoints/step_*/manifest.json")}


def test_ctrl_c_and_a_killed_driver(tmp_path):
    """Ctrl-C ends a sweep and its cluster; SIGKILL too, and --resume keeps what was finished and goes on with what was not."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_worker_niceness": "0"}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "rayllp", "tune", str(SMOKE), "--set", "scheduler=none", "--set", "settings.steps=150"]
    for how in (signal.SIGINT, signal.SIGKILL):
        folder = tmp_path / "stopped" if how == signal.SIGINT else out
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen([*command, "--output", str(folder)], stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            wait_until(lambda folder=folder: len(finished(folder)) >= 2 and len(going(folder)) > len(finished(folder)), 240)
            below = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(how)
            process.wait(90)
        finally:
            if process.poll() is None:
                process.kill()
        psutil.wait_procs(below, timeout=30)
        left = [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        print(how, "processes left:", [p.name() for p in left])
        for p in left:
            p.kill()
        assert how == signal.SIGKILL or not left
    before = {path.parent.name: path.read_text() for path in finished(out)}
    started = going(out)
    subprocess.run([sys.executable, "-m", "rayllp", "tune", "--resume", str(out)], env=environment, check=True, timeout=400)
    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert len(rows) == 6
    assert {row["state"] for row in rows} == {"done"}
    for trial, evaluations in before.items():
        assert (out / "trials" / trial / "evals.jsonl").read_text() == evaluations
    restored = [t for t in started if any(e["kind"] == "restore" for e in read(out / "trials" / t / "events.jsonl"))]
    print(f"finished before {sorted(before)}, gone on from a checkpoint {restored}")
    assert set(restored) == started - set(before)
    assert restored


@pytest.mark.usefixtures("four_cpus")
def test_trials_switch_are_forced_and_give_workers_back(tmp_path):
    """Two trials of two workers fill the cluster; each time one has gone serial and shrunk to one worker, another trial may start."""
    settings = {
        **SMALL, "workers": 2, "steps": 240, "mode": "adaptive", "step.middle": 1, "buffers.open": 0, "buffers.close": 0,
        "mgrit.iterations.forward": 1, "mgrit.iterations.backward": 1, "adaptive.ladder": ["1+1"], "eval.every": 20,
        "adaptive.probe_every": 10, "optimizer.lr": 0.01, "adaptive.return_below": None, "optimizer.warmup": 5,
        "adaptive.rule": "convergence", "adaptive.switch_at": 1.0,
        "adaptive.threshold": 0.12,  # a network so small stays far below 1
    }  # fmt: skip
    sweep = make_sweep(
        {
            "settings": settings, "space": {"mode": {"choice": ["adaptive", "parallel"]}, "seed": {"choice": [0, 1]}}, "searcher": "grid",
            "scheduler": "none", "limits": {"rho": 0.12}, "on_serial": "shrink",
        }
    )  # fmt: skip
    rayllp.tune(sweep, output=tmp_path / "out")
    nothing_is_left()
    rows = list(csv.DictReader((tmp_path / "out" / "trials.csv").open()))
    spans = {}
    for row in rows:
        run = tmp_path / "out" / "trials" / row["trial"]
        events, metrics = read(run / "events.jsonl"), read(run / "metrics.jsonl")
        workers = [m["workers"] for m in metrics]
        spans[row["trial"]] = (row["mode"], row["forced_serial"], row["shrunk"], workers.count(2), workers.count(1))
        print(
            row["trial"],
            spans[row["trial"]],
            [(e["step"], e.get("reason") or e.get("changed")) for e in events if e["kind"] in ("switch", "settings")],
        )
    # Two trials of two workers fill the four CPUs: a third at the same time has those that others gave back.
    times = {row["trial"]: [e["time"] for e in read(tmp_path / "out" / "trials" / row["trial"] / "events.jsonl")] for row in rows}
    at_once = max(sum(t[0] <= moment <= t[-1] for t in times.values()) for found in times.values() for moment in found)
    print("trials at a time:", at_once)
    assert at_once >= 3
    assert any(row["forced_serial"] == "True" for row in rows)
    assert any(row["shrunk"] == "True" for row in rows)
    assert all(row["state"] == "done" for row in rows)


@pytest.mark.usefixtures("four_cpus")
def test_a_population_shares_its_best_weights(tmp_path):
    """One of two trials hardly learns. It gets the other's weights, and ends as well as that one."""
    settings = {**SMALL, "steps": 24, "optimizer.warmup": 2, "optimizer.lr": 1e-2}
    space = {"optimizer.lr": {"choice": [1e-2, 1e-7]}}
    sweep = make_sweep({"settings": settings, "space": space, "searcher": "random", "scheduler": "pbt", "grace": 1, "trials": 2})
    results = rayllp.tune(sweep, output=tmp_path / "out")
    nothing_is_left()
    assert [result.error for result in results] == [None, None]
    curves = [read(trial / "evals.jsonl") for trial in sorted((tmp_path / "out" / "trials").iterdir())]
    for curve in curves:
        print([(e["step"], round(e["loss"], 3)) for e in curve])
        assert [e["step"] for e in curve] == sorted({e["step"] for e in curve})
        assert curve[-1]["step"] == 24
    losses = [curve[-1]["loss"] for curve in curves]
    assert max(losses) < 0.8 * math.log(256)  # which the one that hardly learns would never reach
    rows = list(csv.DictReader((tmp_path / "out" / "trials.csv").open()))
    assert sorted(float(row["validation_loss"]) for row in rows) == pytest.approx(sorted(losses))


# Jobs -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_raylets():
    """A head with a job server and a second raylet, by `ray start`, with a token; also where the cluster keeps its files."""
    folder = Path(tempfile.mkdtemp(prefix="ray_"))  # a short path: sockets lie below it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
    ports = {"port": 26379, "dashboard": 28265}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start"]
    head = ["--head", f"--port={ports['port']}", f"--dashboard-port={ports['dashboard']}", "--num-cpus=3", "--node-ip-address=127.0.0.1"]
    subprocess.run([*start, *head, f"--temp-dir={folder}"], env=environment, check=True, timeout=120, capture_output=True)
    address = f"127.0.0.1:{ports['port']}"
    subprocess.run(
        [*start, f"--address={address}", "--num-cpus=3", "--node-ip-address=127.0.0.1"],
        env=environment, check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard']}"}, address, folder
    subprocess.run([*start[:-1], "stop", "--force"], env=environment, timeout=60, capture_output=True)


def scrape(ray_folder):
    """Return what Prometheus would read at the addresses that Ray writes for it."""
    found = json.loads((ray_folder / "prom_metrics_service_discovery.json").read_text())
    pages = []
    for target in {target for group in found for target in group["targets"]}:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
            pages.append(page.read().decode())
    return "\n".join(pages)


COUNT = """
import json, ray
ray.init(address={address!r}, logging_level="ERROR")
from ray._private.state import actors
from ray.util import placement_group_table
alive = [a["ActorClassName"] for a in actors().values() if a["State"] == "ALIVE"]
groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
print(json.dumps([len(ray.nodes()), [a for a in alive if "Job" not in a], len(groups)]))
"""


def test_jobs_on_two_raylets_with_a_token(two_raylets, tmp_path):
    environment, address, ray_folder = two_raylets

    def ray_job(*arguments, check=True, timeout=300):
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", *arguments]
        for _ in range(30):
            done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=timeout)
            if "No available agent" not in done.stdout + done.stderr:  # it starts after the cluster
                break
            time.sleep(2)
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def count():
        done = subprocess.run([sys.executable, "-c", COUNT.format(address=address)], env=environment, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    # Without the token nobody gets in.
    outsider = {name: value for name, value in environment.items() if "AUTH" not in name} | {"HOME": str(tmp_path)}
    refused = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", "list"], env=outsider, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode != 0
    jobs = tmp_path / "jobs"
    folder = tmp_path / "work"
    folder.mkdir()
    python = f"PYTHONPATH={HERE} {sys.executable} -m rayllp"
    began = time.monotonic()
    done = ray_job("submit", "--working-dir", str(folder), "--", "bash", "-c",
                   f"{python} train --output {jobs}/run --set workers=4 --set steps=30 --set eval.every=0")  # fmt: skip
    assert "validation loss" in done.stdout + done.stderr
    assert len({m["workers"] for m in read(jobs / "run" / "metrics.jsonl")}) == 1
    print(f"training as a job: {time.monotonic() - began:.0f} s; then {count()}")
    began = time.monotonic()
    ray_job("submit", "--working-dir", str(folder), "--", "bash", "-c",
            f"{python} tune {SMOKE} --output {jobs}/sweep --set trials=3 --set scheduler=none")  # fmt: skip
    assert (jobs / "sweep" / "best.yaml").exists()
    print(f"sweep as a job: {time.monotonic() - began:.0f} s; then {count()}")
    ray_job("submit", "--no-wait", "--submission-id", "long", "--working-dir", str(folder), "--", "bash", "-c",
            f"exec env {python} train --output {jobs}/long --set workers=4 --set steps=100000 --set eval.every=0")  # fmt: skip
    wait_until(lambda: (jobs / "long" / "metrics.jsonl").exists(), 120)
    wait_until(lambda: "ray_rayllp_step_time_s" in scrape(ray_folder), 60)
    print([line for line in scrape(ray_folder).splitlines() if line.startswith("ray_rayllp_loss")])
    ray_job("stop", "long")
    wait_until(lambda: count() == [2, [], 0], 60)
    steps = len(read(jobs / "long" / "metrics.jsonl"))
    found = sorted((jobs / "long" / "checkpoints").glob("step_*"))
    print(f"stopped after {steps} steps; checkpoints {[p.name for p in found]}; then {count()}")
    assert [path.name for path in found] == [f"step_{steps}"]
