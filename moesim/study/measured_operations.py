"""A measured case as the operations that a step would price for it: the model's own lowering, no second formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.cost.state_costs import update_bytes
from moesim.describe.hardware import Stack
from moesim.describe.quantities import PRECISION_BYTES
from moesim.describe.scenario import Optimizer, Precisions, Scenario
from moesim.describe.stack_options import StackOptions, stack_with_options
from moesim.structure.columns import FloatArray
from moesim.structure.group_tables import group_columns_table
from moesim.structure.layers import LayerKind
from moesim.structure.legality import resolve_columns
from moesim.structure.lowering import LoweringContext
from moesim.structure.lowering_layers import dense_part
from moesim.structure.lowering_moe import moe_part, slower, with_separate_sum
from moesim.structure.step_graph import Gemm, MemoryTraffic, Operation, OperationTable, Phase, linear_extents
from moesim.study.measured_cases import MeasuredCase

PHASE_OF_PASS: dict[str, Phase] = {
    "forward": "forward",
    "dgrad": "activation_gradient",
    "wgrad": "weight_gradient",
}
MOE_LAYER = LayerKind("decoder", is_moe=True, has_cross_attention=False)
DENSE_LAYER = LayerKind("decoder", is_moe=False, has_cross_attention=False)
MASTER_PRECISION = "fp32"
RESULT_PRECISION = "bf16"
"""Of 8-bit products."""
DEFAULT_METHOD = "default"
"""Attention by whatever library torch chooses."""
WIDENING = ("cast_to_fp32", "gradient_accumulation")
"""Kernels that widen each of their elements from 16 to 32 bits."""
LARGE_COPY_BYTES = 2.0**20
"""From here on a copy between host and device is a matter of its link's bandwidth."""


@dataclass(frozen=True)
class MappedCase:
    """Operations of a case; ``is_in_step`` when a stack's clock and slow-downs apply, as in a step.

    ``attention_library`` goes before the stack's; ``updated_bytes`` are an optimizer's, which has no operation.

    A whole step is a ``scenario`` under a ``stack``. ``host_constant`` names a constant of the stack that is compared
    by itself; ``reason`` says why a case has none of these.
    """

    operations: tuple[Operation, ...] = ()
    is_in_step: bool = False
    attention_library: str = ""
    updated_bytes: float = 0.0
    scenario: Scenario | None = None
    stack: Stack | None = None
    host_constant: str = ""
    reason: str = ""


class UnmappableCaseError(ValueError):
    """The shape of a case lacks a size, or has one that is none."""


def map_case(case: MeasuredCase, stack: Stack) -> MappedCase:
    """Operations that price a case.

    Parameters
    ----------
    case : MeasuredCase
        What was timed.
    stack : Stack
        Software of layers and blocks; kernels alone do not ask it.

    Returns
    -------
    MappedCase
        Operations with arrays of shape (1,), or why there are none.

    Raises
    ------
    UnmappableCaseError
        If the shape lacks a size that the operation has.
    """
    mapper = MAPPERS.get(case.suite)
    if mapper is None:
        return MappedCase(reason=f"the model has nothing like suite {case.suite}")
    try:
        return mapper(case, stack)
    except KeyError as error:
        raise UnmappableCaseError(f"{case.case}: the shape has no {error.args[0]}") from None
    except (ValueError, ZeroDivisionError) as error:
        raise UnmappableCaseError(f"{case.case}: {str(error).splitlines()[0]}") from None


def _one(value: float) -> FloatArray:
    return np.array([value], dtype=np.float64)


def _size(case: MeasuredCase, name: str) -> float:
    value = case.size(name)
    if not 1 <= value < 2.0**53:
        raise ValueError(f"{name} is {value:g}, which is no size")
    return value


def _product(
    case: MeasuredCase, extents: tuple[float, float, float], *, groups: float = 1.0, is_ragged: bool = False
) -> Operation:
    """One of the three products of a linear layer; weight gradients add up in fp32."""
    phase = PHASE_OF_PASS[case.pass_name]
    rows, columns, inner = (_one(float(size)) for size in linear_extents(*extents)[phase])
    adds_up = phase == "weight_gradient"
    size = PRECISION_BYTES[case.dtype]
    written = PRECISION_BYTES[MASTER_PRECISION] if adds_up else size
    work = Gemm(
        rows,
        columns,
        inner,
        _one(groups),
        case.dtype,
        size,
        written,
        accumulates=adds_up,
        is_ragged=is_ragged,
        row_dispersion=0.0 if adds_up or not is_ragged else _dispersion(case.loads),
        sums_tokens=adds_up,
    )
    return Operation(case.operation, "dense_ffn", phase, "compute", work)


def _dispersion(loads: Sequence[float]) -> float:
    """Variance of the experts' rows over their mean."""
    return float(np.var(loads) / np.mean(loads))


def _gemm(case: MeasuredCase, _: Stack) -> MappedCase:
    return MappedCase((_product(case, (_size(case, "m"), _size(case, "n"), _size(case, "k"))),))


def _grouped_gemm(case: MeasuredCase, stack: Stack) -> MappedCase:
    """One grouped kernel over the experts' mean rows; a loop is one product per expert with rows."""
    sizes = (_size(case, "n"), _size(case, "k"))
    loads = [load for load in case.loads if load]
    if not loads:
        raise ValueError("no expert has rows")
    if case.text("method") == "loop":
        return MappedCase(tuple(_product(case, (load, *sizes)) for load in loads))
    groups = len(case.loads)
    product = _product(case, (sum(loads) / groups, *sizes), groups=groups, is_ragged=True)
    return MappedCase(tuple(with_separate_sum([product], stack, activation_bytes=PRECISION_BYTES[case.dtype])))


def _eight_bit(case: MeasuredCase, stack: Stack) -> MappedCase:
    """8-bit operands and 16-bit results, of one matrix or of experts; casts by their bytes."""
    if case.operation not in ("scaled_gemm", "scaled_grouped_gemm"):
        return _traffic(case, case.num_bytes)
    is_ragged = case.operation == "scaled_grouped_gemm"
    if is_ragged and not any(case.loads):
        raise ValueError("no expert has rows")
    groups = len(case.loads) if is_ragged else 1
    rows = sum(case.loads) / groups if is_ragged else _size(case, "m")
    product = _product(case, (rows, _size(case, "n"), _size(case, "k")), groups=groups, is_ragged=is_ragged)
    assert isinstance(product.work, Gemm)
    scaling = "tensor" if is_ragged else case.text("scaling")
    product = replace(
        product, work=replace(product.work, output_bytes=PRECISION_BYTES[RESULT_PRECISION], scaling=scaling)
    )
    slowdown = stack.quantised_expert_slowdown
    return MappedCase((slower(product, slowdown.value) if is_ragged and slowdown else product,))


def _attention(case: MeasuredCase, stack: Stack) -> MappedCase:
    """Every library of the suite is a flash kernel."""
    chosen = stack.model_copy(update={"attention_kernel": "flash", "compiler": None})
    sizes = (_size(case, "batch"), _size(case, "length"))
    context = _context(_attention_fields(case), case.dtype, chosen, *sizes)
    method = case.text("method")
    library = (stack.attention_library or "") if method == DEFAULT_METHOD else method
    return MappedCase(_of_pass(dense_part(context, DENSE_LAYER), case, "attention.core"), attention_library=library)


def _decode(case: MeasuredCase, stack: Stack) -> MappedCase:
    """Attention of one token per sequence over its cache, by the stack's library: a kernel that streams the cache."""
    method = case.text("method")
    if method != (stack.attention_library or method):
        return MappedCase(reason=f"decoding is priced as {stack.attention_library} does it, not {method}")
    chosen = stack.model_copy(update={"attention_kernel": "flash", "compiler": None})
    sizes = (_size(case, "batch"), _size(case, "length"))
    context = _context(_attention_fields(case), case.dtype, chosen, *sizes, kind="decode")
    return MappedCase(_of_pass(dense_part(context, DENSE_LAYER), case, "attention.core"))


def _traffic(case: MeasuredCase, num_bytes: float, *, compute_s: float = 0.0) -> MappedCase:
    work = MemoryTraffic(_one(num_bytes), _one(compute_s))
    return MappedCase((Operation(case.operation, "memory_bound", "forward", "compute", work),))


def _memory_bound(case: MeasuredCase, stack: Stack) -> MappedCase:
    """Norms, residuals and gated activations as lowered; copies, casts and additions by their bytes."""
    names = {
        "rms_norm": "norm_residual.norm",
        "layer_norm": "norm_residual.norm",
        "residual_add": "norm_residual.residual",
        "gated_activation": "dense_ffn.activation",
    }
    if case.operation not in names:
        widening_s = stack.elementwise.widening_s if stack.elementwise and case.operation in WIDENING else 0.0
        return _traffic(case, case.num_bytes, compute_s=_size(case, "rows") * _size(case, "columns") * widening_s)
    rows, columns = _size(case, "rows"), _size(case, "columns")
    is_fused = case.operation != "gated_activation" or "two kernels" not in case.implementation
    fields = _dense_fields(int(columns))
    chosen = stack.model_copy(update={"fuses_elementwise": is_fused, "compiler": None})
    context = _context(fields, case.dtype, chosen, 1.0, rows)
    operations = _of_pass(dense_part(context, DENSE_LAYER), case, names[case.operation])
    if names[case.operation].startswith("norm_residual"):  # a layer has two of each
        operations = tuple(_share(one, 0.5) for one in operations)
    return MappedCase(operations)


def _share(operation: Operation, share: float) -> Operation:
    """Part of an element-wise operation."""
    assert isinstance(operation.work, MemoryTraffic)
    work = MemoryTraffic(operation.work.num_bytes * share, operation.work.compute_s * share)
    return replace(operation, work=work, kernels=max(round(operation.kernels * share), 1))


def _dispatch(case: MeasuredCase, stack: Stack) -> MappedCase:
    if case.operation == "sort" and stack.elementwise is not None:
        context = _moe_context(case, _stack_with(stack, "permute"), experts=_size(case, "experts"))
        return MappedCase(_of_pass(moe_part(context, MOE_LAYER, np.ones_like), case, "dispatch.sort"))
    if case.operation == "sort":
        return MappedCase(reason="the model counts no sorting of choices: rows are moved, positions are free")
    if case.operation in ("permute", "unpermute"):
        context = _moe_context(case, _stack_with(stack, "permute"), experts=_size(case, "experts"))
        table = moe_part(context, MOE_LAYER, np.ones_like)
        if stack.elementwise is not None:
            name = "dispatch.permute" if case.operation == "permute" else "combine.unpermute"
            return MappedCase(_of_pass(table, case, name))
        return MappedCase(tuple(_share(one, 0.5) for one in _of_pass(table, case, "dispatch.permute")))
    names = {
        "one_hot_dispatch": "dispatch.einsum",
        "one_hot_combine": "combine.einsum",
        "one_hot_masks": "dispatch.masks",
    }
    context = _one_hot_context(case, _stack_with(stack, "one_hot_einsum"))
    return MappedCase(_of_pass(moe_part(context, MOE_LAYER, np.ones_like), case, names[case.operation]))


def _router(case: MeasuredCase, stack: Stack) -> MappedCase:
    context = _moe_context(case, _stack_with(stack, "permute"), experts=_size(case, "experts"))
    return MappedCase(_of_pass(moe_part(context, MOE_LAYER, np.ones_like), case, "router."))


def _stack_with(stack: Stack, dispatch: str) -> Stack:
    return stack.model_copy(update={"dispatch": dispatch, "compiler": None})


def _optimizer(case: MeasuredCase, _: Stack) -> MappedCase:
    """Traffic of a step's update; SGD of the suite has a momentum."""
    kind = case.operation.removesuffix("_step")
    optimizer = Optimizer.model_validate({"kind": kind, "momentum": kind == "sgd"})
    precision = Precisions.model_validate({"compute": case.dtype, "parameters": case.dtype})
    moved = _size(case, "tensors") * _size(case, "elements") * update_bytes(precision, optimizer)
    return MappedCase(updated_bytes=moved)


def _launch(case: MeasuredCase, _: Stack) -> MappedCase:
    constants = {
        "kernel": "kernel_launch_time",
        "read_back": "host_synchronisation_time",
        "kernel_in_graph": "traffic_fixed_s",
    }
    if case.operation in constants:
        return MappedCase(host_constant=constants[case.operation])
    if case.num_bytes >= LARGE_COPY_BYTES and case.operation in ("copy_to_device", "copy_to_host"):
        return MappedCase(host_constant="host_link_bandwidth")
    return MappedCase(reason="no constant of the model stands for it")


def _moe_layer(case: MeasuredCase, stack: Stack) -> MappedCase:
    if case.shape.get("ranks", 1) != 1:
        return MappedCase(reason="a layer over several ranks needs their links: see moesim estimate")
    chosen = _dispatched(case, stack)
    context = _moe_context(case, chosen, experts=_size(case, "experts"), inner=_size(case, "inner"))
    operations = _of_pass(moe_part(context, MOE_LAYER, np.ones_like), case)
    return MappedCase(tuple(_with_loads(operation, case) for operation in operations), is_in_step=True)


def _with_loads(operation: Operation, case: MeasuredCase) -> Operation:
    """Experts' products with their rows as uneven as the case's, where it names them."""
    work = operation.work
    if not isinstance(work, Gemm) or not work.is_ragged or work.sums_tokens or not any(case.loads):
        return operation
    return replace(operation, work=replace(work, row_dispersion=_dispersion(case.loads)))


def _dispatched(case: MeasuredCase, stack: Stack) -> Stack:
    """Return the stack with the case's dispatch, where it names one."""
    dispatch = case.text("dispatch")
    return stack.model_copy(update={"dispatch": dispatch}) if dispatch else stack


def _train_step(case: MeasuredCase, stack: Stack) -> MappedCase:
    """A whole step as a scenario: blocks between an embedding and a head, Adam; a graph replays it where one did."""
    if case.shape.get("ranks", 1) != 1 or case.shape.get("replicas", 1) != 1:
        return MappedCase(reason="a step over several ranks needs their links: see moesim estimate")
    fields = {**_attention_fields(case), "moe": _moe_fields(case, _size(case, "experts"), _size(case, "inner"))}
    fields |= {
        "hidden_size": int(_size(case, "hidden")),
        "vocab_size": int(_size(case, "vocabulary")),
        "tied_embeddings": False,
        "layers": [{"count": int(_size(case, "blocks")), "ffn": "moe"}],
    }
    chosen = _dispatched(case, stack)
    if case.text("launch") == "graph":
        chosen = stack_with_options(chosen, StackOptions(cuda_graphs=["step"]))
    sequences, batches = _size(case, "batch"), _size(case, "micro_batches")
    scenario = _scenario(fields, case.dtype, chosen, sequences, _size(case, "length"), micro_batches=batches)
    return MappedCase(scenario=scenario, stack=chosen)


def _transformer_block(case: MeasuredCase, stack: Stack) -> MappedCase:
    fields = {**_attention_fields(case), "moe": _moe_fields(case, _size(case, "experts"), _size(case, "inner"))}
    fields["hidden_size"] = int(_size(case, "hidden"))
    context = _context(fields, case.dtype, stack, _size(case, "batch"), _size(case, "length"))
    operations = _of_pass(dense_part(context, MOE_LAYER), case)
    operations += _of_pass(moe_part(context, MOE_LAYER, np.ones_like), case)
    return MappedCase(operations, is_in_step=True)


MAPPERS: dict[str, Callable[[MeasuredCase, Stack], MappedCase]] = {
    "gemm": _gemm,
    "grouped_gemm": _grouped_gemm,
    "eight_bit": _eight_bit,
    "decode": _decode,
    "attention": _attention,
    "memory_bound": _memory_bound,
    "dispatch": _dispatch,
    "router": _router,
    "optimizer": _optimizer,
    "launch": _launch,
    "moe_layer": _moe_layer,
    "train_step": _train_step,
    "memory": _train_step,
    "transformer_block": _transformer_block,
}


def _of_pass(table: OperationTable, case: MeasuredCase, prefix: str = "") -> tuple[Operation, ...]:
    """Operations on the device of a pass, by the start of their name; ``backward`` is all gradients."""
    is_forward = case.pass_name == "forward"
    return tuple(
        one
        for one in table.operations
        if one.name.startswith(prefix) and one.stream == "compute" and (one.phase == "forward") == is_forward
    )


def _attention_fields(case: MeasuredCase) -> dict[str, Any]:
    heads, kv_heads, size = (int(_size(case, name)) for name in ("heads", "kv_heads", "head_size"))
    if "value_size" in case.shape:
        value_size = int(_size(case, "value_size"))
        sizes = {"head_size": value_size, "rope_head_size": size - value_size, "value_head_size": value_size}
        attention: dict[str, Any] = {"kind": "latent", "heads": heads, "kv_rank": heads * value_size, **sizes}
    elif heads == kv_heads:
        attention = {"kind": "multi_head", "heads": heads, "head_size": size}
    else:
        attention = {"kind": "grouped_query", "heads": heads, "kv_heads": kv_heads, "head_size": size}
    return {**_dense_fields(heads * size), "attention": attention}


def _dense_fields(width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "attention": {"kind": "multi_head", "heads": 1, "head_size": width},
        "dense_ffn": {"intermediate_size": width, "is_gated": True},
    }


def _moe_fields(case: MeasuredCase, experts: float, inner: float, **router: Any) -> dict[str, Any]:
    kind = case.text("kind") or case.text("router") or "top_k"
    chosen = {"kind": kind, "experts_per_token": int(_size(case, "experts_per_token")), **router}
    if "capacity_factor" in case.shape:
        chosen["capacity_factor"] = case.size("capacity_factor")
        chosen["capacity_per"] = case.text("capacity_per") or "token"
        if "group_tokens" in case.shape:
            chosen["group_tokens"] = int(_size(case, "group_tokens"))
    return {
        "num_experts": int(experts),
        "intermediate_size": int(inner),
        "is_gated": case.shape.get("gated", 1) != 0,
        "router": {**chosen, "precision": "fp32"},
    }


def _moe_context(case: MeasuredCase, stack: Stack, *, experts: float, inner: float = 1.0) -> LoweringContext:
    """Context of one MoE layer on one device; tokens are those of the draw, where loads say how many it had."""
    is_drawn = bool(case.loads) and "capacity_factor" not in case.shape
    tokens = sum(case.loads) / _size(case, "experts_per_token") if is_drawn else _size(case, "tokens")
    fields = {**_dense_fields(int(_size(case, "hidden"))), "moe": _moe_fields(case, experts, inner)}
    return _context(fields, case.dtype, stack, 1.0, tokens)


def _one_hot_context(case: MeasuredCase, stack: Stack) -> LoweringContext:
    """Context of a layer whose routing groups and slots are those of the case."""
    group, slots, experts = (_size(case, name) for name in ("group_tokens", "slots", "experts"))
    capacity = slots * experts / (_size(case, "experts_per_token") * group)
    router = {"capacity_factor": capacity, "group_tokens": int(group)}
    fields = {**_dense_fields(int(_size(case, "hidden"))), "moe": _moe_fields(case, experts, 1.0, **router)}
    return _context(fields, case.dtype, stack, _size(case, "groups"), group)


def _context(
    fields: dict[str, Any], dtype: str, stack: Stack, sequences: float, length: float, *, kind: str = "training"
) -> LoweringContext:
    scenario = _scenario(fields, dtype, stack, sequences, length, kind=kind)
    return LoweringContext(scenario, stack, resolve_columns(group_columns_table(scenario, {}, 1)))


def _scenario(
    fields: dict[str, Any],
    dtype: str,
    stack: Stack,
    sequences: float,
    length: float,
    *,
    micro_batches: float = 1.0,
    kind: str = "training",
) -> Scenario:
    """A step on one device: weights and activations in ``dtype``, gradients added up in fp32."""
    number_format = {"compute": dtype, "parameters": dtype, "activations": dtype, "dispatch": dtype}
    document = {
        "schema_version": 1,
        "name": "measured",
        "model": {
            "architecture": "decoder_only",
            "vocab_size": 1,
            "layers": [{"count": 1, "ffn": "moe" if "moe" in fields else "dense"}],
            **fields,
        },
        "workload": {
            "kind": kind,
            "sequence_length": int(length),
            "sequences_per_micro_batch": int(sequences),
            "sequences_per_step": int(sequences * micro_batches),
        },
        "precision": {**number_format, "gradients": MASTER_PRECISION},
        "parallelism": {"data": 1},
        "cluster": "alone",
        "devices": 1,
        "stack": stack.id,
    }
    return Scenario.model_validate(document)
