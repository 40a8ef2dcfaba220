"""What was measured on: the machine and its software, without names of hosts or people."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from moesim.measurement.cases import DeviceKind
from moesim.measurement.record_files import Json, Record

SMI_TIMEOUT_S = 20.0
SMI_FIELDS = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "max_sm_clock_mhz",
    "clocks.max.mem": "max_memory_clock_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "pstate": "performance_state",
    "ecc.mode.current": "error_correction",
}


def fingerprint(device: DeviceKind, seed: int) -> Record:
    """Describe what times depend on: device, driver, versions, seed.

    Parameters
    ----------
    device : str
        The device that is measured.
    seed : int
        Of inputs and routing.
    """
    import numpy as np
    import torch

    return {
        "moesim_version": import_module("moesim").__version__,  # an import statement would claim what it may load
        "torch_version": torch.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cuda_version": torch.version.cuda,
        "rocm_version": torch.version.hip,
        "cudnn_version": torch.backends.cudnn.version(),
        "seed": seed,
        **(_gpu() if device == "cuda" else _cpu()),
    }


def session_name(identity: Record) -> str:
    """Return twelve hexadecimal digits that two runs share if and only if their fingerprints are equal.

    Examples
    --------
    >>> session_name({"a": 1, "b": 2}) == session_name({"b": 2, "a": 1}) != session_name({"a": 1, "b": 3})
    True
    """
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def conditions(device: DeviceKind) -> Record:
    """Read clocks, power and temperature, which change by themselves; empty where nothing tells them."""
    if device != "cuda":
        return {}
    import torch

    values = _nvidia_smi(list(SMI_FIELDS), _uuid(torch.cuda.get_device_properties(torch.cuda.current_device())))
    return {name: _number(value) for name, value in zip(SMI_FIELDS.values(), values, strict=False)}


def _gpu() -> Record:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _nvidia_smi(["driver_version"], _uuid(properties))
    return {
        "device": "cuda",
        "device_name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cache_bytes": getattr(properties, "L2_cache_size", None),
        "driver_version": driver[0] if driver else None,
        "allows_tf32": torch.backends.cuda.matmul.allow_tf32,
        "allows_bf16_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    }


def _cpu() -> Record:
    import torch

    return {
        "device": "cpu",
        "device_name": _cpu_name(),
        "multiprocessors": torch.get_num_threads(),
        "memory_bytes": None,
        "driver_version": None,
    }


def _cpu_name(file: Path = Path("/proc/cpuinfo")) -> str:
    try:
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _uuid(properties: object) -> str:
    """Name of the device as ``nvidia-smi`` takes it; torch counts only the devices that it may see."""
    uuid = getattr(properties, "uuid", None)
    return f"GPU-{uuid}" if uuid else "0"


def _nvidia_smi(fields: list[str], device: str) -> list[str]:
    """Ask ``nvidia-smi``; empty where it is missing, hangs or refuses."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", device]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = answer.stdout.strip().splitlines()
    return [value.strip() for value in lines[0].split(",")] if lines else []


def _number(text: str) -> Json:
    """Return a number where the text is one, None where the device does not say.

    Examples
    --------
    >>> _number("1980"), _number("P0"), _number("[N/A]")
    (1980.0, 'P0', None)
    """
    try:
        return float(text)
    except ValueError:
        return None if text.startswith("[") else text


def program_arguments() -> list[Json]:
    """Return the arguments of this process, of whole paths the names alone: records are passed on."""
    return [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
