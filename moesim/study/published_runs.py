"""Published training runs as scenarios: one row of facts, general rules, every assumption named.

Nothing here is tuned to a row: cluster and stack follow from device, framework and options, and what a source does not
say is filled in by a default that is the same for all rows. A row whose shape, degrees or measurement cannot be had is
refused with the field that is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from moesim.describe.documents import Document
from moesim.describe.hardware_library import HardwareLibrary
from moesim.describe.scenario import DEFAULT_RECOMPUTE_MODULES, RecomputeModule
from moesim.study.published_facts import Assumptions, PublishedRun, UnpredictableRunError
from moesim.study.published_models import model_fields

MEGA = 2**20
FIRST_FLEXIBLE_DISPATCH, FIRST_WITHOUT_OVERLAP = 25.08, 26.04
"""Releases between which Megatron-Bridge's Hopper recipes with experts over nodes set ``moe_a2a_overlap = True``."""
FULL_GRAPH = re.compile("full.iteration")
"""Graphs of a whole iteration: every HybridEP preset of release 26.06 that has them sets the all-to-all's overlap, too;
later releases' presets name the graphs alone."""
RECOMPUTE_PATH = "parallelism.recompute"
DEFAULT_SEQUENCE = 512
TPU_MICRO_BATCH_TOKENS = 8192

CLUSTERS: dict[str, tuple[str, ...]] = {
    "V100": ("v100_sxm2_32gb_dgx1_nodes",),
    "V100-32GB": ("v100_sxm2_32gb_dgx1_nodes",),
    "A100 (40 or 80GB)": ("a100_sxm_40gb_shared_nics_nodes",),
    "A100-40GB": ("a100_sxm_40gb_dgx_nodes",),
    "A100-80GB": ("a100_sxm_dgx_nodes",),
    "A800-80GB": ("a800_sxm_nodes",),
    "H100": ("h100_sxm_hgx_nodes",),
    "H200": ("h200_sxm_hgx_nodes",),
    "H800": ("h800_sxm_hgx_nodes",),
    "B200": ("b200_sxm_hgx_nodes",),
    "B300": ("b300_sxm_hgx_nodes",),
    "GB200": ("gb200_nvl72_racks",),
    "GB300": ("gb300_nvl72_racks",),
    "MI250X GCD": ("mi250x_gcd_nodes",),
    "MI300X": ("mi300x_nodes",),
    "TPU v3": ("tpu_v3_4x4", "tpu_v3_8x8", "tpu_v3_16x16", "tpu_v3_32x32"),
    "TPU v4": ("tpu_v4_8x8x8", "tpu_v4_8x8x16"),
    "TPU v5e": ("tpu_v5e_4x4", "tpu_v5e_16x16"),
    "TPU v5p": ("tpu_v5p_2x2x1", "tpu_v5p_8x8x8"),
    "TPU v6e": ("tpu_v6e_8x8", "tpu_v6e_16x16"),
}
"""Clusters of a device, smallest first: the first that holds the run is taken."""

FAMILIES: tuple[tuple[str, str], ...] = (
    ("V100", "volta"),
    ("A100", "ampere"),
    ("A800", "ampere"),
    ("H", "hopper"),
    ("B", "blackwell"),
    ("GB", "blackwell"),
    ("MI", "amd"),
    ("TPU v3", "tpu_v3"),
    ("TPU", "tpu"),
)

STACK_RULES: tuple[tuple[str, str, str], ...] = (
    ("hopper", r"hai-llm", "deepseek_dualpipe_deepep"),
    ("ampere", r"fastmoe", "fastmoe_nccl"),
    ("volta", r"fastmoe", "fastmoe_nccl_volta"),
    ("ampere", r"tutel", "tutel_nccl"),
    ("ampere", r"x-moe|composer", "pytorch_permute_nccl"),
    ("ampere", r"deepspeed", "deepspeed_nccl"),
    ("hopper", r"deepep|hybridep", "megatron_core_deepep"),
    ("blackwell", r"\b(26\.(0[6-9]|1\d)|2[7-9]\.\d\d).*(deepep|hybridep)", "megatron_core_hybridep_blackwell_2606"),
    ("blackwell", r"deepep|hybridep", "megatron_core_hybridep_blackwell"),
    ("volta", r"", "pytorch_einsum_nccl"),
    ("ampere", r"", "megatron_core_nccl_ampere"),
    ("hopper", r"", "megatron_core_nccl"),
    ("blackwell", r"", "megatron_core_nccl_blackwell"),
    ("amd", r"", "megatron_core_rccl"),
    ("tpu_v3", r"", "xla_einsum"),
    ("tpu", r"", "xla_gspmd_modern"),
)
"""Family of devices, a pattern in framework and options, stack; the first that fits is taken."""

BF16_GRADIENTS = r"megatron-bridge|nemo"
"""Frameworks whose performance recipes set ``grad_reduce_in_fp32 = False``: gradients are kept and reduced in bf16."""

FULL_CONVENTION = r"mcore v0|x-moe|deepspeed|nemo 24"
"""Frameworks whose published FLOPs count the whole square of causal attention."""


def scenario_document(run: PublishedRun, library: HardwareLibrary) -> Document:
    """Scenario of a published run.

    Raises
    ------
    UnpredictableRunError
        If something without a general default is missing, or the schema cannot say it.
    """
    assumed = Assumptions()
    if run.text("scope") != "full_step":
        raise UnpredictableRunError("scope", f"{run.text('scope')}: not the time of one step")
    data: dict[str, Any] = {
        "schema_version": 1,
        "name": re.sub(r"[^a-z0-9]+", "_", run.id.lower()).strip("_"),
        "description": f"{run.text('model')} on {run.text('n_devices')} {run.text('device')}, {run.text('framework')}",
        "references": [run.text("source")],
        "flop_convention": "full" if re.search(FULL_CONVENTION, run.software) else "causal",
        "cluster": cluster_of(run, library, assumed),
        "devices": run.devices,
        "stack": stack_of(run),
        "stack_options": stack_options(run),
        "model": model_fields(run, assumed),
        "precision": precision_fields(run, assumed),
        "optimizer": _optimizer(run, assumed),
        "parallelism": parallelism_fields(run, assumed),
    }
    data["workload"] = workload_fields(run, data["parallelism"], assumed)
    data["assumed"] = assumed.reasons
    return Document(run.id, data, {})


def family_of(run: PublishedRun) -> str:
    """Hardware family, which decides collective constants and defaults."""
    device = run.text("device")
    for prefix, family in FAMILIES:
        if device.startswith(prefix):
            return family
    raise UnpredictableRunError("device", f"no profile of {device}")


def cluster_of(run: PublishedRun, library: HardwareLibrary, assumed: Assumptions) -> str:
    """The smallest cluster of the run's device that holds it; sources rarely describe the network."""
    device = run.text("device")
    known = [name for name in CLUSTERS.get(device, ()) if library.path("clusters", name) is not None]
    if not known:
        raise UnpredictableRunError("device", f"no cluster profile of {device}")
    for name in known:
        if library.cluster(name).device_count >= run.devices:
            assumed.add("cluster", f"by device: {run.text('interconnect') or 'interconnect not published'}")
            return name
    raise UnpredictableRunError("n_devices", f"no cluster profile holds {run.devices} {device}")


def stack_of(run: PublishedRun) -> str:
    """The stack of the first rule that fits family and software."""
    family = family_of(run)
    software = run.software + (" deepep" if _release_of_flexible_dispatch(run) else "")
    return next(stack for needed, pattern, stack in STACK_RULES if needed == family and re.search(pattern, software))


def _release_of_flexible_dispatch(run: PublishedRun) -> float | None:
    """Release of a Hopper recipe that says nothing of its dispatcher, where that is DeepEP's; else None.

    The base configurations of Megatron-Bridge (DEEPSEEK_V3_H100_BASE_CONFIG and its successors) dispatch by DeepEP or
    HybridEP where experts are spread over nodes.
    """
    release = re.search(r"\b(2\d\.\d\d)", run.text("date_or_version"))
    is_recipe = re.search(r"megatron-bridge|nemo", run.software) is not None
    is_stated = re.search(r"dispatcher|deepep|hybridep|all-to-all", run.software) is not None
    spans_nodes = run.count("ep", 1) * run.count("etp", 1) > run.count("devices_per_node", 8)
    if release is None or not is_recipe or is_stated or not spans_nodes or family_of(run) != "hopper":
        return None
    number = float(release[1])
    return number if number >= FIRST_FLEXIBLE_DISPATCH else None


def stack_options(run: PublishedRun) -> dict[str, Any]:
    """What a run's options switch: CUDA graphs and all-to-all beside compute; null where they say nothing."""
    text = run.software.replace("+", " ")
    text = re.sub(r"\b(?:\w |_ ){6,}\w\b", lambda spelled: spelled[0].replace(" ", ""), text)
    overlaps: bool | None = None
    if re.search(r"(a2a|all-to-all) overlap on|ep communication overlap|dualpipe", text):
        overlaps = True
    elif "overlap off" in text or "no ep overlap" in text:
        overlaps = False
    elif "hybridep" in text and FULL_GRAPH.search(text):
        overlaps = True
    elif "dispatcher" in text:
        overlaps = False
    elif release := _release_of_flexible_dispatch(run):
        overlaps = release < FIRST_WITHOUT_OVERLAP
    return {"cuda_graphs": _cuda_graphs(text), "overlaps_expert_communication": overlaps}


def _cuda_graphs(text: str) -> list[str] | None:
    """Parts that graphs cover: scopes of Megatron-Core after the words "CUDA graph"; a preset without any has none."""
    graph = re.search(r"cuda graphs?([^;,]*)", text)
    if re.search(r"no cuda graph|\beager\b", text):
        return []
    if graph is None:
        return [] if "dispatcher" in text else None
    if FULL_GRAPH.search(text):
        return ["step"]
    scopes = graph[1]
    parts = {"attention": "attn", "dense_ffn": "mlp", "router": "router|preprocess", "experts": r"moe\b"}
    covered = [part for part, scope in parts.items() if re.search(rf"\b(?:{scope}|moe_(?:{scope}))", scopes)]
    return covered or ["attention", "router"]


def precision_fields(run: PublishedRun, assumed: Assumptions) -> dict[str, str]:
    """Number formats by the published name: FP8 and FP4 are of the linear layers only."""
    text = run.text("precision").lower()
    if run.is_tpu:
        activations = "fp32" if "float32" in text else "bf16"
        assumed.add(
            "precision", "weights, gradients and their sums in fp32, all-to-all in bf16: habit of these frameworks"
        )
        fields = {"parameters": "fp32", "activations": activations, "dispatch": "bf16"}
        return {**fields, "compute": "int8" if "int8" in text else "bf16", "master": "fp32", "gradients": "fp32"}
    if text == "fp16":
        formats = {"parameters": "fp16", "gradients": "fp16", "activations": "fp16", "dispatch": "fp16"}
        assumed.add("precision.gradients", "not published; fp16 with loss scaling, reduced as they are")
        return {**formats, "compute": "fp16", "master": "fp32", "reduction": "fp16"}
    compute = "fp4" if "fp4" in text else "fp8" if "fp8" in text else "bf16" if "bf16" in text else None
    if compute is None:
        raise UnpredictableRunError("precision", f"'{run.text('precision')}'")
    gradients = "bf16" if re.search(BF16_GRADIENTS, run.software) else "fp32"
    assumed.add(
        "precision", f"parameters, activations and dispatch bf16, gradients and their sums {gradients}: recipe defaults"
    )
    scaled = {"scaling": "block"} if "blockwise" in text else {}
    if scaled and "hai-llm" in run.software:
        scaled["saved"] = compute
        assumed.add("precision.saved", "as the recipe's report says: inputs of linear layers wait in 8 bits")
    return {
        **scaled,
        "compute": compute,
        "parameters": "bf16",
        "master": "fp32",
        "gradients": gradients,
        "reduction": gradients,
        "activations": "bf16",
        "dispatch": "bf16",
    }


def _optimizer(run: PublishedRun, assumed: Assumptions) -> dict[str, str]:
    words = f"{run.text('optimizer')} {run.text('other_opts')}".lower()
    if not run.text("optimizer"):
        assumed.add("optimizer", "not published; Adam")
    if "adafactor" in words:
        return {"kind": "adafactor"}
    offload = "optimizer" if "optimizer-state offload" in words else "none"
    has_short_moments = re.search(r"bf16 (adam )?moments|reduced-precision adam", words) is not None
    return {"kind": "adam", "state": "bf16" if has_short_moments else "fp32", "offload": offload}


def parallelism_fields(run: PublishedRun, assumed: Assumptions) -> dict[str, Any]:
    """Degrees as published; sequence parallelism goes with tensor parallelism in every recipe of the table."""
    is_moe = run.count("n_experts", 0) > 0
    tensor = run.count("tp")
    virtual = _virtual_stages(run, assumed)
    expert_tensor = run.count("etp", tensor if is_moe else 1)
    if tensor > 1:
        assumed.add("parallelism.sequence", "on with tensor parallelism, as recipes have it")
    if is_moe and expert_tensor == tensor and not run.text("etp") and tensor > 1:
        assumed.add("parallelism.expert_tensor", "not published; as tensor, Megatron's default")
    return {
        "data": "auto",
        "tensor": tensor,
        "sequence": tensor > 1,
        "context": run.count("cp", 1),
        "pipeline": {
            "stages": run.count("pp"),
            "virtual_stages": virtual,
            "schedule": _schedule(run, virtual),
        },
        "expert": run.count("ep") if is_moe else 1,
        "expert_tensor": expert_tensor if is_moe else 1,
        "zero_stage": _zero_stage(run, assumed),
        **_recompute(run, assumed),
    }


def _schedule(run: PublishedRun, virtual_stages: int) -> str:
    """Named by the source, or Megatron's default."""
    if re.search(r"\bdualpipe\b", f"{run.text('other_opts')} {run.text('note')}", re.IGNORECASE):
        return "dualpipe"
    return "interleaved_one_f_one_b" if virtual_stages > 1 else "one_f_one_b"


def _virtual_stages(run: PublishedRun, assumed: Assumptions) -> int:
    """Chunks per stage; Megatron may count embedding and head as layers, the schema may not."""
    virtual, most = run.count("vp", 1), max(run.count("n_layers") // run.count("pp"), 1)
    if virtual > most:
        assumed.add("parallelism.pipeline.virtual_stages", f"{virtual} make more chunks than layers; {most}")
    return min(virtual, most)


def _zero_stage(run: PublishedRun, assumed: Assumptions) -> int:
    text = run.text("zero_fsdp")
    if stage := re.search(r"ZeRO(?:-| stage )(\d)", text):
        return int(stage[1])
    if text.startswith("FSDP"):
        return 3
    if text.startswith(("none", "DDP")):
        return 0
    if not text.startswith("dist"):
        assumed.add("parallelism.zero_stage", "not published; a distributed optimizer, ZeRO-1")
    return 1


def _recompute(run: PublishedRun, assumed: Assumptions) -> dict[str, Any]:
    """What is recomputed: by module where the source names modules."""
    text = run.text("recompute")
    if "fastmoe" in run.software:
        assumed.add(
            RECOMPUTE_PATH,
            f"'{text}'; attention cores: published peaks leave no room for stored scores (5 a s^2 bytes)",
        )
        return {"recompute": "selective", "recompute_modules": ["core_attn"]}
    if text in ("none", "none set in recipe function", "not set in test args"):
        return {"recompute": "none"}
    if text.startswith(("full activation", "remat", "custom: offload")) or text == "full" or "heavy recompute" in text:
        return {"recompute": "full"}
    if text.startswith("selective") or "up-projections" in text:
        return {"recompute": "selective", "recompute_modules": _recomputed_modules(text, assumed)}
    default = "full" if run.is_tpu and family_of(run) == "tpu" else "none"
    assumed.add(RECOMPUTE_PATH, f"'{text or 'not published'}'; {default}, the framework's default")
    return {"recompute": default}


def _recomputed_modules(text: str, assumed: Assumptions) -> list[str]:
    """Modules named in a text; qualifiers such as "first 3 dense layers" are what the module is anyway."""
    words = set(re.findall(r"[a-z_]+", text.lower().replace("rmsnorm", "layernorm")))
    if "up" in words and "projections" in words:
        words.add("mla_up_proj")
    modules = [name for name in get_args(RecomputeModule) if name in words]
    if not modules:
        assumed.add(RECOMPUTE_PATH, f"'{text}'; the default modules")
        return list(DEFAULT_RECOMPUTE_MODULES)
    return modules


def recompute_variants(document: Document) -> Iterator[Document]:
    """The document, and where its source says nothing of recompute, the same with ever more of it.

    A run that ran did fit: the least that fits is taken by whoever asks. Modules in the order in which recipes add
    them: cheap element-wise work first, then up projections, networks, everything.
    """
    yield document
    parallelism, assumed = document.data["parallelism"], document.data["assumed"]
    if RECOMPUTE_PATH not in assumed or parallelism["recompute"] != "none":
        return
    for modules in (["layernorm", "moe_act"], ["layernorm", "moe_act", "mla_up_proj", "mlp", "core_attn"], None):
        chosen = {"recompute": "selective", "recompute_modules": modules} if modules else {"recompute": "full"}
        reason = f"not published; the least that fits: {', '.join(modules) if modules else 'everything'}"
        data = {
            **document.data,
            "parallelism": parallelism | chosen,
            "assumed": assumed | {RECOMPUTE_PATH: reason},
        }
        yield Document(document.file, data, {})


def workload_fields(run: PublishedRun, parallelism: dict[str, Any], assumed: Assumptions) -> dict[str, Any]:
    """Lengths, batch and micro-batch."""
    lengths = _lengths(run, assumed)
    length = lengths.get("sequence_length") or lengths["source_length"]
    fields: dict[str, Any] = {"kind": "training", **lengths}
    tokens = run.number("tokens_per_step")
    if run.number("global_batch") is not None:
        fields["sequences_per_step"] = run.count("global_batch")
    elif tokens is not None:
        if tokens % 1e6 == 0:
            tokens *= MEGA / 1e6
            assumed.add("workload.sequences_per_step", "a batch given in millions of tokens is in units of 2**20")
        fields["sequences_per_step"] = round(tokens / length)
    else:
        raise UnpredictableRunError("global_batch", "not published, nor tokens per step")
    if run.number("micro_batch") is not None:
        fields["sequences_per_micro_batch"] = run.count("micro_batch")
    else:
        ways = parallelism["tensor"] * parallelism["context"] * parallelism["pipeline"]["stages"]
        per_rank = max(fields["sequences_per_step"] * ways // run.devices, 1)
        most = max(TPU_MICRO_BATCH_TOKENS // length, 1) if run.is_tpu else 1
        fields["sequences_per_micro_batch"] = min(per_rank, most)
        rule = f"as many as make {TPU_MICRO_BATCH_TOKENS} tokens" if run.is_tpu else "one"
        assumed.add("workload.sequences_per_micro_batch", f"not published; {rule}")
    if run.is_encoder_decoder:
        fields["tokens_counted"] = "source"
    return fields


def _lengths(run: PublishedRun, assumed: Assumptions) -> dict[str, int]:
    if not run.is_encoder_decoder:
        return {"sequence_length": run.count("seq_len")}
    if pair := re.search(r"(\d+) in / ~?(\d+) out", run.text("note")):
        return {"source_length": int(pair[1]), "target_length": int(pair[2])}
    if run.number("seq_len") is None:
        assumed.add("workload.source_length", f"not published; {DEFAULT_SEQUENCE} tokens, the target as long")
    length = run.count("seq_len", DEFAULT_SEQUENCE)
    return {"source_length": length, "target_length": length}
