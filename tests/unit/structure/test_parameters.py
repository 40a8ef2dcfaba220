import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesim.estimation.loading import LoadedScenario
from moesim.resources import shipped_scenarios
from moesim.structure.layers import LayerKind
from moesim.structure.parameters import (
    MatrixGroup,
    attention_matrices,
    attention_output_width,
    attention_widths,
    count_parameters,
    layer_matrices,
    sharded_sizes,
)

PUBLISHED: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "data" / "published_counts.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda row: row["scenario"])
def test_the_total_agrees_with_the_published_number(
    shipped: Callable[..., LoadedScenario], published: dict[str, Any]
) -> None:
    total = count_parameters(shipped(published["scenario"]).scenario.model).total
    assert total == pytest.approx(published["total"], rel=published["total_tolerance"]), published["note"]


@pytest.mark.parametrize(
    "published", [row for row in PUBLISHED if row["active"] is not None], ids=lambda row: row["scenario"]
)
def test_the_active_parameters_agree_with_the_published_number(
    shipped: Callable[..., LoadedScenario], published: dict[str, Any]
) -> None:
    active = count_parameters(shipped(published["scenario"]).scenario.model).active
    assert active == pytest.approx(published["active"], rel=published["active_tolerance"]), published["note"]


def test_every_shipped_model_with_a_published_size_is_compared() -> None:
    compared = {row["scenario"] for row in PUBLISHED}
    unnamed = {path.stem for path in shipped_scenarios()} - compared
    assert unnamed == {"megatron_moe_deepseek_8xh100", "megatron_moe_mixtral_8xh100"}  # one layer, no published size


def test_mixtral_by_hand(shipped: Callable[..., LoadedScenario]) -> None:
    """The exact count of the released weights: 46,702,792,704."""
    hidden, heads, kv_heads, head_size, width, experts, vocab = 4096, 32, 8, 128, 14336, 8, 32000
    attention = hidden * (heads + 2 * kv_heads) * head_size + heads * head_size * hidden
    layer = attention + 2 * hidden + hidden * experts + experts * 3 * hidden * width
    total = 32 * layer + 2 * vocab * hidden + hidden
    counts = count_parameters(shipped("mixtral_8x7b").scenario.model)
    assert total == 46_702_792_704
    assert counts.total == total
    assert counts.expert == 32 * experts * 3 * hidden * width
    assert counts.active == total - counts.expert * 6 // 8


def test_latent_attention_by_hand(shipped: Callable[..., LoadedScenario]) -> None:
    """DeepSeek-V3 attention: 187,107,328 parameters per layer with its two inner norms."""
    hidden, heads, q_rank, kv_rank, nope, rope, value = 7168, 128, 1536, 512, 128, 64, 128
    by_hand = hidden * q_rank + q_rank * heads * (nope + rope) + hidden * (kv_rank + rope)
    by_hand += kv_rank * heads * (nope + value) + heads * value * hidden + q_rank + kv_rank
    matrices = attention_matrices(shipped("deepseek_v3").scenario.model)
    assert by_hand == 187_107_328
    assert sum(matrix.size for matrix in matrices) == by_hand


def test_token_prediction_modules_are_counted_apart(shipped: Callable[..., LoadedScenario]) -> None:
    """One module: a MoE layer of 11.507 B, a projection of 2 x 7168 to 7168 and two norms."""
    model = shipped("deepseek_v3").scenario.model
    without = shipped("deepseek_v3", "model.mtp_layers=0").scenario.model
    layer = sum(matrix.size for matrix in layer_matrices(model, LayerKind("decoder", True, False)))
    assert count_parameters(model).total == count_parameters(without).total
    assert count_parameters(model).mtp == layer + 2 * 7168 * 7168 + 2 * 7168
    assert count_parameters(without).mtp == 0


def test_queries_keys_and_values_have_the_widths_of_their_heads(shipped: Callable[..., LoadedScenario]) -> None:
    grouped = shipped("mixtral_8x7b").scenario.model
    assert attention_widths(grouped) == (4096, 1024, 1024)
    latent = shipped("deepseek_v3").scenario.model
    assert attention_widths(latent) == (128 * 192, 128 * 192, 128 * 128)
    assert attention_output_width(latent) == 128 * 128


def test_a_decoder_layer_with_cross_attention_has_a_second_attention_block_and_norm(
    shipped: Callable[..., LoadedScenario],
) -> None:
    model = shipped("t5_base").scenario.model
    encoder = sum(matrix.size for matrix in layer_matrices(model, LayerKind("encoder", False, False)))
    decoder = sum(matrix.size for matrix in layer_matrices(model, LayerKind("decoder", False, True)))
    assert decoder - encoder == 4 * 768 * 768 + 768


def test_tying_the_embedding_saves_one_vocabulary_matrix(shipped: Callable[..., LoadedScenario]) -> None:
    tied = count_parameters(shipped("t5_base").scenario.model)
    untied = count_parameters(shipped("t5_base", "model.tied_embeddings=false").scenario.model)
    assert untied.total - tied.total == 32128 * 768


def test_prototypes_have_the_parameters_of_top_k(shipped: Callable[..., LoadedScenario]) -> None:
    name, k = "m6t_1t_v100x480", "model.moe.router.experts_per_token=4"
    top_k = count_parameters(shipped(name, k).scenario.model)
    prototypes = count_parameters(shipped(name, k, "model.moe.router.kind=k_top_1").scenario.model)
    assert prototypes == top_k


def test_a_factored_second_moment_keeps_a_row_and_a_column_sum_of_each_matrix() -> None:
    assert MatrixGroup("expert", 3, 10, 20, "expert").factored_size == 3 * (10 + 20)
    assert MatrixGroup("norm", 2, 1, 20, "replicated").factored_size == 2 * 20


def test_sizes_by_sharding_add_up(shipped: Callable[..., LoadedScenario]) -> None:
    model = shipped("deepseek_v3").scenario.model
    matrices = layer_matrices(model, LayerKind("decoder", True, False))
    sizes = sharded_sizes(matrices)
    assert sizes.tensor + sizes.replicated + sizes.expert == sum(matrix.size for matrix in matrices)
    assert sizes.expert == 256 * 3 * 7168 * 2048
    shared = 3 * 7168 * 2048
    assert sizes.tensor == shared + 128 * (128 + 128) * 512 + 1536 * 128 * 192 + 128 * 128 * 7168
