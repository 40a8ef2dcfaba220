"""Kernels that only move bytes: norms, residual additions, gated activations, casts, copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, PassName, Target, Work

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

SHAPES = ((16384, 4096), (8192, 1024), (4096, 7168), (4096, 14336), (1024, 4096), (65536, 2048), (256, 4096))
CPU_SHAPES = ((512, 256),)
EPSILON = 1e-6

# Operation and pass: passes over a tensor of the shape in its own precision, and in fp32. Weights are too few to count.
TRAFFIC: dict[tuple[str, PassName], tuple[float, float]] = {
    ("copy", "forward"): (2, 0),
    ("rms_norm", "forward"): (2, 0),
    ("rms_norm", "backward"): (3, 0),
    ("residual_add", "forward"): (3, 0),
    ("gated_activation", "forward"): (3, 0),
    ("gated_activation", "backward"): (5, 0),
    ("layer_norm", "forward"): (2, 0),
    ("layer_norm", "backward"): (3, 0),
    ("cast_from_fp32", "forward"): (1, 1),
    ("cast_to_fp32", "forward"): (1, 1),
    ("gradient_accumulation", "forward"): (1, 2),
}


def cases(target: Target) -> list[Case]:
    """Return the cases of memory-bound kernels."""
    shapes = CPU_SHAPES if target.device == "cpu" else SHAPES
    return [
        _case(operation, kind, dtype, rows, columns)
        for rows, columns in shapes
        for operation, kind in TRAFFIC
        for dtype in target.dtypes
        if dtype != "fp32" or TRAFFIC[operation, kind][1] == 0
    ]


def _case(operation: str, kind: PassName, dtype: str, rows: int, columns: int) -> Case:
    own, full = TRAFFIC[operation, kind]
    moved = float(rows * columns * (own * ELEMENT_BYTES[dtype] + full * ELEMENT_BYTES["fp32"]))
    prepare = partial(prepare_kernel, operation=operation, kind=kind, dtype=dtype, rows=rows, columns=columns)
    named = {"rows": rows, "columns": columns}
    return Case("memory_bound", operation, kind, dtype, named, 0.0, moved, moved, prepare)


def prepare_kernel(bench: Workbench, *, operation: str, kind: PassName, dtype: str, rows: int, columns: int) -> Work:
    """Fill the inputs of one kernel.

    Parameters
    ----------
    bench : Workbench
        The device.
    operation, kind : str
        A key of ``TRAFFIC``.
    dtype : str
        The lower precision of the kernel.
    rows, columns : int
        Tokens and width.
    """
    import torch

    def normal(precision: str = dtype) -> Tensor:
        return bench.normal(rows, columns, dtype=precision)

    match operation:
        case "copy" | "cast_from_fp32" | "cast_to_fp32":
            source = normal("fp32" if operation == "cast_from_fp32" else dtype)
            out = bench.empty(rows, columns, dtype="fp32" if operation == "cast_to_fp32" else dtype)
            return Work(lambda: out.copy_(source), "Tensor.copy_")
        case "residual_add":
            left, right, out = normal(), normal(), bench.empty(rows, columns, dtype=dtype)
            return Work(lambda: torch.add(left, right, out=out), "torch.add")
        case "gradient_accumulation":
            total, grad = normal("fp32"), normal()
            return Work(lambda: total.add_(grad), "Tensor.add_")
        case "gated_activation":
            return _differentiable(bench, kind, gated_activation, [normal(), normal()], "silu, mul: two kernels")
        case "rms_norm":
            weight = bench.normal(columns, dtype=dtype)
            return _differentiable(bench, kind, rms_norm, [normal(), weight], "functional.rms_norm")
        case "layer_norm":
            tensors = [normal(), bench.normal(columns, dtype=dtype), bench.normal(columns, dtype=dtype)]
            return _differentiable(bench, kind, _layer_norm, tensors, "functional.layer_norm")
        case _:
            raise ValueError(f"unknown operation {operation!r}")


def gated_activation(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) times up."""
    import torch

    return torch.nn.functional.silu(gate) * up


def rms_norm(rows: Tensor, weight: Tensor) -> Tensor:
    """Divide each row by its root mean square and scale it."""
    import torch

    return torch.nn.functional.rms_norm(rows, (rows.shape[-1],), weight, EPSILON)


def _layer_norm(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.layer_norm(rows, (rows.shape[-1],), weight, bias, EPSILON)


def _differentiable(
    bench: Workbench, kind: PassName, function: Callable[..., Tensor], inputs: list[Tensor], name: str
) -> Work:
    """Return a call of a function, or of its gradient with respect to all inputs."""
    import torch

    if kind == "forward":
        return Work(lambda: function(*inputs), name)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = function(*leaves)
    grad = torch.empty_like(out).copy_(bench.normal(*out.shape, dtype="fp32"))
    return Work(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), f"gradient of {name}")
