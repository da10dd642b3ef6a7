"""Images: MNIST's files, `datasets` folders, scikit-learn's digits; what is refused, and in what words."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE
from rayllp.data.images import load_images
from rayllp.errors import DataError

MNIST = Path(os.environ.get("RAYLLP_DATA", "")) / "mnist"
needs_mnist = pytest.mark.skipif(not os.environ.get("RAYLLP_DATA"), reason="RAYLLP_DATA names no folder with mnist/")


def write_idx(path, array):
    content = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, train=20, validation=7, size=(6, 4), ending=""):
    """Write images each of whose pixels encodes their split and index."""
    for prefix, count in (("train", train), ("t10k", validation)):
        values = (np.arange(count, dtype=np.uint8) + (100 if prefix == "t10k" else 0))[:, None, None]
        write_idx(folder / f"{prefix}-images-idx3-ubyte{ending}", np.broadcast_to(values, (count, *size)).copy())
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{ending}", (np.arange(count) % 3).astype(np.uint8))
    return DataSettings(path=str(folder))


def places(images, inputs):
    """Return the original value of each image's first pixel."""
    return (inputs[:, 0, 0, 0].numpy() * images.std.item() + images.mean.item()).round().astype(int)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_mnist_files_are_read_plain_and_gzipped(tmp_path, ending):
    images = load_images(write_mnist(tmp_path, ending=ending), 0)
    assert images.facts.image == (1, 6, 4)
    assert images.facts.classes == ("0", "1", "2")
    inputs, targets = images.batch("train", 0, 5)
    assert inputs.shape == (5, 1, 6, 4)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert targets.tolist() == [place % 3 for place in places(images, inputs)]


def test_training_pixels_have_mean_0_and_deviation_1():
    images = load_images(DataSettings(), 0)
    pixels = (images.pixels["train"].astype(np.float32) - images.mean) / images.std
    assert abs(pixels.mean()) < 1e-5
    assert abs(pixels.std() - 1) < 1e-5


def test_the_digits_are_the_default_with_their_last_fifth_held_out():
    images = load_images(DataSettings(), 0)
    assert (len(images.labels["train"]), len(images.labels["validation"])) == (1438, 359)
    assert images.facts.image == (1, 8, 8)
    assert images.facts.classes == tuple("0123456789")


def test_every_validation_image_comes_once_in_a_pass_and_filler_is_ignored(tmp_path):
    images = load_images(write_mnist(tmp_path), 0)
    assert -(-images.count("validation") // 3) == 3
    batches = [images.batch("validation", step, 3) for step in range(3)]
    inputs, targets = (torch.cat(side) for side in zip(*batches, strict=True))
    assert places(images, inputs[:7]).tolist() == list(range(100, 107))
    assert targets[7:].tolist() == [IGNORE, IGNORE]
    assert not inputs[7:].any()


def test_a_batch_depends_on_seed_split_and_step_alone(tmp_path):
    settings = write_mnist(tmp_path, train=200)
    images, again, other = load_images(settings, 0), load_images(settings, 0), load_images(settings, 1)
    again.batch("train", 3, 8)
    again.batch("validation", 0, 8)
    first, same = images.batch("train", 7, 16), again.batch("train", 7, 16)
    assert torch.equal(first[0], same[0])
    assert torch.equal(first[1], same[1])
    assert not torch.equal(first[0], images.batch("train", 8, 16)[0])
    assert not torch.equal(first[0], other.batch("train", 7, 16)[0])


def break_magic(folder):
    write_idx(folder / "train-images-idx3-ubyte", np.zeros((20, 24), np.uint8))


def cut_short(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def add_labels(folder):
    write_idx(folder / "train-labels-idx1-ubyte", np.zeros(21, np.uint8))


def resize_validation(folder):
    write_idx(folder / "t10k-images-idx3-ubyte", np.zeros((7, 5, 5), np.uint8))


def forget_labels(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()


def forget_validation(folder):
    (folder / "t10k-images-idx3-ubyte").unlink()


def add_another(folder):
    write_idx(folder / "train9-images-idx3-ubyte", np.zeros((20, 6, 4), np.uint8))


def break_gzip(folder):
    (folder / "train-images-idx3-ubyte").rename(folder / "train-images-idx3-ubyte.gz")


def change_label(folder):
    write_idx(folder / "t10k-labels-idx1-ubyte", np.array([0, 1, 2, 9, 0, 1, 2], np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_magic, "train-images-idx3-ubyte begins with 0x00000802, .*images' 0x00000803"),
        (cut_short, "names 20 × 6 × 4 bytes in its header, but 479 follow"),
        (add_labels, "has 20 images, but there are 21 labels"),
        (resize_validation, "images of 5 × 5 pixels, .* of 4 × 6: all must have one size"),
        (forget_labels, "t10k-labels-idx1-ubyte: no such file, nor a .gz of it"),
        (forget_validation, r"has none for t10k\*-images-idx3-ubyte"),
        (add_another, r"has several \(train-images-idx3-ubyte, train9-images-idx3-ubyte\)"),
        (break_gzip, "cannot be read: .*give a file, or a whole .gz of one"),
        (change_label, "image 3: label '9' is none of the 3 classes.*data.on_error=skip"),
    ],
)
def test_broken_files_are_refused_in_words(tmp_path, damage, message):
    settings = write_mnist(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        load_images(settings, 0)


def test_an_unseen_label_can_be_left_out_and_is_counted(tmp_path):
    settings = write_mnist(tmp_path)
    change_label(tmp_path)
    images = load_images(settings.model_copy(update={"on_error": "skip"}), 0)
    assert images.skipped == {"labels": 1}
    assert len(images.labels["validation"]) == len(images.pixels["validation"]) == 6
    assert places(images, images.batch("validation", 0, 6)[0]).tolist() == [100, 101, 102, 104, 105, 106]


def test_paths_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match="is not a folder: give one with MNIST's files"):
        load_images(DataSettings(path=str(tmp_path / "none")), 0)
    with pytest.raises(DataError, match=r"data.validation_path x is not read for images"):
        load_images(DataSettings(validation_path="x"), 0)


def save_dataset(folder, *, column="image", label="label", modes=("RGB",), sizes=((5, 4),), labels=None, splits=("train", "test")):
    """Write a `datasets` folder with 12 images per split, image i of colour i; modes and sizes repeat in turn."""
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    def draw(i):
        mode = modes[i % len(modes)]
        return Image.new(mode, sizes[i % len(sizes)], (i, 20 + i, 40 + i) if mode == "RGB" else i)

    kind = datasets.Value("string") if labels else datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({column: datasets.Image(), label: kind})
    values = labels or [i % 2 for i in range(12)]
    rows = {column: [draw(i) for i in range(12)], label: values}
    made = {split: datasets.Dataset.from_dict(rows, features=features) for split in splits}
    (datasets.DatasetDict(made) if len(made) > 1 else made["train"]).save_to_disk(str(folder))
    return DataSettings(dataset=str(folder), label_field=label)


def test_a_datasets_folder_gives_images_in_colour_and_names_of_classes(tmp_path):
    images = load_images(save_dataset(tmp_path, column="img", label="fine_label"), 0)
    assert images.facts.image == (3, 4, 5)
    assert images.facts.classes == ("cat", "dog")
    assert images.pixels["validation"][3, :, 0, 0].tolist() == [3, 23, 43]
    assert images.labels["validation"].tolist() == [0, 1] * 6
    assert images.mean.shape == (3, 1, 1)


def test_grey_images_among_coloured_ones_are_spread_over_the_channels(tmp_path):
    images = load_images(save_dataset(tmp_path, modes=("RGB", "L")), 0)
    assert images.pixels["train"][1, :, 0, 0].tolist() == [1, 1, 1]
    assert images.pixels["train"][2, :, 0, 0].tolist() == [2, 22, 42]


def test_a_data_set_without_a_held_out_split_gives_its_end(tmp_path):
    images = load_images(save_dataset(tmp_path, splits=("train",), labels=list("ababababababab")[:12]), 0)
    assert (len(images.labels["train"]), len(images.labels["validation"])) == (11, 1)
    assert images.facts.classes == ("a", "b")


@pytest.mark.parametrize("splits", [("train", "test"), ("train",)])
def test_a_set_too_large_for_memory_is_decoded_when_a_batch_asks(tmp_path, monkeypatch, splits):
    settings = save_dataset(tmp_path, modes=("RGB", "L"), splits=splits)
    held = load_images(settings, 0)
    monkeypatch.setattr("rayllp.data.images.HELD_IN_MEMORY", 100)
    decoded = load_images(settings, 0)
    assert not isinstance(decoded.pixels["train"], np.ndarray)
    assert decoded.facts == held.facts
    for split in ("train", "validation"):
        for step in range(2):
            for mine, wanted in zip(decoded.batch(split, step, 8), held.batch(split, step, 8), strict=True):
                assert torch.equal(mine, wanted)


def test_of_images_decoded_late_one_of_another_size_is_named(tmp_path, monkeypatch):
    settings = save_dataset(tmp_path, sizes=((5, 4),) * 7 + ((6, 4),))
    monkeypatch.setattr("rayllp.data.images.HELD_IN_MEMORY", 100)
    monkeypatch.setattr("rayllp.data.images.MEASURED", 2)
    with pytest.raises(DataError, match=r"split test, row 7 has an image of 6 × 4 pixels, the first 5 × 4: resize all to one size"):
        load_images(settings, 0).batch("validation", 0, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ((5, 4), (6, 4))}, r"images of 2 sizes \(5 × 4, 6 × 4 pixels, width × height\): resize them"),
        ({"modes": ("I;16",)}, "row 0 holds an image of mode I;16: give images of 8 bits"),
        ({"column": "picture"}, "none of them image or img"),
    ],
)
def test_datasets_that_do_not_fit_are_refused_in_words(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_images(save_dataset(tmp_path, **changes), 0)


def test_a_missing_label_column_and_no_room_for_an_image_are_named(tmp_path):
    settings = save_dataset(tmp_path)
    with pytest.raises(DataError, match=r"no column 'kind': set data.label_field to one of \['image', 'label'\]"):
        load_images(settings.model_copy(update={"label_field": "kind"}), 0)
    with pytest.raises(DataError, match=r"no image within data.max_bytes=59"):
        load_images(settings.model_copy(update={"max_bytes": 59}), 0)
    assert len(load_images(settings.model_copy(update={"max_bytes": 245}), 0).labels["train"]) == 4


@needs_mnist
def test_mnist():
    images = load_images(DataSettings(path=str(MNIST)), 0)
    assert images.pixels["train"].shape == (20_000, 1, 28, 28)
    assert images.pixels["validation"].shape == (10_000, 1, 28, 28)
    assert images.facts.classes == tuple("0123456789")
    # The whole set's are 0.1307 and 0.3081.
    assert images.mean.item() / 255 == pytest.approx(0.131, abs=2e-3)
    assert images.std.item() / 255 == pytest.approx(0.309, abs=2e-3)
    seen = torch.cat([images.batch("validation", step, 4096)[1] for step in range(-(-images.count("validation") // 4096))])
    assert int((seen != IGNORE).sum()) == 10_000
    assert np.bincount(seen[seen != IGNORE]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
