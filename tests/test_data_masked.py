"""Masked-language modelling, and the text that it shares with gpt2: windows, limits, streams."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE
from rayllp.data.masked import load_masked
from rayllp.data.text import load_text
from rayllp.errors import DataError
from tests.conftest import read_text

SHAKESPEARE = Path(os.environ.get("RAYLLP_DATA", "")) / "tinyshakespeare"
needs_shakespeare = pytest.mark.skipif(not os.environ.get("RAYLLP_DATA"), reason="RAYLLP_DATA names no folder with tinyshakespeare/")


@pytest.fixture
def masked():
    return load_masked(DataSettings(max_bytes=200_000), 66, 0)


def test_targets_are_the_original_tokens_and_the_rest_is_ignored(masked):
    inputs, targets = masked.batch("train", 0, 8)
    assert inputs.shape == targets.shape == (8, 66)
    assert inputs.dtype == targets.dtype == torch.int64
    assert (inputs[:, 0] == masked.special.cls).all()
    assert (inputs[:, -1] == masked.special.sep).all()
    assert (targets[:, [0, -1]] == IGNORE).all()
    original = torch.where(targets == IGNORE, inputs, targets)[:, 1:-1]
    assert (original >= masked.special.offset).all()
    text = bytes(masked.tokens["train"].values)
    assert all(bytes(row.tolist()) in text for row in original - masked.special.offset)


def test_the_tokens_to_be_guessed_are_hidden_by_berts_rule(masked):
    inputs, targets = masked.batch("train", 0, 1000)
    chosen = targets != IGNORE
    assert (chosen.sum(1) == round(0.2 * 64)).all()
    shares = chosen[:, 1:-1].float().mean(0)
    assert shares.min() > 0.14
    assert shares.max() < 0.26
    hidden, original = inputs[chosen], targets[chosen]
    is_mask, stays = hidden == masked.special.mask, hidden == original
    assert is_mask.float().mean().item() == pytest.approx(0.8, abs=0.015)
    assert stays.float().mean().item() == pytest.approx(0.1, abs=0.015)
    others = hidden[~is_mask & ~stays]
    assert others.min() >= masked.special.offset
    assert others.max() < masked.special.vocabulary
    assert len(others.unique()) > 200


def test_one_token_at_least_is_to_be_guessed():
    masked = load_masked(DataSettings(max_bytes=10_000, mask_fraction=0.01), 3, 0)
    _, targets = masked.batch("train", 0, 50)
    assert ((targets != IGNORE).sum(1) == 1).all()


def test_a_batch_depends_on_seed_split_and_step_alone(masked):
    again, other = (load_masked(DataSettings(max_bytes=200_000), 66, seed) for seed in (0, 1))
    again.batch("train", 3, 8)
    again.batch("validation", 0, 8)
    first, same = masked.batch("train", 7, 16), again.batch("train", 7, 16)
    assert torch.equal(first[0], same[0])
    assert torch.equal(first[1], same[1])
    assert not torch.equal(first[0], masked.batch("train", 8, 16)[0])
    assert not torch.equal(first[0], other.batch("train", 7, 16)[0])


def test_a_validation_sequence_depends_on_its_index_alone(masked):
    inputs, targets = masked.batch("validation", 0, 12)
    for size in (1, 4):
        parts = [masked.batch("validation", step, size) for step in range(12 // size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), inputs)
        assert torch.equal(torch.cat([part[1] for part in parts]), targets)


def test_facts_hold_the_special_tokens(masked):
    assert (masked.facts.vocabulary, masked.facts.pad) == (260, 0)
    assert (masked.special.pad, masked.special.cls, masked.special.sep, masked.special.mask) == (0, 1, 2, 3)


def test_no_room_and_too_little_text_are_refused_in_words(tmp_path):
    (tmp_path / "short.txt").write_text("x" * 100)
    settings = DataSettings(path=str(tmp_path / "short.txt"))
    with pytest.raises(DataError, match="sequence_length 2 leaves no room for text between cls and sep: set at least 3"):
        load_masked(settings, 2, 0)
    with pytest.raises(DataError, match=r"validation text has 10 tokens, fewer than one sequence of 13 takes \(11\)"):
        load_masked(settings, 13, 0)
    assert load_masked(settings, 12, 0).batch("validation", 0, 1)[0].shape == (1, 12)


# The text -----------------------------------------------------------------------------------------------------------------------


def test_text_is_cut_at_max_bytes_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("aé" * 100)
    (tmp_path / "b.txt").write_text("b" * 100)
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("cü" * 100)
    (tmp_path / ".hidden").write_text("h")

    def read(name, limit):
        return read_text(DataSettings(path=str(tmp_path / name), max_bytes=limit)).decode()

    assert read("a.txt", 6) == "aéaé"
    assert read("a.txt", 5) == "aéa"
    assert read("a.txt", 4) == "aéa"
    assert read("a.txt", 300) == read("a.txt", 1000) == "aé" * 100
    assert read("c.txt.gz", 5) == "cüc"
    assert read("", 303) == "aé" * 100 + "\nbb"
    assert read("", None) == "aé" * 100 + "\n" + "b" * 100 + "\n" + "cü" * 100
    assert len(read_text(DataSettings(max_bytes=777))) == 777


def test_held_out_text_can_be_a_file_of_its_own(tmp_path):
    (tmp_path / "train.txt").write_text("abcd" * 30)
    (tmp_path / "held.txt").write_text("dcba" * 30)
    settings = DataSettings(path=str(tmp_path / "train.txt"), validation_path=str(tmp_path / "held.txt"), tokenizer="characters")
    text = load_text(settings, 16, 0)
    assert text.tokenizer.decode(text.tokens["train"].values.tolist()) == "abcd" * 30
    assert text.tokenizer.decode(text.tokens["validation"].values.tolist()) == "dcba" * 30
    (tmp_path / "held.txt").write_text("abcde" * 30)
    with pytest.raises(DataError, match=r"held.txt: 'e' is not in the text that the alphabet was made from.*use bytes or bpe:SIZE"):
        load_text(settings, 16, 0)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Write a folder that the datasets library reads and streams: 50 rows of 10 bytes."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"row {i:06d}", "number": i}) + "\n" for i in range(50)))
    return DataSettings(dataset=str(folder))


def change(settings, **changes):
    return settings.model_copy(update=changes)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_read_up_to_max_bytes(rows, streaming):
    settings = change(rows, streaming=streaming)
    assert read_text(change(settings, max_bytes=21)) == b"row 000000\nrow 000001"[:21]
    assert read_text(change(settings, max_bytes=10_000)).split(b"\n") == [f"row {i:06d}".encode() for i in range(50)]
    with pytest.raises(DataError, match=r"split train, has no column 'body': set data.text_field to one of \['text', 'number'\]"):
        read_text(change(settings, max_bytes=100, text_field="body"))
    with pytest.raises(DataError, match=r"row 0: column 'number' holds int, not text: set data.text_field to a column of strings"):
        read_text(change(settings, max_bytes=100, text_field="number"))


def test_a_stream_stops_where_the_limit_is_reached(rows):
    with (Path(rows.dataset) / "train.jsonl").open("a") as file:
        file.write('{"text": 3, "number": "broken"}\n')
    assert len(read_text(change(rows, streaming=True, max_bytes=100))) == 100


def test_streams_without_end_and_missing_sets_are_refused_in_words(rows, tmp_path):
    with pytest.raises(DataError, match=r"data.streaming=true has no end: set data.max_bytes"):
        read_text(change(rows, streaming=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty cannot be loaded: .*or a folder written by save_to_disk"):
        read_text(DataSettings(dataset=str(tmp_path / "empty")))


def test_a_folder_of_one_split_counts_as_train_and_one_without_train_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(str(tmp_path / "one"))
    assert read_text(DataSettings(dataset=str(tmp_path / "one"))) == b"one\ntwo"
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match="two has no split train"):
        read_text(DataSettings(dataset=str(tmp_path / "two")))


@needs_shakespeare
def test_shakespeare_masked():
    masked = load_masked(DataSettings(path=str(SHAKESPEARE), tokenizer="characters"), 128, 0)
    assert masked.tokenizer.vocabulary == 65
    assert masked.facts.vocabulary == 69
    assert sum(map(len, masked.tokens.values())) == 1_115_394
    inputs, targets = masked.batch("train", 0, 32)
    assert ((targets != IGNORE).sum(1) == 25).all()
    text = gzip.decompress((SHAKESPEARE / "input.txt.gz").read_bytes()).decode()
    original = torch.where(targets == IGNORE, inputs, targets)[:, 1:-1]
    assert all(masked.special.decode(row.tolist()) in text for row in original)
