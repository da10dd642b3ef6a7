"""Images that stay in their files and are decoded when a batch asks for them: sets that memory does not hold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayllp.errors import DataError


@dataclass(frozen=True)
class DecodedImages:
    """Stands where an array of pixels, uint8 of shape (images, C, H, W), would.

    Attributes:
        rows: of the data set, by number: row -> a mapping with the image's column.
        column: the image's.
        decode: image, place -> uint8 of shape (C, H, W).
        source: for errors.
        numbers: rows that are in.
        image: (C, H, W) that all have.
    """

    rows: Any
    column: str
    decode: Callable[[Any, str], np.ndarray]
    source: str
    numbers: np.ndarray
    image: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Images, channels, height and width, as an array of them would have."""
        return (len(self.numbers), *self.image)

    def __len__(self) -> int:
        return len(self.numbers)

    def narrowed(self, chosen: Any) -> "DecodedImages":
        """Some of the images (a slice or a mask), still in their files."""
        return DecodedImages(self.rows, self.column, self.decode, self.source, self.numbers[chosen], self.image)

    def __getitem__(self, chosen: Any) -> Any:
        """Pixels at these places.

        Raises:
            DataError: an image of another size.
        """
        if isinstance(chosen, slice) or np.asarray(chosen).dtype == bool:
            return self.narrowed(chosen)
        return np.stack([self._pixels(int(number)) for number in self.numbers[chosen]])

    def _pixels(self, number: int) -> np.ndarray:
        place = f"{self.source} row {number}"
        pixels = self.decode(self.rows[number][self.column], place)
        if pixels.shape[1:] != self.image[1:]:
            given, wanted = (f"{width} × {height}" for height, width in (pixels.shape[1:], self.image[1:]))
            raise DataError(f"{place} has an image of {given} pixels, the first {wanted}: resize all to one size")
        return np.broadcast_to(pixels, self.image)
