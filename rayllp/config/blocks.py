"""How many neighbouring layers each worker gets, where the settings do not say."""

from rayllp.mgrit import split_evenly


def torchbraid_blocks(layers: int, workers: int) -> tuple[int, ...]:
    """Return TorchBraid's blocks.

    It divides the N + 1 points evenly and gives the first worker one more; the last point begins no layer.
    """
    if workers == 1:
        return (layers,)
    even = layers // workers
    return (even + 1, *(even,) * (workers - 2), even - 1)


def default_blocks(layers: int, workers: int, coarsening: int, *, whole_intervals: bool = False) -> tuple[int, ...]:
    """Return blocks that end at C-points if the largest is then no larger than in an even division, else an even division.

    A block that begins at a C-point can start its sweep without waiting for its neighbour.

    Args:
        layers: number of middle layers.
        workers: number of blocks.
        coarsening: coarsening factor c_f.
        whole_intervals: cut at C-points in any case, provided there are as many intervals as workers.
    """
    even = split_evenly(layers, workers)
    intervals = -(-layers // coarsening)
    if intervals < workers:
        return even
    ends, done = [], 0
    for share in split_evenly(intervals, workers):
        done += share
        ends.append(min(done * coarsening, layers))
    aligned = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    return aligned if whole_intervals or max(aligned) <= max(even) else even
