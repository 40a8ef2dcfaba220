"""What is measured: collectives to fit on, collectives and training steps to judge, on which network, how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.structure.columns import FloatArray, IntArray
from moesim.structure.token_routing import draw
from validation.netlab.moe_steps import StepShape
from validation.netlab.topologies import LabTopology

Role = Literal["fit", "judge"]
HIDDEN = 256
EXPERTS_PER_TOKEN = 2
EXPERTS = 16
STEP = 3
SEED = 7
ROW_BYTES = 4 * HIDDEN
LATENCY_BYTES = 64
SPACING_S = 0.001
"""Between the calls of two ranks of an all-to-all: more than it takes one to post its messages."""


@dataclass(frozen=True)
class CollectiveCase:
    """One collective on one network.

    ``num_bytes`` as nccl-tests counts them; of an all-to-all-v the mean rank's. ``preset`` of a token matrix.
    """

    topology: LabTopology
    kind: str
    num_bytes: int
    role: Role
    preset: str = ""

    @property
    def name(self) -> str:
        """Kind, with the preset of an all-to-all-v."""
        return f"{self.kind}_v {self.preset}" if self.preset else self.kind

    @property
    def is_latency(self) -> bool:
        """Whether the bytes hardly count."""
        return self.num_bytes <= LATENCY_BYTES

    def pair_bytes(self) -> FloatArray | None:
        """Bytes of each pair of ranks, where the case is an all-to-all."""
        ranks = self.topology.ranks
        if self.kind != "all_to_all":
            return None
        if not self.preset:
            return np.full((ranks, ranks), self.num_bytes / ranks)
        tokens = token_matrix(self.preset, ranks, round(self.num_bytes / ROW_BYTES / EXPERTS_PER_TOKEN))
        return np.asarray(rows_of_pairs(tokens, ranks) * float(ROW_BYTES))


STEP_SHAPE = StepShape(layers=2, hidden=HIDDEN, intermediate=512, experts_per_token=EXPERTS_PER_TOKEN)
STEP_TOKENS = 128


@dataclass(frozen=True)
class StepCase:
    """Training steps of an MoE layer, expert parallel over all ranks, under a routing preset."""

    topology: LabTopology
    preset: str

    @property
    def name(self) -> str:
        """Words for the preset."""
        return f"train_step {self.preset}"

    def tokens(self) -> IntArray:
        """Assignments from each rank to each expert, (n_ranks, n_experts)."""
        return token_matrix(self.preset, self.topology.ranks, STEP_TOKENS)


def token_matrix(preset: str, ranks: int, tokens: int) -> IntArray:
    """Assignments from each rank to each expert, (ranks, experts), the simulator's own draw."""
    experts = EXPERTS if EXPERTS % ranks == 0 else ranks * (EXPERTS // ranks)
    return draw(preset, tokens, experts, EXPERTS_PER_TOKEN, ranks, STEP, 0, SEED)


def rows_of_pairs(tokens: IntArray, ranks: int) -> IntArray:
    """Rows from each rank to each rank, (ranks, ranks)."""
    return np.asarray(tokens.reshape(ranks, ranks, -1).sum(axis=2))


def arrivals(case: CollectiveCase, repeats: int) -> FloatArray:
    """When each rank calls in each repetition, (repeats, ranks): one after another in random order for an all-to-all.

    Collectives of rounds start together.
    """
    ranks = case.topology.ranks
    if case.kind != "all_to_all":
        return np.zeros((repeats, ranks))
    generator = np.random.default_rng([SEED, ranks])
    return np.stack([generator.permutation(ranks) * SPACING_S for _ in range(repeats)])


KIB = 1024


def lab_cases(rate: float) -> tuple[list[CollectiveCase], list[StepCase]]:
    """All cases at a link rate in bit/s."""
    flat_4, flat_8 = LabTopology("flat", 4, rate), LabTopology("flat", 8, rate)
    tree = LabTopology("tree", 8, rate, 4, oversubscription=2.0)
    pairs = LabTopology("nodes", 8, rate, 2, inside_rate=2 * rate)
    fours = LabTopology("nodes", 8, rate, 4, inside_rate=2 * rate)
    ring = LabTopology("ring", 5, rate)
    fit = [
        CollectiveCase(flat_4, kind, round(size * KIB), "fit")
        for kind, sizes in (
            ("all_to_all", (256, 1024, 2048)),
            ("all_reduce", (256, 1024, 2048)),
            ("all_gather", (256, 1024, 2048)),
            ("point_to_point", (LATENCY_BYTES / KIB, 1024)),
        )
        for size in sizes
    ]
    judged = [
        CollectiveCase(topology, kind, size * KIB // topology.ranks // 4 * topology.ranks * 4, "judge")
        for topology in (flat_8, tree, pairs, fours, ring)
        for kind, sizes in (("all_to_all", (512, 2048)), ("all_reduce", (1024,)), ("all_gather", (1024,)))
        for size in sizes
    ]
    judged += [CollectiveCase(flat_4, "reduce_scatter", 1024 * KIB, "judge")]
    judged += [
        CollectiveCase(topology, "all_to_all", 1024 * KIB, "judge", preset)
        for topology, presets in (
            (flat_4, ("W1", "W2", "W3")),
            (flat_8, ("W0", "W1", "W2", "W3", "W4", "W5", "W6", "W7")),
            (tree, ("W1", "W2", "W3")),
            (pairs, ("W2", "W3")),
            (fours, ("W2", "W3")),
            (ring, ("W2", "W3")),
        )
        for preset in presets
    ]
    steps = [StepCase(topology, preset) for topology in (flat_4, flat_8, tree, pairs) for preset in ("W0", "W2")]
    return [*fit, *judged], steps


def short_cases(rate: float) -> tuple[list[CollectiveCase], list[StepCase]]:
    """A few of each: a test that takes half a minute."""
    flat, tree = LabTopology("flat", 4, rate), LabTopology("tree", 4, rate, 2, oversubscription=2.0)
    fit = [
        CollectiveCase(flat, kind, round(size * KIB), "fit")
        for kind, sizes in (
            ("all_to_all", (256, 512)),
            ("all_reduce", (256, 512)),
            ("all_gather", (256,)),
            ("point_to_point", (LATENCY_BYTES / KIB, 512)),
        )
        for size in sizes
    ]
    judged = [
        CollectiveCase(tree, "all_to_all", 512 * KIB, "judge"),
        CollectiveCase(tree, "all_reduce", 512 * KIB, "judge"),
        CollectiveCase(flat, "all_to_all", 512 * KIB, "judge", "W3"),
    ]
    return [*fit, *judged], [StepCase(tree, "W0")]
