"""Seconds the host needs to issue work: operations of the framework, launches, graphs replayed."""

from __future__ import annotations

import numpy as np

from moesim.describe.hardware import LaunchBehaviour
from moesim.structure.columns import BoolArray, FloatArray
from moesim.structure.host_operations import (
    KERNELS_PER_OPERATION,
    OPERATIONS_PER_PARAMETER_TENSOR,
    REPLAY_OPERATIONS,
    UPDATE_KERNELS,
    UPDATED_PER_KERNEL,
)
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
    operations, launches = _issued(work, launch)
    return operations * launch.operation_time.value + launches * launch.kernel_launch_time.value


def _issued(work: HostWork, launch: LaunchBehaviour) -> tuple[float, FloatArray | float]:
    """Operations of the framework, and launches of a loop over experts."""
    operations = sum(
        min(REPLAY_OPERATIONS, count) if part in launch.cuda_graphs else count
        for part, count in work.operations.items()
    )
    return operations, 0.0 if "experts" in launch.cuda_graphs else work.expert_launches


def gap_s(work: HostWork, kernels: float, launch: LaunchBehaviour) -> FloatArray | float:
    """What kernels of one pass over a table start later, issued one by one, than in a graph, however fast the host."""
    if replays_step(launch) or launch.kernel_gap is None:
        return 0.0
    if launch.operation_time is None:
        return kernels * launch.kernel_gap.value
    operations, launches = _issued(work, launch)
    return (operations * KERNELS_PER_OPERATION + launches) * launch.kernel_gap.value


def update_gap_s(parameters: FloatArray, launch: LaunchBehaviour) -> FloatArray | float:
    """As :func:`gap_s`, of the kernels that update parameters of one device."""
    if replays_step(launch) or launch.kernel_gap is None:
        return 0.0
    return UPDATE_KERNELS * parameters / UPDATED_PER_KERNEL * launch.kernel_gap.value


def queue_s(launch: LaunchBehaviour) -> float:
    """Host time of what the launch queue holds: as far as the host can be ahead of the device."""
    operation = launch.kernel_launch_time if launch.operation_time is None else launch.operation_time
    return launch.launch_queue * operation.value


def wait_s(host_s: FloatArray, device_s: FloatArray, lead_s: FloatArray | float = 0.0) -> FloatArray:
    """Time that the device waits in a stretch without a synchronisation.

    Parameters
    ----------
    host_s, device_s : ndarray
        What host and device need for it.
    lead_s : ndarray or float
        What the host is ahead at its beginning.

    Notes
    -----
    The device starts a kernel when it is issued and the one before is done. With operations spread evenly over the
    stretch it ends at max(device, host - lead) after its beginning.

    Examples
    --------
    >>> float(wait_s(np.array(5e-3), np.array(3e-3), 1.5e-3))
    0.0005
    """
    return np.maximum(np.asarray(host_s) - device_s - lead_s, 0.0)


def lead_s(
    host_s: FloatArray, device_s: FloatArray, launch: LaunchBehaviour, before_s: FloatArray | float = 0.0
) -> FloatArray:
    """How far the host is ahead at the end of a stretch, at most what the launch queue holds.

    Parameters
    ----------
    host_s, device_s : ndarray
        What host and device need for it.
    launch : LaunchBehaviour
        Of the stack.
    before_s : ndarray or float
        What the host was ahead at its beginning.
    """
    return np.clip(before_s + np.asarray(device_s) - host_s, 0.0, queue_s(launch))


def reads_counts(launch: LaunchBehaviour, ranks: FloatArray) -> BoolArray:
    """Whether the host waits for counts in each MoE layer's forward pass.

    Parameters
    ----------
    launch : LaunchBehaviour
        Of the stack.
    ranks : ndarray of shape (n_cases,)
        Ranks that share the experts: with one, no rows are exchanged.
    """
    if replays_step(launch) or not launch.host_synchronisations_per_moe_layer:
        return np.zeros(np.shape(ranks), dtype=bool)
    alone, together = "experts" in launch.synchronises, "exchange" in launch.synchronises
    return np.where(np.asarray(ranks) > 1, together or alone, alone)


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
