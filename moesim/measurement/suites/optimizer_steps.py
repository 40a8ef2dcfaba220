"""Optimizer steps over fp32 master weights, with the copy in low precision that the next forward pass reads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, Target, Work

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

LEARNING_RATE = 1e-6
MASTER = 4
# Tensors of master precision read, written, and read again for the copy: weight, gradient, moments.
MASTER_PASSES = {"adam": 4 + 3 + 1, "sgd": 3 + 2 + 1}
MASTER_TENSORS = {"adam": 4, "sgd": 3}
# (tensors, elements of each): one flat buffer as ZeRO keeps it, layers, and many small tensors.
SETS = ((1, 2**28), (64, 2**22), (1, 2**24), (1024, 2**16), (1, 2**20))
CPU_SETS = ((1, 2**16), (8, 2**12))


def cases(target: Target) -> list[Case]:
    """Return the cases of optimizer steps."""
    sets = CPU_SETS if target.device == "cpu" else SETS
    dtypes = [dtype for dtype in target.dtypes if dtype != "fp32"]
    return [_case(kind, dtype, *one) for one in sets for kind in MASTER_PASSES for dtype in dtypes]


def _case(kind: str, dtype: str, num_tensors: int, elements: int) -> Case:
    total, size = num_tensors * elements, ELEMENT_BYTES[dtype]
    moved = float(total * (MASTER * MASTER_PASSES[kind] + size))
    held = float(total * (MASTER * MASTER_TENSORS[kind] + size))
    prepare = partial(prepare_step, kind=kind, dtype=dtype, num_tensors=num_tensors, elements=elements)
    named = {"tensors": num_tensors, "elements": elements}
    return Case("optimizer", f"{kind}_step", "forward", dtype, named, 0.0, moved, held, prepare)


def prepare_step(bench: Workbench, *, kind: str, dtype: str, num_tensors: int, elements: int) -> Work:
    """Fill weights, gradients and moments, and return one step.

    Parameters
    ----------
    bench : Workbench
        The device.
    kind : str
        ``adam`` (decoupled decay) or ``sgd`` with momentum.
    dtype : str
        Of the copy of the weights.
    num_tensors, elements : int
        Tensors of the set and elements of each.

    Notes
    -----
    The kernels behind ``torch.optim`` are called by their own names: the classes around them load the compiler of
    torch, and with it packages that a bare machine may lack.
    """
    import torch

    def tensors(precision: str = "fp32") -> list[Tensor]:
        return [bench.normal(elements, dtype=precision) for _ in range(num_tensors)]

    weights, grads, first, copies = tensors(), tensors(), tensors(), tensors(dtype)
    if kind == "sgd":

        def step() -> None:
            sgd_step(weights, grads, first)
            torch._foreach_copy_(copies, weights)

        return Work(step, "torch._fused_sgd_, torch._foreach_copy_")
    second = [moment.square_() for moment in tensors()]
    counts = [torch.ones((), device=bench.device) for _ in range(num_tensors)]

    def adam() -> None:
        adam_step(weights, grads, first, second, counts)
        torch._foreach_copy_(copies, weights)

    return Work(adam, "torch._fused_adamw_, torch._foreach_copy_")


def adam_step(
    weights: list[Tensor], grads: list[Tensor], first: list[Tensor], second: list[Tensor], counts: list[Tensor]
) -> None:
    """Take one step of Adam with decoupled decay; ``counts`` hold the number of this step."""
    import torch

    torch._fused_adamw_(
        weights,
        grads,
        first,
        second,
        [],
        counts,
        lr=LEARNING_RATE,
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


def sgd_step(weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
    """Take one step of gradient descent with momentum."""
    import torch

    torch._fused_sgd_(
        weights,
        grads,
        momenta,
        weight_decay=0.0,
        momentum=0.9,
        lr=LEARNING_RATE,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
