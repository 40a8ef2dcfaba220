"""SimGrid as oracle: the same flows over the same channels, in a program of its own."""

from __future__ import annotations

import json
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moesim.engine.flow_network_traffic import Flows
from moesim.structure.topology import Topology

PYTHON = "/usr/bin/python3"
"""Debian's own Python, for which python3-simgrid is built."""
PROGRAM = Path(__file__).parent / "simgrid_program.py"


class OracleRun(NamedTuple):
    """End of each flow, and the wall time of the simulation without start-up and platform."""

    finish_s: np.ndarray
    seconds: float


@lru_cache
def missing_reason() -> str:
    """Why SimGrid cannot be asked; empty if it can."""
    try:
        found = subprocess.run([PYTHON, "-c", "import simgrid"], capture_output=True, timeout=60, check=False)
    except OSError as error:
        return f"no {PYTHON}: {error.strerror}"
    return "" if found.returncode == 0 else f"{PYTHON} has no simgrid; on Debian: apt-get install python3-simgrid"


def simgrid_run(topology: Topology, flows: Flows) -> OracleRun:
    """Simulate flows whose routes are single paths."""
    routes = topology.routing.routes(flows.source, flows.target)
    assert (routes.share == 1.0).all(), "SimGrid has no fluid ECMP"
    place = np.searchsorted(routes.flow, np.arange(len(flows.source) + 1)).tolist()
    channel = routes.channel.tolist()
    amounts = zip(
        flows.source.tolist(), flows.target.tolist(), flows.num_bytes.tolist(), flows.start_s.tolist(), strict=True
    )
    listed = [[*amount, channel[place[flow] : place[flow + 1]]] for flow, amount in enumerate(amounts)]
    problem = {"bandwidth": topology.channels.bandwidth.tolist(), "hosts": topology.num_devices, "flows": listed}
    done = subprocess.run([PYTHON, str(PROGRAM)], input=json.dumps(problem), capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    return OracleRun(np.array(answer["finish_s"]), answer["seconds"])
