"""What the host pays: launching kernels one by one or as a graph, waiting for an answer, moving bytes to the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from moesim.measurement.cases import Case, Target, Timing, Work

if TYPE_CHECKING:
    from moesim.measurement.workbenches import Workbench

KERNELS = 512
WORD_BYTES = 4
TRANSFER_BYTES = 2**26
CUDA_ONLY = ("kernel_in_graph", "graph_launch", "copy_to_device", "copy_to_host")


def cases(target: Target) -> list[Case]:
    """Return the cases of launch overhead; seconds are per kernel, graph or copy."""
    wanted: list[tuple[str, int, Timing]] = [
        ("kernel", 1, "host"),
        ("kernel_in_graph", 1, "device"),
        ("kernel_and_wait", 1, "host"),
        ("graph_launch", 1, "host"),
        ("read_back", 1, "host"),
        ("copy_to_device", 1, "host"),
        ("copy_to_host", 1, "host"),
        ("copy_to_device", TRANSFER_BYTES // WORD_BYTES, "device"),
        ("copy_to_host", TRANSFER_BYTES // WORD_BYTES, "device"),
    ]
    return [
        _case(operation, elements, timing)
        for operation, elements, timing in wanted
        if target.device == "cuda" or operation not in CUDA_ONLY
    ]


def _case(operation: str, elements: int, timing: Timing) -> Case:
    moved = float(elements * WORD_BYTES) if operation.startswith("copy") else 0.0
    prepare = partial(_PREPARE[operation], elements=elements)
    named = {"elements": elements}
    held = float(elements * WORD_BYTES)
    return Case("launch", operation, "forward", "fp32", named, 0.0, moved, held, prepare, timing, rotates=False)


def _kernel(bench: Workbench, *, elements: int) -> Work:
    """Launch many kernels that do next to nothing; the host is what takes time."""
    word = bench.normal(elements, dtype="fp32")

    def launch() -> None:
        for _ in range(KERNELS):
            word.add_(1.0)

    return Work(launch, f"{KERNELS} x Tensor.add_", KERNELS)


def _kernel_in_graph(bench: Workbench, *, elements: int) -> Work:
    """Launch the same kernels; the clock puts them into a graph."""
    return _kernel(bench, elements=elements)


def _kernel_and_wait(bench: Workbench, *, elements: int) -> Work:
    """Launch one kernel and wait for it."""
    word = bench.normal(elements, dtype="fp32")

    def launch() -> None:
        word.add_(1.0)
        bench.wait()

    return Work(launch, "Tensor.add_, synchronize")


def _graph_launch(bench: Workbench, *, elements: int) -> Work:
    """Replay a graph of one kernel many times."""
    import torch

    word, graph = bench.normal(elements, dtype="fp32"), torch.cuda.CUDAGraph()
    bench.wait()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        word.add_(1.0)
    held = (graph, word)  # the graph writes to the word's address: freed, that memory would be another case's

    def launch() -> None:
        for _ in range(KERNELS):
            held[0].replay()

    return Work(launch, f"{KERNELS} x CUDAGraph.replay", KERNELS)


def _read_back(bench: Workbench, *, elements: int) -> Work:
    """Compute one number and read it on the host."""
    word = bench.normal(elements, dtype="fp32")
    return Work(lambda: word.add_(1.0).sum().item(), "Tensor.add_, sum, item")


def _copy(bench: Workbench, *, elements: int, to_device: bool) -> Work:
    """Copy between pinned memory of the host and the device: one word with an answer awaited, many without."""
    import torch

    there = bench.normal(elements, dtype="fp32")
    here = torch.randn(elements, pin_memory=True)
    source, goal = (here, there) if to_device else (there, here)
    is_transfer = elements > 1
    return Work(lambda: goal.copy_(source, non_blocking=is_transfer), "Tensor.copy_, pinned")


_PREPARE: dict[str, Callable[..., Work]] = {
    "kernel": _kernel,
    "kernel_in_graph": _kernel_in_graph,
    "kernel_and_wait": _kernel_and_wait,
    "graph_launch": _graph_launch,
    "read_back": _read_back,
    "copy_to_device": partial(_copy, to_device=True),
    "copy_to_host": partial(_copy, to_device=False),
}
