"""Max-min flows in SimGrid, for /usr/bin/python3 (Debian's python3-simgrid): a problem on stdin, end times on stdout.

Input: {"bandwidth": [bytes/s of each link], "hosts": n, "flows": [[source, target, bytes, start in s, [links]], ...]}.
Output: {"finish_s": [end of each flow], "version": "...", "seconds": wall time of the simulation}.
The network model is pure max-min: no TCP window, no bandwidth or latency factors, no cross-traffic, no latency.
"""

import json
import sys
import time

OPTIONS = (
    "network/model:CM02",
    "network/TCP-gamma:0",
    "network/bandwidth-factor:1",
    "network/latency-factor:1",
    "network/weight-S:0",
    "network/crosstraffic:0",
)


def platform(simgrid, problem):
    """Hosts, one-way links and the routes that the flows use."""
    zone = simgrid.NetZone.create_full_zone("network")
    hosts = [zone.create_host(f"host{host}", 1e9) for host in range(problem["hosts"])]
    links = []
    for number, bandwidth in enumerate(problem["bandwidth"]):
        link = zone.create_link(f"link{number}", bandwidth)
        link.set_latency(0.0)
        links.append(link.seal())
    known = set()
    for source, target, _, _, route in problem["flows"]:
        if (source, target) not in known:
            known.add((source, target))
            way = [simgrid.LinkInRoute(links[link]) for link in route]
            zone.add_route(hosts[source].netpoint, hosts[target].netpoint, None, None, way, False)
    zone.seal()
    return hosts


def sender(simgrid, problem, hosts, finish):
    """Start every flow at its time, in order of time, and wait for all."""
    flows = sorted(enumerate(problem["flows"]), key=lambda item: item[1][3])
    started = []
    for index, (source, target, num_bytes, start, _) in flows:
        if start > simgrid.Engine.clock:
            simgrid.this_actor.sleep_until(start)
        started.append((index, simgrid.Comm.sendto_async(hosts[source], hosts[target], int(num_bytes))))
    for index, comm in started:
        comm.wait()
        finish[index] = comm.finish_time


def main():
    """Read, simulate, write."""
    import simgrid

    problem = json.load(sys.stdin)
    engine = simgrid.Engine(["oracle", "--log=root.thresh:error", *(f"--cfg={option}" for option in OPTIONS)])
    finish = [0.0] * len(problem["flows"])
    hosts = platform(simgrid, problem)
    simgrid.Actor.create("sender", hosts[0], sender, simgrid, problem, hosts, finish)
    begin = time.perf_counter()
    engine.run()
    seconds = time.perf_counter() - begin
    json.dump({"finish_s": finish, "version": simgrid.simgrid_version, "seconds": seconds}, sys.stdout)


if __name__ == "__main__":
    main()
