"""Overlap that a run asks for: mechanisms with their dependencies, in place of the share a stack achieves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from moesim.describe.quantities import Description, Flag, PositiveNumber
from moesim.units import parse_quantity

ChunkCount = Annotated[int, Field(ge=1, le=64, strict=True)]
BucketBytes = Annotated[PositiveNumber, BeforeValidator(lambda value: parse_quantity(value, "bytes"))]


class Overlap(Description):
    """Mechanisms by which communication runs beside compute; what is off or null is as the stack achieves.

    ``shared_experts``: shared experts run during the all-to-all. ``expert_chunks``: routed rows are cut into so many
    chunks, one travelling while another is computed; ``auto`` takes the best. ``two_micro_batches``: each of two
    micro-batches computes while the other's rows travel; in training a forward beside a backward pass.
    ``gradient_bucket``: gradients are reduced in buckets of so many bytes during the last backward pass. ``prefetch``:
    parameters of a layer are gathered during the layer before (ZeRO-3).
    """

    shared_experts: Flag = False
    expert_chunks: ChunkCount | Literal["auto"] | None = None
    two_micro_batches: Flag = False
    gradient_bucket: BucketBytes | None = None
    prefetch: Flag = False

    @property
    def is_in_blocks(self) -> bool:
        """Whether MoE blocks run an overlap program."""
        return self.shared_experts or self.two_micro_batches or self.expert_chunks is not None
