"""Tokens in files that are made once and mapped into memory; tables of all formats; the order in which training takes its samples."""

import gzip
import json
import multiprocessing
import pickle
import socket

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllp.cluster.worker import BlockWorker
from rayllp.config import DataSettings
from rayllp.data import cache, load_data
from rayllp.data.base import IGNORE
from rayllp.data.cache import CacheEntry, CacheWriter, cache_folder
from rayllp.data.masked import load_masked
from rayllp.data.record import DataRecord
from rayllp.data.sampling import SampleOrder, count_before, interleave, permute
from rayllp.data.text import load_text
from rayllp.errors import DataError
from tests.conftest import one_pass, read_text, tiny

LINES = [f"line {number} of {number % 7} things" for number in range(200)]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLLP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n".join(LINES), encoding="utf-8")
    return DataSettings(path=str(tmp_path / "text.txt"), tokenizer="bpe:300")


def leave_for_another_host(tmp_path, monkeypatch):
    """Make this process look like one on another host, without this host's cache."""
    (tmp_path / "cache").rename(tmp_path / "cache of the first host")
    monkeypatch.setenv("RAYLLP_CACHE", str(tmp_path / "another host"))


def forbid(monkeypatch):
    """Make it an error to create another cache entry."""
    monkeypatch.setattr(CacheEntry, "_write_files", lambda self, folder: pytest.fail("made again"))


# The cache --------------------------------------------------------------------------------------------------------------------


def test_a_text_is_tokenised_once(text, tmp_path, monkeypatch):
    first = load_text(text, 16, 0)
    assert isinstance(first.tokens["train"].values, np.memmap)
    assert first.tokens["train"].values.dtype == np.uint16  # as small as the vocabulary allows
    with monkeypatch.context() as patch:
        forbid(patch)
        again = load_text(text, 8, 1)
        again_masked = load_masked(text, 16, 0)
        other_share = load_text(text.model_copy(update={"validation_fraction": 0.5}), 8, 0)
        kept = load_text(text, 16, 0, first.tokenizer)  # of a run that goes on: the tokenizer is given
    assert again.tokenizer.texts() == first.tokenizer.texts()
    for other in (again, again_masked, kept):
        assert np.array_equal(other.tokens["train"], first.tokens["train"])
    assert len(other_share.tokens["validation"]) == pytest.approx(5 * len(first.tokens["validation"]), abs=5)
    (tmp_path / "text.txt").write_text("\n".join([*LINES[:-1], "line 199 of 4 things"]), encoding="utf-8")  # as long as before
    changed = load_text(text, 16, 0, first.tokenizer)
    assert changed.tokens["train"].entry.key != first.tokens["train"].entry.key
    assert changed.tokens["train"].checksum == first.tokens["train"].checksum  # its end alone differs
    assert changed.tokens["validation"].checksum != first.tokens["validation"].checksum


def test_a_data_set_travels_without_its_tokens_and_is_made_where_it_arrives(text, tmp_path, monkeypatch):
    data = load_text(text, 16, 0)
    batch = data.batch("train", 3, 4)
    sent = pickle.dumps(data)
    assert len(sent) < 40_000 + len(pickle.dumps(data.tokenizer))
    assert str(data.tokens["train"].values.tobytes()[:50]).encode() not in sent
    with monkeypatch.context() as patch:
        forbid(patch)
        here = pickle.loads(sent)
        here.ensure_present()
        assert torch.equal(here.batch("train", 3, 4)[0], batch[0])
    with monkeypatch.context() as patch:
        patch.setenv("RAYLLP_CACHE", str(tmp_path / "another process of this host"))
        assert pickle.loads(sent).tokens["train"].entry.folder == data.tokens["train"].entry.folder
    leave_for_another_host(tmp_path, monkeypatch)
    there = pickle.loads(sent)
    there.ensure_present()
    assert there.tokens["train"].entry.folder.is_relative_to(tmp_path / "another host")
    assert torch.equal(there.batch("train", 3, 4)[0], batch[0])


def test_a_host_without_the_files_gets_small_ones_sent(text, tmp_path, monkeypatch):
    data = load_text(text, 16, 0)
    sent, with_files, batch = pickle.dumps(data), pickle.dumps(data.with_files()), data.batch("train", 3, 4)
    (tmp_path / "text.txt").rename(tmp_path / "elsewhere.txt")
    leave_for_another_host(tmp_path, monkeypatch)
    with pytest.raises(DataError, match=r"text.txt cannot be read"):
        pickle.loads(sent).ensure_present()
    with pytest.raises(DataError, match=f"on {socket.gethostname()}: .*text.txt cannot be read: .*under the same path as on the driver"):
        BlockWorker._ensure_data(None, pickle.loads(sent))
    there = pickle.loads(with_files)
    BlockWorker._ensure_data(None, there)
    assert torch.equal(there.batch("train", 3, 4)[0], batch[0])
    (tmp_path / "cache of the first host").rename(tmp_path / "cache")
    monkeypatch.setattr(cache, "CARRIED", 10)
    assert data.with_files().entries[0].carried is None


def test_a_host_with_other_files_is_refused(text, tmp_path, monkeypatch):
    sent = pickle.dumps(load_text(text, 16, 0))
    (tmp_path / "text.txt").write_text("something else " * 100, encoding="utf-8")
    leave_for_another_host(tmp_path, monkeypatch)
    with pytest.raises(DataError, match="this host has other data under that name than the driver's host"):
        pickle.loads(sent).ensure_present()


def _make_slowly(folder, barrier, made):
    def make(writer):
        made.put(1)
        writer.append("numbers", np.arange(1000))

    entry = CacheEntry("a" * 32, make, folder)
    barrier.wait(10)
    entry.ensure_present()
    assert entry.array("numbers").sum() == 499_500


def test_one_process_makes_it_while_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_make_slowly, args=(str(tmp_path), barrier, made)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert made.qsize() == 1


def test_what_fails_or_is_damaged_leaves_nothing_that_looks_whole(tmp_path):
    def fail(writer: CacheWriter):
        writer.append("numbers", np.arange(10))
        raise DataError("no")

    entry = CacheEntry("b" * 32, fail, str(tmp_path))
    with pytest.raises(DataError, match="no"):
        entry.ensure_present()
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}
    entry = CacheEntry("b" * 32, lambda writer: writer.append("numbers", np.arange(10)), str(tmp_path)).ensure_present()
    with (entry.folder / "numbers.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"numbers.bin is damaged or gone: remove .*, and it will be made again"):
        entry.array("numbers")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data.cache to a writable folder with enough room"):
        CacheEntry("c" * 32, lambda writer: None, str(tmp_path / "file")).ensure_present()


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLLP_CACHE", "/a")
    assert str(cache_folder("/b")) == "/b"
    assert str(cache_folder()) == "/a"
    monkeypatch.delenv("RAYLLP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert str(cache_folder()) == "/c/rayllp"


# Tables -----------------------------------------------------------------------------------------------------------------------


def _jsonl(path, rows):
    path.write_text("".join(json.dumps({"n": n, "text": row}) + "\n" for n, row in enumerate(rows)), encoding="utf-8")


def _jsonl_gz(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": row}) + "\n" for row in rows)


WRITERS = {
    "a.jsonl": _jsonl,
    "a.json": lambda path, rows: path.write_text(json.dumps([{"text": row} for row in rows]), encoding="utf-8"),
    "a.jsonl.gz": _jsonl_gz,
    "a.csv": lambda path, rows: datasets.Dataset.from_dict({"n": list(range(len(rows))), "text": rows}).to_csv(path),
    "a.tsv": lambda path, rows: path.write_text("n\ttext\n" + "".join(f"{n}\t{row}\n" for n, row in enumerate(rows)), encoding="utf-8"),
    "a.parquet": lambda path, rows: datasets.Dataset.from_dict({"text": rows}).to_parquet(path),
    "a.arrow": lambda path, rows: datasets.Dataset.from_dict({"text": rows}).save_to_disk(path.with_name("whole")),
    "folder": lambda path, rows: datasets.Dataset.from_dict({"text": rows}).save_to_disk(path),
    "splits": lambda path, rows: datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": rows})}).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables_of_all_formats_are_the_same_text(name, tmp_path):
    WRITERS[name](tmp_path / name, LINES)
    if name == "a.arrow":
        next((tmp_path / "whole").glob("*.arrow")).rename(tmp_path / name)
    data = load_text(DataSettings(path=str(tmp_path / name)), 16, 0)
    assert bytes(np.concatenate([data.tokens["train"], data.tokens["validation"]])).decode() == "\n".join(LINES)
    with pytest.raises(DataError, match=r"has no column 'body': set data.text_field to one of \[.*'text'"):
        load_text(DataSettings(path=str(tmp_path / name), text_field="body"), 16, 0)


def test_a_folder_of_tables_has_the_splits_that_its_files_name(tmp_path):
    for split, rows in (("train", LINES[:150]), ("validation", LINES[150:])):
        _jsonl(tmp_path / f"{split}.jsonl", rows)
    data = load_text(DataSettings(path=str(tmp_path), validation_split="validation"), 16, 0)
    assert bytes(data.tokens["train"].values).decode() == "\n".join(LINES[:150])
    assert bytes(data.tokens["validation"].values).decode() == "\n".join(LINES[150:])
    with pytest.raises(DataError, match=r"has no split dev, but train, validation: set data.validation_split"):
        load_text(DataSettings(path=str(tmp_path), validation_split="dev"), 16, 0)
    (tmp_path / "notes.txt").write_text("a folder of several kinds is one of texts")
    assert b'"text"' in bytes(load_text(DataSettings(path=str(tmp_path)), 16, 0).tokens["train"].values)


def test_held_out_rows_may_be_a_file_of_another_format(tmp_path):
    WRITERS["a.parquet"](tmp_path / "a.parquet", LINES)
    _jsonl(tmp_path / "b.jsonl", LINES[:20])
    data = load_text(DataSettings(path=str(tmp_path / "a.parquet"), validation_path=str(tmp_path / "b.jsonl")), 16, 0)
    assert bytes(data.tokens["validation"].values).decode() == "\n".join(LINES[:20])


def test_broken_and_empty_tables_are_refused(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"data.path .*broken.jsonl, split train, cannot be read"):
        load_text(DataSettings(path=str(tmp_path / "broken.jsonl")), 16, 0)
    for name, content in (
        ("a.csv", "text\none\ncafé\n"),
        ("a.tsv", "text\none\ncafé\n"),
        ("a.jsonl", '{"text": "one"}\n\n{"text": "café"}\n'),
    ):
        (tmp_path / name).write_text(content, encoding="latin-1")
        with pytest.raises(
            DataError, match=rf"{name}, split train, cannot be read: {name}:3: not UTF-8 \(.*0xe9\); save the file as UTF-8"
        ):
            load_text(DataSettings(path=str(tmp_path / name)), 16, 0)
    _jsonl(tmp_path / "null.jsonl", ["a" * 200, None, "b" * 200])
    with pytest.raises(DataError, match="row 1: column 'text' holds nothing, not text; fix it"):
        load_text(DataSettings(path=str(tmp_path / "null.jsonl")), 16, 0)
    skipped = load_text(DataSettings(path=str(tmp_path / "null.jsonl"), on_error="skip"), 16, 0)
    assert skipped.skipped == {"rows": 1}
    assert load_text(DataSettings(path=str(tmp_path / "null.jsonl"), on_error="skip"), 16, 0).skipped == {"rows": 1}  # from the cache too
    for name, content, message in (
        ("none.jsonl", "", "none.jsonl is empty: give a table with some rows"),
        ("head.csv", "text\n", "head.csv, split train, has no rows: give some"),
        ("other.parquet", "PAR1", "other.parquet cannot be read: .*; give an undamaged table"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=f"data.path .*{message}"):
            load_text(DataSettings(path=str(tmp_path / name)), 16, 0)
        with pytest.raises(DataError, match=f"data.validation_path .*{message}"):
            load_text(DataSettings(validation_path=str(tmp_path / name)), 16, 0)
    with pytest.raises(DataError, match=r"null.jsonl has no split test, but train: set data.split"):
        load_text(DataSettings(path=str(tmp_path / "null.jsonl"), split="test"), 16, 0)
    _jsonl(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(DataError, match="the train text has 1 tokens"):
        load_text(DataSettings(path=str(tmp_path / "empty.jsonl")), 16, 0)


@pytest.mark.parametrize("at", ["a{}", "folder"])
@pytest.mark.parametrize(
    ("ending", "content", "rows"),
    [
        (".tsv", 'text\tn\n"Yes, he said.\t1\nNo."\t2\n"\t3\n', ['"Yes, he said.', 'No."', '"']),
        (".csv", 'text,n\n"Yes, he said.",1\nNA,2\nnull,\nNone,4\n', ["Yes, he said.", "NA", "null", "None"]),
    ],
)
def test_quotation_marks_in_tsv_and_words_for_nothing_are_text(at, ending, content, rows, tmp_path):
    path = tmp_path / at.format(ending)
    written = path if path.suffix else path / f"train{ending}"
    written.parent.mkdir(exist_ok=True)
    written.write_text(content, encoding="utf-8")
    assert read_text(DataSettings(path=str(path))).decode() == "\n".join(rows)


@pytest.mark.parametrize("place", [1, 2])
def test_a_line_with_more_columns_than_are_named_is_refused(place, tmp_path):
    """If it is the first line after the header, pandas would take its first column for row names, and shift all others."""
    lines = ["one,1", "two,2"]
    lines.insert(place - 1, "more,than,two")
    (tmp_path / "a.csv").write_text("\n".join(["text,n", *lines]), encoding="utf-8")
    with pytest.raises(DataError, match=r"a.csv, split train, (has lines with more columns than its|cannot be read: .* line 3, saw 3)"):
        read_text(DataSettings(path=str(tmp_path / "a.csv")))


# Texts by themselves ------------------------------------------------------------------------------------------------------------


def test_packed_texts_have_positions_of_their_own_and_predict_nothing_of_the_next(tmp_path):
    rows = ["a" * 5, "b" * 30, "", "c" * 3, *("d" * (3 + n % 9) for n in range(60))]
    _jsonl(tmp_path / "a.jsonl", rows)
    data = load_text(DataSettings(path=str(tmp_path / "a.jsonl"), documents="packed", validation_fraction=0.2), 16, 0)
    stream = bytes(np.concatenate([data.tokens["train"], data.tokens["validation"]])).decode()
    assert stream == "".join(rows)
    texts = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    for split, offset in (("train", 0), ("validation", len(data.tokens["train"]))):
        for step in range(3):
            (ids, positions), targets = data.batch(split, step, 4)
            assert ids.shape == positions.shape == targets.shape == (4, 16)
            for row, start in enumerate(data.starts(split, step, 4)):
                of = texts[offset + start : offset + start + 17] if start >= 0 else texts[:17]
                expected = [int((of[: n + 1] == of[n]).sum()) - 1 for n in range(17)]
                if start >= 0:
                    assert positions[row].tolist() == expected[:16]
                    assert (targets[row] == IGNORE).tolist() == [of[n] != of[n + 1] for n in range(16)]
                else:
                    assert (targets[row] == IGNORE).all()


# The order --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
def test_a_permutation_takes_every_number_to_one_of_its_own(count, seed):
    found = permute(np.arange(count), count, seed)
    assert np.array_equal(np.sort(found), np.arange(count))
    part = np.arange(count)[::7]
    assert np.array_equal(permute(part, count, seed), found[::7])


def test_permutations_are_even_and_differ_by_seed():
    count, tries = 6, 1000
    seen = np.zeros((count, count))
    for seed in range(tries):
        seen[np.arange(count), permute(np.arange(count), count, 7919 * seed)] += 1
    chi_squared = ((seen - tries / count) ** 2 / (tries / count)).sum()
    assert chi_squared < 60  # 25 degrees of freedom: one in ten thousand
    large = permute(np.arange(10_000), 10**12, 5)
    assert large.max() > 0.99 * 10**12
    assert abs(np.corrcoef(large, np.arange(10_000))[0, 1]) < 0.05


def test_an_epoch_takes_each_sample_once_whatever_the_size_of_a_batch():
    order, count = SampleOrder(3), 50
    one = np.concatenate([order.take(step, count, 1) for step in range(150)])
    for size in (4, 7):
        many = np.concatenate([order.take(step, count, size) for step in range(-(-150 // size))])[:150]
        assert np.array_equal(many, one)
    for epoch in range(3):
        assert np.array_equal(np.sort(one[epoch * count :][:count]), np.arange(count))
    assert not np.array_equal(one[:count], one[count : 2 * count])
    assert not np.array_equal(SampleOrder(4).take(0, count, 50), one[:count])
    drawn = np.concatenate([SampleOrder(3, "replacement").take(step, count, 5) for step in range(10)])
    assert len(set(drawn.tolist())) < count


def test_an_epoch_of_a_text_predicts_each_token_once_but_those_at_its_ends(text):
    data = load_text(text, 16, 0)
    count = (len(data.tokens["train"]) - 17 + 1) // 16
    starts = np.sort(data.starts("train", 0, count))
    assert np.array_equal(np.diff(starts), np.full(count - 1, 16))
    others = np.sort(data.starts("train", 1, count))
    assert others[0] != starts[0]  # other windows in the next epoch
    assert 0 <= starts[0] < 32
    assert max(starts[-1], others[-1]) + 17 <= len(data.tokens["train"])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_several_sets_are_mixed_evenly_by_their_weights(weights):
    sets = interleave(np.arange(2000), tuple(weights))
    for number, weight in enumerate(weights):
        mine = sets == number
        assert np.array_equal(count_before(np.arange(2000), tuple(weights), number)[mine], np.arange(mine.sum()))
        assert mine.sum() == pytest.approx(2000 * weight / sum(weights), abs=len(weights) + 1)
    assert np.array_equal(interleave(np.arange(700, 800), tuple(weights)), sets[700:800])


def test_a_mixture_takes_each_sets_samples_once_an_epoch_and_its_share_of_evaluations(tmp_path):
    for name, count in (("a", 40), ("b", 80)):
        (tmp_path / f"{name}.txt").write_text(name * (8 * count + 1), encoding="utf-8")
    sets = [{"path": str(tmp_path / f"{name}.txt"), "weight": weight} for name, weight in (("a", 3), ("b", 1))]
    config = tiny(sequence_length=8, data={"sets": sets, "validation_fraction": 0.5})
    data = load_data(config)
    inputs, targets = data.batch("train", 0, 40)
    assert [bytes(row.tolist()).decode() for row in inputs].count("a" * 8) == 30
    assert torch.equal(inputs, torch.cat([data.batch("train", step, 10)[0] for step in range(4)]))
    starts = np.sort(data.sets[0].starts("train", 0, 40)[: 4 * 19 // 3])
    assert len(set(starts.tolist())) == 19  # each of its windows once
    inputs, targets = one_pass(data, "validation", 7)
    counted = (targets != IGNORE).all(1)
    kinds = "".join(chr(row[0]) for row in inputs[counted])
    assert (kinds.count("a"), kinds.count("b")) == (19, 39)
    assert kinds[:12].count("a") == 4
    record = DataRecord.of(config, data)
    assert record == DataRecord.of(config, load_data(config))
    (tmp_path / "b.txt").write_text("b" * 600 + "c" * 41, encoding="utf-8")
    changed = DataRecord.of(config, load_data(config))
    assert (changed.splits["train"] == record.splits["train"], changed.splits["validation"] == record.splits["validation"]) == (True, False)
    assert pickle.loads(pickle.dumps(data.with_files())).facts == data.facts
    with pytest.raises(DataError, match=r"data.sets, number 2: data.path .*none.txt: no such file"):
        load_data(tiny(data={"sets": [sets[0], {"path": str(tmp_path / "none.txt")}]}))
    (tmp_path / "a.conllu").write_text("".join(f"1\tw{n}\tw\tX{n % 2}" + "\t_" * 6 + "\n\n" for n in range(9)), encoding="utf-8")
    with pytest.raises(DataError, match=r"data.sets mixes texts or answers, .* the task 'words' reads neither"):
        load_data(tiny(model={"family": "mc"}, data={"sets": [{"path": str(tmp_path / "a.conllu")}]}))
