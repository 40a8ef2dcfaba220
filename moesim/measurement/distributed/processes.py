"""Finding the other processes: what the launcher says, which backend, and the groups of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

from moesim.errors import MoesimError, Problem, ScenarioError
from moesim.measurement.cases import DeviceKind
from moesim.measurement.distributed.ranks import ALONE, Ranks

BackendName = Literal["nccl", "gloo"]
LAUNCHED = ("RANK", "WORLD_SIZE")
RENDEZVOUS = (*LAUNCHED, "MASTER_ADDR", "MASTER_PORT")
HOW_TO_LAUNCH = "launch it with: torchrun --nproc-per-node 4 -m moesim measure SUITE"
DEVICE_OF_BACKEND: Mapping[str, DeviceKind] = {"nccl": "cuda", "gloo": "cpu"}


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher told this process: its number, how many there are, and the same on its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    ranks_per_host: int = 1


def read_launch(environment: Mapping[str, str]) -> Launch | None:
    """Read the variables that ``torchrun`` sets.

    Parameters
    ----------
    environment : mapping
        Of the process.

    Returns
    -------
    Launch or None
        None if this process was not launched as one of several.

    Raises
    ------
    ScenarioError
        If some of the variables are missing or no numbers.

    Examples
    --------
    >>> read_launch({}) is None
    True
    """
    if not any(name in environment for name in LAUNCHED):
        return None
    missing = [name for name in RENDEZVOUS if not environment.get(name)]
    if missing:
        what = f"{', '.join(missing)} of the launcher's variables {', '.join(RENDEZVOUS)} are not set"
        raise ScenarioError([Problem("E-CLI-001", what, HOW_TO_LAUNCH)])
    names = (*LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    texts = [environment.get(name, "") for name in names]
    texts = [texts[0], texts[1], texts[2] or texts[0], texts[3] or texts[1]]
    wrong = [f"{name}={text!r}" for name, text in zip(names, texts, strict=True) if not text.isdecimal()]
    if wrong:
        raise ScenarioError([Problem("E-CLI-001", f"{', '.join(wrong)} is no number", HOW_TO_LAUNCH)])
    rank, size, local_rank, per_host = (int(text) for text in texts)
    if not (rank < size and local_rank < per_host <= size):
        what = f"rank {rank} of {size}, {local_rank} of {per_host} on its host, cannot be"
        raise ScenarioError([Problem("E-CLI-001", what, HOW_TO_LAUNCH)])
    return Launch(rank, size, local_rank, per_host)


def open_ranks(launch: Launch, backend: BackendName, *, expert_parallel: int | None, timeout_s: float) -> Ranks:
    """Meet the other processes and form the groups.

    Parameters
    ----------
    launch : Launch
        Of this process.
    backend : str
        ``nccl`` or ``gloo``.
    expert_parallel : int, optional
        Ranks among which the experts are spread; None for all.
    timeout_s : float
        How long a process waits for the others.

    Raises
    ------
    ScenarioError
        If torch lacks the backend, the host lacks devices, or the groups do not divide the ranks.
    MoesimError
        If the others do not come.
    """
    size = launch.size
    width = expert_parallel or size
    if size % width:
        legal = [ranks for ranks in range(1, size + 1) if size % ranks == 0]
        what = f"groups of {width} do not divide {size} ranks"
        raise ScenarioError([Problem("E-SCN-004", what, f"use one of {legal}", field="--expert-parallel")])
    check_backend(backend)
    if backend == "nccl":
        _take_device(launch)
    if size == 1:
        return ALONE
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
        groups = dist.PrefixStore("groups", store)
        dist.init_process_group(backend, store=groups, rank=launch.rank, world_size=size, timeout=timeout)
        dist.barrier()
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        what = f"rank {launch.rank}: the {size} processes did not find each other within {timeout_s:g} s ({reason})"
        remedy = "make sure that all were started and reach MASTER_ADDR, or give a longer --timeout"
        raise MoesimError(what, remedy, "E-RUN-001") from error
    everyone = Ranks(rank=launch.rank, size=size, backend=backend, store=dist.PrefixStore("messages", store))
    return form_groups(everyone, width)


def form_groups(ranks: Ranks, expert_parallel: int) -> Ranks:
    """Return the same processes in groups that share the experts, and groups that hold the same ones.

    Parameters
    ----------
    ranks : Ranks
        The processes.
    expert_parallel : int
        Ranks among which the experts are spread; it divides their number.
    """
    replicas = ranks.size // expert_parallel
    experts = [list(range(first * expert_parallel, (first + 1) * expert_parallel)) for first in range(replicas)]
    copies = [list(range(place, ranks.size, expert_parallel)) for place in range(expert_parallel)]
    return replace(
        ranks,
        expert_parallel=expert_parallel,
        expert_group=_group_of(ranks.rank, experts, ranks.size),
        replica_group=_group_of(ranks.rank, copies, ranks.size),
    )


def close_ranks(ranks: Ranks) -> None:
    """Leave the groups, once all have come this far.

    Parameters
    ----------
    ranks : Ranks
        Of `open_ranks`.
    """
    if ranks.size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def check_backend(backend: BackendName) -> None:
    """Make sure that torch has the backend.

    Parameters
    ----------
    backend : str
        ``nccl`` or ``gloo``.

    Raises
    ------
    ScenarioError
        If it does not.
    """
    import torch
    import torch.distributed as dist

    has = dist.is_available() and (dist.is_nccl_available() if backend == "nccl" else dist.is_gloo_available())
    if has and (backend == "gloo" or torch.cuda.is_available()):
        return
    why = "sees no CUDA device" if has else f"was built without {backend.upper()}"
    other = "gloo" if backend == "nccl" else "nccl"
    remedy = f"use --backend {other}, or install a torch that has it"
    raise ScenarioError([Problem("E-SCN-010", f"torch {torch.__version__} {why}", remedy, field="--backend")])


def _take_device(launch: Launch) -> None:
    """Give every process of a host a device of its own."""
    import torch

    found = torch.cuda.device_count()
    if launch.local_rank >= found:
        what = f"{launch.ranks_per_host} processes on a host that has {found} CUDA device(s)"
        remedy = f"launch with --nproc-per-node {max(found, 1)}"
        raise ScenarioError([Problem("E-SCN-003", what, remedy, field="--nproc-per-node")])
    torch.cuda.set_device(launch.local_rank)


def _group_of(rank: int, members: list[list[int]], size: int) -> object:
    """Form several groups, as every process must, and return the one of this rank; None for a rank by itself."""
    import torch.distributed as dist

    mine = None
    for ranks in members:
        if len(ranks) == 1:
            continue
        group = dist.group.WORLD if len(ranks) == size else dist.new_group(ranks)
        if rank in ranks:
            mine = group
    return mine
