"""The controller: a pure state machine that is fed with ρ and says how accurate the next steps are to be."""

from rayllp.control.controller import Accuracy, Controller, Decision

__all__ = ["Accuracy", "Controller", "Decision"]
