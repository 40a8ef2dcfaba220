"""Copy the facts that ``moesim validate published`` reads from the full table of published runs.

python scripts/carry_published_runs.py SOURCE.csv [TARGET.csv]

Rows of tier D (known bad) and rows measured by a tool rather than published (``aic_``) stay out.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

COLUMNS = (
    "id",
    "tier",
    "use",
    "scope",
    "source_group",
    "family",
    "model",
    "total_params_b",
    "n_layers",
    "d_model",
    "d_ff_expert",
    "d_ff_dense",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "attention",
    "n_experts",
    "top_k",
    "n_shared_experts",
    "d_ff_shared",
    "moe_layers",
    "vocab",
    "routing",
    "capacity_factor",
    "seq_len",
    "global_batch",
    "micro_batch",
    "tokens_per_step",
    "precision",
    "device",
    "n_devices",
    "devices_per_node",
    "interconnect",
    "tp",
    "pp",
    "vp",
    "cp",
    "ep",
    "etp",
    "zero_fsdp",
    "recompute",
    "optimizer",
    "other_opts",
    "framework",
    "date_or_version",
    "step_time_s",
    "tokens_per_s_per_device",
    "tflops_per_device",
    "mfu_pct",
    "other_metric_name",
    "other_metric_value",
    "peak_mem_gib_per_device",
    "check",
    "source",
    "note",
)
TARGET = Path(__file__).resolve().parent.parent / "validation" / "published" / "runs.csv"


def carry(source: Path, target: Path) -> int:
    """Write the rows and columns used; returns the number of rows."""
    with source.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["tier"] != "D" and not row["id"].startswith("aic_")]
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    destination = Path(sys.argv[2]) if len(sys.argv) == 3 else TARGET
    print(f"{carry(Path(sys.argv[1]), destination)} rows in {destination}")
