"""What is timed computes what its name says: every operation against an independent formula."""

from __future__ import annotations

import math

import pytest

from moesim.measurement.cases import Target, UnmeasurableError, Work
from moesim.measurement.routed_loads import RoutedLoads, layer_loads
from moesim.measurement.suites import SUITES
from moesim.measurement.suites.attentions import AttentionShape, attention_function, prepare_attention
from moesim.measurement.suites.decodes import METHODS, prepare_decode
from moesim.measurement.suites.dispatches import OneHotShape, one_hot_masks, to_slots, to_tokens
from moesim.measurement.suites.eight_bit import SCALINGS, prepare_cast, prepare_product, scales
from moesim.measurement.suites.gemms import prepare_gemm, weight_gradient
from moesim.measurement.suites.grouped_gemms import LOOP, Groups, grouped_products, prepare_experts
from moesim.measurement.suites.moe_layers import MoeShape, MoeWeights, make_layer, run_layer
from moesim.measurement.suites.optimizer_steps import LEARNING_RATE, adam_step, sgd_step
from moesim.measurement.suites.routed_rows import gather_rows, sort_rows, sum_rows, weigh_rows, weigh_rows_gradient
from moesim.measurement.suites.routers import choose, score
from moesim.measurement.suites.transformer_blocks import BlockShape, make_block, run_block
from moesim.measurement.workbenches import Workbench, open_workbench

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'moesim[measure]'")

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
DTYPES = ("fp32", "bf16")


@pytest.fixture
def bench() -> Workbench:
    return open_workbench("cpu", 0)


def assert_near(found, expected, dtype: str = "fp32") -> None:
    distance = (found.double() - expected.double()).norm()
    assert distance <= TOLERANCE[dtype] * expected.double().norm()  # false for NaN


def recorded(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every tensor that a bench fills, in order."""
    made: list = []
    normal = Workbench.normal

    def record(self, *sizes, **rest):
        made.append(normal(self, *sizes, **rest))
        return made[-1]

    monkeypatch.setattr(Workbench, "normal", record)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_three_passes(bench: Workbench, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recorded(monkeypatch)
    sizes = {"dtype": dtype, "m": 24, "n": 40, "k": 56}
    out = prepare_gemm(bench, **sizes, kind="forward").call()
    weight, inputs = made
    assert_near(out, inputs.double() @ weight.double().T, dtype)
    made.clear()
    out = prepare_gemm(bench, **sizes, kind="dgrad").call()
    weight, grads = made
    assert_near(out, grads.double() @ weight.double(), dtype)
    made.clear()
    work = prepare_gemm(bench, **sizes, kind="wgrad")
    grads, inputs, total = made
    before = total.clone()
    work.call()
    work.call()
    assert total.dtype == torch.float32
    assert_near(total - before, 2 * grads.double().T @ inputs.double(), dtype)


@pytest.mark.parametrize("method", METHODS)
def test_a_new_token_attends_to_all_that_is_cached(
    bench: Workbench, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recorded(monkeypatch)
    shape = AttentionShape(2, 24, 6, 2, 16)
    out = prepare_decode(bench, shape=shape, method=method, dtype="fp32").call().reshape(2, 6, 16)
    queries, keys, values = (tensor.double() for tensor in made)
    for head in range(6):
        scores = (queries[:, head // 3, head % 3, None] * keys[:, head // 3]).sum(-1) / 16**0.5
        expected = (scores.softmax(-1)[..., None] * values[:, head // 3]).sum(1)
        assert_near(out[:, head], expected)


@pytest.mark.parametrize("scaling", SCALINGS[:2])
def test_an_8_bit_product_is_that_of_its_rounded_and_scaled_operands(
    bench: Workbench, scaling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recorded(monkeypatch)
    out = prepare_product(bench, m=32, n=48, k=64, scaling=scaling).call()
    inputs, weight, scale, weight_scale = (tensor.double() for tensor in made)
    rounded = [tensor.to(torch.float8_e4m3fn).double() for tensor in made[:2]]
    expected = (scale * rounded[0]) @ (weight_scale.reshape(-1, 1) * rounded[1]).T
    assert out.dtype == torch.bfloat16
    assert_near(out, expected, "bf16")
    assert (out.double() - inputs @ weight.T).norm() > 1e-2 * expected.norm()  # it was rounded and scaled


def test_scales_of_blocks_have_the_layout_that_torch_asks_for(bench: Workbench) -> None:
    scale, weight_scale = scales(bench, 256, 384, 512, "block")
    assert (tuple(scale.shape), scale.stride()) == ((256, 4), (1, 256))
    assert (tuple(weight_scale.shape), weight_scale.stride()) == ((4, 3), (1, 4))
    with pytest.raises(UnmeasurableError, match="do not divide 100 x 512"):
        scales(bench, 256, 100, 512, "block")


def test_a_transposed_cast_is_contiguous_along_the_rows(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recorded(monkeypatch)
    out = prepare_cast(bench, kind="cast_transposed", rows=8, columns=16).call()
    assert out.is_contiguous()
    assert (out.float() == made[0].to(torch.float8_e4m3fn).float().T).all()
    largest = prepare_cast(bench, kind="amax", rows=8, columns=16).call()
    assert largest == made[1].abs().max()


def test_gradients_of_weights_add_up_in_fp32_even_where_bf16_would_stand_still(bench: Workbench) -> None:
    total = torch.full((8, 8), 4096.0)
    small = torch.full((1, 8), 0.5, dtype=torch.bfloat16)
    weight_gradient("cpu", "bf16").add(total, small, small)
    assert (total == 4096.25).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loads", [(8, 8, 8), (0, 24, 16), (1, 0, 0), (5, 2, 17)])
@pytest.mark.parametrize("method", ["loop", "grouped"])
def test_experts_products_equal_one_product_per_expert(
    bench: Workbench, dtype: str, loads: tuple[int, ...], method: str
) -> None:
    products = LOOP if method == "loop" else grouped_products("cpu", dtype)
    rows, n, k = sum(loads), 48, 32
    groups = Groups.of(bench, loads)
    inputs, grads = bench.normal(rows, k, dtype=dtype), bench.normal(rows, n, dtype=dtype)
    weight, total = bench.weight(3, n, k, dtype=dtype), bench.normal(3, n, k, dtype="fp32")
    of_row = torch.repeat_interleave(torch.arange(3), torch.tensor(loads))
    every = weight[of_row].double()
    assert_near(products.forward(inputs, weight, groups), torch.einsum("rk,rnk->rn", inputs.double(), every), dtype)
    assert_near(
        products.input_gradient(grads, weight, groups), torch.einsum("rn,rnk->rk", grads.double(), every), dtype
    )
    expected = total.double()
    expected.index_add_(0, of_row, torch.einsum("rn,rk->rnk", grads.double(), inputs.double()))
    products.add_weight_gradient(total, grads, inputs, groups)
    assert_near(total, expected, dtype)


def test_a_grouped_case_says_what_it_was_done_with(bench: Workbench) -> None:
    routed = RoutedLoads((4, 4), 0)
    sizes = {"routed": routed, "n": 16, "k": 16, "dtype": "fp32"}
    assert prepare_experts(bench, **sizes, kind="forward", method="loop").implementation == "loop of torch.mm"
    assert prepare_experts(bench, **sizes, kind="wgrad", method="loop").implementation == "loop of torch.addmm_"


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_and_its_gradient_equal_softmax_by_hand(
    bench: Workbench, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recorded(monkeypatch)
    shape = AttentionShape(2, 12, 4, kv_heads, 8)
    work = prepare_attention(bench, shape=shape, method="default", dtype="fp32", kind="backward")
    *inputs, grad = made
    found = work.call()
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    queries, keys, values = leaves
    keys, values = (tensor.repeat_interleave(4 // kv_heads, dim=1) for tensor in (keys, values))
    scores = (queries @ keys.transpose(-1, -2)) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -math.inf)
    out = scores.softmax(-1) @ values
    assert_near(attention_function(shares_keys=kv_heads != 4, method="default")(*inputs), out.detach())
    for ours, theirs in zip(found, torch.autograd.grad(out, leaves, grad.double()), strict=True):
        assert_near(ours, theirs)


def test_k_top_1_chooses_the_best_of_each_prototype(bench: Workbench) -> None:
    tokens, weight = bench.normal(16, 8, dtype="fp32"), bench.weight(12, 8, dtype="fp32")
    gates, experts = choose(score(tokens, weight, 3), 3)
    logits = (tokens @ weight.T).reshape(16, 3, 4)
    expected = logits.softmax(-1)
    for prototype in range(3):
        best = logits[:, prototype].argmax(-1)
        assert (experts[:, prototype] == best + 4 * prototype).all()
        assert_near(gates[:, prototype], expected[torch.arange(16), prototype, best])


def test_top_k_chooses_the_best_of_all(bench: Workbench) -> None:
    tokens, weight = bench.normal(16, 8, dtype="bf16"), bench.weight(12, 8, dtype="fp32")
    gates, experts = choose(score(tokens, weight, 1), 2)
    probabilities = (tokens.double() @ weight.double().T).softmax(-1)
    ranked = probabilities.argsort(dim=-1, descending=True)
    assert (experts == ranked[:, :2]).all()
    assert_near(gates, probabilities.gather(1, ranked[:, :2]))


def drawn_experts(tokens: int, num_experts: int, experts_per_token: int):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :experts_per_token]


def test_rows_are_sorted_by_expert_and_come_back(bench: Workbench) -> None:
    experts, tokens = drawn_experts(20, 6, 3), bench.normal(20, 8, dtype="fp32")
    order = sort_rows(experts)
    assert (experts.flatten()[order.choice_of_row].diff() >= 0).all()
    assert_near(sum_rows(gather_rows(tokens, order), order), 3 * tokens)


def test_gradients_of_permute_and_unpermute_are_those_of_autograd(bench: Workbench) -> None:
    order = sort_rows(drawn_experts(20, 6, 3))
    tokens, rows = bench.normal(20, 8, dtype="fp32"), bench.normal(60, 8, dtype="fp32")
    gates, grads = bench.normal(20, 3, dtype="fp32"), bench.normal(20, 8, dtype="fp32")
    leaf = tokens.clone().requires_grad_()
    assert_near(sum_rows(rows, order), torch.autograd.grad(gather_rows(leaf, order), leaf, rows)[0])
    leaves = [rows.clone().requires_grad_(), gates.clone().requires_grad_()]
    expected = torch.autograd.grad(weigh_rows(*leaves, order), leaves, grads)
    for ours, theirs in zip(weigh_rows_gradient(grads, rows, gates, order), expected, strict=True):
        assert_near(ours, theirs)


def test_one_hot_masks_move_the_same_tokens_as_sorting(bench: Workbench) -> None:
    shape = OneHotShape(1, 20, 6, 20, 8, 3)
    experts, tokens = drawn_experts(20, 6, 3), bench.normal(1, 20, 8, dtype="fp32")
    gates = bench.normal(1, 20, 3, dtype="fp32")
    dispatch, combine = one_hot_masks(experts[None], gates, shape)
    slots = to_slots(dispatch, tokens)[:, 0]
    order = sort_rows(experts)
    rows = gather_rows(tokens[0], order)
    loads = torch.bincount(experts.flatten(), minlength=6)
    for expert, ours in enumerate(rows.split(loads.tolist())):
        filled = slots[expert][: len(ours)]
        assert_near(filled.sum(0), ours.sum(0))  # the same tokens; GShard fills first choices first
        assert (slots[expert][len(ours) :] == 0).all()
    assert_near(to_tokens(combine, slots[:, None])[0], weigh_rows(rows, gates[0], order))


def test_choices_beyond_the_slots_are_dropped_second_choices_first() -> None:
    experts = torch.tensor([[[0, 1], [1, 0], [0, 1]]])
    dispatch, _ = one_hot_masks(experts, torch.ones(1, 3, 2), OneHotShape(1, 3, 2, 2, 4, 2))
    assert dispatch.shape == (1, 3, 2, 2)
    assert dispatch[0].sum((1, 2)).tolist() == [2, 1, 1]  # token 0: both; 1: its first; 2: its first
    assert dispatch[0].sum((0, 2)).tolist() == [2, 2]
    assert dispatch[0].sum(0).max() == 1  # no slot is taken twice


def dense_layer(tokens, weights: MoeWeights, leaves: dict, experts):
    """Every expert multiplies every token; a one-hot mask with the gates chooses."""
    gates = (tokens @ leaves["router"].T).softmax(-1).gather(1, experts)
    mask = torch.zeros(len(tokens), len(leaves["up"]), dtype=tokens.dtype).scatter_add(1, experts, gates)
    both = torch.einsum("th,xnh->xtn", tokens, leaves["up"])
    gate, up = both.chunk(2, dim=-1)
    inner = gate * torch.sigmoid(gate) * up
    return torch.einsum("tx,xtn,xhn->th", mask, inner, leaves["down"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", ["W0", "W1", "W5"])
def test_a_layer_and_its_gradients_equal_the_dense_einsum(bench: Workbench, dtype: str, preset: str) -> None:
    shape = MoeShape(64, 32, 48, 8, 2)
    weights, routing = make_layer(bench, shape, layer_loads(preset, 64, 8, 2, seed=0), dtype, 0)
    sums = {name: getattr(weights, f"{name}_sum") for name in ("router", "up", "down")}
    before = {name: total.clone() for name, total in sums.items()}
    tokens = bench.normal(64, 32, dtype=dtype).requires_grad_()
    out = run_layer(tokens, weights, routing)
    grad = bench.normal(64, 32, dtype=dtype)
    (found,) = torch.autograd.grad(out, tokens, grad)
    leaves = {name: getattr(weights, name).double().requires_grad_() for name in sums}
    inputs = tokens.detach().double().requires_grad_()
    expected = dense_layer(inputs, weights, leaves, routing.experts)
    assert_near(out, expected.detach(), dtype)
    wanted = torch.autograd.grad(expected, [inputs, *leaves.values()], grad.double())
    assert_near(found, wanted[0], dtype)
    for (name, total), theirs in zip(sums.items(), wanted[1:], strict=True):
        assert total.dtype == torch.float32
        assert_near(total - before[name], theirs, dtype)


def test_a_block_and_its_gradients_equal_plain_operations(bench: Workbench) -> None:
    shape = BlockShape(AttentionShape(2, 16, 4, 2, 8), MoeShape(32, 24, 40, 8, 2))
    experts, routing = make_layer(bench, shape.moe, layer_loads("W0", 32, 8, 2, seed=0), "fp32", 0)
    weights = make_block(bench, shape, "fp32")
    before = weights.output_sum.clone()
    tokens = bench.normal(32, 24, dtype="fp32").requires_grad_()
    grad = bench.normal(32, 24, dtype="fp32")
    out = run_block(tokens, shape.attention, weights, experts, routing)
    (found,) = torch.autograd.grad(out, tokens, grad)

    inputs, output = tokens.detach().double().requires_grad_(), weights.output.double().requires_grad_()
    leaves = {name: getattr(experts, name).double() for name in ("router", "up", "down")}

    def normed(rows, scale):
        return rows / (rows.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale.double()

    joined = normed(inputs, weights.first_norm) @ weights.queries_keys_values.double().T
    heads = joined.view(2, 16, 8, 8).transpose(1, 2)
    queries, keys, values = heads[:, :4], heads[:, 4:6].repeat_interleave(2, 1), heads[:, 6:].repeat_interleave(2, 1)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -math.inf)
    mixed = (scores.softmax(-1) @ values).transpose(1, 2).reshape(32, 32)
    middle = inputs + mixed @ output.T
    expected = middle + dense_layer(normed(middle, weights.second_norm), experts, leaves, routing.experts)
    wanted = torch.autograd.grad(expected, [inputs, output], grad.double())
    assert_near(out, expected.detach())
    assert_near(found, wanted[0])
    assert_near(weights.output_sum - before, wanted[1])


def test_an_adam_step_follows_its_formula(bench: Workbench) -> None:
    weight = bench.normal(64, dtype="fp32", scale=LEARNING_RATE)  # as small as the step, so that fp32 resolves it
    grad, first = bench.normal(64, dtype="fp32"), bench.normal(64, dtype="fp32")
    second = bench.normal(64, dtype="fp32").square()
    m = 0.9 * first.double() + 0.1 * grad.double()
    v = 0.95 * second.double() + 0.05 * grad.double() ** 2
    update = (m / (1 - 0.9**3)) / ((v / (1 - 0.95**3)).sqrt() + 1e-8) + 0.1 * weight.double()
    expected = weight.double() - LEARNING_RATE * update
    adam_step([weight], [grad], [first], [second], [torch.tensor(3.0)])
    assert_near(weight, expected)
    assert_near(first, m)
    assert_near(second, v)


def test_a_step_of_descent_follows_its_formula(bench: Workbench) -> None:
    grad, momentum = bench.normal(64, dtype="fp32"), bench.normal(64, dtype="fp32")
    expected = 0.9 * momentum.double() + grad.double()
    weight = torch.zeros(64)
    sgd_step([weight], [grad], [momentum])
    assert_near(momentum, expected)
    assert_near(weight, -LEARNING_RATE * expected)


def all_tensors(result: object) -> list:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in all_tensors(part)] if isinstance(result, tuple | list) else []


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_of_the_processor_runs_and_writes_every_element(bench: Workbench, suite: str) -> None:
    for case in SUITES[suite](Target("cpu", DTYPES, 0)):
        work: Work = case.prepare(bench)
        for tensor in [*all_tensors(work.call()), *all_tensors(work.call())]:
            assert not tensor.isnan().any(), case.identifier
        assert work.implementation


def test_inputs_are_normal_never_zero_and_sets_differ(bench: Workbench) -> None:
    first, second = (bench.normal(300, 500, dtype="fp32", scale=2.0) for _ in range(2))
    # 150,000 draws: the mean has a standard error of 0.005, the deviation one of 0.004; 5 sigma.
    assert abs(first.mean()) < 0.026
    assert abs(first.std() - 2) < 0.019
    assert (first == 0).float().mean() < 1e-4
    assert not torch.equal(first, second)
    assert torch.equal(first, open_workbench("cpu", 0).normal(300, 500, dtype="fp32", scale=2.0))
    assert not torch.equal(first, open_workbench("cpu", 1).normal(300, 500, dtype="fp32", scale=2.0))
    assert open_workbench("cpu", 0).empty(4, dtype="bf16").isnan().all()
