"""What a run writes to its directory and shows its user."""

from rayllp.report.journal import Journal, Listener
from rayllp.report.progress import ProgressDisplay
from rayllp.report.run_directory import RunDirectory, read_lines

__all__ = ["Journal", "Listener", "ProgressDisplay", "RunDirectory", "read_lines"]
