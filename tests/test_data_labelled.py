"""Labelled sets that the datasets library reads: sentences, words, pairs and images by the names of their columns."""

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Features, Sequence, Value
from PIL import Image

from rayllp.config import DataSettings
from rayllp.data.answers import load_answers
from rayllp.data.images import load_images
from rayllp.data.pairs import load_pairs
from rayllp.data.sentences import load_sentences
from rayllp.data.text import load_text
from rayllp.data.words import load_words
from rayllp.errors import DataError

NAMES = ["bad", "good"]


def sentences(count, start=0):
    return {"sentence": [f"thing {n}" for n in range(start, start + count)], "verdict": [n % 2 for n in range(start, start + count)]}


def saved(folder, values, features=None, **splits):
    """Write a folder with save_to_disk."""
    made = {name: datasets.Dataset.from_dict(rows, features) for name, rows in {"train": values, **splits}.items()}
    datasets.DatasetDict(made).save_to_disk(folder)
    return str(folder)


def test_sentences_have_their_labels_by_name(tmp_path):
    features = Features({"sentence": Value("string"), "verdict": ClassLabel(names=NAMES)})
    path = saved(tmp_path / "set", sentences(20), features, validation=sentences(6, 100))
    settings = DataSettings(dataset=path, text_field="sentence", label_field="verdict")
    data = load_sentences(settings, 16, 0)
    assert data.classes == ("bad", "good")
    inputs, targets = data.batch("validation", 0, 6)
    assert [data.tokenizer.decode([token - 4 for token in row.tolist() if token > 3]) for row in inputs] == sentences(6, 100)["sentence"]
    assert targets.tolist() == [0, 1] * 3
    for changes, message in (
        ({"text_field": "text"}, r"has no column 'text': set data.text_field to one of \['sentence', 'verdict'\]"),
        ({"label_field": "label"}, r"has no column 'label': set data.label_field to one of"),
        ({"pair_field": "verdict"}, r"row 0: a text is a int: set data.text_field and data.pair_field to columns of strings"),
        ({"validation_split": "dev"}, r"has no split dev, but train, validation: set data.validation_split"),
    ):
        with pytest.raises(DataError, match=message):
            load_sentences(settings.model_copy(update=changes), 16, 0)


def of_every_task(count, start=0):
    """Return rows with columns for all tasks."""
    numbers = range(start, start + count)
    return {
        "text": [f"thing {n} of them" for n in numbers], "label": [str(n % 2) for n in numbers], "answer": [f"no {n}" for n in numbers],
        "words": [["thing", str(n)] for n in numbers], "tags": [["A", "B"] for _ in numbers], "de": [f"Ding {n}" for n in numbers],
        "en": [f"thing {n}" for n in numbers], "image": [Image.new("L", (4, 4), n % 256) for n in numbers],
    }  # fmt: skip


@pytest.mark.parametrize("own", ["validation", "valid", "val", "dev", "test"])
def test_a_split_that_a_set_holds_out_itself_is_held_out_in_every_task(tmp_path, own):
    held_out = of_every_task(7, 100)
    settings = DataSettings(dataset=saved(tmp_path / "set", of_every_task(30), **{own: held_out}))

    def load_all(settings):
        words = settings.model_copy(update={"text_field": "words", "label_field": "tags"})
        answers = load_answers(settings.model_copy(update={"answer_field": "answer"}), 32, 0)
        listed = load_sentences(settings, 32, 0), load_words(words, 32, 0), load_pairs(settings, 32, 0), load_images(settings, 0), answers
        return load_text(settings, 16, 0), listed

    text, listed = load_all(settings)
    assert bytes(text.tokens["validation"].values).decode() == "\n".join(held_out["text"])
    assert [(data.count("train"), data.count("validation")) for data in listed] == [(30, 7)] * 5
    # What is trained on is never held out as a whole: the set named train is left aside, and the end of the other one held out.
    _, listed = load_all(settings.model_copy(update={"split": own, "validation_fraction": 0.3}))
    assert [(data.count("train"), data.count("validation")) for data in listed] == [(5, 2)] * 5


def test_no_more_is_read_of_a_streams_held_out_split_than_to_train_on(tmp_path):
    settings = DataSettings(dataset=saved(tmp_path / "set", of_every_task(30), test=of_every_task(7, 100)), max_bytes=40)
    lengths = [len(load_text(settings.model_copy(update={"streaming": each}), 16, 0).tokens["validation"]) for each in (True, False)]
    assert lengths == [40, len("\n".join(of_every_task(7, 100)["text"]))]


def test_sentences_of_a_table_with_one_null(tmp_path):
    rows = sentences(12)
    rows["sentence"][3] = None
    datasets.Dataset.from_dict(rows).to_json(tmp_path / "a.jsonl")
    settings = DataSettings(path=str(tmp_path / "a.jsonl"), text_field="sentence", label_field="verdict", validation_fraction=0.25)
    with pytest.raises(DataError, match=r"a.jsonl, split train, row 3 has nothing in column 'sentence'; fix it"):
        load_sentences(settings, 16, 0)
    data = load_sentences(settings.model_copy(update={"on_error": "skip"}), 16, 0)
    assert (data.skipped, data.classes) == ({"rows": 1}, ("0", "1"))
    assert (len(data.labels["train"]), len(data.labels["validation"])) == (9, 2)


def test_no_row_is_read_beyond_max_bytes(tmp_path):
    """A broken row beyond the limit is not seen; nor would be the rest of an endless stream."""
    many = sentences(12)
    many["sentence"][9] = None
    datasets.Dataset.from_dict(many).to_json(tmp_path / "a.jsonl")
    settings = DataSettings(path=str(tmp_path / "a.jsonl"), text_field="sentence", label_field="verdict", validation_fraction=0.25)
    data = load_sentences(settings.model_copy(update={"max_bytes": 8 * 8}), 16, 0)  # each "thing N" and an end of line
    assert len(data.labels["train"]) + len(data.labels["validation"]) == 8
    with pytest.raises(DataError, match=r"no row with a text and a label within data.max_bytes=5"):
        load_sentences(settings.model_copy(update={"max_bytes": 5}), 16, 0)
    words = {"tokens": [["birds", "sing"], ["fish", "swim"], ["sing"], ["sing"]], "tags": [["N", "V"], ["N", "V"], ["V"], []]}
    tagged = DataSettings(dataset=saved(tmp_path / "set", words), text_field="tokens", label_field="tags", max_bytes=21)
    assert len(load_words(tagged, 4, 0).index) == 2  # one sentence is held out
    answers = {"prompt": ["2+2=", "3+3=", "4+4="], "answer": ["4", "6", None]}
    datasets.Dataset.from_dict(answers).to_json(tmp_path / "b.jsonl")
    asked = DataSettings(path=str(tmp_path / "b.jsonl"), tokenizer="bytes", text_field="prompt", answer_field="answer", max_bytes=10)
    assert load_answers(asked, 12, 0).count("train") == 1


def test_words_have_a_label_each(tmp_path):
    features = Features({"tokens": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=["NOUN", "VERB"]))})
    rows = {"tokens": [["birds", "sing"], ["fish", "swim", "swim"], ["sing"]] * 4, "tags": [[0, 1], [0, 1, 1], [1]] * 4}
    settings = DataSettings(dataset=saved(tmp_path / "set", rows, features), text_field="tokens", label_field="tags")
    data = load_words(settings, 4, 0)
    assert data.classes == ("NOUN", "VERB")
    assert set(data.index) == {"birds", "fish", "sing", "swim"}
    rows["tags"][1] = [0, 1]
    broken = settings.model_copy(update={"dataset": saved(tmp_path / "broken", rows, features)})
    with pytest.raises(DataError, match=r"row 1 has no list of words in column 'tokens', with as many labels in 'tags'; fix it"):
        load_words(broken, 4, 0)
    assert load_words(broken.model_copy(update={"on_error": "skip"}), 4, 0).skipped == {"sentences": 1}
    with pytest.raises(DataError, match=r"has no column 'text': set data.text_field to one of \['tokens', 'tags'\]"):
        load_words(settings.model_copy(update={"text_field": "text"}), 4, 0)


def test_pairs_of_a_table(tmp_path):
    rows = {"de": [f"Zeile {n}" for n in range(10)], "en": [f"line {n}" for n in range(10)]}
    datasets.Dataset.from_dict(rows).to_csv(tmp_path / "pairs.csv")
    datasets.Dataset.from_dict({"de": ["neu"], "en": ["new"]}).to_parquet(tmp_path / "held.parquet")
    settings = DataSettings(path=str(tmp_path / "pairs.csv"), validation_fraction=0.2)
    assert load_pairs(settings, 16, 0).references("validation") == ["line 8", "line 9"]
    held = load_pairs(settings.model_copy(update={"validation_path": str(tmp_path / "held.parquet")}), 16, 0)
    assert (len(held.sources("train")), held.sources("validation")) == (10, ["neu"])


def test_a_folder_of_images_has_its_classes_by_its_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 6), ("validation", 2)):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for copy in range(count):
                pixels = np.full((4, 5), 100 * number + copy, np.uint8)
                image.fromarray(pixels).save(tmp_path / split / name / f"{copy}.png")
    data = load_images(DataSettings(path=str(tmp_path)), 0)
    assert (data.classes, data.facts.image) == (("cat", "dog"), (1, 4, 5))
    assert (len(data.labels["train"]), data.labels["validation"].tolist()) == (12, [0, 0, 1, 1])


def test_long_sentences_are_cut_skipped_or_refused_and_counted(tmp_path):
    rows = {"text": ["short", "much longer than that", "long at the end too"] * 4, "label": ["a", "b", "a"] * 4}
    settings = DataSettings(dataset=saved(tmp_path / "set", rows))
    assert load_sentences(settings, 12, 0).skipped == {"ends of long sentences": 8}
    skipped = load_sentences(settings.model_copy(update={"on_long": "skip", "validation_fraction": 0.3}), 12, 0)
    assert (skipped.skipped, len(skipped.labels["train"])) == ({"long sentences": 8}, 3)
    with pytest.raises(DataError, match=r"row 1 has 23 tokens, more than sequence_length=12: raise it, or set data.on_long to cut or skip"):
        load_sentences(settings.model_copy(update={"on_long": "refuse"}), 12, 0)
