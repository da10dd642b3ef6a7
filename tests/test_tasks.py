"""Whole runs of other tasks on a real Ray cluster: metrics, the best checkpoint, translation, fine-tuning, the step of a mode switch."""

import json

import pytest
from transformers import AutoModelForMaskedLM

import rayllp
from rayllp.checkpoint import checkpoints
from rayllp.checkpoint.export import export
from rayllp.config import make_config
from rayllp.errors import SettingsError
from rayllp.models.scaled import load_scaled
from tests.conftest import merge

pytestmark = pytest.mark.usefixtures("kept_workers")

BASE = {
    "model": {"layers": 8, "width": 16, "heads": 2},
    "buffers": {"open": 0, "close": 0},
    "solver": "mgrit",
    "mgrit": {"coarsening": 2},
    "workers": 2,
    "mode": "parallel",
    "batch_size": 8,
    "sequence_length": 16,
    "steps": 12,
    "optimizer": {"lr": 0.01, "warmup": 2},
    "eval": {"every": 4, "batches": 2},
    "adaptive": {"probe_every": 0},
    "spare_workers": False,
}


def config_of(**changes):
    return make_config(merge(BASE, changes))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def treebank(tmp_path):
    def sentence(words):
        rows = [f"{n}\t{word}\t{word}\t{tag}\t_\t_\t0\tx\t_\t_" for n, (word, tag) in enumerate(words, 1)]
        return "\n".join(rows) + "\n\n"

    words = {"DET": ("the", "a"), "NOUN": ("dog", "cat", "hat"), "VERB": ("sat", "ate")}
    text = "".join(
        sentence([(words[tag][(i + k) % len(words[tag])], tag) for k, tag in enumerate(("DET", "NOUN", "VERB", "DET", "NOUN"))])
        for i in range(40)
    )
    (tmp_path / "train.conllu").write_text(text)
    (tmp_path / "dev.conllu").write_text(text[: len(text) // 4].rsplit("\n\n", 1)[0] + "\n\n1\tbroken line\n\n")
    return {"path": str(tmp_path / "train.conllu"), "validation_path": str(tmp_path / "dev.conllu"), "on_error": "skip"}


def test_words_are_learned_the_best_checkpoint_stays_and_a_switch_comes_at_its_step(treebank, tmp_path):
    config = config_of(
        model={"family": "mc"}, data=treebank, steps=40, adaptive={"switch_at": 30}, checkpoint={"every": 13, "keep": 1},
        optimizer={"lr": 0.03},
    )  # fmt: skip
    result = rayllp.train(config, output=tmp_path / "run")
    assert result.metrics["word_accuracy"] == 1
    run = tmp_path / "run"
    evaluations = read(run / "evals.jsonl")
    assert [e["step"] for e in evaluations] == [*range(4, 40, 4), 40]
    assert evaluations[-1]["word_accuracy"] > evaluations[0]["word_accuracy"] or evaluations[0]["word_accuracy"] == 1
    best = json.loads((run / "best.json").read_text())
    assert best["loss"] == min(e["loss"] for e in evaluations[:-1])  # the last one is over the whole held-out set
    assert f"step_{best['step']}" in [path.name for path in checkpoints(run / "checkpoints")]
    assert len(checkpoints(run / "checkpoints")) <= 2
    assert [m["mode"] for m in read(run / "metrics.jsonl")] == ["parallel"] * 30 + ["serial"] * 10
    (switch,) = [e for e in read(run / "events.jsonl") if e["kind"] == "switch"]
    assert (switch["step"], switch["reason"]) == (30, "adaptive.switch_at 30")


def test_a_family_of_the_users_own_trains_on_ray_and_is_exported(tmp_path):
    (tmp_path / "text.txt").write_text("the dog sat on the mat\n" * 200)
    config = config_of(
        model={"family": "tests.test_models:QWEN2"}, data={"path": str(tmp_path / "text.txt")}, steps=3, eval={"sample": 0}
    )  # fmt: skip
    run = rayllp.train(config, output=tmp_path / "run").directory
    folder = export(run, tmp_path / "model", family="tests.test_models:QWEN2")  # named anew: a run's own settings import no code
    assert type(load_scaled(folder)).__name__ == "Qwen2ForCausalLM"
    with pytest.raises(SettingsError, match=r"'tests.test_models:QWEN3'.* that can be imported"):
        rayllp.train(config_of(model={"family": "tests.test_models:QWEN3"}))


def test_a_translation_run_ends_with_bleu(tmp_path):
    numbers = ["eins", "zwei", "drei", "vier"], ["one", "two", "three", "four"]
    for language, words in zip(("de", "en"), numbers, strict=True):
        lines = [" ".join(words[(i * k + k) % 4] for k in (1, 2, 3, 5, 7)) for i in range(16)]
        (tmp_path / f"train.{language}").write_text("\n".join(lines * 4) + "\n")
        (tmp_path / f"val.{language}").write_text("\n".join(lines) + "\n")
    config = config_of(
        model={"family": "mt", "layers": 4, "width": 32}, data={"path": str(tmp_path), "tokenizer": "bpe:300"}, sequence_length=12,
        steps=200, batch_size=16, mode="serial", microbatches=2, step={"middle": 1.0}, optimizer={"lr": 0.003},
        eval={"every": 0, "final_translate": 12, "beams": 2},
    )  # fmt: skip
    result = rayllp.train(config, output=tmp_path / "run")
    assert set(result.metrics) == {"perplexity", "bleu"}
    lines = (tmp_path / "run" / "translations.txt").read_text().splitlines()
    assert len(lines) == 12
    assert {word for line in lines for word in line.split()} <= set(numbers[1])
    assert result.metrics["bleu"] > 50


def test_pretraining_is_exported_and_fine_tuned(tmp_path):
    good, bad = "the dog sat on the mat", "mat the on sat dog the"
    (tmp_path / "text.txt").write_text(f"{good}\n" * 200)
    (tmp_path / "train.tsv").write_text(f"{good}\t1\n{bad}\t0\n" * 20)
    pretraining = config_of(model={"family": "bert"}, data={"path": str(tmp_path / "text.txt"), "tokenizer": "bpe:270"}, steps=4)
    run = rayllp.train(pretraining, output=tmp_path / "run").directory
    folder = export(run, tmp_path / "model")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForMaskedLM.from_pretrained(folder)
    assert load_scaled(folder).config.num_hidden_layers == 8
    tuning = {
        "model": {"family": "bert", "head": "sentences", "from_pretrained": str(folder)},
        "data": {
            "path": str(tmp_path / "train.tsv"), "text_field": "0", "label_field": "1", "tokenizer": str(run / "tokenizer.json"),
        },
        "sequence_length": 16, "steps": 80, "workers": 2, "optimizer": {"lr": 0.01, "warmup": 2},
        "eval": {"every": 0},
    }  # fmt: skip
    config = make_config(tuning)
    assert (config.model.layers, config.model.width, config.middle_step, config.buffers.open) == (8, 16, 1 / 8, 0)
    result = rayllp.train(config, output=tmp_path / "tuned")
    assert result.metrics["matthews"] > 0.9
    with pytest.raises(SettingsError, match=r"is a roberta-prelayernorm, and model.family vit is a vit"):
        rayllp.train(make_config(merge(tuning, {"model": {"head": "auto", "family": "vit"}, "data": {"path": None}})))
    (folder / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    with pytest.raises(SettingsError, match=r"is a roberta, and model.family bert is a roberta-prelayernorm"):
        rayllp.train(make_config(merge(tuning, {"model": {"layers": 8, "width": 16, "heads": 2}})))
