from collections.abc import Callable

import pytest

from moesim.estimation.estimate import estimate_loaded
from moesim.estimation.loading import LoadedScenario
from moesim.structure.layers import LayerKind
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_layers import dense_part, embedding_part, head_part, token_prediction_part
from moesim.structure.step_graph import AttentionCore, Collective, Gemm, OperationTable

Shipped = Callable[..., LoadedScenario]
M6T, MIXTRAL, DEEPSEEK = "m6t_1t_v100x480", "mixtral_8x7b", "deepseek_v3"
ONE_F_ONE_B = ("parallelism.pipeline.schedule=one_f_one_b", "parallelism.pipeline.virtual_stages=1")


def context_of(loaded: LoadedScenario) -> LoweringContext:
    return LoweringContext(loaded.scenario, loaded.system.stack, loaded.columns)


def flops(table: OperationTable, phase: str | None = None, category: str | None = None) -> float:
    total = 0.0
    for row in table.operations:
        if (phase or row.phase) != row.phase or (category or row.category) != row.category:
            continue
        work = row.work
        if isinstance(work, Gemm):
            total += float((2 * work.groups * work.rows * work.columns * work.inner)[0])
        elif isinstance(work, AttentionCore):
            total += float((2 * work.pairs * work.heads)[0]) * work.matmul_width * work.visible_fraction
    return total


def collective_bytes(table: OperationTable, stream: str, phase: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in table.operations:
        if row.stream == stream and row.phase == phase and isinstance(row.work, Collective):
            found[row.work.kind] = found.get(row.work.kind, 0.0) + float(row.work.num_bytes[0])
    return found


def test_materialised_attention_computes_the_masked_half_too(shipped: Shipped) -> None:
    table = dense_part(context_of(shipped(M6T)), LayerKind("decoder", True, False))
    tokens, hidden = 1024, 1024
    expected = 2 * tokens * 4 * hidden**2 + 4 * tokens * tokens * hidden
    assert flops(table, "forward", "attention") == expected
    assert flops(table, None, "attention") == 3 * expected


def test_a_flash_kernel_skips_the_masked_half_and_recomputes_scores_backward(shipped: Shipped) -> None:
    table = dense_part(context_of(shipped(MIXTRAL)), LayerKind("decoder", True, False))
    tokens, hidden = 4096, 4096
    projections = 2 * tokens * hidden * (4096 + 2048 + 4096)
    core = 4 * tokens * tokens * hidden / 2
    assert flops(table, "forward", "attention") == pytest.approx(projections + core, rel=1e-12)
    assert flops(table, None, "attention") == pytest.approx(3 * projections + 3.5 * core, rel=1e-12)


def test_latent_attention_by_hand(shipped: Shipped) -> None:
    table = dense_part(context_of(shipped(DEEPSEEK)), LayerKind("decoder", True, False))
    tokens, hidden = 4096, 7168
    matrices = hidden * 1536 + 1536 * 128 * 192 + hidden * 576 + 512 * 128 * 256 + 128 * 128 * hidden
    core = 2 * tokens * tokens * 128 * (192 + 128) / 2
    assert flops(table, "forward", "attention") == pytest.approx(2 * tokens * matrices + core, rel=1e-12)


def test_cross_attention_projects_keys_of_the_source(shipped: Shipped) -> None:
    """T5-Base, micro-batch 16: the decoder layer minus its self-attention and feed-forward.

    On TPU a head of 64 fills half of the 128 lanes: the core's products cost twice their FLOPs.
    """
    decoder = dense_part(context_of(shipped("t5_base")), LayerKind("decoder", False, True))
    cross = [row for row in decoder.operations if row.name.startswith("cross_attention.")]
    target, source, hidden = 16 * 114, 16 * 512, 768
    expected = 2 * hidden**2 * (2 * target + 2 * source) + 4 * target * 512 * (2 * hidden)
    assert flops(OperationTable("cross", cross), "forward") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_tensor_ranks_divide_the_flops_of_a_dense_layer(shipped: Shipped, tensor: int) -> None:
    kind = LayerKind("decoder", False, False)
    dense = ("model.dense_ffn={intermediate_size: 14336, is_gated: true}",)
    whole = flops(dense_part(context_of(shipped(MIXTRAL, *dense)), kind))
    degrees = (f"parallelism.tensor={tensor}", f"parallelism.data={16 // tensor}")
    shard = flops(dense_part(context_of(shipped(MIXTRAL, *dense, *degrees)), kind))
    assert shard == pytest.approx(whole / tensor, rel=1e-12)


def test_tensor_parallelism_reduces_once_per_block_forward_and_backward(shipped: Shipped) -> None:
    """Megatron-LM: an all-reduce of s b h after attention and after the feed-forward, and again backward."""
    kind, size = LayerKind("decoder", False, False), 4096 * 4096 * 2.0
    degrees = ("parallelism.tensor=4", "parallelism.data=4", "model.dense_ffn={intermediate_size: 14336}")
    plain = dense_part(context_of(shipped(MIXTRAL, *degrees)), kind)
    sequence = dense_part(context_of(shipped(MIXTRAL, *degrees, "parallelism.sequence=true")), kind)
    for phase in ("forward", "activation_gradient"):
        assert collective_bytes(plain, "tensor_parallel", phase)["all_reduce"] == 2 * size
        assert collective_bytes(sequence, "tensor_parallel", phase)["all_reduce"] == 0
        assert collective_bytes(sequence, "tensor_parallel", phase)["reduce_scatter"] == 2 * size
    assert collective_bytes(sequence, "tensor_parallel", "forward")["all_gather"] == 2 * size
    assert collective_bytes(sequence, "tensor_parallel", "activation_gradient")["all_gather"] == 4 * size


def test_context_ranks_gather_keys_and_values_of_the_whole_sequence(shipped: Shipped) -> None:
    """Mixtral, context 2: 4096 tokens x 2 x 8 heads x 128 x 2 bytes, whatever the context degree."""
    for context in (2, 4):
        loaded = shipped(MIXTRAL, f"parallelism.context={context}", f"parallelism.data={16 // context}")
        table = dense_part(context_of(loaded), LayerKind("decoder", True, False))
        gathered = collective_bytes(table, "context_parallel", "forward")["all_gather"]
        assert gathered == 4096 * 2 * 8 * 128 * 2
        attention = flops(table, "forward", "attention")
        whole = flops(
            dense_part(context_of(shipped(MIXTRAL)), LayerKind("decoder", True, False)), "forward", "attention"
        )
        assert attention == pytest.approx(whole / context, rel=1e-12)


def test_the_head_covers_the_vocabulary_and_training_all_tokens(shipped: Shipped) -> None:
    assert flops(head_part(context_of(shipped(M6T))), "forward") == 2 * 1024 * 1024 * 50_000
    prefill = shipped(M6T, "workload.kind=prefill")
    assert flops(head_part(context_of(prefill))) == 2 * 1024 * 50_000


def test_a_vocabulary_that_does_not_divide_is_padded(shipped: Shipped) -> None:
    loaded = shipped(M6T, "model.vocab_size=50001", "parallelism.tensor=2", "parallelism.data=240")
    assert flops(head_part(context_of(loaded)), "forward") == 2 * 1024 * 1024 * 25_001


def test_the_embedding_multiplies_nothing(shipped: Shipped) -> None:
    assert flops(embedding_part(context_of(shipped(M6T)))) == 0


def test_a_prediction_module_projects_two_hidden_vectors_to_one(shipped: Shipped) -> None:
    table = token_prediction_part(context_of(shipped(DEEPSEEK)))
    assert flops(table, "forward") == 2 * 4096 * 2 * 7168**2


@pytest.mark.parametrize(
    ("name", "assignments"),
    [(MIXTRAL, (*ONE_F_ONE_B, "workload.kind=decode")), (MIXTRAL, (*ONE_F_ONE_B, "workload.kind=prefill"))],
)
def test_a_dropless_flash_inference_step_executes_its_model_flops(
    shipped: Shipped, name: str, assignments: tuple[str, ...]
) -> None:
    """No padding, no recompute, no einsum, masked half skipped: two independent counts must agree."""
    answer = estimate_loaded(shipped(name, *assignments))
    assert answer.hardware_flops_per_step == pytest.approx(answer.model_flops_per_step, rel=1e-9)


def test_a_dropless_flash_training_step_executes_half_a_core_more(shipped: Shipped) -> None:
    """Flash attention recomputes scores: backward 2.5 cores instead of 2."""
    answer = estimate_loaded(shipped(MIXTRAL))
    core = 32 * 256 * 4 * 4096 * 4096 * 4096 / 2
    assert answer.hardware_flops_per_step == pytest.approx(answer.model_flops_per_step + 0.5 * core, rel=1e-9)


def test_the_head_stays_in_16_bits_where_layers_are_quantised(shipped: Shipped) -> None:
    """DeepSeek-V3 in 8 bits: projections of layers are, the head (no cast before it) and attention cores are not."""
    context = context_of(shipped(DEEPSEEK))
    layer = dense_part(context, LayerKind("decoder", False, False))
    formats = {
        (row.name, row.work.precision, row.work.input_bytes)
        for row in (*layer.operations, *head_part(context).operations)
        if isinstance(row.work, Gemm)
    }
    assert ("head", "bf16", 2.0) in formats
    assert ("attention.kv_up", "fp8", 1.0) in formats
    assert {name for name, precision, _ in formats if precision == "bf16"} == {"head"}
    assert "head.quantise" not in {row.name for row in head_part(context).operations}
    wide = head_part(context_of(shipped(MIXTRAL, "precision.compute=fp16"))).operations[0].work
    assert isinstance(wide, Gemm)
    assert wide.precision == "fp16"


def test_full_recompute_repeats_the_forward_pass_of_every_layer_but_not_the_head(shipped: Shipped) -> None:
    none = estimate_loaded(shipped(MIXTRAL)).hardware_flops_per_step
    full = estimate_loaded(shipped(MIXTRAL, "parallelism.recompute=full")).hardware_flops_per_step
    prefill = estimate_loaded(shipped(MIXTRAL, *ONE_F_ONE_B, "workload.kind=prefill"))
    head_of_last_token = 256 * 2 * 4096 * 32_000
    assert full - none == pytest.approx(prefill.hardware_flops_per_step - head_of_last_token, rel=1e-9)


def test_decoding_does_not_run_the_encoder_again(shipped: Shipped) -> None:
    base = estimate_loaded(shipped("t5_base", "workload.kind=decode"))
    deeper = estimate_loaded(shipped("t5_base", "workload.kind=decode", "model.encoder_layers.0.count=24"))
    assert base.hardware_flops_per_step < 1.5 * base.model_flops_per_step
    assert deeper.hardware_flops_per_step == base.hardware_flops_per_step
    assert deeper.step_time_s == base.step_time_s
