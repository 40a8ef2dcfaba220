"""Matrix products of several experts: rows sorted by expert, loads equal or drawn by the routing presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import ELEMENT_BYTES, Case, PassName, Shape, Target, Work
from moesim.measurement.routed_loads import PRESETS, RoutedLoads, rank_loads
from moesim.measurement.suites.gemms import MASTER_BYTES, PASSES, weight_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from moesim.measurement.workbenches import Workbench

GROUPED = "torch._grouped_mm"
GROUPED_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Experts of one rank of an expert-parallel layer; ``inner`` counts both halves of a gated up-projection once."""

    num_experts: int
    num_ranks: int
    experts_per_token: int
    hidden: int
    inner: int

    def names(self, preset: str, step: int, tokens: int) -> dict[str, int | str]:
        """Experts and their routing as a case names them."""
        return {
            "preset": preset,
            "step": step,
            "tokens": tokens,
            "experts": self.num_experts,
            "ranks": self.num_ranks,
            "experts_per_token": self.experts_per_token,
        }


# Mixtral 8x7B, DeepSeek-V3 on 8 ranks, Qwen3-30B-A3B whole and on 8, M6-T's wide and few experts.
SHAPES = (
    ExpertShape(8, 1, 2, 4096, 14336),
    ExpertShape(256, 8, 8, 7168, 2048),
    ExpertShape(128, 1, 8, 2048, 768),
    ExpertShape(128, 8, 8, 2048, 768),
    ExpertShape(16, 8, 1, 1024, 21248),
)
TOKENS = (4096, 1024, 8192, 256)
CPU_SHAPES = (ExpertShape(8, 2, 2, 64, 96),)
CPU_TOKENS = 128


def cases(target: Target) -> list[Case]:
    """Return the cases of experts' products: equal loads first, then the other presets, then other token counts."""
    shapes, tokens = (CPU_SHAPES, (CPU_TOKENS,)) if target.device == "cpu" else (SHAPES, TOKENS)
    wanted: list[tuple[ExpertShape, int, str, str, str]] = []
    for shape in shapes:
        wanted += [(shape, tokens[0], "W0", side, "grouped") for side in ("up", "down")]
    for preset in PRESETS[1:]:
        wanted += [(shape, tokens[0], preset, "up", "grouped") for shape in shapes]
    wanted += [(shape, tokens[0], "W0", "up", "loop") for shape in shapes]
    for count in tokens[1:]:
        wanted += [(shape, count, preset, "up", "grouped") for shape in shapes for preset in ("W0", "W3")]
    dtypes = target.dtypes
    return [_case(*one, dtype, kind, target.seed) for one in wanted for dtype in dtypes for kind in PASSES]


def _case(
    shape: ExpertShape, tokens: int, preset: str, side: str, method: str, dtype: str, kind: PassName, seed: int
) -> Case:
    routed = rank_loads(
        preset, tokens, shape.num_experts, shape.experts_per_token, num_ranks=shape.num_ranks, seed=seed
    )
    n, k = (2 * shape.inner, shape.hidden) if side == "up" else (shape.hidden, shape.inner)
    size, rows, local = ELEMENT_BYTES[dtype], routed.rows, len(routed.loads)
    weight_bytes = n * k * (2 * MASTER_BYTES if kind == "wgrad" else size)
    held = size * (rows * (n + k) + local * n * k) + (local * n * k * (MASTER_BYTES + size) if kind == "wgrad" else 0)
    named: Shape = {**shape.names(preset, routed.step, tokens), "n": n, "k": k, "method": method}
    return Case(
        suite="grouped_gemm",
        operation="grouped_gemm",
        pass_name=kind,
        dtype=dtype,
        shape=named,
        flops=2.0 * rows * n * k,
        traffic_bytes=size * rows * (n + k) + routed.num_hit * weight_bytes,
        working_set_bytes=held,
        prepare=partial(prepare_experts, routed=routed, n=n, k=k, dtype=dtype, kind=kind, method=method),
        loads=routed.loads,
    )


def prepare_experts(
    bench: Workbench, *, routed: RoutedLoads, n: int, k: int, dtype: str, kind: PassName, method: str
) -> Work:
    """Fill one product per expert.

    Parameters
    ----------
    bench : Workbench
        The device.
    routed : RoutedLoads
        Rows of each expert.
    n, k : int
        Outputs and inputs of an expert.
    dtype : str
        Of the inputs.
    kind : str
        ``forward``, ``dgrad`` or ``wgrad``.
    method : str
        ``grouped`` takes torch's grouped product where it works, ``loop`` one product per expert.
    """
    groups = Groups.of(bench, routed.loads)
    products = grouped_products(bench.device, dtype) if method == "grouped" else LOOP
    if kind == "wgrad":
        grads, inputs = bench.normal(groups.rows, n, dtype=dtype), bench.normal(groups.rows, k, dtype=dtype)
        total = bench.normal(groups.num_groups, n, k, dtype="fp32")
        add, name = products.add_weight_gradient, products.weight_gradient_name(bench.device, dtype)
        return Work(lambda: add(total, grads, inputs, groups), name)
    weight = bench.weight(groups.num_groups, n, k, dtype=dtype)
    if kind == "forward":
        inputs, multiply = bench.normal(groups.rows, k, dtype=dtype), products.forward
        return Work(lambda: multiply(inputs, weight, groups), products.name)
    grads, pull = bench.normal(groups.rows, n, dtype=dtype), products.input_gradient
    return Work(lambda: pull(grads, weight, groups), products.name)


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows of each group, on the host and as ends of the groups on the device."""

    loads: tuple[int, ...]
    ends: Tensor

    @classmethod
    def of(cls, bench: Workbench, loads: tuple[int, ...]) -> Groups:
        """Copy the ends of the groups to the device."""
        import numpy as np

        return cls(loads, bench.integers(np.cumsum(loads), bits=32))

    @property
    def rows(self) -> int:
        """Rows of all groups."""
        return sum(self.loads)

    @property
    def num_groups(self) -> int:
        """Groups, empty ones included."""
        return len(self.loads)


@dataclass(frozen=True, slots=True)
class GroupedProducts:
    """The three products of a layer of experts.

    ``forward(x, w, groups)``, ``input_gradient(dy, w, groups)``, ``add_weight_gradient(total, dy, x, groups)`` with
    x[rows, k], w[groups, n, k], dy[rows, n] and total[groups, n, k] in fp32.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Groups], Tensor]
    input_gradient: Callable[[Tensor, Tensor, Groups], Tensor]
    add_weight_gradient: Callable[[Tensor, Tensor, Tensor, Groups], object]

    def weight_gradient_name(self, device: str, dtype: str) -> str:
        """Name the routines that add up the weights' gradients."""
        return f"{GROUPED} + add_" if self.name == GROUPED else f"loop of {weight_gradient(device, dtype).name}"


def _loop_forward(inputs: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    import torch

    out = inputs.new_empty(groups.rows, weight.shape[1])
    for index, (rows, written) in enumerate(zip(inputs.split(groups.loads), out.split(groups.loads), strict=True)):
        if rows.shape[0]:
            torch.mm(rows, weight[index].t(), out=written)
    return out


def _loop_input_gradient(grads: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    import torch

    out = grads.new_empty(groups.rows, weight.shape[2])
    for index, (rows, written) in enumerate(zip(grads.split(groups.loads), out.split(groups.loads), strict=True)):
        if rows.shape[0]:
            torch.mm(rows, weight[index], out=written)
    return out


def _loop_weight_gradient(total: Tensor, grads: Tensor, inputs: Tensor, groups: Groups) -> object:
    method = weight_gradient(total.device.type, precision_name(inputs))
    pairs = zip(grads.split(groups.loads), inputs.split(groups.loads), strict=True)
    for index, (rows, fed) in enumerate(pairs):
        if rows.shape[0]:
            method.add(total[index], rows, fed)
    return total


def precision_name(tensor: Tensor) -> str:
    """Name a tensor's precision as cases do."""
    from moesim.measurement.workbenches import TORCH_NAMES

    wanted = str(tensor.dtype).removeprefix("torch.")
    return next(name for name, torch_name in TORCH_NAMES.items() if torch_name == wanted)


def _grouped_forward(inputs: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    import torch

    return torch._grouped_mm(inputs, weight.transpose(-2, -1), offs=groups.ends)


def _grouped_input_gradient(grads: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    import torch

    return torch._grouped_mm(grads, weight, offs=groups.ends)


def _grouped_weight_gradient(total: Tensor, grads: Tensor, inputs: Tensor, groups: Groups) -> object:
    import torch

    return total.add_(torch._grouped_mm(grads.t(), inputs, offs=groups.ends))


LOOP = GroupedProducts("loop of torch.mm", _loop_forward, _loop_input_gradient, _loop_weight_gradient)


@cache
def grouped_products(device: str, dtype: str) -> GroupedProducts:
    """Return torch's grouped products where this torch has them for the device and they are right, else loops.

    Parameters
    ----------
    device : str
        ``cuda`` or ``cpu``.
    dtype : str
        Of the inputs.
    """
    grouped = GroupedProducts(GROUPED, _grouped_forward, _grouped_input_gradient, _grouped_weight_gradient)
    return grouped if _multiplies_correctly(grouped, device, dtype) else LOOP


def _multiplies_correctly(products: GroupedProducts, device: str, dtype: str) -> bool:
    """Compare with loops on a small layer with an empty expert, where grouped kernels have erred before."""
    import torch

    from moesim.measurement.workbenches import TORCH_NAMES

    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, getattr(torch, TORCH_NAMES[dtype]))

    groups = Groups((24, 0, 40), torch.tensor([24, 24, 64], dtype=torch.int32, device=device))
    inputs, grads, weight = normal(64, 32), normal(64, 48), normal(3, 48, 32)
    try:
        for ours, theirs in zip(
            _three(products, inputs, grads, weight, groups), _three(LOOP, inputs, grads, weight, groups), strict=True
        ):
            if not (ours - theirs).float().norm() <= GROUPED_TOLERANCE * theirs.float().norm():
                return False
    except (RuntimeError, TypeError, AttributeError):  # not built for this device or precision; not in this torch
        return False
    return True


def _three(products: GroupedProducts, inputs: Tensor, grads: Tensor, weight: Tensor, groups: Groups) -> list[Tensor]:
    """Return the results of the three products; the sum of weight gradients begins at one."""
    import torch

    total = torch.ones(weight.shape, device=weight.device)
    products.add_weight_gradient(total, grads, inputs, groups)
    return [products.forward(inputs, weight, groups), products.input_gradient(grads, weight, groups), total]
