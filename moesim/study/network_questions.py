"""What ``moesim network`` is asked: a collective of some ranks of a cluster at some sizes; all problems at once."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from moesim.cost.algorithm_choice import ideal_fabric, link_style, runnable_algorithms
from moesim.cost.collective_algorithms import algorithms_of
from moesim.cost.collective_demands import Fabric
from moesim.cost.collectives import required_tiers
from moesim.describe.hardware import Cluster, Device, HierarchicalFabric, Stack
from moesim.describe.hardware_library import HardwareLibrary
from moesim.errors import MoesimError, Problem, ScenarioError, UnitError, nearest_name
from moesim.structure.columns import FloatArray
from moesim.structure.group_layouts import GroupLayout
from moesim.structure.placement import ProcessGroup, group_extents
from moesim.structure.step_graph import CollectiveKind
from moesim.units import parse_quantity

EngineName = Literal["closed", "flow"]
AUTO = "auto"
DEFAULT_SIZES = "1KiB..1GiB"
MOST_SIZES = 64
KIND_NAMES: dict[str, CollectiveKind] = {
    **{kind: kind for kind in get_args(CollectiveKind)},
    "alltoall": "all_to_all",
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reducescatter": "reduce_scatter",
    "sendrecv": "point_to_point",
}
"""Names of collectives: moesim's, and those of nccl-tests."""


@dataclass(frozen=True)
class NetworkQuestion:
    """Options as given; nothing is checked yet."""

    profile: str
    collective: str
    ranks: int
    sizes: str = DEFAULT_SIZES
    algorithm: str = AUTO
    stack: str | None = None
    engine: str = "closed"
    token_matrix: Path | None = None


@dataclass(frozen=True)
class NetworkCase:
    """A question that makes sense.

    ``extents`` (n_levels,) of the group on the fabric's levels; ``sizes`` (n_sizes,) in bytes, as nccl-tests counts
    them; ``shares`` (ranks, ranks), mean row sum 1, where a token matrix gives the bytes of each pair.
    """

    cluster: Cluster
    device: Device
    stack: Stack | None
    fabric: Fabric
    kind: CollectiveKind
    ranks: int
    extents: FloatArray
    sizes: FloatArray
    algorithm: str
    engine: EngineName
    shares: FloatArray | None

    @property
    def layout(self) -> GroupLayout:
        """Where the ranks stand, for plans."""
        levels, extents = self.fabric.levels, [int(extent) for extent in self.extents]
        wraps = [level.all_to_all_wraps if self.kind == "all_to_all" else level.wraps for level in levels]
        closes = tuple(
            wrap and extent >= level.size for wrap, extent, level in zip(wraps, extents, levels, strict=True)
        )
        return GroupLayout(tuple(extents), tuple(level.is_ring for level in levels), closes)


def read_question(question: NetworkQuestion, library: HardwareLibrary) -> NetworkCase:
    """Check a question against the hardware library.

    Parameters
    ----------
    question : NetworkQuestion
        What was asked.
    library : HardwareLibrary
        Profiles by name.

    Returns
    -------
    NetworkCase
        What to compute.

    Raises
    ------
    ScenarioError
        With every problem: names that do not exist, ranks that do not fit, sizes that are none.
    """
    problems: list[Problem] = []
    cluster, device = _cluster(question.profile, library, problems)
    stack = _stack(question.stack, library, cluster, problems)
    kind = KIND_NAMES.get(question.collective)
    if kind is None:
        problems.append(_unknown("collective", question.collective, list(get_args(CollectiveKind))))
    if question.engine not in get_args(EngineName):
        problems.append(_unknown("engine", question.engine, list(get_args(EngineName))))
    sizes = read_sizes(question.sizes, problems)
    fabric = None
    if cluster is not None and device is not None:
        fabric = ideal_fabric(cluster, device)
        _check_wires(cluster, device, problems)
    extents = _extents(question.ranks, cluster, fabric, problems)
    _check_algorithm(question, kind, fabric, problems)
    shares = _shares(question, kind, problems)
    if problems or cluster is None or device is None or fabric is None or kind is None or extents is None:
        raise ScenarioError(problems)
    engine: EngineName = "flow" if question.engine == "flow" else "closed"
    return NetworkCase(
        cluster, device, stack, fabric, kind, question.ranks, extents, sizes, question.algorithm, engine, shares
    )


def read_sizes(text: str, problems: list[Problem]) -> FloatArray:
    """Sizes in bytes: one, a list with commas, or a range ``A..B`` that doubles; problems are added.

    Examples
    --------
    >>> read_sizes("1KiB..8KiB", []).tolist()
    [1024.0, 2048.0, 4096.0, 8192.0]
    >>> read_sizes("1kB,5kB", []).tolist()
    [1000.0, 5000.0]
    """
    before = len(problems)
    ends = [_size(part, problems) for part in text.split("..")] if ".." in text else []
    listed = [] if ends else [_size(part, problems) for part in text.split(",")]
    if len(problems) > before:
        return np.zeros(0)
    if not ends:
        return np.array(listed)
    if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
        remedy = "give a range from a size above zero to one that is not smaller, such as 1KiB..1GiB"
        message = f"the range of sizes {text!r} does not go up"
        problems.append(Problem(code="E-SCN-007", message=message, remedy=remedy, field="sizes"))
        return np.zeros(0)
    count = int(np.floor(np.log2(ends[1] / ends[0]) + 1e-9)) + 1
    if count > MOST_SIZES:
        message, remedy = f"the range {text!r} has {count} sizes", f"ask for at most {MOST_SIZES}"
        problems.append(Problem(code="E-SCN-007", message=message, remedy=remedy, field="sizes"))
    return np.asarray(ends[0] * 2.0 ** np.arange(count))


def _size(text: str, problems: list[Problem]) -> float:
    try:
        return parse_quantity(text.strip(), "bytes")
    except UnitError as error:
        problems.append(Problem(code=error.code, message=error.message, remedy=error.remedy, field="sizes"))
        return 0.0


def _unknown(field: str, found: str, legal: Sequence[str]) -> Problem:
    near = nearest_name(found, legal)
    hint = f"did you mean {near!r}? " if near else ""
    return Problem(
        code="E-SCN-010",
        message=f"no {field} is called {found!r}",
        remedy=f"{hint}there are {', '.join(legal)}",
        field=field,
    )


def _cluster(
    name: str, library: HardwareLibrary, problems: list[Problem]
) -> tuple[Cluster, Device] | tuple[None, None]:
    try:
        is_file = Path(name).suffix in (".yaml", ".yml")
        cluster = library.cluster_file(Path(name)) if is_file else library.cluster(name)
        return cluster, library.device(cluster.device)
    except MoesimError as error:
        problems += error.problems
        return None, None


def _check_wires(cluster: Cluster, device: Device, problems: list[Problem]) -> None:
    """Links that a profile spells out must join all devices, whichever engine is asked."""
    fabric = cluster.fabric
    if not isinstance(fabric, HierarchicalFabric) or all(level.wiring is None for level in fabric.levels):
        return
    from moesim.structure.topology_builders import build_topology

    try:
        build_topology(cluster, device)
    except ScenarioError as error:
        problems += error.problems


def _stack(
    name: str | None, library: HardwareLibrary, cluster: Cluster | None, problems: list[Problem]
) -> Stack | None:
    if name is None:
        return None
    try:
        stack = library.stack(name)
    except MoesimError as error:
        problems += error.problems
        return None
    missing = sorted(required_tiers(cluster) - set(stack.collectives)) if cluster is not None else []
    if missing:
        message = f"stack {name!r} says nothing of {', '.join(missing)} links, which the cluster has"
        problems.append(Problem(code="E-SCN-011", message=message, remedy="choose another stack", field="stack"))
    return stack


def _extents(ranks: int, cluster: Cluster | None, fabric: Fabric | None, problems: list[Problem]) -> FloatArray | None:
    """Members of the group on each level; whole blocks only, so that every rank sees the same network."""
    if ranks < 2:
        message, remedy = f"a collective of {ranks} ranks", "give at least 2"
        problems.append(Problem(code="E-NET-003", message=message, remedy=remedy, field="ranks"))
        return None
    if cluster is None or fabric is None:
        return None
    if ranks > cluster.device_count:
        message = f"{ranks} ranks on the {cluster.device_count} devices of {cluster.id}"
        remedy = f"use at most {cluster.device_count}"
        problems.append(Problem(code="E-NET-003", message=message, remedy=remedy, field="ranks"))
        return None
    extents = group_extents(ProcessGroup(np.array([float(ranks)]), np.ones(1)), fabric.sizes)[:, 0]
    if extents[-1] > fabric.levels[-1].size:
        message = f"{ranks} ranks stand in several pods of {cluster.id}"
        remedy = "use at most the devices of one pod: collectives over several are not priced here"
        problems.append(Problem(code="E-NET-003", message=message, remedy=remedy, field="ranks"))
        return None
    if np.prod(extents) != ranks:
        sizes = " x ".join(f"{level.name} {level.size}" for level in fabric.levels)
        remedy = f"use a number that fills whole levels ({sizes})"
        message = f"{ranks} ranks leave a level of {cluster.id} partly filled"
        problems.append(Problem(code="E-NET-003", message=message, remedy=remedy, field="ranks"))
        return None
    return extents


def _check_algorithm(
    question: NetworkQuestion, kind: CollectiveKind | None, fabric: Fabric | None, problems: list[Problem]
) -> None:
    if kind is None:
        every = {name for one in get_args(CollectiveKind) for name in algorithms_of(one)}
        if question.algorithm != AUTO and question.algorithm not in every:
            problems.append(_unknown("algorithm", question.algorithm, [AUTO, *sorted(every)]))
        return
    legal = list(algorithms_of(kind) if fabric is None else runnable_algorithms(kind, fabric))
    if not legal and fabric is not None:
        message = f"no algorithm of {kind} runs on a {link_style(fabric)} fabric"
        problems.append(
            Problem(code="E-SCN-010", message=message, remedy="choose another collective", field="collective")
        )
    elif question.algorithm not in (AUTO, *legal):
        problems.append(_unknown("algorithm", question.algorithm, [AUTO, *legal]))


def _shares(question: NetworkQuestion, kind: CollectiveKind | None, problems: list[Problem]) -> FloatArray | None:
    """Bytes of each pair, so scaled that the mean rank sends one byte."""
    if question.token_matrix is None:
        return None
    place = str(question.token_matrix)
    if kind not in (None, "all_to_all"):
        message, remedy = f"a token matrix says nothing of {kind}", "use it with all_to_all"
        problems.append(Problem(code="E-SCN-011", message=message, remedy=remedy, field="token_matrix"))
    try:
        with question.token_matrix.open(encoding="utf-8", newline="") as file:
            matrix = np.array([[float(cell) for cell in row] for row in csv.reader(file) if row])
    except (OSError, UnicodeDecodeError, ValueError) as error:
        message, remedy = f"not a table of numbers: {error}", f"give {question.ranks} rows of {question.ranks} numbers"
        problems.append(Problem(code="E-FMT-014", message=message, remedy=remedy, file=place))
        return None
    if matrix.shape != (question.ranks, question.ranks):
        message = f"{' x '.join(map(str, matrix.shape))} numbers for {question.ranks} ranks"
        remedy = "give a row per sender and a column per receiver"
        problems.append(Problem(code="E-NET-003", message=message, remedy=remedy, file=place))
        return None
    if not (np.isfinite(matrix).all() and (matrix >= 0).all() and matrix.sum() > 0):
        message, remedy = "negative or infinite tokens, or none at all", "give finite counts, zero or more"
        problems.append(Problem(code="E-SCN-007", message=message, remedy=remedy, file=place))
        return None
    return np.asarray(matrix * question.ranks / matrix.sum())
