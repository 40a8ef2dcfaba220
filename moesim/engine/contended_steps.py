"""A step whose collectives meet on the wires: the passes of a pipeline run through the event kernel.

Where no link is shared, seconds add up and max-plus is exact (``rank_max_plus``). Here the same passes run as
processes: compute takes its seconds, a collective is a transfer on the ports of its stage, and whatever else uses these
ports at that time slows it down. Ranks of a stage are alike, so a stage is simulated once, with the share of one rank.

What hides under compute is spread over the compute of its scope, one piece after the other: it runs beside it and is
joined where that compute ends. What hides of the gradients' reduction begins with the last backward pass of each chunk
and is joined at the end of the schedule; the gather of updated parameters that hides under the next step's forward is
not on these links.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import numpy as np

from moesim.cost.layer_times import COMMUNICATION_STREAMS
from moesim.engine.analytical import System
from moesim.engine.breakdowns import StepEnd
from moesim.engine.event_kernel import EventKernel
from moesim.engine.rank_max_plus import PassKey, zero_parts_s
from moesim.engine.shared_links import FlappingLink, LinkTransfer, SharedLinks
from moesim.engine.step_passes import PreparedStep, prepare_step
from moesim.engine.step_transfers import StepTransfers, step_transfers
from moesim.engine.stream_times import ChunkPass, Scope, Stretch, TimedOperation
from moesim.errors import SimulationError
from moesim.structure.columns import Columns, FloatArray
from moesim.structure.pipeline_orders import FORWARD, WEIGHT_GRADIENT
from moesim.structure.step_graph import CATEGORIES

TieOrder = Literal["first_in", "last_in"]
Network = Literal["closed", "shared"]
"""Every collective on links of its own, or all of a rank's on the same ports."""
FITS = 1.0 + 1e-9


@dataclass(frozen=True)
class LinkFault:
    """Links of one stage that are slower than they should be.

    ``level`` of the fabric, 0 the innermost; ``fraction`` of the capacity that is there, ``flapping`` if it also falls
    from time to time. Collectives wait for their slowest member, so a fault of one rank's port counts for its stage.
    """

    stage: int
    level: int
    fraction: float = 1.0
    flapping: FlappingLink | None = None


@dataclass(frozen=True)
class ContendedStep:
    """A simulated step.

    Attributes
    ----------
    step_time_s : float
        When the last stage has updated its parameters.
    closed_step_time_s : float
        The same with every collective on links of its own, and no faults.
    finish_s : ndarray of shape (stages,)
        End of each stage.
    start_s, end_s : ndarray of shape (n_nodes,)
        Passes, as ``PreparedStep.nodes`` numbers them.
    link_busy_s : ndarray of shape (stages, n_levels)
        For how long the share of a rank would be full with what it sent.
    added_s : dict of str to ndarray of shape (stages,)
        By category of an answer: what of it is longer than on links of its own; sums to ``contention_s`` on each stage.
    num_events : int
        Events of the kernel.
    """

    step_time_s: float
    closed_step_time_s: float
    finish_s: FloatArray
    start_s: FloatArray
    end_s: FloatArray
    link_busy_s: FloatArray
    added_s: dict[str, FloatArray]
    num_events: int

    @property
    def contention_s(self) -> float:
        """By how much sharing and faults make the step longer."""
        return self.step_time_s - self.closed_step_time_s


def contended_step(
    system: System,
    columns: Columns,
    *,
    network: Network = "shared",
    faults: Sequence[LinkFault] = (),
    tie_order: TieOrder = "first_in",
) -> ContendedStep:
    """Run a step whose ranks are alike within each stage.

    Parameters
    ----------
    system : System
        Scenario, profiles and rates.
    columns : Columns
        Resolved and legal, one row.
    network : str
        ``shared``, or ``closed`` where nothing contends: max-plus by other means.
    faults : sequence of LinkFault
        Slow and flapping links.
    tie_order : str
        Which of the events of one moment happens first; results do not depend on it.

    Raises
    ------
    ValueError
        If there is more than one row, or a fault of a link that does not exist.
    SimulationError
        If a transfer never ends.
    """
    step = prepare_step(system, columns)
    passes = step.passes([{}], lambda _: np.ones((1, 1)))
    transfers = step_transfers(step)
    run = _Run(step, passes, transfers if network == "shared" else transfers.on_private_links(), faults, tie_order)
    run.finish()
    closed = run
    if network == "shared":
        closed = _Run(step, passes, transfers.on_private_links(), (), tie_order)
        closed.finish()
    return ContendedStep(
        step_time_s=run.step_time_s,
        closed_step_time_s=closed.step_time_s,
        finish_s=run.finish_s,
        start_s=run.start_s,
        end_s=run.end_s,
        link_busy_s=transfers.ports.busy_s(run.links.carried),
        added_s={name: seconds - closed.waited_s[name] for name, seconds in run.waited_s.items()},
        num_events=run.kernel.num_events,
    )


class _Signal:
    """Something that happens once, and what waits for it."""

    __slots__ = ("has_happened", "waiting")

    def __init__(self) -> None:
        self.has_happened = False
        self.waiting: list[Callable[[], None]] = []

    def happen(self) -> None:
        self.has_happened = True
        waiting, self.waiting = self.waiting, []
        for action in waiting:
            action()


Wait = float | LinkTransfer | _Signal
Process = Generator[Wait, None, None]


class _Lane:
    """A stream beside the compute of a stage: transfers run in the order in which they were submitted."""

    def __init__(self, links: SharedLinks) -> None:
        self.links = links
        self.queue: list[tuple[LinkTransfer, _Signal]] = []

    def submit(self, transfer: LinkTransfer) -> _Signal:
        done = _Signal()
        self.queue.append((transfer, done))
        if len(self.queue) == 1:
            self.links.start(transfer, self._end)
        return done

    def _end(self) -> None:
        _, done = self.queue.pop(0)
        if self.queue:
            self.links.start(self.queue[0][0], self._end)
        done.happen()


@dataclass
class _Stage:
    """Lanes of a stage: what hides in blocks, gradients and parameters, messages nobody waits for."""

    beside: _Lane
    data_parallel: _Lane
    messages: _Lane
    reductions: list[_Signal] = field(default_factory=list)


@dataclass(frozen=True)
class _Piece:
    """Compute of ``seconds`` with transfers beside it, or one transfer in line; ``joins`` what runs beside it.

    ``category`` is where an answer counts the transfer, or the wait for the last that runs beside.
    """

    seconds: float = 0.0
    category: str = ""
    transfer: LinkTransfer | None = None
    beside: tuple[LinkTransfer, ...] = ()
    joins: bool = True


class _Run:
    """One run: a process per stage."""

    def __init__(
        self,
        step: PreparedStep,
        passes: Mapping[PassKey, ChunkPass],
        transfers: StepTransfers,
        faults: Sequence[LinkFault],
        tie_order: TieOrder,
    ) -> None:
        self.step, self.passes, self.nodes = step, passes, step.nodes
        columns = (self.nodes.stage, self.nodes.chunk, self.nodes.phase)
        self.keys: list[PassKey] = list(zip(*(column.tolist() for column in columns), strict=True))
        self.transfers, ports = transfers, transfers.ports
        self.kernel = EventKernel(count(0, -1) if tie_order == "last_in" else None)
        flapping = {
            port: fault.flapping
            for fault in faults
            if fault.flapping
            for port in ports.of(fault.stage, fault.level).tolist()
        }
        capacity = ports.capacity.copy()
        for fault in faults:
            capacity[ports.of(fault.stage, fault.level)] *= fault.fraction
        self.links = SharedLinks(self.kernel, capacity, flapping)
        self.stages = [_Stage(_Lane(self.links), _Lane(self.links), _Lane(self.links)) for _ in range(step.stages)]
        self.ends = step.step_ends()
        self.start_s, self.end_s = np.full((2, len(self.nodes)), np.nan)
        self.finish_s = np.full(step.stages, np.nan)
        self.waited_s = {name: np.zeros(step.stages) for name in CATEGORIES}
        self.arrived = [_Signal() for _ in range(len(self.nodes))]
        self.dependents: dict[int, list[int]] = {}
        for node, needed in enumerate(self.nodes.needs.tolist()):
            self.dependents.setdefault(needed, []).append(node)
        self.pieces: dict[PassKey, list[list[_Piece]]] = {}
        self.last_backward = self._last_backward_shares()

    @property
    def step_time_s(self) -> float:
        """End of the last stage."""
        return float(self.finish_s.max())

    def finish(self) -> None:
        """Run to the end."""
        for node in self.dependents.get(-1, []):
            self.arrived[node].happen()
        for stage in range(self.step.stages):
            self._resume(self._stage_process(stage))
        self.kernel.run()
        self.links.check_idle()
        if np.isnan(self.finish_s).any():
            raise SimulationError("a stage waits for ever")
        self.waited_s["pipeline_bubble"] += self.step_time_s - self.finish_s

    def _wait(self, stage: int, category: str, wait: Wait) -> Process:
        """Wait, and count for what."""
        began = self.kernel.now
        yield wait
        self.waited_s[category][stage] += self.kernel.now - began

    def _resume(self, process: Process) -> None:
        """Let a process go on until it has to wait for something."""

        def go_on() -> None:
            while True:
                wait = next(process, None)
                if wait is None:
                    return
                match wait:
                    case _Signal():
                        if wait.has_happened:
                            continue
                        wait.waiting.append(go_on)
                    case LinkTransfer():
                        self.links.start(wait, go_on)
                    case _:
                        if wait <= 0.0:
                            continue
                        self.kernel.schedule_after(wait, go_on)
                return

        go_on()

    def _last_backward_shares(self) -> dict[int, float]:
        """Last backward pass of each chunk on its stage, and its share in the seconds of the stage's."""
        lasts: dict[tuple[int, int], int] = {}
        for node, (stage, chunk, phase) in enumerate(self.keys):
            if phase not in (FORWARD, WEIGHT_GRADIENT):
                lasts[stage, chunk] = node
        seconds = {node: _own_seconds(self.passes[self.keys[node]]) for node in lasts.values()}
        total = np.zeros(self.step.stages)
        for (stage, _), node in lasts.items():
            total[stage] += seconds[node]
        return {node: seconds[node] / total[stage] for (stage, _), node in lasts.items() if total[stage] > 0.0}

    def _turns(self, stage: int) -> list[list[int]]:
        """Passes of a stage in order; those that run as one together, the forward first."""
        turns, seen = [], set()
        partners, phases = self.nodes.partner.tolist(), self.nodes.phase.tolist()
        for node in np.flatnonzero(self.nodes.stage == stage).tolist():
            if node in seen:
                continue
            turn = [node] if partners[node] < 0 else sorted([node, partners[node]], key=lambda at: phases[at])
            seen.update(turn)
            turns.append(turn)
        return turns

    def _stage_process(self, stage: int) -> Process:
        for turn in self._turns(stage):
            for node in turn:
                yield from self._wait(stage, "pipeline_bubble", self.arrived[node])
            for node in turn:
                self.start_s[node] = self.kernel.now
                self._begin_reduction(stage, node)
                yield from self._pass_process(stage, self.keys[node])
            for node in turn:
                self.end_s[node] = self.kernel.now
                for dependent in self.dependents.get(node, []):
                    self._send(stage, dependent)
        yield from self._end_process(stage, self.ends[stage])
        self.finish_s[stage] = self.kernel.now

    def _send(self, stage: int, dependent: int) -> None:
        """Let a pass that needs this one know, after a transfer if it is on another stage."""
        arrived = self.arrived[dependent]
        if not self.nodes.hops[dependent]:
            arrived.happen()
            return
        exposed, hidden = self.transfers.hop(stage, int(self.nodes.stage[dependent]))

        def arrive() -> None:
            if hidden is not None:
                self.stages[stage].messages.submit(hidden)
            arrived.happen()

        self.links.start(exposed, arrive)

    def _begin_reduction(self, stage: int, node: int) -> None:
        """Start what of the gradients' reduction hides beside a last backward pass."""
        hidden_s = self.ends[stage].hidden_reduction_s * self.last_backward.get(node, 0.0)
        if hidden_s > 0.0:
            lanes = self.stages[stage]
            lanes.reductions.append(lanes.data_parallel.submit(self.transfers.reduction(stage, hidden_s)))

    def _pass_process(self, stage: int, key: PassKey) -> Process:
        part, lanes = self.passes[key], self.stages[stage]
        zero_done = None
        if part.zero_s:
            exposed_s, hidden_s = (float(value.ravel()[0]) for value in zero_parts_s(part))
            yield from self._wait(stage, "data_parallel", self.transfers.pass_state(stage, key[2], exposed_s))
            if hidden_s:
                zero_done = lanes.data_parallel.submit(self.transfers.pass_state(stage, key[2], hidden_s))
        if key not in self.pieces:
            self.pieces[key] = [self._pieces(stage, stretch) for stretch in part.stretches]
        for stretch, pieces in zip(part.stretches, self.pieces[key], strict=True):
            began = self.kernel.now
            for piece in pieces:
                yield from self._piece_process(stage, piece)
            yield from self._wait(stage, "host", began + float(stretch.host_s.ravel()[0]) - self.kernel.now)
            yield stretch.synchronisation_s
        if zero_done is not None and not part.later_s.any():
            yield from self._wait(stage, "data_parallel", zero_done)

    def _piece_process(self, stage: int, piece: _Piece) -> Process:
        done = None
        for transfer in piece.beside:
            done = self.stages[stage].beside.submit(transfer)
        if piece.transfer is not None:
            yield from self._wait(stage, piece.category, piece.transfer)
        else:
            yield piece.seconds
        if done is not None and piece.joins:
            yield from self._wait(stage, piece.category, done)

    def _end_process(self, stage: int, end: StepEnd) -> Process:
        waits: list[Wait] = [
            *self.stages[stage].reductions,
            self.transfers.reduction(stage, end.reduction_s - end.hidden_reduction_s),
            self.transfers.gather(stage, end.gather_s - end.hidden_gather_s),
        ]
        for wait in waits:
            yield from self._wait(stage, "data_parallel", wait)
        yield end.optimizer_s
        yield end.host_s

    def _pieces(self, stage: int, stretch: Stretch) -> list[_Piece]:
        pieces: list[_Piece] = []
        for block in stretch.blocks:
            for scope in block.scopes:
                pieces += self._scope_pieces(stage, scope)
        return pieces

    def _scope_pieces(self, stage: int, scope: Scope) -> list[_Piece]:
        """Runs of compute with what hides under it spread over them, and exposed communication in line."""
        hidden = [(timed, _one(timed.hidden_s)) for timed in scope if _one(timed.hidden_s) > 0.0]
        compute_s = sum(_inline_s(timed) for timed in scope if not _communicates(timed))
        fits = sum(seconds for _, seconds in hidden) <= compute_s * FITS
        pieces: list[_Piece] = []
        run_s = 0.0

        def close_run() -> None:
            nonlocal run_s
            if run_s > 0.0:
                part = run_s / compute_s
                beside = tuple(self.transfers.operation(stage, timed.operation, part * s) for timed, s in hidden)
                category = hidden[-1][0].category if hidden else ""
                pieces.append(_Piece(seconds=run_s, category=category, beside=beside, joins=fits))
            run_s = 0.0

        for timed in scope:
            seconds = _inline_s(timed)
            if not _communicates(timed):
                run_s += seconds
            elif seconds > 0.0:
                close_run()
                transfer = self.transfers.operation(stage, timed.operation, seconds)
                pieces.append(_Piece(category=timed.category, transfer=transfer))
        close_run()
        return pieces


def _one(values: FloatArray) -> float:
    return float(values.ravel()[0])


def _inline_s(timed: TimedOperation) -> float:
    return _one(timed.exposed_s) + _one(timed.extra_s)


def _communicates(timed: TimedOperation) -> bool:
    return timed.operation.stream in COMMUNICATION_STREAMS


def _own_seconds(part: ChunkPass) -> float:
    """Seconds of a pass that nothing slows, weight gradients that run apart included."""
    own_s = _one(part.later_s)
    for stretch in part.stretches:
        work_s = sum(_inline_s(timed) for timed in stretch.operations())
        own_s += max(work_s, _one(stretch.host_s)) + stretch.synchronisation_s
    return own_s
