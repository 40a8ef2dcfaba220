"""Matrix products of 8-bit floats (e4m3) with bf16 results, of one matrix and of several experts, and casts to them.

Hardware multiplies X[m, k] and W[n, k], both with k contiguous: gradients are the same kernel at other extents, after a
copy of their operand that is transposed. Scales are fp32: one per tensor, one per row, or one per 128 of k (128 x 128
of W).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, Shape, Target, UnmeasurableError, Work
from moesim.measurement.routed_loads import RoutedLoads, rank_loads
from moesim.measurement.suites.grouped_gemms import SHAPES as EXPERTS
from moesim.measurement.suites.grouped_gemms import ExpertShape, Groups

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

EIGHT_BIT = "fp8"
WIDE = "bf16"
BLOCK = 128
SCALINGS = ("tensor", "row", "block")
TOKENS = (4096, 16384, 1024, 256)
# (n, k): projections, experts and dense layers of models from 2k to 8k wide, and the same ones transposed.
WEIGHTS = (
    (4096, 4096),
    (4096, 7168),
    (28672, 4096),
    (7168, 2048),
    (4096, 14336),
    (1536, 2048),
    (18432, 7168),
    (2048, 768),
    (7168, 18432),
    (8192, 8192),
)
CPU_PRODUCTS = ((64, 256, 128),)
EXPERT_TOKENS = (4096, 1024)
EXPERT_PRESETS = ("W0", "W2")
CASTS = ((4096, 7168), (16384, 4096), (65536, 2048), (1024, 4096))
CPU_CASTS = ((256, 256),)
CAST_BYTES = {"cast": 3.0, "cast_transposed": 3.0, "amax": 2.0}
"""Operations on a bf16 tensor and the bytes per element they cannot avoid."""


def cases(target: Target) -> list[Case]:
    """Return the cases of 8-bit products and casts, those of one matrix and of experts in turns."""
    if target.device == "cpu":
        sizes = [(m, n, k, scaling) for m, n, k in CPU_PRODUCTS for scaling in SCALINGS[:2]]
        experts = []  # torch has no grouped 8-bit product for processors
        casts = [(kind, *shape) for shape in CPU_CASTS for kind in CAST_BYTES]
    else:
        sizes = [(m, n, k, scaling) for m in TOKENS for n, k in WEIGHTS for scaling in SCALINGS]
        experts = [
            (shape, tokens, preset, side)
            for tokens in EXPERT_TOKENS
            for side in ("up", "down")
            for preset in EXPERT_PRESETS
            for shape in EXPERTS
        ]
        casts = [(kind, *shape) for shape in CASTS for kind in CAST_BYTES]
    products = [_product(*one) for one in sizes]
    grouped = [_grouped_product(*one, target.seed) for one in experts]
    of_casts = [_cast(*one) for one in casts]
    third = len(products) // 3
    return [*products[:third], *of_casts, *grouped, *products[third:]]


def _product(m: int, n: int, k: int, scaling: str) -> Case:
    moved = float(m * k + n * k + ELEMENT_BYTES[WIDE] * m * n)
    named: Shape = {"m": m, "n": n, "k": k, "scaling": scaling}
    prepare = partial(prepare_product, m=m, n=n, k=k, scaling=scaling)
    return Case("eight_bit", "scaled_gemm", "forward", EIGHT_BIT, named, 2.0 * m * n * k, moved, moved, prepare)


def _grouped_product(shape: ExpertShape, tokens: int, preset: str, side: str, seed: int) -> Case:
    routed = rank_loads(
        preset, tokens, shape.num_experts, shape.experts_per_token, num_ranks=shape.num_ranks, seed=seed
    )
    n, k = (2 * shape.inner, shape.hidden) if side == "up" else (shape.hidden, shape.inner)
    rows, local = routed.rows, len(routed.loads)
    activations = float(rows * (k + ELEMENT_BYTES[WIDE] * n))
    named: Shape = {**shape.names(preset, routed.step, tokens), "n": n, "k": k, "scaling": "row"}
    return Case(
        suite="eight_bit",
        operation="scaled_grouped_gemm",
        pass_name="forward",
        dtype=EIGHT_BIT,
        shape=named,
        flops=2.0 * rows * n * k,
        traffic_bytes=activations + routed.num_hit * n * k,
        working_set_bytes=activations + local * n * k,
        prepare=partial(prepare_experts, routed=routed, n=n, k=k),
        loads=routed.loads,
    )


def _cast(kind: str, rows: int, columns: int) -> Case:
    moved = rows * columns * CAST_BYTES[kind]
    named: Shape = {"rows": rows, "columns": columns}
    prepare = partial(prepare_cast, kind=kind, rows=rows, columns=columns)
    return Case("eight_bit", kind, "forward", EIGHT_BIT, named, 0.0, moved, moved, prepare)


def eight_bit(values: Tensor) -> Tensor:
    """Round to e4m3, which hardware multiplies."""
    import torch

    return values.to(torch.float8_e4m3fn)


def scales(bench: Workbench, m: int, n: int, k: int, scaling: str) -> tuple[Tensor, Tensor]:
    """Scales of X[m, k] and of W[n, k] as torch wants them, near 1 and all different.

    Parameters
    ----------
    bench : Workbench
        The device.
    m, n, k : int
        Tokens, outputs, inputs.
    scaling : str
        One of ``SCALINGS``.
    """
    if scaling == "tensor":
        return _near_one(bench, 1).squeeze(), _near_one(bench, 1).squeeze()
    if scaling == "row":
        return _near_one(bench, m, 1), _near_one(bench, 1, n)
    if k % BLOCK or n % BLOCK:
        raise UnmeasurableError(f"blocks of {BLOCK} do not divide {n} x {k}")
    return _near_one(bench, k // BLOCK, m).t(), _near_one(bench, n // BLOCK, k // BLOCK).t()


def _near_one(bench: Workbench, *sizes: int) -> Tensor:
    return bench.normal(*sizes, dtype="fp32", scale=0.05).add_(1.0)


def prepare_product(bench: Workbench, *, m: int, n: int, k: int, scaling: str) -> Work:
    """Fill one 8-bit product.

    Parameters
    ----------
    bench : Workbench
        The device.
    m, n, k : int
        Tokens, outputs, inputs.
    scaling : str
        One of ``SCALINGS``.
    """
    import torch

    inputs, weight = eight_bit(bench.normal(m, k, dtype=WIDE)), eight_bit(bench.normal(n, k, dtype=WIDE))
    scale, weight_scale = scales(bench, m, n, k, scaling)

    def call() -> Tensor:
        return torch._scaled_mm(inputs, weight.t(), scale, weight_scale, out_dtype=torch.bfloat16)

    return Work(call, f"torch._scaled_mm, {scaling} scales")


def prepare_experts(bench: Workbench, *, routed: RoutedLoads, n: int, k: int) -> Work:
    """Fill one 8-bit product per expert, with a scale per row.

    Parameters
    ----------
    bench : Workbench
        The device.
    routed : RoutedLoads
        Rows of each expert.
    n, k : int
        Outputs and inputs of an expert.
    """
    import torch

    groups = Groups.of(bench, routed.loads)
    inputs = eight_bit(bench.normal(groups.rows, k, dtype=WIDE))
    weight = eight_bit(bench.normal(groups.num_groups, n, k, dtype=WIDE))
    scale, weight_scale = _near_one(bench, groups.rows), _near_one(bench, groups.num_groups, n)

    def call() -> Tensor:
        return torch._scaled_grouped_mm(
            inputs,
            weight.transpose(-2, -1),
            scale,
            weight_scale,
            offs=groups.ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return Work(call, "torch._scaled_grouped_mm")


def prepare_cast(bench: Workbench, *, kind: str, rows: int, columns: int) -> Work:
    """Fill one cast, plain or with its result transposed, or the largest magnitude that a scale is made of.

    Parameters
    ----------
    bench : Workbench
        The device.
    kind : str
        A key of ``CAST_BYTES``.
    rows, columns : int
        Tokens and width.
    """
    values = bench.normal(rows, columns, dtype=WIDE)
    if kind == "cast":
        return Work(lambda: eight_bit(values), "Tensor.to")
    if kind == "cast_transposed":
        return Work(lambda: eight_bit(values.t()).contiguous(), "Tensor.to, Tensor.contiguous")
    return Work(lambda: values.abs().amax(), "Tensor.abs, Tensor.amax")
