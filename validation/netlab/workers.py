"""Processes inside the emulated hosts: started together, given jobs, timed on the one clock they share.

Only these processes import torch. A fork server imports it once; its children enter their namespace and join gloo.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from moesim.errors import ScenarioError
from moesim.structure.columns import FloatArray
from validation.netlab.namespaces import enter_namespace, lab_problem
from validation.netlab.topologies import Host

PORT = 29500
LEAD_S = 0.003
"""From the moment when all ranks have met to the start of what is timed."""
PATIENCE_S = 90.0
NICENESS = -15
"""Other work on the machine must not delay messages; whoever may make namespaces may do this."""


@dataclass
class Session:
    """What a job knows about its rank; ``group_barrier`` and ``start`` are shared by the ranks of a network."""

    rank: int
    hosts: Sequence[Host]
    group_barrier: Any
    start: Any

    def start_together(self) -> float:
        """Wait for all ranks, and then for a moment that is the same for all; seconds of the shared clock."""
        self.group_barrier.wait(PATIENCE_S)
        if self.rank == 0:
            self.start.value = time.monotonic() + LEAD_S
        self.group_barrier.wait(PATIENCE_S)
        at: float = self.start.value
        time.sleep(max(at - time.monotonic(), 0.0))
        return at


Job = Callable[..., Any]
"""First argument a ``Session``; defined at the top of a module, so that it can be sent."""


class Workers:
    """Ranks of one network."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections

    def run(self, job: Job, /, **arguments: Any) -> list[Any]:
        """Run a job on every rank and return the answers by rank.

        Raises
        ------
        ScenarioError
            E-NET-004 with the rank and its last words if one fails, dies or is silent for too long.
        """
        self.tell(job, **arguments)
        return [self._answer(rank) for rank in range(len(self._connections))]

    def tell(self, job: Job | None, /, **arguments: Any) -> None:
        """Send a job to every rank; None ends them."""
        for rank, connection in enumerate(self._connections):
            try:
                connection.send((job, arguments))
            except OSError:
                raise ScenarioError([_lost(rank)]) from None

    def _answer(self, rank: int) -> Any:
        connection = self._connections[rank]
        try:
            if not connection.poll(PATIENCE_S):
                message = f"rank {rank} has not answered for {PATIENCE_S:g} s"
                raise ScenarioError([lab_problem(message, "try a higher link rate, or a machine that is less busy")])
            worked, answer = connection.recv()
        except (EOFError, ConnectionError):
            raise ScenarioError([_lost(rank)]) from None
        if not worked:
            raise ScenarioError([lab_problem(f"rank {rank}: {answer}", "the last line is the error in the process")])
        return answer

    def slowest_s(self, job: Job, /, **arguments: Any) -> FloatArray:
        """Times of a job that returns seconds per repetition: those of the slowest rank, shape (n_repeats,)."""
        return np.asarray(np.max(self.run(job, **arguments), axis=0))


def _lost(rank: int) -> Any:
    return lab_problem(f"the process of rank {rank} has ended", "see the messages above it; was it killed?")


def forked_from_torch() -> Any:
    """Context of processes that are forked from one which has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", __name__])
    return context


@contextlib.contextmanager
def workers(hosts: Sequence[Host], *, joins_gloo: bool = True) -> Iterator[Workers]:
    """Processes of all ranks, for as long as the context lasts.

    Parameters
    ----------
    hosts : sequence of Host
        Where they run.
    joins_gloo : bool
        Whether they form a process group; plain TCP needs none.
    """
    context = forked_from_torch()
    barrier, start = context.Barrier(len(hosts)), context.Value("d", 0.0)
    connections, processes = [], []
    try:
        for rank in range(len(hosts)):
            ours, theirs = context.Pipe()
            session = Session(rank, hosts, barrier, start)
            process = context.Process(target=_serve, args=(session, theirs, os.getpid(), joins_gloo), daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        group = Workers(connections)
        group.run(_nothing)
        yield group
        group.tell(None)
        for process in processes:
            process.join(2.0)
    finally:
        for process in processes:
            process.kill()
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()


def _nothing(session: Session) -> int:
    return session.rank


def _serve(session: Session, connection: Connection, parent: int, joins_gloo: bool) -> None:
    """Life of a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
        host = session.hosts[session.rank]
        enter_namespace(host.namespace)
        if joins_gloo:
            _join(session, host)
        while True:
            job, arguments = connection.recv()
            if job is None:
                os._exit(0)
            connection.send((True, job(session, **arguments)))
    except EOFError:
        os._exit(1)
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send((False, " | ".join(traceback.format_exc().strip().splitlines()[-4:])))
        os._exit(1)


def _end_with(parent: int) -> None:
    """End this process when the lab's own does, even if it is killed: children of a fork server do not notice."""
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)
    select.select([descriptor], [], [])
    os._exit(1)


def _join(session: Session, host: Host) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = host.interface
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = session.hosts[0].address, str(PORT)
    distributed.init_process_group(
        "gloo", rank=session.rank, world_size=len(session.hosts), timeout=timedelta(seconds=PATIENCE_S)
    )
