"""Translation pairs and the tokenizers made for them: what comes out, what is left out, what is refused."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE
from rayllp.data.pairs import load_pairs
from rayllp.data.tokenizer import load_tokenizer
from rayllp.errors import DataError

DATA = Path(os.environ.get("RAYLLP_DATA", ""))
needs_data = pytest.mark.skipif(not os.environ.get("RAYLLP_DATA"), reason="RAYLLP_DATA names no folder with multi30k/ and tokenizers/")


def write_split(folder, stem, sources, targets, ending=""):
    for language, lines in (("de", sources), ("en", targets)):
        content = "".join(f"{line}\n" for line in lines).encode()
        (folder / f"{stem}.{language}{ending}").write_bytes(gzip.compress(content) if ending else content)


def write_pairs(folder, train=30, validation=7, name="val", ending="", **changes):
    write_split(folder, "train", [f"zug {i}" for i in range(train)], [f"the train {i}" for i in range(train)], ending)
    write_split(folder, name, [f"wahl {i}" for i in range(validation)], [f"choice {i}" for i in range(validation)], ending)
    return DataSettings(path=str(folder), **changes)


PAD, BOS, EOS, FIRST = 0, 1, 2, 4


def ids(text):
    return [FIRST + byte for byte in text.encode()]


def test_a_batch_is_source_shifted_target_and_target(tmp_path):
    pairs = load_pairs(write_pairs(tmp_path), 16, 0)
    facts = pairs.facts
    assert (facts.vocabulary, facts.pad, facts.bos, facts.eos) == (260, PAD, BOS, EOS)
    (source, target_in), targets = pairs.batch("validation", 0, 3)
    assert source.shape == target_in.shape == targets.shape == (3, 16)
    assert source.dtype == target_in.dtype == targets.dtype == torch.int64
    assert source[1].tolist() == [*ids("wahl 1"), facts.eos, *[facts.pad] * 9]
    assert target_in[1].tolist() == [facts.bos, *ids("choice 1"), *[facts.pad] * 7]
    assert targets[1].tolist() == [*ids("choice 1"), facts.eos, *[IGNORE] * 7]


def test_a_line_may_fill_its_row(tmp_path):
    settings = write_pairs(tmp_path)
    write_split(tmp_path, "val", ["a" * 15], ["b" * 15])
    (source, target_in), targets = load_pairs(settings, 16, 0).batch("validation", 0, 1)
    assert source[0].tolist() == [*ids("a" * 15), EOS]
    assert target_in[0].tolist() == [BOS, *ids("b" * 15)]
    assert targets[0].tolist() == [*ids("b" * 15), EOS]


@pytest.mark.parametrize("name", ["val", "valid", "dev", "validation"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_name_of_held_out_files_is_found_plain_and_gzipped(tmp_path, name, ending):
    pairs = load_pairs(write_pairs(tmp_path, name=name, ending=ending), 32, 0)
    assert pairs.splits == ("train", "validation")
    assert pairs.sources("validation") == [f"wahl {i}" for i in range(7)]
    assert pairs.references("train")[-1] == "the train 29"


def test_tests_are_splits_of_their_own(tmp_path):
    settings = write_pairs(tmp_path)
    write_split(tmp_path, "test_2016", ["eins"], ["one"])
    write_split(tmp_path, "test_2017", ["zwei", "drei"], ["two", "three"], ".gz")
    pairs = load_pairs(settings, 32, 0)
    assert pairs.splits == ("train", "validation", "test_2016", "test_2017")
    assert pairs.references("test_2017") == ["two", "three"]
    assert pairs.count("test_2017") == 2


def test_the_direction_is_a_setting(tmp_path):
    pairs = load_pairs(write_pairs(tmp_path, source="en", target="de"), 32, 0)
    assert (pairs.sources("validation")[0], pairs.references("validation")[0]) == ("choice 0", "wahl 0")


def test_every_validation_pair_comes_once_in_a_pass_and_filler_is_ignored(tmp_path):
    pairs = load_pairs(write_pairs(tmp_path), 32, 0)
    assert -(-pairs.count("validation") // 3) == 3
    batches = [pairs.batch("validation", step, 3) for step in range(3)]
    sources = torch.cat([inputs[0] for inputs, _ in batches])
    shifted = torch.cat([inputs[1] for inputs, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    assert [pairs.decode(row.tolist()) for row in sources[:7]] == pairs.sources("validation")
    assert (targets[7:] == IGNORE).all()
    assert sources[7:].tolist() == [[EOS, *[PAD] * 31]] * 2
    assert shifted[7:].tolist() == [[BOS, *[PAD] * 31]] * 2


def test_a_batch_depends_on_seed_split_and_step_alone(tmp_path):
    settings = write_pairs(tmp_path, train=300)
    pairs, again, other = load_pairs(settings, 16, 0), load_pairs(settings, 16, 0), load_pairs(settings, 16, 1)
    again.batch("train", 3, 8)
    again.batch("validation", 0, 8)
    (first, shifted), targets = pairs.batch("train", 7, 16)
    (same, same_shifted), same_targets = again.batch("train", 7, 16)
    assert torch.equal(first, same)
    assert torch.equal(shifted, same_shifted)
    assert torch.equal(targets, same_targets)
    assert not torch.equal(first, pairs.batch("train", 8, 16)[0][0])
    assert not torch.equal(first, other.batch("train", 7, 16)[0][0])
    assert [line.removeprefix("zug") for line in map(pairs.decode, first.tolist())] == [
        pairs.decode(row).removeprefix("the train") for row in torch.where(targets == IGNORE, PAD, targets).tolist()
    ]


def test_empty_and_long_lines_are_left_out_of_training_and_counted(tmp_path):
    settings = write_pairs(tmp_path)
    write_split(tmp_path, "train", ["ja", "", "nein", "x" * 12, "doch"], ["yes", "lost", " ", "long", "y" * 12])
    write_split(tmp_path, "val", ["z" * 40, "", "gut"], ["w" * 40, "empty", "good"])
    pairs = load_pairs(settings, 12, 0)
    assert pairs.skipped == {"empty lines": 3, "long pairs": 2}
    assert (pairs.sources("train"), pairs.references("train")) == (["ja"], ["yes"])
    assert (pairs.sources("validation"), pairs.references("validation")) == (["z" * 40, "gut"], ["w" * 40, "good"])
    (source, _), targets = pairs.batch("validation", 0, 2)
    assert source[0].tolist() == [*ids("z" * 11), EOS]
    assert targets[0].tolist() == [*ids("w" * 11), EOS]


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", "bpe:300"])
def test_decoding_gives_back_what_was_encoded(tmp_path, tokenizer):
    settings = write_pairs(tmp_path, tokenizer=tokenizer)
    write_split(tmp_path, "val", ["zug"], ["train"])
    pairs = load_pairs(settings, 32, 0)
    lines = ["zug 12", "the train", "gut"]
    encoded = pairs.encode_source(lines)
    assert encoded.shape == (3, 32)
    assert [pairs.decode(row.tolist()) for row in encoded] == lines
    facts = pairs.facts
    assert pairs.decode([facts.bos, *encoded[0, :2].tolist(), facts.pad, facts.eos, 3, 4]) == pairs.decode(encoded[0, :2].tolist())
    assert pairs.decode([facts.eos]) == ""


def test_encoding_cuts_what_is_too_long(tmp_path):
    pairs = load_pairs(write_pairs(tmp_path), 16, 0)
    assert pairs.encode_source(["a" * 50]).tolist() == [[*ids("a" * 15), EOS]]


def test_max_bytes_leaves_the_first_pairs(tmp_path):
    settings = write_pairs(tmp_path, max_bytes=50)  # a pair of 5 + 11 bytes and two line ends
    pairs = load_pairs(settings, 32, 0)
    assert pairs.sources("train") == ["zug 0", "zug 1"]
    with pytest.raises(DataError, match=r"has no pair within data.max_bytes=5: raise it"):
        load_pairs(settings.model_copy(update={"max_bytes": 5}), 32, 0)


def lose_a_line(folder):
    write_split(folder, "train", ["eins", "zwei"], ["one"])


def lose_the_target(folder):
    (folder / "train.en").unlink()


def lose_validation(folder):
    (folder / "val.de").unlink()


def break_utf8(folder):
    (folder / "val.en").write_bytes(b"good\nb\xe4d\n")


def be_empty(folder):
    (folder / "val.en").write_text("")


def be_long(folder):
    write_split(folder, "train", ["x" * 99], ["y" * 99])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_line, "train.de has 2 lines, .*train.en has 1: "),
        (lose_the_target, "has no train.en, nor a .gz of it: add it, or set data.source and data.target"),
        (lose_validation, r"has no validation file \(validation.de, valid.de, val.de, dev.de\)"),
        (break_utf8, "val.en:2: not UTF-8"),
        (be_empty, "val.en is empty"),
        (be_long, r"no pair of split train is left, {'long pairs': 1} were left out: .*raise sequence_length=32"),
    ],
)
def test_broken_folders_are_refused_in_words(tmp_path, damage, message):
    settings = write_pairs(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        load_pairs(settings, 32, 0)


def test_paths_that_do_not_fit_are_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("x")
    for settings, message in (
        (DataSettings(), "translation needs data.path, a folder with train.de, train.en, .* or data.dataset"),
        (DataSettings(path=str(tmp_path / "file")), "is not a folder: give one with train.de"),
        (DataSettings(validation_path="x"), "data.validation_path x is not read for translation"),
    ):
        with pytest.raises(DataError, match=message):
            load_pairs(settings, 32, 0)


def test_a_character_unseen_in_training_is_refused_or_left_out(tmp_path):
    settings = write_pairs(tmp_path, tokenizer="characters", validation=3)
    write_split(tmp_path, "val", ["zug", "zürich"], ["train", "a train"])
    with pytest.raises(DataError, match=r"val.de:2: 'ü' is in no training line.*data.on_error=skip"):
        load_pairs(settings, 32, 0)
    pairs = load_pairs(settings.model_copy(update={"on_error": "skip"}), 32, 0)
    assert pairs.skipped == {"characters": 1}
    assert pairs.references("validation") == ["train"]
    with pytest.raises(DataError, match="'ß' is in no training line"):
        pairs.encode_source(["ß"])


# Data sets ------------------------------------------------------------------------------------------------------------------------


def save_dataset(folder, rows, splits=("train", "validation", "test")):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in splits}).save_to_disk(str(folder))
    return DataSettings(dataset=str(folder))


NESTED = [{"translation": {"de": f"zug {i}", "en": f"train {i}"}} for i in range(20)]
FLAT = [row["translation"] for row in NESTED]


@pytest.mark.parametrize("rows", [NESTED, FLAT])
def test_a_data_set_of_translations_is_read(tmp_path, rows):
    pairs = load_pairs(save_dataset(tmp_path, rows), 32, 0)
    assert pairs.splits == ("train", "validation", "test")
    assert pairs.sources("test") == [row["de"] for row in FLAT]
    assert pairs.references("train") == [row["en"] for row in FLAT]


def test_a_data_set_without_a_held_out_split_gives_its_end(tmp_path):
    pairs = load_pairs(save_dataset(tmp_path, NESTED, ("train",)), 32, 0)
    assert pairs.sources("validation") == ["zug 18", "zug 19"]
    assert len(pairs.sources("train")) == 18


def test_a_data_set_of_other_languages_is_refused_in_words(tmp_path):
    settings = save_dataset(tmp_path / "nested", NESTED).model_copy(update={"source": "fr"})
    with pytest.raises(DataError, match=r"row 0 holds \['de', 'en'\], no text for each of fr and en: set data.source"):
        load_pairs(settings, 32, 0)
    settings = save_dataset(tmp_path / "flat", FLAT).model_copy(update={"source": "fr"})
    with pytest.raises(DataError, match=r"columns \['de', 'en'\], neither translation nor fr and en"):
        load_pairs(settings, 32, 0)


# Tokenizers -----------------------------------------------------------------------------------------------------------------------

TEXT = "Der Zug fährt ab.\nThe train leaves – 🚂.\r\n\n  Tab\there, \u2028 and there.\n" * 20


def test_bpe_gives_back_any_text():
    tokenizer = load_tokenizer("bpe:300", [TEXT])
    assert tokenizer.vocabulary == 300
    for text in (TEXT, "Nie gesehen: 漢字 ﷽ \x00", ""):
        encoded = tokenizer.encode(text)
        assert tokenizer.decode(encoded.tolist()) == text
        assert encoded.size == 0 or encoded.max() < 300
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 1.5


def test_bpe_gives_the_same_ids_in_every_process():
    program = (
        "import sys; from rayllp.data.tokenizer import load_tokenizer; text = sys.stdin.buffer.read().decode();"
        "print(load_tokenizer('bpe:300', [text]).encode(text).tolist())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", program], input=TEXT.encode(), capture_output=True, check=True).stdout for _ in range(2)
    }
    assert outputs == {f"{load_tokenizer('bpe:300', [TEXT]).encode(TEXT).tolist()}\n".encode()}


def test_bpe_of_a_short_text_is_smaller_than_asked_for():
    assert 256 <= load_tokenizer("bpe:5000", ["ab ab"]).vocabulary < 300


@pytest.mark.parametrize("name", ["bpe:256", "bpe:", "bpe:many", "bpe:-300", "bpe:8_000"])
def test_a_bpe_size_that_cannot_be_is_refused_in_words(name):
    with pytest.raises(DataError, match=f"data.tokenizer '{name}': SIZE of bpe:SIZE must be a number of at least 257"):
        load_tokenizer(name, ["text"])


def test_tokenizer_files_that_cannot_be_read_are_refused_in_words(tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken.json is not a tokenizer"):
        load_tokenizer(str(tmp_path / "broken.json"))
    with pytest.raises(DataError, match=r"none.spm.gz: no such file; give a model file of sentencepiece"):
        load_tokenizer(str(tmp_path / "none.spm.gz"))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "some.model").write_text("")
    with pytest.raises(DataError, match=r"needs the sentencepiece package: pip install 'rayllp\[translation\]'"):
        load_tokenizer(str(tmp_path / "some.model"))


def test_a_broken_sentencepiece_model_is_refused_in_words(tmp_path):
    pytest.importorskip("sentencepiece")
    for name in ("broken.model", "broken.spm.gz"):
        (tmp_path / name).write_bytes(b"no model")
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            load_tokenizer(str(tmp_path / name))


# Real sets ------------------------------------------------------------------------------------------------------------------------


@needs_data
def test_multi30k():
    pairs = load_pairs(DataSettings(path=str(DATA / "multi30k"), tokenizer="bpe:8000"), 64, 0)
    assert {split: len(pairs.sources(split)) for split in pairs.splits} == {"train": 29_000, "validation": 1_014, "test_2016_flickr": 1_000}
    assert pairs.skipped == {}
    assert pairs.facts.vocabulary == 8_004
    encoded = pairs.encode_source(pairs.sources("test_2016_flickr"))
    assert [pairs.decode(row.tolist()) for row in encoded] == pairs.sources("test_2016_flickr")
    targets = torch.cat([pairs.batch("validation", step, 256)[1] for step in range(-(-pairs.count("validation") // 256))])
    assert int((targets == pairs.facts.eos).sum()) == 1_014


@needs_data
def test_sentencepiece_on_multi30k():
    pytest.importorskip("sentencepiece")
    tokenizer = str(DATA / "tokenizers/torchbraid-de-en-bpe-8k/de-en_bpe_8k.model.gz")
    pairs = load_pairs(DataSettings(path=str(DATA / "multi30k"), tokenizer=tokenizer), 64, 0)
    assert pairs.facts.vocabulary == 8_004
    line = pairs.sources("validation")[0]
    assert pairs.decode(pairs.encode_source([line])[0].tolist()) == line
