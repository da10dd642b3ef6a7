"""The notebook in examples/ runs from top to bottom, in a kernel of its own, and says what it promises."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

PATH = Path(__file__).parents[1] / "examples" / "train_and_watch.ipynb"


def test_the_notebook_trains_and_plots(ray_cluster, monkeypatch):
    """It joins the suite's cluster, whose start it would else pay for; by itself it starts one."""
    address = ray_cluster.get_runtime_context().gcs_address
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in the suite: the cluster claims more CPUs than there are
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PATH.parents[1]), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(PATH, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "clear its outputs before a commit"
    settings = next(cell for cell in cells if "STEPS = 60" in cell.source)
    settings.source = settings.source.replace("STEPS = 60", "STEPS = 12").replace('"batches": 4', '"batches": 1')
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(PATH.parent)}}).execute()
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs if output.output_type == "stream")
    assert "step   0: loss" in printed
    assert "after 24 steps" in printed
    shown = [kind for cell in cells for output in cell.outputs if output.output_type == "display_data" for kind in output.data]
    assert "image/png" in shown
