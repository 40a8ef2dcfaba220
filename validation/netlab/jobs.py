"""What the ranks do with torch and gloo: collectives of given bytes, timed from a common start."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from moesim.structure.columns import FloatArray
from validation.netlab.workers import Session

FLOAT_BYTES = 4


def time_collective(
    session: Session,
    kind: str,
    num_bytes: int,
    arrival_s: FloatArray,
    *,
    pair_bytes: FloatArray | None = None,
    warms_up: bool = True,
) -> FloatArray:
    """Seconds from the common start until this rank is through, (n_repeats,).

    Parameters
    ----------
    session : Session
        The rank.
    kind : str
        Kind of collective.
    num_bytes : int
        As nccl-tests counts them: the buffer of a rank, for an all-gather what it ends with, for a reduce-scatter what
        it starts with.
    arrival_s : ndarray of shape (n_repeats, n_ranks)
        How long after the common start each rank calls.
    pair_bytes : ndarray of shape (n_ranks, n_ranks), optional
        Bytes of each pair, where the all-to-all is not even.
    warms_up : bool
        Whether a run before is not counted.
    """
    operation = _operation(session, kind, num_bytes, pair_bytes)
    seconds, skipped = [], int(warms_up)
    for mine in [*arrival_s[:skipped, session.rank], *arrival_s[:, session.rank]]:
        start = session.start_together()
        time.sleep(max(start + mine - time.monotonic(), 0.0))
        operation()
        seconds.append(time.monotonic() - start)
    return np.array(seconds[skipped:])


def _operation(session: Session, kind: str, num_bytes: int, pair_bytes: FloatArray | None) -> Any:
    """The collective as a call without arguments, on buffers that are not zero."""
    import torch
    from torch import distributed

    rank, ranks, count = session.rank, len(session.hosts), num_bytes // FLOAT_BYTES
    if pair_bytes is not None:
        counts = np.asarray(pair_bytes / FLOAT_BYTES).astype(int)
        sends, receives = counts[rank].tolist(), counts[:, rank].tolist()
        source, target = torch.rand(sum(sends)), torch.empty(sum(receives))
        return lambda: distributed.all_to_all_single(target, source, receives, sends)
    whole, part = torch.rand(count), torch.rand(count // ranks)
    match kind:
        case "all_to_all":
            received = torch.empty(count)
            return lambda: distributed.all_to_all_single(received, whole)
        case "all_reduce":
            return lambda: distributed.all_reduce(whole)
        case "all_gather":
            return lambda: distributed.all_gather_into_tensor(whole, part)
        case "reduce_scatter":
            return lambda: distributed.reduce_scatter_tensor(part, whole)
        case "point_to_point":
            return _message(rank, ranks, whole)
        case _:
            raise ValueError(f"no collective is called {kind!r}")


def _message(rank: int, ranks: int, whole: Any) -> Any:
    """Each even rank sends to the next one."""
    from torch import distributed

    if rank % 2 == 0 and rank + 1 < ranks:
        return lambda: distributed.send(whole, rank + 1)
    if rank % 2 == 1:
        return lambda: distributed.recv(whole, rank - 1)
    return lambda: None
