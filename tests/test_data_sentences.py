"""Sentence classification: what is read from tab-separated files, what batches hold, what is refused."""

import gzip
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE
from rayllp.data.sentences import load_sentences
from rayllp.data.special_tokens import SpecialTokens
from rayllp.data.tokenizer import load_tokenizer
from rayllp.data.tokenizer_kinds import Bytes
from rayllp.errors import DataError
from tests.conftest import one_pass

PAD, CLS, SEP, FIRST = 0, 1, 2, 4
TRAIN = "text\tlabel\nthe dog\tgood\ndog the\tbad\na cat\tgood\n"
HELD_OUT = "label\ttext\nbad\tcat a\ngood\tthe cat\ngood\ta\n"
PAIRS = "id\tone\ttwo\tlabel\n0\tabcdef\txy\tyes\n1\tab\tuvwxyz\tno\n2\tabcdef\tuvwxyz\tyes\n"


def load(tmp_path, train, held_out=None, length=12, **settings):
    """Write the files and load them."""
    for name, text in {"path": train, "validation_path": held_out}.items():
        if text is not None:
            (tmp_path / f"{name}.tsv").write_text(text)
            settings[name] = str(tmp_path / f"{name}.tsv")
    return load_sentences(DataSettings(**settings), length, seed=0)


def shown(rows):
    """Return rows of byte tokens as text, with special tokens as signs: < for cls, | for sep, nothing for padding."""
    return ["".join({CLS: "<", SEP: "|"}.get(token) or chr(token - FIRST) if token else "" for token in row) for row in rows.tolist()]


def test_special_tokens_come_first_unless_the_tokenizer_has_its_own(tmp_path):
    special = SpecialTokens.of(Bytes())
    assert (special.pad, special.cls, special.sep, special.mask, special.offset, special.vocabulary) == (0, 1, 2, 3, 4, 260)
    assert special.encode("a").tolist() == [101]
    assert special.decode([1, 101, 2, 0]) == "a"
    tokenizer = Tokenizer(models.WordLevel({"dog": 0, "[PAD]": 1, "cat": 2, "[MASK]": 3, "[SEP]": 4, "[CLS]": 5}, unk_token="dog"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "own.json"))
    own = SpecialTokens.of(load_tokenizer(str(tmp_path / "own.json")))
    assert (own.pad, own.cls, own.sep, own.mask, own.offset, own.vocabulary) == (1, 5, 4, 3, 0, 6)
    assert own.encode("cat dog").tolist() == [2, 0]


def test_rows_classes_and_facts(tmp_path):
    batches = load(tmp_path, TRAIN, HELD_OUT)
    assert batches.facts.classes == ("bad", "good")
    assert (batches.facts.vocabulary, batches.facts.pad) == (260, PAD)
    inputs, targets = batches.batch("validation", 0, 3)
    assert inputs[0].tolist() == [CLS, *(FIRST + byte for byte in b"cat a"), SEP, *[PAD] * 5]
    assert shown(inputs) == ["<cat a|", "<the cat|", "<a|"]
    assert targets.tolist() == [0, 1, 1]
    assert (inputs.dtype, targets.dtype, inputs.shape) == (torch.int64, torch.int64, (3, 12))
    assert batches.skipped == {}


@pytest.mark.parametrize(
    ("length", "rows"),
    [
        (15, ["<abcdef|xy|", "<ab|uvwxyz|", "<abcdef|uvwxyz|"]),
        (11, ["<abcdef|xy|", "<ab|uvwxyz|", "<abcd|uvwx|"]),
        (10, ["<abcde|xy|", "<ab|uvwxy|", "<abcd|uvw|"]),
        (5, ["<a|x|", "<a|u|", "<a|u|"]),
    ],
)
def test_pairs_lose_the_longer_sentence_first(tmp_path, length, rows):
    batches = load(tmp_path, PAIRS, PAIRS, length=length, text_field="one", pair_field="two")
    inputs, targets = batches.batch("validation", 0, 3)
    assert shown(inputs) == rows
    assert targets.tolist() == [1, 0, 1]


def test_one_sentence_is_cut(tmp_path):
    assert shown(load(tmp_path, TRAIN, HELD_OUT, length=4).batch("validation", 0, 3)[0]) == ["<ca|", "<th|", "<a|"]
    with pytest.raises(DataError, match="sequence_length 2 leaves no room for text between cls and sep: set at least 3"):
        load(tmp_path, TRAIN, HELD_OUT, length=2)
    with pytest.raises(DataError, match=r"sequence_length 4 leaves no room .* set at least 5"):
        load(tmp_path, PAIRS, PAIRS, length=4, text_field="one", pair_field="two")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_held_out_sentence_comes_once_in_a_pass(tmp_path, size):
    inputs, targets = one_pass(load(tmp_path, TRAIN, HELD_OUT), "validation", size)
    counted = targets != IGNORE
    assert shown(inputs[counted]) == ["<cat a|", "<the cat|", "<a|"]
    assert targets[counted].tolist() == [0, 1, 1]
    assert all(row == "<|" for row in shown(inputs[~counted]))
    assert len(inputs) % size == 0


def test_a_batch_depends_on_its_arguments_alone(tmp_path):
    first, second = (load(tmp_path, TRAIN, HELD_OUT) for _ in range(2))
    later = first.batch("train", 5, 16)
    for step in (0, 3, 5):
        second.batch("train", step, 7)
        second.batch("validation", step, 7)
    assert all(torch.equal(a, b) for a, b in zip(later, second.batch("train", 5, 16), strict=True))
    assert not torch.equal(later[0], first.batch("train", 6, 16)[0])
    pairs = set(zip(shown(later[0]), later[1].tolist(), strict=True))
    assert pairs == {("<the dog|", 1), ("<dog the|", 0), ("<a cat|", 1)}


def test_files_without_column_names(tmp_path):
    # Quotation marks and U+2028 are text; a byte order mark, \r\n and empty lines at the end are none.
    text = '\ufeff1\tx\t"the dog\r\n0\tx\tdog\u2028the\r\n\r\n'
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(text.encode()))
    path = str(tmp_path / "a.tsv.gz")
    batches = load_sentences(DataSettings(path=path, validation_path=path, text_field="2", label_field="0"), 16, seed=0)
    inputs, targets = batches.batch("validation", 0, 2)
    assert shown(inputs)[0] == '<"the dog|'
    assert inputs[1].tolist()[1:10] == [FIRST + byte for byte in "dog\u2028the".encode()]
    assert targets.tolist() == [1, 0]


def test_the_last_sentences_are_held_out(tmp_path):
    batches = load(tmp_path, TRAIN + "a dog\tbad\n", validation_fraction=0.5)
    assert shown(one_pass(batches, "validation", 2)[0]) == ["<a cat|", "<a dog|"]
    with pytest.raises(DataError, match=r"has 1 sample to train on and to hold out from: give more, or set data.validation_path"):
        load(tmp_path, "text\tlabel\nthe dog\tgood\n")


def test_errors_name_the_data_set_whichever_setting_names_it(tmp_path):
    datasets.Dataset.from_dict({"text": ["the dog"], "label": ["good"]}).save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match=rf"^data.dataset {re.escape(str(tmp_path / 'one'))} has 1 sample"):
        load_sentences(DataSettings(dataset=str(tmp_path / "one")), 16, seed=0)
    datasets.Dataset.from_dict({"text": ["the dog"] * 4, "label": ["good"] * 4}).save_to_disk(tmp_path / "same")
    with pytest.raises(DataError, match=rf"^data.dataset {re.escape(str(tmp_path / 'same'))}"):
        load_sentences(DataSettings(dataset=str(tmp_path / "same")), 16, seed=0)


def test_lines_beyond_max_bytes_are_not_read(tmp_path):
    batches = load(tmp_path, TRAIN, HELD_OUT, max_bytes=len(TRAIN) - 1)
    assert (len(batches.sequences["train"]), len(batches.sequences["validation"])) == (2, 3)
    (tmp_path / "damaged.tsv").write_bytes(TRAIN.encode() + b"\xff\n")
    settings = {"path": str(tmp_path / "damaged.tsv"), "max_bytes": len(TRAIN)}
    assert len(load(tmp_path, None, HELD_OUT, **settings).sequences["train"]) == 3
    with pytest.raises(DataError, match=r"damaged.tsv:5: not UTF-8"):
        load(tmp_path, None, HELD_OUT, path=settings["path"])


def test_characters_read_their_alphabet_off_the_training_text(tmp_path):
    batches = load(tmp_path, TRAIN, HELD_OUT, tokenizer="characters")
    assert batches.facts.vocabulary == len(set("\nthe dogacat")) + 4
    unseen = HELD_OUT + "bad\tzoo\n"
    with pytest.raises(DataError, match=r"validation_path.tsv:5: 'z' is in no training sentence, so data.tokenizer=characters has no"):
        load(tmp_path, TRAIN, unseen, tokenizer="characters")
    batches = load(tmp_path, TRAIN, unseen, tokenizer="characters", on_error="skip")
    assert batches.skipped == {"characters": 1}
    assert len(batches.sequences["validation"]) == len(batches.labels["validation"]) == 3


def test_a_tokenizers_file(tmp_path):
    words = Tokenizer(models.WordLevel({"?": 0, "the": 1, "dog": 2, "cat": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    batches = load(tmp_path, TRAIN, HELD_OUT, length=5, tokenizer=str(tmp_path / "words.json"))
    assert batches.batch("validation", 0, 3)[0].tolist() == [[1, 7, 4, 2, 0], [1, 5, 7, 2, 0], [1, 4, 2, 0, 0]]
    assert batches.tokenizer.decode([1, 2]) == "the dog"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("the dog", "1 columns between tabs, the first line has 2"),
        ("the\tdog\tgood", "3 columns between tabs, the first line has 2"),
        (" \tgood", "a sentence or the label is empty"),
        ("the dog\t", "a sentence or the label is empty"),
    ],
)
def test_broken_lines_are_refused_or_skipped(tmp_path, broken, message):
    text = TRAIN + broken + "\n" + "last\tbad\n"
    with pytest.raises(DataError, match=f"path.tsv:5: {message}; fix it, or leave it out by data.on_error=skip"):
        load(tmp_path, text, HELD_OUT)
    batches = load(tmp_path, text, HELD_OUT, on_error="skip")
    assert batches.skipped == {"lines": 1}
    assert len(batches.sequences["train"]) == 4


def test_labels_unseen_in_training_are_refused_or_skipped(tmp_path):
    unseen = HELD_OUT + "fair\tdog\n" + "bad\tdog\n"
    with pytest.raises(DataError, match=r"validation_path.tsv:5: label 'fair' is none of training's bad, good; fix it, or leave"):
        load(tmp_path, TRAIN, unseen)
    batches = load(tmp_path, TRAIN, unseen, on_error="skip")
    assert batches.skipped == {"labels": 1}
    assert one_pass(batches, "validation", 4)[1].tolist() == [0, 1, 1, 0]
    with pytest.raises(DataError, match=r"no validation sentence is left, \{'labels': 1\} were left out: give more"):
        load(tmp_path, TRAIN, "text\tlabel\ndog\tfair\n", on_error="skip")
    with pytest.raises(DataError, match=r"path.tsv:5: label 'good' is none of training's bad, fair"):
        load(tmp_path, "text\tlabel\na\tbad\nb\tbad\nb\tfair\nc\tgood\n")


def test_a_line_of_column_names_and_a_slip_are_no_classes(tmp_path):
    rows = "".join(f"thing {number}\t{'good' if number % 2 else 'bad'}\n" for number in range(60))
    numbers = {"text_field": "0", "label_field": "1"}
    with pytest.raises(
        DataError, match=r"path.tsv:1: label 'label' is on this line alone, .*18 lines each; if this line names the columns"
    ):
        load(tmp_path, "text\tlabel\n" + rows, **numbers)
    with pytest.raises(DataError, match=r"path.tsv:61: label 'godo' is on this line alone, .*each; fix it, or leave it out"):
        load(tmp_path, rows + "thing\tgodo\n" + rows, **numbers)
    kept = load(tmp_path, rows + "thing\tgodo\n" + rows, **numbers, on_error="skip")
    assert (kept.classes, kept.skipped) == (("bad", "good"), {"labels": 1})
    # Where every label is rare, one that stands alone is no slip.
    assert (
        len(load(tmp_path, "".join(f"thing\tl{number % 20}\n" for number in range(39)), validation_fraction=0.01, **numbers).classes) == 20
    )


def test_one_class_is_nothing_to_learn(tmp_path):
    with pytest.raises(DataError, match=r"path.tsv: every label is 'bad', so there is nothing to learn: give data with two classes"):
        load(tmp_path, "text\tlabel\na\tbad\nb\tbad\nc\tbad\n")


def test_lines_may_end_as_old_macs_end_them(tmp_path):
    assert (
        load(tmp_path, TRAIN.replace("\n", "\r"), HELD_OUT).labels["train"].tolist()
        == load(tmp_path, TRAIN, HELD_OUT).labels["train"].tolist()
    )


def test_of_many_labels_some_are_listed(tmp_path):
    train = "text\tlabel\n" + "".join(f"a\tl{i:02}\n" for i in range(20))
    with pytest.raises(DataError, match=r"none of training's l00, .*l11 and 8 more; fix"):
        load(tmp_path, train, "text\tlabel\na\tx\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_field": "sentence"}, r"data.text_field 'sentence' is not a column of .*tsv, whose first line names \['text', 'label'\]"),
        ({"label_field": "1"}, r"data.label_field '1' is not a column of .*set it to one of them, or all fields to numbers"),
        ({"pair_field": "text2"}, "data.pair_field 'text2' is not a column"),
        ({"text_field": "0"}, "data.label_field 'label': data.text_field is a number, so .*path.tsv has no column names"),
        ({"text_field": "0", "label_field": "2"}, "data.label_field 2: .*path.tsv:1 has 2 columns between tabs; give a number below"),
    ],
)
def test_columns_that_are_not_there(tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, TRAIN, HELD_OUT, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there is no data.path: sentence classification needs one, a tab-separated file"),
        ({"path": "none.tsv"}, "data.path none.tsv: no such file or folder; give a text file"),
    ],
)
def test_settings_that_name_no_file(settings, message):
    with pytest.raises(DataError, match=message):
        load_sentences(DataSettings(**settings), 8, seed=0)


def test_files_that_hold_no_sentences(tmp_path):
    with pytest.raises(DataError, match=r"data.path .*path.tsv is empty: give a file with some lines"):
        load(tmp_path, "")
    with pytest.raises(DataError, match=r"data.validation_path .*path.tsv has no row with a text and a label: give some"):
        load(tmp_path, TRAIN, "text\tlabel\n")
    with pytest.raises(DataError, match=r"has no row with a text and a label .{'lines': 1} were left out.: give some"):
        load(tmp_path, "text\tlabel\nthe dog\n", on_error="skip")
    (tmp_path / "latin.tsv").write_bytes(b"text\tlabel\ncaf\xe9\tgood\n")
    with pytest.raises(DataError, match=r"latin.tsv:2: not UTF-8 .*0xe9"):
        load_sentences(DataSettings(path=str(tmp_path / "latin.tsv")), 8, seed=0)


def test_cola():
    folder = Path(os.environ.get("RAYLLP_DATA", ""), "cola")
    if "RAYLLP_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("set RAYLLP_DATA to a folder that holds cola (train.tsv.gz and dev.tsv.gz: sentence, tab, label)")
    paths = {"path": str(folder / "train.tsv.gz"), "validation_path": str(folder / "dev.tsv.gz")}
    batches = load_sentences(DataSettings(**paths, text_field="0", label_field="1"), 64, seed=0)
    assert len(batches.sequences["train"]) == 8_551
    assert np.sum(batches.labels["train"] == 1) == 6_023
    assert batches.facts.classes == ("0", "1")
    targets = one_pass(batches, "validation", 100)[1]
    assert ((targets != IGNORE).sum(), len(targets)) == (516, 600)
