"""Options of a stack that a run switches on or off: the same software, used differently."""

from __future__ import annotations

from moesim.describe.hardware import GraphedPart, Stack
from moesim.describe.quantities import Description, Flag


class StackOptions(Description):
    """Switches of the software; null leaves what the stack's profile says.

    ``cuda_graphs`` lists what is replayed instead of issued by the host. ``overlaps_expert_communication`` runs the
    all-to-all of one micro-batch beside the compute of another (Megatron-Core's
    ``overlap_moe_expert_parallel_comm``, DualPipe); the stack's profile says how much of it that hides.
    """

    cuda_graphs: list[GraphedPart] | None = None
    overlaps_expert_communication: Flag | None = None


def stack_with_options(stack: Stack, options: StackOptions) -> Stack:
    """The stack as a run uses it."""
    if options.cuda_graphs is not None:
        launch = stack.launch.model_copy(update={"cuda_graphs": list(options.cuda_graphs)})
        stack = stack.model_copy(update={"launch": launch})
    if options.overlaps_expert_communication is not None:
        hidden = stack.overlap.all_to_all_beside_compute if options.overlaps_expert_communication else 0.0
        overlap = stack.overlap.model_copy(update={"all_to_all": hidden})
        stack = stack.model_copy(update={"overlap": overlap})
    return stack
