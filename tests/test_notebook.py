"""The notebooks in examples/ run from top to bottom, in kernels of their own, and show what they promise."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
import transformers

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

PATH = Path(__file__).parents[1] / "examples" / "train_and_watch.ipynb"


def run_notebook(path, ray_cluster, monkeypatch, *, changes):
    """Run a notebook and return its code cells. It joins the suite's cluster, to save the time of starting one; by itself it starts one.

    Args:
        changes: texts in its cells, each with its replacement.
    """
    address = ray_cluster.get_runtime_context().gcs_address
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in the suite: the cluster claims more CPUs than there are
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parents[1]), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "clear its outputs before a commit"
    for old, new in changes.items():
        (cell,) = (cell for cell in cells if old in cell.source)
        cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    return cells, "".join(output.get("text", "") for cell in cells for output in cell.outputs if output.output_type == "stream")


def test_the_notebook_trains_and_plots(ray_cluster, monkeypatch):
    changes = {"STEPS = 60": "STEPS = 12", '"batches": 4': '"batches": 1'}
    cells, printed = run_notebook(PATH, ray_cluster, monkeypatch, changes=changes)
    assert "step   0: loss" in printed
    assert "after 24 steps" in printed
    shown = [kind for cell in cells for output in cell.outputs if output.output_type == "display_data" for kind in output.data]
    assert "image/png" in shown


def test_a_checkpoint_and_answers_become_a_checkpoint(ray_cluster, monkeypatch, tmp_path):
    samples = [{"prompt": f"two times {n % 9} is", "answer": f" {2 * (n % 9)}."} for n in range(60)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([sample["prompt"] + sample["answer"] for sample in samples], vocab_size=300, special_tokens=["<end>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<end>")
    fast.save_pretrained(tmp_path / "checkpoint")
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Qwen3Config(**sizes, intermediate_size=48, vocab_size=len(fast), eos_token_id=fast.eos_token_id)
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    changes = {
        '"checkpoint"': repr(str(tmp_path / "checkpoint")), '"answers.jsonl"': repr(str(tmp_path / "answers.jsonl")),
        '"finetuned"': repr(str(tmp_path / "finetuned")), "STEPS, WORKERS = 30, 2": "STEPS, WORKERS = 60, 2", '"lr": 1e-4': '"lr": 1e-2',
        '"workers": WORKERS,': '"workers": WORKERS, "spare_workers": False,',
        "rayllp.train(config)": f"rayllp.train(config, output={str(tmp_path / 'run')!r})",
        '"sequence_length": 128': '"sequence_length": 24',
    }  # fmt: skip
    _, printed = run_notebook(PATH.with_name("finetune_answers.ipynb"), ray_cluster, monkeypatch, changes=changes)
    assert "model.safetensors" in printed
    assert "tokenizer.json" in printed
    # What it has learnt in a few steps: that an answer is an even number with a stop behind it.
    assert printed.rstrip().splitlines()[-1].split()[-1] in {sample["answer"].strip() for sample in samples}
