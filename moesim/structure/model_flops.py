"""Model FLOPs: what the mathematics of a step needs, by the convention of the answer.

Forward times 3 for training, 2 per multiply-add, k experts per token, no padding, no recompute, no dispatch einsum;
router and head included, embedding look-up excluded, causal attention halved.
"""

from __future__ import annotations

from moesim.describe.model import Model
from moesim.describe.scenario import Scenario
from moesim.structure.columns import Columns, FloatArray
from moesim.structure.layers import LayerKind, layer_sequence
from moesim.structure.parameters import (
    attention_matrices,
    attention_output_width,
    attention_widths,
    moe_matrices,
    mtp_layer_kind,
)

CAUSAL_FRACTION = 0.5


def model_flops_per_step(scenario: Scenario, columns: Columns) -> FloatArray:
    """FLOPs of one step over all devices, shape (n_cases,), causal attention halved."""
    sequences = columns["step_sequences"]
    per_sequence = sequence_forward_flops(scenario, columns)
    passes = 3.0 if scenario.workload.kind == "training" else 1.0
    return passes * sequences * per_sequence


def sequence_forward_flops(scenario: Scenario, columns: Columns) -> FloatArray:
    """Forward FLOPs of one sequence (one new token per sequence when decoding), shape (n_cases,)."""
    model = scenario.model
    sequence = layer_sequence(model)
    is_decode = scenario.workload.kind == "decode"
    queries = {"encoder": columns["source_length"] * (0.0 if is_decode else 1.0)}
    queries["decoder"] = columns["target_length"] * 0 + 1.0 if is_decode else columns["target_length"]
    total = columns["target_length"] * 0.0
    for kind, count in zip(sequence.kinds, sequence.counts, strict=True):
        total = total + count * _layer_flops(scenario, kind, queries[kind.side], columns)
    head_tokens = queries["decoder"] if scenario.workload.kind == "training" else queries["decoder"] * 0 + 1.0
    head = 2.0 * model.hidden_size * model.vocab_size * head_tokens
    mtp_kind = mtp_layer_kind(sequence)
    module = _layer_flops(scenario, mtp_kind, queries["decoder"], columns)
    module = module + 4.0 * model.hidden_size**2 * queries["decoder"] + head
    mtp_layers = model.mtp_layers if scenario.workload.kind == "training" else 0
    return total + head + mtp_layers * module


def _layer_flops(scenario: Scenario, kind: LayerKind, tokens: FloatArray, columns: Columns) -> FloatArray:
    """Forward FLOPs of one layer over the queries of one sequence."""
    model, is_decode = scenario.model, scenario.workload.kind == "decode"
    keys = columns["source_length"] if kind.side == "encoder" else columns["target_length"]
    is_causal = kind.side == "decoder" and not is_decode and scenario.flop_convention == "causal"
    flops = _attention_flops(model, tokens, tokens, keys, CAUSAL_FRACTION if is_causal else 1.0)
    if kind.has_cross_attention:
        source = columns["source_length"]
        flops = flops + _attention_flops(model, tokens, source * (0.0 if is_decode else 1.0), source, 1.0)
    if kind.is_moe:
        active = sum(matrix.size * matrix.active_fraction for matrix in moe_matrices(model))
        return flops + 2.0 * active * tokens
    if model.dense_ffn is None:
        return flops
    matrices = 3.0 if model.dense_ffn.is_gated else 2.0
    return flops + 2.0 * matrices * model.hidden_size * model.dense_ffn.intermediate_size * tokens


def _attention_flops(
    model: Model, tokens: FloatArray, key_tokens: FloatArray, key_length: FloatArray, visible_fraction: float
) -> FloatArray:
    """Projections of queries and keys, scores and weighted sum."""
    query, key, value = attention_widths(model)
    width = float(query + attention_output_width(model))
    core = 2.0 * tokens * key_length * (width * visible_fraction)
    matrices = {matrix.name: float(matrix.size) for matrix in attention_matrices(model) if not matrix.is_norm}
    if "attention.qkv" in matrices:
        key_value = float(model.hidden_size * (key + value))
        query_side = sum(matrices.values()) - key_value
    else:
        key_value = matrices["attention.kv_down"] + matrices["attention.kv_up"]
        query_side = sum(matrices.values()) - key_value
    return core + 2.0 * (query_side * tokens + key_value * key_tokens)
