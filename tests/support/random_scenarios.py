"""Random legal scenarios by seed: legal by construction, whatever the model, degrees, cluster and stack."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from moesim.describe.documents import Document
from moesim.describe.hardware_library import HardwareLibrary
from moesim.estimation.loading import LoadedScenario, load_document

Fields = dict[str, Any]


class Machine(NamedTuple):
    """Cluster and stack that go together, the device counts to use of it, and the formats it computes in."""

    cluster: str
    stack: str
    devices: tuple[int, ...]
    compute: tuple[str, ...]


MACHINES: tuple[Machine, ...] = (
    Machine("v100_sxm2_32gb_60x8_shared_100g", "pytorch_einsum_nccl", (1, 8, 32, 48, 96, 480), ("fp16", "fp32")),
    Machine("v100_sxm2_32gb_60x8_shared_100g", "deepspeed_nccl", (2, 16, 64, 240), ("fp16",)),
    Machine("v100_sxm2_32gb_60x8_shared_100g", "tutel_nccl", (4, 8, 64, 128), ("fp16",)),
    Machine("k40_pcie_nodes", "pytorch_permute_nccl", (1, 4, 16), ("fp32",)),
    Machine("a100_sxm_dgx_nodes", "megatron_core_nccl_ampere", (8, 32, 96, 256), ("bf16", "fp16", "tf32")),
    Machine("a100_sxm_dgx_nodes", "fastertransformer_nccl", (1, 8, 16), ("bf16", "fp16")),
    Machine("h100_sxm_8", "megatron_core_nccl", (1, 2, 4, 8), ("bf16", "fp8")),
    Machine("h100_sxm_hgx_nodes", "megatron_core_deepep", (8, 64, 256, 1024), ("bf16", "fp8")),
    Machine("h800_sxm_hgx_nodes", "deepseek_dualpipe_deepep", (64, 256, 2048), ("bf16", "fp8")),
    Machine("b200_sxm_hgx_nodes", "megatron_core_hybridep_blackwell", (8, 64, 128), ("bf16", "fp8")),
    Machine("gb200_nvl72_racks", "megatron_core_hybridep_blackwell", (4, 64, 72, 144, 288), ("bf16", "fp8")),
    Machine("mi300x_nodes", "megatron_core_rccl", (8, 64, 128), ("bf16", "fp16")),
    Machine("tpu_v2_16x16", "xla_einsum", (8, 128, 512), ("bf16",)),
    Machine("tpu_v3_16x16", "xla_einsum", (2, 32, 128, 512), ("bf16",)),
    Machine("tpu_v3_32x32", "xla_einsum", (8, 256, 2048), ("bf16",)),
    Machine("tpu_v5p_8x8x8", "xla_gspmd_modern", (8, 64, 512), ("bf16",)),
    Machine("tpu_v5e_16x16", "xla_gspmd_modern", (16, 256), ("bf16",)),
)


def divisors(number: int) -> list[int]:
    """Divisors in rising order."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def random_document(seed: int) -> Fields:
    """Legal scenario document of a seed, as plain data."""
    dice = random.Random(seed)
    machine = dice.choice(MACHINES)
    devices = dice.choice(machine.devices)
    kind = dice.choice(["training"] * 6 + ["prefill", "decode"])
    is_moe = dice.random() < 0.85
    parallelism, expert_mesh = _degrees(dice, devices, kind)
    model, num_layers = _model(dice, parallelism, expert_mesh, is_moe=is_moe)
    others = parallelism["tensor"] * parallelism["context"] * parallelism["pipeline"]["stages"]
    workload = _workload(dice, kind, parallelism, model, devices // others)
    if is_moe:
        model["moe"]["router"]["group_tokens"] = _group_tokens(dice, parallelism, workload)
    parallelism["pipeline"] |= _stage_split(dice, parallelism["pipeline"], num_layers)
    return {
        "schema_version": 1,
        "name": f"random_{seed}",
        "model": model,
        "workload": workload,
        "precision": _precision(dice, machine),
        "optimizer": {
            "kind": dice.choice(["adam", "adafactor", "sgd"]),
            "momentum": dice.random() < 0.5,
            "state": dice.choice(["fp32", "bf16"]),
            "offload": dice.choice(["none", "none", "none", "optimizer"]),
        },
        "parallelism": parallelism,
        "cluster": machine.cluster,
        "devices": devices,
        "stack": machine.stack,
    }


def _degrees(dice: random.Random, devices: int, kind: str) -> tuple[Fields, tuple[int, int]]:
    """Degrees that multiply to the devices; with them the sizes that experts must divide over."""

    def degree(left: int, largest: int) -> int:
        return dice.choice([1, *(number for number in divisors(left) if number <= largest)])

    stages = degree(devices, 8)
    per_stage = devices // stages
    tensor = degree(per_stage, 8)
    context = degree(per_stage // tensor, 4)
    expert_tensor = degree(per_stage, 2)
    expert = dice.choice([number for number in divisors(per_stage // expert_tensor) if number <= 512])
    virtual = dice.choice([1, 1, 2, 3]) if kind == "training" else 1
    schedule = "interleaved_one_f_one_b" if virtual > 1 else dice.choice(["gpipe", "one_f_one_b", "one_f_one_b"])
    order = ["tensor", "context", "expert", "data", "pipeline"]
    if dice.random() < 0.2:
        dice.shuffle(order)
        order.remove("pipeline")  # in between, a stage need not be the same ranks in both meshes
        order.insert(dice.choice([0, len(order)]), "pipeline")
    fields = {
        "data": "auto" if dice.random() < 0.3 else per_stage // tensor // context,
        "tensor": tensor,
        "sequence": dice.random() < 0.5,
        "context": context,
        "pipeline": {"stages": stages, "virtual_stages": virtual, "schedule": schedule},
        "expert": expert,
        "expert_tensor": expert_tensor,
        "zero_stage": dice.choice([0, 0, 1, 1, 2, 3]),
        "recompute": dice.choice(["none", "selective", "full"]),
        "rank_order": order,
    }
    return fields, (expert, expert_tensor)


def _model(
    dice: random.Random, parallelism: Fields, expert_mesh: tuple[int, int], *, is_moe: bool
) -> tuple[Fields, int]:
    pipeline = parallelism["pipeline"]
    chunks = pipeline["stages"] * pipeline["virtual_stages"]
    is_pair = dice.random() < 0.25
    hidden = 128 * dice.choice([1, 2, 4, 6, 8, 16, 32, 56])
    sides = {"layers": chunks + dice.randrange(5)}
    if is_pair:
        sides["encoder_layers"] = 1 + dice.randrange(6)
    model: Fields = {
        "architecture": "encoder_decoder" if is_pair else "decoder_only",
        "hidden_size": hidden,
        "vocab_size": dice.choice([100, 32000, 50257, 129280]),
        "tied_embeddings": dice.random() < 0.5,
        "attention": _attention(dice, parallelism["tensor"]),
        "dense_ffn": {
            "intermediate_size": parallelism["tensor"] * 64 * dice.randint(1, 64),
            "is_gated": dice.random() < 0.5,
        },
        **{side: _layer_runs(dice, count, is_moe=is_moe) for side, count in sides.items()},
        "mtp_layers": dice.choice([0, 0, 0, 1, 2]),
    }
    if is_moe:
        model["moe"] = _experts(dice, *expert_mesh)
    return model, sum(sides.values())


def _attention(dice: random.Random, tensor: int) -> Fields:
    kind = dice.choice(["multi_head", "grouped_query", "latent"])
    heads = tensor * dice.choice([1, 2, 4, 8])
    size = dice.choice([32, 64, 128])
    if kind == "multi_head":
        return {"kind": kind, "heads": heads, "head_size": size}
    if kind == "grouped_query":
        shared = [number for number in divisors(heads) if number % tensor == 0 or tensor % number == 0]
        return {"kind": kind, "heads": heads, "kv_heads": dice.choice(shared), "head_size": size}
    return {
        "kind": kind,
        "heads": heads,
        "query_rank": dice.choice([None, 192, 1536]),
        "kv_rank": dice.choice([64, 512]),
        "head_size": size,
        "rope_head_size": dice.choice([32, 64]),
        "value_head_size": dice.choice([64, 128]),
    }


def _layer_runs(dice: random.Random, count: int, *, is_moe: bool) -> list[Fields]:
    """One or two runs of dense, MoE or alternating layers."""
    choices: list[Any] = ["moe", ["dense", "moe"], ["moe", "dense", "dense"], "dense"] if is_moe else ["dense"]
    first = dice.randint(0, count)
    return [{"count": part, "ffn": dice.choice(choices)} for part in (first, count - first) if part]


def _experts(dice: random.Random, expert: int, expert_tensor: int) -> Fields:
    experts = expert * dice.choice([1, 2, 3, 4])
    kind = dice.choice(["top_k", "top_k", "k_top_1"])
    k = dice.choice([number for number in (1, 2, 4, 8) if number <= experts])
    if kind == "k_top_1":
        k = dice.choice([number for number in divisors(experts) if number <= 8])
    shared = dice.choice([0, 0, 1, 2])
    return {
        "num_experts": experts,
        "intermediate_size": expert_tensor * 64 * dice.randint(1, 64),
        "is_gated": dice.random() < 0.5,
        "shared_experts": shared,
        "shared_intermediate_size": dice.choice([None, 2048]) if shared else None,
        "router": {
            "kind": kind,
            "experts_per_token": k,
            "capacity_factor": dice.choice([None, None, 1.0, 1.25, 2.0, 0.5]),
            "capacity_per": dice.choice(["token", "assignment"]),
            "max_nodes_per_token": dice.choice([None, 2, 4]),
            "precision": "fp32",
            "imbalance": _imbalance(dice, experts),
        },
    }


def _imbalance(dice: random.Random, experts: int) -> Fields:
    kind = dice.choice(["uniform", "max_over_mean", "power_law", "dirichlet", "histogram", "preset"])
    match kind:
        case "max_over_mean":
            return {"kind": kind, "value": dice.choice([1.0, 1.3, 2.0, 8.0])}
        case "power_law":
            return {"kind": kind, "exponent": dice.choice([0.0, 0.5, 1.2])}
        case "dirichlet":
            return {"kind": kind, "concentration": dice.choice([0.3, 1.0, 10.0])}
        case "histogram":
            return {"kind": kind, "loads": [float(dice.randint(0, 100)) for _ in range(experts - 1)] + [1.0]}
        case "preset":
            return {"kind": kind, "name": f"W{dice.randrange(8)}"}
    return {"kind": kind}


def _workload(dice: random.Random, kind: str, parallelism: Fields, model: Fields, data: int) -> Fields:
    pipeline = parallelism["pipeline"]
    micro_batch = dice.choice([1, 1, 2, 3, 4])
    count = dice.choice([1, 2, 3, 5, 8, 13, 24, 40, 77])
    if pipeline["schedule"] == "interleaved_one_f_one_b":
        count = pipeline["stages"] * dice.randint(1, 14)
    unit = parallelism["context"] * parallelism["tensor"]
    names = ["sequence_length"] if model["architecture"] == "decoder_only" else ["source_length", "target_length"]
    return {
        "kind": kind,
        **{name: unit * 8 * dice.choice([1, 2, 6, 16, 64]) for name in names},
        "sequences_per_micro_batch": micro_batch,
        "sequences_per_step": data * micro_batch * count,
        "tokens_counted": dice.choice(["source", "target", "all"]),
    }


def _group_tokens(dice: random.Random, parallelism: Fields, workload: Fields) -> int | None:
    """Null, more than there are, or a divisor of the tokens a rank routes (on either side of an encoder-decoder)."""
    if workload["kind"] == "decode":
        return dice.choice([None, 64])
    lengths = [workload[name] for name in ("sequence_length", "source_length", "target_length") if name in workload]
    shards = parallelism["context"] * parallelism["tensor"]
    tokens = min(lengths) * workload["sequences_per_micro_batch"] // shards
    common = [number for number in divisors(8 * workload["sequences_per_micro_batch"]) if tokens % number == 0]
    return dice.choice([None, 2 * max(lengths) * 64, max(common)])


def _stage_split(dice: random.Random, pipeline: Fields, num_layers: int) -> Fields:
    """Now and then an uneven split over the stages, given by hand; a stage may be empty."""
    if dice.random() > 0.15:
        return {}
    cuts = sorted(dice.randint(0, num_layers) for _ in range(pipeline["stages"] - 1))
    edges = [0, *cuts, num_layers]
    return {"layers_per_stage": [high - low for low, high in pairwise(edges)]}


def _precision(dice: random.Random, machine: Machine) -> Fields:
    compute = dice.choice(machine.compute)
    wide = compute if compute in ("bf16", "fp16") else "fp32" if compute in ("fp32", "tf32") else "bf16"
    return {
        "compute": compute,
        "parameters": dice.choice([wide, "fp32"]),
        "master": "fp32",
        "gradients": dice.choice(["fp32", wide]),
        "activations": wide,
        "saved": dice.choice([None, wide]),
        "dispatch": dice.choice([wide, "fp8"]) if compute == "fp8" else wide,
        "reduction": dice.choice(["fp32", wide]),
    }


@lru_cache(maxsize=1)
def shipped_library() -> HardwareLibrary:
    """Shipped profiles, read once."""
    return HardwareLibrary()


def loaded(fields: Fields) -> LoadedScenario:
    """Load plain data as a scenario; raises ``ScenarioError`` where it is illegal."""
    return load_document(Document(fields["name"], fields, {}), shipped_library())


def with_fields(fields: Fields, changes: dict[str, Any]) -> Fields:
    """Deep copy of plain data with other values at dotted paths."""

    def changed(value: Any, keys: Sequence[str], new: Any) -> Any:
        if not keys:
            return new
        if isinstance(value, list):
            index = int(keys[0])
            return [changed(item, keys[1:], new) if at == index else item for at, item in enumerate(value)]
        return {**value, keys[0]: changed(value.get(keys[0], {}), keys[1:], new)}

    for path, new in changes.items():
        fields = changed(fields, path.split("."), new)
    return fields
