"""The controller, which decides how accurately the next steps are solved (arXiv:2601.09026, section 3.2.3, and beyond it).

It is pure: no clock, no cluster, no random numbers. The driver owns it, and tells it what probes have measured and how long steps have
taken. Accuracies form a ladder whose rungs go from cheap to exact; the last one is serial. After a bad probe the weight of the consistency
penalty is raised, then the rung; several good probes in a row lower the rung.

Where probes measure the gradient's bias, a rung is used only once a probe has found it accurate: at the start, after a fault and after
every change of rung, steps are exact until a probe of the current rung is good. So no step is trained on a gradient that was just found to
be wrong. With the default ladder, the controller also leaves a rung whose steps are no faster than exact ones.

With a rolling window, the ladder has one rung besides exact steps, whose tolerance changes (`tolerance_choice.py`), and the trend of its
bias decides when it is probed (`bias_trend.py`).
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rayllp.config import TrainConfig
from rayllp.control.bias_trend import BiasTrend
from rayllp.control.judgement import fault_in, found_accurate, is_hopeless
from rayllp.control.ladder import Ladder
from rayllp.control.pace import MAX_TIME_RATIO, Pace
from rayllp.control.penalty import steered
from rayllp.control.records import PROBES, Accuracy, Decision, Probe, ProbePlan
from rayllp.control.tolerance_choice import UP, ToleranceChoice, ToleranceState, bias_factor

RETRY_STEPS = 10
"""Steps from raising the penalty's weight after a fault to the next probe. The penalty needs some steps to change the layers."""
EARLY_PROBES = (10, 20, 40, 80)
"""Numbers of steps after which windows are probed in addition, unless a rolling one is in use. While the learning rate warms up, a bias can
grow from nothing to harmful in fewer steps than lie between two regular probes.
"""


@dataclass
class _State:
    """What the controller remembers from step to step, and keeps in checkpoints."""

    rung: int = 0  # index of the current rung
    calm: int = 0  # number of good probes in a row
    flips: int = 0  # changes of rung that count towards adaptive.max_flips
    weight: float = 0.0  # of the consistency penalty
    final: bool = False  # whether the run stays on this rung to the end
    left: str | None = None  # the rung in use until adaptive.switch_at
    verified: bool = True  # whether a probe has found the rung accurate since it was chosen
    probe_at: int = 0  # the step of the next probe, while the rung is not verified
    above: int | None = None  # the rung before a step down, to return to if the lower one is not accurate
    pace: Pace = field(default_factory=Pace)
    trend: BiasTrend = field(default_factory=BiasTrend)


class Controller:
    """Chooses the rung of the ladder, and the weight of the consistency penalty."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.settings = config, config.adaptive
        self._ladder, self._choice = Ladder(config), ToleranceChoice(config)
        self.rungs = self._ladder.rungs
        self._state = _State(weight=config.consistency, verified=not self._verifies)
        if config.mode == "serial" or len(self.rungs) == 1:
            self._state.rung, self._state.final = self._ladder.last, True

    @property
    def serial(self) -> bool:
        """True if the current rung is the last one, whose steps are exact."""
        return self._state.rung == self._ladder.last

    @property
    def rung(self) -> str:
        """The name of the current rung. Steps use it once it is verified."""
        return self.chosen.name

    @property
    def _verifies(self) -> bool:
        """True if a rung is used only once a probe has found it accurate."""
        return self.config.mode == "adaptive" and self.settings.rule != "convergence" and self.settings.probe_every > 0

    @property
    def _is_unverified(self) -> bool:
        """True if steps are exact because no probe has found the current rung accurate yet."""
        return not self._state.verified and not self.serial

    @property
    def accuracy(self) -> Accuracy:
        """The accuracy of the next step: exact while the current rung is unverified. Timed steps: see `accuracy_at`."""
        chosen = self.chosen
        return replace(self.rungs[-1], consistency=chosen.consistency, smoothness=chosen.smoothness) if self._is_unverified else chosen

    @property
    def chosen(self) -> Accuracy:
        """The accuracy that the current rung stands for, whether or not a probe has found it accurate."""
        # A run that has switched to serial drops the penalties. With mode=serial they stay: they prepare a network for parallel training.
        kept = not self.serial or self.config.mode == "serial"
        weights = (self._state.weight, self.settings.smoothness) if kept else (0.0, 0.0)
        return replace(self._ladder.at(self._state.rung, self._choice.tolerance), consistency=weights[0], smoothness=weights[1])

    def accuracy_at(self, step: int) -> Accuracy:
        """Return the accuracy of step `step`, if nothing is decided before it."""
        return self.rungs[-1] if self._is_being_timed(step) else self.accuracy

    def _is_being_timed(self, step: int) -> bool:
        """Return True if the step is exact in order to be timed."""
        return self.config.drops_slow_rungs and not self._state.final and self._state.pace.is_timing(step)

    # Probes -------------------------------------------------------------------------------------------------------------------

    def plan_probe(self, step: int) -> ProbePlan | None:
        """Return what step `step` is to measure, or None if it is no probe."""
        state, settings = self._state, self.settings
        every = settings.probe_every
        if not every or state.final or state.pace.pause_ends is not None or not self._is_due(step):
            return None
        if self._verifies and 0 < step == self.config.steps - 1:
            return None  # it would decide about no step
        if self.serial and not self._may_return:
            return None
        index = state.rung - 1 if self.serial else state.rung
        probes = state.trend.count if self.config.chooses_tolerance else (step + 1) // every
        exact, lipschitz = (bool(n) and probes % n == 0 for n in (settings.exact_every, settings.lipschitz_every))
        return ProbePlan(
            candidate=replace(self._ladder.at(index, self._choice.tolerance), consistency=self.accuracy.consistency),
            bias=exact or settings.rule != "convergence",
            exact=exact,
            rho=not self._is_unverified or settings.rule != "bias",
            lipschitz=lipschitz,
        )

    def _is_due(self, step: int) -> bool:
        """Return True if the step is to be a probe: every `probe_every`-th one, or of a rolling window, as its bias demands.

        So is the first, so that a run shows ρ early, and the first after a change that no probe has judged.
        """
        if self._is_unverified:
            return step >= self._state.probe_at
        if step == 0 or (self._verifies and step == self.config.late_step):
            return True
        if self.config.chooses_tolerance and not self.serial:
            return self._state.trend.is_due(step)
        is_early = self._verifies and self.config.solver == "windows" and step + 1 in EARLY_PROBES and step + 1 < self.settings.probe_every
        return is_early or (step + 1) % self.settings.probe_every == 0

    @property
    def _may_return(self) -> bool:
        """True if a run that has become serial may return to the ladder."""
        return self.config.mode == "adaptive" and self.settings.return_below is not None and self._state.flips < self.settings.max_flips

    # Decisions ----------------------------------------------------------------------------------------------------------------

    def begin(self, step: int, seconds: Mapping[str, float] | None = None) -> Decision | None:
        """Return the decision due before a step, if any: the switch that the settings ask for, or one because of the time that steps take.

        Args:
            step: the step that is about to begin.
            seconds: seconds of a step by the name of its rung, for the rungs that have been timed, and of "probes".
        """
        at = self.config.switch_step
        if at is None or step < at:
            return self._take_back_switch(step) or self._heed_times(step, seconds or {})
        if self._state.final:
            return None
        was_serial, self._state.left = self.serial, self.rung
        self._state.rung, self._state.final = self._ladder.last, True
        return None if was_serial else self._decision(step, f"adaptive.switch_at {self.config.switch_at}")

    def _take_back_switch(self, step: int) -> Decision | None:
        """Undo the switch to serial if it lies ahead again, since the run was made longer or given a later switch."""
        if self._state.left is None:
            return None
        self._state.rung, self._state.final, self._state.left = self._ladder.index(self._state.left), False, None
        self._choose_unverified(step - 1)
        self._state.trend.begin_anew()
        return None if self.serial else self._decision(step, "adaptive.switch_at is ahead again")

    def time_anew(self, step: int) -> None:
        """Measure step times again from this step on: they change with a restart, and with the number of workers."""
        self._state.pace.time_anew(step)
        self._state.trend.hurried = False

    def _heed_times(self, step: int, seconds: Mapping[str, float]) -> Decision | None:
        """Leave the ladder if the current rung with its probes is no faster than exact steps. Rungs above it are slower still.

        A rolling window that causes less bias than is tolerated first becomes as fast as it may be, if that could help.
        """
        state, pace, exact = self._state, self._state.pace, seconds.get("serial")
        if not self.config.drops_slow_rungs or state.final:
            return None
        if pace.pause_ends is not None:
            if not pace.ends_pause(step, exact, seconds.get(pace.slow)):
                return None
            state.rung, state.verified, state.probe_at = 0, False, step
            state.trend.begin_anew()
            return self._decision(step, "looking again whether layer-parallel steps are faster")
        here = seconds.get(self.rung)
        if self.serial or self._is_unverified or exact is None or here is None:
            return None
        every = self.settings.probe_every
        share = state.trend.probing_share(step, self.config) if self.config.chooses_tolerance else 1 / every if every else 0.0
        probing = share * max(seconds.get(PROBES, here) - here, 0.0)
        if not pace.is_too_slow(step, here, probing, exact):
            return None
        hurry = self._hurry(step, here, probing, exact)
        if hurry is not None:
            return hurry
        pace.pause(step, self.rung, probing, self.settings.probe_every)
        state.rung = self._ladder.last
        with_probes = f", with its share of probes {here + probing:.3g} s" if probing else ""
        return self._decision(step, f"a step by {pace.slow} takes {here:.3g} s{with_probes}, an exact one {exact:.3g} s")

    def _hurry(self, step: int, here: float, probing: float, exact: float) -> Decision | None:
        """Make a rolling window's tolerance as large as may be, once, if its steps could then be faster than exact ones.

        Args:
            here, exact: seconds of a step as they are now, and of an exact one.
            probing: what probes add to each step, in seconds.
        """
        trend, choice = self._state.trend, self._choice
        if not self.config.chooses_tolerance or trend.hurried or trend.sweeps is None:
            return None
        if here * choice.least_time(trend.sweeps) + probing > MAX_TIME_RATIO * exact:
            return None
        trend.hurried = True
        move = choice.hasten(trend.share(step, self.config), trend.aim(self.config))
        if move is None:
            return None
        trend.expect(bias_factor(move))
        self._choose_unverified(step - 1)
        self._state.pace.doubted_from = None
        return self._decision(step, move.reason)

    def observe(self, step: int, probe: Probe) -> Decision | None:
        """Take in what a probe has found. Returns a decision if the rung changes, or is used from now on."""
        if self.config.mode != "adaptive" or self._state.final:
            return None
        fault = fault_in(probe, self.config, step)
        if self.config.chooses_tolerance:
            return self._observe_rolling(step, probe, fault)
        if fault is not None:
            self._state.calm = 0
            return None if self.serial else self._mend(step, probe, fault)
        if not self.serial:
            self._steer(probe)
            if self._is_unverified:
                return self._accept(step, probe)
        return self._descend(step, probe)

    def _accept(self, step: int, probe: Probe) -> Decision:
        """Use the current rung from now on."""
        self._state.verified, self._state.above = True, None
        return self._decision(step, found_accurate(probe))

    def _mend(self, step: int, probe: Probe, fault: str) -> Decision | None:
        """Take the first remedy for a fault that applies."""
        if self._state.above is not None:  # the last step down went too far
            self._state.rung, self._state.verified, self._state.above = self._state.above, True, None
            return self._decision(step, fault)
        if not is_hopeless(probe, self.config) and self._steer(probe):
            return self._distrust(step, fault)
        return self._raise(step, probe, fault)

    def _distrust(self, step: int, fault: str) -> Decision | None:
        """Use exact steps until a probe finds the same rung accurate, under the larger penalty."""
        was_in_use = not self._is_unverified
        self._state.verified, self._state.probe_at = not self._verifies, step + RETRY_STEPS
        return self._decision(step, f"{fault}; the penalty's weight is raised") if was_in_use and self._verifies else None

    # A rolling window ---------------------------------------------------------------------------------------------------------------

    def _observe_rolling(self, step: int, probe: Probe, fault: str | None) -> Decision | None:
        """Take in what a probe has found about a rolling window."""
        state, trend, choice, config = self._state, self._state.trend, self._choice, self.config
        trend.count += 1
        if self.serial:
            if not choice.replaces_exact_steps(step, probe, fault, trend.aim(config)):
                return None
            state.rung, state.flips = 0, state.flips + 1
            trend.begin_anew()
            self._choose_unverified(step)
            return self._decision(step, f"{self.settings.patience} probes say that a tolerance of {choice.tolerance:.2g} would do")
        in_use = not self._is_unverified
        typical = trend.take(step, probe, in_use=in_use)
        if fault is not None:
            move = choice.mend(step, typical, fault, trend.aim(config))
            if move is None:
                return self._raise(step, probe, fault)
            trend.forget()
            self._choose_unverified(step)
            return self._decision(step, move.reason)
        choice.accept()
        move, overrun = choice.adapt(step, typical, trend.aim(config)), choice.overrun(probe)
        if overrun is not None and (move is None or move.factor < 1):
            return self._raise(step, probe, overrun)
        if move is not None:
            trend.expect(bias_factor(move))
        # An interval is not made longer while the tolerance has a long way to go.
        trend.plan(config, in_use=in_use and (move is None or move.factor < UP))
        if not in_use:
            return self._accept(step, probe)
        return None if move is None else self._decision(step, move.reason)

    # The ladder ------------------------------------------------------------------------------------------------------------------

    def _raise(self, step: int, probe: Probe, fault: str) -> Decision:
        """Move to the next rung, or to the last one if the probe is hopeless."""
        last = self._ladder.last
        self._state.rung = last if is_hopeless(probe, self.config) else self._state.rung + 1
        self._choose_unverified(step)
        if self.serial:
            self._state.trend.hurried = False
            self._choice.accept()
            self._state.flips += 1
            self._state.final = not self._may_return
        return self._decision(step, fault)

    def _choose_unverified(self, step: int) -> None:
        """Have the next step probe the rung that was just chosen."""
        state = self._state
        state.verified, state.probe_at, state.above = not self._verifies, step + 1, None
        state.pace.make_up_for_probe(step)

    def _is_calm(self, probe: Probe) -> bool:
        """Return True if the probe is well below every limit. The gap between that and a fault keeps the rung from swinging."""
        below = self.settings.return_below
        rhos = [rho for rho in (probe.rho_forward, probe.rho_backward) if rho is not None]
        if below is None or not rhos or any(not rho < below for rho in rhos):
            return False
        return self.settings.rule == "convergence" or probe.bias is None or probe.bias < 0.5 * self.settings.bias_limit

    def _is_late(self, step: int) -> bool:
        """Return True if no rung is gone down any more."""
        return self._verifies and step >= self.config.late_step

    def _descend(self, step: int, probe: Probe) -> Decision | None:
        """Move one rung down, or return from serial training, after `patience` good probes in a row."""
        state = self._state
        if state.rung == 0 or (not self.serial and (self._is_late(step) or state.flips >= self.settings.max_flips)):
            return None
        state.calm = state.calm + 1 if self._is_calm(probe) else 0
        if state.calm < self.settings.patience:
            return None
        before = None if self.serial else state.rung
        state.calm, state.rung, state.flips = 0, state.rung - 1, state.flips + 1
        self._choose_unverified(step)
        state.above = before if self._verifies else None
        return self._decision(step, f"{self.settings.patience} probes below adaptive.return_below {self.settings.return_below:g}")

    def _decision(self, step: int, reason: str) -> Decision:
        """Return the decision to use the current rung, or to do exact steps while it is unverified."""
        if self._is_unverified:
            return Decision(step, "serial", reason, "serial", self.rung)
        return Decision(step, self.rungs[self._state.rung].mode, reason, self.rung)

    def _steer(self, probe: Probe) -> bool:
        """Adapt the penalty's weight to a probe. Returns True if the weight was raised."""
        before = self._state.weight
        self._state.weight = steered(before, probe, self.config)
        return self._state.weight > 1.01 * before

    def mark(self) -> tuple[_State, ToleranceState]:
        """Return a copy of the controller's state, for `rewind`."""
        return deepcopy((self._state, self._choice.state))

    def rewind(self, mark: tuple[_State, ToleranceState]) -> None:
        """Restore the state of `mark`, because the steps after it are done again."""
        self._state, self._choice.state = deepcopy(mark)

    @property
    def _lengths(self) -> tuple[int, ...]:
        """Lengths of fixed windows; of a rolling one its length and the number of layers; none for MGRIT."""
        windows, config = self.chosen.windows, self.config
        if config.rolls:
            return config.longest_window, len(config.solved_layers)
        return () if windows is None else windows.lengths

    # Checkpoints ----------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the controller."""
        more = {"name": self.rung, "lengths": self._lengths, "consistency": self.config.consistency, "rungs": len(self.rungs)}
        return {**asdict(self._state), "choice": asdict(self._choice.state), **more}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state. Settings that were changed since then take precedence."""
        if self.config.mode != "adaptive":
            return
        kept = {field.name: state[field.name] for field in fields(_State) if field.name in state}  # earlier versions had fewer fields
        pace, trend = Pace(**kept.get("pace", {})), BiasTrend(**kept.get("trend", {}))
        self._state = _State(**{**kept, "rung": self._ladder.index(state["name"]), "pace": pace, "trend": trend})
        if "choice" in state:
            self._choice.restore(state["choice"])
        if self.config.chooses_tolerance:
            self._state.above = None  # of a ladder of more rungs
        if len(self.rungs) == 1:
            self._state.final = True
        if state.get("rungs") == 1 < len(self.rungs):  # of one worker, which trains exactly
            self._state.rung, self._state.final = 0, False
        if self.config.solver == "windows" and (state["name"], tuple(state.get("lengths", ()))) != (self.rung, self._lengths):
            self._state.verified = not self._verifies  # layers or workers are others now, or windows were chosen in another way
            self._state.trend.begin_anew()
        initial = self.config.consistency
        if not self.config.steers or state.get("consistency", initial) != initial:
            self._state.weight = initial
