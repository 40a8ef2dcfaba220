"""Each rule is broken by one scenario that breaks nothing else."""

import inspect
import re
from collections.abc import Callable

import numpy as np
import pytest

from moesim.describe.documents import apply_assignments, read_document
from moesim.describe.hardware_library import HardwareLibrary
from moesim.errors import ScenarioError
from moesim.estimation.loading import LoadedScenario, load, validated_scenario
from moesim.resources import find_scenario
from moesim.structure import legality
from moesim.structure.columns import Columns
from moesim.structure.group_tables import group_columns_table
from moesim.structure.legality import Rule, first_broken_rule, legality_rules, resolve_columns

Shipped = Callable[..., LoadedScenario]
M6T, MIXTRAL = "m6t_1t_v100x480", "mixtral_8x7b"
ONE_F_ONE_B = ("parallelism.pipeline.schedule=one_f_one_b", "parallelism.pipeline.virtual_stages=1")
DUALPIPE = ("parallelism.pipeline.schedule=dualpipe", "parallelism.pipeline.virtual_stages=1")

# rule, code, field, scenario, assignments, numbers the message must show, words of the remedy
CASES = [
    (
        "degrees_do_not_multiply",
        "E-SCN-003",
        "parallelism",
        M6T,
        ("parallelism.tensor=2",),
        ("2", "480"),
        "product is devices",
    ),
    (
        "devices_not_divisible",
        "E-SCN-003",
        "devices",
        M6T,
        ("parallelism.data=auto", "parallelism.tensor=16", "devices=24", "parallelism.expert=24"),
        ("24", "16"),
        "divides devices",
    ),
    (
        "too_many_devices",
        "E-SCN-011",
        "devices",
        M6T,
        ("devices=960", "parallelism.data=960", "workload.sequences_per_step=960"),
        ("960", "480"),
        "at most 480 devices",
    ),
    (
        "expert_degrees_do_not_multiply",
        "E-SCN-003",
        "parallelism.expert",
        M6T,
        ("parallelism.expert=64",),
        ("64", "480"),
        "divides devices",
    ),
    (
        "batch_not_divisible",
        "E-SCN-004",
        "workload.sequences_per_step",
        M6T,
        ("workload.sequences_per_step=481",),
        ("481", "480"),
        "multiple of data x sequences_per_micro_batch",
    ),
    (
        "too_many_micro_batches",
        "E-SCN-007",
        "workload.sequences_per_step",
        M6T,
        ("workload.sequences_per_step=9600000000",),
        ("20000000",),
        "below 10000000",
    ),
    (
        "heads_not_divisible",
        "E-SCN-004",
        "parallelism.tensor",
        M6T,
        ("parallelism.tensor=32", "parallelism.data=15"),
        ("16", "32"),
        "divisor of 16",
    ),
    (
        "kv_heads_not_divisible",
        "E-SCN-004",
        "parallelism.tensor",
        MIXTRAL,
        (
            "model.attention.heads=24",
            "parallelism.tensor=3",
            "devices=48",
            "parallelism.data=4",
            "parallelism.expert=4",
            "workload.sequence_length=4098",
        ),
        ("8", "3"),
        "multiple of 8",
    ),
    (
        "dense_ffn_not_divisible",
        "E-SCN-004",
        "parallelism.tensor",
        M6T,
        (
            "model.layers=[{count: 24, ffn: [dense, moe]}]",
            "model.dense_ffn.intermediate_size=4097",
            "parallelism.tensor=2",
            "parallelism.data=240",
        ),
        ("4097", "2"),
        "divisor of 4097",
    ),
    (
        "sequence_not_divisible",
        "E-SCN-004",
        "parallelism.context",
        M6T,
        ("parallelism.context=3", "parallelism.data=160"),
        ("1024", "3"),
        "divisor of the sequence length",
    ),
    (
        "more_chunks_than_layers",
        "E-SCN-011",
        "parallelism.pipeline.stages",
        M6T,
        ("parallelism.pipeline.stages=30", "parallelism.data=16", "parallelism.expert=16"),
        ("30", "24"),
        "at most 24",
    ),
    (
        "one_micro_batch_cannot_interleave",
        "E-SCN-011",
        "overlap.two_micro_batches",
        M6T,
        ("overlap.two_micro_batches=true",),
        ("1 micro-batch",),
        "smaller workload.sequences_per_micro_batch",
    ),
    (
        "nothing_to_prefetch",
        "E-SCN-011",
        "overlap.prefetch",
        MIXTRAL,
        ("overlap.prefetch=true",),
        ("zero_stage",),
        "use zero_stage: 3",
    ),
    (
        "layers_per_stage_mismatch",
        "E-SCN-011",
        "parallelism.pipeline.layers_per_stage",
        MIXTRAL,
        ("parallelism.pipeline.layers_per_stage=[8, 8, 8, 9]",),
        ("33", "32"),
        "one entry per stage",
    ),
    (
        "virtual_stages_need_interleaving",
        "E-SCN-011",
        "parallelism.pipeline.virtual_stages",
        MIXTRAL,
        ("parallelism.pipeline.schedule=one_f_one_b",),
        ("8", "one_f_one_b"),
        "interleaved_one_f_one_b",
    ),
    (
        "interleaving_not_divisible",
        "E-SCN-004",
        "parallelism.pipeline.schedule",
        MIXTRAL,
        ("workload.sequences_per_step=96",),
        ("6", "4"),
        "sequences_per_step",
    ),
    (
        "schedule_needs_two_chunks",
        "E-SCN-011",
        "parallelism.pipeline.virtual_stages",
        MIXTRAL,
        ("parallelism.pipeline.schedule=v_half",),
        ("8", "v_half"),
        "virtual_stages: 2",
    ),
    (
        "dualpipe_needs_even_stages",
        "E-SCN-004",
        "parallelism.pipeline.stages",
        MIXTRAL,
        (*DUALPIPE, "devices=48", "parallelism.pipeline.stages=3"),
        ("3",),
        "dualpipe_v",
    ),
    (
        "dualpipe_needs_even_micro_batches",
        "E-SCN-004",
        "parallelism.pipeline.schedule",
        MIXTRAL,
        (*DUALPIPE, "workload.sequences_per_step=144"),
        ("9",),
        "sequences_per_step",
    ),
    (
        "dualpipe_needs_micro_batches",
        "E-SCN-011",
        "parallelism.pipeline.schedule",
        MIXTRAL,
        (*DUALPIPE, "workload.sequences_per_step=96"),
        ("6", "4"),
        "more micro-batches",
    ),
    (
        "experts_not_divisible",
        "E-SCN-004",
        "parallelism.expert",
        M6T,
        ("model.moe.num_experts=900",),
        ("900", "480"),
        "divisor of 900",
    ),
    (
        "expert_width_not_divisible",
        "E-SCN-004",
        "parallelism.expert_tensor",
        M6T,
        ("parallelism.expert_tensor=3", "parallelism.expert=160"),
        ("21248", "3"),
        "divisor of 21248",
    ),
    (
        "target_group_not_divisible",
        "E-SCN-004",
        "model.moe.router.group_tokens",
        M6T,
        ("model.moe.router.group_tokens=1000",),
        ("1000", "1024"),
        "divisor of the rank's tokens",
    ),
    (
        "source_group_not_divisible",
        "E-SCN-004",
        "model.moe.router.group_tokens",
        "switch_base",  # 114 divides the 1,824 target tokens of a rank but not the 8,192 of the source
        ("model.moe.router.group_tokens=114",),
        ("114", "512"),
        "divisor of the rank's tokens",
    ),
    (
        "target_sequence_not_sharded",
        "E-SCN-004",
        "parallelism.sequence",
        MIXTRAL,
        (
            "workload.sequence_length=4095",
            "parallelism.tensor=2",
            "parallelism.data=8",
            "parallelism.sequence=true",
        ),
        ("4095", "2"),
        "sequence: false",
    ),
    (
        "source_sequence_not_sharded",
        "E-SCN-004",
        "parallelism.sequence",
        "t5_base",
        (
            "workload.source_length=511",
            "parallelism.tensor=2",
            "parallelism.data=16",
            "parallelism.sequence=true",
        ),
        ("511", "2"),
        "sequence: false",
    ),
    (
        "pipeline_stages_differ",
        "E-SCN-011",
        "parallelism.rank_order",
        MIXTRAL,  # tensor 2, expert_tensor 1, then the pipeline: stage 0 has ranks 0, 1, 8, ... or 0, 4, 8, ...
        (
            "parallelism.tensor=2",
            "parallelism.data=8",
            "parallelism.rank_order=[tensor, pipeline, context, expert, data]",
        ),
        ("2", "8"),
        "pipeline last",
    ),
    (
        "more_choices_than_experts",
        "E-SCN-011",
        "model.moe.router.experts_per_token",
        M6T,
        ("model.moe.router.experts_per_token=961",),
        ("961", "960"),
        "at most 960",
    ),
    (
        "prototypes_not_divisible",
        "E-SCN-004",
        "model.moe.router.experts_per_token",
        M6T,
        ("model.moe.router.kind=k_top_1", "model.moe.router.experts_per_token=7"),
        ("960", "7"),
        "divisor of 960",
    ),
]


def problems_of(name: str, *assignments: str) -> tuple:  # type: ignore[type-arg]
    with pytest.raises(ScenarioError) as caught:
        load(name, assignments=assignments, library=HardwareLibrary())
    return caught.value.problems


def rules_of(name: str, *assignments: str) -> tuple[list[Rule], Columns]:
    scenario = validated_scenario(apply_assignments(read_document(find_scenario(name)), assignments))
    columns = resolve_columns(group_columns_table(scenario, {}, 1))
    return list(legality_rules(scenario, HardwareLibrary().cluster(scenario.cluster), columns)), columns


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_a_scenario_that_breaks_one_rule_breaks_only_that(case: tuple) -> None:  # type: ignore[type-arg]
    rule, _, _, name, assignments, _, _ = case
    rules, _ = rules_of(name, *assignments)
    assert [found.name for found in rules if found.breaks[0]] == [rule]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_a_broken_rule_is_told_with_its_numbers_and_a_remedy(case: tuple) -> None:  # type: ignore[type-arg]
    _, code, field, name, assignments, numbers, remedy = case
    (problem,) = problems_of(name, *assignments)
    assert (problem.code, problem.field) == (code, field)
    for number in numbers:
        assert number in problem.message
    assert remedy in problem.remedy


def test_every_rule_is_broken_by_a_case() -> None:
    written = re.findall(r'Rule\(\s*f?"([a-z_0-9{}]+)"', inspect.getsource(legality))
    names = {name.replace("{side}", side) for name in written for side in ("target", "source")}
    assert len(names) >= 27
    assert names == {case[0] for case in CASES}


def test_several_problems_are_all_told() -> None:
    fields = {
        problem.field
        for problem in problems_of(
            M6T,
            "parallelism.tensor=32",
            "workload.sequences_per_step=481",
            "model.moe.router.group_tokens=24",
            "parallelism.expert=7",
        )
    }
    assert fields == {
        "parallelism",
        "parallelism.tensor",
        "parallelism.expert",
        "workload.sequences_per_step",
        "model.moe.router.group_tokens",
    }


def test_illegal_degrees_are_told_beside_contradicting_fields() -> None:
    """All problems of a scenario are reported together: the batch does not depend on the rank order."""
    fields = {
        problem.field
        for problem in problems_of(
            M6T, "workload.sequences_per_step=481", "parallelism.rank_order=[tensor, context, expert, data, data]"
        )
    }
    assert fields == {"workload.sequences_per_step", "parallelism.rank_order"}


def test_automatic_data_takes_the_devices_that_are_left(shipped: Shipped) -> None:
    loaded = shipped(M6T, "parallelism.data=auto", "parallelism.tensor=4")
    assert loaded.columns["data"][0] == 120
    assert loaded.columns["num_micro_batches"][0] == 4
    assert loaded.columns["expert_data"][0] == 1


def test_expert_data_is_what_the_expert_mesh_leaves(shipped: Shipped) -> None:
    loaded = shipped(MIXTRAL)  # 64 devices, 4 stages, expert 8
    assert loaded.columns["expert_data"][0] == 2


def test_key_value_heads_may_be_repeated_over_tensor_ranks(shipped: Shipped) -> None:
    loaded = shipped(MIXTRAL, *ONE_F_ONE_B, "parallelism.tensor=16", "parallelism.data=1")
    assert loaded.columns["tensor"][0] == 16


@pytest.mark.parametrize("kv_heads", [7, 64])
def test_query_heads_must_share_key_value_heads_evenly(kv_heads: int) -> None:
    """32 query heads over 7 or 64 key-value heads is no grouped-query attention."""
    problems = problems_of(MIXTRAL, f"model.attention.kv_heads={kv_heads}")
    assert any("kv_heads" in (problem.field or "") and str(kv_heads) in problem.message for problem in problems)


@pytest.mark.parametrize("position", [0, 4])
def test_a_pipeline_that_is_fastest_or_slowest_is_always_legal(shipped: Shipped, position: int) -> None:
    order = ["tensor", "context", "expert", "data"]
    order.insert(position, "pipeline")
    loaded = shipped(
        MIXTRAL, "parallelism.tensor=2", "parallelism.data=8", f"parallelism.rank_order=[{', '.join(order)}]"
    )
    assert loaded.scenario.parallelism.rank_order == order


def test_rules_over_many_rows_agree_with_each_row_alone(shipped: Shipped) -> None:
    loaded = shipped(MIXTRAL, *ONE_F_ONE_B)
    scenario, cluster = loaded.scenario, loaded.system.cluster
    tensors: list[float] = [1, 2, 3, 4, 16, 64]
    experts: list[float] = [1, 2, 3, 8, 16]
    stages: list[float] = [1, 2, 4, 5, 33]
    grid = np.array([(t, e, s) for t in range(6) for e in range(5) for s in range(5)])
    levels: dict[str, list[float]] = {"tensor": tensors, "expert": experts, "stages": stages, "data": [0.0]}
    index = {"tensor": grid[:, 0], "expert": grid[:, 1], "stages": grid[:, 2], "data": grid[:, 0] * 0}
    swept = {name: (values, index[name]) for name, values in levels.items()}
    columns = resolve_columns(group_columns_table(scenario, swept, len(grid)))
    first = first_broken_rule(list(legality_rules(scenario, cluster, columns)), len(grid))
    for row, (t, e, s) in enumerate(grid):
        alone, _ = rules_of(
            MIXTRAL,
            *ONE_F_ONE_B,
            "parallelism.data=auto",
            f"parallelism.tensor={tensors[t]}",
            f"parallelism.expert={experts[e]}",
            f"parallelism.pipeline.stages={stages[s]}",
        )
        broken = [position for position, rule in enumerate(alone) if rule.breaks[0]]
        assert first[row] == (broken[0] if broken else -1)
    assert set(first.tolist()) > {-1}
