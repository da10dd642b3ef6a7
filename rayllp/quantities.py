"""Numbers with units, as the command line accepts and shows them."""

import math

from rayllp.errors import SettingsError

SCALES = {
    "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0,
    "GB/s": 1e9, "MB/s": 1e6, "Gb/s": 1.25e8, "GB": 1e9, "GiB": 2**30, "MB": 1e6,
}  # fmt: skip
"""Each unit in seconds, bytes or bytes a second."""
TIMES = "us µs ms s"
"""The units of times within a training step."""
DURATIONS = "s m h"
"""The units of longer times."""


def quantity(text: str, option: str, units: str, *, zero: bool = False) -> float:
    """Return the value of a number with a unit, in seconds, bytes or bytes a second.

    Args:
        text: what was given, such as "20us".
        option: the command-line option it was given for, to be named in the error.
        units: the units that are allowed, separated by spaces.
        zero: allow 0.

    Raises:
        SettingsError: the text is not a positive number (or 0, if that is allowed) with one of these units.
    """
    text = text.strip()
    for unit in sorted(units.split(), key=len, reverse=True):
        if text.endswith(unit):
            try:
                value = float(text.removesuffix(unit)) * SCALES[unit]
            except ValueError:
                break
            if math.isfinite(value) and (value > 0 or (zero and value == 0)):
                return value
            break
    raise SettingsError(
        f"{option} {text}: write a number {'of at least' if zero else 'above'} 0 and a unit ({units.replace(' ', ', ')}), such as "
        f"20{units.split()[0]}"
    )


def write_size(count: float) -> str:
    """Return a number of bytes in the unit that suits it, such as "1.5 GiB"."""
    size, unit = next(((size, unit) for size, unit in ((2**30, "GiB"), (2**20, "MiB")) if count >= size), (2**10, "KiB"))
    return f"{count / size:.4g} {unit}"
