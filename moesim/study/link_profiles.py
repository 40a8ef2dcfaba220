"""A stack's collectives with the latency and bandwidth that were measured on the levels of a cluster."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.describe.hardware import Cluster, CollectiveTier, HierarchicalFabric, LinkLevel, Stack
from moesim.describe.quantities import DurationFigure, NumberFigure
from moesim.errors import Problem, ScenarioError
from moesim.study.link_calibration import FittedLevel

LARGEST_FRACTION = 1.02
"""Measured over nominal bandwidth up to which the difference is taken for noise; above, it is another link."""


def measured_collectives(
    stack: Stack, cluster: Cluster, levels: Sequence[FittedLevel], *, source: str
) -> dict[str, CollectiveTier]:
    """Tiers of a stack whose measured parts are alpha and beta alone, without the library's protocols.

    Parameters
    ----------
    stack : Stack
        Where what was not measured comes from.
    cluster : Cluster
        Nominal bandwidths; fitted levels are named after its levels or their tiers.
    levels : sequence of FittedLevel
        Fits; those that are not determined are left out.
    source : str
        Provenance.

    Returns
    -------
    dict
        All tiers of the stack by name.

    Raises
    ------
    ScenarioError
        If the cluster is a torus, has no level of a fit's name, or a fit exceeds a level's bandwidth.
    """
    fabric, tiers = cluster.fabric, dict(stack.collectives)
    if not isinstance(fabric, HierarchicalFabric):
        message = f"cluster {cluster.id} is a torus: one latency and one bandwidth do not describe its collectives"
        raise ScenarioError([Problem("E-SCN-010", message, "name a cluster of switched levels", field="--cluster")])
    named = {name: level for level in fabric.levels for name in (level.tier, level.name)}
    problems = []
    for fitted in levels:
        if fitted.fit.refused:
            continue
        level = named.get(fitted.level)
        if level is None:
            message = f"cluster {cluster.id} has no level {fitted.level!r}"
            problems.append(Problem("E-SCN-010", message, f"there are {', '.join(named)}", field="--level"))
        elif fitted.fit.values["beta_bytes_per_s"] > LARGEST_FRACTION * level.bandwidth_per_device.value:
            message = (
                f"{fitted.family} on {fitted.level} reach {fitted.fit.values['beta_bytes_per_s']:.4g} bytes/s, more "
                f"than the {level.bandwidth_per_device.value:.4g} that {cluster.id} has there"
            )
            problems.append(Problem("E-SCN-010", message, "name the cluster it was measured on", field="--cluster"))
        else:
            tiers[level.tier] = _with_links(tiers[level.tier], level, fitted, source)
    if problems:
        raise ScenarioError(problems)
    return {str(name): tier for name, tier in tiers.items()}


def _with_links(tier: CollectiveTier, level: LinkLevel, fitted: FittedLevel, source: str) -> CollectiveTier:
    """A tier whose reductions, or exchanges and messages, take alpha a round or peer and their bytes over beta."""
    values, spread = fitted.fit.values, max(fitted.fit.spread, 1e-3)
    errors = {name: max(error, spread) for name, error in fitted.fit.standard_errors.items()}
    text = f"{source}: {fitted.fit.num_cases} {fitted.family} on {fitted.level}"
    share = min(values["beta_bytes_per_s"] / level.bandwidth_per_device.value, 1.0)
    alpha = DurationFigure.fitted(values["alpha_s"], text, errors.get("alpha_s", spread))
    fraction = NumberFigure(
        value=share, kind="fitted", source=text, error_fraction=errors.get("beta_bytes_per_s", spread)
    )
    nothing = DurationFigure.fitted(0.0, f"{text}: in the latency of a round")
    if fitted.family == "reductions":
        changed = {
            "library": None,
            "base_latency": nothing,
            "round_latency": alpha,
            "reduce_fraction": fraction,
            **dict.fromkeys(("pipelining", "own_copy", "quick", "in_switch", "switch_time", "in_switch_time")),
        }
        exchange_base = tier.all_to_all_base_latency or tier.base_latency
        return tier.model_copy(update={**changed, "all_to_all_base_latency": exchange_base})
    gone = ("all_to_all_doubling_latency", "all_to_all_pipelining", "all_to_all_own_copy", "quick_all_to_all")
    changed = {
        "all_to_all_library": None,
        "all_to_all_base_latency": nothing,
        "peer_latency": alpha,
        "all_to_all_fraction": fraction,
        "point_to_point_latency": alpha,
        "point_to_point_fraction": fraction,
        **dict.fromkeys(gone),
    }
    return tier.model_copy(update={**changed, "library": None})
