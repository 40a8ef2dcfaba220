"""Loads of expert-parallel groups: the contract's matrices, conservation, independence of what else is drawn, drops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.structure import token_loads as module
from moesim.structure.token_loads import (
    GroupSizes,
    LoadLaw,
    Slots,
    by_stage_rank,
    expert_group_members,
    group_matrices,
    token_drops,
    token_loads,
)
from moesim.structure.token_routing import draw, dropped_fraction, expert_shares

PRESETS = ("W0", "W1", "W2", "W3", "W4", "W5", "W6", "W7")
SIZES = GroupSizes(tokens_per_rank=60, num_experts=24, experts_per_token=2, num_ranks=8, expert_data=2)
LAWS = [LoadLaw("preset", preset=name) for name in PRESETS] + [
    LoadLaw("uniform"),
    LoadLaw("max_over_mean", max_over_mean=2.5),
    LoadLaw("power_law", exponent=0.8),
    LoadLaw("dirichlet", concentration=0.5),
    LoadLaw("histogram", loads=tuple(range(24))),
]
SIGMAS = 5.0


def matrices(law: LoadLaw, sizes: GroupSizes, *, step: int = 3, layer: int = 5, seed: int = 7) -> np.ndarray:
    groups = group_matrices(law, sizes, step=step, layer=layer, seed=seed)
    return np.stack([np.concatenate(list(blocks)) for blocks in groups])


@pytest.mark.parametrize("cells", [24, 10**6])
@pytest.mark.parametrize("preset", PRESETS)
@given(step=st.integers(0, 40), layer=st.integers(0, 60), seed=st.integers(0, 2**40), tokens=st.integers(0, 99))
def test_the_first_group_of_a_preset_is_the_contracts_matrix(
    preset: str, cells: int, step: int, layer: int, seed: int, tokens: int
) -> None:
    """Bit for bit, whether drawn at once or one source rank at a time."""
    sizes = replace(SIZES, tokens_per_rank=tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_CELLS", cells)
        found = matrices(LoadLaw("preset", preset=preset), sizes, step=step, layer=layer, seed=seed)
    expected = draw(preset, tokens, sizes.num_experts, 2, sizes.num_ranks, step, layer, seed)
    assert np.array_equal(found[0], expected)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.kind}-{law.preset}")
def test_what_is_sent_is_received_and_replicas_differ_unless_nothing_is_drawn(law: LoadLaw) -> None:
    loads = token_loads(law, SIZES, steps=range(4), layers=[0, 2], seed=11)
    assert np.array_equal(loads.sent_rows.sum(axis=3), loads.expert_rows.sum(axis=3))
    assert np.array_equal(loads.received_rows.sum(axis=3), loads.expert_rows.sum(axis=3))
    if law.preset != "W4":
        assert (loads.sent_rows == SIZES.mean_rows).all()
    found = matrices(law, SIZES)
    is_drawn = law.kind != "uniform" and law.preset_of(3, 7) != "W0"
    assert np.array_equal(found[0], found[1]) != is_drawn


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.kind}-{law.preset}")
def test_draws_of_a_step_and_layer_do_not_depend_on_what_else_is_drawn(law: LoadLaw) -> None:
    together = token_loads(law, SIZES, steps=range(6), layers=range(4), seed=2)
    alone = token_loads(law, SIZES, steps=[4, 5], layers=[3], seed=2)
    assert np.array_equal(together.expert_rows[4:, 3:], alone.expert_rows)
    assert np.array_equal(together.sent_rows[4:, 3:], alone.sent_rows)
    few = list(group_matrices(law, SIZES, step=4, layer=3, seed=2, sources=3))
    assert np.array_equal(np.concatenate(list(few[0])), matrices(law, SIZES, step=4, layer=3, seed=2)[0][:3])


def test_groups_of_a_layer_share_its_popular_experts() -> None:
    """Dirichlet(0.1) makes one expert hot; with 4,800 tokens in each group, it is the same in both."""
    sizes = replace(SIZES, tokens_per_rank=600)
    loads = token_loads(LoadLaw("dirichlet", concentration=0.1), sizes, steps=range(10), layers=[0], seed=1)
    hottest = loads.expert_rows[:, 0].argmax(axis=2)
    assert np.array_equal(hottest[:, 0], hottest[:, 1])
    assert len(np.unique(hottest[:, 0])) > 3


def test_even_loads_have_factor_one_even_where_tokens_do_not_divide() -> None:
    sizes = replace(SIZES, tokens_per_rank=7, num_experts=8)
    even = token_loads(LoadLaw("uniform"), sizes, steps=[0], layers=[0], seed=0)
    counted = token_loads(LoadLaw("preset", preset="W0"), replace(sizes, num_ranks=4), steps=[0], layers=[0], seed=0)
    assert np.ptp(even.expert_rows) <= 1
    for factor in (even.rows_factor(), even.moved_factor(), even.exchange_factor()):
        assert (factor == 1.0).all()
    assert counted.rows_factor() == pytest.approx(1.0, abs=2 / 14)


def test_factors_are_those_of_a_matrix_written_down_by_hand() -> None:
    """Two shards of an expert share what both their groups receive; an exchange takes the larger of its two sides."""
    loads = module.TokenLoads(
        sizes=GroupSizes(10, 2, 1, num_ranks=2, expert_data=1, expert_tensor=2),
        expert_rows=np.array([[[[15, 5], [12, 6]]]]),
        sent_rows=np.array([[[[8, 12], [9, 9]]]]),
    )
    assert loads.rows_factor()[0, 0].tolist() == [[1.35, 0.55], [1.35, 0.55]]
    assert loads.exchange_factor()[0, 0].tolist() == [[1.5, 1.2], [1.2, 0.9]]
    assert loads.moved_factor()[0, 0].tolist() == [[1.15, 0.85], [1.05, 0.75]]
    assert loads.max_over_mean().tolist() == [[1.35]]


def test_fullest_of_many_ranks_is_the_largest_of_as_many_normal_scatters() -> None:
    """Uniform shares as a histogram, n = 64 ranks: the mean of the largest of n normals is 2.34 of their deviations.

    Rows of a rank are binomial, mean 8,192, deviation 90.1; the largest of 64 has deviation 0.43 of that; 400 draws.
    """
    sizes = GroupSizes(8192, 64, 1, num_ranks=64)
    loads = token_loads(LoadLaw("histogram", loads=[1.0] * 64), sizes, steps=range(400), layers=[0], seed=5)
    deviation = np.sqrt(8192 * 63 / 64) / 8192
    largest = (loads.max_over_mean().mean() - 1) / deviation
    assert largest == pytest.approx(2.34, abs=0.02 + SIGMAS * 0.43 / 20)


def test_power_law_loads_average_to_the_factor_that_estimates_use() -> None:
    """Averages over 400 placements of 16 popularities; with 10**5 tokens, scatter adds less than one error."""
    sizes = GroupSizes(100_000, 16, 1, num_ranks=4)
    shares = expert_shares("power_law", 16, 4, exponent=1.0)
    per_rank = shares.reshape(len(shares), 4, -1).sum(axis=2).max(axis=1) * 4
    loads = token_loads(LoadLaw("power_law", exponent=1.0), sizes, steps=range(400), layers=[0], seed=5)
    error = per_rank.std() * (1 / 400 + 1 / len(shares)) ** 0.5
    assert loads.max_over_mean().mean() == pytest.approx(per_rank.mean(), abs=SIGMAS * error)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.kind}-{law.preset}")
def test_tokens_are_kept_or_dropped_and_no_expert_serves_more_than_its_slots(law: LoadLaw, groups: int) -> None:
    drops = token_drops(law, SIZES, Slots(2, groups), steps=range(2), layers=[1], seed=3)
    loads = token_loads(law, SIZES, steps=range(2), layers=[1], seed=3)
    assert np.array_equal(drops.kept + drops.dropped, drops.assigned)
    assert np.array_equal(drops.assigned, loads.sent_rows.sum(axis=(2, 3)))
    most = 2 * groups * SIZES.num_experts * SIZES.num_ranks * SIZES.num_groups
    assert (drops.kept <= most).all()
    assert (drops.dropped >= drops.assigned - most).all()
    none = token_drops(law, SIZES, Slots(10**6, groups), steps=[0], layers=[1], seed=3)
    assert none.dropped.sum() == 0


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("law", [LoadLaw("preset", preset="W2"), LoadLaw("max_over_mean", max_over_mean=3.0)])
def test_drops_are_on_average_what_estimates_say(law: LoadLaw, groups: int) -> None:
    """Loads far from the slots, so that scatter neither makes nor saves drops: share to 5 errors of 64,000 tokens."""
    sizes = GroupSizes(4000, 8, 1, num_ranks=4)
    slots = 1.25 * 4000 / groups / 8
    kind, arguments = (law.kind, {"max_over_mean": 3.0}) if law.kind != "preset" else ("preset", {"preset": "W2"})
    shares = expert_shares(kind, 8, 4, **arguments)
    expected = dropped_fraction(shares, 4000 / groups, slots)
    drops = token_drops(law, sizes, Slots(slots, groups), steps=range(4), layers=[0], seed=9)
    assert expected > 0.3
    assert drops.dropped_fraction().mean() == pytest.approx(expected, abs=SIGMAS * 0.5 / 64_000**0.5)


@given(
    degrees=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    order=st.permutations(["tensor", "context", "expert", "data", "pipeline"]),
)
def test_groups_cover_every_rank_of_a_stage_once(degrees: tuple[int, int, int], order: list[str]) -> None:
    expert_tensor, expert, expert_data = degrees
    sizes = GroupSizes(1, expert, 1, num_ranks=expert, expert_data=expert_data, expert_tensor=expert_tensor)
    members = expert_group_members(order, sizes)
    assert np.array_equal(np.sort(members.ravel()), np.arange(members.size))
    values = np.arange(2 * members.size).reshape(2, *members.shape).astype(float)
    ordered = by_stage_rank(values, members)
    assert np.array_equal(ordered[:, members], values)


def test_experts_that_do_not_divide_over_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="24 experts do not divide over 5 ranks"):
        token_loads(LoadLaw("uniform"), replace(SIZES, num_ranks=5), steps=[0], layers=[0], seed=0)
