"""Devices, clusters and software stacks: data with a source beside every number."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moesim.describe.quantities import (
    INT64_MAX,
    BandwidthFigure,
    BytesFigure,
    Count,
    Description,
    DurationFigure,
    Flag,
    FlopRateFigure,
    Fraction,
    FrequencyFigure,
    NonNegativeCount,
    NumberFigure,
    PowerFigure,
    Precision,
    PriceFigure,
)

Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
Tier = Literal["scale_up", "scale_out", "torus"]


class GemmSurface(Description):
    """Constants of the GEMM time: see ``moesim.cost.efficiency_surfaces.gemm_time_s``.

    ``compute_fraction`` of peak reached by a long, large GEMM; ``memory_fraction`` of the memory bandwidth;
    ``prologue_length`` the start and end of a main loop as an equivalent length of k; ``fixed_time`` per kernel.
    ``accumulation_fraction`` of the memory bandwidth at which an output in fp32 is read, added to and written;
    null as other outputs. ``unaligned_slowdown`` is the time of a GEMM with rows that are not whole multiples of 16
    bytes over that of an aligned one; null where it is unknown. ``eight_bit_fraction`` of the rate that these constants
    and the surfaces give at the peak of an 8-bit or narrower format is what its products reach; null as all of it.
    ``row_scale_slowdown`` and ``block_scale_slowdown`` are the time of such a product with a scale per row, or per
    block of 128, over that with one per tensor: where matrix units apply no scales, partial sums leave them to be
    scaled; null as long.
    """

    compute_fraction: NumberFigure
    memory_fraction: NumberFigure
    prologue_length: NumberFigure
    fixed_time: DurationFigure
    accumulation_fraction: NumberFigure | None = None
    unaligned_slowdown: NumberFigure | None = None
    eight_bit_fraction: NumberFigure | None = None
    row_scale_slowdown: NumberFigure | None = None
    block_scale_slowdown: NumberFigure | None = None


class AttentionSurface(Description):
    """Constants of the attention core: achieved fraction of peak over the causal half of the square."""

    compute_fraction: NumberFigure


class MemoryBoundSurface(Description):
    """Constants of element-wise kernels: achieved fraction of the memory bandwidth and time per kernel.

    ``update_fraction`` is that of an optimizer, which reads and writes several tensors in place; null as others.
    """

    memory_fraction: NumberFigure
    fixed_time: DurationFigure
    update_fraction: NumberFigure | None = None


class KernelSurfaces(Description):
    """Efficiency surfaces of one device."""

    gemm: GemmSurface
    attention: AttentionSurface
    memory_bound: MemoryBoundSurface


class Device(Description):
    """One device as the framework counts it (a core on TPU v2/v3, a GCD on MI250X, else a chip).

    ``surface_device`` is the device whose fitted surfaces are this one's as well: a calibrated profile keeps those of
    the profile it started from.
    """

    schema_version: Literal[1]
    id: Identifier
    name: str
    vendor: Literal["nvidia", "amd", "google", "other"]
    generation: Identifier
    devices_per_chip: Count
    compute_units: NumberFigure
    clock: FrequencyFigure | None = None
    sustained_clock_fraction: NumberFigure
    peak_flop_rate: Annotated[dict[Precision, FlopRateFigure], Field(min_length=1)]
    memory: BytesFigure
    usable_memory: BytesFigure
    memory_bandwidth: BandwidthFigure
    l2_cache: BytesFigure | None = None
    host_link_bandwidth: BandwidthFigure
    power: PowerFigure | None = None
    price: PriceFigure | None = None
    kernels: KernelSurfaces
    surface_device: Identifier | None = None
    notes: str = ""


class Crossbar(Description):
    """Switches that join all members at full rate; ``boards`` of them joined by a backplane of full rate (DGX-2)."""

    shape: Literal["crossbar"]
    boards: Count = 1
    source: Annotated[str, Field(min_length=3)]


class LinkMatrix(Description):
    """Direct links between members: ``links[i][j]`` parallel links of ``link_bandwidth`` each, one direction."""

    shape: Literal["link_matrix"]
    links: Annotated[list[list[NonNegativeCount]], Field(min_length=1)]
    link_bandwidth: BandwidthFigure
    source: Annotated[str, Field(min_length=3)]


class PcieTree(Description):
    """PCIe switches with ``devices_per_switch`` members, all below one root."""

    shape: Literal["pcie_tree"]
    devices_per_switch: Count
    source: Annotated[str, Field(min_length=3)]


class FatTree(Description):
    """Leaf switches below spines, or below the aggregation switches of pods below a core.

    ``domains_per_leaf`` members of the level inside share a leaf (or, rail-optimised, a leaf per NIC of a node);
    ``leaves_per_pod`` such groups form a pod (all of them in a two-level tree). Oversubscription is bandwidth into a
    switch from below over bandwidth out of it upwards, 1 where nothing is given. Between rails, a flow goes through
    the scale-up links to the GPU on its target's rail (``forward``, NCCL's PXN) or through the spines (``spine``).
    """

    shape: Literal["fat_tree"]
    domains_per_leaf: Count | None = None
    leaves_per_pod: Count | None = None
    leaf_oversubscription: NumberFigure | None = None
    pod_oversubscription: NumberFigure | None = None
    is_rail_optimised: Flag
    between_rails: Literal["forward", "spine"] = "forward"
    source: Annotated[str, Field(min_length=3)]


Wiring = Annotated[Crossbar | LinkMatrix | PcieTree | FatTree, Field(discriminator="shape")]


class LinkLevel(Description):
    """One level of a hierarchical fabric: ``size`` members of the level inside it are joined by it.

    ``bandwidth_per_device`` is one direction, with every device of the cluster active at once: a 100 Gb/s NIC shared
    by eight devices gives 12.5 Gb/s. ``wiring`` says how, where the medium does not; ``structure.topology_builders``
    says what is taken otherwise.

    One measurement of the whole level, or both, fix what the library makes of it (``cost.measured_levels``):
    ``measured_latency`` of a small all-reduce (1 KiB or less) and ``measured_bus_bandwidth`` of a large one as
    nccl-tests prints it, 2 (n - 1)/n bytes / time, over ``measured_domains`` members of the level (all of them if
    absent), each with everything inside it.
    """

    name: Identifier
    tier: Literal["scale_up", "scale_out"]
    medium: Identifier
    size: Count
    bandwidth_per_device: BandwidthFigure
    latency: DurationFigure
    nics_per_node: Count | None = None
    wiring: Wiring | None = None
    measured_latency: DurationFigure | None = None
    measured_bus_bandwidth: BandwidthFigure | None = None
    measured_domains: Annotated[int, Field(ge=2, le=INT64_MAX, strict=True)] | None = None


class HierarchicalFabric(Description):
    """Nested switched domains, innermost first (NVLink node, rail-optimised network, ...)."""

    kind: Literal["hierarchical"]
    levels: Annotated[list[LinkLevel], Field(min_length=1)]


class PodNetwork(Description):
    """Several equal tori joined by a data-centre network; ``bandwidth_per_device`` one direction, all active."""

    count: Count
    bandwidth_per_device: BandwidthFigure
    latency: DurationFigure


class TorusFabric(Description):
    """A 1D, 2D or 3D torus or mesh of chips; each chip holds ``devices_per_chip`` devices of the profile.

    With ``pods`` there are several of them, each with these dimensions.
    """

    kind: Literal["torus"]
    dimensions: Annotated[list[Count], Field(min_length=1, max_length=3)]
    wraparound: Annotated[list[Flag], Field(min_length=1, max_length=3)]
    link_bandwidth: BandwidthFigure
    hop_latency: DurationFigure
    on_chip_bandwidth: BandwidthFigure | None = None
    pods: PodNetwork | None = None


class Cluster(Description):
    """Devices of one kind joined by a fabric."""

    schema_version: Literal[1]
    id: Identifier
    name: str
    device: Identifier
    device_count: Count
    devices_per_node: Count
    fabric: Annotated[HierarchicalFabric | TorusFabric, Field(discriminator="kind")]
    price_per_device_hour: PriceFigure | None = None
    notes: str = ""


GraphedPart = Literal["attention", "dense_ffn", "router", "experts", "step"]
"""What a CUDA graph may cover: parts of a layer, or the whole step (one compiled program is such a graph)."""


Synchronisation = Literal["exchange", "experts", "hop", "step"]
"""What the host waits for the device at: counts of the rows that ranks exchange, of the rows of experts that stay, a
transfer between stages that hold one chunk each, and the end of a step."""


class LaunchBehaviour(Description):
    """Host side of a step: what issuing work costs, what graphs replay, synchronisations of dropless counts.

    ``operation_time`` is the host's time for one operation of the framework (Python, dispatcher, autograd, launch);
    null where no framework stands between, so that each kernel costs its launch. ``loops_over_experts``: grouped GEMMs
    and their casts are issued expert by expert, a launch each. ``step_time`` is spent once per step on the loop around
    it (batch, optimizer, clipping, logging); ``cuda_graphs`` lists what is replayed instead of issued.
    ``parameter_tensor_operations`` of the framework per tensor and step, null as Megatron-Core's; 0 where one fused
    update takes all tensors.
    ``kernel_gap`` is what a kernel issued by itself starts later after the one before it than in a graph.
    ``launch_queue`` operations may be issued before the device has done them (CUDA: about 1,024); 0: host and device
    meet after every pass. ``synchronises`` lists where the host waits until the device has worked off the queue; counts
    are then read ``host_synchronisations_per_moe_layer`` times.
    ``expert_message_time`` is what each message between a rank and one expert costs where rows are exchanged expert by
    expert, each peer on its own; null where one all-to-all does it.
    """

    kernel_launch_time: DurationFigure
    operation_time: DurationFigure | None = None
    step_time: DurationFigure | None = None
    parameter_tensor_operations: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False, strict=True)] | None = None
    loops_over_experts: Flag = False
    expert_message_time: DurationFigure | None = None
    cuda_graphs: list[GraphedPart] = []
    kernel_gap: DurationFigure | None = None
    launch_queue: Annotated[int, Field(ge=0, le=1_000_000, strict=True)] = 0
    synchronises: list[Synchronisation] = ["exchange", "experts", "hop", "step"]
    host_synchronisations_per_moe_layer: Annotated[int, Field(ge=0, le=100, strict=True)]
    host_synchronisation_time: DurationFigure


class ProtocolConstants(Description):
    """A second protocol of a library: latency per collective, round and peer, fraction of bandwidth, pipelining."""

    base_latency: DurationFigure | None = None
    round_latency: DurationFigure | None = None
    peer_latency: DurationFigure | None = None
    fraction: NumberFigure
    pipelining: NumberFigure | None = None


class CollectiveTier(Description):
    """What a collective library makes of one tier of links: see ``moesim.cost.communication_libraries``.

    ``library`` and ``all_to_all_library`` name files of fitted constants (``hardware_profiles/libraries``); what a tier
    states beside them goes before. ``base_latency`` once per collective that enters the tier
    (``all_to_all_base_latency`` in its place for an all-to-all, ``point_to_point_latency`` for one message),
    ``round_latency`` per round of a ring or torus, ``peer_latency`` per peer of a direct all-to-all,
    ``all_to_all_doubling_latency`` per doubling of the domains; fractions of the nominal bandwidth that large messages
    reach; ``pipelining`` the factor of the root of latency and wire time. ``quick``, ``quick_all_to_all``: protocols of
    small messages; ``switch_time`` of a chunk on the link ends the first. ``in_switch``: reduction in the switch, from
    ``in_switch_time`` of the buffer on. A torus may close its rings and not use them for all-to-all.
    """

    library: Identifier | None = None
    all_to_all_library: Identifier | None = None
    base_latency: DurationFigure | None = None
    all_to_all_base_latency: DurationFigure | None = None
    all_to_all_doubling_latency: DurationFigure | None = None
    point_to_point_latency: DurationFigure | None = None
    round_latency: DurationFigure
    peer_latency: DurationFigure
    reduce_fraction: NumberFigure
    all_to_all_fraction: NumberFigure
    point_to_point_fraction: NumberFigure
    pipelining: NumberFigure | None = None
    all_to_all_pipelining: NumberFigure | None = None
    own_copy: NumberFigure | None = None
    all_to_all_own_copy: NumberFigure | None = None
    levels_exponent: NumberFigure | None = None
    quick: ProtocolConstants | None = None
    quick_all_to_all: ProtocolConstants | None = None
    in_switch: ProtocolConstants | None = None
    switch_time: DurationFigure | None = None
    in_switch_time: DurationFigure | None = None
    all_to_all_uses_wraparound: Flag = True


class OverlapAchieved(Description):
    """Share of each communication that the stack can hide under the compute it overlaps with.

    ``all_to_all_beside_compute`` is that of the all-to-all where a run asks for it to run beside the compute of another
    micro-batch: less than all, for its kernels take compute units of their own.
    """

    all_to_all: Fraction = 0.0
    all_to_all_beside_compute: Fraction = 0.8
    tensor_parallel: Fraction = 0.0
    expert_tensor_parallel: Fraction = 0.0
    context_parallel: Fraction = 0.0
    data_parallel: Fraction = 0.0
    pipeline_p2p: Fraction = 0.0
    source: Annotated[str, Field(min_length=3)]


class CommunicationKernels(Description):
    """What communication kernels take from what runs beside them, where a run asks for overlap.

    Compute units (SMs) that all-to-alls and that reductions and gathers hold while they run, and how often a byte that
    is sent passes through the device's memory; null: nothing.
    """

    all_to_all_units: NumberFigure | None = None
    reduction_units: NumberFigure | None = None
    memory_passes: NumberFigure | None = None


class StackMemory(Description):
    """Memory the software holds beside tensors of the model, and bytes of each logit until its backward pass.

    A logit is kept as the projection wrote it and as its exponential in fp32, unless a compiler makes one of the other.
    """

    context: BytesFigure
    communication_buffers: BytesFigure
    fragmentation_fraction: Fraction
    bytes_per_logit: Annotated[float, Field(gt=0, le=64, allow_inf_nan=False, strict=True)] = 6.0
    source: Annotated[str, Field(min_length=3)]


class ScorePasses(Description):
    """Passes of materialised attention scores in fp32 through memory or vector units, where they are known."""

    forward: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False, strict=True)]
    backward: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False, strict=True)]
    source: Annotated[str, Field(min_length=3)]


Passes = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False, strict=True)]


class KernelPasses(Description):
    """Passes over a kernel's elements that take as long as it does at the device's streaming rate."""

    forward: Passes
    backward: Passes


class ElementwiseKernels(Description):
    """How often a stack's kernels go over what they work on, where it was measured.

    ``norm`` and ``residual`` over tokens times width, ``activation`` (gated) over rows times inner size, ``permute``
    and ``unpermute`` over routed rows, ``router_cast`` over tokens where the router's scores are wider than
    activations, ``router_choice`` over scores. A kernel that does not reach the streaming rate counts as more passes.
    ``loss`` over logits in fp32, casts included; null as a fused cross-entropy. ``sort_kernels`` are short
    kernels in a row that take as long as sorting the choices by expert.
    ``expert_gradient_bytes`` moved for one weight of an expert where its gradient is added to the sum in fp32 by a
    kernel of its own, at the streaming rate; null where the product does it. ``widening_s`` is what the compute
    units take for an element that a kernel widens from 16 to 32 bits, in casts and sums of gradients; it combines with
    the traffic as in a GEMM.
    ``scan_row_s`` is what one row of the cumulative sum over a routing group's choices takes, by which one-hot masks
    find their slots: a thread adds up its column row after row, so bandwidth does not help; null where it is unknown.
    ``reorder_s`` and ``transpose_s`` are what compute units take for an element that an einsum copies to another order,
    or transposes, before it multiplies; null where it copies none.
    """

    norm: KernelPasses
    residual: KernelPasses
    activation: KernelPasses
    permute: KernelPasses
    unpermute: KernelPasses
    router_cast: KernelPasses
    router_choice: KernelPasses
    loss: KernelPasses | None = None
    sort_kernels: NonNegativeCount
    expert_gradient_bytes: Passes | None = None
    widening_s: Annotated[float, Field(ge=0, le=1e-6, allow_inf_nan=False, strict=True)] = 0.0
    scan_row_s: Annotated[float, Field(ge=0, le=1e-5, allow_inf_nan=False, strict=True)] | None = None
    reorder_s: Annotated[float, Field(ge=0, le=1e-6, allow_inf_nan=False, strict=True)] | None = None
    transpose_s: Annotated[float, Field(ge=0, le=1e-6, allow_inf_nan=False, strict=True)] | None = None
    source: Annotated[str, Field(min_length=3)]


class CompilerBehaviour(Description):
    """What a compiler makes of shapes: XLA lays arrays out in tiles whose minor dimension has ``lane_width`` entries.

    Head sizes and numbers of keys are rounded up to it. ``prefix_sum_passes`` through memory per doubling of the rows
    that a cumulative sum runs over; null where one kernel does it. ``embeds_by_product``: an embedding is looked up as
    a matrix product with one-hot rows.
    """

    lane_width: Count
    prefix_sum_passes: NumberFigure | None = None
    embeds_by_product: Flag = False
    source: Annotated[str, Field(min_length=3)]


class StepRatio(Description):
    """Measured over predicted step time on published runs that fitted nothing: 5th and 95th percentile.

    Stacks of one ``stack_class`` share it: current ones, or research code and old networks.
    """

    stack_class: Literal["current", "research"]

    low: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=True)]
    high: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False, strict=True)]
    source: Annotated[str, Field(min_length=3)]


class Stack(Description):
    """A named software stack: framework, kernels and collective library of one era.

    ``quantised_expert_slowdown`` is the time of its 8-bit (or narrower) expert GEMMs over that of the device's formulas
    at the peak of that precision, where it is known. ``elementwise_fraction`` of the device's streaming rate is what
    its element-wise kernels reach in a step; null as streams, with the passes of ``elementwise``. ``attention_library``
    names kernels measured by themselves, where a device has them (``surfaces/flash_kernels_*.json``).
    """

    schema_version: Literal[1]
    id: Identifier
    name: str
    launch: LaunchBehaviour
    dispatch: Literal["one_hot_einsum", "permute", "fused"]
    attention_kernel: Literal["flash", "materialised"]
    attention_library: Identifier | None = None
    score_passes: ScorePasses | None = None
    compiler: CompilerBehaviour | None = None
    fuses_elementwise: Flag
    elementwise: ElementwiseKernels | None = None
    elementwise_fraction: NumberFigure | None = None
    gemm_compute_fraction: NumberFigure
    quantised_expert_slowdown: NumberFigure | None = None
    collective_library: Identifier
    sends_one_copy_per_node: Flag = False
    collectives: Annotated[dict[Tier, CollectiveTier], Field(min_length=1)]
    overlap: OverlapAchieved
    communication_kernels: CommunicationKernels | None = None
    memory: StackMemory
    step_ratio: StepRatio | None = None
    notes: str = ""
