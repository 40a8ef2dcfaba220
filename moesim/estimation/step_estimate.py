"""The answer to one scenario: times, bounds, breakdown, memory, cost and where every figure came from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from moesim import __version__
from moesim.structure.step_graph import CATEGORIES

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Interval:
    """Statistical interval of the step time at a level."""

    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Parameters:
    """Parameters of the model, without multi-token-prediction modules, which are apart; and on the fullest device."""

    total: int
    active: int
    expert: int
    per_device: int
    mtp: int = 0


@dataclass(frozen=True)
class PipelineAnswer:
    """Seconds of one micro-batch per stage, idle over busy time of the critical stage, and that stage."""

    stage_times_s: list[float]
    bubble_fraction: float
    critical_stage: int


@dataclass(frozen=True)
class MemoryAnswer:
    """Bytes on the fullest device by category; ``peak`` is their sum, ``deficit`` what is missing."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    other: int
    peak: int
    capacity: int
    deficit: int
    peak_stage: int


@dataclass(frozen=True)
class RoutingAnswer:
    """Slots of one expert for one routing group, share of assignments dropped, fullest rank over mean."""

    slots_per_expert: float
    dropped_fraction: float
    max_over_mean_load: float


@dataclass(frozen=True)
class Bottleneck:
    """Largest exposed part of the step, its share, and what would relieve it."""

    name: str
    share: float
    relief: str


@dataclass(frozen=True)
class CostAnswer:
    """Price of the devices and of a billion tokens; None where no price is known."""

    usd_per_hour: float | None
    usd_per_billion_tokens: float | None


@dataclass(frozen=True)
class SourcedFigure:
    """A figure the answer rests on."""

    figure: str
    value: float
    unit: str
    kind: str
    source: str
    error_fraction: float | None


@dataclass(frozen=True)
class AnswerWarning:
    """Something the reader should know."""

    code: str
    message: str


@dataclass(frozen=True)
class StepEstimate:
    """Answer to one scenario; ``to_json`` gives the pinned keys."""

    scenario: str
    engine: str
    kind: str
    num_devices: int
    num_chips: int
    device: str
    cluster: str
    stack: str
    step_time_s: float
    lower_s: float
    upper_s: float
    interval_s: Interval
    tokens_per_step: int
    model_flops_per_step: float
    hardware_flops_per_step: float
    peak_flops_per_s_per_device: float
    parameters: Parameters
    exposed_s: dict[str, float]
    hidden_s: dict[str, float]
    pipeline: PipelineAnswer
    memory: MemoryAnswer
    routing: RoutingAnswer
    bottleneck: Bottleneck
    cost: CostAnswer
    provenance: list[SourcedFigure] = field(default_factory=list)
    assumptions: dict[str, str] = field(default_factory=dict)
    warnings: list[AnswerWarning] = field(default_factory=list)
    network: str = "closed"

    @property
    def fits(self) -> bool:
        """Whether the fullest device has room."""
        return self.memory.deficit == 0

    @property
    def tokens_per_s(self) -> float:
        """Counted tokens per second over all devices."""
        return self.tokens_per_step / self.step_time_s

    @property
    def model_flops_per_s_per_device(self) -> float:
        """Model FLOP/s of one device."""
        return self.model_flops_per_step / self.step_time_s / self.num_devices

    @property
    def mfu_fraction(self) -> float:
        """Model FLOP/s over the device's peak at the compute precision."""
        return self.model_flops_per_s_per_device / self.peak_flops_per_s_per_device

    @property
    def hfu_fraction(self) -> float:
        """Executed FLOP/s over the same peak."""
        executed = self.hardware_flops_per_step / self.step_time_s / self.num_devices
        return executed / self.peak_flops_per_s_per_device

    def to_json(self) -> dict[str, Any]:
        """The answer with the keys of schema version 1, ready for ``json.dumps``."""
        breakdown = {
            name: {"exposed": self.exposed_s.get(name, 0.0), "hidden": self.hidden_s.get(name, 0.0)}
            for name in CATEGORIES
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "moesim_version": __version__,
            "scenario": self.scenario,
            "engine": self.engine,
            "network": self.network,
            "kind": self.kind,
            "num_devices": self.num_devices,
            "num_chips": self.num_chips,
            "device": self.device,
            "cluster": self.cluster,
            "stack": self.stack,
            "step_time_s": self.step_time_s,
            "lower_s": self.lower_s,
            "upper_s": self.upper_s,
            "interval_s": asdict(self.interval_s),
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_device": self.tokens_per_s / self.num_devices,
            "model_flops_per_step": self.model_flops_per_step,
            "hardware_flops_per_step": self.hardware_flops_per_step,
            "model_flops_per_s_per_device": self.model_flops_per_s_per_device,
            "mfu_fraction": self.mfu_fraction,
            "hfu_fraction": self.hfu_fraction,
            "parameters": asdict(self.parameters),
            "breakdown_s": breakdown,
            "pipeline": asdict(self.pipeline),
            "fits": self.fits,
            "memory_bytes": asdict(self.memory),
            "routing": asdict(self.routing),
            "bottleneck": asdict(self.bottleneck),
            "cost": asdict(self.cost),
            "provenance": [asdict(figure) for figure in self.provenance],
            "assumptions": [{"field": name, "why": why} for name, why in self.assumptions.items()],
            "warnings": [asdict(warning) for warning in self.warnings],
        }
