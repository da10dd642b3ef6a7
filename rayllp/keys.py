"""Seeds for random numbers. Everything random in rayllp is keyed by (seed, step, layer, sample), never by worker."""

import hashlib


def key(*parts: object) -> int:
    """Return a 63-bit seed that is a hash of the parts' `repr`; the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
