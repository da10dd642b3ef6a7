"""Word classification: what is read from CoNLL-U, what batches hold, what is refused."""

import gzip
import os
from pathlib import Path

import pytest
import torch

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE
from rayllp.data.words import load_words
from rayllp.errors import DataError
from tests.conftest import one_pass

TRAIN = [
    [("the", "DET"), ("dog", "NOUN"), ("saw", "VERB"), ("the", "DET"), ("dog", "NOUN")],
    [("the", "DET"), ("cat", "NOUN"), ("sleeps", "VERB")],
    [("stop", "VERB")],
]
HELD_OUT = [[("the", "DET"), ("bird", "NOUN")], [("stop", "VERB")], [("cat", "NOUN"), ("saw", "VERB"), ("the", "DET")]]


def line(id, word, upos, xpos="X", feats="_"):
    return "\t".join((str(id), word, word, upos, xpos, feats, "0", "root", "_", "_"))


def conllu(sentences):
    blocks = ["\n".join(["# text", *(line(i, *word) for i, word in enumerate(sentence, 1))]) for sentence in sentences]
    return "\n\n".join(blocks) + "\n\n"


def load(tmp_path, train, held_out=None, length=4, **settings):
    """Write the files and load them."""
    files = {"path": train, "validation_path": held_out}
    for name, text in files.items():
        if text is not None:
            (tmp_path / f"{name}.conllu").write_text(text)
            settings[name] = str(tmp_path / f"{name}.conllu")
    return load_words(DataSettings(**settings), length, seed=0)


def test_vocabulary_classes_and_rows(tmp_path):
    batches = load(tmp_path, conllu(TRAIN), conllu(HELD_OUT))
    assert batches.index == {"the": 2, "dog": 3, "cat": 4, "saw": 5, "sleeps": 6, "stop": 7}
    assert batches.facts.classes == ("DET", "NOUN", "VERB")
    assert (batches.facts.vocabulary, batches.facts.pad) == (8, 0)
    inputs, targets = batches.batch("validation", 0, 3)
    assert inputs.tolist() == [[2, 1, 0, 0], [7, 0, 0, 0], [4, 5, 2, 0]]
    assert targets.tolist() == [[0, 1, IGNORE, IGNORE], [2, IGNORE, IGNORE, IGNORE], [1, 2, 0, IGNORE]]
    assert inputs.dtype == targets.dtype == torch.int64
    assert batches.skipped == {}


def test_rare_words_share_an_id(tmp_path):
    batches = load(tmp_path, conllu(TRAIN), conllu(HELD_OUT), min_count=2)
    assert batches.index == {"the": 2, "dog": 3}
    assert batches.batch("validation", 0, 1)[0].tolist() == [[2, 1, 0, 0]]
    with pytest.raises(DataError, match=r"no word occurs data.min_count=9 times, the most frequent 3 times: lower it"):
        load(tmp_path, conllu(TRAIN), conllu(HELD_OUT), min_count=9)


@pytest.mark.parametrize("length", [2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_held_out_word_comes_once_in_a_pass(tmp_path, length, size):
    long = [[(f"w{i}", ("A", "B")[i % 2]) for i in range(7)], *HELD_OUT]
    batches = load(tmp_path, conllu([*TRAIN, *long]), conllu(long), length=length)
    inputs, targets = one_pass(batches, "validation", size)
    number = {name: i for i, name in enumerate(batches.facts.classes)}
    expected = [(batches.index[word], number[label]) for sentence in long for word, label in sentence]
    counted = targets != IGNORE
    assert list(zip(inputs[counted].tolist(), targets[counted].tolist(), strict=True)) == expected
    assert (inputs[:, 0] != 0).all()


def test_places_beyond_the_end_are_filled(tmp_path):
    batches = load(tmp_path, conllu(TRAIN), conllu(HELD_OUT))
    assert -(-batches.count("validation") // 2) == 2
    inputs, targets = batches.batch("validation", 1, 2)
    assert inputs.tolist() == [[4, 5, 2, 0], [1, 0, 0, 0]]
    assert targets[1].tolist() == [IGNORE] * 4
    beyond = batches.batch("validation", 7, 2)
    assert (beyond[1] == IGNORE).all()
    assert beyond[0].shape == (2, 4)


def test_a_batch_depends_on_its_arguments_alone(tmp_path):
    first, second = (load(tmp_path, conllu(TRAIN), conllu(HELD_OUT)) for _ in range(2))
    later = first.batch("train", 5, 16)
    for step in (0, 3, 5):
        second.batch("train", step, 7)
        second.batch("validation", step, 7)
    assert all(torch.equal(a, b) for a, b in zip(later, second.batch("train", 5, 16), strict=True))
    assert not torch.equal(later[0], first.batch("train", 6, 16)[0])


def test_training_draws_reach_every_piece(tmp_path):
    batches = load(tmp_path, conllu(TRAIN), conllu(HELD_OUT))
    drawn = {tuple(row) for step in range(20) for row in batches.batch("train", step, 4)[0].tolist()}
    assert drawn == {(2, 3, 5, 2), (3, 0, 0, 0), (2, 4, 6, 0), (7, 0, 0, 0)}


def test_gz_ranges_empty_nodes_and_other_columns(tmp_path):
    # Multiword tokens and empty nodes have no label of their own; U+2028 ends no line.
    lines = [line("1-2", "dont", "_"), line(1, "do", "AUX", "VB", "Mood=Ind"), line(2, "n't", "PART", "RB"), line("2.1", "gone", "_")]
    text = "\ufeff# text = a\u2028b\r\n" + "\r\n".join(lines) + "\r\n\r\n" + conllu(TRAIN)
    (tmp_path / "a.conllu.gz").write_bytes(gzip.compress(text.encode()))
    for field, classes in (("label", ("AUX", "DET", "NOUN", "PART", "VERB")), ("xpos", ("RB", "VB", "X")), ("feats", ("Mood=Ind", "_"))):
        settings = DataSettings(path=str(tmp_path / "a.conllu.gz"), validation_path=str(tmp_path / "a.conllu.gz"), label_field=field)
        batches = load_words(settings, 8, seed=0)
        assert batches.facts.classes == classes
        assert (one_pass(batches, "validation", 2)[1] != IGNORE).sum() == 11
        assert "dont" not in batches.index
        assert "gone" not in batches.index


def test_the_last_sentences_are_held_out(tmp_path):
    batches = load(tmp_path, conllu([*TRAIN, *HELD_OUT]), validation_fraction=0.34)
    assert one_pass(batches, "validation", 2)[0].tolist() == [[8, 0, 0, 0], [5, 6, 2, 0]]
    assert "bird" in batches.index
    assert len(load(tmp_path, conllu(TRAIN), validation_fraction=0.01).words["validation"]) == 1
    with pytest.raises(DataError, match=r"has 1 sample to train on and to hold out from: give more, or set data.validation_path"):
        load(tmp_path, conllu(TRAIN[:1]))


def test_lines_beyond_max_bytes_are_not_read(tmp_path):
    text = conllu(TRAIN)
    batches = load(tmp_path, text, conllu(TRAIN[1:2]), max_bytes=text.index("# text", 1) + 8)
    assert len(batches.words["train"].values) == 5
    with pytest.raises(DataError, match=r"the first line is longer than data.max_bytes=3; raise it"):
        load(tmp_path, text, max_bytes=3)


BROKEN = [
    ("1\tdog\tNOUN", "CoNLL-U has 10 columns between tabs, this line 3"),
    (line("one", "dog", "NOUN"), "id 'one' is none of CoNLL-U's"),
    (line(0, "dog", "NOUN"), "id '0' is none of CoNLL-U's"),
    (line(2, "dog", "NOUN"), "id 2 where 1 should follow"),
    (line(1, "", "NOUN"), "the word .column 2. is empty"),
    (line(1, "dog", "_"), "upos .column 4. is '_', no label"),
    (line(1, "dog", ""), "upos .column 4. is '', no label"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN)
def test_broken_lines_are_refused_or_skipped(tmp_path, broken, message):
    text = conllu(TRAIN) + broken + "\n" + line(2, "ran", "VERB") + "\n\n" + conllu(HELD_OUT)
    number = conllu(TRAIN).count("\n") + 1
    with pytest.raises(DataError, match=rf"path.conllu:{number}: {message}.*fix it, or leave it out by data.on_error=skip"):
        load(tmp_path, text, conllu(HELD_OUT))
    batches = load(tmp_path, text, conllu(HELD_OUT), on_error="skip")
    assert batches.skipped == {"sentences": 1}
    assert "ran" not in batches.index
    assert "bird" in batches.index


def test_labels_unseen_in_training_are_refused_or_ignored(tmp_path):
    held_out = conllu([*HELD_OUT, [("oh", "INTJ"), ("stop", "VERB")]])
    with pytest.raises(DataError, match=r"validation_path.conllu:14: label 'INTJ' is in no training sentence; fix it, or leave it out"):
        load(tmp_path, conllu(TRAIN), held_out)
    batches = load(tmp_path, conllu(TRAIN), held_out, on_error="skip")
    inputs, targets = batches.batch("validation", 3, 1)
    assert (inputs.tolist(), targets.tolist()) == ([[1, 7, 0, 0]], [[IGNORE, 2, IGNORE, IGNORE]])
    assert batches.skipped == {"labels": 1}


def test_a_label_of_the_part_held_out_alone_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"path.conllu:17: label 'INTJ' is in no training sentence"):
        load(tmp_path, conllu([*TRAIN, [("oh", "INTJ")]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there is no data.path: word classification needs one, a treebank in CoNLL-U .*universaldependencies.org"),
        ({"path": "none.conllu"}, "data.path none.conllu: no such file or folder; give a text file"),
        ({"path": "~nobody-of-this-name/x"}, "data.path ~nobody-of-this-name/x: Could not determine home directory"),
        ({"path": "x" * 300}, "data.path x{300}: File name too long; give the path of a file"),
        ({"path": "."}, "data.path . is a folder: give one text file in it"),
        ({"path": __file__, "label_field": "lemma"}, "data.label_field 'lemma' is not a label of words: set it to one of upos, xpos"),
    ],
)
def test_settings_that_name_no_treebank(settings, message):
    with pytest.raises(DataError, match=message):
        load_words(DataSettings(**settings), 8, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.conllu", b"", "a.conllu is empty: give a file with some lines"),
        ("a.conllu", b"\n\n", "a.conllu is empty"),
        ("a.conllu", b"# text = none\n\n", "a.conllu has no sentence with words: give a treebank in CoNLL-U"),
        ("a.conllu", "# é\n# text = caf".encode() + b"\xe9\n", r"a.conllu:2: not UTF-8 .*0xe9.*save the file as UTF-8"),
        ("a.conllu.gz", b"1\tdog", "a.conllu.gz cannot be read: Not a gzipped file"),
        ("a.conllu.gz", gzip.compress(b"1\tdog" * 99, mtime=0)[:-9], "a.conllu.gz cannot be read: .*whole .gz"),
        ("a.conllu.gz", gzip.compress(b"1\tdog", mtime=0)[:10] + b"\xff" * 20, "a.conllu.gz cannot be read: "),
    ],
)
def test_files_that_are_no_treebank(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_words(DataSettings(path=str(tmp_path / name)), 8, seed=0)


def test_nothing_left_after_skipping(tmp_path):
    with pytest.raises(DataError, match=r"has no sentence with words .1 were left out as broken."):
        load(tmp_path, "1\tdog\n", on_error="skip")


def test_the_gum_treebank():
    folder = Path(os.environ.get("RAYLLP_DATA", ""), "ud_english_gum")
    if "RAYLLP_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("set RAYLLP_DATA to a folder that holds ud_english_gum (UD_English-GUM, .conllu.gz)")
    train, held_out = (str(folder / f"en_gum-ud-{split}.slim.conllu.gz") for split in ("train", "dev"))
    batches = load_words(DataSettings(path=train, validation_path=held_out, label_field="upos"), 64, seed=0)
    assert len(batches.words["train"].values) == 177_410
    assert len(batches.facts.classes) == 17
    assert (one_pass(batches, "validation", 64)[1] != IGNORE).sum() == 28_119
    whole = load_words(DataSettings(path=train, validation_path=held_out, label_field="xpos"), 1000, seed=0)
    assert (len(whole.words["train"]), len(whole.words["validation"]), len(whole.facts.classes)) == (10_224, 1_575, 46)
