"""The controller's decisions on made-up probes, and what real probes measure."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from rayllp.channel import LocalChannel, run_workers
from rayllp.config import make_config
from rayllp.control import Controller, Probe, ProbePlan
from rayllp.control.judgement import tolerated_share
from rayllp.engine.probe import Comparison, Sums
from rayllp.errors import SettingsError
from rayllp.mgrit.windows import Windows
from tests.conftest import make_engine, tiny, train_engine
from tests.test_engine import FEW, SERIAL


def controller(mode="adaptive", iterations=(2, 1), **adaptive):
    base = {"rule": "convergence", "probe_every": 10, "ladder": ["2+1", "3+2"], "patience": 2, "max_flips": 4, "switch_at": 1.0}
    mgrit = {"iterations": {"forward": iterations[0], "backward": iterations[1]}}
    return Controller(make_config({"mode": mode, "solver": "mgrit", "mgrit": mgrit, "adaptive": {**base, **adaptive}}))


def feed(control, rhos, start=0):
    """Feed the controller the forward ρ of one probe after the other; return the rung after each."""
    rungs = []
    for n, rho in enumerate(rhos, start):
        probe = rho if isinstance(rho, Probe) else Probe(rho_forward=rho, rho_backward=0.1 * rho)
        control.observe(10 * n + 9, probe)
        rungs.append(control.rung)
    return rungs


def test_a_rise_climbs_the_ladder_to_serial():
    assert feed(controller(return_below=None), [0.1, 0.5, 0.9, 1.1, 0.9, 1.2, 0.1, 0.1, 0.1]) == [
        "2+1", "2+1", "2+1", "3+2", "3+2", "serial", "serial", "serial", "serial",
    ]  # fmt: skip


def test_what_diverges_fast_goes_straight_to_serial():
    control = controller()
    decision = control.observe(9, Probe(rho_forward=0.2, rho_backward=2.5))
    assert (decision.mode, decision.rung) == ("serial", "serial")
    assert decision.reason == "backward convergence factor 2.5 passed adaptive.threshold 1"


def test_a_plateau_below_the_threshold_changes_nothing():
    assert set(feed(controller(), [0.95] * 20)) == {"2+1"}


def test_recovery_comes_back_rung_by_rung_after_patience():
    rungs = feed(controller(), [3.0, 0.2, 0.2, 0.2, 0.5, 0.2, 0.2, 0.2])
    assert rungs == ["serial", "serial", "3+2", "3+2", "3+2", "3+2", "2+1", "2+1"]


def test_between_the_limits_nothing_swings():
    """With ρ around the threshold the rung goes up once, and down only after ρ has been well below for a while."""
    control = controller(patience=2)
    assert feed(control, [1.05, 0.98, 0.99, 0.97, 0.98, 0.99]) == ["3+2"] * 6


def test_oscillation_ends_at_the_cap_of_flips():
    control = controller(patience=1, ladder=["2+1"], max_flips=4)
    rungs = feed(control, [3.0, 0.1] * 10)
    assert rungs[:4] == ["serial", "2+1", "serial", "2+1"]
    assert set(rungs[4:]) == {"serial"}
    assert control.plan_probe(999) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_a_fault(bad):
    control = controller()
    decision = control.observe(9, Probe(rho_forward=bad))
    assert decision.rung == "serial"
    assert "not finite" in decision.reason
    assert feed(control, [bad] * 3) == ["serial"] * 3


def test_bias_is_judged_beside_the_noise():
    control = controller(rule="bias", bias_limit=0.1, bias_to_noise=0.5, consistency=0)
    harmless, harmful = Probe(rho_forward=3.0, bias=0.2, noise=0.9), Probe(rho_forward=0.1, bias=0.2, noise=0.3)
    assert feed(control, [harmless, Probe(bias=0.05, noise=0.01)]) == ["2+1", "2+1"]
    decision = control.observe(29, harmful)
    assert decision.trying == "3+2"
    assert decision.trained == "exact, trying 3+2"
    assert decision.reason == "gradient bias 0.2 passed adaptive.bias_limit 0.1, 0.667 of its noise (tolerated: 0.5)"
    assert controller(rule="both").observe(9, Probe(rho_forward=1.1, bias=0.01, noise=1.0)).trying == "3+2"


def test_steering_holds_the_bias_before_a_rung_is_raised():
    control = controller(rule="bias", consistency=1.0, steer=True, bias_target=0.05)
    weights = []
    for bias in (0.06, 0.06, 0.06, 0.04, 0.01, 0.01, 0.01, 0.01, 0.01):
        control.observe(9, Probe(bias=bias, noise=0.1))
        weights.append(control.accuracy.consistency)
    assert weights == pytest.approx([4, 5.66, 5.66, 5.66, 2.83, 1.415, 0.7075, 0.5, 0.5])  # up fast, down slowly, within limits
    assert control.accuracy.name == "2+1"
    rungs = feed(control, [Probe(bias=0.5, noise=0.1)] * 9)
    assert rungs.index("3+2") == 2  # the weight first, to its largest, then the rung
    assert rungs[-1] == "serial"
    assert control.accuracy.consistency == 0


def test_a_resumed_controller_decides_the_same():
    rhos = [0.2, 1.1, 0.1, 3.0, 0.1, 0.1, 0.2, 1.3, 0.1, 0.1, 0.1, 0.1]
    whole = feed(controller(), rhos)
    for cut in range(len(rhos)):
        first = controller()
        feed(first, rhos[:cut])
        second = controller()
        second.restore(first.state())
        assert feed(second, rhos[cut:], cut) == whole[cut:]


def test_settings_changed_before_a_resumption_have_the_last_word():
    switched = controller()
    feed(switched, [3.0])
    for mode, name in (("serial", "serial"), ("parallel", "2+1"), ("adaptive", "serial")):
        resumed = controller(mode=mode)
        resumed.restore(switched.state())
        assert resumed.accuracy.name == name
    shorter = controller(ladder=["1+1"])
    climbed = controller()
    feed(climbed, [1.1])
    shorter.restore(climbed.state())
    assert shorter.accuracy.name == "1+1"


def test_a_run_that_is_made_longer_comes_back_from_the_switch_at_its_old_end():
    ended = Controller(make_config({"steps": 250, "solver": "mgrit"}))
    assert ended.begin(200).rung == "serial"
    longer = Controller(make_config({"steps": 500, "solver": "mgrit"}))
    longer.restore(ended.state())
    decision = longer.begin(250)  # its own switch is at 400
    assert (decision.trying, decision.reason) == ("2+1", "adaptive.switch_at is ahead again")
    assert longer.plan_probe(299) is not None
    assert longer.begin(251) is None
    assert longer.begin(400).rung == "serial"
    # One that a fault has switched stays so, and so does one of an earlier version, which did not keep what the switch left.
    faulty = controller(return_below=None)
    feed(faulty, [3.0])
    old = {name: value for name, value in ended.state().items() if name not in ("left", "consistency")}
    for state in (faulty.state(), old):
        same = Controller(make_config({"steps": 500, "solver": "mgrit"}))
        same.restore(state)
        assert same.begin(250) is None
        assert same.serial


def test_a_penalty_that_was_set_anew_is_not_the_one_that_was_steered():
    steered = Controller(make_config({"solver": "mgrit"}))
    for n in range(3):
        steered.observe(n, Probe(bias=0.01))
    assert steered.accuracy.consistency == 0.15
    # Five workers for four intervals: there is no penalty by default, whose intervals they would cut.
    for changes, weight in (({}, 0.15), ({"adaptive": {"consistency": 2}}, 2), ({"adaptive": {"consistency": 0}}, 0), ({"workers": 5}, 0)):
        resumed = Controller(make_config({"solver": "mgrit"} | changes))
        resumed.restore(steered.state())
        assert resumed.accuracy.consistency == weight


def test_probes_are_planned():
    control = controller(rule="both", exact_every=2)
    assert [step for step in range(3) if control.plan_probe(step)] == [0, 1, 2]  # until one is good
    control.observe(0, Probe(rho_forward=0.1, bias=0.01))
    assert [step for step in range(40) if control.plan_probe(step)] == [0, 9, 19, 29, 39]
    assert [control.plan_probe(step).exact for step in (9, 19, 29, 39)] == [False, True, False, True]
    feed(control, [3.0])
    assert control.plan_probe(19).candidate.name == "3+2"  # the rung to come back to
    assert controller(mode="serial").plan_probe(9) is None
    assert controller(return_below=None, ladder=["2+1"]).plan_probe(9).bias is False


@pytest.mark.parametrize(("at", "reason"), [(200, "200"), (0.8, "0.8"), (None, "0.8")])
def test_a_switch_at_a_step_is_final(at, reason):
    control = controller(switch_at=at)  # of 250 steps
    assert control.begin(199) is None
    assert control.begin(200).reason == f"adaptive.switch_at {reason}"
    assert feed(control, [0.01] * 5) == ["serial"] * 5
    assert control.plan_probe(209) is None


def test_a_switch_that_has_come_by_itself_is_made_final_in_silence():
    control = controller(switch_at=200)
    feed(control, [3.0])
    assert control.plan_probe(109) is not None
    assert control.begin(200) is None
    assert control.plan_probe(209) is None


def test_only_the_adaptive_mode_has_a_last_exact_part_by_itself():
    assert controller(mode="parallel", switch_at=None).begin(249) is None
    assert controller(mode="parallel", switch_at=200).begin(200).rung == "serial"
    for nonsense in (-1, 1.5):
        with pytest.raises(SettingsError, match="switch_at"):
            make_config({"adaptive": {"switch_at": nonsense}})


def test_the_penalty_is_on_where_its_effect_is_watched():
    assert make_config({"solver": "mgrit"}).consistency == 0.3
    assert make_config({"solver": "mgrit"}).steers
    assert make_config({}).consistency == 0  # windows need none
    for values in ({"mode": "parallel"}, {"mode": "serial"}, {"adaptive": {"rule": "convergence"}}, {"adaptive": {"consistency": 0}}):
        config = make_config({"solver": "mgrit"} | values)
        assert config.consistency == 0
        assert not config.steers
    assert not make_config({"solver": "mgrit", "adaptive": {"rule": "convergence", "consistency": 1}}).steers


def test_by_the_bias_only_what_is_not_finite_goes_straight_to_serial():
    probes = [Probe(rho_forward=9.0, bias=5.0, noise=1.0), Probe(bias=math.nan)]
    assert feed(controller(rule="bias", consistency=0), probes) == ["3+2", "serial"]
    assert feed(controller(rule="both", consistency=0), [Probe(rho_forward=0.1, bias=math.nan)]) == ["serial"]


def test_parallel_mode_never_changes():
    assert set(feed(controller(mode="parallel"), [5.0, math.nan, 0.1])) == {"2+1"}


def test_default_ladders():
    assert make_config({"solver": "mgrit"}).ladder == ((2, 1, None), (3, 1, None), (3, 2, None))
    equal = {"windows": {"rolling": False}}
    assert make_config({"workers": 4, **equal}).ladder == ((1, 1, None), (2, 1, None), (2, 2, None), (3, 3, None))
    assert make_config({"workers": 2, **equal}).ladder == ((1, 1, None), (2, 1, None))  # two sweeps of two layers are exact
    assert make_config({"workers": 1, **equal}).ladder == make_config({"workers": 1}).ladder == ()
    assert make_config({"workers": 4}).ladder == ((1, 1, None),)  # a rolling window
    assert make_config({"solver": "mgrit", "mgrit": {"levels": {"forward": 1}}}).ladder == ((0, 1, None), (0, 2, None))
    rungs = controller(ladder=["1+1", "2+2 FCF", "0+2"]).rungs
    assert [rung.name for rung in rungs] == ["1+1", "2+2 FCF", "0+2", "serial"]
    assert [rung.solver_options(make_config({}))[1].relaxation[0] for rung in rungs[:3]] == ["F", "FCF", "F"]


# With times, and verified -----------------------------------------------------------------------------------------------------------


GOOD, BAD = Probe(bias=0.02, noise=0.5), Probe(bias=0.9, noise=0.5)


def open_controller(workers=8, **values):
    return Controller(make_config({"workers": workers, "model": {"layers": 20}, "steps": 1000, "adaptive": {"probe_every": 50}, **values}))


LADDER = {"windows": {"rolling": False}}
"""Windows of equal length, and rungs of more and more sweeps."""


def test_nothing_is_trained_by_a_rung_before_a_probe_has_found_it_accurate():
    control = open_controller(**LADDER)
    assert control.accuracy_at(0).serial
    assert control.plan_probe(0).candidate.name == "1+1"
    for step, rung in enumerate(("2+1", "2+2", "3+3", "serial")):
        decision = control.observe(step, BAD)
        assert rung in (decision.trying, decision.rung)
        assert decision.trained == ("exact" if rung == "serial" else f"exact, trying {rung}")
        assert control.accuracy_at(step + 1).serial
    assert control.plan_probe(4) is None  # exact: it looks again at the next regular probe
    assert control.plan_probe(49).candidate.name == "3+3"
    control = open_controller(**LADDER)
    assert "a gradient bias of 0.02 beside a noise of 0.5" in control.observe(0, GOOD).reason
    assert [control.accuracy_at(step).name for step in (1, 4, 5)] == ["serial", "serial", "1+1"]  # the first ones are timed
    assert control.observe(49, BAD).trying == "2+1"
    assert control.accuracy_at(50).serial
    assert control.plan_probe(50).candidate.name == "2+1"
    control.observe(50, GOOD)
    assert control.accuracy_at(51).name == "2+1"


# A rolling window -------------------------------------------------------------------------------------------------------------------


def rolled(bias=GOOD.bias, noise=1.0, sweeps=(5, 4)):
    """What a probe finds about a rolling window. Of 20 layers on 8 workers an exact step takes 40 + 3 evaluations of a layer."""
    return Probe(bias=bias, noise=noise, sweeps=sweeps)


def test_a_fault_makes_the_tolerance_smaller_and_the_next_step_judges_that():
    """A bias of 0.9 where 0.3 is tolerated and half of that aimed at."""
    control = open_controller()
    assert control.plan_probe(0).candidate.tolerance == 0.1
    decision = control.observe(0, rolled(0.9))
    expected = 0.1 * (0.5 * 0.3 / 0.9) ** 1.25
    assert control.plan_probe(1).candidate.tolerance == pytest.approx(expected)
    assert decision.reason.endswith(f"0.9 of its noise (tolerated: 0.3); tolerance {expected:.2g}")
    assert decision.trained == "exact, trying rolling"
    assert control.accuracy_at(1).serial
    resumed = open_controller()
    resumed.restore(json.loads(json.dumps(control.state())))
    assert resumed.observe(1, rolled(0.7)) == open_controller_at(control).observe(1, rolled(0.7))
    resumed.rewind(control.mark())
    for each in (control, resumed):
        each.observe(1, rolled(0.15))
        assert each.accuracy_at(10).tolerance == pytest.approx(expected)
        assert not each.accuracy_at(10).serial
        assert each.accuracy_at(10).name == each.rung == "rolling"
    control.observe(50, rolled(0.31))  # little above what is tolerated: the tolerance is halved at least, and judged before it is used
    assert control.accuracy_at(51).serial
    assert expected / 16 <= control.plan_probe(51).candidate.tolerance <= expected / 2


def open_controller_at(other):
    """Another controller in the same state."""
    control = open_controller()
    control.rewind(other.mark())
    return control


def test_good_probes_move_the_tolerance_towards_the_bias_that_is_aimed_at():
    """It is half of 0.3, and up to 0.8 of it since these probes do not differ; the bias grows with the tolerance to the power of 0.8."""
    control, tolerances = open_controller(), []
    for step in range(0, 400, 50):
        control.observe(step, rolled(0.6 * control.chosen.tolerance**0.8))
        tolerances.append(control.chosen.tolerance)
        assert not control.accuracy_at(step + 5).serial
    assert (0.5 * 0.3 / 0.6) ** 1.25 < tolerances[-1] < (0.8 * 0.3 / 0.6) ** 1.25
    assert control.observe(400, rolled(0.6 * control.chosen.tolerance**0.8)) is None  # no change is no decision
    wide = open_controller()
    for step in range(0, 300, 50):
        wide.observe(step, rolled(1e-6))
    assert wide.chosen.tolerance == 1.0  # the largest


def test_a_larger_tolerance_is_not_chosen_where_it_would_save_no_sweep():
    """20 layers in windows of 8 take three sweeps at least."""
    for bias, sweeps, factor in ((1e-6, (3, 3), 1.0), (1e-6, (4, 3), 2.0), (0.28, (3, 3), (0.15 / 0.28) ** 1.25)):
        control = open_controller()
        control.observe(0, rolled(bias, sweeps=sweeps))
        assert control.chosen.tolerance == pytest.approx(0.1 * factor)


def test_the_faster_the_bias_grows_the_less_of_it_is_aimed_at():
    found = []
    for before in (0.2, 0.02):
        control = open_controller()
        control.observe(0, rolled(before))
        control._choice.state.tolerance = 0.1
        control.observe(20, rolled(0.2))
        found.append(control.chosen.tolerance)
    assert found[1] < found[0]


def test_a_window_that_stays_inaccurate_or_takes_as_long_as_exact_steps_is_given_up():
    control, tolerances = open_controller(), []
    for step in range(5):
        decision = control.observe(step, rolled(0.9))
        assert control.accuracy_at(step + 1).serial
        tolerances.append(control._choice.tolerance)
    assert control.serial
    assert decision.rung == "serial"
    assert tolerances == sorted(tolerances, reverse=True)
    assert tolerances[-1] == 1e-4
    slow = open_controller()
    assert slow.observe(0, rolled(0.9, sweeps=(18, 15))).trying == "rolling"  # 36 of 43
    assert slow.observe(1, rolled(0.9, sweeps=(20, 17))).rung == "serial"  # 40 of 43
    accurate = open_controller()
    assert "20 + 19 sweeps take 0.98 of an exact step's time" in accurate.observe(0, rolled(0.15, sweeps=(20, 19))).reason
    assert accurate.serial
    towards = open_controller(windows={"tolerance": 1e-3})
    assert "the bias allows more" not in towards.observe(0, rolled(1e-3, sweeps=(20, 19))).reason
    assert not towards.serial  # a larger tolerance will take fewer
    broken = open_controller()
    assert broken.observe(0, rolled(math.nan)).trying == "rolling"
    assert broken.chosen.tolerance == pytest.approx(0.1 / 16)


def test_exact_steps_are_left_again_once_a_rolling_window_would_do():
    control = open_controller()
    control.observe(0, rolled(0.9, sweeps=(20, 19)))
    assert control.serial
    before = control.plan_probe(49).candidate.tolerance
    assert control.observe(49, rolled(0.9)) is None
    assert control.plan_probe(99).candidate.tolerance < before  # meanwhile the tolerance follows what probes find
    assert control.observe(99, rolled(0.1)) is None
    assert control.observe(149, rolled(0.1, sweeps=(20, 20))) is None  # accurate, but no faster
    for step in (199, 249):
        assert control.observe(step, rolled(0.1)) is None
    assert "3 probes say that a tolerance of" in control.observe(299, rolled(0.1)).reason
    assert control.accuracy_at(300).serial
    control.observe(300, rolled(0.1))
    assert not control.accuracy_at(301).serial


def test_one_batch_that_is_out_of_line_makes_the_tolerance_little_smaller():
    control = open_controller()
    probed(control, lambda step: 0.15, 400)
    before = control.chosen.tolerance
    control.observe(400, rolled(0.15 * 4))
    assert before / 10 < control.plan_probe(401).candidate.tolerance <= before / 2
    control.observe(401, rolled(0.04, sweeps=(20, 19)))
    assert not control.accuracy_at(402).serial  # it will be larger again


def test_a_switch_that_is_undone_does_not_count_the_steps_between_as_growth():
    control = open_controller(adaptive={"switch_at": 200})
    control.observe(0, rolled(0.01))
    control.observe(50, rolled(0.05))
    assert control.begin(200).rung == "serial"
    longer = open_controller(adaptive={"switch_at": 900})
    longer.restore(json.loads(json.dumps(control.state())))
    assert "ahead again" in longer.begin(850).reason
    longer.observe(850, rolled(0.1))
    assert longer.state()["trend"]["bias"] == pytest.approx(0.1, rel=0.5)


def test_a_run_of_one_worker_rolls_once_it_has_more():
    alone = open_controller(workers=1)
    more = open_controller()
    more.restore(alone.state())
    assert more.accuracy_at(10).serial
    assert more.plan_probe(10)
    more.observe(10, rolled())
    assert not more.accuracy_at(20).serial


def test_the_given_tolerance_is_where_a_run_begins_and_of_a_fixed_one_where_it_stays():
    assert open_controller(windows={"tolerance": 0.02}).plan_probe(0).candidate.tolerance == 0.02
    assert open_controller(windows={"tolerance": 0.5}).plan_probe(0).candidate.tolerance == 0.5
    assert open_controller(windows={"tolerance": 2.0}).plan_probe(0).candidate.tolerance == 1.0
    assert open_controller(mode="parallel", windows={"tolerance": 0.5}).accuracy_at(0).tolerance == 0.5
    fixed = open_controller(mode="parallel", windows={"tolerance": 0.02})
    assert fixed.accuracy_at(0).tolerance == 0.02
    assert fixed.observe(49, rolled(0.9)) is None
    assert fixed.plan_probe(49).candidate.doubled().tolerance == pytest.approx(0.02 / 8)
    assert open_controller(mode="parallel").accuracy_at(0).windows == Windows.alike((1, 1, 8, 8, 1, 1), 2, 1)


@pytest.mark.parametrize(
    "changes",
    [{"windows": {"rolling": False}}, {"windows": {"length": (8, 8)}}, {"adaptive": {"ladder": ["1+1"]}}, {"adaptive": {"rule": "both"}}],
)
def test_a_tolerance_of_windows_that_do_not_roll_is_refused(changes):
    windows = {**changes.get("windows", {}), "tolerance": 0.02}
    with pytest.raises(SettingsError, match=r"windows\.tolerance 0\.02 is of a rolling window, and here windows have fixed lengths"):
        open_controller(**{**changes, "windows": windows})


@pytest.mark.parametrize("changes", [LADDER, {"windows": {"length": (1, 1, 6, 8)}}, {"adaptive": {"ladder": ["1+1", "2+1"]}}])
def test_windows_do_not_roll_where_the_user_has_said_what_they_are(changes):
    control = open_controller(**changes)
    given = control.chosen.windows
    control.observe(0, BAD)
    assert (control.rung, control.chosen.windows) == ("2+1", Windows.alike(given.lengths, 2, 1))


def test_another_number_of_layers_is_judged_before_it_is_used_and_another_number_of_workers_is_not():
    control = open_controller(windows={"length": 8})
    control.observe(0, rolled(0.9))
    control.observe(1, rolled())
    tolerance = control.chosen.tolerance
    deeper = open_controller(model={"layers": 36}, windows={"length": 8})
    deeper.restore(control.state())
    assert deeper.state()["trend"]["bias"] is None
    assert deeper.chosen.tolerance == tolerance
    assert deeper.accuracy_at(10).serial
    fewer = open_controller(workers=4, windows={"length": 8})
    fewer.restore(control.state())
    assert fewer.accuracy_at(10) == control.accuracy_at(10)
    assert not fewer.accuracy_at(10).serial
    shorter = open_controller(workers=4)  # with a window of 4
    shorter.restore(control.state())
    assert shorter.accuracy_at(10).serial


def test_as_many_exact_steps_are_timed_however_many_probes_the_start_takes():
    control = open_controller()
    control.observe(0, rolled(0.9))
    control.observe(1, rolled(0.9))
    assert control.plan_probe(2)
    control.observe(2, rolled())
    assert [control.accuracy_at(step).serial for step in (3, 6, 7)] == [True, True, False]


def test_the_last_step_is_no_probe():
    control = open_controller()
    control.observe(0, GOOD)
    assert control.plan_probe(998)
    assert control.plan_probe(999) is None
    assert Controller(make_config({"workers": 8, "model": {"layers": 20}, "steps": 1})).plan_probe(0)  # but the first is


def test_a_window_that_was_too_slow_is_tried_again_after_a_pause():
    control = open_controller()
    control.observe(0, rolled())
    assert control.begin(20, {"serial": 1.0, "rolling": 1.4}).rung == "serial"
    assert "looking again" in control.begin(520, {"serial": 1.0}).reason
    assert control.state()["trend"]["bias"] is None
    assert control.accuracy_at(520).serial
    assert control.plan_probe(520)


@pytest.mark.parametrize(
    "changes", [{"adaptive": {"probe_every": 0}}, {"adaptive": {"rule": "both"}}, {"adaptive": {"rule": "convergence"}}]
)
def test_windows_roll_only_where_bias_judges_and_is_measured(changes):
    config = open_controller(**changes).config
    assert not config.rolls
    assert config.switch_step == 950
    assert open_controller().config.switch_step is None  # a rolling window is accurate to the end


def test_one_worker_stays_exact_whatever_a_checkpoint_says():
    control = open_controller()
    control.observe(0, rolled())
    alone = open_controller(workers=1)
    alone.restore(control.state())
    assert [step for step in range(200) if alone.plan_probe(step)] == []
    assert alone.serial


def test_states_of_earlier_versions_are_taken_up():
    """They have windows that were fitted or cut, a ladder of more rungs, and neither a tolerance nor the number of layers."""
    control = open_controller()
    control.observe(0, rolled())
    state = {name: value for name, value in control.state().items() if name not in ("choice", "trend", "layers")}
    flat = {"windows": {"windows": {"lengths": [8, 8], "sweeps": [[2, 1], [1, 1]]}, "refits": 1}}
    for older in ({"couplings": [0.9] * 15, "name": "1+1"}, {"name": "2+1", "rung": 1, "above": 2}, {**flat, "name": "1-2+1 fitted"}):
        resumed = open_controller()
        resumed.restore({**state, **older})
        assert resumed.accuracy_at(10).serial  # until a probe has found the window accurate
        assert resumed.observe(10, rolled(0.9)).trying == "rolling"


def test_a_checkpoint_of_a_ladder_does_not_vouch_for_a_rolling_window():
    control = open_controller(**LADDER)
    control.observe(0, BAD)
    control.observe(1, GOOD)
    assert control.accuracy_at(10).name == "2+1"
    rolling = open_controller()
    rolling.restore(control.state())
    assert rolling.rung == "rolling"
    assert rolling.accuracy_at(10).serial


def test_windows_are_probed_more_often_while_the_learning_rate_warms_up():
    control = open_controller(**LADDER)
    control.observe(0, GOOD)
    assert [step for step in range(1, 160) if control.plan_probe(step)] == [9, 19, 39, 49, 99, 149]
    blocks = controller(rule="bias", consistency=0, probe_every=50)
    blocks.observe(0, GOOD)
    assert [step for step in range(1, 160) if blocks.plan_probe(step)] == [49, 99, 149]


def probed(control, biases, until=1000):
    """Train to step `until`, where a probe finds the bias that `biases` gives for its step; return the steps that were probes."""
    steps = []
    for step in range(until):
        if control.plan_probe(step):
            steps.append(step)
            control.observe(step, Probe(bias=biases(step), noise=1.0))
    return steps


def test_a_rolling_window_is_probed_as_its_bias_demands():
    """A bias of 0.3 is tolerated. There are never more than `probe_every` steps between two probes."""
    rarely = open_controller(adaptive={"probe_every": 150})
    assert probed(rarely, lambda step: 0.1) == [0, 10, 25, 47, 80, 130, 205, 317, 467, 617, 767, 800, 950]
    assert probed(open_controller(), lambda step: 0.1, 300) == [0, 10, 25, 47, 80, 130, 180, 230, 280]
    # It changes from probe to probe, but does not grow.
    assert probed(open_controller(), lambda step: 0.15 if step % 20 else 0.1, 300) == [0, 10, 25, 47, 80, 130, 180, 230, 280]
    # Where it has grown fast before, the next tolerance is probed soon.
    control = open_controller()
    steps = probed(control, lambda step: 0.1 if step <= 80 else 2.0, 131)
    assert steps[-2:] == [80, 130]
    control.observe(131, rolled(0.1))
    assert next(step for step in range(132, 300) if control.plan_probe(step)) <= 131 + 25


def test_a_second_look_does_not_count_growth_twice():
    """A bias that has grown from 0.05 to 1 in 150 steps is about 1 in the next step, too."""
    control = open_controller()
    control.observe(0, Probe(bias=0.05, noise=0.5))
    control.observe(150, Probe(bias=1.0, noise=0.5))
    control._state.trend.take(151, Probe(bias=1.0, noise=0.5), in_use=False)
    assert 0.5 < control.state()["trend"]["bias"] < 1.1


def test_the_trend_begins_anew_where_the_window_has_not_been_in_use_for_a_while():
    """Neither growth nor intervals of before tell anything."""
    control = open_controller()
    probed(control, lambda step: 0.1, 600)
    assert control.state()["trend"]["interval"] == 50
    control.observe(600, rolled(0.9, sweeps=(20, 19)))
    assert control.serial
    for step in (649, 699, 749):
        control.observe(step, rolled(0.1))
    control.observe(750, rolled(0.2))
    assert control.state()["trend"]["interval"] == 10


def test_the_tolerance_follows_the_typical_bias():
    """Probes find 0.15, 0.21 and 0.29: the typical bias is their geometric mean, and scaled with the tolerance from then on."""
    control = open_controller()
    control.observe(0, rolled(0.15))
    assert control.chosen.tolerance == 0.1
    typical = math.sqrt(0.15 * 0.21)
    control.observe(50, rolled(0.21))  # within what two probes may differ by, so nothing has grown
    assert control.chosen.tolerance == 0.1  # a change by less than a quarter
    control.observe(100, rolled(0.29))
    typical = math.sqrt(typical * 0.29)
    aimed = 0.3 * control._state.trend.aim(control.config)
    factor = control.chosen.tolerance / 0.1
    assert factor == pytest.approx((aimed / typical) ** 1.25)
    assert control.state()["trend"]["bias"] == pytest.approx(aimed)
    assert control.state()["trend"]["noise"] == pytest.approx(1.0)


def test_the_tolerance_is_larger_where_probes_hardly_differ():
    """Probes that differ by nothing allow 0.8 of the tolerated bias, after a while; those that differ by a factor of two, half of it."""

    def share(spread):
        control = open_controller(steps=10_000, adaptive={"probe_every": 50, "late_from": 1.0})
        biases, factor = [], 1.0
        for step in range(0, 2000, 50):
            biases.append(0.1 * (control.chosen.tolerance / 0.1) ** 0.8 * factor)
            control.observe(step, rolled(biases[-1]))
            factor = spread / factor
        return math.prod(biases[-10:]) ** (1 / 10) / 0.3

    assert 0.6 < share(1.0) <= 0.8
    assert share(2.0) < 0.5


def test_the_time_of_probes_counts_as_the_window_is_compared_with_exact_steps():
    """A step of 0.97 s is faster than one of 1 s, but not with a probe of 3 s every 50 steps."""
    for probe, left in ((1.2, False), (3.0, True)):
        control = open_controller()
        assert probed(control, lambda step: 0.25, 300)[-1] == 280
        for step in (300, 315):
            decision = control.begin(step, {"serial": 1.0, "rolling": 0.97, "probes": probe})
        assert (decision is not None) == left
    assert decision.reason == "a step by rolling takes 0.97 s, with its share of probes 1.01 s, an exact one 1 s"


def test_a_window_that_was_left_for_its_probes_is_not_taken_back_without_them():
    """A step of 0.93 s and its share of probes take longer than an exact step of 1 s, which takes 1.1 s later."""
    control = open_controller()
    assert probed(control, lambda step: 0.25, 300)[-1] == 280
    for step in (300, 315):
        decision = control.begin(step, {"serial": 1.0, "rolling": 0.93, "probes": 6.0})
    assert "with its share of probes" in decision.reason
    assert control.begin(340, {"serial": 1.0, "rolling": 0.93, "probes": 6.0}) is None
    assert control.begin(340, {"serial": 1.1, "rolling": 0.93, "probes": 6.0}).reason.startswith("looking again")


def test_one_slow_probe_is_no_reason_to_leave_the_window_at_once():
    control = open_controller(steps=200)
    control.observe(0, rolled(0.25))
    assert control.begin(12, {"serial": 1.0, "rolling": 0.8, "probes": 20.0}) is None
    assert control.begin(20, {"serial": 1.0, "rolling": 0.8, "probes": 1.2}) is None
    assert control.begin(40, {"serial": 1.0, "rolling": 0.8, "probes": 1.2}) is None


def test_probes_of_windows_of_fixed_lengths_count_too():
    control = open_controller(**LADDER)
    control.observe(0, GOOD)
    for step in (20, 35):
        decision = control.begin(step, {"serial": 1.0, "1+1": 0.95, "probes": 4.0})
    assert decision.reason == "a step by 1+1 takes 0.95 s, with its share of probes 1.01 s, an exact one 1 s"


def test_without_probes_none_are_counted():
    control = open_controller(adaptive={"probe_every": 0}, **LADDER)
    assert control.begin(20, {"serial": 1.0, "1+1": 0.9}) is None
    assert control.begin(20, {"serial": 1.0, "1+1": 1.2}).reason == "a step by 1+1 takes 1.2 s, an exact one 1 s"


def test_probes_that_will_never_be_are_not_counted():
    """The last step is none, and after the switch to exact steps there is none."""
    control = open_controller(steps=100)
    control.observe(0, rolled(0.15))
    trend = control._state.trend
    trend.at, trend.interval = 49, 50
    assert trend.probes_until(100, control.config) == 1
    assert trend.probing_share(90, control.config) == 0
    switched = open_controller(adaptive={"probe_every": 50, "switch_at": 500})
    switched.observe(0, rolled(0.15))
    trend = switched._state.trend
    trend.at, trend.interval = 449, 50
    assert trend.probing_share(490, switched.config) == 0.1  # the one at 499, of ten steps
    assert trend.probing_share(450, switched.config) == 0.02


def test_a_window_that_is_too_slow_becomes_as_fast_as_its_bias_allows_before_it_is_left():
    """Of 20 layers on 8 workers, 3 + 3 sweeps are the fewest, and with 3 parameter gradients take 9 of 12 evaluations of 5 + 4 sweeps."""
    control = open_controller()
    control.observe(0, rolled(0.15))
    assert control.begin(20, {"serial": 1.0, "rolling": 1.2}).reason.endswith("the bias allows more; tolerance 0.19")
    assert control.accuracy_at(20).serial
    assert control.plan_probe(20).candidate.tolerance == pytest.approx(0.1 * (0.85 / 0.5) ** 1.25)
    assert control.observe(20, rolled(0.25, sweeps=(4, 3))).rung == "rolling"
    resumed = open_controller()
    resumed.restore(control.state())
    for each in (control, resumed):
        assert each.begin(30, {"serial": 1.0, "rolling": 0.9}) is None
        again = open_controller_at(each)
        assert each.begin(40, {"serial": 1.0, "rolling": 1.2}).rung == "serial"  # once is enough
        again.time_anew(30)  # on more workers, which are fast enough
        assert again.observe(60, rolled(0.2, sweeps=(4, 3))).reason.startswith("the bias comes near what is tolerated")
    hopeless = open_controller()
    hopeless.observe(0, rolled(0.1))
    assert hopeless.begin(20, {"serial": 1.0, "rolling": 1.4}).rung == "serial"
    coarse = open_controller()
    coarse.observe(0, rolled(0.25))
    assert coarse.begin(20, {"serial": 1.0, "rolling": 1.2}).rung == "serial"


def test_a_hurried_window_has_a_time_of_its_own_to_become_faster():
    control = open_controller()
    control.observe(0, rolled(0.15, sweeps=(4, 3)))
    assert control.begin(5, {"serial": 1.0, "rolling": 1.05}) is None
    assert control.begin(20, {"serial": 1.0, "rolling": 1.05}).trying == "rolling"
    assert control.state()["trend"]["bias"] == pytest.approx(0.85 * 0.3)  # is to be expected
    control.observe(20, rolled(0.25, sweeps=(4, 3)))
    for step in (25, 30):
        assert control.begin(step, {"serial": 1.0, "rolling": 0.99}) is None
    assert control.begin(40, {"serial": 1.0, "rolling": 0.99}).rung == "serial"
    assert "looking again" in control.begin(540, {"serial": 1.0}).reason
    assert not control.state()["trend"]["hurried"]


def test_a_window_hurries_by_a_factor_of_two_at_most_and_only_if_its_probes_leave_something_to_gain():
    times = {"serial": 1.0, "rolling": 1.05}
    fine = open_controller()
    fine.observe(0, rolled(0.01, sweeps=(4, 3)))
    assert fine.chosen.tolerance == 0.2
    for step in (5, 20):
        fine.begin(step, times)
    assert fine.chosen.tolerance == 0.4
    probing = open_controller()
    probing.observe(0, rolled(0.15, sweeps=(4, 3)))
    for step in (5, 20):
        probing.begin(step, {**times, "probes": 4.0})
    assert probing.rung == "serial"


def test_a_window_that_returns_from_exact_steps_is_careful_again():
    control = open_controller()
    control.observe(0, rolled(0.15, sweeps=(4, 3)))
    for step in (5, 20):
        control.begin(step, {"serial": 1.0, "rolling": 1.05})
    assert control.state()["trend"]["hurried"]
    assert control.observe(20, rolled(0.9, sweeps=(20, 19))).rung == "serial"
    assert not control.state()["trend"]["hurried"]


def test_a_step_down_is_probed_before_it_is_used_and_taken_back_if_it_is_too_coarse():
    control = open_controller(**LADDER)
    control.observe(0, BAD)
    control.observe(1, GOOD)
    calm = Probe(rho_forward=0.1, rho_backward=0.1, bias=0.01, noise=0.5)
    for step in (49, 99, 149):
        control.observe(step, calm)
    assert control.rung == "1+1"
    assert control.accuracy_at(150).serial
    assert control.observe(150, BAD).rung == "2+1"
    assert control.accuracy_at(151).name == "2+1"


def test_towards_the_end_less_bias_is_tolerated():
    """A small learning rate averages the noise out, and the bias stays."""
    control = open_controller(**LADDER)
    near = Probe(rho_forward=0.1, rho_backward=0.1, bias=0.3, noise=1.0)
    assert control.observe(0, near).rung == "1+1"
    assert control.observe(749, near) is None
    assert control.plan_probe(800).candidate.name == "1+1"  # besides the regular ones
    decision = control.observe(800, near)
    assert decision.reason.startswith("gradient bias 0.3 passed adaptive.bias_limit 0.1, 0.3 of its noise (tolerated: 0.25)")
    assert control.accuracy_at(801).serial
    assert control.observe(801, replace(near, bias=0.2)).rung == "2+1"
    for step in (849, 899, 949):  # calm, but the rung below was not accurate enough
        assert control.observe(step, replace(near, bias=0.01)) is None
    never = open_controller(adaptive={"probe_every": 50, "late_from": 1.0}, **LADDER)
    never.observe(0, near)
    assert never.plan_probe(800) is None
    assert never.observe(849, near) is None
    stricter = open_controller(adaptive={"bias_to_noise": 0.1})
    assert [tolerated_share(stricter.config, step) for step in (0, 999)] == [0.1, 0.1]
    assert [tolerated_share(control.config, step) for step in (799, 800)] == [0.6, 0.25]


def test_a_ladder_that_is_no_faster_than_exact_steps_is_left_and_looked_at_again():
    control = open_controller()
    control.observe(0, GOOD)
    assert control.begin(10, {"serial": 1.0}) is None
    assert control.begin(10, {"serial": 1.0, "rolling": 0.5}) is None
    for step in (5, 12, 19):  # too slow by so little may be chance
        assert control.begin(step, {"serial": 1.0, "rolling": 0.99}) is None
    decision = control.begin(20, {"serial": 1.0, "rolling": 0.99})
    assert (decision.rung, decision.reason) == ("serial", "a step by rolling takes 0.99 s, an exact one 1 s")
    assert control.plan_probe(49) is None  # a probe would cost time for nothing
    resumed = open_controller()
    resumed.restore(control.state())
    for each in (control, resumed):
        assert each.begin(519, {"serial": 1.0, "rolling": 0.99}) is None
        assert "looking again" in each.begin(520, {"serial": 1.0, "rolling": 0.99}).reason
        assert each.plan_probe(520).candidate.name == "rolling"
    control.time_anew(520)  # on another number of workers
    assert control.accuracy_at(524).serial


def test_a_ladder_that_is_much_slower_is_left_at_once_and_taken_back_if_exact_steps_are_slower_still():
    control = open_controller()
    control.observe(0, GOOD)
    assert control.begin(10, {"serial": 1.0, "rolling": 1.2}).rung == "serial"
    assert control.begin(40, {"serial": 1.25, "rolling": 1.2}) is None
    assert control.begin(24, {"serial": 1.4, "rolling": 1.2}) is None  # a few steps tell little
    assert "looking again" in control.begin(40, {"serial": 1.4, "rolling": 1.2}).reason


def test_a_ladder_of_ones_own_is_heeded_whatever_its_times():
    own = open_controller(solver="windows", adaptive={"probe_every": 50, "ladder": ["1+1"]})
    own.observe(0, GOOD)
    assert own.begin(20, {"serial": 1.0, "1+1": 3.0}) is None
    assert own.accuracy_at(1).name == "1+1"


def test_one_worker_trains_exactly():
    control = open_controller(workers=1)
    assert control.serial
    assert control.plan_probe(0) is None


@pytest.mark.parametrize(
    ("adaptive", "message"),
    [
        ({"ladder": ["2-1"]}, r'"F\+B"'),
        ({"ladder": []}, "at least one rung"),
        ({"return_below": 1.5}, "not below threshold"),
        ({"steer": True, "consistency": 0}, "steer needs adaptive.consistency > 0"),
    ],
)
def test_settings_that_cannot_work(adaptive, message):
    with pytest.raises(SettingsError, match=message):
        make_config({"adaptive": adaptive})


# What probes measure --------------------------------------------------------------------------------------------------------------


def layer_gradients(engine, accuracy, rows=slice(None)):
    engine.gradients(engine.step_batch(3, accuracy).part(rows))
    found = [torch.cat([p.grad.flatten() for p in engine.block.layers[n].parameters()]) for n in engine.block.indices]
    engine.optimizer.zero_grad()
    return found


def relative_error(found, wanted):
    """Return the root mean square over layers of the relative error of these gradients, weighted by their norms."""
    pairs = list(zip(found, wanted, strict=True))
    return math.sqrt(sum(float((f - w).norm() ** 2 / w.norm()) for f, w in pairs) / sum(float(w.norm()) for _, w in pairs))


def test_bias_cosine_and_noise_are_what_they_say():
    config = tiny(step={"middle": 1.0}, mgrit={"coarsening": 4})
    engine = make_engine(config)
    used, better = layer_gradients(engine, FEW), layer_gradients(engine, FEW.doubled())
    loss, better_loss = (float(engine.gradients(engine.step_batch(3, accuracy)).loss) for accuracy in (FEW, FEW.doubled()))
    engine.optimizer.zero_grad()
    halves = [layer_gradients(engine, FEW.doubled(), rows) for rows in (slice(0, 2), slice(2, 4))]
    noise = relative_error([2 * half for half in halves[0]], better)
    cosines = [float(torch.nn.functional.cosine_similarity(u, b, 0)) for u, b in zip(used, better, strict=True)]
    for workers in (1, 2, 3):

        def work(channel):
            config = tiny(step={"middle": 1.0}, mgrit={"coarsening": 4}, workers=channel.size)
            return make_engine(config, channel).train_step(3, FEW, ProbePlan(candidate=FEW, bias=True))

        for stats in run_workers(workers, work):
            assert stats.comparison.bias == pytest.approx(relative_error(used, better), rel=1e-9)
            assert stats.comparison.cosine == pytest.approx(sum(cosines) / len(cosines), rel=1e-9)
            assert stats.comparison.noise == pytest.approx(noise, rel=1e-9)
            assert stats.comparison.loss_gap == pytest.approx((loss - better_loss) / better_loss, rel=1e-6)
            assert [cosine for _, cosine in stats.comparison.by_layer] == pytest.approx(cosines, rel=1e-9)
            # Two coarse intervals: a second iteration makes the first exact, so there is one residual that says something.
            assert stats.comparison.bias > 0.01


def test_a_probe_against_the_exact_gradient_and_one_in_serial_training():
    config = tiny(step={"middle": 1.0}, mgrit={"coarsening": 2}, workers=2, optimizer={"clip": 0})
    engine = make_engine(tiny(step={"middle": 1.0}, mgrit={"coarsening": 2}))
    used, exact = layer_gradients(engine, FEW), layer_gradients(engine, SERIAL)
    wanted = relative_error(used, exact)

    def work(channel):
        plan = ProbePlan(candidate=FEW, bias=True, exact=True)
        parallel = make_engine(config, channel).train_step(3, FEW, plan)
        serial = make_engine(config, channel)
        found = serial.train_step(3, SERIAL, ProbePlan(candidate=FEW, bias=True))
        plain = make_engine(config, channel)
        plain.train_step(3, SERIAL)
        same = all(torch.equal(p, plain.block.parameters[name]) for name, p in serial.block.parameters.items())
        return parallel, found, same

    for parallel, serial, same in run_workers(2, work):
        assert parallel.comparison.bias == pytest.approx(wanted, rel=1e-9)
        assert serial.comparison.bias == pytest.approx(wanted, rel=1e-9)
        assert 0 < serial.findings.rho_forward < 1
        assert serial.findings.rho_forward == pytest.approx(parallel.findings.rho_forward, rel=1e-9)
        assert same  # a probe leaves the step of serial training exact


def test_rho_without_bias_costs_no_second_gradient():
    config = tiny(adaptive={"probe_every": 2}, mgrit={"coarsening": 2}, model={"layers": 20})
    stats = train_engine(make_engine(config, LocalChannel.alone()), 4)
    assert [s.comparison for s in stats] == [None] * 4
    assert [s.findings.rho_forward is not None for s in stats] == [True, True, False, True]
    assert asdict(stats[0])["comparison"] is None


def compared(*layers, losses=(1.0, 1.0)):
    """Compare gradients whose squared error, squared norms, product and squared difference of halves are these, layer by layer."""
    return Comparison.of(Sums(*torch.tensor(layers, dtype=torch.float64).T), *losses, halved=True)


def test_bias_of_gradients_that_are_zero_is_a_number():
    """Frozen layers have none."""
    frozen = (0.0, 0.0, 0.0, 0.0, 0.0)
    for sums, bias, cosine in (
        (frozen, 0.0, 1.0),
        ((4.0, 0.0, 4.0, 0.0, 0.0), math.inf, 0.0),
        ((4.0, 4.0, 0.0, 0.0, 0.0), 1.0, 0.0),
        ((1.0, 4.0, 4.0, 4.0, 0.0), 0.5, 1.0),
    ):
        found = compared(sums)
        assert (found.bias, found.cosine) == (bias, cosine)
        assert compared(frozen, sums).bias == bias
    assert compared(frozen).noise is None
    gaps = [compared(frozen, losses=losses).loss_gap for losses in ((0.0, 0.0), (1.0, 0.0), (1.5, 2.0))]
    assert gaps == [0.0, math.inf, -0.25]


def test_a_layer_counts_by_the_norm_of_its_gradient():
    """Optimizers scale each weight's step by the size of its own gradient, so a step lowers the loss by the sum of norms."""
    right, wrong = (0.01, 100.0, 100.0, 100.0, 64.0), (1.0, 1.0, 1.0, 0.5, 0.36)  # norms of 10 and 1
    found = compared(right, wrong)
    assert found.bias == pytest.approx(math.sqrt((10 * 0.01**2 + 1) / 11))
    assert found.noise == pytest.approx(math.sqrt((10 * 0.8**2 + 0.6**2) / 11))
    assert found.by_layer[1] == pytest.approx((1.0, 0.5))


def test_the_bias_is_that_of_the_middle_layers():
    """Buffers are solved exactly, and have the largest gradients of all."""
    config = tiny(solver="windows", workers=2)

    def work(channel):
        accuracy = Controller(config).chosen
        return make_engine(config, channel).train_step(0, accuracy, ProbePlan(candidate=accuracy, bias=True)).comparison

    for found in run_workers(2, work):
        assert len(found.by_layer) == config.middle_layers == 8
        assert all(bias > 0 for bias, _ in found.by_layer)
