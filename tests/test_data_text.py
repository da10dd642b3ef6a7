"""Text and its tokens: what is not text is refused, and the tokens are those that the library gives to the whole text."""

import codecs
import gzip
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from rayllp.config import DataSettings
from rayllp.data import encoding
from rayllp.data.masked import load_masked
from rayllp.data.pairs import load_pairs
from rayllp.data.text import load_text
from rayllp.data.tokenizer import load_tokenizer, restore_tokenizer
from rayllp.data.tokenizer_kinds import Characters, TrainedBPE
from rayllp.errors import DataError
from tests.conftest import read_text

TEXT = "".join(f"Line {number}, of  {number % 7}\tthings.\n" + "    indented\n\n" * (number % 5 == 0) for number in range(300))


def read(folder, name="", **changes):
    return read_text(DataSettings(path=str(folder / name), **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nbé\n".encode("latin-1"), r"file:2: not UTF-8 \(.* 0xe9\); save the file as UTF-8"),
        ("hello\n".encode("utf-16"), "file is UTF-16: save it as UTF-8"),
        ("hello\n".encode("utf-16-be"), "file:1 holds a zero byte: it is not text, damaged, or UTF-16"),
        (b"one\ntwo\0\0\0", "file:2 holds a zero byte"),
    ],
)
def test_what_is_no_utf_8_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path, "file")
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_text(DataSettings(path=str(tmp_path / "text"), validation_path=str(tmp_path / "file")), 16, 0)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a").write_bytes(codecs.BOM_UTF8 + "é\r\n".encode())
    (tmp_path / "b").write_bytes(codecs.BOM_UTF8 + b"b\x0b\xe2\x80\xa8")
    assert read(tmp_path) == "é\r\n\nb\x0b\u2028".encode()


def test_a_folder_of_texts_takes_nothing_else_along(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(b"c.txt" + bytes(500) + b"text"))
    (tmp_path / "d.txt").write_text("more", encoding="utf-8")
    with pytest.raises(DataError, match=r"read as a folder of texts, and .*b\.png.*leave it out by data.on_error=skip"):
        read(tmp_path)
    assert read(tmp_path, on_error="skip") == b"text\nmore"
    (tmp_path / "d.txt").write_text(TEXT, encoding="utf-8")
    for load in (load_text, load_masked):
        assert load(DataSettings(path=str(tmp_path), on_error="skip"), 16, 0).skipped == {"files": 2}


def test_a_row_that_holds_nothing_is_refused_or_skipped(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", None, "three"], "de": ["eins", None, "drei"], "en": ["one", "two", "three"]})
    rows.save_to_disk(str(tmp_path / "rows"))
    given_rows = DataSettings(dataset=str(tmp_path / "rows"))
    with pytest.raises(DataError, match=r"row 1: column 'text' holds nothing, not text; fix it, or leave it out by data.on_error=skip"):
        read_text(given_rows)
    assert read_text(given_rows.model_copy(update={"on_error": "skip"})) == b"one\nthree"
    with pytest.raises(DataError, match="row 1 has nothing in de or en; fix it"):
        load_pairs(given_rows, 8, 0)
    pairs = load_pairs(given_rows.model_copy(update={"on_error": "skip"}), 8, 0)
    assert (pairs.sources("train"), pairs.sources("validation"), pairs.skipped) == (["eins"], ["drei"], {"rows": 1})


# Tokens -----------------------------------------------------------------------------------------------------------------------


def metaspace():
    """Return a tokenizer like Llama's: a space is put before the first word only, and a text is one word."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "▁", *map(chr, range(10, 127)), "▁L", "in", "▁Lin", "  ", "\n\n"])}
    made = Tokenizer(models.BPE(vocabulary, [("▁", "L"), ("i", "n"), ("▁L", "in"), (" ", " "), ("\n", "\n")], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def byte_level():
    return Tokenizer.from_str(TrainedBPE(320, [TEXT]).serialised)


def word_pieces():
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "Line": 7, "##e": 12, "of": 1000, "things": 4, ".": 5}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    return made


MAKERS = {"metaspace": metaspace, "byte level": byte_level, "word pieces": word_pieces}
pieces = st.sampled_from(["Line ", "aaaa", "\n\n", "  "])
characters = st.one_of(st.sampled_from(" \n\r\t\v\x85\u2028aLin.é\U0001f600"), st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module", params=MAKERS)
def library(request, tmp_path_factory):
    made = MAKERS[request.param]()
    made.enable_truncation(8)  # what a file may ask for, and a stream is not cut to
    made.enable_padding(length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path, MAKERS[request.param]()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(text=st.lists(st.text(characters, max_size=12) | pieces, max_size=60).map("".join))
@example(text=TEXT)
@example(text="a" * 500 + "Lin" * 200)
def test_tokens_are_those_of_the_whole_text(library, text):
    path, made = library
    small = pytest.MonkeyPatch()
    for name, value in {"PART": 64, "OVERLAP": 40, "AGREEING": 8, "PARTS_AT_ONCE": 2}.items():
        small.setattr(encoding, name, value)
    try:
        found = load_tokenizer(str(path)).encode(text)
    finally:
        small.undo()
    assert np.array_equal(found, made.encode(text, add_special_tokens=False).ids)


def test_pieces_are_joined_where_they_agree(monkeypatch):
    for name, value in {"PART": 512, "OVERLAP": 128, "AGREEING": 8}.items():
        monkeypatch.setattr(encoding, name, value)
    ours = TrainedBPE(320, [TEXT])

    class Counting:
        """The library's tokenizer, without the way to encode a text in one call."""

        encode_batch = staticmethod(ours._tokenizer.encode_batch)

    assert np.array_equal(np.concatenate(list(encoding.encode_pieces(Counting(), [TEXT]))), ours._tokenizer.encode(TEXT).ids)


def test_ids_may_have_holes(tmp_path):
    made = word_pieces()
    made.save(str(tmp_path / "holes.json"))
    (tmp_path / "text").write_text("Line of things. " * 40, encoding="utf-8")
    data = load_text(DataSettings(path=str(tmp_path / "text"), tokenizer=str(tmp_path / "holes.json")), 8, 0)
    assert data.facts.vocabulary == 1001 > np.max(data.tokens["train"]) == 1000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("byte", "'byte' is neither a file nor a folder; did you mean bytes"), ("Bytes", "did you mean bytes"),
        ("character", "did you mean characters"), ("chars", "did you mean characters"), ("bpe", "did you mean bpe:8000"),
        ("bpe300", "did you mean bpe:8000"),
    ],
)  # fmt: skip
def test_what_is_nearly_a_name_of_ours_is_not_looked_for_elsewhere(name, message, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)
    with pytest.raises(DataError, match=message):
        load_tokenizer(name, ["text"])


def test_a_folder_that_hides_a_models_name_is_named(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="'gpt2' is a folder here, and has no tokenizer of transformers"):
        load_tokenizer("gpt2", ["text"])


def test_the_tokenizer_of_a_folder_with_code_is_read_without_running_or_asking(tmp_path, monkeypatch):
    """`rayllp export` writes such a folder where Δt is not 1. transformers would ask on the terminal whether to run its code."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=word_pieces(), unk_token="[UNK]")
    made.save_pretrained(tmp_path)
    code = {"model_type": "of_my_own", "auto_map": {"AutoConfig": "code.Own", "AutoModel": "code.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(code))
    (tmp_path / "code.py").write_text("raise SystemExit('this was run')\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or "n")
    tokenizer = load_tokenizer(str(tmp_path), ["text"])
    assert not asked
    assert tokenizer.encode("Line of things.").tolist() == made("Line of things.", add_special_tokens=False)["input_ids"]


def test_a_tokenizer_made_from_a_text_comes_back(tmp_path):
    for name in ("characters", "bpe:300"):
        made = load_tokenizer(name, [TEXT])
        back = restore_tokenizer(name, json.loads(json.dumps(made.serialised)), None)
        assert back.texts() == made.texts()
        assert np.array_equal(back.encode(TEXT), made.encode(TEXT))
    made.save(tmp_path / "tokenizer.json")
    assert restore_tokenizer("bpe:300", None, tmp_path / "tokenizer.json").texts() == made.texts()
    assert restore_tokenizer("bytes", None, tmp_path / "tokenizer.json") is None
    assert Characters(["ab"]).texts() != Characters(["abc"]).texts()
