"""Who sends how many tokens where: routing presets, expert loads, capacity and drops.

NumPy only, so that measured and simulated runs can share the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

HOT_FRACTION = 0.10
HOT_SHARE = 0.5
HOT_RANK_RATIO = 4.0
BURST_PROBABILITY = 0.1
EXPECTATION_DRAWS = 64
DRAWN_SHARES = 4_000_000
PLACEMENT_SEED = 0
EVEN_PRESETS = ("W0", "W4")
"""Presets whose rows are spread evenly over the experts, not drawn."""
DRAWN_KINDS = ("power_law", "dirichlet")
"""Kinds of imbalance whose shares are random."""


def draw(
    preset: str,
    tokens_per_rank: int,
    num_experts: int,
    experts_per_token: int,
    num_ranks: int,
    step: int,
    layer: int,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Draw one token matrix of a routing preset.

    Parameters
    ----------
    preset : str
        W0 equal loads, W1 hot set, W2 hot rank, W3 Dirichlet(1), W4 ragged source, W5 zero-load rank, W6 rotating hot
        rank, W7 burst (W0, but W1 with probability 0.1).
    tokens_per_rank, num_experts, experts_per_token, num_ranks : int
        Mean tokens of a rank, experts of the layer (a multiple of the ranks), choices per token, expert-parallel ranks.
    step, layer, seed : int
        The generator is ``default_rng([seed, step, layer])``; whether a step bursts, ``default_rng([seed, step])``.

    Returns
    -------
    ndarray of shape (num_ranks, num_experts)
        Assignments from each source rank to each expert; each row sums to its tokens times ``experts_per_token``.

    Raises
    ------
    ValueError
        If the preset is unknown or the experts do not divide over the ranks.

    Examples
    --------
    >>> draw("W0", 8, 4, 1, 2, 0, 0, 1).tolist()
    [[2, 2, 2, 2], [2, 2, 2, 2]]
    """
    if num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts do not divide over {num_ranks} ranks")
    generator = np.random.default_rng([seed, step, layer])
    preset = drawn_preset(preset, step, seed)
    sources = source_tokens(preset, tokens_per_rank, num_ranks, generator)
    share = preset_shares(preset, num_experts, num_ranks, step, generator)
    return routed_rows(preset, share, sources * experts_per_token, generator)


def drawn_preset(preset: str, step: int, seed: int) -> str:
    """Preset that a step draws from: W7 bursts as a whole step, not layer by layer; the others are themselves."""
    if preset != "W7":
        return preset
    return "W1" if np.random.default_rng([seed, step]).random() < BURST_PROBABILITY else "W0"


def source_tokens(
    preset: str, tokens_per_rank: int, num_ranks: int, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Tokens of each source rank, shape (num_ranks,): equal but for W4."""
    if preset != "W4":
        return np.full(num_ranks, tokens_per_rank, dtype=np.int64)
    ragged = generator.uniform(0.5, 1.5, num_ranks)
    return np.round(tokens_per_rank * ragged).astype(np.int64)


def routed_rows(
    preset: str, share: npt.NDArray[np.float64], totals: npt.NDArray[np.int64], generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Assignments of each source rank to each expert, shape (len(totals), len(share)): even rows or a multinomial."""
    if preset in EVEN_PRESETS:
        return _even_rows(totals, len(share))
    return np.asarray(generator.multinomial(totals, share), dtype=np.int64)


def _even_rows(totals: npt.NDArray[np.int64], num_experts: int) -> npt.NDArray[np.int64]:
    """Spread each row evenly to within one; what is left over starts at a different expert on each rank."""
    base, extra = np.divmod(totals, num_experts)
    first = np.concatenate([[0], np.cumsum(extra)[:-1]]) % num_experts
    position = (np.arange(num_experts)[None, :] - first[:, None]) % num_experts
    return np.asarray(base[:, None] + (position < extra[:, None]), dtype=np.int64)


def preset_shares(
    preset: str, num_experts: int, num_ranks: int, step: int, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Probability of each expert, shape (num_experts,), in a routing preset."""
    per_rank = num_experts // num_ranks
    share = np.ones(num_experts)
    if preset in ("W0", "W4"):
        return share / num_experts
    if preset == "W1":
        hot = generator.choice(num_experts, size=max(1, round(HOT_FRACTION * num_experts)), replace=False)
        if len(hot) == num_experts:
            return share / num_experts
        share *= (1 - HOT_SHARE) / (num_experts - len(hot))
        share[hot] = HOT_SHARE / len(hot)
        return share
    if preset in ("W2", "W6"):
        rank = step % num_ranks if preset == "W6" else 0
        return _one_rank_at(min(HOT_RANK_RATIO, num_ranks), rank, num_experts, num_ranks)
    if preset == "W3":
        return generator.dirichlet(np.ones(num_experts))
    if preset == "W5":
        if num_ranks == 1:
            return share / num_experts
        share[:per_rank] = 0.0
        return np.asarray(share / share.sum())
    raise ValueError(f"unknown routing preset {preset!r}; presets are W0 to W7")


def _one_rank_at(ratio: float, rank: int, num_experts: int, num_ranks: int) -> npt.NDArray[np.float64]:
    """Expert shares where one rank's experts take ``ratio`` times the mean and the others share the rest evenly."""
    per_rank = num_experts // num_ranks
    if num_ranks == 1:
        return np.full(num_experts, 1 / num_experts)
    share = np.full(num_experts, (1 - ratio / num_ranks) / (num_experts - per_rank))
    share[rank * per_rank : (rank + 1) * per_rank] = ratio / num_experts
    return share


def expert_shares(
    kind: str,
    num_experts: int,
    num_ranks: int,
    *,
    exponent: float = 0.0,
    concentration: float = 1.0,
    loads: Sequence[float] = (),
    preset: str = "W0",
    max_over_mean: float = 1.0,
) -> npt.NDArray[np.float64]:
    """Shares of the experts under an imbalance kind, shape (n_draws, num_experts); each row sums to 1.

    Kinds without randomness give one row; the others up to ``EXPECTATION_DRAWS`` rows from a fixed seed, to be
    averaged over.
    """
    generator = np.random.default_rng(PLACEMENT_SEED)
    draws = max(2, min(EXPECTATION_DRAWS, DRAWN_SHARES // num_experts))
    if kind == "preset":
        return np.stack(_preset_rows(preset, num_experts, num_ranks, generator, draws))
    rows = [
        drawn_shares(
            kind,
            num_experts,
            num_ranks,
            generator,
            exponent=exponent,
            concentration=concentration,
            loads=loads,
            max_over_mean=max_over_mean,
        )
        for _ in range(draws if kind in DRAWN_KINDS else 1)
    ]
    return np.stack(rows)


def drawn_shares(
    kind: str,
    num_experts: int,
    num_ranks: int,
    generator: np.random.Generator,
    *,
    exponent: float = 0.0,
    concentration: float = 1.0,
    loads: Sequence[float] = (),
    max_over_mean: float = 1.0,
) -> npt.NDArray[np.float64]:
    """One draw of the experts' shares under an imbalance kind that is no preset, shape (num_experts,).

    A power law places its popularities in a random order, a Dirichlet draws them; the other kinds take nothing from
    the generator.
    """
    match kind:
        case "uniform":
            return np.full(num_experts, 1 / num_experts)
        case "max_over_mean":
            return _one_rank_at(min(max_over_mean, num_ranks), 0, num_experts, num_ranks)
        case "power_law":
            popularity = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
            return generator.permutation(popularity / popularity.sum())
        case "dirichlet":
            return generator.dirichlet(np.full(num_experts, concentration))
        case "histogram":
            measured = np.asarray(loads, dtype=np.float64)
            return np.asarray(measured / measured.sum())
        case _:
            raise ValueError(f"unknown imbalance kind {kind!r}")


def _preset_rows(
    preset: str, num_experts: int, num_ranks: int, generator: np.random.Generator, draws: int
) -> list[npt.NDArray[np.float64]]:
    if preset in ("W0", "W2", "W4", "W5"):
        return [preset_shares(preset, num_experts, num_ranks, 0, generator)]
    if preset == "W7":
        bursts = [generator.random() < BURST_PROBABILITY for _ in range(draws)]
        return [preset_shares("W1" if burst else "W0", num_experts, num_ranks, 0, generator) for burst in bursts]
    return [preset_shares(preset, num_experts, num_ranks, step, generator) for step in range(draws)]


def max_over_mean_load(shares: npt.NDArray[np.float64], num_ranks: int) -> float:
    """Load of the fullest rank over the mean load of a rank, averaged over the draws.

    >>> max_over_mean_load(np.array([[0.5, 0.25, 0.125, 0.125]]), 2)
    1.5
    """
    per_rank = shares.reshape(len(shares), num_ranks, -1).sum(axis=2)
    return float(np.mean(per_rank.max(axis=1)) * num_ranks)


def dropped_fraction(shares: npt.NDArray[np.float64], assignments: float, slots_per_expert: float) -> float:
    """Fraction of assignments beyond an expert's slots: sum over experts of max(0, load - slots) / assignments.

    Loads are the shares times ``assignments``; the scatter of a finite sample around them is not added.
    """
    if assignments <= 0:
        return 0.0
    excess = np.maximum(shares * assignments - slots_per_expert, 0.0)
    return float(np.mean(excess.sum(axis=1)) / assignments)
