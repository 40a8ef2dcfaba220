"""How many operations of the framework the host issues for a part of a layer.

An operation is one call that goes through the framework's dispatcher: a kernel, a copy, a cast, a view, a collective;
a module with its own Python (a fused linear layer, an attention back end) counts as the several calls that its checks
cost. Counts are by hand, from memory of Megatron-Core's transformer layer, router and token dispatchers, within about
30 %; the time per operation is fitted with these very counts, so an error common to all parts cancels.

The backward pass of autograd visits one node for each of them: as many again.
"""

from __future__ import annotations

from moesim.describe.hardware import Stack
from moesim.describe.model import LatentAttention, MixtureOfExperts, Model
from moesim.structure.columns import FloatArray
from moesim.structure.step_graph import HostPart, HostWork

ATTENTION_OPERATIONS = 45.0
"""Norm and fused projection 10, split and reshape 6, rotary embedding 6, core and back-end checks 13, output 10."""
LATENT_ATTENTION_OPERATIONS = 75.0
"""As above with two down and two up projections, their norms, splits and the joining of both parts of a key."""
DENSE_FFN_OPERATIONS = 24.0
"""Two linear layers of 10 and an activation of 4."""
NORM_RESIDUAL_OPERATIONS = 3.0
"""Bias, dropout and residual of one block, fused."""
UNFUSED_OPERATIONS = 8.0
"""Per block where bias, dropout, residual, mask and scale are kernels of their own."""
ROUTER_OPERATIONS = 40.0
"""Casts, GEMM, softmax, top-k, scatter 15; auxiliary loss 15; counts, their exchange and copies to the host 10."""
ONE_HOT_OPERATIONS_PER_CHOICE = 12.0
"""Argmax, one-hot, mask, cumulative sum and capacity test of each choice of a one-hot router."""
DISPATCH_OPERATIONS: dict[str, float] = {"permute": 40.0, "fused": 16.0, "one_hot_einsum": 24.0}
"""Permute, exchange, sort by expert, and back: each an autograd function with preparations; or one fused kernel."""
EXPERT_OPERATIONS = 24.0
"""Two grouped linear layers of 10 and an activation of 4."""
EMBEDDING_OPERATIONS = 30.0
"""Batch, positions, masks, look-up, hand-over between stages."""
HEAD_OPERATIONS = 40.0
"""Final norm, projection, cross-entropy in fp32, reduction of the loss."""
TOKEN_PREDICTION_OPERATIONS = 20.0
OPERATIONS_PER_PARAMETER_TENSOR = 6.0
"""Per step: gradient copied to fp32, its norm, scaled, updated, copied back, zeroed."""
KERNELS_PER_OPERATION = 0.29
"""Of plain PyTorch: about 32 kernels forward and 60 backward in a block, by hand, for 322 operations as here."""
UPDATE_KERNELS, UPDATED_PER_KERNEL = 2.0, 320 * 65536.0
"""Fused update and copy to lower precision; parameters that one kernel of torch's over many tensors takes."""
REPLAY_OPERATIONS = 4.0
"""Start of one captured graph and copies into its inputs."""

EXCHANGES_PER_PASS = 2.0
"""Rows to the experts and back."""
FORWARD_EXPERT_GEMMS, BACKWARD_EXPERT_GEMMS = 2.0, 4.0
FORWARD_EXPERT_CASTS, BACKWARD_EXPERT_CASTS = 6.0, 10.0
"""Quantised experts: rows cast for each GEMM (backward in two layouts), scales rearranged for each operand."""


def dense_part_host(stack: Stack, model: Model, *, blocks: float, has_dense_ffn: bool) -> HostWork:
    """Operations of one pass over ``blocks`` attention blocks, their norms and a dense feed-forward network."""
    extra = NORM_RESIDUAL_OPERATIONS + (0.0 if stack.fuses_elementwise else UNFUSED_OPERATIONS)
    is_latent = isinstance(model.attention, LatentAttention)
    attention = LATENT_ATTENTION_OPERATIONS if is_latent else ATTENTION_OPERATIONS
    operations: dict[HostPart, float] = {"attention": blocks * (attention + extra)}
    if has_dense_ffn:
        operations["dense_ffn"] = DENSE_FFN_OPERATIONS + extra
    return HostWork(operations)


def moe_part_host(
    stack: Stack, moe: MixtureOfExperts, local_experts: FloatArray, *, is_quantised: bool, is_backward: bool
) -> HostWork:
    """Operations of one pass over a MoE block, and launches of its local experts."""
    router = ROUTER_OPERATIONS
    if stack.dispatch == "one_hot_einsum":
        router += ONE_HOT_OPERATIONS_PER_CHOICE * moe.router.experts_per_token
    experts = DISPATCH_OPERATIONS[stack.dispatch] + EXPERT_OPERATIONS
    if moe.shared_experts:
        experts += DENSE_FFN_OPERATIONS
    launches = 0.0
    if stack.launch.loops_over_experts:
        launches = BACKWARD_EXPERT_GEMMS if is_backward else FORWARD_EXPERT_GEMMS
        if is_quantised:
            launches += BACKWARD_EXPERT_CASTS if is_backward else FORWARD_EXPERT_CASTS
    messages = 0.0 if stack.launch.expert_message_time is None else EXCHANGES_PER_PASS * moe.num_experts
    return HostWork({"router": router, "experts": experts}, local_experts * launches, messages)
