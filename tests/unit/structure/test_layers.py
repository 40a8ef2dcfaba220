from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.estimation.loading import LoadedScenario
from moesim.structure.layers import (
    even_layers_per_chunk,
    layer_sequence,
    layers_per_chunk_before_prediction,
    stage_plan,
)


@given(num_layers=st.integers(1, 300), num_chunks=st.integers(1, 64))
def test_an_even_split_sums_to_the_layers_and_differs_by_at_most_one(num_layers: int, num_chunks: int) -> None:
    shares = even_layers_per_chunk(num_layers, num_chunks)
    assert len(shares) == num_chunks
    assert sum(shares) == num_layers
    assert max(shares) - min(shares) <= 1


@given(num_layers=st.integers(1, 300), num_chunks=st.integers(3, 64))
def test_the_chunks_with_embedding_and_head_never_hold_more_than_an_inner_one(num_layers: int, num_chunks: int) -> None:
    shares = even_layers_per_chunk(num_layers, num_chunks)
    assert shares[-1] <= max(shares[1:-1])
    assert shares[0] <= max(shares[1:-1])


def test_a_cycle_of_feed_forward_kinds_alternates(shipped: Callable[..., LoadedScenario]) -> None:
    sequence = layer_sequence(shipped("switch_base").scenario.model)
    names = [sequence.kinds[index].name for index in sequence.order]
    assert names[:4] == ["encoder.dense", "encoder.moe", "encoder.dense", "encoder.moe"]
    assert names[12:14] == ["decoder.dense", "decoder.moe"]
    assert dict(zip([kind.name for kind in sequence.kinds], sequence.counts, strict=True)) == {
        "encoder.dense": 6,
        "encoder.moe": 6,
        "decoder.dense": 6,
        "decoder.moe": 6,
    }


def test_only_decoders_of_encoder_decoder_models_have_cross_attention(shipped: Callable[..., LoadedScenario]) -> None:
    pair = layer_sequence(shipped("switch_base").scenario.model)
    assert [kind.has_cross_attention for kind in pair.kinds] == [kind.side == "decoder" for kind in pair.kinds]
    alone = layer_sequence(shipped("deepseek_v3").scenario.model)
    assert not any(kind.has_cross_attention for kind in alone.kinds)
    assert alone.mtp_layers == 1


def test_runs_of_layers_stay_in_order_over_stages(shipped: Callable[..., LoadedScenario]) -> None:
    """DeepSeek-V3: the three dense layers are the first three of the 61; the last stage has room for the prediction."""
    sequence = layer_sequence(shipped("deepseek_v3").scenario.model)
    counts = stage_plan(sequence, 16, 1).stage_counts()
    dense, moe = (sequence.kinds.index(kind) for kind in sorted(sequence.kinds, key=lambda kind: kind.is_moe))
    assert counts[dense].tolist() == [3.0] + [0.0] * 15
    assert counts[moe].tolist() == [1.0] + [4.0] * 14 + [1.0]


@pytest.mark.parametrize(("stages", "virtual_stages"), [(1, 1), (4, 1), (4, 2), (8, 4), (5, 3)])
def test_every_layer_is_on_exactly_one_chunk(
    shipped: Callable[..., LoadedScenario], stages: int, virtual_stages: int
) -> None:
    sequence = layer_sequence(shipped("mixtral_8x7b").scenario.model)
    plan = stage_plan(sequence, stages, virtual_stages)
    assert plan.counts.shape == (1, stages * virtual_stages)
    assert plan.counts.sum() == 32
    assert plan.stage_counts().shape == (1, stages)


def test_chunk_c_runs_on_stage_c_modulo_stages(shipped: Callable[..., LoadedScenario]) -> None:
    """61 layers in 16 chunks are (4 x 15, 1); four stages take chunks s, s + 4, s + 8, s + 12."""
    sequence = layer_sequence(shipped("deepseek_v3").scenario.model)
    plan = stage_plan(sequence, 4, 4)
    assert plan.stage_counts().sum(axis=0).tolist() == [16, 16, 16, 4 + 4 + 4 + 1]


def test_given_layers_per_stage_are_honoured(shipped: Callable[..., LoadedScenario]) -> None:
    sequence = layer_sequence(shipped("mixtral_8x7b").scenario.model)
    given_layers = (7, 9, 10, 6)
    assert stage_plan(sequence, 4, 1, given_layers).stage_counts().sum(axis=0).tolist() == list(given_layers)
    interleaved = stage_plan(sequence, 4, 2, given_layers)
    assert interleaved.stage_counts().sum(axis=0).tolist() == list(given_layers)
    # Each stage's layers are spread evenly over its two chunks.
    assert np.abs(interleaved.counts[:, :4] - interleaved.counts[:, 4:]).max() <= 1


def test_layers_given_per_stage_keep_the_order_of_the_model(shipped: Callable[..., LoadedScenario]) -> None:
    sequence = layer_sequence(shipped("deepseek_v3").scenario.model)
    counts = stage_plan(sequence, 2, 1, (1, 60)).stage_counts()
    dense = next(index for index, kind in enumerate(sequence.kinds) if not kind.is_moe)
    assert counts[dense].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("num_layers", [5, 27, 61, 94])
@pytest.mark.parametrize("num_chunks", [2, 4, 8, 16, 32])
def test_token_prediction_gets_room_on_the_last_chunk_and_no_layer_is_lost(num_layers: int, num_chunks: int) -> None:
    counts = layers_per_chunk_before_prediction(num_layers, num_chunks, 1)
    assert len(counts) == num_chunks
    assert sum(counts) == num_layers
    assert min(counts) >= 0
    assert counts[-1] + 2 <= max(max(counts), 2)
