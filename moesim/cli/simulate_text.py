"""What a person reads of a simulation: the estimate's tables, then draws, losses, and what each stage's ranks do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from moesim.cli.text import _console, _table, print_estimates, seconds
from moesim.structure.placement import rank_ranges
from moesim.units import format_quantity

if TYPE_CHECKING:
    from moesim.estimation.simulated_step import Fractions, SimulatedStep
    from moesim.estimation.step_contention import BusyLink, Contention

MAX_STAGES = 32
SHOWN_LINKS = 6
LARGE_DIFFERENCE = 1e-6
NOTED_DIFFERENCE = 0.01


@contextmanager
def draw_progress(draws: int) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar with the time left, on stderr where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("draws"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("draws", total=draws)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_simulation(answer: SimulatedStep) -> None:
    """Print an answer of the event-driven engine."""
    print_estimates([answer.estimate])
    console = _console()
    _print_draws(console, answer)
    _print_losses(console, answer)
    if answer.contention is not None:
        _print_contention(console, answer.contention)
    _print_ranks(console, answer)
    _print_agreement(console, answer)


def _print_draws(console: Console, answer: SimulatedStep) -> None:
    asked = f" of {answer.draws_asked}" if answer.is_interrupted else ""
    draws = f"{answer.draws}{asked} draw" + ("s" if answer.draws > 1 or asked else "")
    console.print(f"\nOver {draws}, seed {answer.seed}")
    table = _table("", ["", "step time", "memory of the fullest rank"])
    peaks = answer.peak_memory_quantiles_bytes
    table.add_row("mean", seconds(answer.estimate.step_time_s), "")
    for name, value in answer.quantiles_s.items():
        table.add_row(name, seconds(value), format_quantity(peaks[name], "bytes"))
    console.print(table)
    priced = answer.estimate.memory.peak
    if any(abs(peak / priced - 1.0) > NOTED_DIFFERENCE for peak in peaks.values()):
        load = "the load that estimate prices"
        console.print(f"The table of memory above is for {load}: {format_quantity(priced, 'bytes')}.")


def _print_losses(console: Console, answer: SimulatedStep) -> None:
    losses, step = answer.losses, answer.estimate.step_time_s
    console.print("\nWhere the mean step goes")
    table = _table("", ["", "", "of the step"])
    for name, value in (
        ("work of the critical stage", losses.work_s),
        ("pipeline bubbles and transfers", losses.bubble_s),
        ("imbalance of the drawn loads", losses.imbalance_s),
        ("stragglers: slow devices, links, hosts", losses.stragglers_s),
        ("contention on shared links", losses.contention_s),
    ):
        if name.startswith("contention") and answer.contention is None:
            continue
        table.add_row(name, seconds(value), f"{value / step:.1%}")
    console.print(table)


def _print_contention(console: Console, contention: Contention) -> None:
    closed_s = contention.closed_step_time_s
    console.print("\nCollectives that share links, at even load and added to every draw")
    console.print(f"  each on links of its own: {seconds(closed_s)}; on shared ones: {seconds(contention.step_time_s)}")
    console.print(f"  contention {_added(contention.sharing_s, closed_s)}")
    if contention.faults_s:
        console.print(f"  slow and flapping links {_added(contention.faults_s, closed_s, plural=True)}")
    if not contention.busiest_links:
        return
    console.print("\nBusiest links: how long what a rank sends would fill its share")
    table = _table("", ["", "", "of the step"])
    alike: dict[tuple[str, str], list[BusyLink]] = {}
    for link in contention.busiest_links:
        alike.setdefault((link.level, seconds(link.busy_s)), []).append(link)
    for (level, busy), links in list(alike.items())[:SHOWN_LINKS]:
        stages = rank_ranges(sorted(link.stage for link in links))
        name = f"stage {stages}, {level}" if len(links) == 1 else f"stages {stages}, {level}"
        table.add_row(name, busy, f"{links[0].busy_fraction:.1%}")
    console.print(table)


def _added(added_s: float, step_s: float, *, plural: bool = False) -> str:
    verb = "add" if plural else "adds"
    return f"{verb} {added_s / step_s:.2%} ({seconds(added_s)})" if added_s else f"{verb} nothing"


def _print_ranks(console: Console, answer: SimulatedStep) -> None:
    console.print("\nWhat ranks do: share of the step")
    table = _table("", ["", "ranks", "busy", "exposed", "idle", "least busy"])
    for stage in answer.stages[:MAX_STAGES]:
        shares = _shares(stage)
        table.add_row(f"stage {stage.stage}", str(stage.ranks), *shares, f"{stage.least_busy_fraction:.1%}")
    console.print(table)
    if len(answer.stages) > MAX_STAGES:
        console.print(f"and {len(answer.stages) - MAX_STAGES} more stages: see --json")
    if not answer.ranks:
        return
    console.print("\nRecorded ranks")
    table = _table("", ["", "stage", "stands for", "busy", "exposed", "idle", "most memory"])
    for rank in answer.ranks:
        memory = "-" if rank.peak_memory_bytes is None else format_quantity(rank.peak_memory_bytes, "bytes")
        others = f"{len(rank.stands_for)} ranks" if len(rank.stands_for) > 1 else "itself"
        table.add_row(f"rank {rank.rank}", str(rank.stage), others, *_shares(rank), memory)
    console.print(table)


def _shares(fractions: Fractions) -> tuple[str, str, str]:
    shares = (fractions.busy_fraction, fractions.exposed_fraction, fractions.idle_fraction)
    return (f"{shares[0]:.1%}", f"{shares[1]:.1%}", f"{shares[2]:.1%}")


def _print_agreement(console: Console, answer: SimulatedStep) -> None:
    agreement = answer.agreement
    difference = abs(agreement.relative_difference)
    verdict = "the same" if difference < LARGE_DIFFERENCE else f"{agreement.relative_difference:+.2%}"
    links = "" if answer.contention is None else ", on links of their own"
    console.print(
        f"\nAt the load that estimate prices{links}: {seconds(agreement.event_driven_s)} event by event, "
        f"{seconds(agreement.analytical_s)} analytically ({verdict})."
    )
