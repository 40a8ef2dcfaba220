"""Fit the constants of communication libraries to tables of measured collectives, shared ones first.

Every constant is a shared value times a factor per library (a generation of node links, or a network stack). The
factors have priors around one, so that a library with few systems stays near the others of its kind, and one that is
left out entirely gets the shared value; latencies of a library have one free factor in common besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moesim.cost.collective_demands import GroupTraffic
from moesim.cost.communication_libraries import FabricRates, LevelRates, Protocol, library_times
from moesim.study.collective_tables import CollectiveRow
from moesim.study.kernel_tables import BoolArray, FloatArray, IntArray

MICROSECOND = 1e-6
ERROR_SCALE = 0.1
"""|log error| beyond which a row counts linearly."""
SCALE_SPREAD = 0.7
"""Prior of the factor that all latencies of a library share, as a standard deviation of its logarithm."""
SWITCH_S = 1.4e-6
"""Chunk time at which rings leave the quick protocol.

In all tables of A100 to GB300 the jump lies between 1.17 and 1.75 us of the nominal link rate: 0.25-0.5 MiB on A100,
0.5-1 on Hopper, 1-2 on Blackwell, whatever the number of ranks and the collective.
"""
IN_SWITCH_S = 3.3e-6
"""Buffer time at which an all-reduce moves into the switch: between 2.3 and 4.7 us on Hopper and Blackwell."""


@dataclass(frozen=True)
class ConstantPrior:
    """Start, and standard deviations of logarithms: of the shared value, and of the factors per library."""

    start: float
    spread: float
    spread_of_libraries: float
    is_latency: bool = False


NODE_PRIORS: dict[str, ConstantPrior] = {
    "base": ConstantPrior(9.0, 0.7, 0.2, True),
    "round": ConstantPrior(2.0, 0.7, 0.2, True),
    "fraction": ConstantPrior(0.9, 0.3, 0.12),
    "pipelining": ConstantPrior(0.6, 1.0, 0.3),
    "quick_base": ConstantPrior(7.0, 0.7, 0.2, True),
    "quick_round": ConstantPrior(1.1, 0.7, 0.2, True),
    "quick_fraction": ConstantPrior(0.6, 0.5, 0.15),
    "quick_pipelining": ConstantPrior(0.5, 1.0, 0.2),
    "in_switch_base": ConstantPrior(30.0, 0.7, 0.2, True),
    "in_switch_fraction": ConstantPrior(0.63, 0.3, 0.12),
    "in_switch_pipelining": ConstantPrior(1.0, 1.0, 0.3),
    "exchange_base": ConstantPrior(13.0, 0.7, 0.2, True),
    "exchange_peer": ConstantPrior(0.3, 1.0, 0.2, True),
    "exchange_fraction": ConstantPrior(0.85, 0.3, 0.12),
    "exchange_pipelining": ConstantPrior(0.6, 1.0, 0.3),
    "quick_exchange_base": ConstantPrior(8.0, 0.7, 0.2, True),
    "quick_exchange_peer": ConstantPrior(0.3, 1.0, 0.2, True),
    "quick_exchange_fraction": ConstantPrior(0.05, 1.0, 0.3),
    "quick_exchange_pipelining": ConstantPrior(0.3, 1.0, 0.2),
}
"""Latencies in us."""
NETWORK_PRIORS: dict[str, ConstantPrior] = {
    "round": ConstantPrior(14.0, 0.2, 0.3, True),
    "fraction": ConstantPrior(0.92, 0.2, 0.08),
    "pipelining": ConstantPrior(1.5, 0.7, 0.3),
    "quick_round": ConstantPrior(6.0, 0.2, 0.3, True),
    "quick_fraction": ConstantPrior(0.7, 0.7, 0.2),
    "exchange_base": ConstantPrior(28.0, 0.2, 0.3, True),
    "exchange_peer": ConstantPrior(0.2, 1.0, 0.3, True),
    "exchange_fraction": ConstantPrior(0.83, 0.3, 0.12),
    "exchange_pipelining": ConstantPrior(0.7, 0.7, 0.3),
}
PUBLISHED_NETWORK_LATENCIES: dict[str, dict[str, float]] = {
    "efa_v1": {"quick_round": 75.0, "round": 75.0, "exchange_base": 150.0},
    "efa_v2": {"quick_round": 35.0, "round": 35.0, "exchange_base": 70.0},
    "gib": {"quick_round": 25.0, "round": 25.0, "exchange_base": 50.0},
}
"""Centres of the priors of networks other than InfiniBand, us.

InfiniBand's own are NCCL's (src/graph/tuning.cc, NET): 5 and 1 of the NIC for LL, 14 for Simple, twice that where a
send also waits for its receive. EFA: the latency that AWS's plugin states (aws-ofi-nccl, src/platform-aws.cpp: 75 us
for p4d and p4de, 35 for p5en and later). gIB states none: between the two, assumed.
"""
COMMON_PRIORS: dict[str, ConstantPrior] = {
    "own_copy": ConstantPrior(0.52, 0.5, 0.0),
    "torch_start": ConstantPrior(20.0, 0.5, 0.0),
    "legacy_latency": ConstantPrior(1.5, 0.5, 0.0),
}
"""The rank's own copy; a start timed from Python (us); latency of NCCL before its present tuner."""


@dataclass(frozen=True)
class Block:
    """Constants of one kind of library: their names, priors, and the libraries there are."""

    priors: Mapping[str, ConstantPrior]
    libraries: tuple[str, ...]


@dataclass(frozen=True)
class FittedConstants:
    """Constants of node and network libraries: name to library to value (us, fractions), and the common ones.

    A library that is not there has the value under the empty name: what the others share.
    """

    node: Mapping[str, Mapping[str, float]]
    network: Mapping[str, Mapping[str, float]]
    common: Mapping[str, float]


class CollectiveFit:
    """Rows as arrays, and the model over them as a function of the logarithms of the constants."""

    def __init__(self, rows: Sequence[CollectiveRow]) -> None:
        self.rows = rows
        facts = [row.facts for row in rows]
        self.measured_s = np.array([row.measured_s for row in rows])
        self.kinds = np.array([row.kind for row in rows])
        self.systems = np.array([row.system for row in rows])
        self.node = Block(NODE_PRIORS, tuple(sorted({one.library for one in facts})))
        self.network = Block(NETWORK_PRIORS, tuple(sorted({one.network for one in facts} - {""})))
        self._node_index = _indices([one.library for one in facts], self.node.libraries)
        self._network_index = _indices([one.network for one in facts], self.network.libraries)
        self._link = np.array([one.link_bandwidth for one in facts])
        self._nic = np.array([one.nic_bandwidth or 1.0 for one in facts])
        self._is_torch = np.array([one.is_torch_timed for one in facts])
        self._is_legacy = np.array([one.is_legacy for one in facts])
        self._has_nvls = np.array([one.has_nvls for one in facts])
        inside = np.array([float(one.ranks_per_domain) for one in facts])
        self._extents = np.stack([inside, np.array([float(one.domains) for one in facts])])
        self._bytes = np.array([row.num_bytes for row in rows])

    @cached_property
    def spreads(self) -> FloatArray:
        """Standard deviations of the prior of every parameter, (n_parameters,)."""
        found = [prior.spread for prior in COMMON_PRIORS.values()]
        for block in (self.node, self.network):
            found += [prior.spread for prior in block.priors.values()]
            for prior in block.priors.values():
                found += [prior.spread_of_libraries] * len(block.libraries)
            found += [SCALE_SPREAD] * len(block.libraries)
        return np.array(found)

    def constants(self, parameters: FloatArray) -> FittedConstants:
        """Constants in their units of a vector of parameters."""
        common = {
            name: prior.start * float(np.exp(value))
            for (name, prior), value in zip(COMMON_PRIORS.items(), parameters, strict=False)
        }
        position = len(common)
        node, position = _unpack(self.node, parameters, position)
        network, _ = _unpack(self.network, parameters, position)
        return FittedConstants(node, network, common)

    def predict_s(self, constants: FittedConstants, rows: BoolArray | None = None) -> FloatArray:
        """Predicted seconds of all rows, or of the chosen ones."""
        chosen = np.arange(len(self.rows)) if rows is None else np.flatnonzero(rows)
        predicted = np.zeros(len(self.rows))
        for kind in np.unique(self.kinds[chosen]):
            members = chosen[self.kinds[chosen] == kind]
            traffic = GroupTraffic(self._bytes[members], self._extents[:, members])
            fabric = self._fabric(constants, members)
            predicted[members] = library_times(kind, traffic, fabric).modelled_s
        return predicted[chosen]

    def _fabric(self, constants: FittedConstants, members: IntArray) -> FabricRates:
        """Rates with one value per row; bandwidths are in the fractions, so that the levels' own is one."""
        node = _per_row(constants.node, self.node.libraries, self._node_index[members])
        network = _per_row(constants.network, self.network.libraries, self._network_index[members])
        legacy = np.where(self._is_legacy[members], constants.common["legacy_latency"], 1.0) * MICROSECOND
        start = self._is_torch[members] * constants.common["torch_start"] * MICROSECOND
        link, nic = self._link[members], self._nic[members]
        inner = node_level(node, link=link, latency_unit_s=legacy, start_s=start, has_in_switch=self._has_nvls[members])
        outer = network_level(network, nic=nic, latency_unit_s=legacy)
        own_copy = constants.common["own_copy"]
        return FabricRates((inner, outer), 1, own_copy=own_copy, exchange_own_copy=own_copy)

    def fit(
        self, rows: BoolArray | None = None, start: FloatArray | None = None, *, evaluations: int = 30
    ) -> FloatArray:
        """Parameters that fit the chosen rows: least squares of logarithms, robust, with the priors as residuals."""
        from scipy.optimize import least_squares

        chosen = np.ones(len(self.rows), dtype=bool) if rows is None else rows
        x0 = np.zeros(len(self.spreads)) if start is None else start
        log_measured = np.log(self.measured_s[chosen])

        def residuals(parameters: FloatArray) -> FloatArray:
            predicted = self.predict_s(self.constants(parameters), chosen)
            error = (np.log(predicted) - log_measured) / ERROR_SCALE
            robust = np.sign(error) * np.sqrt(2.0 * (np.sqrt(1.0 + error**2) - 1.0))
            return np.concatenate([robust, parameters / self.spreads])

        def jacobian(parameters: FloatArray) -> FloatArray:
            return self._jacobian(residuals, parameters, chosen)

        result = least_squares(residuals, x0, jac=jacobian, x_scale=self.spreads, method="lm", max_nfev=evaluations)
        return np.asarray(result.x)

    def _jacobian(
        self, residuals: Callable[[FloatArray], FloatArray], parameters: FloatArray, chosen: BoolArray
    ) -> FloatArray:
        """Differences; all libraries' factors of a constant move at once, since a row has one library of each kind."""
        base = residuals(parameters)
        count = int(chosen.sum())
        jacobian = np.zeros((len(base), len(parameters)))
        jacobian[count:] = np.diag(1.0 / self.spreads)
        step = 1e-4
        for place in range(len(COMMON_PRIORS)):
            moved = parameters.copy()
            moved[place] += step
            jacobian[:count, place] = (residuals(moved)[:count] - base[:count]) / step
        position = len(COMMON_PRIORS)
        for block, index in ((self.node, self._node_index), (self.network, self._network_index)):
            libraries = index[chosen]
            number = len(block.libraries)
            scale = position + len(block.priors) * (1 + number)
            for place, prior in enumerate(block.priors.values()):
                moved = parameters.copy()
                moved[position + place] += step
                slope = (residuals(moved)[:count] - base[:count]) / step
                jacobian[:count, position + place] = slope
                first = position + len(block.priors) + place * number
                for library in range(number):
                    own = slope * (libraries == library)
                    jacobian[:count, first + library] = own
                    if prior.is_latency:
                        jacobian[:count, scale + library] += own
            position = scale + number
        return jacobian


def _indices(names: Sequence[str], libraries: Sequence[str]) -> IntArray:
    """Position of each row's library; those of no library have -1, which no library equals."""
    return np.array([libraries.index(name) if name in libraries else -1 for name in names])


def _unpack(block: Block, parameters: FloatArray, position: int) -> tuple[dict[str, dict[str, float]], int]:
    number, kinds = len(block.libraries), len(block.priors)
    shared = parameters[position : position + kinds]
    position += kinds
    factors = parameters[position : position + kinds * number].reshape(kinds, number)
    position += kinds * number
    scales = parameters[position : position + number]
    found: dict[str, dict[str, float]] = {}
    for place, (name, prior) in enumerate(block.priors.items()):
        logs = shared[place] + factors[place] + (scales if prior.is_latency else 0.0)
        found[name] = {"": prior.start * float(np.exp(shared[place]))}
        for library, value in zip(block.libraries, logs, strict=True):
            start = PUBLISHED_NETWORK_LATENCIES.get(library, {}).get(name, prior.start)
            found[name][library] = start * float(np.exp(value))
        if name.endswith("fraction"):
            found[name] = {library: min(value, 1.0) for library, value in found[name].items()}
    return found, position + number


def _per_row(
    constants: Mapping[str, Mapping[str, float]], libraries: Sequence[str], index: IntArray
) -> dict[str, FloatArray]:
    """Values of each row's library; what the others share where it has none, or none that was fitted."""
    return {
        name: np.array([*(values.get(library, values[""]) for library in libraries), values[""]])[index]
        for name, values in constants.items()
    }


def node_level(
    values: Mapping[str, FloatArray],
    *,
    link: FloatArray,
    latency_unit_s: FloatArray,
    start_s: FloatArray,
    has_in_switch: BoolArray,
) -> LevelRates:
    """Rates of a node's links, one value per row; ``link`` bytes/s is part of the fractions."""

    def protocol(prefix: str) -> Protocol:
        return Protocol(
            base_s=values[f"{prefix}base"] * latency_unit_s + start_s,
            round_s=values.get(f"{prefix}round", link * 0.0) * latency_unit_s,
            peer_s=values.get(f"{prefix}peer", link * 0.0) * latency_unit_s,
            doubling_s=link * 0.0,
            fraction=values[f"{prefix}fraction"] * link,
            pipelining=values[f"{prefix}pipelining"],
        )

    in_switch = protocol("in_switch_")
    fraction = np.where(has_in_switch, in_switch.fraction, 1e-3)
    return LevelRates(
        name="node",
        size=1,
        bandwidth=1.0,
        is_ring=False,
        wraps=False,
        all_to_all_wraps=False,
        hop_latency_s=0.0,
        reduction=protocol(""),
        exchange=protocol("exchange_"),
        message=protocol("exchange_"),
        quick_reduction=protocol("quick_"),
        quick_exchange=protocol("quick_exchange_"),
        in_switch=Protocol(
            in_switch.base_s, link * 0.0, link * 0.0, link * 0.0, fraction=fraction, pipelining=in_switch.pipelining
        ),
        switch_s=SWITCH_S * link,
        in_switch_s=IN_SWITCH_S * link,
    )


def network_level(values: Mapping[str, FloatArray], *, nic: FloatArray, latency_unit_s: FloatArray) -> LevelRates:
    """Rates of a network, one value per row; ``nic`` bytes/s is part of the fractions."""
    nothing = nic * 0.0
    reduction, quick = (
        Protocol(
            nothing,
            values[f"{prefix}round"] * latency_unit_s,
            nothing,
            nothing,
            fraction=values[f"{prefix}fraction"] * nic,
            pipelining=values["pipelining"],
        )
        for prefix in ("", "quick_")
    )
    exchange = Protocol(
        values["exchange_base"] * latency_unit_s,
        nothing,
        values["exchange_peer"] * latency_unit_s,
        nothing,
        fraction=values["exchange_fraction"] * nic,
        pipelining=values["exchange_pipelining"],
    )
    return LevelRates(
        name="network",
        size=1,
        bandwidth=1.0,
        is_ring=False,
        wraps=False,
        all_to_all_wraps=False,
        hop_latency_s=0.0,
        reduction=reduction,
        exchange=exchange,
        message=exchange,
        quick_reduction=quick,
    )
