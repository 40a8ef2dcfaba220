"""The machine under measurement: where tensors live, what fills them, and how many sets of them leave the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.measurement.cases import DeviceKind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

CACHES_ROTATED = 2.0
"""Inputs cover this many caches, so that under any replacement a set has left when its turn comes again."""
MAX_SETS = {"cuda": 256, "cpu": 4}
MEMORY_FRACTION = 0.8
CPU_MEMORY_BYTES = 2.0 * 2**30
ASSUMED_CACHE_BYTES = {"cuda": 128.0 * 2**20, "cpu": 32.0 * 2**20}
POOL_ELEMENTS = {"cuda": 16_000_057, "cpu": 1_000_003}
"""Primes: no row length divides them, so that equal rows do not recur."""
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(slots=True)
class Workbench:
    """A device and a source of random values.

    Parameters
    ----------
    device : str
        ``cuda`` (also AMD's) or ``cpu``.
    seed : int
        Of the random values.
    cache_bytes : float
        The last cache before memory.
    memory_bytes : float
        What cases may use.
    """

    device: DeviceKind
    seed: int
    cache_bytes: float
    memory_bytes: float
    _pool: Tensor = field(default=None, repr=False)
    _next: int = field(default=0, repr=False)

    @property
    def is_cuda(self) -> bool:
        """Whether work is asynchronous and timed by events."""
        return self.device == "cuda"

    def num_sets(self, working_set_bytes: float, num_sharing: int = 1) -> int:
        """Number of input sets that exceed the cache, as far as memory allows.

        Parameters
        ----------
        working_set_bytes : float
            Memory of one set.
        num_sharing : int
            Cases that hold their sets at the same time.

        Examples
        --------
        >>> bench = Workbench("cuda", 0, cache_bytes=60e6, memory_bytes=100e9)
        >>> bench.num_sets(50e6), bench.num_sets(1e9), bench.num_sets(1e3)
        (3, 1, 256)
        """
        wanted = math.ceil(CACHES_ROTATED * self.cache_bytes / max(working_set_bytes, 1.0))
        affordable = int(self.memory_bytes / num_sharing / max(working_set_bytes, 1.0))
        return max(1, min(wanted, affordable, MAX_SETS[self.device]))

    def empty(self, *sizes: int, dtype: str) -> Tensor:
        """Return an output to be written, filled with NaN so that what is not written shows."""
        import torch

        return torch.full(sizes, math.nan, dtype=getattr(torch, TORCH_NAMES[dtype]), device=self.device)

    def normal(self, *sizes: int, dtype: str, scale: float = 1.0) -> Tensor:
        """Return normal random values of a standard deviation; never zeros, which some devices multiply faster."""
        import torch

        if self._pool is None:
            generator = torch.Generator(device=self.device).manual_seed(self.seed)
            self._pool = torch.randn(POOL_ELEMENTS[self.device], generator=generator, device=self.device)
        values = torch.empty(sizes, dtype=getattr(torch, TORCH_NAMES[dtype]), device=self.device)
        flat, written = values.view(-1), 0
        while written < flat.numel():
            taken = min(flat.numel() - written, self._pool.numel() - self._next)
            flat[written : written + taken].copy_(self._pool[self._next : self._next + taken])
            written += taken
            self._next = (self._next + taken) % self._pool.numel()
        return values if scale == 1.0 else values.mul_(scale)

    def weight(self, *sizes: int, dtype: str) -> Tensor:
        """Return a weight whose products have the size of their inputs: deviation 1 over the root of the last size."""
        return self.normal(*sizes, dtype=dtype, scale=sizes[-1] ** -0.5)

    def integers(self, values: npt.NDArray[np.int64] | Sequence[int], *, bits: int = 64) -> Tensor:
        """Copy integers to the device."""
        import numpy as np
        import torch

        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.device, getattr(torch, f"int{bits}"))

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        if self.is_cuda:
            import torch

            torch.cuda.synchronize()

    def release(self) -> None:
        """Give memory that no tensor holds back to the device, so that the next cases find it in one piece."""
        if self.is_cuda:
            import torch

            torch.cuda.empty_cache()


def open_workbench(device: DeviceKind, seed: int) -> Workbench:
    """Read cache and free memory of a device.

    Parameters
    ----------
    device : str
        ``cuda`` takes the current one.
    seed : int
        Of the random values.
    """
    import torch

    if device == "cpu":
        return Workbench(device, seed, _cpu_cache_bytes(), CPU_MEMORY_BYTES)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    cache = float(getattr(properties, "L2_cache_size", 0)) or ASSUMED_CACHE_BYTES[device]
    free, _ = torch.cuda.mem_get_info()
    return Workbench(device, seed, cache, MEMORY_FRACTION * free)


def _cpu_cache_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> float:
    """Size of the last cache of the first core, or a usual one where the system does not say."""
    sizes = []
    for file in caches.glob("index*/size"):
        try:
            sizes.append(float(file.read_text(encoding="ascii").strip().removesuffix("K")) * 1024)
        except (OSError, ValueError):
            continue
    return max(sizes, default=ASSUMED_CACHE_BYTES["cpu"])
