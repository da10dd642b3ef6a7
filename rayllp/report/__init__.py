"""Reporting: the files in a run's directory, its progress on the terminal, loggers, and what the commands print."""

from rayllp.report.journal import Journal, Listener
from rayllp.report.progress import ProgressDisplay
from rayllp.report.run_directory import RunDirectory, read_lines

__all__ = ["Journal", "Listener", "ProgressDisplay", "RunDirectory", "read_lines"]
