"""The controller: a pure state machine that is fed with what probes found and says how accurate the next steps are to be."""

from rayllp.control.controller import Controller
from rayllp.control.records import Accuracy, Decision, Probe, ProbePlan

__all__ = ["Accuracy", "Controller", "Decision", "Probe", "ProbePlan"]
