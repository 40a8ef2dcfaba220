from itertools import permutations, product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.structure.columns import Columns
from moesim.structure.placement import (
    ProcessGroup,
    dense_mesh,
    expert_mesh,
    gradient_group,
    group_columns,
    group_extents,
    parse_rank_ranges,
    process_group,
)

DEFAULT_ORDER = ("tensor", "context", "expert", "data", "pipeline")
DEGREES = {"tensor": 2, "context": 3, "data": 4, "stages": 5, "expert_tensor": 1, "expert": 6, "expert_data": 4}
COLUMN = {"pipeline": "stages"}


def columns_of(degrees: dict[str, int]) -> Columns:
    return Columns.from_levels(1, {name: float(value) for name, value in degrees.items()}, {})


def stride_of(order: tuple[str, ...], dimension: str) -> float:
    return float(process_group(columns_of(DEGREES), order, dimension).stride[0])


def test_the_default_order_is_tensor_then_context_then_data_then_pipeline() -> None:
    strides = {name: stride_of(DEFAULT_ORDER, name) for name in ("tensor", "context", "data", "pipeline")}
    assert strides == {"tensor": 1, "context": 2, "data": 6, "pipeline": 24}


def test_the_default_expert_mesh_is_expert_tensor_then_expert_then_expert_data() -> None:
    assert expert_mesh(DEFAULT_ORDER) == ("expert_tensor", "expert", "expert_data", "pipeline")
    strides = {name: stride_of(DEFAULT_ORDER, name) for name in ("expert_tensor", "expert", "expert_data")}
    assert strides == {"expert_tensor": 1, "expert": 1, "expert_data": 6}


def test_a_permuted_order_changes_the_strides() -> None:
    order = ("data", "pipeline", "tensor", "expert", "context")
    strides = {name: stride_of(order, name) for name in ("data", "pipeline", "tensor", "context")}
    assert strides == {"data": 1, "pipeline": 4, "tensor": 20, "context": 40}
    # expert mesh: expert_data 4, pipeline 5, expert_tensor 1, expert 6
    assert (stride_of(order, "expert_data"), stride_of(order, "expert_tensor"), stride_of(order, "expert")) == (
        1,
        20,
        20,
    )


@pytest.mark.parametrize("order", list(permutations(DEFAULT_ORDER))[::7])
@pytest.mark.parametrize("mesh_of", [dense_mesh, expert_mesh])
def test_strides_agree_with_counting_ranks_one_by_one(order: tuple[str, ...], mesh_of: object) -> None:
    """Ranks in mixed radix, fastest dimension first: the group of rank 0 are those with all other digits 0."""
    assert callable(mesh_of)
    mesh = mesh_of(order)
    sizes = [DEGREES[COLUMN.get(name, name)] for name in mesh]
    digits = [tuple(reversed(slow_first)) for slow_first in product(*(range(size) for size in reversed(sizes)))]
    for position, name in enumerate(mesh):
        ranks = [
            rank
            for rank, digit in enumerate(digits)
            if all(value == 0 for place, value in enumerate(digit) if place != position)
        ]
        if mesh_of is expert_mesh and name == "pipeline":
            continue  # the pipeline is placed by the dense mesh
        group = process_group(columns_of(DEGREES), order, name)
        assert ranks == [int(group.stride[0]) * index for index in range(int(group.size[0]))]


def test_a_stride_reads_only_the_dimensions_that_are_faster() -> None:
    assert group_columns(DEFAULT_ORDER, "tensor") == ("tensor",)
    assert group_columns(DEFAULT_ORDER, "data") == ("tensor", "context", "data")
    assert group_columns(DEFAULT_ORDER, "expert") == ("expert_tensor", "expert")


def test_non_expert_gradients_are_reduced_over_data_times_context() -> None:
    group = gradient_group(columns_of(DEGREES), DEFAULT_ORDER)
    assert (group.size[0], group.stride[0]) == (12, 2)


def test_a_group_of_neighbours_fills_a_node_before_it_leaves_it() -> None:
    extents = group_extents(ProcessGroup(np.array([4.0, 8.0, 16.0, 480.0]), np.ones(4)), [8, 60])
    assert extents.T.tolist() == [[4, 1], [8, 1], [8, 2], [8, 60]]


def test_a_group_whose_stride_is_a_node_has_one_member_in_each() -> None:
    extents = group_extents(ProcessGroup(np.array([60.0, 30.0]), np.array([8.0, 16.0])), [8, 60])
    assert extents.T.tolist() == [[1, 60], [1, 30]]


@given(
    levels=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4),
    data=st.data(),
)
def test_extents_agree_with_counting_members_in_every_unit_of_the_fabric(
    levels: list[int], data: st.DataObject
) -> None:
    devices = prod(levels)
    powers = [2**exponent for exponent in range(devices.bit_length())]
    stride = data.draw(st.sampled_from(powers))
    size = data.draw(st.sampled_from([power for power in powers if power * stride <= devices]))
    members = [stride * index for index in range(size)]
    extents = group_extents(ProcessGroup(np.array([float(size)]), np.array([float(stride)])), levels)[:, 0]
    expected, unit, inside_smaller = [], 1, 1
    for level in levels:
        unit *= level
        inside = sum(member < unit for member in members)
        expected.append(inside // inside_smaller)
        inside_smaller = inside
    assert extents.tolist() == expected
    assert extents.prod() == size


@pytest.mark.parametrize(
    ("size", "stride", "levels"),
    [(60, 8, [8, 60]), (240, 2, [8, 60]), (6, 4, [8, 60]), (3, 160, [8, 60]), (480, 1, [8, 60]), (12, 1, [4, 3, 5])],
)
def test_the_extents_multiply_to_the_size_on_fabrics_that_are_no_powers_of_two(
    size: int, stride: int, levels: list[int]
) -> None:
    extents = group_extents(ProcessGroup(np.array([float(size)]), np.array([float(stride)])), levels)
    assert extents[:, 0].prod() == size
    assert (extents >= 1).all()


@pytest.mark.parametrize("text", ["", "3-1", "a", "1,,2", "1-2-3", "--2", "0-99999999999"])
def test_malformed_ranges_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_rank_ranges(text)
