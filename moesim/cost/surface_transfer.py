"""The surface that prices an operator on a device: its own, or one carried over from a device that was measured.

A carried surface is the dimensionless form of a measured device's formula with the datasheet figures of the target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.cost.attention_surface import AttentionTimeSurface, attention_surface_from_document
from moesim.cost.efficiency_surfaces import device_rates
from moesim.cost.fitted_surfaces import (
    NO_SURFACES,
    NORMAL_QUANTILE,
    SURFACE_OPERATORS,
    FittedSurfaces,
    SurfaceRecord,
    fitted_record,
)
from moesim.cost.gemm_surface import (
    GemmCore,
    GemmMachine,
    GemmSurface,
    Spread,
    are_same_figures,
    gemm_surface_from_json,
)
from moesim.cost.moe_surface import MoeMachine, MoeTimeSurface, moe_surface_from_document
from moesim.describe.hardware import Device
from moesim.describe.hardware_library import HardwareLibrary
from moesim.describe.quantities import Figure

WIDE_BYTES = 2.0
FEWEST_UNITS = 12.0
"""Compute units below which a grid of tiles has no waves to speak of, and surfaces of GPUs do not travel."""
ELEMENT_BYTES = {"fp8": 1.0, "int8": 1.0, "fp4": 0.5, "fp32": 4.0, "tf32": 4.0}
"""Bytes of an element; every other precision has ``WIDE_BYTES``."""


@dataclass(frozen=True)
class Lender:
    """What the choice of a source looks at: FLOPs are 16-bit, per byte of memory bandwidth."""

    device: str
    generation: str
    flops_per_byte: float


@dataclass(frozen=True)
class TransferRules:
    """How surfaces travel, as ``surfaces/transfer.json`` has it.

    Attributes
    ----------
    rank : mapping
        Order of the generations in time; contemporaries of different vendors have the same rank.
    lenders : frozenset of str
        Generations whose surfaces may serve others.
    intervals : mapping
        Spread of log(measured / predicted) by operator and ``same generation`` or ``other generation``: that of
        predicting each measured device from the others.
    measured : mapping
        Shipped devices with tables, so that choosing among them reads no profile.
    """

    rank: Mapping[str, float]
    lenders: frozenset[str]
    intervals: Mapping[str, Mapping[str, Spread]]
    measured: Mapping[str, Lender]


@dataclass(frozen=True)
class SurfaceOrigin:
    """Where a surface comes from: the device measured, whether it is the same one, and of the same generation."""

    device: str
    is_own: bool
    is_same_generation: bool

    @property
    def kind(self) -> str:
        """``fitted`` or ``transferred``."""
        return "fitted" if self.is_own else "transferred"

    @property
    def relation(self) -> str:
        """Key of the interval a carried surface has."""
        return "same generation" if self.is_same_generation else "other generation"


@dataclass(frozen=True)
class Anchors:
    """Published figures of a device that replace a source's: at most three per operator, None where there is none."""

    compute_fraction: float | None = None
    memory_fraction: float | None = None
    fixed_s: float | None = None
    attention_fraction: float | None = None


def transfer_rules(document: Mapping[str, Any]) -> TransferRules:
    """Build the rules from what their JSON file holds.

    Parameters
    ----------
    document : mapping
        As ``json.load`` gives it.

    Returns
    -------
    TransferRules
        The rules.
    """
    intervals = {
        operator: {
            relation: Spread(tuple(item["edges_s"]), tuple(item["half_widths"]), float(item["level"]))
            for relation, item in relations.items()
        }
        for operator, relations in document["intervals"].items()
    }
    measured = {name: Lender(name, **facts) for name, facts in document.get("measured", {}).items()}
    return TransferRules(document["generation_rank"], frozenset(document["lending_generations"]), intervals, measured)


def device_anchors(device: Device) -> Anchors:
    """Figures of a profile that are its own: published or assumed for it, not transferred from another device."""
    gemm, attention = device.kernels.gemm, device.kernels.attention
    return Anchors(
        compute_fraction=_own(gemm.compute_fraction),
        memory_fraction=_own(gemm.memory_fraction),
        fixed_s=_own(gemm.fixed_time),
        attention_fraction=_own(attention.compute_fraction),
    )


def _own(figure: Figure) -> float | None:
    return None if figure.kind == "transferred" else figure.value


def lender(device: Device) -> Lender:
    """What the choice of a source looks at in a device."""
    balance = device_rates(device).peak_for("bf16") / device.memory_bandwidth.value
    return Lender(device.id, device.generation, balance)


def nearest_lender(taker: Lender, measured: Sequence[Lender], rules: TransferRules) -> Lender:
    """The measured device whose surface a device without its own takes.

    Parameters
    ----------
    taker : Lender
        The device to price.
    measured : sequence of Lender
        Devices with a surface, at least one.
    rules : TransferRules
        Ranks of generations.

    Returns
    -------
    Lender
        One of its own generation if there is any; else of the nearest generation that lends, the older of two at the
        same distance. Among several, the one whose FLOPs per byte of memory bandwidth are nearest.
    """
    own = [one for one in measured if one.generation == taker.generation]
    lenders = own or [one for one in measured if one.generation in rules.lenders] or list(measured)
    rank = rules.rank.get(taker.generation)

    def distance(one: Lender) -> tuple[float, float, float]:
        other = rules.rank.get(one.generation)
        apart = 0.0 if rank is None or other is None else abs(rank - other)
        return apart, math.inf if other is None else other, abs(math.log(one.flops_per_byte / taker.flops_per_byte))

    return min(lenders, key=distance)


def kernel_machine(device: Device, precision: str = "bf16") -> GemmMachine:
    """Datasheet figures of a device at a precision.

    Parameters
    ----------
    device : Device
        Its profile.
    precision : str, optional
        Elements of another size than two bytes are told by bandwidth and cache in elements of two bytes, which is what
        the formulas count in.

    Returns
    -------
    GemmMachine
        Figures in SI; an absent cache counts as 1 byte.
    """
    narrow = WIDE_BYTES / ELEMENT_BYTES.get(precision, WIDE_BYTES)
    return GemmMachine(
        peak_flop_rate=device_rates(device).peak_for(precision),
        memory_bandwidth=device.memory_bandwidth.value * narrow,
        compute_units=device.compute_units.value,
        l2_cache_bytes=(device.l2_cache.value if device.l2_cache else 1.0) * narrow,
    )


def _machine_like(device: Device, source: Device) -> GemmMachine:
    """Figures of a device to which a surface is carried; units of another vendor count by their share of the peak."""
    machine = kernel_machine(device)
    if device.vendor == source.vendor:
        return machine
    per_unit = device_rates(source).peak_for("bf16") / source.compute_units.value
    return replace(machine, compute_units=max(machine.peak_flop_rate / per_unit, 1.0))


def gemm_surface_for(device: Device, library: HardwareLibrary) -> tuple[GemmSurface, SurfaceOrigin]:
    """GEMM surface of a device, its own or carried over.

    Parameters
    ----------
    device : Device
        Its profile.
    library : HardwareLibrary
        Where surfaces and the rules of transfer come from.

    Returns
    -------
    surface : GemmSurface
        With the machine of the device.
    origin : SurfaceOrigin
        Where it comes from.
    """
    document, source, origin, rules = _source("gemm", device, library)
    unaligned = device.kernels.gemm.unaligned_slowdown
    penalty = unaligned.value if unaligned else 1.0
    if origin.is_own:
        return replace(gemm_surface_from_json(document), penalty_unaligned=penalty), origin
    anchors, machine = device_anchors(device), _machine_like(device, source)
    surface = carried_gemm_surface(document, machine, anchors, is_same_generation=origin.is_same_generation)
    spread = rules.intervals["gemm"][origin.relation]
    return replace(surface, spread=spread, misaligned_spread=spread, penalty_unaligned=penalty), origin


def attention_kernels_for(device: Device, library: HardwareLibrary) -> dict[tuple[str, str], AttentionTimeSurface]:
    """Single attention kernels by library and pass: the device's own, or those of one of its generation.

    Parameters
    ----------
    device : Device
        Its profile.
    library : HardwareLibrary
        Where they come from.

    Returns
    -------
    dict
        Surfaces without grids at the device's figures; empty where none of the generation was measured.
    """
    operator = "flash_kernels"
    sources = list(dict.fromkeys([device.id, device.surface_device or device.id]))
    sources += [name for name in library.surface_devices(operator) if name not in sources]
    for name in sources:
        document = library.surface(operator, name)
        if document is None or library.device(name).generation != device.generation:
            continue
        machine, kernels = kernel_machine(device), {}
        for one in document["kernels"]:
            surface = attention_surface_from_document({**document, **one})  # type: ignore[typeddict-item]
            kernels[str(one["library"]), str(one["pass"])] = attention_surface_at(surface, machine)
        return kernels
    return {}


def attention_surface_for(device: Device, library: HardwareLibrary) -> tuple[AttentionTimeSurface, SurfaceOrigin]:
    """Attention surface of a device, its own or carried over; as :func:`gemm_surface_for`."""
    document, source, origin, rules = _source("attention", device, library)
    surface = attention_surface_from_document(document)  # type: ignore[arg-type]
    if origin.is_own:
        return surface, origin
    machine, source_machine = _machine_like(device, source), kernel_machine(source)
    carried = carried_attention_surface(surface, source_machine, machine, device_anchors(device))
    spread = rules.intervals["attention"][origin.relation]
    return replace(carried, device=device.id, **_interval(spread)), origin


def moe_surface_for(device: Device, library: HardwareLibrary) -> tuple[MoeTimeSurface, SurfaceOrigin]:
    """MoE surface of a device, its own or carried over; as :func:`gemm_surface_for`."""
    document, source, origin, rules = _source("moe", device, library)
    surface = moe_surface_from_document(document)  # type: ignore[arg-type]
    if origin.is_own:
        return surface, origin
    gemm = library.surface("gemm", source.id)
    core = portable_core(gemm) if gemm is not None else None
    machine, source_machine = _machine_like(device, source), kernel_machine(source)
    carried = carried_moe_surface(surface, source_machine, machine, anchors=device_anchors(device), core=core)
    spread = rules.intervals["moe"][origin.relation]
    return replace(carried, device=device.id, **_interval(spread)), origin


def takes_surfaces(device: Device) -> bool:
    """Whether surfaces price a device: not where a few large matrix units (TPU) leave no waves of tiles to run."""
    return device.compute_units.value >= FEWEST_UNITS


def device_surfaces(device: Device, library: HardwareLibrary) -> FittedSurfaces:
    """Surfaces that price a device's kernels, its own or carried over, with their records.

    Parameters
    ----------
    device : Device
        Its profile.
    library : HardwareLibrary
        Where surfaces and the rules of transfer come from.

    Returns
    -------
    FittedSurfaces
        All three; none for a device of a few large matrix units (TPU), over which no waves of tiles run: there the
        four-constant form fits dense and MoE steps with one rate, a carried surface does not (validation/published).
    """
    if not takes_surfaces(device):
        return NO_SURFACES
    gemm, gemm_origin = gemm_surface_for(device, library)
    attention, attention_origin = attention_surface_for(device, library)
    moe, moe_origin = moe_surface_for(device, library)
    carried = (
        (gemm_origin, gemm.core.compute_fraction, gemm.spread.half_widths),
        (attention_origin, attention.parameters.compute_fraction, attention.interval_half_widths),
        (moe_origin, moe.parameters.compute_fraction, moe.interval_half_widths),
    )
    records = []
    for operator, (origin, fraction, half_widths) in zip(SURFACE_OPERATORS, carried, strict=True):
        document = library.surface(operator, device.surface_device or device.id)
        record = SurfaceRecord(
            kind=origin.kind,
            source=f"carried over from {origin.device}; error of predicting each measured device from the others",
            compute_fraction=fraction,
            error_fraction=float(np.asarray(half_widths, dtype=np.float64).mean()) / NORMAL_QUANTILE,
        )
        records.append((operator, fitted_record(operator, document) if document else record))
    return FittedSurfaces(gemm, attention, moe, tuple(records), attention_kernels_for(device, library))


def _interval(spread: Spread) -> dict[str, Any]:
    return {"interval_edges_s": np.array(spread.edges_s), "interval_half_widths": np.array(spread.half_widths)}


def _source(
    operator: str, device: Device, library: HardwareLibrary
) -> tuple[dict[str, Any], Device, SurfaceOrigin, TransferRules]:
    rules = transfer_rules(library.transfer_document())
    document = library.surface(operator, device.surface_device or device.id)
    if document is not None:
        return document, device, SurfaceOrigin(device.id, True, True), rules
    measured = [rules.measured.get(name) or lender(library.device(name)) for name in library.surface_devices(operator)]
    source = library.device(nearest_lender(lender(device), measured, rules).device)
    lent = library.surface(operator, source.id)
    assert lent is not None
    return lent, source, SurfaceOrigin(source.id, False, source.generation == device.generation), rules


def portable_core(document: Mapping[str, Any]) -> GemmCore:
    """Constants fitted without the terms that do not travel between generations: L2 traffic and cached operands."""
    return GemmCore(**document["portable_core"])


def carried_gemm_surface(
    document: Mapping[str, Any], machine: GemmMachine, anchors: Anchors, *, is_same_generation: bool
) -> GemmSurface:
    """GEMM surface of one device with the figures of another.

    Parameters
    ----------
    document : mapping
        JSON object of the source's surface.
    machine : GemmMachine
        Figures of the target.
    anchors : Anchors
        Published figures of the target.
    is_same_generation : bool
        Within a generation the whole formula travels; between generations the one without L2 traffic and cached
        operands, whose ratios are a generation's own.

    Returns
    -------
    GemmSurface
        With the spread of the source, which does not hold here. The residual grid is kept only where peak, bandwidth
        and units are the source's: elsewhere it may fall faster than the formula rises.
    """
    source = gemm_surface_from_json(document)
    portable = portable_core(document)
    core = source.core if is_same_generation else portable
    core = replace(
        core,
        compute_fraction=_scaled(core.compute_fraction, anchors.compute_fraction, portable.compute_fraction),
        memory_fraction=_scaled(core.memory_fraction, anchors.memory_fraction, portable.memory_fraction),
        launch_s=core.launch_s if anchors.fixed_s is None else anchors.fixed_s,
    )
    grid = source.grid
    if not are_same_figures(machine, source.machine) or core != source.core:
        grid = replace(grid, log_ratio=grid.log_ratio * 0.0)
    return replace(source, machine=machine, core=core, grid=grid)


def _scaled(fraction: float, anchor: float | None, source: float) -> float:
    """Fraction of a formula, scaled as the target's published figure is to the source's; no more than all."""
    return fraction if anchor is None else min(fraction * anchor / source, 1.0)


def carried_attention_surface(
    surface: AttentionTimeSurface, source: GemmMachine, machine: GemmMachine, anchors: Anchors
) -> AttentionTimeSurface:
    """Attention surface of one device with the figures of another; grids as for :func:`carried_gemm_surface`."""
    fraction = anchors.attention_fraction
    parameters = replace(
        surface.parameters,
        compute_fraction=surface.parameters.compute_fraction if fraction is None else fraction,
        cache_bytes=surface.parameters.cache_bytes * machine.l2_cache_bytes / source.l2_cache_bytes,
    )
    keeps_grids = are_same_figures(machine, source) and fraction is None
    return replace(
        surface,
        peak_flop_per_s=machine.peak_flop_rate,
        memory_bytes_per_s=machine.memory_bandwidth,
        compute_units=machine.compute_units,
        parameters=parameters,
        grids=surface.grids if keeps_grids else (),
    )


def carried_moe_surface(
    surface: MoeTimeSurface,
    source: GemmMachine,
    machine: GemmMachine,
    *,
    anchors: Anchors = Anchors(),
    core: GemmCore | None = None,
) -> MoeTimeSurface:
    """MoE surface of one device with the figures of another; grids as for :func:`carried_gemm_surface`.

    Parameters
    ----------
    surface : MoeTimeSurface
        That of the source.
    source, machine : GemmMachine
        Figures of source and target.
    anchors : Anchors, optional
        Published figures of the target's GEMMs.
    core : GemmCore, optional
        Portable GEMM constants of the source, which anchors are compared with; without it they are ignored.

    Returns
    -------
    MoeTimeSurface
        With the interval of the source, which does not hold here.
    """
    larger = machine.l2_cache_bytes / source.l2_cache_bytes
    parameters = replace(
        surface.parameters,
        cache_bytes=surface.parameters.cache_bytes * larger,
        pass_cache_bytes=surface.parameters.pass_cache_bytes * larger,
        slab_bytes=surface.parameters.slab_bytes * larger,
    )
    if core is not None:
        parameters = replace(
            parameters,
            compute_fraction=_scaled(parameters.compute_fraction, anchors.compute_fraction, core.compute_fraction),
            memory_fraction=_scaled(parameters.memory_fraction, anchors.memory_fraction, core.memory_fraction),
        )
    is_anchored = core is not None and (anchors.compute_fraction, anchors.memory_fraction) != (None, None)
    keeps_grids = are_same_figures(machine, source) and not is_anchored
    figures = MoeMachine(machine.peak_flop_rate, machine.memory_bandwidth, machine.compute_units)
    return replace(surface, machine=figures, parameters=parameters, grids=surface.grids if keeps_grids else ())


def attention_surface_at(surface: AttentionTimeSurface, machine: GemmMachine) -> AttentionTimeSurface:
    """A surface at the figures of another precision; units stay, and so do grids where nothing changes."""
    figures = GemmMachine(surface.peak_flop_per_s, surface.memory_bytes_per_s, surface.compute_units, 1.0)
    wanted = replace(machine, compute_units=figures.compute_units)
    if are_same_figures(figures, wanted):
        return surface
    return replace(surface, peak_flop_per_s=wanted.peak_flop_rate, memory_bytes_per_s=wanted.memory_bandwidth, grids=())


def moe_surface_at(surface: MoeTimeSurface, machine: GemmMachine) -> MoeTimeSurface:
    """A surface at the figures of another precision; as :func:`attention_surface_at`."""
    mine = surface.machine
    figures = GemmMachine(mine.peak_flop_per_s, mine.memory_bytes_per_s, mine.compute_units, 1.0)
    wanted = replace(machine, compute_units=figures.compute_units)
    if are_same_figures(figures, wanted):
        return surface
    return replace(
        surface, machine=MoeMachine(wanted.peak_flop_rate, wanted.memory_bandwidth, wanted.compute_units), grids=()
    )
