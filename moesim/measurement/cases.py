"""What is measured: a case is one operation at one shape, with the arithmetic and the traffic it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moesim.measurement.record_files import Json
    from moesim.measurement.workbenches import Workbench

DeviceKind = Literal["cuda", "cpu"]
PassName = Literal["forward", "dgrad", "wgrad", "backward", "step"]
Timing = Literal["device", "eager", "host"]
Shape = Mapping[str, int | str]

ELEMENT_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class Target:
    """What the lists of cases depend on."""

    device: DeviceKind
    dtypes: tuple[str, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Work:
    """One prepared set of inputs: a call to be timed, and how it is done.

    Parameters
    ----------
    call : callable
        Enqueue the operation once. It may be called any number of times.
    implementation : str
        The library routines behind it.
    repetitions : int
        How often one call performs the operation; times are divided by it.
    details : mapping
        More keys of the record, such as bytes that were observed.
    """

    call: Callable[[], object]
    implementation: str
    repetitions: int = 1
    details: Mapping[str, Json] = field(default_factory=dict)


class UnmeasurableError(RuntimeError):
    """A case that this machine cannot measure; the message says why and becomes the reason of its record."""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape.

    Parameters
    ----------
    suite, operation : str
        Where it belongs and what it does.
    pass_name : str
        ``backward`` is everything between the output's gradient and the inputs' and weights'.
    dtype : str
        Of the inputs; accumulations and master weights are fp32.
    shape : mapping
        What identifies the case within its operation and pass.
    flops : float
        Multiplications and additions of matrix products; 2 per multiply-add, causal attention halved.
    traffic_bytes : float
        Each kernel's inputs read once and outputs written once, weights only of experts that are hit.
    working_set_bytes : float
        Memory of one set of inputs and outputs.
    prepare : callable
        Fill one set of inputs.
    timing : str
        ``device``: what the device needs. ``eager``: the same with the gaps that launching leaves. ``host``: what a
        program that waits for each call sees.
    loads : tuple of int
        Rows of each expert, where there are experts.
    rotates : bool
        Whether several sets of inputs take turns; not where the path is timed and not the data.
    """

    suite: str
    operation: str
    pass_name: PassName
    dtype: str
    shape: Shape
    flops: float
    traffic_bytes: float
    working_set_bytes: float
    prepare: Callable[[Workbench], Work]
    timing: Timing = "device"
    loads: tuple[int, ...] = ()
    rotates: bool = True

    @property
    def identifier(self) -> str:
        """Name of the case in a file of results.

        Examples
        --------
        >>> case = Case("gemm", "gemm", "forward", "bf16", {"m": 4, "n": 2, "k": 8}, 128, 112, 112, lambda bench: None)
        >>> case.identifier
        'gemm/gemm/forward/bf16/m=4,n=2,k=8'
        """
        place = ",".join(f"{name}={value}" for name, value in self.shape.items())
        return f"{self.suite}/{self.operation}/{self.pass_name}/{self.dtype}/{place}"


def by_value(suites: Sequence[Sequence[Case]]) -> list[Case]:
    """Put the most valuable case of each suite first, then the second of each, and so on.

    Parameters
    ----------
    suites : sequence of sequences of Case
        Each in the order of its value.

    Returns
    -------
    list of Case
        All cases; any beginning of it covers the suites evenly.

    Examples
    --------
    >>> by_value([["a1", "a2", "a3"], ["b1"]])
    ['a1', 'b1', 'a2', 'a3']
    """
    return [case for turn in zip_longest(*suites) for case in turn if case is not None]
