"""The processes of a run: who they are, their groups, and what they tell each other besides tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from moesim.errors import Problem, ScenarioError

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.record_files import Json

FAILURE_TIMEOUT_S = 20.0
"""How long a rank that failed waits for the others to fail as well, before it ends and takes them along."""


class AbstractStore(Protocol):
    """The part of a ``torch.distributed.Store`` that is used here."""

    def set(self, key: str, value: str) -> None:
        """Publish a value."""

    def get(self, key: str) -> bytes:
        """Wait for a value."""

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait for keys, or raise."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""


@dataclass(slots=True)
class Ranks:
    """The processes of a run, seen by one of them.

    Parameters
    ----------
    rank, size : int
        Of this process, of all.
    expert_parallel : int
        Ranks among which the experts are spread; ranks of one group are neighbours.
    backend : str, optional
        ``nccl`` or ``gloo``; None for a process alone.
    expert_group, replica_group : process group, optional
        Ranks that exchange rows; ranks that hold the same experts.
    store : store, optional
        Where processes leave each other short messages.
    side_groups : list of process groups
        More groups of all ranks, made when several collectives run at once.
    """

    rank: int = 0
    size: int = 1
    expert_parallel: int = 1
    backend: str | None = None
    expert_group: object = None
    replica_group: object = None
    store: AbstractStore | None = None
    side_groups: list[object] = field(default_factory=list)
    _messages: int = field(default=0, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    @property
    def expert_rank(self) -> int:
        """Place within the expert-parallel group."""
        return self.rank % self.expert_parallel

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.size // self.expert_parallel

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def share(self, value: Json) -> Json:
        """Return the value of the first rank on every rank.

        Parameters
        ----------
        value : JSON value
            Read on the first rank only.
        """
        if self.store is None:
            return value
        key = self._next_key()
        if self.is_first:
            self.store.set(key, json.dumps(value))
            return value
        shared: Json = json.loads(self.store.get(key))
        return shared

    def gather(self, value: Json, timeout_s: float | None = None) -> list[Json]:
        """Return the values of all ranks on every rank, in their order.

        Parameters
        ----------
        value : JSON value
            Of this rank.
        timeout_s : float, optional
            How long to wait for the others; None for as long as the store waits.

        Raises
        ------
        RuntimeError
            If a rank does not answer in time.
        """
        if self.store is None:
            return [value]
        key = self._next_key()
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        if timeout_s is not None:
            self.store.wait(keys, timedelta(seconds=timeout_s))
        return [json.loads(self.store.get(one)) for one in keys]

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return the numbers of all ranks, one list of each.

        Parameters
        ----------
        values : sequence of float
            Of this rank.
        """
        gathered = self.gather(list(values))
        return [[float(number) for number in one] for one in gathered if isinstance(one, list)]  # type: ignore[arg-type]

    def largest(self, value: float) -> float:
        """Return the largest of the ranks' values."""
        return max(number for (number,) in self.gather_numbers([value]))

    def agree(self, reason: str | None) -> str | None:
        """Tell the others whether something failed here, and return the failures of all ranks in one line.

        Parameters
        ----------
        reason : str, optional
            Why it failed here; None if it did not.

        Raises
        ------
        RuntimeError
            If it failed here and another rank does not answer: it waits in an exchange that cannot end.
        """
        answers = self.gather(reason, FAILURE_TIMEOUT_S if reason is not None else None)
        failed = {rank: str(answer) for rank, answer in enumerate(answers) if answer is not None}
        if len(failed) == self.size and len(set(failed.values())) == 1:
            return failed[0]
        return "; ".join(f"rank {rank}: {answer}" for rank, answer in failed.items()) or None

    def leave(self, reason: str) -> None:
        """Tell the others that this rank ends, for those who find their exchange with it broken.

        Parameters
        ----------
        reason : str
            Why.
        """
        if self.store is not None:
            self.store.set(f"moesim/left/{self.rank}", reason)

    def those_who_left(self) -> list[int]:
        """Return the ranks that have ended."""
        store = self.store
        return [] if store is None else [rank for rank in range(self.size) if store.check([f"moesim/left/{rank}"])]

    def copy_from_first(self, tensors: Sequence[Tensor], *, among_replicas: bool) -> None:
        """Overwrite tensors by those of the first rank, or of the first rank that holds the same experts.

        Parameters
        ----------
        tensors : sequence of tensors
            The same shapes on every rank.
        among_replicas : bool
            Whether ranks with other experts keep theirs.
        """
        if self.size == 1 or (among_replicas and self.num_replicas == 1):
            return
        import torch.distributed as dist

        for tensor in tensors:
            if among_replicas:
                dist.broadcast(tensor, src=self.expert_rank, group=self.replica_group)
            else:
                dist.broadcast(tensor, src=0)

    def _next_key(self) -> str:
        self._messages += 1
        return f"moesim/{self._messages}"


ALONE = Ranks()


def check_experts(num_experts: int, num_ranks: int) -> None:
    """Make sure that every rank gets as many experts.

    Parameters
    ----------
    num_experts : int
        Of a layer.
    num_ranks : int
        Of the expert-parallel group.

    Raises
    ------
    ScenarioError
        If the experts do not divide over the ranks.
    """
    if num_experts % num_ranks:
        legal = [ranks for ranks in range(1, num_experts + 1) if num_experts % ranks == 0]
        what = f"{num_experts} experts do not divide over {num_ranks} ranks"
        raise ScenarioError([Problem("E-SCN-004", what, f"use one of {legal} ranks", field="world size")])
