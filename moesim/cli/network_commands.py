"""``moesim topology``: what a cluster's network looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.cli.options import JsonOption, ProfilesOption
from moesim.errors import Problem, ScenarioError

topology_commands = typer.Typer(help="Networks of clusters: wires, switches, bisection.", no_args_is_help=True)


@topology_commands.callback()
def topology() -> None:
    """Networks of clusters."""


@topology_commands.command("show")
def topology_show(
    cluster: Annotated[str, typer.Argument(metavar="CLUSTER", help="Cluster profile by name.")],
    devices: Annotated[
        int | None, typer.Option("--devices", metavar="N", help="The first N devices only, as a machine of their own.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="Draw the network, or a piece of a large one.")
    ] = None,
    as_json: JsonOption = False,
    profiles: ProfilesOption = None,
) -> int:
    """Devices, switches, links by tier, degree, diameter and bisection bandwidth of a cluster's network."""
    from moesim.cli.commands import _library, _print_json
    from moesim.structure.topology_builders import build_topology
    from moesim.structure.topology_metrics import summarise
    from moesim.structure.topology_pieces import first_devices

    if out is not None and out.suffix != ".html":
        message, remedy = f"--out {out} is no HTML file", "give a name that ends in .html"
        raise ScenarioError([Problem(code="E-CLI-001", message=message, remedy=remedy)])
    library = _library(profiles)
    profile = library.cluster(cluster)
    device = library.device(profile.device)
    if devices is not None:
        profile = first_devices(profile, device, devices)
    network = build_topology(profile, device)
    summary = summarise(network)
    if as_json:
        _print_json(_to_json(cluster, summary, network.assumptions))
    else:
        from moesim.cli.text import print_topology

        print_topology(profile.name, summary, network.assumptions)
    if out is not None:
        from moesim.report.topology_figures import write_topology_chart

        write_topology_chart(network, summary, out)
    return 0


def _to_json(cluster: str, summary: Any, assumptions: tuple[str, ...]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "cluster": cluster,
        "num_devices": summary.num_devices,
        "vertices": summary.vertices,
        "links": [
            {
                "tier": tier.tier,
                "count": tier.num_links,
                "total_bytes_per_s": tier.total_bandwidth,
                "least_bytes_per_s": tier.least_bandwidth,
                "largest_bytes_per_s": tier.largest_bandwidth,
            }
            for tier in summary.tiers
        ],
        "degree": {"least": summary.degree[0], "most": summary.degree[1]},
        "diameter": summary.diameter,
        "bisection_bytes_per_s": summary.bisection_bandwidth,
        "is_halved": summary.is_halved,
        "assumptions": list(assumptions),
    }
