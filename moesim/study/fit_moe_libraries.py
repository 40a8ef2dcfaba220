"""Fit the constants of MoE dispatch and combine kernels, by library, with priors shared by kernels of a kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.cost.collective_demands import GroupTraffic
from moesim.cost.communication_libraries import FabricRates, LevelRates, Protocol, library_times
from moesim.structure.step_graph import RoutedCopies
from moesim.study.collective_tables import CHOICES, NODE_LIMIT, CollectiveRow
from moesim.study.fit_collectives import ERROR_SCALE, MICROSECOND, ConstantPrior
from moesim.study.kernel_tables import BoolArray, FloatArray, IntArray

LEVELS_EXPONENT = 2.0
"""The senders of one kernel feed NVLink and NICs: neither beside each other nor one after the other."""


@dataclass(frozen=True)
class KernelKind:
    """How kernels of a kind move tokens: the algorithm of the demand, and what one token is sent to."""

    algorithm: str
    copies: RoutedCopies | None
    start: Mapping[str, float]


_EVERY_CHOICE = {"base": 16.0, "doubling": 15.0, "fraction": 0.6, "network_fraction": 0.8, "pipelining": 0.2}
KERNEL_KINDS: dict[str, KernelKind] = {
    "normal": KernelKind(
        "rail_aligned",
        RoutedCopies(float(CHOICES), float(NODE_LIMIT)),
        {"base": 35.0, "doubling": 25.0, "fraction": 0.8, "network_fraction": 0.95, "pipelining": 0.35},
    ),
    "low_latency": KernelKind("direct", None, _EVERY_CHOICE),
    "low_latency_per_node": KernelKind("direct", RoutedCopies(float(CHOICES), np.inf), _EVERY_CHOICE),
    "one_domain": KernelKind(
        "direct",
        RoutedCopies(float(CHOICES), np.inf),
        {
            "base": 14.0,
            "doubling": 15.0,
            "fraction": 0.6,
            "network_fraction": 0.8,
            "pipelining": 0.15,
            "combine_peer": 0.2,
        },
    ),
}
"""Normal kernels send one copy per node and forward it; low-latency ones every choice by itself (MORI: one per node);
those of one NVLink domain one per device."""
KIND_OF_LIBRARY: dict[str, str] = {
    "deepep_normal": "normal",
    "uccl_normal_efa": "normal",
    "uccl_normal_ib": "normal",
    "deepep_ll": "low_latency",
    "deepep_ll_rdma": "low_latency",
    "uccl_ll_efa": "low_latency",
    "uccl_ll_ib": "low_latency",
    "pplx_nvlink": "low_latency",
    "pplx_ibgda": "low_latency",
    "pplx_ibrc": "low_latency",
    "mori_ll": "low_latency_per_node",
    "trtllm_two_sided": "one_domain",
    "trtllm_one_sided": "one_domain",
}
PRIORS: dict[str, ConstantPrior] = {
    "base": ConstantPrior(1.0, 0.3, 0.4),
    "doubling": ConstantPrior(1.0, 0.4, 0.8),
    "fraction": ConstantPrior(1.0, 0.2, 0.25),
    "network_fraction": ConstantPrior(1.0, 0.3, 0.5),
    "pipelining": ConstantPrior(1.0, 0.7, 0.5),
    "own_copy": ConstantPrior(0.7, 0.5, 0.5),
    "combine_latency": ConstantPrior(1.0, 0.3, 0.3),
    "combine_peer": ConstantPrior(0.01, 0.5, 0.5),
    "combine_fraction": ConstantPrior(0.9, 0.1, 0.15),
}
"""Priors of the logarithms about the start of the kind: of what a kind shares, and of its libraries."""


@dataclass(frozen=True)
class MoeConstants:
    """Constants of kernel libraries, us and fractions: name to library to value."""

    values: Mapping[str, Mapping[str, float]]


class MoeFit:
    """Dispatch and combine rows as arrays, and the model over them."""

    def __init__(self, rows: Sequence[CollectiveRow]) -> None:
        self.rows = rows
        self.measured_s = np.array([row.measured_s for row in rows])
        self.tables = np.array([row.table for row in rows])
        self.libraries = tuple(KIND_OF_LIBRARY)
        self._library = np.array([self.libraries.index(row.moe_library) for row in rows])
        self._is_combine = np.array([row.kind == "combine" for row in rows])
        self._bytes = np.array([row.num_bytes for row in rows])
        self._link = np.array([row.facts.link_bandwidth for row in rows])
        self._nic = np.array([row.facts.nic_bandwidth or 1.0 for row in rows])
        inside = np.array([float(row.facts.ranks_per_domain) for row in rows])
        self._extents = np.stack([inside, np.array([float(row.facts.domains) for row in rows])])
        kinds = tuple(KERNEL_KINDS)
        self._kind_of_library = np.array([kinds.index(KIND_OF_LIBRARY[name]) for name in self.libraries])
        self.spreads = np.concatenate(
            [
                np.repeat([p.spread for p in PRIORS.values()], len(kinds)),
                np.repeat([p.spread_of_libraries for p in PRIORS.values()], len(self.libraries)),
            ]
        )

    def constants(self, parameters: FloatArray) -> MoeConstants:
        """Constants in their units of a vector of logarithms."""
        number, kinds = len(PRIORS), len(KERNEL_KINDS)
        shared = parameters[: number * kinds].reshape(number, kinds)
        own = parameters[number * kinds :].reshape(number, len(self.libraries))
        logs = shared[:, self._kind_of_library] + own
        values: dict[str, dict[str, float]] = {}
        for place, name in enumerate(PRIORS):
            values[name] = {}
            for library, value in zip(self.libraries, logs[place], strict=True):
                start = KERNEL_KINDS[KIND_OF_LIBRARY[library]].start.get(name, PRIORS[name].start)
                found = start * float(np.exp(value))
                values[name][library] = min(found, 1.0) if name.endswith("fraction") else found
        return MoeConstants(values)

    def predict_s(self, constants: MoeConstants, rows: BoolArray | None = None) -> FloatArray:
        """Predicted seconds of all rows, or of the chosen ones."""
        chosen = np.arange(len(self.rows)) if rows is None else np.flatnonzero(rows)
        predicted = np.zeros(len(self.rows))
        kind_of_row = self._kind_of_library[self._library]
        for index, kind in enumerate(KERNEL_KINDS.values()):
            members = chosen[kind_of_row[chosen] == index]
            if len(members):
                traffic = GroupTraffic(self._bytes[members], self._extents[:, members], kind.copies)
                fabric = self._fabric(constants, members, kind.algorithm)
                predicted[members] = library_times("all_to_all", traffic, fabric).modelled_s
        return predicted[chosen]

    def _fabric(self, constants: MoeConstants, members: IntArray, algorithm: str) -> FabricRates:
        library, combines = self._library[members], self._is_combine[members]
        values = {
            name: np.array([by_library.get(one, np.nan) for one in self.libraries])[library]
            for name, by_library in constants.values.items()
        }
        unit_s = np.where(combines, values["combine_latency"], 1.0) * MICROSECOND
        network = values["network_fraction"] * np.where(combines, values["combine_fraction"], 1.0)
        nothing = unit_s * 0.0
        inner = Protocol(
            values["base"] * unit_s,
            nothing,
            np.where(combines, values["combine_peer"], 0.0) * MICROSECOND,
            nothing,
            fraction=values["fraction"] * self._link[members],
            pipelining=values["pipelining"],
        )
        outer = Protocol(
            nothing,
            nothing,
            nothing,
            values["doubling"] * unit_s,
            fraction=network * self._nic[members],
            pipelining=values["pipelining"],
        )
        levels = tuple(
            LevelRates(name, 1, 1.0, False, False, False, 0.0, protocol, protocol, protocol)
            for name, protocol in (("node", inner), ("network", outer))
        )
        return FabricRates(
            levels,
            1,
            exchange_own_copy=values["own_copy"],
            exchange_algorithm=algorithm,
            levels_exponent=LEVELS_EXPONENT,
        )

    def fit(
        self, rows: BoolArray | None = None, start: FloatArray | None = None, *, evaluations: int = 20
    ) -> FloatArray:
        """Parameters that fit the chosen rows, robustly, with the priors as residuals."""
        from scipy.optimize import least_squares

        chosen = np.ones(len(self.rows), dtype=bool) if rows is None else rows
        log_measured = np.log(self.measured_s[chosen])

        def residuals(parameters: FloatArray) -> FloatArray:
            error = (np.log(self.predict_s(self.constants(parameters), chosen)) - log_measured) / ERROR_SCALE
            robust = np.sign(error) * np.sqrt(2.0 * (np.sqrt(1.0 + error**2) - 1.0))
            return np.concatenate([robust, parameters / self.spreads])

        def jacobian(parameters: FloatArray) -> FloatArray:
            base, step = residuals(parameters), 1e-4
            columns = np.zeros((len(base), len(parameters)))
            columns[len(log_measured) :] = np.diag(1.0 / self.spreads)
            kinds, libraries = len(KERNEL_KINDS), len(self.libraries)
            own_library = self._library[chosen]
            own_kind = self._kind_of_library[own_library]
            for place in range(len(PRIORS)):
                moved = parameters.copy()
                moved[place * kinds : (place + 1) * kinds] += step
                slope = ((residuals(moved) - base) / step)[: len(log_measured)]
                for kind in range(kinds):
                    columns[: len(slope), place * kinds + kind] = slope * (own_kind == kind)
                first = len(PRIORS) * kinds + place * libraries
                for library in range(libraries):
                    columns[: len(slope), first + library] = slope * (own_library == library)
            return columns

        x0 = np.zeros(len(self.spreads)) if start is None else start
        result = least_squares(residuals, x0, jac=jacobian, method="lm", x_scale=self.spreads, max_nfev=evaluations)
        return np.asarray(result.x)
