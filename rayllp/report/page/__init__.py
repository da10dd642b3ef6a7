"""`rayllp report`: run directories as one self-contained HTML page, and as PNGs."""

from rayllp.report.page.compare import Comparison, Gap, compare
from rayllp.report.page.records import RunRecord, read_run, read_runs
from rayllp.report.page.write import write_report

__all__ = ["Comparison", "Gap", "RunRecord", "compare", "read_run", "read_runs", "write_report"]
