"""The controller: a pure state machine that takes what probes have found, and decides how accurately the next steps are solved."""

from rayllp.control.controller import Controller
from rayllp.control.records import Accuracy, Decision, Probe, ProbePlan

__all__ = ["Accuracy", "Controller", "Decision", "Probe", "ProbePlan"]
