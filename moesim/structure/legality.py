"""Which combinations of degrees are legal: the same rules for one scenario and for a million rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.describe.hardware import Cluster
from moesim.describe.model import GroupedQueryAttention
from moesim.describe.scenario import DEFAULT_RANK_ORDER, Scenario
from moesim.structure.chunk_placement import FOLDED_SCHEDULES
from moesim.structure.columns import AUTO_DEGREE, WHOLE_RANK_GROUP, Columns, FloatArray
from moesim.structure.layers import layer_sequence
from moesim.structure.pipeline_schedules import CLASSIC_SCHEDULES
from moesim.structure.placement import MESH_COLUMN, dense_mesh, expert_mesh

MAX_MICRO_BATCHES = 10_000_000

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Rule:
    """One rule with the rows that break it.

    ``message`` and ``remedy`` are templates over column names; ``name`` is the short reason in a sweep's funnel.
    """

    name: str
    code: str
    field: str
    breaks: BoolArray
    message: str
    remedy: str

    def text(self, template: str, columns: Columns, row: int) -> str:
        """Fill a template with the values of one row."""
        return template.format(**{name: f"{values[row]:.15g}" for name, values in columns.values.items()})


def resolve_columns(columns: Columns) -> Columns:
    """Fill in what follows from other columns: data where it is ``auto``, expert_data, num_micro_batches.

    Values are floored or kept fractional where nothing whole exists; the rules then reject those rows.
    """
    shape = ("devices", "tensor", "context", "stages", "data")
    columns = columns.with_derived("data", shape, _resolved_data)
    reads = ("devices", "expert", "expert_tensor", "stages")
    columns = columns.with_derived("expert_data", reads, _expert_data)
    return columns.with_derived("num_micro_batches", ("step_sequences", "data", "micro_batch"), _num_micro_batches)


def _resolved_data(columns: Columns) -> FloatArray:
    others = columns["tensor"] * columns["context"] * columns["stages"]
    return np.where(columns["data"] == AUTO_DEGREE, columns["devices"] / others, columns["data"])


def _expert_data(columns: Columns) -> FloatArray:
    return columns["devices"] / (columns["expert"] * columns["expert_tensor"] * columns["stages"])


def _num_micro_batches(columns: Columns) -> FloatArray:
    return columns["step_sequences"] / (columns["data"] * columns["micro_batch"])


def _is_whole(values: FloatArray) -> BoolArray:
    return np.asarray((values == np.floor(values)) & (values >= 1))


def _divides(number: FloatArray | float, by: FloatArray) -> BoolArray:
    return np.asarray(np.mod(number, by) == 0)


def legality_rules(scenario: Scenario, cluster: Cluster, columns: Columns) -> Iterator[Rule]:
    """Every rule, evaluated on resolved columns, in the order in which a person would check them."""
    yield from _degree_rules(cluster, columns)
    yield from _model_rules(scenario, columns)
    yield from _sharded_sequence_rules(scenario, columns)
    yield from _pipeline_rules(scenario, columns)
    yield from _overlap_rules(scenario, columns)
    if scenario.model.moe is not None:
        yield from _mesh_rules(scenario, columns)
        yield from _expert_rules(scenario, columns)


def _degree_rules(cluster: Cluster, columns: Columns) -> Iterator[Rule]:
    product = columns["tensor"] * columns["context"] * columns["stages"] * columns["data"]
    yield Rule(
        "devices_not_divisible",
        "E-SCN-003",
        "devices",
        ~_is_whole(columns["data"]),
        "{devices} devices do not divide into groups of tensor {tensor} x context {context} x pipeline {stages}",
        "choose degrees whose product divides devices",
    )
    yield Rule(
        "degrees_do_not_multiply",
        "E-SCN-003",
        "parallelism",
        _is_whole(columns["data"]) & (product != columns["devices"]),
        "tensor {tensor} x context {context} x pipeline {stages} x data {data} is not the number of devices, {devices}",
        "choose degrees whose product is devices; data: auto takes what the others leave",
    )
    yield Rule(
        "too_many_devices",
        "E-SCN-011",
        "devices",
        columns["devices"] > cluster.device_count,
        "devices {devices} exceed the cluster " + f"{cluster.id}, which has {cluster.device_count}",
        f"use at most {cluster.device_count} devices or a larger cluster",
    )
    yield Rule(
        "expert_degrees_do_not_multiply",
        "E-SCN-003",
        "parallelism.expert",
        ~_is_whole(columns["expert_data"]),
        "expert_tensor {expert_tensor} x expert {expert} x pipeline {stages} does not divide devices {devices}",
        "choose expert degrees whose product divides devices",
    )
    yield Rule(
        "batch_not_divisible",
        "E-SCN-004",
        "workload.sequences_per_step",
        ~_is_whole(columns["num_micro_batches"]),
        "sequences_per_step {step_sequences} is no multiple of data {data} x sequences_per_micro_batch {micro_batch}",
        "choose sequences_per_step as a multiple of data x sequences_per_micro_batch",
    )
    yield Rule(
        "too_many_micro_batches",
        "E-SCN-007",
        "workload.sequences_per_step",
        columns["num_micro_batches"] > MAX_MICRO_BATCHES,
        "{num_micro_batches} micro-batches per step",
        f"keep them below {MAX_MICRO_BATCHES}",
    )


def _model_rules(scenario: Scenario, columns: Columns) -> Iterator[Rule]:
    model, tensor = scenario.model, columns["tensor"]
    heads = model.attention.heads
    yield Rule(
        "heads_not_divisible",
        "E-SCN-004",
        "parallelism.tensor",
        ~_divides(heads, tensor),
        f"{heads} attention heads do not divide over tensor " + "{tensor}",
        f"choose tensor as a divisor of {heads}",
    )
    if isinstance(model.attention, GroupedQueryAttention):
        kv_heads = model.attention.kv_heads
        fits = _divides(kv_heads, tensor) | _divides(tensor, np.full(len(columns), float(kv_heads)))
        yield Rule(
            "kv_heads_not_divisible",
            "E-SCN-004",
            "parallelism.tensor",
            ~fits,
            f"{kv_heads} key-value heads neither divide over tensor " + "{tensor} nor are repeated over it",
            f"choose tensor as a divisor or a multiple of {kv_heads}",
        )
    if model.dense_ffn is not None:
        width = model.dense_ffn.intermediate_size
        yield Rule(
            "dense_ffn_not_divisible",
            "E-SCN-004",
            "parallelism.tensor",
            ~_divides(width, tensor),
            f"dense_ffn.intermediate_size {width} does not divide over tensor " + "{tensor}",
            f"choose tensor as a divisor of {width}",
        )
    yield Rule(
        "sequence_not_divisible",
        "E-SCN-004",
        "parallelism.context",
        ~(
            _divides(columns["target_length"], columns["context"])
            & _divides(columns["source_length"], columns["context"])
        ),
        "sequence length {target_length} does not divide over context {context}",
        "choose context as a divisor of the sequence length",
    )


def _sharded_sequence_rules(scenario: Scenario, columns: Columns) -> Iterator[Rule]:
    """Sequence parallelism splits each rank's sequence over the tensor group."""
    if scenario.workload.kind == "decode":
        return
    for side in ("target", "source"):
        local = columns[f"{side}_length"] / columns["context"]
        yield Rule(
            f"{side}_sequence_not_sharded",
            "E-SCN-004",
            "parallelism.sequence",
            (columns["sequence"] > 0) & ~_divides(local, columns["tensor"]),
            "{" + f"{side}_length" + "} tokens over context {context} do not divide over tensor {tensor}",
            "use sequence: false or a tensor degree that divides the sequence",
        )


def _mesh_rules(scenario: Scenario, columns: Columns) -> Iterator[Rule]:
    """A pipeline stage must be the same ranks for experts as for the rest."""
    order = scenario.parallelism.rank_order
    if sorted(order) != sorted(DEFAULT_RANK_ORDER):
        return
    strides = [np.ones(len(columns)), np.ones(len(columns))]
    for index, mesh in enumerate((dense_mesh(order), expert_mesh(order))):
        for name in mesh[: mesh.index("pipeline")]:
            strides[index] = strides[index] * columns[MESH_COLUMN[name]]
    yield Rule(
        "pipeline_stages_differ",
        "E-SCN-011",
        "parallelism.rank_order",
        (columns["stages"] > 1) & (strides[0] != strides[1]),
        "in this rank_order a stage of tensor {tensor} x context {context} x data {data} ranks is not the same ranks "
        "as one of expert_tensor {expert_tensor} x expert {expert} x expert_data {expert_data}",
        "put pipeline last (or first) in rank_order",
    )


def _pipeline_rules(scenario: Scenario, columns: Columns) -> Iterator[Rule]:
    pipeline = scenario.parallelism.pipeline
    num_layers = len(layer_sequence(scenario.model).order)
    chunks = columns["stages"] * columns["virtual_stages"]
    yield Rule(
        "more_chunks_than_layers",
        "E-SCN-011",
        "parallelism.pipeline.stages",
        chunks > num_layers,
        "pipeline stages {stages} x virtual_stages {virtual_stages} exceed the model's " + f"{num_layers} layers",
        f"use at most {num_layers} stages x virtual stages",
    )
    if pipeline.layers_per_stage is not None:
        yield Rule(
            "layers_per_stage_mismatch",
            "E-SCN-011",
            "parallelism.pipeline.layers_per_stage",
            (columns["stages"] != len(pipeline.layers_per_stage))
            | (np.full(len(columns), sum(pipeline.layers_per_stage)) != num_layers),
            f"layers_per_stage {pipeline.layers_per_stage} sums to {sum(pipeline.layers_per_stage)}"
            + "; there are {stages} stages and "
            + f"{num_layers} layers",
            "give one entry per stage, summing to the number of layers, or leave it out",
        )
    yield from _schedule_rules(pipeline.schedule, columns)


def _schedule_rules(schedule: str, columns: Columns) -> Iterator[Rule]:
    """What a schedule asks of chunks, stages and micro-batches."""
    virtual, micro_batches, stages = columns["virtual_stages"], columns["num_micro_batches"], columns["stages"]
    more_batches = "change sequences_per_step or sequences_per_micro_batch"
    is_interleaved = schedule == "interleaved_one_f_one_b"
    if schedule in FOLDED_SCHEDULES:
        yield Rule(
            "schedule_needs_two_chunks",
            "E-SCN-011",
            "parallelism.pipeline.virtual_stages",
            virtual != 2,
            f"schedule {schedule} lays two chunks per stage in a V, and virtual_stages is " + "{virtual_stages}",
            "use virtual_stages: 2",
        )
    else:
        yield Rule(
            "virtual_stages_need_interleaving",
            "E-SCN-011",
            "parallelism.pipeline.virtual_stages",
            (virtual > 1) & (not is_interleaved),
            "virtual_stages {virtual_stages} with schedule " + schedule,
            "use schedule: interleaved_one_f_one_b, or virtual_stages: 1",
        )
    if schedule in CLASSIC_SCHEDULES:
        yield Rule(
            "interleaving_not_divisible",
            "E-SCN-004",
            "parallelism.pipeline.schedule",
            (virtual > 1) & ~_divides(micro_batches, stages),
            "interleaving needs micro-batches ({num_micro_batches}) in multiples of the stages ({stages})",
            more_batches,
        )
    if schedule == "dualpipe":
        yield Rule(
            "dualpipe_needs_even_stages",
            "E-SCN-004",
            "parallelism.pipeline.stages",
            ~_divides(stages, np.full(len(columns), 2.0)),
            "dualpipe mirrors one half of the stages in the other, and there are {stages}",
            "choose an even number of stages, or dualpipe_v",
        )
        yield Rule(
            "dualpipe_needs_even_micro_batches",
            "E-SCN-004",
            "parallelism.pipeline.schedule",
            ~_divides(micro_batches, np.full(len(columns), 2.0)),
            "dualpipe sends half of the micro-batches each way, and there are {num_micro_batches}",
            more_batches,
        )
    if schedule in ("dualpipe", "dualpipe_v"):
        yield Rule(
            "dualpipe_needs_micro_batches",
            "E-SCN-011",
            "parallelism.pipeline.schedule",
            micro_batches < 2 * stages,
            f"{schedule} needs at least two micro-batches per stage to fill both ways, and "
            + "{num_micro_batches} micro-batches are fewer than 2 x {stages}",
            "use fewer stages or more micro-batches per step",
        )


def _overlap_rules(scenario: Scenario, columns: Columns) -> Iterator[Rule]:
    """Mechanisms of overlap that need a second micro-batch, or parameters that are gathered."""
    if scenario.overlap.two_micro_batches:
        yield Rule(
            "one_micro_batch_cannot_interleave",
            "E-SCN-011",
            "overlap.two_micro_batches",
            columns["num_micro_batches"] < 2,
            "two_micro_batches with {num_micro_batches} micro-batch per data-parallel rank and step",
            "use a smaller workload.sequences_per_micro_batch or more sequences_per_step, or leave it out",
        )
    if scenario.overlap.prefetch:
        yield Rule(
            "nothing_to_prefetch",
            "E-SCN-011",
            "overlap.prefetch",
            columns["zero_stage"] < 3,
            "prefetch with zero_stage {zero_stage}, which gathers no parameters in a pass",
            "use zero_stage: 3, or leave it out",
        )


def _expert_rules(scenario: Scenario, columns: Columns) -> Iterator[Rule]:
    moe = scenario.model.moe
    assert moe is not None
    yield Rule(
        "experts_not_divisible",
        "E-SCN-004",
        "parallelism.expert",
        ~_divides(moe.num_experts, columns["expert"]),
        f"{moe.num_experts} experts do not divide over expert " + "{expert}",
        f"choose expert as a divisor of {moe.num_experts}",
    )
    yield Rule(
        "expert_width_not_divisible",
        "E-SCN-004",
        "parallelism.expert_tensor",
        ~_divides(moe.intermediate_size, columns["expert_tensor"]),
        f"moe.intermediate_size {moe.intermediate_size} does not divide over expert_tensor " + "{expert_tensor}",
        f"choose expert_tensor as a divisor of {moe.intermediate_size}",
    )
    for side in ("target", "source") if scenario.workload.kind != "decode" else ():
        yield _group_rule(columns, side)
    yield from _fixed_expert_rules(scenario, columns)


def _group_rule(columns: Columns, side: str) -> Rule:
    """Routing groups must divide the tokens that a rank routes on one side of the model."""
    tokens = columns["micro_batch"] * columns[f"{side}_length"] / (columns["context"] * columns["tensor"])
    group = columns["group_tokens"]
    safe = np.where(group == WHOLE_RANK_GROUP, 1.0, group)
    return Rule(
        f"{side}_group_not_divisible",
        "E-SCN-004",
        "model.moe.router.group_tokens",
        (group != WHOLE_RANK_GROUP) & (group < tokens) & ~_divides(tokens, safe),
        "routing groups of {group_tokens} tokens do not divide the "
        + f"{side} tokens of a rank "
        + "({micro_batch} sequences of {"
        + f"{side}_length"
        + "} over context {context} and tensor {tensor})",
        "choose group_tokens as a divisor of the rank's tokens, or null for all of them",
    )


def _fixed_expert_rules(scenario: Scenario, columns: Columns) -> Iterator[Rule]:
    """Rules on fields that are no columns: they hold or fail for all rows."""
    moe = scenario.model.moe
    assert moe is not None
    router = moe.router
    everywhere = np.ones(len(columns), dtype=bool)
    k = router.experts_per_token
    if k > moe.num_experts:
        yield Rule(
            "more_choices_than_experts",
            "E-SCN-011",
            "model.moe.router.experts_per_token",
            everywhere,
            f"experts_per_token {k} exceeds num_experts {moe.num_experts}",
            f"choose at most {moe.num_experts}",
        )
    if router.kind == "k_top_1" and moe.num_experts % k:
        yield Rule(
            "prototypes_not_divisible",
            "E-SCN-004",
            "model.moe.router.experts_per_token",
            everywhere,
            f"{moe.num_experts} experts do not divide into {k} prototypes",
            f"choose experts_per_token as a divisor of {moe.num_experts}",
        )


def first_broken_rule(rules: list[Rule], n_rows: int) -> npt.NDArray[np.int64]:
    """Index of the first rule each row breaks, -1 for legal rows; shape (n_rows,)."""
    first = np.full(n_rows, -1, dtype=np.int64)
    for index in range(len(rules) - 1, -1, -1):
        first[rules[index].breaks] = index
    return first
