"""How much faster a run says that it was than exact training."""

import io

import pytest
from rich.console import Console

import rayllp
from rayllp.config import make_config
from rayllp.control import Decision, Probe
from rayllp.report import Journal, RunDirectory, read_lines
from rayllp.training.gain import StepTimes
from rayllp.training.step_log import StepLog
from tests.conftest import tiny


def test_seconds_by_solve_beside_exact_steps():
    times = StepTimes()
    times.take("probes", 5.0)
    for _ in range(5):
        times.take("serial", 1.0, computed=3.0)
    for _ in range(10):
        times.take("1+1", 0.25)
    assert times.step_s == {"serial": 1.0, "1+1": 0.25, "probes": 5.0}
    gain = times.gain
    assert gain.seconds == {"probes": 5.0, "serial": 5.0, "1+1": 2.5}
    assert gain.speedup == pytest.approx(16 / 12.5)
    assert gain.speedup_over_one == pytest.approx(48 / 12.5)
    assert gain.sentence(None) == (
        "trained 5 s in 1 probe, 5 s in 5 exact steps, 2.5 s in 10 steps by 1+1; 1.28 times as fast as exact training on these workers, "
        "3.84 times as fast as one worker"
    )


def test_a_run_that_gains_nothing_says_so_and_why():
    times = StepTimes()
    for name, seconds in (("serial", 1.0), ("1+1", 1.2), ("serial", 1.0)):
        for _ in range(5):
            times.take(name, seconds)
    assert "layer-parallel steps gained nothing over exact ones on these workers: a step by 1+1 takes 1.2 s" in times.gain.sentence(
        "a step by 1+1 takes 1.2 s, an exact one 1 s"
    )
    times.forget_speed()
    assert times.step_s == {}
    assert "no exact step was timed" in times.gain.sentence(None)


def test_probes_are_timed_though_they_come_one_by_one():
    """The first of them may be slow, so the fastest counts. They take as long whatever the tolerance is."""
    times = StepTimes()
    for seconds, known in ((9.0, 9.0), (2.8, 2.8), (3.0, 2.8)):
        times.take("probes", seconds)
        assert times.step_s["probes"] == known
        for _ in range(5):
            times.take("rolling", 0.5)
    assert times.step_s == {"probes": 2.8, "rolling": 0.5}
    times.forget_speed(but=("serial", "probes"))
    assert times.step_s == {"probes": 2.8}


def test_a_hurried_window_is_judged_by_its_new_times(tmp_path):
    """Steps of 1.05 s become steps of 0.9 s by a larger tolerance; exact ones take 1 s."""
    config = make_config({"workers": 8, "model": {"layers": 20}, "steps": 1000})
    run = RunDirectory(tmp_path, config)
    with Journal.open(run, 1000, 0, Console(file=io.StringIO())) as journal:
        step_log = StepLog(run, journal, config)
        control = step_log.controller
        control.observe(0, Probe(bias=0.17, noise=1.0, sweeps=(5, 4)))
        for _ in range(6):
            step_log.times.take("serial", 1.0)
            step_log.times.take("probes", 1.1)
            step_log.times.take("serial", 1.0)
        for step in range(5, 100):
            step_log.begin(step)
            if control.plan_probe(step):
                control.observe(step, Probe(bias=0.17, noise=1.0, sweeps=(4, 3)))
            elif not control.accuracy_at(step).serial:
                step_log.times.take("rolling", 1.05 if control.chosen.tolerance == 0.1 else 0.9)
        assert control.chosen.tolerance > 0.1
        assert not control.accuracy_at(100).serial
        assert step_log.times.step_s == {"serial": 1.0, "probes": 1.1, "rolling": 0.9}
    assert [event["reason"][:13] for event in read_lines(tmp_path / "events.jsonl")] == ["steps are no "]


def test_a_window_is_used_again_once_exact_steps_turn_out_slower(tmp_path):
    """Exact steps seem to take 0.8 s and then take 2 s; steps by the window take 1 s."""
    config = make_config({"workers": 8, "model": {"layers": 64}, "steps": 1000})
    run, used = RunDirectory(tmp_path, config), []
    with Journal.open(run, 1000, 0, Console(file=io.StringIO())) as journal:
        step_log = StepLog(run, journal, config)
        step_log.start_at(0)
        for step in range(150):
            step_log.begin(step)
            (_, accuracy, plan), *_ = step_log.next_chunk(step, step + 1)
            used.append("probes" if plan else accuracy.name)
            step_log.times.take(used[-1], {"probes": 2.5, "serial": 0.8 if step < 40 else 2.0, "rolling": 1.0}[used[-1]])
            if plan:
                before = step_log.controller.chosen.tolerance
                step_log.controller.observe(step, Probe(bias=0.14, noise=0.5, sweeps=(20, 18)))
                step_log._heed_tolerance(before)
    reasons = [event["reason"] for event in read_lines(tmp_path / "events.jsonl")]
    (left,) = [place for place, reason in enumerate(reasons) if reason.startswith("a step by rolling takes 1 s")]
    assert reasons[left + 1] == "looking again whether layer-parallel steps are faster"
    assert set(used[100:]) == {"rolling", "probes"}


def test_the_first_step_of_a_kind_tells_nothing():
    times = StepTimes()
    for seconds in (9.0, 1.0, 1.0, 1.0):
        times.take("serial", seconds)
    assert times.step_s == {"serial": 1.0}


def test_the_exact_steps_at_the_end_of_a_run_are_no_reason(tmp_path):
    config = tiny(mode="adaptive", steps=20, adaptive={"switch_at": 0.5})
    run = RunDirectory(tmp_path, config)
    with Journal.open(run, 20, 0, Console(file=io.StringIO())) as journal:
        step_log = StepLog(run, journal, config)
        step_log._announce(Decision(3, "serial", "a bias of 0.9", "serial"))
        assert step_log.why_exact == "a bias of 0.9"
        step_log._announce(Decision(5, "parallel", "a bias of 0.1", "1+1"))
        assert step_log.why_exact is None
        step_log.begin(10)
        assert step_log.controller.serial
        assert step_log.why_exact is None
    assert [event["reason"] for event in read_lines(tmp_path / "events.jsonl")][-1] == "adaptive.switch_at 0.5"


@pytest.mark.usefixtures("ray_cluster")
def test_an_adaptive_run_records_its_gain(tmp_path):
    adaptive = {"rule": "bias", "probe_every": 8, "switch_at": None}
    config = tiny(mode="adaptive", solver="windows", workers=2, steps=24, dtype="float32", adaptive=adaptive)
    run = rayllp.train(config, output=tmp_path / "run").directory
    (gain,) = [event for event in read_lines(run / "events.jsonl") if event["kind"] == "gain"]
    metrics = list(read_lines(run / "metrics.jsonl"))
    assert sum(gain["steps_by_solve"].values()) == 24
    assert sum(gain["seconds_by_solve"].values()) == pytest.approx(sum(metric["step_time_s"] for metric in metrics), abs=0.05)
    assert gain["exact_step_s"] > 0
    assert gain["one_worker_step_s"] > 0
    assert metrics[0]["probed"] == "rolling"
    assert [metric["solve"] for metric in metrics[1:5]] == ["serial"] * 4
