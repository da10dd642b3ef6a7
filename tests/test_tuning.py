"""Sweeps: what a sweep file may contain, which trials it makes, what they report, and one real sweep on Ray Tune."""

import csv
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

import rayllp
from rayllp.checkpoint import MANIFEST, checkpoints, step_of
from rayllp.data import DatasetFacts
from rayllp.errors import CheckpointError, ClusterError, SettingsError
from rayllp.plan import Costs
from rayllp.report import RunDirectory
from rayllp.tuning.pictures import pareto_front
from rayllp.tuning.reporter import WORST, Reporter, Step
from rayllp.tuning.results import _page, _write_csv, rows_of
from rayllp.tuning.run import _create
from rayllp.tuning.searchers import build_searcher
from rayllp.tuning.sweep import Objective, load_sweep, make_sweep
from rayllp.tuning.trial import _predictor
from tests.test_train import living_actors, placement_groups, read, wait_until

SMALL = {
    "solver": "mgrit",
    "model.layers": 12, "model.width": 16, "model.heads": 2, "sequence_length": 16, "batch_size": 4, "workers": 1, "steps": 12,
    "mode": "parallel", "eval.every": 4, "eval.batches": 2, "eval.sample": 0, "adaptive.probe_every": 4,
}  # fmt: skip
SPACE = {"mgrit.coarsening": {"choice": [2, 4]}, "mgrit.iterations.forward": {"int": [1, 2]}}


def sweep_of(**changes):
    return make_sweep({"settings": SMALL, "space": SPACE, **changes})


# What a file may say ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"mgrit.coarsning": {"choice": [2]}}}, "unknown setting mgrit.coarsning; did you mean mgrit.coarsening"),
        ({"settings": {"learning_rate": 1}}, "unknown setting learning_rate"),
        ({"space": {"mgrit.coarsening": {"int": [4, 2]}}}, r"int \[4, 2\] is an empty range"),
        ({"space": {"optimizer.lr": {"float": [1.0, 1.0]}}}, "is an empty range"),
        ({"space": {"optimizer.lr": {"log": [0, 1]}}}, "needs numbers above 0"),
        ({"space": {"mgrit.coarsening": {"choice": []}}}, "is empty or no list"),
        ({"space": {"mgrit.coarsening": 4}}, "a fixed value goes into `settings`"),
        ({"space": {"mgrit.coarsening": {"choices": [4]}}}, "write one of"),
        ({"space": {"buffers.open": {"int": [0, 1], "when": {"mode": "serial"}}}}, "a condition is on a setting that stands before it"),
        ({"space": {"mgrit.levels.backward": {"same": "mgrit.levels.forward"}}}, "not in the space before it"),
        ({"space": {**SPACE, "buffers.open": {"same": "mgrit.coarsening", "when": {"mode": "serial"}}}}, "takes nothing beside `same`"),
        ({"space": {"optimizer.lr": {"float": [1, 2], "when": "mode"}}}, "when 'mode': write the other setting and what it must be"),
        ({"base": "nowhere.yaml"}, r"base nowhere\.yaml does not exist"),
        ({"trails": 3}, "unknown entry trails"),
        ({"objective": {"kind": "time_to_loss"}}, "needs a target"),
        ({"objective": {"kind": "step_time"}}, "needs a bound"),
        ({"objective": {"kind": "pareto"}}, "scheduler asha compares one number"),
        ({"objective": {"kind": "loss", "cluster": {"workers": 8}}}, "cluster is for step_time and pareto"),
        ({"searcher": "grid", "space": {"optimizer.lr": {"log": [1e-4, 1e-2]}}}, "a range of real numbers"),
        ({"space": {"workers": {"choice": [{"min": 1, "max": 2}]}}}, "give workers as a number"),
        ({"settings": {**SMALL, "eval.every": 0}}, "set eval.every"),
        ({"settings": {**SMALL, "model.heads": 3}}, "heads"),
    ],
)
def test_what_cannot_work_is_refused_in_words(changes, message):
    with pytest.raises(SettingsError, match=message):
        sweep_of(**changes)


def test_files_and_their_base(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"model": {"layers": 16}, "batch_size": 2}))
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({"base": "base.yaml", "settings": {"batch_size": 4, "solver": "mgrit"}, "space": SPACE})
    )
    sweep = load_sweep(tmp_path / "sweep.yaml", ["trials=3", "settings.optimizer.lr=1e-2", "objective.steps=7"])
    config = sweep.config({"mgrit.coarsening": 2})
    assert (config.model.layers, config.batch_size, config.optimizer.lr, config.mgrit.coarsening, config.steps) == (16, 4, 0.01, 2, 7)
    assert sweep.trials == 3
    with pytest.raises(SettingsError, match="cannot read"):
        load_sweep(tmp_path / "none.yaml")
    (tmp_path / "base.yaml").write_text("model: [")
    with pytest.raises(SettingsError, match=r"base\.yaml is not YAML"):
        load_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("space", "shared"),
    [
        (SPACE, True),
        ({"optimizer.lr": {"log": [1e-4, 1e-2]}}, True),
        ({"model.heads": {"choice": [2, 4]}}, True),
        ({"model.head": {"choice": ["masked", "sentences"]}}, False),
        ({"model.from_pretrained": {"choice": ["a", "b"]}}, False),
        ({"model.architecture": {"choice": ["llama", "bert"]}}, False),
        ({"sequence_length": {"choice": [16, 32]}}, False),
    ],
)
def test_trials_share_their_data_only_if_nothing_varies_that_decides_it(space, shared):
    assert sweep_of(space=space).shares_data is shared


def test_all_sweeps_that_come_with_it_are_valid():
    from pathlib import Path

    found = sorted((Path(__file__).parent.parent / "tune_configs").glob("*.yaml"))
    assert len(found) >= 6
    for path in found:
        load_sweep(path)


# Which trials are made of it ----------------------------------------------------------------------------------------------------


def suggestions(sweep, searcher=None):
    searcher, found = searcher or build_searcher(sweep), []
    while isinstance(suggested := searcher.suggest(f"trial{len(found)}"), dict):
        found.append(suggested["settings"])
    return found, searcher


def test_the_base_comes_first_and_no_trial_twice():
    sweep = sweep_of(trials=20)
    found, _ = suggestions(sweep)
    assert found[0] == {}
    # 2 · 2 points, of which the base config is one.
    assert sorted(map(str, found[1:])) == sorted(
        str({"mgrit.coarsening": c, "mgrit.iterations.forward": n}) for c in (2, 4) for n in (1, 2) if (c, n) != (4, 2)
    )


def test_what_does_not_go_together_never_becomes_a_trial():
    space = {
        "mgrit.coarsening": {"choice": [2, 4, [2, 2]]},
        "mgrit.levels.forward": {"int": [2, 3]},
        "mgrit.levels.backward": {"same": "mgrit.levels.forward"},
    }
    for searcher in ("random", "optuna", "grid"):
        sweep = sweep_of(space=space, searcher=searcher, trials=30)
        found, search = suggestions(sweep)
        assert all(sweep.problem(chosen) is None for chosen in found)
        assert all(chosen["mgrit.levels.backward"] == chosen["mgrit.levels.forward"] for chosen in found if chosen)
        assert search.infeasible
        assert {str(chosen["mgrit.coarsening"]) for chosen in found if chosen} >= {"2", "[2, 2]"}


def test_a_network_that_does_not_fit_the_data_never_becomes_a_trial():
    sweep = sweep_of(settings={**SMALL, "model.family": "vit"}, space={"model.patch_size": {"choice": [4, 5]}}, searcher="grid")
    assert len(suggestions(sweep)[0]) == 2
    sweep = sweep.with_facts(DatasetFacts(vocabulary=0, classes=("a", "b"), image=(1, 28, 28)))
    found, search = suggestions(sweep)
    assert found == [{"model.patch_size": 4}]
    assert "patch" in search.infeasible[0][1]


def test_a_trials_driver_starts_without_transformers():
    """Importing transformers takes as long as everything else together, and the driver's process has no layers."""
    code = "import sys, rayllp.tuning.trial as t; assert 'transformers' not in sys.modules and 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_setting_varies_only_where_it_matters():
    space = {"mode": {"choice": ["parallel", "adaptive"]}, "adaptive.threshold": {"choice": [0.5, 1.0], "when": {"mode": "adaptive"}}}
    found, _ = suggestions(sweep_of(space=space, searcher="grid"))
    assert found == [
        {"mode": "parallel"},
        {"mode": "adaptive", "adaptive.threshold": 0.5},
        {"mode": "adaptive", "adaptive.threshold": 1.0},
    ]


def test_a_search_goes_on_where_it_was_saved(tmp_path):
    sweep = sweep_of(trials=4, searcher="random")
    searcher = build_searcher(sweep)
    first = [searcher.suggest(f"t{n}") for n in range(2)]
    searcher.save(str(tmp_path / "state"))
    rest = [searcher.suggest(f"t{n}") for n in range(2, 5)]
    again = build_searcher(sweep)
    again.restore(str(tmp_path / "state"))
    assert [again.suggest(f"t{n}") for n in range(2, 5)] == rest
    assert len({str(suggested) for suggested in [*first, *rest[:-1]]}) == 4
    assert rest[-1] == "FINISHED"


# What trials report ----------------------------------------------------------------------------------------------------------------


def metric(step, **changes):
    base = {"step": step, "tokens": 64, "step_time_s": 0.5, "mode": "parallel", "bias": None, "rho_forward": None, "rho_backward": None}
    return base | changes


def test_a_report_has_every_number_and_the_worst_where_there_is_none():
    reporter = Reporter(Objective(kind="time_to_loss", target=2.0))
    assert reporter.report()["seconds_to_target"] == WORST
    for step in range(6):
        reporter.on_step(metric(step, step_time_s=9.0 if step < 3 else 0.5, bias=0.1 * step if step == 5 else None, rho_backward=0.3))
    reporter.on_evaluation(6, {"loss": 2.5, "perplexity": 12.0})
    assert not reporter.is_exhausted
    reporter.on_event(6, "switch", {"rung": "serial"})
    reporter.on_step(metric(6, mode="serial"))
    reporter.on_evaluation(7, {"loss": 1.9, "perplexity": 6.7})
    assert reporter.is_exhausted
    found = reporter.report()
    assert found["seconds_to_target"] == pytest.approx(27 + 4 * 0.5)
    assert (found["step_time"], found["bias"], found["largest_rho"], found["switched_at"]) == (0.5, 0.5, 0.3, 6)
    assert (found["parallel_share"], found["last_mode"], found["perplexity"]) == (round(6 / 7, 4), "serial", 6.7)


def test_a_predicted_step_time_is_the_mean_of_the_steps_that_were_taken():
    """A rolling window's by the sweeps that were counted, probes left out; exact ones by theirs."""
    settings, space = {"workers": 1, "model.layers": 20}, {"optimizer.lr": {"choice": [1e-3]}}
    sweep = sweep_of(settings=settings, space=space, objective={"kind": "pareto", "cluster": {"workers": 8}}, scheduler="none")
    config = sweep.config({})
    assert (config.workers, config.windows.length, sweep.enlarged(config).workers) == (1, 8, 8)
    costs = Costs(forward=1.0, record=1.0, input_gradient=1.0, full_gradient=2.0)
    reporter = Reporter(sweep.objective, _predictor(sweep, config, costs))
    exact = reporter.predict(Step(exact=True))
    for step, (forward, backward, probed) in enumerate([(6, 4, None), (8, 6, None), (20, 20, "rolling")]):
        counts = {"solve": "rolling", "probed": probed, "iterations_forward": forward, "iterations_backward": backward}
        reporter.on_step(metric(step, **counts))
    rolling = reporter.report()["step_time"]
    assert rolling == pytest.approx(7 + 5 + 3)  # sweeps, and three layers' parameter gradients
    reporter.on_step(metric(3, mode="serial", solve="serial", probed=None))
    assert reporter.report()["step_time"] == pytest.approx(0.75 * rolling + 0.25 * exact)
    fixed = sweep.config({"windows.length": 4})
    assert fixed.windows.length == 4


def test_what_was_not_measured_has_no_number_in_the_table(tmp_path):
    sweep = sweep_of(space={"optimizer.lr": {"choice": [1e-3, 1e-4]}}, objective={"kind": "pareto"}, scheduler="none")
    reporter, exact = Reporter(sweep.objective), Reporter(sweep.objective)
    reporter.on_step(metric(0))
    exact.on_step(metric(0, mode="serial"))
    reports = [Reporter(sweep.objective).report(diverged=True), reporter.report(), exact.report()]
    assert [(found["step_time"], found["bias"]) for found in reports] == [(WORST, WORST), (0.5, WORST), (0.5, 0.0)]
    results = [SimpleNamespace(config={}, metrics=found, path=str(tmp_path / f"trial_{n}"), error=None) for n, found in enumerate(reports)]
    _write_csv(rows_of(sweep, results), sweep, tmp_path / "trials.csv")
    rows = list(csv.DictReader((tmp_path / "trials.csv").open(encoding="utf-8")))
    for row in rows:
        assert [row[name] for name in ("validation_loss", "largest_rho", "seconds_to_target", "switched_at")] == [""] * 4
    assert [(row["step_time"], row["bias"], row["time_total_s"]) for row in rows] == [("", "", ""), ("0.5", "", ""), ("0.5", "0.0", "")]
    loss = Reporter(Objective())
    loss.on_step(metric(0, mode="serial"))
    assert (loss.report()["bias"], loss.report()["validation_loss"]) == (None, WORST)


def test_the_page_shows_every_trial_and_escapes_what_it_is_given(tmp_path):
    sweep = sweep_of(name="a<b", space={"mgrit.coarsening": {"choice": [2, 16]}})
    results = [
        SimpleNamespace(config={"settings": {"mgrit.coarsening": 2}}, metrics={"trial_id": "x", "validation_loss": 1.23456}, error=None),
        SimpleNamespace(config={"settings": {}}, metrics={}, path="trial_y", error="no <memory>"),
    ]
    rows = rows_of(sweep, results)
    (tmp_path / "a.png").write_bytes(b"picture")
    page = _page(sweep, rows, rows[0], [("Bias & time", tmp_path / "a.png")], [({"mgrit.coarsening": 16}, "no <C>-point")])
    assert '<tr class="best"><td>x</td><td>done</td><td>2</td><td>1.235</td><td>–</td>' in page
    assert "<tr><td>y</td><td>failed</td><td></td><td>–</td>" in page
    assert "Refused without starting: 1" in page
    assert "<td>no &lt;C&gt;-point</td>" in page
    assert '<img alt="Bias &amp; time" src="data:image/png;base64,cGljdHVyZQ==">' in page
    assert page.count("a<b") == 0 < page.count("a&lt;b")


def test_a_sweeps_place_is_refused_as_a_runs_is(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    sweep = sweep_of(space={"mgrit.coarsening": {"choice": [2, 16]}})
    with pytest.raises(SettingsError, match="full holds other files: choose another with --output, or resume it with --resume"):
        _create(tmp_path / "full", sweep, None)
    with pytest.raises(SettingsError, match=r"mine\.txt/sweep cannot be written: .*mine\.txt is a file"):
        _create(tmp_path / "full" / "mine.txt" / "sweep", sweep, None)
    assert (_create(tmp_path / "new", sweep, None) / "sweep.json").is_file()


def test_a_trial_that_goes_on_reports_as_if_it_had_not_stopped():
    def done(reporter, start, stop):
        for step in range(start, stop):
            if step == 4:
                reporter.on_event(4, "switch", {"rung": "2+2"})
            reporter.on_step(metric(step, bias=0.1 if step == 2 else None))
            if step % 3 == 2:
                reporter.on_evaluation(step + 1, {"loss": 2.1 - step / 10, "perplexity": 8.0})

    objective = Objective(kind="time_to_loss", target=1.9)
    whole, again = Reporter(objective), Reporter(objective)
    done(whole, 0, 6)
    events = [{"step": 3, "kind": "checkpoint"}, {"step": 4, "kind": "switch", "rung": "2+2"}]
    evaluations = [{"step": s + 1, "split": "validation", "loss": 2.1 - s / 10, "perplexity": 8.0} for s in (2, 5)]
    again.resume([metric(step, bias=0.1 if step == 2 else None) for step in range(6)], events, evaluations)
    assert again.report() == whole.report()
    assert again.is_exhausted
    assert again.report()["seconds_to_target"] == 6 * 0.5
    assert again.report()["switches"] == 1


def test_what_is_over_the_bound_is_worse_the_more_it_is():
    reports = []
    for bias in (0.1, 0.3, 0.6):
        reporter = Reporter(Objective(kind="step_time", bias=0.2))
        reporter.on_step(metric(0, bias=bias))
        reports.append(reporter.report()["constrained_step_time"])
    assert reports[0] == 0.5
    assert 1e3 < reports[1] < reports[2] < WORST
    assert Reporter(Objective()).report(diverged=True)["validation_loss"] == WORST


def test_a_budget_in_seconds():
    reporter = Reporter(Objective(seconds=1.4))
    steps = 0
    while not reporter.is_exhausted:
        reporter.on_step(metric(steps))
        steps += 1
    assert steps == 3


def test_the_front_is_what_nothing_beats():
    rows = [{"a": a, "b": b} for a, b in ((1, 5), (2, 2), (3, 3), (4, 1), (4, 4), (5, WORST), (0, None))]
    assert [(row["a"], row["b"]) for row in pareto_front(rows, ("a", "b"))] == [(1, 5), (2, 2), (4, 1)]


def test_a_trial_is_forced_once_and_gives_its_workers_back_once():
    from rayllp.tuning.switching import SwitchingScheduler

    settings = {**SMALL, "workers": 2, "mode": "adaptive"}
    sweep = sweep_of(settings=settings, limits={"rho": 1.0}, on_serial="shrink")
    scheduler = SwitchingScheduler(None, sweep, lambda workers: workers)
    config = {"settings": {"mgrit.coarsening": 2}}
    calm = {"last_mode": "parallel", "largest_rho": 0.4, "bias": 0.1}
    assert scheduler._changed(config, calm) == (config, None)
    forced, workers = scheduler._changed(config, calm | {"largest_rho": 1.2})
    assert workers == 1
    assert forced["settings"] | {"workers": 1, "mode": "serial"} == forced["settings"]
    assert sweep.problem(forced["settings"]) is None
    assert scheduler._changed(forced, calm | {"largest_rho": 1.2, "last_mode": "serial"}) == (forced, None)
    # One that switched by itself only shrinks.
    shrunk, workers = scheduler._changed(config, calm | {"last_mode": "serial"})
    assert (workers, shrunk.get("forced_serial"), shrunk["shrunk"]) == (1, None, True)
    keeping = SwitchingScheduler(None, sweep_of(settings=settings), lambda workers: workers)
    assert keeping._changed(config, calm | {"last_mode": "serial"}) == (config, None)


def test_what_a_trial_did_before_it_took_anothers_weights_is_void(tmp_path):
    from rayllp.tuning.trial import take_over

    def checkpointed(name, steps):
        run = RunDirectory.create(tmp_path / name, rayllp.TrainConfig())
        for step in steps:
            (run.checkpoints / f"step_{step}").mkdir(parents=True)
            (run.checkpoints / f"step_{step}" / MANIFEST).write_text("{}")
        return run

    mine, other = checkpointed("mine", [4, 20, 24]), checkpointed("other", [12, 16])
    mine.write_best({"step": 20})
    given = other.checkpoints / "step_12"
    assert take_over(mine, checkpoints(mine.checkpoints), given) == [given]
    assert [step_of(kept) for kept in checkpoints(mine.checkpoints)] == [4]
    assert mine.read_best() is None
    # The other went on meanwhile, and keeps only its last ones.
    assert take_over(mine, [], other.checkpoints / "step_8") == [given]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 20 or later any more: raise checkpoint\.keep"):
        take_over(mine, [], other.checkpoints / "step_20")


# On Ray ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_ends_with_a_config_that_trains_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a relative path starts from where the sweep does\n" * 100)
    monkeypatch.chdir(tmp_path)
    data = {"data.path": {"choice": ["text.txt"]}, "data.tokenizer": {"choice": ["bytes"]}}  # what varies is loaded by the trials
    space = {"optimizer.lr": {"choice": [1e-3, 1e30]}, "mgrit.coarsening": {"choice": [2, 16]}, **data}
    sweep = sweep_of(space=space, searcher="grid", scheduler="none", concurrent=2)
    results = rayllp.tune(sweep, output=tmp_path / "out")
    assert not placement_groups()
    wait_until(lambda: not living_actors())
    assert len(results) == 2  # a coarsening factor of 16 leaves the middle no C-point
    rows = list(csv.DictReader((tmp_path / "out" / "trials.csv").open()))
    assert sorted(row["state"] for row in rows) == ["diverged", "done"]
    best = rayllp.load_config(tmp_path / "out" / "best.yaml")
    assert (best.optimizer.lr, best.mgrit.coarsening) == (1e-3, 2)
    done = next(row for row in rows if row["state"] == "done")
    assert math.isclose(float(done["validation_loss"]), read(tmp_path / "out" / "trials" / done["trial"] / "evals.jsonl")[-1]["loss"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Refused without starting: 2" in page
    with pytest.raises(ClusterError, match="a trial with 9 workers needs 9 CPU, but the cluster has 4 CPU"):
        rayllp.tune(sweep_of(settings={**SMALL, "model.layers": 40}, space={"workers": {"choice": [1, 9]}}), output=tmp_path / "large")
    with pytest.raises(SettingsError, match=r"no trial is feasible: 2 were refused, the first, \{'mgrit.coarsening': 16\}, because"):
        rayllp.tune(sweep_of(space={"mgrit.coarsening": {"choice": [16, 32]}}, searcher="grid"), output=tmp_path / "none")
    assert not (tmp_path / "large").exists()
