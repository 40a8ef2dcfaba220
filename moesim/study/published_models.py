"""Model shapes of published runs, as the fields of a scenario."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from moesim.describe.model import Model
from moesim.structure.parameters import count_parameters
from moesim.study.published_facts import Assumptions, PublishedRun, UnpredictableRunError

DEFAULT_VOCABULARY = 50304
DEFAULT_HEAD_SIZE = 128
EINSUM_GROUP_TOKENS = 2048
"""Routing group of GShard: its gate einsums take 598 us at peak (arXiv:2006.16668, Figure 8)."""
MTP_TFLOP_PER_TOKEN = 0.255
"""DeepSeek-V3 is published with 0.25 without and with 0.26 with its token prediction module."""


def model_fields(run: PublishedRun, assumed: Assumptions) -> dict[str, Any]:
    """The model's shape; gated networks are recognised by the published number of parameters."""
    variants = [_ungated_or_gated(run, is_gated, Assumptions()) for is_gated in (False, True)]
    total = run.number("total_params_b")
    if total is not None:
        counts = [_parameters(variant) for variant in variants]
        is_gated = abs(counts[1] / 1e9 - total) < abs(counts[0] / 1e9 - total)
        assumed.add("model.dense_ffn.is_gated", f"{is_gated}: nearer to the published {total:g} B parameters")
    else:
        is_gated = not run.text("attention").startswith("MHA")
        assumed.add("model.dense_ffn.is_gated", f"{is_gated}: by the kind of attention")
    return _ungated_or_gated(run, is_gated, assumed)


def _parameters(fields: dict[str, Any]) -> int:
    try:
        return count_parameters(Model.model_validate(fields)).total
    except ValidationError as error:
        first = error.errors()[0]
        raise UnpredictableRunError("model." + ".".join(map(str, first["loc"])), first["msg"]) from None


def _ungated_or_gated(run: PublishedRun, is_gated: bool, assumed: Assumptions) -> dict[str, Any]:
    attention = _attention(run, assumed)
    is_gpt = attention["kind"] == "multi_head"
    assumed.add("model.tied_embeddings", f"{is_gpt}: multi-head models of the table are GPT, T5 or MPT; others untied")
    fields: dict[str, Any] = {
        "architecture": "encoder_decoder" if run.is_encoder_decoder else "decoder_only",
        "hidden_size": run.count("d_model"),
        "vocab_size": _vocabulary(run, assumed),
        "tied_embeddings": is_gpt,
        "attention": attention,
        **_layers(run),
    }
    if run.count("n_experts", 0):
        fields["moe"] = _experts(run, is_gated, assumed)
    if dense := run.count("d_ff_dense", 0):
        fields["dense_ffn"] = {"intermediate_size": dense, "is_gated": is_gated}
    if run.text("model").startswith("DeepSeek-V3"):
        fields["mtp_layers"] = _mtp_layers(run, assumed)
    return fields


def _vocabulary(run: PublishedRun, assumed: Assumptions) -> int:
    if pair := re.search(r"(\d+)k src / (\d+)k tgt", run.text("note")):
        assumed.add("model.vocab_size", "the target's: the schema has one, and the head is what costs")
        return int(pair[2]) * 1000
    if run.number("vocab") is None:
        assumed.add("model.vocab_size", f"not published; {DEFAULT_VOCABULARY}, GPT-2 padded")
    return run.count("vocab", DEFAULT_VOCABULARY)


def _attention(run: PublishedRun, assumed: Assumptions) -> dict[str, Any]:
    text = run.text("attention")
    if "hybrid" in text or "Mamba" in text:
        raise UnpredictableRunError("attention", "hybrid of Mamba and attention: not in the schema")
    if "compressed sparse" in text or "local(" in text:
        raise UnpredictableRunError("attention", f"{text.split(',')[0]}: not in the schema")
    hidden = run.count("d_model")
    if run.number("n_heads") is None:
        assumed.add("model.attention", f"heads not published; multi-head of size {DEFAULT_HEAD_SIZE}")
    heads = run.count("n_heads", hidden // DEFAULT_HEAD_SIZE)
    if text.startswith("MLA"):
        return _latent_attention(text, heads)
    if "sliding window" in text:
        assumed.add("model.attention", "sliding windows are not in the schema: every layer sees all earlier tokens")
    head_size = run.count("head_dim", hidden // heads)
    kv_heads = run.count("n_kv_heads", heads)
    if kv_heads == heads:
        return {"kind": "multi_head", "heads": heads, "head_size": head_size}
    return {"kind": "grouped_query", "heads": heads, "kv_heads": kv_heads, "head_size": head_size}


def _latent_attention(text: str, heads: int) -> dict[str, Any]:
    sizes = {name: int(value) for name, value in re.findall(r"(q_lora|kv_lora|nope|rope|v)(\d+)", text)}
    return {
        "kind": "latent",
        "heads": heads,
        "query_rank": sizes.get("q_lora"),
        "kv_rank": sizes["kv_lora"],
        "head_size": sizes["nope"],
        "rope_head_size": sizes["rope"],
        "value_head_size": sizes["v"],
    }


def _layers(run: PublishedRun) -> dict[str, Any]:
    layers = run.count("n_layers")
    if run.is_encoder_decoder:
        half = [{"count": layers // 2, "ffn": _cycle(run)}]
        return {"encoder_layers": half, "layers": half}
    if first := re.search(r"all except first (\d+)", run.text("moe_layers")):
        dense = int(first[1])
        return {"layers": [{"count": dense, "ffn": "dense"}, {"count": layers - dense, "ffn": "moe"}]}
    return {"layers": [{"count": layers, "ffn": _cycle(run)}]}


def _cycle(run: PublishedRun) -> str | list[str]:
    if not run.count("n_experts", 0):
        return "dense"
    text = run.text("moe_layers")
    if text.startswith("every 2nd"):
        return ["dense", "moe"]
    if text == "every layer":
        return "moe"
    raise UnpredictableRunError("moe_layers", f"'{text}': not in the schema" if text else "not published")


def _experts(run: PublishedRun, is_gated: bool, assumed: Assumptions) -> dict[str, Any]:
    shared = run.count("n_shared_experts", 0)
    fields: dict[str, Any] = {
        "num_experts": run.count("n_experts"),
        "intermediate_size": run.count("d_ff_expert"),
        "is_gated": is_gated,
        "shared_experts": shared,
        "router": _router(run, assumed),
    }
    if shared:
        fields["shared_intermediate_size"] = run.count("d_ff_shared") // shared
    return fields


def _router(run: PublishedRun, assumed: Assumptions) -> dict[str, Any]:
    choices = run.count("top_k")
    published = re.match(r"[\d.]+", run.text("capacity_factor").removeprefix("2N/E style (cf "))
    capacity = float(published[0]) if published else None
    if not published and run.text("capacity_factor") not in ("dropless", "none"):
        assumed.add("model.moe.router.capacity_factor", "not published; dropless")
    per = "assignment" if "MaxText" in run.text("framework") else "token"
    if "fastmoe" in run.software and capacity is not None:
        experts_per_rank = run.count("n_experts") / run.count("ep")
        capacity = min(capacity * experts_per_rank, float(choices))
        assumed.add(
            "model.moe.router.capacity_factor",
            "FastMoE: an expert takes at most the factor times a rank's tokens, from all ranks; nothing is padded",
        )
    if "natural" in run.text("routing"):
        assumed.add("model.moe.router.imbalance", "a real router; predicted with equal loads")
    group = EINSUM_GROUP_TOKENS if "lingvo" in run.software else None
    if group:
        assumed.add("model.moe.router.group_tokens", f"not in the table; {group} as Figure 8 of GShard implies")
    return {
        "kind": "top_k",
        "experts_per_token": choices,
        "capacity_factor": capacity,
        "capacity_per": per,
        "group_tokens": group,
        "imbalance": {"kind": "uniform"},
    }


def _mtp_layers(run: PublishedRun, assumed: Assumptions) -> int:
    tokens, flops = run.number("tokens_per_s_per_device"), run.number("tflops_per_device")
    without = "w/o MTP" in run.text("note")
    if tokens and flops:
        without = flops / tokens < MTP_TFLOP_PER_TOKEN
    assumed.add(
        "model.mtp_layers", "published FLOPs per token and notes; DeepSeek-V3 trains with one where they say nothing"
    )
    return 0 if without else 1
