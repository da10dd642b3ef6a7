"""Resumed runs go on with their own tokenizer, and on the data that they began with."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from rayllp.checkpoint import MANIFEST
from rayllp.checkpoint.run_metadata import DATA_JSON, TOKENIZER_JSON, write_data_json, write_tokenizer_json
from rayllp.config import load_run_config
from rayllp.data.base import checksum
from rayllp.data.load import load_data
from rayllp.data.record import DataRecord
from rayllp.errors import DataError
from rayllp.report import Journal, RunDirectory, read_lines
from rayllp.training.driver import Driver
from rayllp.training.interrupt import Stopping
from rayllp.training.prepare import open_run, prepare
from tests.conftest import merge, tiny
from tests.test_evaluation_parts import Here

TEXT = "".join(f"line {number} of {number % 7} things\n" for number in range(150))
GROWN = TEXT + "".join(f"there are {number} zebras more\n" for number in range(150))


def begin(folder, tokenizer="bpe:300", **changes):
    """Create a run directory with a checkpoint, as a driver leaves it."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    data = {"path": str(folder / "text.txt"), "tokenizer": tokenizer}
    config = tiny(**merge({"data": data, "checkpoint": {"path": str(folder / "kept")}}, changes))
    prepared = prepare(config, folder / "run")
    run = RunDirectory.create(folder / "run", config)
    write_tokenizer_json(run.path, prepared.inputs.data_set)
    write_data_json(run.path, prepared.inputs.record)
    (folder / "kept" / "step_1").mkdir(parents=True)
    kept = {"format": 2, "step": 1, "files": {}, "config": config.model_dump(mode="json"), "data": prepared.inputs.record.as_dict()}
    (folder / "kept" / "step_1" / MANIFEST).write_text(json.dumps(kept), encoding="utf-8")
    return config, prepared.inputs.data_set


def with_data(config, **changes):
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


@pytest.mark.parametrize("tokenizer", ["bpe:300", "characters", "bytes"])
def test_other_data_under_the_same_name_are_refused_or_told(tmp_path, tokenizer):
    config, data = begin(tmp_path, tokenizer)
    again = prepare(None, resume=tmp_path / "run").inputs
    assert again.changed == ()
    assert again.record == DataRecord.of(config, data)
    (tmp_path / "text.txt").write_text(GROWN if tokenizer != "characters" else TEXT + TEXT, encoding="utf-8")
    with pytest.raises(DataError, match=r"not those that the run began with \(train and validation\).*data.on_change=accept"):
        prepare(None, resume=tmp_path / "run")
    prepared = prepare(with_data(config, on_change="accept"), resume=tmp_path / "run")
    with open_run(prepared, None, None):
        accepted = prepared.inputs
    assert accepted.changed == ("train", "validation")
    # The same text has the same ids: nothing was trained anew.
    assert np.array_equal(accepted.data_set.tokenizer.encode(TEXT), data.tokenizer.encode(TEXT))
    assert load_run_config(tmp_path / "run").data.on_change == "accept"


def test_a_checkpoint_alone_knows_the_data_too(tmp_path):
    config, data = begin(tmp_path)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "text.txt").write_text(GROWN, encoding="utf-8")
    with pytest.raises(DataError, match="not those that the run began with"):
        prepare(config)
    inputs = prepare(with_data(config, on_change="accept")).inputs
    assert inputs.data_set.tokenizer.texts() == data.tokenizer.texts()
    assert load_data(config).tokenizer.texts() != data.tokenizer.texts()


def test_other_data_that_the_settings_name_are_told(tmp_path):
    config, _ = begin(tmp_path)
    (tmp_path / "other.txt").write_text(GROWN, encoding="utf-8")
    other = with_data(config, path=str(tmp_path / "other.txt"))
    assert prepare(other, resume=tmp_path / "run").inputs.changed == ("train", "validation")
    (tmp_path / "copy.txt").write_text(TEXT, encoding="utf-8")
    assert prepare(with_data(config, path=str(tmp_path / "copy.txt")), resume=tmp_path / "run").inputs.changed == ()


def test_another_tokenizer_of_as_many_tokens_is_refused(tmp_path):
    config, _ = begin(tmp_path)
    (tmp_path / "other.txt").write_text(GROWN, encoding="utf-8")
    grown = load_data(with_data(config, path=str(tmp_path / "other.txt"))).tokenizer
    grown.save(tmp_path / "grown.json")
    for name in (str(tmp_path / "grown.json"), "bytes"):
        for accept in ("refuse", "accept"):
            with pytest.raises(DataError, match=r"trained with other numbers for its tokens.*model.from_pretrained"):
                prepare(with_data(config, tokenizer=name, on_change=accept), resume=tmp_path / "run")
    assert load_run_config(tmp_path / "run") == config  # what was refused is not written


def test_a_tokenizers_file_that_is_gone_is_the_runs_own(tmp_path):
    begin(tmp_path)
    shutil.copy(tmp_path / "run" / TOKENIZER_JSON, tmp_path / "t.json")
    (tmp_path / "second").mkdir()
    _, data = begin(tmp_path / "second", str(tmp_path / "t.json"))
    (tmp_path / "t.json").unlink()
    assert prepare(None, resume=tmp_path / "second" / "run").inputs.data_set.tokenizer.texts() == data.tokenizer.texts()


def test_a_run_from_before_there_were_records_goes_on(tmp_path):
    _, data = begin(tmp_path)
    (tmp_path / "run" / DATA_JSON).unlink()
    manifest = tmp_path / "kept" / "step_1" / MANIFEST
    kept = json.loads(manifest.read_text(encoding="utf-8"))
    del kept["data"]
    manifest.write_text(json.dumps(kept), encoding="utf-8")
    (tmp_path / "text.txt").write_text(GROWN, encoding="utf-8")
    inputs = prepare(None, resume=tmp_path / "run").inputs
    assert inputs.changed == ()
    assert inputs.data_set.tokenizer.texts() == data.tokenizer.texts()


def test_labels_and_words_that_would_have_other_numbers_are_refused(tmp_path):
    rows = "".join(f"thing {number}\t{'good' if number % 3 else 'bad'}\n" for number in range(40))
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + rows, encoding="utf-8")
    sentences = {"model": {"family": "bert", "head": "sentences"}, "data": {"path": str(tmp_path / "rows.tsv")}}
    before = DataRecord.of(tiny(**sentences), load_data(tiny(**sentences)))
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + rows.replace("good", "awful"), encoding="utf-8")
    config = tiny(**merge(sentences, {"data": {"on_change": "accept"}}))
    with pytest.raises(DataError, match="other numbers for its tokens, words or classes"):
        before.changes(config, DataRecord.of(config, load_data(config)))


def test_checksums_tell_what_differs():
    values = [
        np.arange(3), np.arange(3.0), np.arange(3)[None], [np.arange(3)], 1, "1", [["a"], []], [[], ["a"]], ["ab"],
    ]  # fmt: skip
    assert len({checksum(value) for value in values}) == len(values)
    assert checksum(np.arange(6)[::2]) == checksum(np.array([0, 2, 4]))


def test_a_change_is_told_and_the_best_evaluation_forgotten(tmp_path):
    config, _ = begin(tmp_path)
    run = RunDirectory(tmp_path / "run", config)
    for changed, best in ((("train",), {"step": 1, "loss": 2.0, "batches": 2}), (("train", "validation"), None)):
        run.write_best({"step": 1, "loss": 2.0, "batches": 2})
        inputs = replace(prepare(None, resume=run.path).inputs, changed=changed)
        with Journal.open(run, config.steps, 1, Console(quiet=True)) as journal:
            driver = Driver(config, run, Here(config), inputs, journal, Stopping(None))
            driver._say_changes(1)
        assert run.read_best() == driver.checkpointer.best == best
    told = [(event["kind"], event["changed"]) for event in read_lines(run.path / "events.jsonl")]
    assert told == [("data", ["train"]), ("data", ["train", "validation"])]
