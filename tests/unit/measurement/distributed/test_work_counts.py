"""Slots, rows, arithmetic, traffic and held bytes, against the simulator, by hand, and against what autograd keeps."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from expert_parallel_cases import LAYERS, MASKED, MODELS, SCARCE, SEED, LayerCase, ModelCase

from moesim.errors import ScenarioError
from moesim.measurement.distributed.layer_shapes import ExpertLayerShape, drawn
from moesim.measurement.distributed.layer_work import layer_bytes, layer_flops, layer_rows, sent_bytes, step_flops
from moesim.measurement.distributed.memory_formulas import held_bytes
from moesim.measurement.distributed.optional_back_ends import TORCH
from moesim.measurement.distributed.ranks import ALONE, Ranks
from moesim.measurement.distributed.runs import distributed_cases
from moesim.measurement.distributed.suites import DISTRIBUTED_SUITES, NEEDS_SEVERAL
from moesim.measurement.distributed.suites.collectives import sent_fraction
from moesim.measurement.distributed.suites.train_steps import wanted_models
from moesim.measurement.distributed.targets import DistributedTarget

ROOT = Path(__file__).resolve().parents[4]
FOUR = Ranks(rank=1, size=4, expert_parallel=4, backend="nccl")
TARGETS = [
    DistributedTarget("cuda", ("bf16",), 0, ALONE),
    DistributedTarget("cuda", ("bf16",), 0, FOUR),
    DistributedTarget("cuda", ("bf16",), 0, replace(FOUR, expert_parallel=2)),
    DistributedTarget("cpu", ("fp32", "bf16"), 0, FOUR),
    DistributedTarget("cpu", ("fp32",), 0, FOUR, is_learned=True),
]


def with_torch():
    return pytest.importorskip("torch", reason="torch is not installed: pip install 'moesim[measure]'")


@pytest.mark.parametrize("suite", DISTRIBUTED_SUITES)
@pytest.mark.parametrize("target", TARGETS, ids=range(len(TARGETS)))
def test_names_of_cases_are_unique_and_cases_can_be_written(target: DistributedTarget, suite: str) -> None:
    if suite in NEEDS_SEVERAL and target.ranks.size == 1:
        with pytest.raises(ScenarioError, match="at least two processes"):
            distributed_cases(suite, target)
        return
    cases = distributed_cases(suite, target)
    assert max(Counter(case.identifier for case in cases).values()) == 1
    for case in cases:
        assert case.suite == suite
        json.dumps([case.shape, case.loads, case.flops, case.traffic_bytes], allow_nan=False)
        assert case.working_set_bytes > 0


def test_the_largest_steps_fit_on_a_device_of_141_gb() -> None:
    for suite in ("train_step", "memory", "moe_layer"):
        assert max(case.working_set_bytes for case in distributed_cases(suite, TARGETS[0])) < 0.8 * 141e9


def test_ranks_that_do_not_divide_the_experts_are_refused() -> None:
    three = DistributedTarget("cpu", ("fp32",), 0, replace(FOUR, size=3, expert_parallel=3))
    for suite in ("moe_layer", "train_step", "memory"):
        with pytest.raises(ScenarioError, match=r"8 experts do not divide over 3 ranks; use one of \[1, 2, 4, 8\]"):
            distributed_cases(suite, three)
    assert distributed_cases("collectives", three)


@pytest.mark.parametrize("capacity_per", ["token", "assignment"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 2.0])
@pytest.mark.parametrize("tokens", [24, 1000, 1024])
def test_slots_are_those_of_the_simulator(capacity_per: str, factor: float, tokens: int) -> None:
    from types import SimpleNamespace

    from moesim.structure.lowering_moe import slots_per_expert

    router = SimpleNamespace(experts_per_token=2, capacity_per=capacity_per)
    moe = SimpleNamespace(num_experts=16, router=router)
    expected = slots_per_expert(moe, np.array([factor]), np.array([float(tokens)]))
    shape = ExpertLayerShape(tokens, 8, 8, 16, 2, capacity_factor=factor, capacity_per=capacity_per)
    assert shape.slots == int(expected[0])


def test_sizes_that_contradict_each_other_are_refused() -> None:
    for changes, said in (
        ({"router": "k_top_1", "experts_per_token": 3}, "prototypes"),
        ({"dispatch": "one_hot_einsum"}, "needs a capacity factor"),
        ({"group_tokens": 7}, "groups of 7"),
    ):
        with pytest.raises(ValueError, match=said):
            ExpertLayerShape(
                **{"tokens": 24, "hidden": 8, "inner": 8, "num_experts": 8, "experts_per_token": 2} | changes
            )


def test_arithmetic_and_bytes_of_the_fullest_rank_are_those_by_hand() -> None:
    shape = ExpertLayerShape(64, 16, 24, 8, 2)
    routed = drawn("W0", shape, num_ranks=4, layer=0, seed=0)
    rows = layer_rows(shape, routed)
    assert rows.received.tolist() == [128] * 4
    assert layer_flops(shape, rows, "forward") == 6 * 128 * 16 * 24 + 2 * 64 * 16 * 8
    assert sent_bytes(shape, rows, "bf16") == 96 * 16 * 2  # three of four rows go elsewhere
    hot = layer_rows(shape, drawn("W2", shape, num_ranks=4, layer=0, seed=0))
    assert hot.fullest == 0
    assert layer_flops(shape, hot, "forward") > layer_flops(shape, rows, "forward")
    assert layer_bytes(shape, hot, "bf16", "backward") > layer_bytes(shape, hot, "bf16", "forward")


def test_drops_shrink_what_is_sent_and_masks_send_every_slot() -> None:
    shape = LayerCase("", "W1", changes=SCARCE).shape
    routed = drawn("W1", shape, num_ranks=4, layer=0, seed=SEED)
    assert layer_rows(shape, routed).sent.max() == shape.slots < routed.matrix.max()
    masked = LayerCase("", "W1", changes=MASKED | {"group_tokens": 6}).shape
    assert (layer_rows(masked, routed).sent == 4 * masked.slots).all()


def test_a_step_has_three_times_the_arithmetic_of_its_products() -> None:
    shape = MODELS[0].shape
    rows = [layer_rows(shape.layer, drawn("W0", shape.layer, num_ranks=1, layer=0, seed=0))] * shape.num_blocks
    tokens, hidden = 24, 16
    per_block = 2 * tokens * 2 * 3 * hidden * 24 + 2 * tokens * hidden * 8 + 2 * tokens * hidden * (16 + 16 + 16)
    products = 3 * (2 * per_block + 2 * tokens * hidden * 32)
    attention = 2 * 7 * 2 * 4 * 12**2 * 4
    assert step_flops(shape, rows) == products + attention


def test_bytes_that_collectives_must_send() -> None:
    assert (
        sent_fraction("all_to_all", 4) == sent_fraction("all_gather", 4) == sent_fraction("reduce_scatter", 4) == 0.75
    )
    assert sent_fraction("all_reduce+all_reduce", 2) == 2.0


def autograd_keeps(model) -> int:
    """Bytes of distinct storages that the forward pass keeps, weights and gradients left out."""
    torch = with_torch()
    from moesim.measurement.distributed.training_models import embed, loss_of

    parameters = model.parameters
    own = {one.untyped_storage().data_ptr() for one in (*parameters.weights.values(), *parameters.sums.values())}
    kept: dict = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    words, targets = model.batches[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, embed(model, words), targets)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"is_gated": False}, SCARCE, MASKED, {"router": "k_top_1"}])
def test_the_formula_of_kept_bytes_is_what_autograd_keeps(dtype: str, changes: dict) -> None:
    with_torch()
    from moesim.measurement.distributed.suites.train_steps import norm_is_fused
    from moesim.measurement.distributed.training_models import ModelShape, make_model
    from moesim.measurement.suites.attentions import AttentionShape
    from moesim.measurement.workbenches import open_workbench

    layer = ExpertLayerShape(
        **{"tokens": 128, "hidden": 64, "inner": 96, "num_experts": 8, "experts_per_token": 2} | changes
    )
    shape = ModelShape(AttentionShape(2, 64, 4, 2, 16), layer, 2, 128)
    routed = [drawn("W1", layer, num_ranks=1, layer=block, seed=0) for block in range(2)]
    bench = open_workbench("cpu", 0)
    model = make_model(bench, shape, ALONE, dtype=dtype, routed=routed, seed=0)
    held = held_bytes(shape, [layer_rows(layer, one) for one in routed], dtype, 1, fuses_norm=norm_is_fused(bench))
    assert held.kept == pytest.approx(autograd_keeps(model), rel=0.03)  # indices are kept outside of autograd
    parameters = model.parameters
    state = [*parameters.weights.values(), parameters.shared, parameters.experts, *parameters.first, *parameters.second]
    state += [
        master
        for master, weight in zip(parameters.masters, parameters.weights.values(), strict=True)
        if master is not weight
    ]
    assert held.state == pytest.approx(sum(one.numel() * one.element_size() for one in state), rel=0.01)
    assert held.peak > held.state + held.kept


HELD = ROOT / "validation" / "measurements" / "h200_sxm/memory_torch2.11.jsonl"


def test_the_formula_of_held_bytes_is_what_an_h200_held() -> None:
    models = {}
    for preset, shape in wanted_models(TARGETS[0]):
        rows = [layer_rows(shape.layer, one) for one in TARGETS[0].draws(preset, shape.layer, shape.num_blocks)]
        models[preset, json.dumps(shape.names())] = held_bytes(shape, rows, "bf16", 1)
    names = [*MODELS[0].shape.names(), "capacity_factor", "capacity_per", "group_tokens"]
    num_compared = 0
    for line in HELD.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["record"] == "result":
            shape = {name: record["shape"][name] for name in names if name in record["shape"]}
            held = models[record["shape"]["preset"], json.dumps(shape)]
            for what in ("state", "kept", "peak"):
                assert getattr(held, what) == pytest.approx(record[f"{what}_bytes"], rel=0.005), record["case"]
            num_compared += 1
    assert num_compared == 26


def test_a_peak_is_in_a_block_where_there_are_few_words() -> None:
    models = [shape for _, shape in wanted_models(TARGETS[0]) if shape.num_blocks == 1][:2]
    many, few = sorted(models, key=lambda shape: -shape.vocabulary)
    beyond = []
    for shape in (many, few):
        rows = [layer_rows(shape.layer, one) for one in TARGETS[0].draws("W0", shape.layer, 1)]
        held = held_bytes(shape, rows, "bf16", 1)
        beyond.append(held.peak - held.state - held.kept)
    assert beyond[0] == 2 * 4 * 4096 * 32000  # two more sets of scores
    # The gradients of the experts' weight and of its product's output, less what is freed: the head's activations, the
    # rows that went back, the gates, ups, activations and products.
    rows, inner, hidden = 8192, 14336, 4096
    head = 2 * 2 * 4096 * hidden + 4 * 4096 + 4 * 4096 * 1024
    expected = 2 * (8 * 2 * inner * hidden + rows * 2 * inner - rows * hidden - 4 * rows * inner) - head
    assert beyond[1] == pytest.approx(expected)


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero", "equal.default")


def one_hot_on_a_device(indices, num_classes: int):
    """``torch.nn.functional.one_hot`` looks at the values of a processor's tensor only."""
    import torch

    zeros = torch.zeros(*indices.shape, num_classes, dtype=indices.dtype)
    return zeros.scatter_(-1, indices.unsqueeze(-1), 1)


def operations_of(call, patch: pytest.MonkeyPatch) -> list[str]:
    torch = with_torch()
    patch.setattr(torch.nn.functional, "one_hot", one_hot_on_a_device)
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Record():
        call()
    return names


@pytest.mark.parametrize(
    "case", [case for case in LAYERS if not case.is_learned and case.back_ends == TORCH], ids=lambda case: case.name
)
def test_a_drawn_layer_of_a_rank_alone_never_waits_for_its_device(
    case: LayerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it could not be captured in a graph."""
    torch = with_torch()
    from moesim.measurement.distributed.expert_layers import make_layer, make_weights, run_layer
    from moesim.measurement.workbenches import open_workbench

    bench, shape = open_workbench("cpu", 0), case.shape
    routed = drawn(case.preset, shape, num_ranks=1, layer=0, seed=SEED)
    layer = make_layer(bench, shape, ALONE, dtype=case.dtype, routed=routed, seed=SEED)
    weights = make_weights(bench, shape, ALONE, case.dtype)
    tokens = bench.normal(routed.tokens_of(0, shape.experts_per_token), shape.hidden, dtype=case.dtype).requires_grad_()

    def passes() -> None:
        out = run_layer(tokens, weights, layer)
        torch.autograd.grad(out, tokens, torch.ones_like(out))

    passes()  # routines are chosen, and tried out, by the first call
    names = operations_of(passes, monkeypatch)
    assert len(names) > 20
    assert not [name for name in names for wait in WAITS if wait in name]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_a_step_of_a_rank_alone_never_waits_and_lowers_the_loss(
    case: ModelCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_torch()
    from moesim.measurement.distributed.training_models import make_model, train_step
    from moesim.measurement.suites import optimizer_steps
    from moesim.measurement.workbenches import open_workbench

    shape = case.shape
    routed = [drawn(case.preset, shape.layer, num_ranks=1, layer=block, seed=SEED) for block in range(shape.num_blocks)]
    model = make_model(open_workbench("cpu", 0), shape, ALONE, dtype="fp32", routed=routed, seed=SEED)
    monkeypatch.setattr(optimizer_steps, "LEARNING_RATE", 1e-2)
    losses = [float(train_step(model)) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    names = operations_of(lambda: train_step(model), monkeypatch)
    assert any("_fused_adamw_" in name for name in names)
    assert not [name for name in names for wait in WAITS if wait in name]
