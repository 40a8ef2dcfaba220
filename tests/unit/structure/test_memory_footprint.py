from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario
from moesim.structure.layers import LayerKind, layer_sequence, stage_plan
from moesim.structure.lowering import LoweringContext
from moesim.structure.memory_footprint import (
    StateBytes,
    WorkingBytes,
    dispatch_buffer_bytes,
    layer_activations,
    optimizer_bytes_per_parameter,
    stage_parameters,
    state_bytes,
    working_bytes,
)

Shipped = Callable[..., LoadedScenario]
M6T, MIXTRAL, DEEPSEEK = "m6t_1t_v100x480", "mixtral_8x7b", "deepseek_v3"
ONE_F_ONE_B = ("parallelism.pipeline.schedule=one_f_one_b", "parallelism.pipeline.virtual_stages=1")
DENSE_MIXTRAL = (
    "model.layers=[{count: 32, ffn: dense}]",
    "model.dense_ffn={intermediate_size: 16384, is_gated: false}",
    "model.moe=null",
    "parallelism.expert=1",
    *ONE_F_ONE_B,
)
DECODER_DENSE, DECODER_MOE = LayerKind("decoder", False, False), LayerKind("decoder", True, False)


def context_of(loaded: LoadedScenario) -> LoweringContext:
    return LoweringContext(loaded.scenario, loaded.system.stack, loaded.columns)


def states_of(loaded: LoadedScenario) -> StateBytes:
    return state_bytes(context_of(loaded), stage_parameters(loaded.scenario, *plan_of(loaded)))


def plan_of(loaded: LoadedScenario) -> tuple:  # type: ignore[type-arg]
    sequence = layer_sequence(loaded.scenario.model)
    pipeline = loaded.scenario.parallelism.pipeline
    return sequence, stage_plan(sequence, pipeline.stages, pipeline.virtual_stages)


def working_of(loaded: LoadedScenario) -> WorkingBytes:
    sequence, plan = plan_of(loaded)
    parameters = stage_parameters(loaded.scenario, sequence, plan)
    return working_bytes(context_of(loaded), sequence, plan, parameters, loaded.system.load_factor)


def activations_of(loaded: LoadedScenario, kind: LayerKind) -> float:
    kept = layer_activations(context_of(loaded), kind, loaded.system.load_factor)
    return float(kept.kept(loaded.columns["recompute"])[0])


# weights, gradients, optimizer


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_zero_shards_what_its_stage_says(shipped: Shipped, zero_stage: int) -> None:
    """Mixtral 8x7B on 4 stages, data 16, expert 8, expert_data 2; bf16 weights, fp32 gradients, master and Adam.

    Stage 0 of the middle two has no ends: 8 layers of attention, norms, router (all replicated over data) and experts.
    """
    loaded = shipped(MIXTRAL, f"parallelism.zero_stage={zero_stage}")
    dense = 8 * (4096 * (4096 + 2048) + 4096 * 4096 + 2 * 4096 + 4096 * 8)
    expert = 8 * 8 * 3 * 4096 * 14336 / 8

    def held(from_stage: int) -> float:
        return dense / 16 + expert / 2 if zero_stage >= from_stage else dense + expert

    states = states_of(loaded)
    assert states.weights[1, 0] == pytest.approx(2 * held(3), rel=1e-12)
    assert states.gradients[1, 0] == pytest.approx(4 * held(2), rel=1e-12)
    assert states.optimizer[1, 0] == pytest.approx(12 * held(1), rel=1e-12)


def test_context_ranks_share_the_states_of_non_expert_parameters(shipped: Shipped) -> None:
    without = states_of(shipped(MIXTRAL, *ONE_F_ONE_B))
    halves = states_of(shipped(MIXTRAL, *ONE_F_ONE_B, "parallelism.context=2", "parallelism.data=8"))
    assert halves.optimizer == pytest.approx(without.optimizer)


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (("optimizer.kind=adam",), 4 + 8),
        (("optimizer.kind=adam", "precision.parameters=fp32"), 8),
        (("optimizer.kind=adam", "optimizer.state=bf16"), 4 + 4),
        (("optimizer.kind=sgd",), 4),
        (("optimizer.kind=sgd", "optimizer.momentum=true"), 4 + 4),
        (("optimizer.kind=adafactor",), 4),
        (("optimizer.kind=adafactor", "optimizer.momentum=true"), 4 + 4),
    ],
)
def test_optimizer_bytes_of_one_parameter(shipped: Shipped, assignments: tuple[str, ...], expected: float) -> None:
    assert optimizer_bytes_per_parameter(shipped(M6T, *assignments).scenario) == expected


def test_a_factored_second_moment_is_its_row_and_column_sums(shipped: Shipped) -> None:
    """M6-T 1T without tensor parallelism: two matrices of 2 local experts, router, attention, norms, embedding."""
    hidden, width = 1024, 21248
    layer = 2 * 2 * (hidden + width) + (hidden + 960) + (hidden + 3 * hidden) + (hidden + hidden) + 2 * hidden
    factored = 24 * layer + (50_000 + hidden) + hidden
    states = states_of(shipped(M6T, "precision.parameters=fp32"))
    assert states.optimizer[0, 0] == pytest.approx(4 * factored, rel=1e-12)


def test_an_offloaded_optimizer_leaves_no_state_on_the_device(shipped: Shipped) -> None:
    here, away = states_of(shipped(M6T)), states_of(shipped(M6T, "optimizer.offload=optimizer"))
    assert here.optimizer[0, 0] > 0
    assert away.optimizer[0, 0] == 0
    assert away.weights == pytest.approx(here.weights)


def test_inference_holds_weights_only(shipped: Shipped) -> None:
    states = states_of(shipped(MIXTRAL, *ONE_F_ONE_B, "workload.kind=prefill"))
    assert states.weights.min() > 0
    assert states.gradients.max() == states.optimizer.max() == 0


def test_tensor_ranks_share_all_but_norms_and_router(shipped: Shipped) -> None:
    one = shipped(MIXTRAL, *ONE_F_ONE_B, "parallelism.zero_stage=0")
    two = shipped(MIXTRAL, *ONE_F_ONE_B, "parallelism.zero_stage=0", "parallelism.tensor=2", "parallelism.data=8")
    attention = 8 * (4096 * (4096 + 2048) + 4096 * 4096)
    saved = states_of(one).weights[1, 0] - states_of(two).weights[1, 0]
    assert saved == pytest.approx(2 * attention / 2, rel=1e-12)


def test_expert_tensor_ranks_share_the_experts(shipped: Shipped) -> None:
    one = shipped(MIXTRAL, *ONE_F_ONE_B, "parallelism.zero_stage=0")
    two = shipped(MIXTRAL, *ONE_F_ONE_B, "parallelism.zero_stage=0", "parallelism.expert_tensor=2")
    saved = states_of(one).weights[1, 0] - states_of(two).weights[1, 0]
    assert saved == pytest.approx(2 * 8 * 3 * 4096 * 14336 / 2, rel=1e-12)


def test_a_tied_embedding_is_held_at_both_ends_of_a_pipeline(shipped: Shipped) -> None:
    embedding, layer = 50_000 * 1024, 4 * 1024**2 + 1024 * 960 + 2 * 1024 + 2 * 960 / 240 * 2 * 1024 * 21248 / 2
    split = shipped(
        M6T, "parallelism.pipeline.stages=2", "parallelism.data=240", "parallelism.expert=240", "devices=480"
    )
    weights = states_of(split).weights[:, 0] / 2
    assert weights[0] == pytest.approx(12 * layer + embedding, rel=1e-12)
    assert weights[1] == pytest.approx(12 * layer + embedding + 1024, rel=1e-12)
    whole = states_of(shipped(M6T)).weights[:, 0] / 2
    layer = 4 * 1024**2 + 1024 * 960 + 2 * 1024 + 2 * 2 * 1024 * 21248
    assert whole == pytest.approx([24 * layer + embedding + 1024], rel=1e-12)


def test_weights_of_all_devices_add_up_to_the_model(shipped: Shipped) -> None:
    """No tensor sharding and no replication of experts: stages x expert ranks x experts + stages x dense."""
    loaded = shipped(MIXTRAL, "parallelism.zero_stage=3")
    total = states_of(loaded).weights[:, 0].sum() * 16 / 2  # every stage has 16 devices, two bytes each
    assert total == pytest.approx(46_702_792_704, rel=1e-12)


# activations


def test_a_dense_layer_keeps_what_korthikanti_et_al_count(shipped: Shipped) -> None:
    """Bytes s b h (34 + 5 a s / h) (arXiv:2205.05198, equation 1): 16-bit, materialised scores, dropout masks.

    It holds exactly where the stack is unfused, d_ff = 4 h and heads x head size = h.
    """
    layers = ("model.layers=[{count: 24, ffn: dense}]", "model.moe=null", "parallelism.expert=1")
    for length, batch in ((1024, 1), (512, 4), (2048, 2)):
        loaded = shipped(
            M6T,
            *layers,
            f"workload.sequence_length={length}",
            f"workload.sequences_per_micro_batch={batch}",
            "workload.sequences_per_step=1920",
        )
        expected = length * batch * 1024 * (34 + 5 * 16 * length / 1024)
        assert activations_of(loaded, DECODER_DENSE) == pytest.approx(expected, rel=1e-12)


def test_a_moe_layer_with_one_hot_masks_by_hand(shipped: Shipped) -> None:
    """M6-T 1T: attention 13 s b h + 5 a s^2 b; router in fp32 twice; 1,920 expert rows; two masks of T x E x C."""
    tokens, hidden, rows = 1024, 1024, 1920
    attention = 13 * tokens * hidden + 5 * 16 * tokens * tokens
    router, masks = tokens * 960 * 2 * 4, tokens * 960 * 2 * 2 * 2
    experts = rows * (2 * hidden + 2 * 2 * 21248 + 2 * hidden)
    expected = attention + 5 * tokens * hidden + router + masks + experts
    assert activations_of(shipped(M6T), DECODER_MOE) == pytest.approx(expected, rel=1e-12)


def test_a_moe_layer_of_a_fused_flash_permute_stack_by_hand(shipped: Shipped) -> None:
    """Mixtral 8x7B: no dropout mask, no scores but one fp32 sum per row and head, three inner tensors per expert.

    The router's weights multiply inside the experts, so what comes back need not be kept.
    """
    tokens, hidden, rows = 4096, 4096, 8192
    attention = tokens * (4 * hidden + 2 * (4096 + 2 * 1024) + 2 * 4096 + 4 * 32)
    router = tokens * 8 * 2 * 4
    experts = rows * (2 * hidden + 3 * 2 * 14336)
    expected = attention + 4 * tokens * hidden + router + experts
    assert activations_of(shipped(MIXTRAL), DECODER_MOE) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("modules", "dropped"),
    [
        ("layernorm", 2 * 2 * 4096 * 4096),
        ("moe_act", 8192 * 2 * 14336),
        ("moe", 4096 * 8 * 2 * 4 + 8192 * (2 * 4096 + 3 * 2 * 14336)),
        ("core_attn", 4096 * 4 * 32),
        ("mlp", 0),
        ("mla_up_proj", 0),
        ("layernorm, moe_act", 2 * 2 * 4096 * 4096 + 8192 * 2 * 14336),
    ],
)
def test_recompute_by_module_drops_what_the_module_makes(shipped: Shipped, modules: str, dropped: int) -> None:
    """Mixtral 8x7B, one layer: 4,096 tokens, 8,192 rows, bf16."""
    everything = activations_of(shipped(MIXTRAL), DECODER_MOE)
    chosen = ("parallelism.recompute=selective", f"parallelism.recompute_modules=[{modules}]")
    assert everything - activations_of(shipped(MIXTRAL, *chosen), DECODER_MOE) == pytest.approx(dropped, rel=1e-12)


def test_quantised_layers_keep_their_inputs_quantised(shipped: Shipped) -> None:
    """fp8 halves both norms' outputs of a dense layer and the activation's, and adds a copy of attention's output."""
    plain = activations_of(shipped(MIXTRAL, *DENSE_MIXTRAL), DECODER_DENSE)
    quantised = activations_of(shipped(MIXTRAL, *DENSE_MIXTRAL, "precision.compute=fp8"), DECODER_DENSE)
    assert plain - quantised == pytest.approx(4096 * (2 * 4096 + 16384 - 4096), rel=1e-12)


def test_tensor_parallelism_divides_what_korthikanti_et_al_say_it_divides(shipped: Shipped) -> None:
    """Bytes s b h (10 + 24/t + 5 a s / (h t)) without, s b h (34 + 5 a s / h) / t with sequence parallelism."""
    base = ("model.layers=[{count: 24, ffn: dense}]", "model.moe=null", "parallelism.expert=1")
    degrees = ("parallelism.tensor=4", "parallelism.data=120")
    size, ratio = 1024 * 1024, 5 * 16 * 1024 / 1024
    plain = activations_of(shipped(M6T, *base, *degrees), DECODER_DENSE)
    sequence = activations_of(shipped(M6T, *base, *degrees, "parallelism.sequence=true"), DECODER_DENSE)
    assert plain == pytest.approx(size * (10 + 24 / 4 + ratio / 4), rel=1e-12)
    assert sequence == pytest.approx(size * (34 + ratio) / 4, rel=1e-12)


def test_selective_recompute_drops_the_scores(shipped: Shipped) -> None:
    """arXiv:2205.05198, section 5: 34 s b h remain."""
    base = ("model.layers=[{count: 24, ffn: dense}]", "model.moe=null", "parallelism.expert=1")
    kept = activations_of(shipped(M6T, *base, "parallelism.recompute=selective"), DECODER_DENSE)
    assert kept == pytest.approx(34 * 1024 * 1024, rel=1e-12)


def test_full_recompute_keeps_the_input_of_a_layer(shipped: Shipped) -> None:
    kept = activations_of(shipped(M6T, "parallelism.recompute=full"), DECODER_MOE)
    assert kept == 2 * 1024 * 1024


@pytest.mark.parametrize("name", [M6T, MIXTRAL, DEEPSEEK, "switch_base", "gshard_600b_2048e_36l", "qwen3_235b_a22b"])
def test_recompute_never_keeps_more(shipped: Shipped, name: str) -> None:
    none, selective, full = (
        working_of(shipped(name, f"parallelism.recompute={policy}")).activations.max()
        for policy in ("none", "selective", "full")
    )
    assert full < selective <= none


def test_a_flash_kernel_keeps_no_scores(shipped: Shipped) -> None:
    """Mixtral: twice the sequence is twice the bytes, not four times the scores."""
    one = activations_of(shipped(MIXTRAL), DECODER_MOE)
    two = activations_of(shipped(MIXTRAL, "workload.sequence_length=8192"), DECODER_MOE)
    assert two == pytest.approx(2 * one, rel=1e-12)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 9])
def test_stage_s_of_one_f_one_b_holds_p_minus_s_micro_batches_or_all(shipped: Shipped, micro_batches: int) -> None:
    loaded = shipped(MIXTRAL, *DENSE_MIXTRAL, f"workload.sequences_per_step={16 * micro_batches}")
    layer = activations_of(loaded, DECODER_DENSE)
    activations = working_of(loaded).activations[:, 0]
    logits = 4096 * 32_000 * 6.0
    for stage in range(4):
        expected = 8 * layer * min(micro_batches, 4 - stage) + (logits if stage == 3 else 0)
        assert activations[stage] == pytest.approx(expected, rel=1e-12)


def test_gpipe_holds_every_micro_batch(shipped: Shipped) -> None:
    assignments = (*DENSE_MIXTRAL[:-2], "parallelism.pipeline.virtual_stages=1", "parallelism.pipeline.schedule=gpipe")
    loaded = shipped(MIXTRAL, *assignments, "workload.sequences_per_step=144")
    activations = working_of(loaded).activations[:3, 0]
    assert activations == pytest.approx(np.full(3, 8 * 9 * activations_of(loaded, DECODER_DENSE)), rel=1e-12)


def test_interleaving_costs_the_first_stage_one_plus_p_minus_one_over_pv(shipped: Shipped) -> None:
    """L s b h (34 + ...) (1 + (p - 1) / (p v)) on the first stage (arXiv:2205.05198, section 4.2.3)."""
    loaded = shipped(MIXTRAL)
    first = working_of(loaded).activations[0, 0]
    expected = 32 * activations_of(loaded, DECODER_MOE) * (1 + 3 / (4 * 8))
    assert first == pytest.approx(expected, rel=1e-12)


def test_saved_activations_shrink_with_their_format(shipped: Shipped) -> None:
    half = activations_of(shipped(DEEPSEEK, "precision.saved=bf16"), DECODER_MOE)
    quarter = activations_of(shipped(DEEPSEEK), DECODER_MOE)
    assert 0.5 <= quarter / half < 0.75


# buffers


def test_dispatch_buffers_hold_empty_slots_sent_and_received(shipped: Shipped) -> None:
    """M6-T 1T: 960 experts x 2 slots are sent, 2 experts x 480 ranks x 2 slots are received, 1024 wide, fp16."""
    loaded = shipped(M6T)
    buffers = dispatch_buffer_bytes(context_of(loaded), DECODER_MOE, loaded.system.load_factor)
    assert buffers[0] == (960 * 2 + 2 * 480 * 2) * 1024 * 2


def test_a_skewed_dropless_load_widens_what_the_fullest_rank_receives(shipped: Shipped) -> None:
    even = shipped(MIXTRAL)
    skewed = shipped(MIXTRAL, "model.moe.router.imbalance={kind: max_over_mean, value: 1.5}")
    one, two = (
        float(dispatch_buffer_bytes(context_of(loaded), DECODER_MOE, loaded.system.load_factor)[0])
        for loaded in (even, skewed)
    )
    assert two / one == pytest.approx((1 + 1.5) / 2)


def test_zero_three_holds_two_gathered_layers(shipped: Shipped) -> None:
    """The layer in use and the one being fetched, in the parameters' format."""
    layer = 4096 * 6144 + 4096 * 4096 + 2 * 4096 + 4096 * 8 + 3 * 4096 * 14336
    two = working_of(shipped(MIXTRAL, "parallelism.zero_stage=2")).buffers[1, 0]
    three = working_of(shipped(MIXTRAL, "parallelism.zero_stage=3")).buffers[1, 0]
    assert three - two == pytest.approx(2 * 2 * layer, rel=1e-12)


def cache_growth(shipped: Shipped, name: str, length: int, *assignments: str) -> npt.NDArray[np.float64]:
    """What ``length`` more cached tokens per sequence cost on each stage, bytes."""
    base = shipped(name, "workload.kind=decode", *assignments)
    longer = base.scenario.workload.sequence_length
    assert longer is not None
    more = shipped(name, "workload.kind=decode", *assignments, f"workload.sequence_length={longer + length}")
    return np.asarray((working_of(more).buffers - working_of(base).buffers)[:, 0])


def test_the_cache_of_grouped_queries_by_hand(shipped: Shipped) -> None:
    """Mixtral: 8 layers per stage, 256 / 16 sequences per rank, 8 key-value heads of 128, keys and values, bf16."""
    growth = cache_growth(shipped, MIXTRAL, 1000, *ONE_F_ONE_B)
    assert growth == pytest.approx(np.full(4, 8 * 16 * 1000 * 2 * 8 * 128 * 2), rel=1e-9)


def test_tensor_ranks_share_key_value_heads_until_there_is_one_each(shipped: Shipped) -> None:
    """8 key-value heads: tensor 2 leaves 4, tensor 16 leaves 1 (each head is held twice)."""
    for tensor, heads in ((2, 4), (8, 1), (16, 1)):
        degrees = (f"parallelism.tensor={tensor}", f"parallelism.data={16 // tensor}")
        growth = cache_growth(shipped, MIXTRAL, 1000, *ONE_F_ONE_B, *degrees)
        sequences = 256 / (16 // tensor)
        assert growth == pytest.approx(np.full(4, 8 * sequences * 1000 * 2 * heads * 128 * 2), rel=1e-9)


def test_the_latent_cache_by_hand(shipped: Shipped) -> None:
    """DeepSeek-V3: 512 + 64 numbers per token and layer, 120 sequences per rank; 4, ..., 4, 1 layers."""
    growth = cache_growth(shipped, DEEPSEEK, 1000)
    layers = np.array([4] * 15 + [1])
    assert growth == pytest.approx(layers * 120 * 1000 * (512 + 64) * 2, rel=1e-9)


def test_an_encoder_decoder_model_caches_target_and_source_in_decoder_layers_only(shipped: Shipped) -> None:
    """T5-Base: 12 decoder layers, 64 sequences per rank, keys and values 768 wide, bf16; no cache in the encoder."""
    buffers = working_of(shipped("t5_base", "workload.kind=decode")).buffers[0, 0]
    assert buffers == pytest.approx(12 * 64 * (114 + 512) * 2 * 768 * 2, rel=1e-9)


# the sum


def test_the_fullest_stage_is_the_one_that_is_reported(shipped: Shipped) -> None:
    loaded = shipped(DEEPSEEK)
    states, work = states_of(loaded), working_of(loaded)
    total = (states.weights + states.gradients + states.optimizer + work.activations + work.buffers)[:, 0]
    memory = estimate_loaded(loaded).memory
    assert memory.peak_stage == int(total.argmax())
    tensors = memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.buffers
    assert tensors == pytest.approx(total.max(), abs=5)
