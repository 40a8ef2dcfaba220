"""Files of fitted library constants: one per library for stacks, and one with the fits that leave each system out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesim.errors import FormatError, Problem
from moesim.resources import data_directory
from moesim.study.collective_systems import NVLS_LIBRARIES
from moesim.study.fit_collectives import IN_SWITCH_S, MICROSECOND, SWITCH_S, FittedConstants
from moesim.study.fit_moe_libraries import LEVELS_EXPONENT, MoeConstants

HELD_OUT = "held_out.json"
DIGITS = 4
NORMAL_QUANTILE = 1.6448536269514722
Nested = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class LibraryFits:
    """Constants fitted on everything, and without each system (collectives) or table (MoE kernels).

    ``half_widths``: 90th percentile of |log error| of left-out systems, by class.
    """

    everything: FittedConstants
    without_system: Mapping[str, FittedConstants]
    moe: MoeConstants
    moe_without_table: Mapping[str, MoeConstants]
    half_widths: Mapping[str, float]
    systems_of_library: Mapping[str, int]
    rows: int


def rounded(value: Any) -> Any:
    """Numbers of a nested object with four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return value


def write_fits(fits: LibraryFits, folder: Path) -> None:
    """Write the fits that leave systems out, and a file per library as they round."""
    path = folder / "held_out" / HELD_OUT
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded({"schema_version": 1, **asdict(fits)}), indent=None, separators=(",", ":"))
    path.write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")
    write_libraries(read_fits(path), folder)


def write_libraries(fits: LibraryFits, folder: Path) -> None:
    """Write a file per library for stacks to name."""
    documents = {**node_documents(fits), **network_documents(fits), **moe_documents(fits)}
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_fits(path: Path | None = None) -> LibraryFits:
    """Read the fits that leave systems out: shipped ones, or those of a file.

    Raises
    ------
    FormatError
        If the file is missing or of another form.
    """
    file = path or data_directory("hardware_profiles") / "libraries" / "held_out" / HELD_OUT
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return LibraryFits(
            everything=FittedConstants(**document["everything"]),
            without_system={key: FittedConstants(**value) for key, value in document["without_system"].items()},
            moe=MoeConstants(**document["moe"]),
            moe_without_table={key: MoeConstants(**value) for key, value in document["moe_without_table"].items()},
            half_widths=document["half_widths"],
            systems_of_library=document["systems_of_library"],
            rows=document["rows"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"not a file of fitted libraries: {type(error).__name__} {error}"
        remedy = "write it with moesim validate collectives --data FILE --libraries DIR"
        raise FormatError([Problem(code="E-FMT-014", message=message, remedy=remedy, file=str(file))]) from None


def narrowed(constants: FittedConstants, nodes: Sequence[str], networks: Sequence[str]) -> FittedConstants:
    """Constants of some libraries only, and what all share."""

    def kept(values: Nested, names: Sequence[str]) -> dict[str, dict[str, float]]:
        wanted = {"", *names}
        return {key: {name: item for name, item in by.items() if name in wanted} for key, by in values.items()}

    return FittedConstants(kept(constants.node, nodes), kept(constants.network, networks), constants.common)


def narrowed_moe(constants: MoeConstants, libraries: Sequence[str]) -> MoeConstants:
    """Constants of some kernel libraries only."""
    return MoeConstants(
        {key: {name: item for name, item in by.items() if name in libraries} for key, by in constants.values.items()}
    )


def _us(value: float) -> str:
    return f"{rounded(float(value))} us"


def _document(name: str, fits: LibraryFits, constants: dict[str, Any], words: str, *, several: bool) -> dict[str, Any]:
    """Errors: standard deviations of logarithms on held-out systems, small sizes for latencies, large for fractions."""
    systems = fits.systems_of_library.get(name, 0)
    place = "several nodes" if several else "one node"
    small, large = (fits.half_widths[f"{place}, {size} 1 MiB"] / NORMAL_QUANTILE for size in ("<", ">="))
    if systems == 0:
        kind, small = "assumed", max(small, 0.42)
        source = f"{words}; never measured in good order: small messages may take half or twice as long"
    else:
        kind, source = "fitted", f"{words}; {systems} systems, moesim validate collectives"
    return {
        "schema_version": 1,
        "id": name,
        "kind": kind,
        "source": source,
        "systems": systems,
        "latency_error_fraction": round(small, 3),
        "fraction_error_fraction": round(large, 3),
        "constants": constants,
    }


ASSUMED_NODES: dict[str, str] = {"pcie_host": "", "nccl_volta_nvswitch": "nccl_volta_mesh"}
"""Libraries of no measured system, and whose constants they take; the empty name: what all share."""
ASSUMED_NETWORKS: dict[str, str] = {"tcpx": "gib", "tcpxo": "gib", "slingshot": ""}


def node_documents(fits: LibraryFits) -> dict[str, dict[str, Any]]:
    """Files of the libraries of a node."""
    documents = {}
    measured = [name for name in fits.everything.node["base"] if name and name not in ASSUMED_NODES]
    for name, origin in [*((name, name) for name in measured), *ASSUMED_NODES.items()]:
        values = {key: by.get(origin, by[""]) for key, by in fits.everything.node.items()}
        constants: dict[str, Any] = {
            "base_latency": _us(values["base"]),
            "round_latency": _us(values["round"]),
            "reduce_fraction": rounded(values["fraction"]),
            "pipelining": rounded(values["pipelining"]),
            "switch_time": _us(SWITCH_S / MICROSECOND),
            "quick": {
                "base_latency": _us(values["quick_base"]),
                "round_latency": _us(values["quick_round"]),
                "fraction": rounded(values["quick_fraction"]),
                "pipelining": rounded(values["quick_pipelining"]),
            },
            "all_to_all_base_latency": _us(values["exchange_base"]),
            "peer_latency": _us(values["exchange_peer"]),
            "all_to_all_fraction": rounded(values["exchange_fraction"]),
            "all_to_all_pipelining": rounded(values["exchange_pipelining"]),
            "quick_all_to_all": {
                "base_latency": _us(values["quick_exchange_base"]),
                "peer_latency": _us(values["quick_exchange_peer"]),
                "fraction": rounded(values["quick_exchange_fraction"]),
                "pipelining": rounded(values["quick_exchange_pipelining"]),
            },
            "point_to_point_latency": _us(values["quick_exchange_base"]),
            "point_to_point_fraction": rounded(values["exchange_fraction"]),
            "own_copy": rounded(fits.everything.common["own_copy"]),
        }
        if name in NVLS_LIBRARIES:
            constants["in_switch"] = {
                "base_latency": _us(values["in_switch_base"]),
                "fraction": rounded(values["in_switch_fraction"]),
                "pipelining": rounded(values["in_switch_pipelining"]),
            }
            constants["in_switch_time"] = _us(IN_SWITCH_S / MICROSECOND)
        words = "public nccl-tests tables, fitted with priors shared by generations"
        if name in ASSUMED_NODES:
            words = f"constants of {origin or 'what all generations share'}"
        documents[name] = _document(name, fits, constants, words, several=False)
    return documents


def network_documents(fits: LibraryFits) -> dict[str, dict[str, Any]]:
    """Files of the network stacks."""
    documents = {}
    measured = [name for name in fits.everything.network["round"] if name and name not in ASSUMED_NETWORKS]
    for name, origin in [*((name, name) for name in measured), *ASSUMED_NETWORKS.items()]:
        values = {key: by.get(origin, by[""]) for key, by in fits.everything.network.items()}
        constants: dict[str, Any] = {
            "round_latency": _us(values["round"]),
            "reduce_fraction": rounded(values["fraction"]),
            "pipelining": rounded(values["pipelining"]),
            "quick": {"round_latency": _us(values["quick_round"]), "fraction": rounded(values["quick_fraction"])},
            "all_to_all_base_latency": _us(values["exchange_base"]),
            "peer_latency": _us(values["exchange_peer"]),
            "all_to_all_fraction": rounded(values["exchange_fraction"]),
            "all_to_all_pipelining": rounded(values["exchange_pipelining"]),
            "point_to_point_latency": _us(values["exchange_base"] / 2.0),
            "point_to_point_fraction": rounded(values["exchange_fraction"]),
        }
        constants["quick"]["pipelining"] = constants["pipelining"]
        words = "public nccl-tests tables, fitted with priors of NCCL's and its plugins' published latencies"
        if name in ASSUMED_NETWORKS:
            words = f"constants of {origin or 'what all networks share'}"
        documents[name] = _document(name, fits, constants, words, several=True)
    return documents


def moe_documents(fits: LibraryFits) -> dict[str, dict[str, Any]]:
    """Files of MoE kernel libraries, per level: ``NAME`` for the node and ``NAME_network``; mean of both directions."""
    documents = {}
    values = fits.moe.values
    for name in values["base"]:
        one = {key: by[name] for key, by in values.items()}
        mean_latency = (1.0 + one["combine_latency"]) / 2.0
        mean_fraction = one["network_fraction"] * (1.0 + one["combine_fraction"]) / 2.0
        words = "public tables of MoE dispatch and combine kernels, fitted; mean of dispatch and combine"
        node: dict[str, Any] = {
            "all_to_all_base_latency": _us(one["base"] * mean_latency),
            "peer_latency": _us(one["combine_peer"] / 2.0),
            "all_to_all_fraction": rounded(one["fraction"]),
            "all_to_all_pipelining": rounded(one["pipelining"]),
            "all_to_all_own_copy": rounded(one["own_copy"]),
            "levels_exponent": LEVELS_EXPONENT,
        }
        network: dict[str, Any] = {
            "all_to_all_base_latency": _us(0.0),
            "all_to_all_doubling_latency": _us(one["doubling"] * mean_latency),
            "peer_latency": _us(0.0),
            "all_to_all_fraction": rounded(mean_fraction),
            "all_to_all_pipelining": rounded(one["pipelining"]),
        }
        for suffix, constants in (("", node), ("_network", network)):
            document = _document(name, fits, constants, words, several=False)
            error = fits.half_widths["MoE dispatch and combine"] / NORMAL_QUANTILE
            document |= {"id": name + suffix, "latency_error_fraction": round(error, 3)}
            documents[name + suffix] = document | {"fraction_error_fraction": round(error, 3)}
    return documents
