"""Orders of pipeline schedules by rule: what one stage runs, from the rounds that the papers draw."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 0, 1, 2, 3
"""Phases of a chunk: forward; backward with both gradients at once; or its two halves apart."""

StageOrder = list[tuple[int, int, int]]
Rounds = Iterable[tuple[int, str]]
"""(how often, operations): F0 is the forward of the stage's first chunk, B1 a joint backward of its second, I and W the
halves of a backward; W alone is the oldest weight gradient that is due; F0&B1 is a pair that runs as one."""

_PHASE = {"F": FORWARD, "B": BACKWARD, "I": INPUT_GRADIENT, "W": WEIGHT_GRADIENT}


def gpipe_order(micro_batches: int) -> StageOrder:
    """All forwards, then all backwards (arXiv:1811.06965)."""
    return [(phase, index, 0) for phase in (FORWARD, BACKWARD) for index in range(micro_batches)]


def one_f_one_b_order(stage: int, stages: int, virtual_stages: int, micro_batches: int) -> StageOrder:
    """Warm up, then one forward and one backward in turn.

    One chunk: stages - stage - 1 forwards of warm-up (PipeDream-Flush, arXiv:2006.09503). More: the same over chunks in
    groups of ``stages`` micro-batches (Megatron-LM, arXiv:2104.04473, section 2.2).
    """
    total = micro_batches * virtual_stages
    warm_up = stages - stage - 1
    if virtual_stages > 1:
        warm_up = 2 * warm_up + (virtual_stages - 1) * stages
    warm_up = min(warm_up, total)
    forwards = [(FORWARD, *_position(index, stages, virtual_stages, FORWARD)) for index in range(total)]
    backwards = [(BACKWARD, *_position(index, stages, virtual_stages, BACKWARD)) for index in range(total)]
    order: StageOrder = forwards[:warm_up]
    for index in range(warm_up, total):
        order += [forwards[index], backwards[index - warm_up]]
    return order + backwards[total - warm_up :]


def _position(index: int, stages: int, virtual_stages: int, phase: int) -> tuple[int, int]:
    """Micro-batch and chunk of the index-th forward or backward of a stage."""
    if virtual_stages == 1:
        return index, 0
    group, inside = divmod(index, stages * virtual_stages)
    chunk, offset = divmod(inside, stages)
    if phase == BACKWARD:
        chunk = virtual_stages - 1 - chunk
    return group * stages + offset, chunk


def zero_bubble_order(stage: int, stages: int, micro_batches: int, *, trips: int) -> StageOrder:
    """ZB-H1 (one trip) and ZB-H2 (two) of arXiv:2401.10241, section 2.

    1F1B whose weight gradients wait: stage s runs trips * (p - s - 1) forwards ahead, and each weight gradient
    trips * s input gradients late, so that all stages hold as much. H1 holds p micro-batches, H2 2p - 1; with forward,
    input and weight gradient of equal length, H1 idles (p - 1) of them and H2 only while it fills.
    """
    ahead, late = trips * (stages - stage - 1), trips * stage
    order: StageOrder = [(FORWARD, index, 0) for index in range(min(ahead, micro_batches))]
    for index in range(micro_batches):
        if index + ahead < micro_batches:
            order.append((FORWARD, index + ahead, 0))
        order.append((INPUT_GRADIENT, index, 0))
        if index >= late:
            order.append((WEIGHT_GRADIENT, index - late, 0))
    return order + [(WEIGHT_GRADIENT, index, 0) for index in range(max(micro_batches - late, 0), micro_batches)]


def zero_bubble_v_order(stage: int, stages: int, micro_batches: int) -> StageOrder:
    """ZB-V (arXiv:2401.10241, section 6): two chunks per stage in a V, memory of 1F1B.

    A step shorter than its warm-up is the order of 2p - 1 micro-batches without those there are not.
    """
    total, left = max(micro_batches, 2 * stages - 1), stages - stage
    rounds = [
        (2 * left - 1, "F0"),
        (stage, "F1 F0"),
        (left, "F1 I1 W1"),
        (total - stages - left + 1, "F0 I0 W0 F1 I1 W1"),
        (left - 1, "I0 W0 F1 I1 W1"),
        (stage, "I0 I1"),
        (left, "I0 W0"),
        (stage, "W1"),
        (stage, "W0"),
    ]
    return [entry for entry in order_of_rounds(rounds) if entry[1] < micro_batches]


def dual_pipe_order(stage: int, stages: int, micro_batches: int) -> StageOrder:
    """DualPipe (arXiv:2412.19437, section 3.2.1; github.com/deepseek-ai/DualPipe): micro-batches enter at both ends.

    The first half of a step's micro-batches go down the stages (chunk 0 of each), the second half up (chunk 1).

    Raises
    ------
    ValueError
        If stages or micro-batches are odd, or micro-batches fewer than twice the stages.
    """
    half, is_upper = micro_batches // 2, stage >= stages // 2
    order = order_of_rounds(dual_pipe_rounds(stage, stages, micro_batches))
    swapped = ((phase, index, chunk ^ is_upper) for phase, index, chunk in order)
    return [(phase, index + half * chunk, chunk) for phase, index, chunk in swapped]


def dual_pipe_rounds(stage: int, stages: int, micro_batches: int) -> Rounds:
    """Rounds of DualPipe; chunk 0 is of the direction that enters nearer. Raises as ``dual_pipe_order``."""
    if stages % 2 or micro_batches % 2 or micro_batches < 2 * stages:
        raise ValueError(
            f"dualpipe takes even stages ({stages}) and even micro-batches ({micro_batches}) >= 2 x stages"
        )
    return _dual_rounds(min(stage, stages - 1 - stage), stages // 2, micro_batches // 2)


def dual_pipe_v_rounds(stage: int, stages: int, micro_batches: int) -> Rounds:
    """DualPipeV, DualPipe cut in half (github.com/deepseek-ai/DualPipe): its lower half of stages, in a V.

    Raises
    ------
    ValueError
        If micro-batches are fewer than twice the stages.
    """
    if micro_batches < 2 * stages:
        raise ValueError(f"dualpipe_v takes micro-batches ({micro_batches}) >= 2 x stages ({stages})")
    return _dual_rounds(stage, stages, micro_batches)


def _dual_rounds(rank: int, ranks: int, micro_batches: int) -> Rounds:
    """DualPipe's eight steps on a rank, 0 the outermost; the innermost rank does not overlap its first pair."""
    inner = ranks - rank - 1
    steady = micro_batches - 2 * ranks + rank + 1
    drain = "B1 B0 " * (rank + 1)
    return [
        (2 * inner, "F0"),
        (rank + 1, "F0 F1"),
        (inner, "I1 W F1"),
        (1, "F0&B1 F1&B0" if inner else "F0 B1 F1&B0"),
        (steady - 1, "F0&B1 F1&B0"),
        (inner, "B1 F1&B0"),
        (1, drain[: 3 * (rank + 1)] + drain[3 * (rank + 1) :].replace("B", "I")),
        (inner, "W I0"),
        (rank + 1, "W"),
    ]


def pairs_of_rounds(rounds: Rounds) -> list[int]:
    """Places, in the order, of the forwards that run as one with the backward after them."""
    operations = " ".join(" ".join([text] * repeats) for repeats, text in rounds).replace("&", " & ").split()
    marks = [place for place, operation in enumerate(operations) if operation == "&"]
    return [place - 1 - index for index, place in enumerate(marks)]


def order_of_rounds(rounds: Rounds) -> StageOrder:
    """Write rounds out, micro-batches of each operation in turn."""
    following = dict.fromkeys((family + chunk for family in "FB" for chunk in "01"), 0)
    due: deque[tuple[int, int]] = deque()
    order: StageOrder = []
    for repeats, operations in rounds:
        for operation in operations.replace("&", " ").split() * repeats:
            if operation == "W":
                index, chunk = due.popleft()
            elif operation[0] == "W":
                index, chunk = next(entry for entry in due if entry[1] == int(operation[1]))
                due.remove((index, chunk))
            else:
                chunk, counter = int(operation[1]), operation.replace("I", "B")
                index = following[counter]
                following[counter] += 1
                if operation[0] == "I":
                    due.append((index, chunk))
            order.append((_PHASE[operation[0]], index, chunk))
    return order
