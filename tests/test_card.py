"""The model card of an export."""

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from rayllp.cli import app
from tests.conftest import tiny
from tests.synthetic import metric
from tests.test_export import trained


@pytest.mark.parametrize("middle", [1.0, "1/N"])
def test_an_export_has_a_card(tmp_path, middle):
    text = tmp_path / "secret place" / "shakespeare.txt"
    text.parent.mkdir()
    text.write_text("To be, or not to be, that is the question. " * 90)
    config = tiny(
        name="tiny", dtype="float32", step={"middle": middle}, data={"path": str(text)}, mgrit={"coarsening": 2},
        optimizer={"ema": 0.9, "schedule": "wsd"},
    )  # fmt: skip
    run, _ = trained(config, tmp_path / "run", steps=2)
    run.metric(metric(0))
    run.metric(metric(1, mode="serial", loss=3.25))
    run.metric(metric(2))  # after the checkpoint
    run.evaluation(1, "validation", 9.0)
    run.evaluation(2, "validation", 2.5, perplexity=12.25)
    run.evaluation(3, "validation", 1.0)
    done = CliRunner().invoke(app, ["export", str(run.path), "--to", str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == "transformers"
    assert "layer-parallel" in card.data.tags
    source = f"transformers import {'GPT2LMHeadModel' if middle == 1 else 'AutoModelForCausalLM'}"
    for line in (
        "# tiny", f"from {source}", "A `GPT2LMHeadModel` of 2 + 8 + 2 layers", "`shakespeare.txt`; tokenizer `bytes`, sequences of 16.",
        "- 2 steps (1 layer-parallel, 1 exact) of 4 samples, seed 0, in float32", "| loss | 2.5000 |", "| perplexity | 12.2500 |",
        "- adamw, learning rate 0.001, schedule wsd, weight decay 0.1", "moving average (decay 0.9)",
        "training loss of the last step 3.2500",
        "mgrit.coarsening: 2", "data.path: shakespeare.txt",
    ):  # fmt: skip
        assert line in card.content, (line, card.content)
    assert str(tmp_path) not in card.content  # a path of one's own machine
    loaded = {}
    code = card.content.partition("```python\n")[2].partition("```")[0]
    exec(code.replace('"model"', repr(str(tmp_path / "model"))), loaded)
    count = sum(p.numel() for p in loaded["model"].parameters())
    assert f"{count / 1e6:.1f} M parameters" in card.content
