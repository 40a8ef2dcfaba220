from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_scenarios import loaded, random_document, shipped_library

from moesim.estimation.loading import load
from moesim.structure.layers import layer_sequence, stage_plan
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_layers import dense_part
from moesim.structure.lowering_moe import moe_part
from moesim.structure.placement import process_group
from moesim.structure.rank_programs import RankGroups, StreamOperation, chunk_layers, stage_ranks, stream_operations


def operations(name: str) -> tuple[StreamOperation, ...]:
    """Those of the last layer of a shipped scenario."""
    scenario = load(name, library=shipped_library())
    context = LoweringContext(scenario.scenario, scenario.system.stack, scenario.columns)
    kind = layer_sequence(scenario.scenario.model).kinds[-1]
    tables = [dense_part(context, kind), moe_part(context, kind, scenario.system.load_factor)]
    return stream_operations([table.operations for table in tables])


def places(rows: tuple[StreamOperation, ...], name: str) -> list[int]:
    return [index for index, row in enumerate(rows) if row.name == name]


class TestOrderOfExecution:
    @pytest.mark.parametrize("name", ["mixtral_8x7b", "deepseek_v3", "m6t_1t_v100x480", "glam_64b_64e"])
    def test_every_operation_runs_once_and_forward_ones_first(self, name):
        rows = operations(name)
        assert len({(row.table, row.index) for row in rows}) == len(rows)
        phases = [row.phase == "forward" for row in rows]
        assert phases == sorted(phases, reverse=True)

    def test_rows_travel_around_the_experts(self):
        rows = [row for row in operations("mixtral_8x7b") if row.phase == "forward"]
        (there, back), (up,), (down,) = (
            places(rows, name) for name in ("experts.all_to_all", "expert.up", "expert.down")
        )
        assert places(rows, "dispatch.permute")[0] < there < up < down < back

    def test_one_hot_rows_are_combined_after_they_came_back(self):
        rows = [row for row in operations("m6t_1t_v100x480") if row.phase == "forward"]
        (there, back) = places(rows, "experts.all_to_all")
        assert places(rows, "dispatch.einsum")[0] < there < back < places(rows, "combine.einsum")[0]

    def test_backward_runs_the_other_way(self):
        rows = [row for row in operations("mixtral_8x7b") if row.phase != "forward"]
        (there, back) = places(rows, "experts.all_to_all")
        assert there < places(rows, "expert.down")[0] < places(rows, "expert.up")[0] < back
        assert back < places(rows, "router.gemm")[0] < places(rows, "attention.core")[0]

    def test_keys_gather_before_the_core_and_their_gradients_scatter_after_it(self):
        rows = operations("mixtral_8x7b")
        gather, gather_again, scatter = places(rows, "attention.context_parallel")
        core, gradient = places(rows, "attention.core")
        assert gather < core < gather_again < gradient < scatter

    def test_weights_get_their_gradient_after_the_activations(self):
        rows = operations("deepseek_v3")
        for name in ("expert.up", "attention.kv_up", "router.gemm"):
            assert [rows[place].phase for place in places(rows, name)] == [
                "forward",
                "activation_gradient",
                "weight_gradient",
            ]

    def test_only_groups_of_several_ranks_wait(self):
        rows = operations("mixtral_8x7b")
        assert {row.group for row in rows if row.stream == "all_to_all"} == {"expert"}
        assert {row.group for row in rows if row.stream == "compute"} == {""}
        alone = load("m6t_base_v100", library=shipped_library())
        assert float(alone.columns["tensor"][0]) == 1
        assert {row.group for row in operations("m6t_base_v100") if row.stream == "tensor_parallel"} <= {""}


class TestGroupsOfRanks:
    def test_groups_of_all_dimensions_are_those_of_the_whole_mesh(self):
        for seed in range(60):
            scenario = loaded(random_document(seed))
            order = scenario.scenario.parallelism.rank_order
            ranks = stage_ranks(scenario.columns, order)
            for dimension, groups in ranks.groups.items():
                whole = process_group(scenario.columns, order, dimension)
                members = groups.members(ranks.count)
                assert sorted(members.ravel().tolist()) == list(range(ranks.count))
                for stage in {0, ranks.stages - 1}:
                    steps = np.diff(ranks.global_ranks(stage)[members], axis=1)
                    assert (steps == whole.stride[0]).all(), (seed, dimension)
                    assert groups.size == whole.size[0]

    def test_ranks_know_their_place(self):
        for seed in range(30):
            scenario = loaded(random_document(seed))
            ranks = stage_ranks(scenario.columns, scenario.scenario.parallelism.rank_order)
            seen = []
            for stage in range(ranks.stages):
                whole = ranks.global_ranks(stage)
                at, place = ranks.place(whole)
                assert (at == stage).all()
                assert place.tolist() == list(range(ranks.count))
                seen += whole.tolist()
            assert sorted(seen) == list(range(ranks.stages * ranks.count))

    @given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
    def test_the_largest_of_a_group_is_that_of_its_members(self, outer, size, stride, seed):
        groups, count = RankGroups(size, stride), outer * size * stride
        values = np.random.default_rng(seed).random((2, count))
        expected = np.empty_like(values)
        for members in groups.members(count):
            expected[:, members] = values[:, members].max(axis=1, keepdims=True)
        np.testing.assert_array_equal(groups.maximum(values), expected)

    @given(*(st.sampled_from([1, 2, 4]) for _ in range(4)))
    def test_groups_within_others_are_found(self, size, stride, other_size, other_stride):
        outer, inner = RankGroups(size, stride), RankGroups(other_size, other_stride)
        number = {int(rank): row for row, members in enumerate(outer.members(256)) for rank in members}
        within = all(len({number[int(rank)] for rank in members}) == 1 for members in inner.members(256))
        assert outer.contains(inner) == within


def test_chunks_hold_every_layer_once_and_in_order():
    for seed in range(40):
        scenario = loaded(random_document(seed))
        pipeline, sequence = scenario.scenario.parallelism.pipeline, layer_sequence(scenario.scenario.model)
        plan = stage_plan(sequence, pipeline.stages, pipeline.virtual_stages)
        chunks = chunk_layers(sequence, plan)
        layers = [layer for chunk in chunks for layer in chunk.layers]
        assert [layer.number for layer in layers] == list(range(len(sequence.order)))
        assert tuple(layer.kind for layer in layers) == sequence.order
        assert [chunk.is_first for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
        assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
