"""Files of measurements made of the model's own predictions, or of any times a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SESSION = {"record": "session", "schema_version": 1, "session": "s", "fingerprint": {"device_name": "a device"}}


def result(
    suite: str, operation: str, pass_name: str, shape: Mapping[str, Any], median_s: float = 1e-4, **keys: Any
) -> dict[str, Any]:
    """One result record with all its keys."""
    sizes = ",".join(f"{name}={value}" for name, value in shape.items())
    record = {
        "record": "result",
        "session": "s",
        "case": f"{suite}/{operation}/{pass_name}/bf16/{sizes}",
        "suite": suite,
        "operation": operation,
        "pass": pass_name,
        "dtype": "bf16",
        "shape": dict(shape),
        "flops": 0.0,
        "bytes": 0.0,
        "median_s": median_s,
        "iqr_s": 0.0,
        "samples": 5,
        "timed_by": "cuda_graph",
        "implementation": "torch",
    }
    return {**record, **keys}


def write_records(path: Path, records: Sequence[Mapping[str, Any]], *, end: str = "\n") -> Path:
    """Write a session and records, one JSON object per line."""
    path.write_text("\n".join(json.dumps(one) for one in [SESSION, *records]) + end, encoding="utf-8")
    return path
