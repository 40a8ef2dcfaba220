"""What the network lab predicts, without any network."""

import doctest
import threading

import numpy as np
import pytest

from moesim.describe.hardware import Cluster
from validation.netlab import gloo_plans, step_predictions
from validation.netlab.cases import CollectiveCase, arrivals, lab_cases, rows_of_pairs, token_matrix
from validation.netlab.fits import fit_library, predicted_s
from validation.netlab.gloo_plans import PREAMBLE_BYTES, exchange_times, plan_wire_s
from validation.netlab.measurements import MeasuredCollective
from validation.netlab.predictions import LibraryConstants, Predictor
from validation.netlab.step_predictions import predicted_step, shared_cores
from validation.netlab.topologies import LabTopology, cluster_document

RATE = 80e6  # ten bytes a microsecond
PLANTED = LibraryConstants(3e-4, 1e-4, 4e-4, 2e-4, 0.95, 0.93, 0.96)
EXACT = LibraryConstants(1e-6, 1e-6, 1e-6, 1e-6, 1.0, 1.0, 1.0)


def network(topology: LabTopology, constants: LibraryConstants = EXACT):
    return Predictor(constants=constants).network(topology)


@pytest.mark.parametrize("module", [gloo_plans, step_predictions])
def test_examples_are_true(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 7, 8])
def test_an_all_to_all_takes_n_minus_1_and_half_n_messages_in_any_order_of_arrival(ranks):
    wires = network(LabTopology("flat", ranks, RATE)).topology
    generator = np.random.default_rng(ranks)
    pair_bytes = np.full((ranks, ranks), 1e6 - PREAMBLE_BYTES)
    for _ in range(5):
        arrival_s = 1e-9 * generator.permutation(ranks)
        times = exchange_times(wires, [pair_bytes], [arrival_s], {})
        assert times.max() == pytest.approx(0.1 * (ranks - 1 + ranks // 2), rel=1e-6)


def test_ranks_that_call_at_once_exchange_both_ways_at_once():
    wires = network(LabTopology("flat", 6, RATE)).topology
    pair_bytes = np.full((6, 6), 1e6 - PREAMBLE_BYTES)
    times = exchange_times(wires, [pair_bytes], [1e-6 * np.arange(6)], {}, notice_s=1e-3)
    assert times.max() == pytest.approx(0.5, rel=1e-4)


def test_bytes_never_leave_before_their_rank_calls():
    wires = network(LabTopology("flat", 4, RATE)).topology
    hot = np.zeros((4, 4))
    hot[1:, 0] = 1e6
    arrival_s = np.array([7.0, 5.0, 5.001, 5.002])
    times = exchange_times(wires, [hot], [arrival_s], {})
    assert times.max() == pytest.approx(7.3, rel=1e-4)
    assert (times >= arrival_s).all()


def test_exchanges_that_overlap_share_the_wires():
    wires = network(LabTopology("flat", 4, RATE)).topology
    one_way = np.zeros((4, 4))
    one_way[0, 1] = 1e6
    both = exchange_times(wires, [one_way, one_way], [np.zeros(4), np.zeros(4)], {})
    assert both.max() == pytest.approx(0.2, rel=1e-3)
    assert both[:, 2:].max() < 0.001  # others are through at once


def test_an_oversubscribed_uplink_is_what_an_all_to_all_waits_for():
    even = network(LabTopology("tree", 8, RATE, 4, oversubscription=1.0)).topology
    scarce = network(LabTopology("tree", 8, RATE, 4, oversubscription=4.0)).topology
    pair_bytes = np.full((8, 8), 1e6)
    arrival_s = 1e-6 * np.arange(8)
    fast, slow = (exchange_times(wires, [pair_bytes], [arrival_s], {}).max() for wires in (even, scarce))
    assert fast == pytest.approx(1.1, rel=1e-3)
    assert slow >= 4 * 4 * 1e6 / 10e6  # four hosts send four others a megabyte each through one link


def test_a_ring_of_links_carries_gloos_ring_at_full_rate():
    wires = network(LabTopology("ring", 5, RATE)).topology
    assert plan_wire_s(wires, "all_reduce", 5e6, {}) == pytest.approx(8 * 0.1, rel=1e-9)


def test_a_reduce_scatter_is_a_whole_all_reduce():
    wires = network(LabTopology("flat", 4, RATE)).topology
    times = [plan_wire_s(wires, kind, 4e6, {}) for kind in ("reduce_scatter", "all_reduce", "all_gather")]
    assert times[0] == times[1] == pytest.approx(2 * times[2])


def test_a_fit_gives_back_planted_constants_under_noise_and_an_outlier():
    cases, _ = lab_cases(RATE)
    predictor, generator = Predictor(constants=PLANTED), np.random.default_rng(3)
    measured = []
    for case in (case for case in cases if case.role == "fit"):
        arrival_s = arrivals(case, 3)
        exact = predicted_s(predictor, MeasuredCollective(case, np.ones(1), arrival_s))
        noisy = exact * (1 + 0.002 * generator.standard_normal(21))
        noisy[::20] *= 5.0  # repetitions that something else delayed
        if (case.kind, case.num_bytes) == ("all_gather", 256 * 1024):
            noisy *= 1.3  # and a whole case
        measured.append(MeasuredCollective(case, noisy, arrival_s))
    found = fit_library(measured).constants
    assert found.reduce_fraction == pytest.approx(PLANTED.reduce_fraction, rel=0.01)
    assert found.message_fraction == pytest.approx(PLANTED.message_fraction, rel=0.01)
    assert found.exchange_fraction == pytest.approx(PLANTED.exchange_fraction, rel=0.01)
    assert found.message_s == pytest.approx(PLANTED.message_s, rel=0.05)
    assert found.round_s == pytest.approx(PLANTED.round_s, rel=0.4)


def test_shipped_profiles_answer_as_the_constants_they_were_written_from():
    shipped = Predictor().network(LabTopology("flat", 4, RATE))
    assert 0.9 < shipped.link_fractions("all_reduce")["scale_out"] <= 1.0
    assert shipped.collective_s("all_reduce", 4e6) > plan_wire_s(shipped.topology, "all_reduce", 4e6, {})


def test_every_emulated_network_is_a_cluster_of_moesim():
    cases, steps = lab_cases(RATE)
    for topology in {case.topology for case in cases} | {case.topology for case in steps}:
        cluster = Cluster.model_validate(cluster_document(topology))
        assert cluster.device_count == topology.ranks == network(topology).topology.num_devices


def test_skewed_matrices_are_the_simulators_own():
    case = CollectiveCase(LabTopology("flat", 8, RATE), "all_to_all", 1 << 20, "judge", "W2")
    pair_bytes = case.pair_bytes()
    assert pair_bytes.sum(axis=1) == pytest.approx(1 << 20)
    assert pair_bytes.sum(axis=0)[0] == pytest.approx(4 * (1 << 20), rel=0.1)


def test_threads_that_need_more_than_a_slice_take_turns():
    end = shared_cores(np.zeros(2), np.array([0.010, 0.004]), 1)
    assert end.tolist() == pytest.approx([0.014, 0.008])


def test_a_step_is_its_compute_and_its_messages():
    from validation.netlab.moe_steps import StepShape

    shape, tokens = StepShape(1, 256, 512, 2), token_matrix("W0", 4, 128)
    flat = network(LabTopology("flat", 4, RATE))
    compute_s = np.full((4, 6), 0.020)
    step = predicted_step(flat, tokens, shape, compute_s, 4)
    exchange_s = 64 * 1024 / 10e6 * 5
    reduction_s = flat.collective_s("all_reduce", 256 * (256 + 16) * 4)
    assert step.seconds == pytest.approx(6 * 0.020 + 4 * exchange_s + reduction_s, rel=0.05)
    hot = token_matrix("W2", 8, 128)
    pairs = network(LabTopology("nodes", 8, RATE, 2, inside_rate=2 * RATE))
    rows = rows_of_pairs(hot, 8)
    least_s = 4 * rows[2:, :2].sum() * 1024 / 10e6  # into the hot node's one link, again and again
    assert predicted_step(pairs, hot, shape, np.zeros((8, 6)), 8).seconds > least_s
    busy = predicted_step(flat, tokens, shape, compute_s, 2)
    assert busy.seconds > step.seconds + 5 * 0.020


class Swap:
    """Communication between threads of one process: everyone leaves rows, everyone takes theirs."""

    def __init__(self, rank, shared):
        self.rank, self.shared = rank, shared

    def _gathered(self, values):
        self.shared["values"][self.rank] = values
        self.shared["barrier"].wait(20)
        everyone = list(self.shared["values"])
        self.shared["barrier"].wait(20)
        return everyone

    def exchange(self, rows, sends, receives):
        import torch

        return torch.cat([parts[self.rank] for parts in self._gathered(rows.split(list(sends)))])

    def all_reduce(self, values):
        return sum(self._gathered(values))


def test_the_measured_step_computes_what_its_experts_would_alone():
    torch = pytest.importorskip("torch")
    from validation.netlab.moe_steps import MoeStep, StepShape

    shape, tokens = StepShape(1, 8, 16, 2), token_matrix("W3", 4, 12)
    steps = [MoeStep(rank, tokens, shape) for rank in range(4)]
    assert rows_of_pairs(tokens, 4).sum() == 4 * 24
    expected = [_reference_loss(torch, step, steps) for step in steps]
    for step in steps:  # the references' gradients are not those of the step
        for parameter in [*step.shared[0], *(one for pair in step.experts[0] for one in pair)]:
            parameter.grad = None
    shared, found = {"values": [None] * 4, "barrier": threading.Barrier(4)}, [0.0] * 4

    def run(rank):
        found[rank] = steps[rank](Swap(rank, shared))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == pytest.approx(expected, rel=1e-5)
    assert torch.equal(steps[0].shared[0][0], steps[3].shared[0][0])  # updated alike


def _reference_loss(torch, step, steps):
    """Token by token, expert by expert, without any exchange."""
    dense, router = step.shared[0]
    hidden = step.inputs + torch.nn.functional.gelu(step.inputs @ dense)
    weight = (hidden @ router).softmax(dim=1)
    outputs = torch.zeros_like(hidden)
    for token, chosen in enumerate(step.chosen.tolist()):
        for expert in chosen:
            up, down = steps[expert // step.local_experts].experts[0][expert % step.local_experts]
            row = torch.nn.functional.gelu(hidden[token : token + 1] @ up) @ down
            outputs[token] = outputs[token] + weight[token, expert] * row[0]
    return float((hidden + outputs).square().mean().detach())
