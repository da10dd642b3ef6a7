"""Numbers with units, as the command line takes them."""

import math

from rayllp.errors import SettingsError

SCALES = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "GB/s": 1e9, "MB/s": 1e6, "Gb/s": 1.25e8, "GB": 1e9, "GiB": 2**30, "MB": 1e6}
TIMES = "us µs ms s"


def quantity(text: str, option: str, units: str, *, zero: bool = False) -> float:
    """A number with one of these units (separated by spaces), in seconds, bytes or bytes a second.

    Args:
        option: what the text was given for, named where it cannot be read.
        zero: whether 0 is one.

    Raises:
        SettingsError: it is none.
    """
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
