"""Seconds the host needs to issue work: operations of the framework, launches, graphs replayed."""

from __future__ import annotations

from moesim.describe.hardware import LaunchBehaviour
from moesim.structure.columns import FloatArray
from moesim.structure.host_operations import OPERATIONS_PER_PARAMETER_TENSOR, REPLAY_OPERATIONS
from moesim.structure.step_graph import HostWork


def replays_step(launch: LaunchBehaviour) -> bool:
    """Whether forward and backward of a step are one graph or one compiled program: the host issues nothing."""
    return "step" in launch.cuda_graphs


def host_time_s(work: HostWork, kernels: float, launch: LaunchBehaviour) -> FloatArray | float:
    """Host time of one pass over a table.

    Operations times their cost, where a captured part costs one replay, plus launches of a loop over experts; without
    a framework, a launch per kernel. The device may work meanwhile: what a step loses is what the host is slower.
    """
    if replays_step(launch):
        return 0.0
    if launch.operation_time is None:
        return kernels * launch.kernel_launch_time.value
    operations = sum(
        min(REPLAY_OPERATIONS, count) if part in launch.cuda_graphs else count
        for part, count in work.operations.items()
    )
    launches = 0.0 if "experts" in launch.cuda_graphs else work.expert_launches
    return operations * launch.operation_time.value + launches * launch.kernel_launch_time.value


def expert_messages_s(work: HostWork, launch: LaunchBehaviour) -> float:
    """Time of messages sent one by one between a rank and single experts; the exchange waits for all of them.

    A rank sends to each of E / EP experts on each of EP ranks: E messages per exchange, however experts are placed.
    """
    return 0.0 if launch.expert_message_time is None else work.expert_messages * launch.expert_message_time.value


def host_step_time_s(parameter_tensors: FloatArray, launch: LaunchBehaviour) -> FloatArray:
    """Host time once per step: the loop around it, and the optimizer's operations for each parameter tensor."""
    step = launch.step_time.value if launch.step_time is not None else 0.0
    operation = launch.operation_time.value if launch.operation_time is not None else 0.0
    known = launch.parameter_tensor_operations
    per_tensor = OPERATIONS_PER_PARAMETER_TENSOR if known is None else known
    return step + parameter_tensors * (per_tensor * operation)
