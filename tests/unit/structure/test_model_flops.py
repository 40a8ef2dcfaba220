"""The convention of the answer: forward x 3, 2 per multiply-add, k experts, no padding, causal half, no embedding."""

from collections.abc import Callable

import pytest

from moesim.estimation.loading import LoadedScenario
from moesim.structure.model_flops import model_flops_per_step, sequence_forward_flops

M6T = "m6t_1t_v100x480"
DENSE = ("model.layers=[{count: 24, ffn: dense}]", "model.moe=null", "parallelism.expert=1")
# Table 9 of arXiv:2101.03961, forward FLOPs per sequence of 512 source and 114 target tokens.
TABLE_9 = {"t5_base": 124e9, "t5_large": 425e9}


def flops_per_step(loaded: LoadedScenario) -> float:
    return float(model_flops_per_step(loaded.scenario, loaded.columns)[0])


def forward_flops_per_sequence(loaded: LoadedScenario) -> float:
    return float(sequence_forward_flops(loaded.scenario, loaded.columns)[0])


def test_a_dense_decoder_needs_six_flops_per_parameter_and_token_and_half_the_attention(
    shipped: Callable[..., LoadedScenario],
) -> None:
    """N counts matrices and head, not the embedding; causal attention: 12 T S d per layer, halved."""
    layers, hidden, length, sequences = 24, 1024, 1024, 480
    matrices = layers * (4 * hidden**2 + 2 * hidden * 4096) + hidden * 50_000
    tokens = length * sequences
    expected = 6 * matrices * tokens + 6 * layers * tokens * length * hidden
    assert flops_per_step(shipped(M6T, *DENSE)) == pytest.approx(expected, rel=1e-12)


def test_a_moe_step_counts_k_experts_the_router_and_no_padding(shipped: Callable[..., LoadedScenario]) -> None:
    layers, hidden, length, sequences, width, experts = 24, 1024, 1024, 480, 21248, 960
    tokens = length * sequences
    for k in (1, 2, 4):
        active = layers * (4 * hidden**2 + hidden * experts + k * 2 * hidden * width) + hidden * 50_000
        expected = 6 * active * tokens + 6 * layers * tokens * length * hidden
        found = flops_per_step(shipped(M6T, f"model.moe.router.experts_per_token={k}"))
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "assignment",
    [
        "model.moe.router.capacity_factor=2.0",
        "model.moe.router.group_tokens=256",
        "model.moe.router.capacity_per=assignment",
        "model.moe.router.kind=k_top_1",
        "parallelism.recompute=full",
        "model.tied_embeddings=false",
        "precision.compute=fp32",
    ],
)
def test_model_flops_do_not_see_capacity_groups_recompute_or_tying(
    shipped: Callable[..., LoadedScenario], assignment: str
) -> None:
    assert flops_per_step(shipped(M6T, assignment)) == flops_per_step(shipped(M6T))


def test_projections_of_a_single_channel_count(shipped: Callable[..., LoadedScenario]) -> None:
    one, two, three = (flops_per_step(shipped(M6T, f"model.hidden_size={width}")) for width in (1, 2, 3))
    assert two - one == pytest.approx(three - two, rel=1e-9)


def test_gated_experts_have_three_matrices(shipped: Callable[..., LoadedScenario]) -> None:
    extra = flops_per_step(shipped(M6T, "model.moe.is_gated=true")) - flops_per_step(shipped(M6T))
    assert extra == pytest.approx(6 * 24 * 1024 * 21248 * 480 * 1024, rel=1e-9)


def test_shared_experts_are_used_by_every_token(shipped: Callable[..., LoadedScenario]) -> None:
    extra = flops_per_step(shipped(M6T, "model.moe.shared_experts=2")) - flops_per_step(shipped(M6T))
    assert extra == pytest.approx(6 * 24 * 2 * (2 * 1024 * 21248) * 480 * 1024, rel=1e-9)


def test_grouped_queries_shrink_keys_and_values_but_not_scores(shipped: Callable[..., LoadedScenario]) -> None:
    """Mixtral 8x7B by hand: 32 query heads, 8 key-value heads, 2 of 8 gated experts."""
    hidden, length, sequences, layers = 4096, 4096, 256, 32
    attention = hidden * (4096 + 2 * 1024) + 4096 * hidden
    active = layers * (attention + hidden * 8 + 2 * 3 * hidden * 14336) + hidden * 32_000
    tokens = length * sequences
    expected = 6 * active * tokens + 6 * layers * tokens * length * 4096
    assert flops_per_step(shipped("mixtral_8x7b")) == pytest.approx(expected, rel=1e-12)


def test_latent_attention_scores_use_the_key_width_and_the_value_width(shipped: Callable[..., LoadedScenario]) -> None:
    """DeepSeek-V3 with its prediction module by hand; scores 192 wide, values 128 wide, 128 heads."""
    hidden, length = 7168, 4096
    attention = hidden * 1536 + 1536 * 128 * 192 + hidden * 576 + 512 * 128 * 256 + 128 * 128 * hidden
    core = 2 * length**2 * 128 * (192 + 128) / 2
    moe = 9 * 3 * hidden * 2048 + hidden * 256
    dense_layer = 2 * length * (attention + 3 * hidden * 18432) + core
    moe_layer = 2 * length * (attention + moe) + core
    head = 2 * length * hidden * 129_280
    module = moe_layer + 2 * length * 2 * hidden * hidden + head
    expected = 3 * dense_layer + 58 * moe_layer + head + module
    assert forward_flops_per_sequence(shipped("deepseek_v3")) == pytest.approx(expected, rel=1e-12)


def test_training_is_three_forward_passes(shipped: Callable[..., LoadedScenario]) -> None:
    loaded = shipped(M6T)
    assert flops_per_step(loaded) == pytest.approx(3 * 480 * forward_flops_per_sequence(loaded), rel=1e-12)


def test_prefill_projects_only_the_last_token_to_the_vocabulary(shipped: Callable[..., LoadedScenario]) -> None:
    training, prefill = shipped(M6T), shipped(M6T, "workload.kind=prefill")
    difference = forward_flops_per_sequence(training) - forward_flops_per_sequence(prefill)
    assert difference == pytest.approx(2 * 1024 * 50_000 * 1023, rel=1e-9)
    assert flops_per_step(prefill) == pytest.approx(480 * forward_flops_per_sequence(prefill), rel=1e-12)


def test_a_decoded_token_attends_to_the_whole_cache(shipped: Callable[..., LoadedScenario]) -> None:
    loaded = shipped(M6T, "workload.kind=decode")
    active = 24 * (4 * 1024**2 + 1024 * 960 + 2 * 1024 * 21248) + 1024 * 50_000
    expected = 2 * active + 24 * 4 * 1024 * 1024
    assert forward_flops_per_sequence(loaded) == pytest.approx(expected, rel=1e-12)


def t5_parts(hidden: int, layers: int, width: int) -> dict[str, float]:
    """Forward FLOPs of T5 (2-matrix feed-forward) over 512 source and 114 target tokens, counted one by one."""
    source, target, vocab = 512, 114, 32_128
    projections, ffn = 4 * hidden**2, 2 * hidden * width
    return {
        "encoder": layers * 2 * source * (projections + ffn),
        "encoder_core": layers * 4 * source * source * hidden,
        "decoder": layers * 2 * target * (2 * projections + ffn),
        "decoder_core": layers * (4 * target * target * hidden / 2 + 4 * target * source * hidden),
        # Keys and values of cross-attention are projected from the source, not from the target.
        "cross_keys_beyond_target": layers * 2 * (source - target) * 2 * hidden**2,
        "head": 2 * target * hidden * vocab,
    }


@pytest.mark.parametrize(
    ("name", "hidden", "layers", "width"), [("t5_base", 768, 12, 3072), ("t5_large", 1024, 24, 4096)]
)
def test_an_encoder_decoder_model_by_hand(
    shipped: Callable[..., LoadedScenario], name: str, hidden: int, layers: int, width: int
) -> None:
    expected = sum(t5_parts(hidden, layers, width).values())
    assert forward_flops_per_sequence(shipped(name)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "hidden", "layers", "width"), [("t5_base", 768, 12, 3072), ("t5_large", 1024, 24, 4096)]
)
def test_the_published_flops_per_sequence_are_those_of_a_narrower_count(
    shipped: Callable[..., LoadedScenario], name: str, hidden: int, layers: int, width: int
) -> None:
    """Table 9 prints 124 and 425 GFLOPs without a definition; ours are 14 and 13 % more.

    What fits the prints within 2 % leaves out the head, the decoder's attention cores and the projection of the
    source's keys and values beyond the target's length. This is a plausibility check of size, not a validation.
    """
    parts = t5_parts(hidden, layers, width)
    narrow = parts["encoder"] + parts["encoder_core"] + parts["decoder"]
    assert narrow == pytest.approx(TABLE_9[name], rel=0.02)
    assert 1.10 < forward_flops_per_sequence(shipped(name)) / TABLE_9[name] < 1.16


@pytest.mark.parametrize(("dense", "switch"), [("t5_base", "switch_base"), ("t5_large", "switch_large")])
def test_a_switch_model_matches_the_flops_of_its_dense_control_but_for_the_router(
    shipped: Callable[..., LoadedScenario], dense: str, switch: str
) -> None:
    """Table 9 prints the same number for both; the router adds 2 x 128 x d per token of every other layer."""
    model = shipped(switch).scenario.model
    layers = sum(run.count for run in model.layers) // 2
    router = 2 * layers * (512 + 114) * model.hidden_size * 128
    difference = forward_flops_per_sequence(shipped(switch)) - forward_flops_per_sequence(shipped(dense))
    assert difference == pytest.approx(router, rel=1e-6)
    assert router < 0.01 * forward_flops_per_sequence(shipped(dense))


def test_decoding_does_not_run_the_encoder_again(shipped: Callable[..., LoadedScenario]) -> None:
    base = shipped("t5_base", "workload.kind=decode")
    deeper = shipped("t5_base", "workload.kind=decode", "model.encoder_layers.0.count=24")
    assert flops_per_step(base) == flops_per_step(deeper)
    # One token: self-attention over 114, cross-attention over 512 tokens whose keys are cached.
    per_layer = 2 * (4 * 768**2 + 2 * 768**2 + 2 * 768 * 3072) + 4 * (114 + 512) * 768
    assert forward_flops_per_sequence(base) == pytest.approx(12 * per_layer + 2 * 768 * 32_128, rel=1e-12)


def test_the_full_convention_counts_the_masked_half_of_the_decoder_only(shipped: Callable[..., LoadedScenario]) -> None:
    causal, full = shipped(M6T), shipped(M6T, "flop_convention=full")
    masked = 24 * 2 * 1024 * 1024 * 1024
    difference = forward_flops_per_sequence(full) - forward_flops_per_sequence(causal)
    assert difference == pytest.approx(masked, rel=1e-9)
    causal, full = shipped("t5_base"), shipped("t5_base", "flop_convention=full")
    difference = forward_flops_per_sequence(full) - forward_flops_per_sequence(causal)
    assert difference == pytest.approx(12 * 2 * 114 * 114 * 768, rel=1e-6)
