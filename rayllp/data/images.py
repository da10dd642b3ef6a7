"""Image classification: MNIST's files, a data set of the datasets library, or the digits that come with scikit-learn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE, Dataset, DatasetFacts
from rayllp.data.datasets_io import Split, is_table, load_split, named, own_held_out, up_to
from rayllp.data.files import BadRows, count_kept, local_path, plain_or_gz, refuse_one_class
from rayllp.data.formats import IDX_IMAGES, IDX_LABELS, MNIST_FILES, read_idx
from rayllp.data.lazy_images import LazyImages
from rayllp.data.sampling import SampleOrder
from rayllp.errors import DataError

DIGITS_HELD_OUT = 0.2
HELD_IN_MEMORY = 2**31
"""Size of the pixels, in bytes, up to which a data set is decoded once and kept in memory; a larger one is decoded image by image."""
MEASURED = 2000
"""Number of images from which mean and standard deviation are estimated where they are not in memory."""
Pixels = np.ndarray | LazyImages
IMAGE_COLUMNS = ("image", "img")


@dataclass(frozen=True)
class _Images:
    """Pixels, uint8 of shape (images, C, H, W), and the labels as text; `source` is for errors."""

    source: str
    pixels: Pixels
    labels: list[str]


@dataclass(frozen=True, kw_only=True)
class ImageBatches(Dataset):
    """Images and their class numbers.

    Attributes:
        pixels: for each split, uint8 of shape (images, C, H, W).
        labels: for each split, class numbers.
        mean, std: mean and standard deviation of each channel over the training images, shape (C, 1, 1).
    """

    pixels: dict[str, Pixels]
    labels: dict[str, np.ndarray]
    mean: np.ndarray
    std: np.ndarray

    @property
    def facts(self) -> DatasetFacts:
        """The class names, and the images' channels, height and width."""
        channels, height, width = self.pixels["train"].shape[1:]
        return DatasetFacts(classes=self.classes, image=(channels, height, width))

    def batch(self, split: str, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return pixels of shape (size, C, H, W), standardised by the training images' mean and std, and class numbers of shape (size,)."""
        indices = self.chosen(split, step, size)
        inputs = (self.pixels[split][indices].astype(np.float32) - self.mean) / self.std
        inputs[indices < 0] = 0
        targets = np.where(indices < 0, IGNORE, self.labels[split][indices])
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def count(self, split: str) -> int:
        """Return the number of images in a split."""
        return len(self.labels[split])

    def content(self, split: str) -> list[Any]:
        """Return a split's pixels (for images that stay in their files, what identifies them) and its class numbers."""
        pixels = self.pixels[split]
        return [["pixels", pixels.identity if isinstance(pixels, LazyImages) else pixels], ["labels", self.labels[split]]]


def load_images(settings: DataSettings, seed: int) -> ImageBatches:
    """Read images, number their labels, and measure the training images' mean and standard deviation.

    Raises:
        DataError: files are missing or broken, images differ in size, or a package is missing; a held-out label does not occur in training
            and bad rows are not skipped.
    """
    if settings.validation_path:
        raise DataError(
            f"data.validation_path {settings.validation_path} is not read for images: leave it out; the t10k files of data.path "
            "or the data set's own split are held out"
        )
    classes: tuple[str, ...] = ()
    bad_rows = BadRows(settings.on_error == "skip")
    if settings.dataset or (settings.path and _has_no_idx(local_path(settings.path, "data.path"))):
        train, validation, classes = _read_dataset(settings, bad_rows)
    elif settings.path:
        train, validation = _read_folder(local_path(settings.path, "data.path"))
    else:
        train, validation = _hold_out(_read_digits(), DIGITS_HELD_OUT)
    classes = classes or _find_classes(train.labels)
    refuse_one_class(train.labels, train.source)
    train_pixels, train_labels = _number_labels(train, classes, bad_rows)
    validation_pixels, validation_labels = _number_labels(validation, classes, bad_rows)
    mean, std = _measure(train_pixels)
    pixels, labels = {"train": train_pixels, "validation": validation_pixels}, {"train": train_labels, "validation": validation_labels}
    return ImageBatches(
        pixels=pixels, labels=labels, order=SampleOrder(seed, settings.sampling), classes=classes, mean=mean, std=std,
        skipped=bad_rows.counts,
    )  # fmt: skip


def _find_classes(labels: list[str]) -> tuple[str, ...]:
    """Return the distinct labels in order: by value if all are numbers, else alphabetically."""
    distinct = set(labels)
    return tuple(sorted(distinct, key=int) if all(label.isdecimal() for label in distinct) else sorted(distinct))


def _number_labels(images: _Images, classes: tuple[str, ...], bad_rows: BadRows) -> tuple[Pixels, np.ndarray]:
    """Return pixels and class numbers of the images whose label is a class."""
    numbers = {name: number for number, name in enumerate(classes)}
    for place, label in enumerate(images.labels):
        if label not in numbers:
            bad_rows.refuse_or_count("labels", f"{images.source} image {place}: label {label!r} is none of the {len(classes)} classes")
    kept = np.array([label in numbers for label in images.labels])
    if not kept.any():
        raise DataError(f"{images.source} has no image with a known label: give some, or set data.on_error=refuse to see why")
    pixels = images.pixels if kept.all() else images.pixels[kept]
    return pixels, np.array([numbers[label] for label in images.labels if label in numbers], np.int64)


def _measure(images: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel, shape (C, 1, 1)."""
    pixels = images if isinstance(images, np.ndarray) else images[np.linspace(0, len(images) - 1, min(MEASURED, len(images)), dtype=int)]
    values, moments = np.arange(256.0), []
    for channel in range(pixels.shape[1]):
        # bincount needs eight bytes for each pixel, so count a thousand images at a time.
        parts = (pixels[start : start + 1000, channel] for start in range(0, len(pixels), 1000))
        shares = sum(np.bincount(part.ravel(), minlength=256) for part in parts) / pixels[:, channel].size
        mean = float(shares @ values)
        moments.append((mean, float(shares @ (values - mean) ** 2) ** 0.5))
    mean_C, std_C = np.array(moments, np.float32).T
    return mean_C[:, None, None], np.where(std_C > 0, std_C, 1)[:, None, None]


# Where images come from -------------------------------------------------------------------------------------------------------


def _read_digits() -> _Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _Images("scikit-learn's digits", digits.images[:, None].astype(np.uint8), [str(label) for label in digits.target])


def _hold_out(images: _Images, fraction: float) -> tuple[_Images, _Images]:
    """Split off the last `fraction` of the images for validation."""
    kept = count_kept(len(images.labels), fraction, images.source, "image")
    train = _Images(images.source, images.pixels[:kept], images.labels[:kept])
    return train, _Images(images.source, images.pixels[kept:], images.labels[kept:])


def _has_no_idx(folder: Path) -> bool:
    """True if the datasets library has to read a folder: it has no idx file, but subfolders (of classes or splits) or tables."""
    return (
        folder.is_dir()
        and not any("idx" in path.name for path in folder.iterdir())
        and any(path.is_dir() or is_table(path) for path in folder.iterdir())
    )


def _read_folder(folder: Path) -> tuple[_Images, _Images]:
    """Read training and validation images from a folder with MNIST's files."""
    if not folder.is_dir():
        raise DataError(f"data.path {folder} is not a folder: give one with {MNIST_FILES}")
    train, validation = _read_idx_pair(folder, "train"), _read_idx_pair(folder, "t10k")
    if train.pixels.shape[1:] != validation.pixels.shape[1:]:
        raise DataError(
            f"{validation.source} has images of {_size(validation.pixels)} pixels, {train.source} of {_size(train.pixels)}: "
            "all must have one size; resize them"
        )
    return train, validation


def _read_idx_pair(folder: Path, prefix: str) -> _Images:
    stems = sorted({path.name.removesuffix(".gz") for path in folder.glob(f"{prefix}*-images-idx3-ubyte*")})
    stems = [stem for stem in stems if stem.endswith("-images-idx3-ubyte")]
    if len(stems) != 1:
        fault = f"has several ({', '.join(stems)})" if stems else "has none"
        raise DataError(f"data.path {folder} {fault} for {prefix}*-images-idx3-ubyte: give a folder with {MNIST_FILES}, one set of them")
    paths = []
    for name in (stems[0], stems[0].replace("images-idx3", "labels-idx1")):
        path = plain_or_gz(folder / name)
        if path is None:
            raise DataError(f"data.path {folder / name}: no such file, nor a .gz of it; give a folder with {MNIST_FILES}")
        paths.append(path)
    pixels, labels = read_idx(paths[0], IDX_IMAGES), read_idx(paths[1], IDX_LABELS)
    if len(pixels) != len(labels):
        raise DataError(
            f"data.path {paths[0]} has {len(pixels)} images, but there are {len(labels)} labels: give files that belong together"
        )
    return _Images(f"data.path {paths[0]}", pixels[:, None], [str(label) for label in labels])


def _read_dataset(settings: DataSettings, bad_rows: BadRows) -> tuple[_Images, _Images, tuple[str, ...]]:
    """Read training and validation images by the datasets library, and the class names where the data set has them."""
    splits = [load_split(settings, "data.split", settings.split)]
    if held_out := settings.validation_split or own_held_out(settings, settings.split, stream=False):
        splits.append(load_split(settings, "data.validation_split", held_out))
    if not settings.streaming and settings.max_bytes is None and _bytes_of(splits[0]) > HELD_IN_MEMORY:
        sets = [_leave_in_files(split, settings, bad_rows) for split in splits]
    else:
        sets = _decode(splits, settings, bad_rows)
    train, validation = sets if len(sets) > 1 else _hold_out(sets[0], settings.validation_fraction)
    return train, validation, splits[0].labels(settings.label_field)


def _decode(splits: list[Split], settings: DataSettings, bad_rows: BadRows) -> list[_Images]:
    """Decode the images of all splits into memory."""
    read = [_read_split(split, settings, bad_rows) for split in splits]
    sizes = {image.shape[1:] for images, _ in read for image in images}
    if len(sizes) > 1:
        met = ", ".join(f"{width} × {height}" for height, width in sorted(sizes)[:4])
        raise DataError(f"{named(settings)} has images of {len(sizes)} sizes ({met} pixels, width × height): resize them to one")
    # Most sets of colour photographs have a few grey ones; give all of them as many channels.
    shape = (max(image.shape[0] for images, _ in read for image in images), *sizes.pop())
    return [
        _Images(split.source, np.stack([np.broadcast_to(image, shape) for image in images]), labels)
        for split, (images, labels) in zip(splits, read, strict=True)
    ]


def _image_column(split: Split) -> str:
    column = next((name for name in IMAGE_COLUMNS if name in split.columns), None)
    if column is None:
        raise DataError(f"{split.source} has columns {split.columns}, none of them image or img: rename the one that holds images")
    return column


def _bytes_of(split: Split) -> int:
    """Estimate the bytes of all pixels from the size of the first image."""
    column = _image_column(split)
    return len(split.loaded) * _to_pixels(split.loaded[0][column], f"{split.source} row 0").nbytes if len(split.loaded) else 0


def _leave_in_files(split: Split, settings: DataSettings, bad_rows: BadRows) -> _Images:
    """Read the labels alone; the images are decoded when a batch asks for them."""
    column = _image_column(split)
    split.require({"data.label_field": settings.label_field})
    first = _to_pixels(split.loaded[0][column], f"{split.source} row 0")
    shape = (3, *first.shape[1:])  # three channels even if the first image is grey, since others may not be
    kept, labels = list[int](), list[str]()
    for number, (place, (label,)) in enumerate(split.rows(label=settings.label_field)):
        if not _is_missing(label, settings.label_field, place, bad_rows):
            kept.append(number)
            labels.append(str(label))
    decoded = LazyImages(split.loaded, column, _to_pixels, split.source, np.array(kept, np.int64), shape)
    return _Images(split.source, decoded, labels)


def _read_split(split: Split, settings: DataSettings, bad_rows: BadRows) -> tuple[list[np.ndarray], list[str]]:
    """Decode the images of a split into memory, up to data.max_bytes."""
    column = _image_column(split)
    split.require({"data.label_field": settings.label_field})
    decoded = (
        (_to_pixels(image, place), str(label))
        for place, (image, label) in split.rows(column, label=settings.label_field, at_once=1)
        if not _is_missing(image, column, place, bad_rows) and not _is_missing(label, settings.label_field, place, bad_rows)
    )
    kept = list(up_to(settings.max_bytes, decoded, lambda item: item[0].nbytes))
    if not kept:
        raise DataError(f"{split.source} has no image within data.max_bytes={settings.max_bytes}: choose another split or raise it")
    return [image for image, _ in kept], [label for _, label in kept]


def _is_missing(value: Any, column: str, place: str, bad_rows: BadRows) -> bool:
    if value is None:
        bad_rows.refuse_or_count("rows", f"{place} has nothing in column {column!r}")
    return value is None


def _to_pixels(image: Any, place: str) -> np.ndarray:
    """Convert a PIL image to uint8 of shape (C, H, W), grey or RGB."""
    mode = getattr(image, "mode", None)
    if mode is None or mode.startswith(("I", "F")):
        kind = f"an image of mode {mode}" if mode else f"a {type(image).__name__}"
        raise DataError(f"{place} holds {kind}: give images of 8 bits a channel, in a column of the datasets library's type Image")
    if mode in ("1", "L"):
        return np.asarray(image.convert("L"))[None]
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[-1]} × {pixels.shape[-2]}"
