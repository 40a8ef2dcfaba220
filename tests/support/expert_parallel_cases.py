"""Layers and models that several processes run and one process checks; as a program, one of the processes.

``python -m expert_parallel_cases FOLDER PORTS`` with RANK and MASTER_ADDR set runs all cases among the first processes
of each size and writes ``SIZE_RANK.pt``, then lets ranks fail and writes ``failing_RANK.json``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from moesim.measurement.distributed.layer_shapes import ExpertLayerShape
from moesim.measurement.distributed.optional_back_ends import TORCH, BackEnds
from moesim.measurement.distributed.training_models import ModelShape
from moesim.measurement.suites.attentions import AttentionShape

SEED = 3
SIZES = (2, 4)
FAILING_SIZE = 2


@dataclass(frozen=True)
class LayerCase:
    name: str
    preset: str
    is_learned: bool = False
    dtype: str = "fp32"
    changes: dict = field(default_factory=dict)
    back_ends: BackEnds = TORCH

    @property
    def shape(self) -> ExpertLayerShape:
        sizes = {"tokens": 24, "hidden": 16, "inner": 24, "num_experts": 8, "experts_per_token": 2}
        return ExpertLayerShape(**sizes | self.changes)


SCARCE = {"capacity_factor": 1.0, "capacity_per": "assignment"}
MASKED = {"capacity_factor": 1.0, "dispatch": "one_hot_einsum"}
PROTOTYPES = {"router": "k_top_1", "is_gated": False}
LAYERS = (
    *(LayerCase(f"dropless {preset}", preset) for preset in ("W0", "W1", "W2", "W3", "W4", "W5")),
    *(LayerCase(f"dropping {preset}", preset, changes=SCARCE) for preset in ("W1", "W2", "W3", "W4", "W5")),
    LayerCase("almost all dropped", "W1", changes={"capacity_factor": 0.1}),
    LayerCase("dropped by group", "W3", changes={"capacity_factor": 1.0, "group_tokens": 8}),
    LayerCase("one choice, no gate", "W3", changes={"experts_per_token": 1, "is_gated": False}),
    LayerCase("prototypes", "W1", changes=PROTOTYPES),
    LayerCase("prototypes dropping", "W3", changes=PROTOTYPES | SCARCE),
    *(LayerCase(f"masks {preset}", preset, changes=MASKED) for preset in ("W1", "W3", "W5")),
    LayerCase("masks by group, no gate", "W2", changes=MASKED | {"group_tokens": 6, "is_gated": False}),
    LayerCase("masks prototypes", "W3", changes=MASKED | PROTOTYPES),
    LayerCase("learned", "W0", is_learned=True),
    LayerCase("learned dropping", "W0", is_learned=True, changes=SCARCE),
    LayerCase("learned prototypes", "W0", is_learned=True, changes=PROTOTYPES),
    LayerCase("learned masks", "W0", is_learned=True, changes=MASKED),
    LayerCase("in bf16", "W1", dtype="bf16"),
    LayerCase("masks in bf16", "W1", dtype="bf16", changes=MASKED),
    LayerCase("DeepEP's interface", "W2", back_ends=BackEnds(exchange="deepep")),
    LayerCase("DeepEP's interface, learned", "W0", is_learned=True, back_ends=BackEnds(exchange="deepep")),
    LayerCase("grouped-gemm's interface", "W5", back_ends=BackEnds(experts="grouped_gemm")),
)


@dataclass(frozen=True)
class ModelCase:
    name: str
    preset: str
    replicas: int = 1
    micro_batches: int = 1
    changes: dict = field(default_factory=dict)

    @property
    def shape(self) -> ModelShape:
        layer = LayerCase(self.name, self.preset, changes=self.changes).shape
        return ModelShape(AttentionShape(2, 12, 4, 2, 4), layer, 2, 32, self.micro_batches)


MODELS = (
    ModelCase("skewed", "W2"),
    ModelCase("replicas, micro-batches", "W3", replicas=2, micro_batches=2),
    ModelCase("masks and replicas", "W1", replicas=2, changes=MASKED),
)


def full_weights(shape: ExpertLayerShape) -> dict:
    """Weights of all experts, the same on every process."""
    import torch

    generator = torch.Generator().manual_seed(11)

    def normal(*sizes: int):
        return torch.randn(*sizes, generator=generator) * sizes[-1] ** -0.5

    experts = shape.num_experts
    return {
        "router": normal(experts, shape.hidden),
        "up": normal(experts, shape.up_columns, shape.hidden),
        "down": normal(experts, shape.hidden, shape.inner),
    }


def stand_in_for_libraries() -> None:
    """Let our code import packages that need a GPU; their interfaces are kept, their kernels are torch's."""
    import gloo_deep_buffer

    sys.modules["deep_ep"] = SimpleNamespace(Buffer=gloo_deep_buffer.GlooDeepBuffer)  # type: ignore[assignment]
    sys.modules["grouped_gemm.backend"] = SimpleNamespace(gmm=gloo_deep_buffer.grouped_product)  # type: ignore[assignment]


def run_layer_case(case: LayerCase, bench, ranks) -> dict:
    import torch

    from moesim.measurement.distributed.expert_layers import make_layer, run_layer
    from moesim.measurement.distributed.layer_shapes import drawn
    from moesim.measurement.suites.moe_layers import MoeWeights
    from moesim.measurement.workbenches import TORCH_NAMES

    dtype, shape = getattr(torch, TORCH_NAMES[case.dtype]), case.shape
    routed = drawn(case.preset, shape, num_ranks=ranks.expert_parallel, layer=0, seed=SEED)
    layer = make_layer(
        bench,
        shape,
        ranks,
        dtype=case.dtype,
        routed=None if case.is_learned else routed,
        seed=SEED,
        back_ends=case.back_ends,
    )
    full = full_weights(shape)
    local = {name: full[name].chunk(ranks.expert_parallel)[ranks.expert_rank].to(dtype) for name in ("up", "down")}
    sums = {name: torch.zeros(weight.shape) for name, weight in {**full, **local}.items()}
    weights = MoeWeights(full["router"], local["up"], local["down"], sums["router"], sums["up"], sums["down"])
    num_tokens = routed.tokens_of(ranks.expert_rank, shape.experts_per_token)
    tokens = bench.normal(num_tokens, shape.hidden, dtype=case.dtype).requires_grad_()
    grad = bench.normal(num_tokens, shape.hidden, dtype=case.dtype)
    out = run_layer(tokens, weights, layer)
    (tokens_grad,) = torch.autograd.grad(out, tokens, grad)
    return {"tokens": tokens.detach(), "grad": grad, "out": out.detach(), "tokens_grad": tokens_grad, **sums}


def run_model_case(case: ModelCase, bench, ranks) -> dict:
    from moesim.measurement.distributed.layer_shapes import drawn
    from moesim.measurement.distributed.training_models import make_model, run_passes

    shape = case.shape
    routed = [
        drawn(case.preset, shape.layer, num_ranks=ranks.expert_parallel, layer=layer, seed=SEED)
        for layer in range(shape.num_blocks)
    ]
    model = make_model(bench, shape, ranks, dtype="fp32", routed=routed, seed=SEED)
    weights = {name: weight.detach().clone() for name, weight in model.parameters.weights.items()}
    loss = run_passes(model)
    model.parameters.reduce_gradients(ranks)
    sums = {name: total.clone() for name, total in model.parameters.sums.items()}
    model.parameters.step()
    stepped = {name: weight.detach() for name, weight in model.parameters.weights.items()}
    return {"weights": weights, "sums": sums, "stepped": stepped, "loss": loss, "batches": model.batches}


def meet(size: int, port: str, launcher: dict[str, str]):
    """The first processes, all in one group."""
    from moesim.measurement.distributed.processes import open_ranks, read_launch

    os.environ["MASTER_PORT"], os.environ["WORLD_SIZE"] = port, str(size)
    launch = read_launch({**launcher, "MASTER_PORT": port, "WORLD_SIZE": str(size)})
    assert launch is not None
    return open_ranks(launch, "gloo", expert_parallel=None, timeout_s=60.0)


def run_cases(size: int, port: str, launcher: dict[str, str]) -> dict:
    """Run every case among the first processes."""
    from moesim.measurement.distributed.processes import close_ranks, form_groups
    from moesim.measurement.workbenches import open_workbench

    ranks = meet(size, port, launcher)
    bench = open_workbench("cpu", ranks.rank)
    found: dict = {"layers": {}, "models": {}}
    for case in LAYERS:
        found["layers"][case.name] = run_layer_case(case, bench, ranks)
    for case in MODELS:
        regrouped = form_groups(ranks, size // case.replicas)
        found["models"][case.name] = run_model_case(case, bench, regrouped)
    close_ranks(ranks)
    return found


def run_failing(port: str, launcher: dict[str, str], folder: Path) -> dict:
    """Let clocks differ and ranks fail; what happens is told by each."""
    import torch.distributed as dist

    from moesim.errors import MoesimError
    from moesim.measurement.cases import Case, Work
    from moesim.measurement.distributed import ranks as ranks_module
    from moesim.measurement.distributed.runs import _begun
    from moesim.measurement.distributed.together import measure_together
    from moesim.measurement.record_files import RecordFile
    from moesim.measurement.sessions import Deadline
    from moesim.measurement.workbenches import Workbench

    ranks = meet(FAILING_SIZE, port, launcher)
    ranks_module.FAILURE_TIMEOUT_S = 1.0
    bench = Workbench("cpu", 0, cache_bytes=1e3, memory_bytes=1e9)

    def case(name: str, call) -> Case:
        return Case("overlap", name, "forward", "fp32", {"m": 1}, 0.0, 0.0, 1e6, lambda _: Work(call, "python"))

    def fail(where: tuple[int, ...], reason: str) -> None:
        if ranks.rank in where:
            raise RuntimeError(reason)

    def measured(cases: list[Case], left_s: float, written: list) -> list[int]:
        deadline = Deadline(lambda: 0.0, left_s)
        rest = {"session": "s", "deadline": deadline, "report": lambda progress: None}
        progress = measure_together(cases, bench, ranks, written.append, **rest)
        return [progress.measured, progress.left]

    def fail_before_exchange() -> None:
        fail((1,), "only there")
        dist.barrier()

    found: dict = {}
    plain = [case(f"c{index}", lambda: None) for index in range(3)]
    found["clocks"] = measured(plain, 60.0 if ranks.is_first else 0.0, [])
    written: list = []
    sleep_s = 5e-3 * (1 + ranks.rank)
    mixed = [
        case("everywhere", lambda: fail((0, 1), "not here")),
        case("somewhere", lambda: fail((1,), "only there")),
        case("fine", lambda: time.sleep(sleep_s)),
    ]
    measured(mixed, 60.0, written)
    found["skips"] = written if ranks.is_first else []
    alien = folder / f"alien_{ranks.rank}.txt"  # of each rank: one must not empty it while another reads
    alien.write_text("not a record\n")
    try:
        _begun(ranks, lambda: (str(RecordFile(alien).recover()), []), [])
    except MoesimError as error:
        found["unreadable"] = str(error)
    written = []
    try:
        measured([case("exchange", fail_before_exchange), *plain], 60.0, written)
    except MoesimError as error:
        found["failure"] = {"error": str(error), "code": error.code, "written": written}
    return found


def main(folder: Path, ports: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    stand_in_for_libraries()
    launcher = dict(os.environ)
    rank = int(launcher["RANK"])
    for size, port in zip(SIZES, ports, strict=False):
        if rank < size:
            torch.save(run_cases(size, port, launcher), folder / f"{size}_{rank}.pt")
    if rank < FAILING_SIZE:
        told = run_failing(ports[-1], launcher, folder)
        (folder / f"failing_{rank}.json").write_text(json.dumps(told))
    os._exit(0)  # without waiting for the group that was left in failure


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
