"""Images that stay in their files and are decoded when a batch asks for them, for data sets that do not fit in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayllp.errors import DataError


@dataclass(frozen=True)
class LazyImages:
    """A stand-in for a uint8 array of pixels of shape (images, C, H, W), decoded on access.

    Attributes:
        rows: the data set of the datasets library; row number -> a mapping that holds the image's column.
        column: name of the column that holds the image.
        decode: (image, place for errors) -> uint8 of shape (C, H, W).
        source: name of the data set, for errors.
        numbers: row number of each image; rows that are left out are missing here.
        image: shape (C, H, W) that every image must have.
    """

    rows: Any
    column: str
    decode: Callable[[Any, str], np.ndarray]
    source: str
    numbers: np.ndarray
    image: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that an array of all pixels would have: (images, C, H, W)."""
        return (len(self.numbers), *self.image)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def identity(self) -> list[Any]:
        """What identifies the images: the datasets library's fingerprint instead of the pixels, which may be larger than memory."""
        return [str(getattr(self.rows, "_fingerprint", "")), self.column, self.numbers]

    def narrowed(self, chosen: Any) -> "LazyImages":
        """Return some of the images (chosen by a slice or a mask), still in their files."""
        return LazyImages(self.rows, self.column, self.decode, self.source, self.numbers[chosen], self.image)

    def __getitem__(self, chosen: Any) -> Any:
        """Decode the images at these indices into one array; a slice or a mask returns `narrowed` instead.

        Raises:
            DataError: an image has another size than the first.
        """
        if isinstance(chosen, slice) or np.asarray(chosen).dtype == bool:
            return self.narrowed(chosen)
        return np.stack([self._pixels(int(number)) for number in self.numbers[chosen]])

    def _pixels(self, number: int) -> np.ndarray:
        """Decode the image in one row."""
        place = f"{self.source} row {number}"
        pixels = self.decode(self.rows[number][self.column], place)
        if pixels.shape[1:] != self.image[1:]:
            size, first = (f"{width} × {height}" for height, width in (pixels.shape[1:], self.image[1:]))
            raise DataError(f"{place} has an image of {size} pixels, the first {first}: resize all to one size")
        return np.broadcast_to(pixels, self.image)
