from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost.operators import loaded_gemm
from moesim.describe.model import MixtureOfExperts
from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario
from moesim.structure.layers import LayerKind, layer_sequence
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_moe import moe_part, routed_tokens, slots_per_expert
from moesim.structure.step_graph import Collective, Gemm, MemoryTraffic, Operation

Shipped = Callable[..., LoadedScenario]
M6T, MIXTRAL, DEEPSEEK = "m6t_1t_v100x480", "mixtral_8x7b", "deepseek_v3"
EXACT = "model.moe.router.capacity_factor=0.9375"  # 0.9375 x 1024 tokens / 960 experts = 1 slot: nothing to round


def moe_layer(loaded: LoadedScenario) -> LayerKind:
    return next(kind for kind in reversed(layer_sequence(loaded.scenario.model).kinds) if kind.is_moe)


def operations(loaded: LoadedScenario, kind: LayerKind | None = None) -> Sequence[Operation]:
    context = LoweringContext(loaded.scenario, loaded.system.stack, loaded.columns)
    return moe_part(context, kind or moe_layer(loaded), loaded.system.load_factor).operations


def gemm_flops(loaded: LoadedScenario, category: str, phase: str | None = None, kind: LayerKind | None = None) -> float:
    """FLOPs of the GEMMs of one MoE layer on one device."""
    works = [
        row.work for row in operations(loaded, kind) if row.category == category and (phase or row.phase) == row.phase
    ]
    gemms = [work for work in works if isinstance(work, Gemm)]
    return sum(float((2 * work.groups * work.rows * work.columns * work.inner)[0]) for work in gemms)


def all_to_all_bytes(loaded: LoadedScenario, phase: str | None = None) -> list[float]:
    works = [row.work for row in operations(loaded) if row.stream == "all_to_all" and (phase or row.phase) == row.phase]
    return [float(work.num_bytes[0]) for work in works if isinstance(work, Collective)]


def router_variant(kind: str, k: int, per: str) -> tuple[str, ...]:
    router = "model.moe.router"
    return f"{router}.kind={kind}", f"{router}.experts_per_token={k}", f"{router}.capacity_per={per}"


# slots


@pytest.mark.parametrize(
    ("capacity_per", "k", "factor", "tokens", "experts", "slots"),
    [
        ("token", 1, 1.25, 1024, 960, 2),  # 1.33
        ("token", 4, 1.25, 1024, 960, 2),  # k plays no part
        ("assignment", 4, 1.25, 1024, 960, 6),  # 5.33
        ("token", 2, 2.0, 2048, 2048, 2),  # GShard: 2 N / (G E)
        ("token", 1, 1.25, 8192, 128, 80),  # Switch
        ("assignment", 8, 1.0, 4096, 256, 128),  # Tutel, k f T / E
        ("token", 1, 0.01, 64, 64, 1),  # never less than one
    ],
)
def test_slots_follow_the_convention_of_the_stack(
    shipped: Shipped, capacity_per: str, k: int, factor: float, tokens: int, experts: int, slots: int
) -> None:
    moe = shipped(M6T).scenario.model.moe
    assert moe is not None
    router = moe.router.model_copy(update={"capacity_per": capacity_per, "experts_per_token": k})
    changed = moe.model_copy(update={"num_experts": experts, "router": router})
    assert slots_per_expert(changed, np.array([factor]), np.array([float(tokens)]))[0] == slots


@given(
    factor=st.floats(0.1, 8),
    k=st.integers(1, 8),
    tokens=st.integers(1, 10_000),
    experts=st.integers(1, 512),
    per=st.sampled_from(["token", "assignment"]),
)
def test_slots_are_whole_and_round_up_by_less_than_one(
    factor: float, k: int, tokens: int, experts: int, per: str
) -> None:
    router = {"kind": "top_k", "experts_per_token": k, "capacity_per": per}
    moe = MixtureOfExperts.model_validate({"num_experts": experts, "intermediate_size": 8, "router": router})
    slots = float(slots_per_expert(moe, np.array([factor]), np.array([float(tokens)]))[0])
    asked = factor * tokens / experts * (k if per == "assignment" else 1)
    assert slots == int(slots)
    assert slots >= 1
    assert asked - 1e-6 <= slots < max(asked + 1, 1 + 1e-6)


# rows


@pytest.mark.parametrize("name", [M6T, MIXTRAL, DEEPSEEK, "switch_base", "gshard_600b_2048e_36l", "glam_64b_64e"])
def test_rows_sent_by_an_expert_group_are_rows_computed_by_it(shipped: Shipped, name: str) -> None:
    """Nothing is lost between the senders and the experts: per device, sent rows = experts held x their rows."""
    loaded = shipped(name)
    context = LoweringContext(loaded.scenario, loaded.system.stack, loaded.columns)
    expert_tensor = loaded.columns["expert_tensor"][0]
    routed = routed_tokens(context, "decoder")
    assert routed.local_experts * routed.rows_per_expert == pytest.approx(routed.sent_rows * expert_tensor)


def test_dropless_rows_are_the_assignments(shipped: Shipped) -> None:
    loaded = shipped(MIXTRAL)
    routed = routed_tokens(LoweringContext(loaded.scenario, loaded.system.stack, loaded.columns), "decoder")
    assert routed.sent_rows[0] == 4096 * 2
    assert routed.local_experts[0] == 1
    assert routed.rows_per_expert[0] == 4096 * 2


def test_tensor_ranks_route_their_own_part_of_the_tokens(shipped: Shipped) -> None:
    loaded = shipped(MIXTRAL, "parallelism.tensor=4", "parallelism.data=4")
    routed = routed_tokens(LoweringContext(loaded.scenario, loaded.system.stack, loaded.columns), "decoder")
    assert (routed.tokens[0], routed.sent_rows[0]) == (1024, 2048)


# FLOPs


def test_router_experts_and_dispatch_of_m6t_by_hand(shipped: Shipped) -> None:
    tokens, experts, slots, hidden, width = 1024, 960, 2, 1024, 21248
    loaded = shipped(M6T)
    assert gemm_flops(loaded, "router", "forward") == 2 * tokens * hidden * experts
    assert gemm_flops(loaded, "expert_gemm", "forward") == 2 * (480 * slots) * 2 * 2 * hidden * width
    assert gemm_flops(loaded, "dispatch_combine", "forward") == 4 * tokens * experts * slots * hidden


def test_backward_is_twice_forward_but_for_the_dispatch_einsum(shipped: Shipped) -> None:
    """The dispatch mask is not differentiated: one gradient of dispatch, two of combine."""
    loaded = shipped(M6T)
    for category in ("router", "expert_gemm"):
        assert gemm_flops(loaded, category) == pytest.approx(3 * gemm_flops(loaded, category, "forward"))
    assert gemm_flops(loaded, "dispatch_combine") == pytest.approx(
        2.5 * gemm_flops(loaded, "dispatch_combine", "forward")
    )


@pytest.mark.parametrize("k", [1, 2])
def test_measured_masks_scan_each_choice_of_a_group_and_multiply_one_hot_rows(shipped: Shipped, k: int) -> None:
    """Scan k S rows in turn, once; masks of several choices are products GSKE x GSKC, of one a broadcast."""
    loaded = shipped(M6T, *router_variant("top_k", k, "token"), "stack=pytorch_grouped_mm_nccl")
    stack = loaded.system.stack.model_copy(update={"dispatch": "one_hot_einsum"})
    context = LoweringContext(loaded.scenario, stack, loaded.columns)
    rows = moe_part(context, moe_layer(loaded), loaded.system.load_factor).operations
    masks = [row for row in rows if row.name.startswith("dispatch.masks") and row.phase == "forward"]
    serial = [np.ravel(row.work.serial_s)[0] for row in masks if isinstance(row.work, MemoryTraffic)]
    assert stack.elementwise is not None
    assert stack.elementwise.scan_row_s is not None
    assert sum(serial) == pytest.approx(k * 1024 * stack.elementwise.scan_row_s, rel=1e-12)
    products = [row.work for row in masks if isinstance(row.work, Gemm)]
    assert [(one.rows[0], one.columns[0], one.inner[0], one.groups[0]) for one in products] == [
        (960, 2, k, 1024) for _ in range(2 if k > 1 else 0)
    ]
    assert len(masks) == 3


def test_measured_einsums_reorder_masks_and_slots_on_the_way_back_and_transpose_slots_of_groups(
    shipped: Shipped,
) -> None:
    loaded = shipped(M6T, *router_variant("top_k", 2, "token"), "stack=pytorch_grouped_mm_nccl")
    stack = loaded.system.stack.model_copy(update={"dispatch": "one_hot_einsum"})
    context = LoweringContext(loaded.scenario, stack, loaded.columns)
    rows = moe_part(context, moe_layer(loaded), loaded.system.load_factor).operations
    copies = {(row.name, row.phase): row.work for row in rows if row.name.endswith(".copies")}
    assert set(copies) == {
        ("combine.einsum.copies", "forward"),
        ("dispatch.einsum.copies", "activation_gradient"),
        ("combine.einsum.copies", "activation_gradient"),
    }
    assert stack.elementwise is not None
    cells, tokens, hidden = 960 * 2, 1024, 1024
    for key in list(copies)[:2]:
        work = copies[key]
        assert isinstance(work, MemoryTraffic)
        assert work.num_bytes[0] == 2 * 2 * cells * (tokens + hidden)
        assert np.ravel(work.compute_s)[0] == pytest.approx(cells * (tokens + hidden) * stack.elementwise.reorder_s)
    alone = copies["combine.einsum.copies", "activation_gradient"]
    assert isinstance(alone, MemoryTraffic)
    assert alone.num_bytes[0] == 0  # one routing group: nothing to transpose


def test_one_hot_dispatch_of_switch_base_is_group_over_d_ff_times_its_experts(shipped: Shipped) -> None:
    """8192 tokens per group over d_ff 3072: 2.67 times the expert FLOPs."""
    encoder = LayerKind("encoder", True, False)
    loaded = shipped("switch_base")
    ratio = gemm_flops(loaded, "dispatch_combine", "forward", encoder) / gemm_flops(
        loaded, "expert_gemm", "forward", encoder
    )
    assert ratio == pytest.approx(8192 / 3072, rel=1e-12)
    assert f"{ratio:.2f}" == "2.67"


def test_smaller_groups_cost_less_dispatch_and_the_same_experts(shipped: Shipped) -> None:
    large = shipped("switch_base", "workload.source_length=512", "workload.target_length=512")
    small = shipped(
        "switch_base",
        "workload.source_length=512",
        "workload.target_length=512",
        "model.moe.router.group_tokens=2048",
    )
    assert gemm_flops(large, "dispatch_combine") == pytest.approx(4 * gemm_flops(small, "dispatch_combine"))
    assert gemm_flops(large, "expert_gemm") == gemm_flops(small, "expert_gemm")


def test_a_permute_stack_moves_rows_and_multiplies_nothing(shipped: Shipped) -> None:
    loaded = shipped(MIXTRAL)
    rows = [row for row in operations(loaded) if row.category == "dispatch_combine"]
    assert rows
    assert all(isinstance(row.work, MemoryTraffic) for row in rows)


def test_gated_experts_by_hand(shipped: Shipped) -> None:
    """Mixtral: 8192 rows, three matrices of 4096 x 14336."""
    assert gemm_flops(shipped(MIXTRAL), "expert_gemm", "forward") == 8192 * 3 * 2 * 4096 * 14336


def test_shared_experts_run_on_every_token(shipped: Shipped) -> None:
    """DeepSeek-V3: one shared expert of width 2048, gated, on the 4096 tokens of the rank."""
    assert gemm_flops(shipped(DEEPSEEK), "dense_ffn", "forward") == 4096 * 3 * 2 * 7168 * 2048


# k top-1


@pytest.mark.parametrize("kind", ["top_k", "k_top_1"])
def test_at_capacity_1x_expert_flops_and_all_to_all_bytes_do_not_grow_with_k(shipped: Shipped, kind: str) -> None:
    one = shipped(M6T, *router_variant(kind, 1, "token"))
    for k in (2, 4):
        more = shipped(M6T, *router_variant(kind, k, "token"))
        assert gemm_flops(more, "expert_gemm") == gemm_flops(one, "expert_gemm")
        assert all_to_all_bytes(more) == all_to_all_bytes(one)
        answers = estimate_loaded(one), estimate_loaded(more)
        assert answers[0].hardware_flops_per_step == answers[1].hardware_flops_per_step
        assert answers[0].exposed_s["all_to_all"] == answers[1].exposed_s["all_to_all"]
        assert answers[0].exposed_s["expert_gemm"] == answers[1].exposed_s["expert_gemm"]


@pytest.mark.parametrize("kind", ["top_k", "k_top_1"])
def test_at_capacity_kx_both_grow_with_k(shipped: Shipped, kind: str) -> None:
    one = shipped(M6T, EXACT, *router_variant(kind, 1, "assignment"))
    for k in (2, 4):
        more = shipped(M6T, EXACT, *router_variant(kind, k, "assignment"))
        assert gemm_flops(more, "expert_gemm") == pytest.approx(k * gemm_flops(one, "expert_gemm"), rel=1e-12)
        assert all_to_all_bytes(more) == pytest.approx([k * value for value in all_to_all_bytes(one)], rel=1e-12)


def test_at_capacity_kx_growth_is_rounded_up_to_whole_slots(shipped: Shipped) -> None:
    """1.25 k x 1024 / 960 = 1.33, 2.67, 5.33 slots: 2, 3, 6."""
    one = shipped(M6T, *router_variant("k_top_1", 1, "assignment"))
    for k, slots in ((2, 3), (4, 6)):
        more = shipped(M6T, *router_variant("k_top_1", k, "assignment"))
        ratio = gemm_flops(more, "expert_gemm") / gemm_flops(one, "expert_gemm")
        assert ratio == pytest.approx(slots / 2, rel=1e-12)
        assert all_to_all_bytes(more)[0] / all_to_all_bytes(one)[0] == pytest.approx(slots / 2, rel=1e-12)


def test_prototypes_of_top_1_do_the_expert_work_of_top_k(shipped: Shipped) -> None:
    for k in (2, 4):
        for per in ("token", "assignment"):
            top_k = shipped(M6T, *router_variant("top_k", k, per))
            prototypes = shipped(M6T, *router_variant("k_top_1", k, per))
            for category in ("expert_gemm", "dispatch_combine", "router"):
                assert gemm_flops(prototypes, category) == gemm_flops(top_k, category)
            assert all_to_all_bytes(prototypes) == all_to_all_bytes(top_k)


def test_prototypes_are_not_slower_than_sequential_choices(shipped: Shipped) -> None:
    """The order stated for M6-T: top-1 <= k top-1 < top-k, at capacity 1x."""
    top_1 = estimate_loaded(shipped(M6T)).step_time_s
    for k in (2, 4):
        prototypes = estimate_loaded(shipped(M6T, *router_variant("k_top_1", k, "token"))).step_time_s
        top_k = estimate_loaded(shipped(M6T, *router_variant("top_k", k, "token"))).step_time_s
        assert top_1 <= prototypes < top_k


# communication


def test_all_to_all_bytes_of_m6t_by_hand(shipped: Shipped) -> None:
    """Out and back, forward and backward: 960 experts x 2 slots x 1024 numbers of 2 bytes each time."""
    assert all_to_all_bytes(shipped(M6T)) == [960 * 2 * 1024 * 2] * 4


def test_quantised_dispatch_sends_half_but_sums_come_back_in_16_bits(shipped: Shipped) -> None:
    rows = 4096 * 8 * 7168
    assert all_to_all_bytes(shipped(DEEPSEEK), "forward") == [rows, 2 * rows]


def test_the_all_to_all_runs_in_the_expert_group(shipped: Shipped) -> None:
    loaded = shipped(MIXTRAL)
    works = [row.work for row in operations(loaded) if row.stream == "all_to_all"]
    assert works
    for work in works:
        assert isinstance(work, Collective)
        assert (work.group.size[0], work.group.stride[0]) == (8, 1)


def test_fixed_slots_hide_a_skewed_load_and_dropless_routing_shows_it(shipped: Shipped) -> None:
    skew = "model.moe.router.imbalance={kind: max_over_mean, value: 1.5}"
    factors = {float(row.load_factor[0]) for row in operations(shipped(MIXTRAL, skew)) if row.load_factor is not None}
    assert factors == {1.5}
    fixed = shipped(MIXTRAL, skew, "model.moe.router.capacity_factor=1.0")
    assert {float(row.load_factor[0]) for row in operations(fixed) if row.load_factor is not None} == {1.0}


def expert_gemms(loaded: LoadedScenario) -> dict[str, Gemm]:
    rows = [row for row in operations(loaded) if row.category == "expert_gemm" and row.name == "expert.up"]
    return {row.phase: row.work for row in rows if isinstance(row.work, Gemm)}


def test_rows_of_experts_scatter_where_tokens_choose_freely(shipped: Shipped) -> None:
    free, preset = expert_gemms(shipped(MIXTRAL)), "model.moe.router.imbalance={kind: preset, name: W0}"
    for phase, dispersion in {"forward": 1.0, "activation_gradient": 1.0, "weight_gradient": 0.0}.items():
        assert np.all(free[phase].row_dispersion == dispersion)
    for even in (shipped(MIXTRAL, preset), shipped(MIXTRAL, "model.moe.router.capacity_factor=1.0")):
        assert all(np.all(work.row_dispersion == 0) for work in expert_gemms(even).values())


def test_scales_are_of_products_in_8_bits_unless_the_experts_kernels_are_measured_whole(shipped: Shipped) -> None:
    def scales(loaded: LoadedScenario) -> dict[str, str]:
        return {row.name: row.work.scaling for row in operations(loaded) if isinstance(row.work, Gemm)}

    names = ("shared_expert.up", "expert.up", "router.gemm")
    of_paper, of_megatron = scales(shipped(DEEPSEEK)), scales(shipped(DEEPSEEK, "stack=megatron_core_deepep"))
    assert [of_paper[name] for name in names] == ["block", "block", "tensor"]
    assert [of_megatron[name] for name in names] == ["block", "tensor", "tensor"]
    assert set(scales(shipped(MIXTRAL, "precision.scaling=block")).values()) == {"tensor"}


def test_tokens_are_the_inner_length_of_weight_gradients_even_where_a_kernel_cannot_add(shipped: Shipped) -> None:
    for stack in ("megatron_core_nccl", "pytorch_grouped_mm_nccl"):
        works = expert_gemms(shipped(MIXTRAL, f"stack={stack}"))
        assert {phase for phase, work in works.items() if work.sums_tokens} == {"weight_gradient"}
        doubled = loaded_gemm(works["weight_gradient"], np.array([2.0]))
        assert doubled.inner[0] == 2.0 * works["weight_gradient"].inner[0]
        assert doubled.rows[0] == works["weight_gradient"].rows[0]


def test_expert_tensor_ranks_gather_every_row_and_hold_a_shard(shipped: Shipped) -> None:
    loaded = shipped(MIXTRAL, "parallelism.expert_tensor=2")
    whole = shipped(MIXTRAL)
    assert gemm_flops(loaded, "expert_gemm") == pytest.approx(gemm_flops(whole, "expert_gemm"), rel=1e-12)
    gathers = [
        row.work
        for row in operations(loaded)
        if row.name == "experts.expert_tensor_parallel" and isinstance(row.work, Collective)
    ]
    assert {float(work.num_bytes[0]) for work in gathers} == {2 * 8192 * 4096 * 2.0}
    assert {float(work.group.size[0]) for work in gathers} == {2.0}


def test_inference_has_no_gradients(shipped: Shipped) -> None:
    rows = operations(shipped(M6T, "workload.kind=prefill"))
    assert {row.phase for row in rows} == {"forward"}


def test_gradients_of_activations_are_not_accumulated_like_those_of_weights(shipped: Shipped) -> None:
    """The second factor of combine is the experts' output, an activation: its gradient is written once, in fp16."""
    works = [row.work for row in operations(shipped(M6T)) if row.name == "combine.einsum"]
    assert len(works) == 3
    for work in works:
        assert isinstance(work, Gemm)
        assert not work.accumulates
        assert work.output_bytes == 2
