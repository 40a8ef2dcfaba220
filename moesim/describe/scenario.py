"""The whole question: model, workload, precisions, optimizer, parallelism, cluster and stack."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moesim.describe.hardware import Identifier
from moesim.describe.model import Model
from moesim.describe.overlap import Overlap
from moesim.describe.quantities import Count, Description, Flag, NonNegativeCount, Precision
from moesim.describe.stack_options import StackOptions


class Workload(Description):
    """What one step processes; sequences per micro-batch are per data-parallel rank.

    ``training`` is forward, backward and update; ``prefill`` one forward pass; ``decode`` one new token for every
    sequence, whose ``sequence_length`` tokens are in the key-value cache.
    """

    kind: Literal["training", "prefill", "decode"] = "training"
    sequence_length: Count | None = None
    source_length: Count | None = None
    target_length: Count | None = None
    sequences_per_micro_batch: Count
    sequences_per_step: Count
    tokens_counted: Literal["source", "target", "all"] = "all"


class Precisions(Description):
    """Number formats by use.

    ``master`` equal to ``parameters`` means there is no separate copy; ``saved`` is the format in which activations
    wait for the backward pass, null as ``activations``. ``scaling`` is what shares a scale where ``compute`` has 8 bits
    or fewer: the tensor, a row, or a block of 128 (weights 128 x 128; DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
    Formats whose scales the matrix units apply themselves (MX, NVFP4) cost what ``tensor`` does.
    """

    compute: Precision
    parameters: Precision
    master: Precision = "fp32"
    gradients: Precision = "fp32"
    activations: Precision = "bf16"
    saved: Precision | None = None
    dispatch: Precision = "bf16"
    reduction: Precision = "fp32"
    scaling: Literal["tensor", "row", "block"] = "tensor"


class Optimizer(Description):
    """Update rule; ``momentum`` adds a first moment to Adafactor or SGD, ``state`` is the moments' number format."""

    kind: Literal["adam", "adafactor", "sgd"]
    momentum: Flag = False
    state: Precision = "fp32"
    offload: Literal["none", "optimizer"] = "none"


PipelineScheduleName = Literal[
    "gpipe",
    "one_f_one_b",
    "interleaved_one_f_one_b",
    "zb_h1",
    "zb_h2",
    "zb_v",
    "v_half",
    "v_min",
    "dualpipe",
    "dualpipe_v",
]


class PipelineParallelism(Description):
    """Stages, chunks per stage and the order in which a stage runs them."""

    stages: Count = 1
    virtual_stages: Count = 1
    schedule: PipelineScheduleName = "one_f_one_b"
    layers_per_stage: Annotated[list[NonNegativeCount], Field(min_length=1)] | None = None


MeshDimension = Literal["tensor", "context", "expert", "data", "pipeline"]
DEFAULT_RANK_ORDER: list[MeshDimension] = ["tensor", "context", "expert", "data", "pipeline"]


RecomputeModule = Literal["core_attn", "mla_up_proj", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
DEFAULT_RECOMPUTE_MODULES: tuple[RecomputeModule, ...] = ("core_attn", "mla_up_proj")


class Parallelism(Description):
    """Degrees: tensor*context*pipeline*data = devices = expert_tensor*expert*pipeline*expert_data.

    ``data: auto`` takes the devices that the other degrees leave. ``rank_order`` lists dimensions, fastest first;
    the expert mesh is ordered alike, with expert_tensor where tensor stands and expert_data where data stands.
    ``recompute_modules`` are what selective recompute runs again, by the names of Megatron-Core's
    ``--recompute-modules``; null is attention cores and the up projections of latent attention.
    """

    data: Count | Literal["auto"] = "auto"
    tensor: Count = 1
    sequence: Flag = False
    context: Count = 1
    pipeline: PipelineParallelism = PipelineParallelism()
    expert: Count = 1
    expert_tensor: Count = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: Annotated[list[RecomputeModule], Field(min_length=1)] | None = None
    rank_order: list[MeshDimension] = DEFAULT_RANK_ORDER


class Scenario(Description):
    """One question to the simulator, as written in a scenario file.

    ``flop_convention`` says whether model FLOPs count half of a causal attention's square or all of it.
    """

    schema_version: Literal[1]
    name: Identifier
    description: str = ""
    references: list[str] = []
    assumed: dict[str, str] = {}
    flop_convention: Literal["causal", "full"] = "causal"
    model: Model
    workload: Workload
    precision: Precisions
    optimizer: Optimizer = Optimizer(kind="adam")
    parallelism: Parallelism
    cluster: Identifier
    devices: Count
    stack: Identifier
    stack_options: StackOptions = StackOptions()
    overlap: Overlap = Overlap()
