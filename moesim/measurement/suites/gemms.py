"""Matrix products: forward, gradient of the activations, gradient of the weights added up in fp32.

The weight is W[n, k] as frameworks store it: Y[m, n] = X[m, k] W^T, dX = dY W, dW += dY^T X.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, PassName, Target, Work

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

MASTER_BYTES = 4
PASSES: tuple[PassName, ...] = ("forward", "dgrad", "wgrad")
TOKENS = (4096, 1024, 16384, 8192, 2048, 512, 256, 64, 16)
# (n, k): projections of models from 1k to 8k wide, gated up-projections joined, experts, a narrow and a misaligned one.
WEIGHTS = (
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (6144, 4096),
    (4096, 7168),
    (7168, 2048),
    (1024, 1024),
    (21248, 1024),
    (1024, 21248),
    (1536, 2048),
    (2048, 768),
    (8192, 8192),
    (512, 7168),
    (4100, 4100),
    (1000, 3000),
    (129280, 7168),
)
LARGEST_OUTPUT = 4096 * 129280
CPU_SHAPES = ((256, 512, 256), (64, 1024, 256), (256, 250, 300))
ACCUMULATION_TOLERANCE = 0.05


def cases(target: Target) -> list[Case]:
    """Return the cases of plain matrix products."""
    if target.device == "cpu":
        shapes = list(CPU_SHAPES)
    else:
        # Along the diagonals, so that a cut list holds many weights and many token counts alike.
        ranked = sorted(product(enumerate(TOKENS), enumerate(WEIGHTS)), key=lambda pair: pair[0][0] * 2 + pair[1][0])
        shapes = [(m, n, k) for (_, m), (_, (n, k)) in ranked if m * n <= LARGEST_OUTPUT]
    return [_case(dtype, m, n, k, kind) for m, n, k in shapes for dtype in target.dtypes for kind in PASSES]


def _case(dtype: str, m: int, n: int, k: int, kind: PassName) -> Case:
    size = ELEMENT_BYTES[dtype]
    activations = size * (m * k + m * n)
    moved = activations + (2 * MASTER_BYTES if kind == "wgrad" else size) * n * k
    held = activations + (MASTER_BYTES if kind == "wgrad" else size) * n * k
    prepare = partial(prepare_gemm, dtype=dtype, m=m, n=n, k=k, kind=kind)
    return Case("gemm", "gemm", kind, dtype, {"m": m, "n": n, "k": k}, 2.0 * m * n * k, moved, held, prepare)


def prepare_gemm(bench: Workbench, *, dtype: str, m: int, n: int, k: int, kind: PassName) -> Work:
    """Fill one matrix product.

    Parameters
    ----------
    bench : Workbench
        The device.
    dtype : str
        Of the inputs; the weight's gradient is fp32.
    m, n, k : int
        Tokens, outputs, inputs.
    kind : str
        ``forward``, ``dgrad`` or ``wgrad``.
    """
    import torch

    if kind == "wgrad":
        grads, inputs = bench.normal(m, n, dtype=dtype), bench.normal(m, k, dtype=dtype)
        total = bench.normal(n, k, dtype="fp32")
        method = weight_gradient(bench.device, dtype)
        return Work(lambda: method.add(total, grads, inputs), method.name)
    weight = bench.weight(n, k, dtype=dtype)
    if kind == "forward":
        inputs, out = bench.normal(m, k, dtype=dtype), bench.empty(m, n, dtype=dtype)
        return Work(lambda: torch.mm(inputs, weight.t(), out=out), "torch.mm")
    grads, out = bench.normal(m, n, dtype=dtype), bench.empty(m, k, dtype=dtype)
    return Work(lambda: torch.mm(grads, weight, out=out), "torch.mm")


@dataclass(frozen=True, slots=True)
class WeightGradient:
    """A way to add dY^T X to an fp32 sum: ``add(total, grads, inputs)``."""

    name: str
    add: Callable[[Tensor, Tensor, Tensor], object]


@cache
def weight_gradient(device: str, dtype: str) -> WeightGradient:
    """Return the most direct way that this torch offers on the device, tried on a small product.

    Parameters
    ----------
    device : str
        ``cuda`` or ``cpu``.
    dtype : str
        Of the inputs.

    Notes
    -----
    In order: one product that reads low precision and adds to fp32 in place; a product into fp32, then an addition; a
    product into low precision, then an addition (what remains where the library cannot mix the two).
    """
    if dtype == "fp32":
        return WeightGradient("torch.addmm_", _added_in_place)
    for method in (
        WeightGradient("aten.addmm.dtype_out", _added_by_mixed_product),
        WeightGradient("torch.mm(out_dtype=fp32) + add_", _added_after_mixed_product),
    ):
        if _adds_correctly(method, device, dtype):
            return method
    return WeightGradient("torch.mm + add_", _added_after_product)


def _added_in_place(total: Tensor, grads: Tensor, inputs: Tensor) -> object:
    return total.addmm_(grads.t(), inputs)


def _added_by_mixed_product(total: Tensor, grads: Tensor, inputs: Tensor) -> object:
    import torch

    return torch.ops.aten.addmm.dtype_out(total, grads.t(), inputs, torch.float32, out=total)


def _added_after_mixed_product(total: Tensor, grads: Tensor, inputs: Tensor) -> object:
    import torch

    return total.add_(torch.mm(grads.t(), inputs, out_dtype=torch.float32))


def _added_after_product(total: Tensor, grads: Tensor, inputs: Tensor) -> object:
    return total.add_(grads.t().mm(inputs))


def _adds_correctly(method: WeightGradient, device: str, dtype: str) -> bool:
    """Whether a method works here and gives the sum; the mixed products are young, and differ between builds."""
    import torch

    from moesim.measurement.workbenches import TORCH_NAMES

    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(64, 32, generator=generator).to(device, getattr(torch, TORCH_NAMES[dtype]))
    inputs = torch.randn(64, 32, generator=generator).to(device, getattr(torch, TORCH_NAMES[dtype]))
    total = torch.ones(32, 32, device=device)
    expected = 1 + grads.double().t() @ inputs.double()
    try:
        method.add(total, grads, inputs)
    except (RuntimeError, TypeError, AttributeError):  # not built for this device; not in this torch
        return False
    return bool((total - expected).norm() <= ACCUMULATION_TOLERANCE * expected.norm())
