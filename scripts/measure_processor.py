"""Time a range of shapes on this machine's processor: the single-GPU suite with sizes that say something about one.

python scripts/measure_processor.py --budget 5min --out results.jsonl
"""

from __future__ import annotations

import sys

from moesim.measurement import main
from moesim.measurement.suites import dispatches, gemms, grouped_gemms, memory_bound, moe_layers, routers
from moesim.measurement.suites.dispatches import PermuteShape
from moesim.measurement.suites.grouped_gemms import ExpertShape
from moesim.measurement.suites.moe_layers import MoeShape
from moesim.measurement.suites.routers import RouterShape

SUITES = "memory_bound,gemm,dispatch,router,grouped_gemm,moe_layer"
WEIGHTS = ((256, 256), (512, 256), (1024, 512), (512, 1024), (768, 768), (320, 960), (1536, 512))
TOKENS = (64, 128, 256, 512, 1024)
LAYERS = (
    MoeShape(512, 256, 512, 8, 2),
    MoeShape(256, 512, 384, 16, 2),
    MoeShape(1024, 128, 512, 8, 1),
    MoeShape(256, 256, 768, 4, 2),
    MoeShape(512, 384, 256, 16, 4),
    MoeShape(128, 512, 1024, 8, 1),
)


def use_a_range_of_shapes() -> None:
    """Put the shapes of this file in the place of the few small ones the suite tries itself with."""
    gemms.CPU_SHAPES = tuple((tokens, n, k) for tokens in TOKENS for n, k in WEIGHTS)
    memory_bound.CPU_SHAPES = ((2048, 512), (1024, 256), (8192, 512), (4096, 1024), (16384, 1024))
    dispatches.CPU_PERMUTE_SHAPES = (
        PermuteShape(512, 256, 8, 2),
        PermuteShape(2048, 512, 16, 2),
        PermuteShape(1024, 384, 16, 4),
        PermuteShape(4096, 512, 8, 1),
    )
    dispatches.CPU_ONE_HOT_SHAPES = ()
    routers.CPU_SHAPES = (
        RouterShape(512, 256, 8, 2, "top_k"),
        RouterShape(256, 512, 16, 2, "top_k"),
        RouterShape(1024, 384, 16, 4, "top_k"),
    )
    grouped_gemms.CPU_SHAPES = (ExpertShape(8, 1, 2, 256, 512), ExpertShape(16, 1, 2, 512, 384))
    grouped_gemms.CPU_TOKENS = 512
    moe_layers.CPU_SHAPES = LAYERS


if __name__ == "__main__":
    use_a_range_of_shapes()
    sys.exit(main(["single_gpu", "--device", "cpu", "--suites", SUITES, *sys.argv[1:]]))
