"""Seconds of the operations that grow with routed load, at the load of each rank, layer and draw.

Loads repeat: rows are whole numbers, and all operations of a table have the same few thousand. Each distinct load is
priced once, by the price functions of ``operators``, and gathered where it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moesim.cost.operators import Hardware, loaded_work, price_all
from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.step_graph import Operation
from moesim.structure.token_loads import RankLoads

LoadKind = Literal["rows", "moved", "exchanged"]
LOAD_KINDS: tuple[LoadKind, ...] = ("rows", "moved", "exchanged")


def load_kind(operation: Operation) -> LoadKind | None:
    """Which of a rank's loads an operation grows with; None for an operation that does not grow.

    All-to-alls with the rows of their busiest rank, sorting rows with those sent and received, all else (GEMMs,
    activations, casts, gathers of an expert-tensor group) with the rows of the local experts.
    """
    if operation.load_factor is None:
        return None
    if operation.stream == "all_to_all":
        return "exchanged"
    return "moved" if operation.category == "dispatch_combine" else "rows"


@dataclass(frozen=True)
class LoadedTimes:
    """Seconds of a table's growing operations on the ranks of a stage.

    Attributes
    ----------
    kinds : mapping of int to str
        Load that each growing operation, by its position in the table, grows with.
    priced_s : mapping of int to ndarray of shape (n_distinct,)
        Seconds of each at the distinct loads of its kind.
    inverse : mapping of str to ndarray of shape (n_layers, n_draws, n_ranks)
        Position of every load among the distinct ones.
    """

    kinds: Mapping[int, LoadKind]
    priced_s: Mapping[int, FloatArray]
    inverse: Mapping[LoadKind, IntArray]

    def seconds(self, operation: int, layer: int) -> FloatArray:
        """Seconds of an operation in one layer, shape (n_draws, n_ranks); (1, 1) where all loads are even.

        Parameters
        ----------
        operation : int
            Position in the table.
        layer : int
            Position among the layers that the loads were drawn for.
        """
        at = self.inverse[self.kinds[operation]]
        return np.asarray(self.priced_s[operation][at[min(layer, len(at) - 1)]])


def loaded_times(operations: Sequence[Operation], loads: RankLoads, hardware: Hardware) -> LoadedTimes:
    """Price the growing operations of a table, lowered for one case, at all loads.

    Parameters
    ----------
    operations : sequence of Operation
        Those of a table; arrays of shape (1,).
    loads : RankLoads
        Of the ranks of a stage.
    hardware : Hardware
        Rates.

    Returns
    -------
    LoadedTimes
        At a load of 1 exactly the seconds of ``operators.price`` at mean load.
    """
    kinds = {index: kind for index, row in enumerate(operations) if (kind := load_kind(row)) is not None}
    levels: dict[LoadKind, FloatArray] = {}
    inverse: dict[LoadKind, IntArray] = {}
    for kind in dict.fromkeys(kinds.values()):
        values = getattr(loads, kind)
        levels[kind], index = np.unique(values, return_inverse=True)
        inverse[kind] = index.reshape(values.shape)
    loaded = [
        replace(operations[index], work=loaded_work(operations[index].work, levels[kind]), load_factor=None)
        for index, kind in kinds.items()
    ]
    priced = {index: cost.time_s for index, cost in zip(kinds, price_all(loaded, hardware), strict=True)}
    return LoadedTimes(kinds, priced, inverse)
