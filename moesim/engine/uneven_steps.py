"""Steps of one scenario in an uneven world: loads drawn, devices and links slow, hosts late; all ranks, many draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moesim.describe.perturbations import Perturbations
from moesim.engine.analytical import System
from moesim.engine.drawn_loads import DrawnLoads, drawn_drops, drawn_loads, with_even_loads
from moesim.engine.event_driven import RankDelays, SimulatedRun, joined_runs, run_step
from moesim.engine.memory_timeline import stage_contents
from moesim.engine.slow_links import Factors, SlowLinks
from moesim.engine.step_passes import PreparedStep, prepare_step
from moesim.engine.uneven_world import device_factors, host_jitter_s, link_factors
from moesim.structure.activations_in_flight import held_at_once
from moesim.structure.columns import Columns, FloatArray
from moesim.structure.loaded_memory import loaded_peaks
from moesim.structure.lowering import LoweringContext

CELLS_AT_ONCE = 32_000_000
"""Numbers drawn for the ranks, layers and passes of the draws that are prepared together: 256 MB."""
GROWING_OPERATIONS = 24
"""About as many operations of a layer have seconds that grow with load."""


@dataclass(frozen=True)
class UnevenRun:
    """Some draws of a step, arrays (n_draws,) but for the run's.

    Attributes
    ----------
    run : SimulatedRun
        With loads drawn and everything slow that is.
    drawn_s : ndarray
        Step times at the same loads, with nothing slow.
    max_over_mean : ndarray
        Rows of the fullest rank over the mean, averaged over MoE layers.
    dropped_fraction : ndarray
        Share of the assignments that experts' slots drop.
    peak_bytes : ndarray
        Memory of the fullest rank.
    """

    run: SimulatedRun
    drawn_s: FloatArray
    max_over_mean: FloatArray
    dropped_fraction: FloatArray
    peak_bytes: FloatArray


class UnevenSteps:
    """A scenario prepared once, at mean load and with nothing slow, and the draws that differ from it.

    Parameters
    ----------
    system : System
        Scenario, profiles and rates; loads are drawn by the scenario's imbalance.
    columns : Columns
        Resolved and legal, one row.
    perturbations : Perturbations, optional
        What is slow or late.
    seed : int
        Of everything drawn. A draw is a step; what a step draws depends on nothing but seed and number.
    """

    def __init__(
        self, system: System, columns: Columns, perturbations: Perturbations | None = None, *, seed: int = 0
    ) -> None:
        self.step = prepare_step(with_even_loads(system), columns)
        self.perturbations = perturbations or Perturbations()
        self.seed = seed
        self._slower_steps: dict[Factors, PreparedStep] = {}

    @cached_property
    def even(self) -> SimulatedRun:
        """The step at mean load on every rank, with nothing slow; one draw."""
        return run_step(self.step)

    @property
    def num_ranks(self) -> int:
        """Ranks of all stages."""
        return self.step.stages * self.step.ranks.count

    def run(self, draws: Sequence[int], timeline_ranks: Sequence[int] = ()) -> UnevenRun:
        """Simulate some draws.

        Parameters
        ----------
        draws : sequence of int
            Numbers of the steps, at least one.
        timeline_ranks : sequence of int
            Global ranks to record in the first of them.

        Returns
        -------
        UnevenRun
            One entry for each draw.
        """
        parts = [
            self._run_batch(batch, timeline_ranks if index == 0 else ())
            for index, batch in enumerate(self._batches(draws))
        ]
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("drawn_s", "max_over_mean", "dropped_fraction", "peak_bytes")
        }
        runs = [part.run for part in parts]
        return UnevenRun(run=runs[0] if len(runs) == 1 else joined_runs(runs), **arrays)

    def _batches(self, draws: Sequence[int]) -> Iterator[Sequence[int]]:
        """Draws that are prepared together; with flapping links, whose bandwidth is a draw's own, one by one."""
        layers = len(self.step.sequence.order) + self.step.sequence.mtp_layers
        cells = layers * GROWING_OPERATIONS * self.step.ranks.count
        if self.perturbations.host_jitter_s:
            cells += self.num_ranks * self.step.passes_per_rank
        at_once = 1 if self.perturbations.flapping_links else max(CELLS_AT_ONCE // cells, 1)
        for first in range(0, len(draws), at_once):
            yield draws[first : first + at_once]

    def _run_batch(self, draws: Sequence[int], timeline_ranks: Sequence[int]) -> UnevenRun:
        step, directions = self.step, self.step.evaluation.plan.placed.directions
        system, columns, sequence = step.system, step.columns, step.sequence
        loads = drawn_loads(system, columns, sequence, steps=draws, seed=self.seed, directions=directions)
        seconds = [loads.seconds(system.hardware, direction) for direction in range(directions)]
        delays = self._delays(draws, loads)
        run = run_step(step, loads=seconds, delays=delays, timeline_ranks=timeline_ranks)
        is_even = not loads.kinds
        if not delays.draws:
            drawn_s = run.step_time_s
        else:
            drawn_s = self.even.step_time_s if is_even else run_step(step, loads=seconds).step_time_s
        count = len(draws)
        return UnevenRun(
            run=_for_all(run, count),
            drawn_s=_repeated(drawn_s, count),
            max_over_mean=_repeated(loads.max_over_mean(), count),
            dropped_fraction=drawn_drops(system, columns, sequence, steps=draws, seed=self.seed),
            peak_bytes=_repeated(self._peak_bytes(loads), count),
        )

    @cached_property
    def _device_factors(self) -> FloatArray | None:
        factors = device_factors(self.perturbations, self.num_ranks, self.seed)
        return factors if (factors != 1).any() else None

    def _delays(self, draws: Sequence[int], loads: DrawnLoads) -> RankDelays:
        late_s = None
        if self.perturbations.host_jitter_s:
            shape = (self.num_ranks, self.step.passes_per_rank)
            late_s = host_jitter_s(self.perturbations, shape, steps=draws, seed=self.seed)
        return RankDelays(self._device_factors, late_s, self._links(draws, loads))

    def _links(self, draws: Sequence[int], loads: DrawnLoads) -> SlowLinks | None:
        """Links of a batch; those that flap have one draw in it."""
        if not (self.perturbations.slow_links or self.perturbations.flapping_links):
            return None
        factors = link_factors(
            self.perturbations,
            self.step.system.hardware.fabric,
            self.num_ranks,
            steps=draws,
            seed=self.seed,
            step_s=float(self.even.step_time_s[0]),
        )
        return SlowLinks(self.step, loads, factors[0], self._slower_steps)

    def _peak_bytes(self, loads: DrawnLoads) -> FloatArray:
        """Memory of the fullest rank in each draw: that of the memory model at mean load, and what loads add."""
        step, plan = self.step, self.step.evaluation.plan
        balance, even = step.evaluation.memory, step.evaluation.memory.stage_bytes(0)
        context = LoweringContext(step.system.scenario, step.system.stack, step.columns)
        schedule = step.system.scenario.parallelism.pipeline.schedule
        micro_batches = round(float(step.columns["num_micro_batches"][0]))
        if step.is_training:
            moments = held_at_once(schedule, plan.stages, plan.virtual_stages, micro_batches)
        else:
            moments = (np.zeros((1, plan.placed.held.shape[1] + 1)),) * plan.stages
        contents = stage_contents(step.system, step.columns, step.evaluation)
        most = []
        for stage, held in enumerate(plan.placed.held.tolist()):
            kept, loss = contents[stage].kept[held], contents[stage].loss
            chunks = [list(self._layers_of(stage, chunk, loads)) for chunk in held]
            found = loaded_peaks(context, step.sequence, chunks, moments[stage], (kept, loss))
            mean = float((moments[stage] @ np.append(kept, loss)).max())
            most.append(even[stage] - mean + found.max(axis=1))
        largest = np.stack(np.broadcast_arrays(*most)).max(axis=0)
        return np.asarray(balance.fixed + largest * (1.0 + balance.fragmentation_fraction))

    def _layers_of(self, stage: int, chunk: int, loads: DrawnLoads) -> Iterator[tuple[int, FloatArray]]:
        """Layers of a chunk of a stage, modules of token prediction last, and rows of its ranks over their mean."""
        sequence = self.step.sequence
        modules = sequence.mtp_layers if self.step.is_training else 0
        direction, held = self.step.direction(stage, chunk), self.step.chunks[chunk]
        numbers = [layer.number for layer in held.layers]
        numbers += [len(sequence.order) + module for module in range(modules if held.is_last else 0)]
        for number in numbers:
            yield number, loads.rows_factor(number, direction)


def _repeated(values: FloatArray, count: int) -> FloatArray:
    """Values of every draw, where one may stand for all."""
    return values if len(values) == count else np.repeat(values, count, axis=0)


def _for_all(run: SimulatedRun, count: int) -> SimulatedRun:
    """A run with every draw, where one may stand for all."""
    if len(run.step_time_s) == count:
        return run
    return replace(
        run,
        step_time_s=_repeated(run.step_time_s, count),
        pipeline_finish_s=_repeated(run.pipeline_finish_s, count),
        finish_s=_repeated(run.finish_s, count),
        exposed_s={name: _repeated(part, count) for name, part in run.exposed_s.items()},
        hidden_s={name: _repeated(part, count) for name, part in run.hidden_s.items()},
    )
