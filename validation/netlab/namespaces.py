"""Network namespaces, veth pairs, bridges and token buckets: made, found again, and removed, whoever left them."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moesim.errors import Problem, ScenarioError

PREFIX = "netlab"
NETNS_FOLDER = Path("/run/netns")
CLONE_NEWNET = 0x40000000
TOOLS = ("ip", "tc")


def lab_problem(message: str, remedy: str, field: str | None = None) -> Problem:
    """Reason why the lab cannot run, in the words of the person who started it."""
    return Problem(code="E-NET-004", message=message, remedy=remedy, field=field)


def missing_requirements() -> list[Problem]:
    """Everything this machine lacks; empty where the lab can run.

    Returns
    -------
    list of Problem
        Not root, tools that are missing, namespaces or token buckets that the kernel refuses.
    """
    problems = []
    if os.geteuid() != 0:
        message = "the network lab makes network namespaces, and only root may do that"
        problems.append(lab_problem(message, "start it as root, such as with sudo"))
    for tool in TOOLS:
        if shutil.which(tool) is None:
            message = f"the program {tool!r} is not installed, which the lab builds its networks with"
            problems.append(lab_problem(message, "install iproute2 (Debian: apt-get install iproute2)"))
    return problems or _refusals()


def _refusals() -> list[Problem]:
    """Try a shaped veth pair: containers may have the tools and not the right."""
    run = RunNames("try")
    try:
        commands = Commands()
        namespace = run.name("a")
        commands.run(f"ip netns add {namespace}")
        commands.run(f"ip -n {namespace} link add e0 type veth peer name e1")
        commands.run(f"tc -n {namespace} qdisc add dev e0 root tbf rate 1mbit burst 16kb limit 64kb")
        commands.run(f"ip -n {namespace} link add br0 type bridge")
    except ScenarioError as error:
        message = f"this machine lets nobody build networks: {error.problems[0].message}"
        return [lab_problem(message, "use a machine, or a container with NET_ADMIN, whose kernel has veth and tbf")]
    finally:
        remove_namespaces(run.existing())
    return []


class Commands:
    """Runs ``ip`` and ``tc``; a failure says which command and why."""

    def run(self, line: str, text: str = "") -> str:
        """Run one command, with text as its input, and return what it prints.

        Raises
        ------
        ScenarioError
            E-NET-004 if it fails.
        """
        done = subprocess.run(shlex.split(line), capture_output=True, text=True, check=False, input=text)
        if done.returncode:
            words = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
            remedy = "see whether the kernel has veth, bridge, sch_tbf, sch_htb and cls_u32"
            raise ScenarioError([lab_problem(f"{line}: {words}", remedy)])
        return done.stdout

    def run_all(self, lines: Iterable[str]) -> None:
        """Run commands in their order; neighbours of the same program and namespace by one process."""
        for start, commands in itertools.groupby(lines, key=_batch):
            if start is None:
                for line in commands:
                    self.run(line)
            else:
                self.run(f"{start} -batch -", "".join(f"{line[len(start) :]}\n" for line in commands))


def _batch(line: str) -> str | None:
    """Start that commands of one batch share: ``ip -n NAME`` and ``tc -n NAME``; None for all others."""
    words = line.split(" ", 3)
    return " ".join(words[:3]) if words[0] in TOOLS and words[1] == "-n" else None


class RunNames:
    """Names of one run's namespaces: they say whose they are, so that leftovers of a dead process are known as such."""

    def __init__(self, tag: str) -> None:
        self.stem = f"{PREFIX}-{os.getpid()}-{_start_ticks(os.getpid())}-{tag}"

    def name(self, part: str) -> str:
        """Name of a namespace."""
        return f"{self.stem}-{part}"

    def existing(self) -> list[str]:
        """Namespaces of this run that exist."""
        return [name for name in lab_namespaces() if name.startswith(f"{self.stem}-")]


def lab_namespaces() -> list[str]:
    """Namespaces of any run of the lab."""
    if not NETNS_FOLDER.is_dir():
        return []
    return sorted(entry.name for entry in NETNS_FOLDER.iterdir() if entry.name.startswith(f"{PREFIX}-"))


def leftovers() -> list[str]:
    """Namespaces whose process is gone."""
    return [name for name in lab_namespaces() if not is_owned(name)]


def is_owned(name: str) -> bool:
    """Whether the process that made a namespace still runs."""
    _, pid, ticks, *_ = [*name.split("-"), "", ""]
    return pid.isdigit() and _start_ticks(int(pid)) == ticks


def _start_ticks(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty where it does not run. Its number may be used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def sweep() -> list[str]:
    """Remove what killed runs left, and return its names."""
    found = leftovers()
    remove_namespaces(found)
    return found


def remove_namespaces(names: Sequence[str]) -> None:
    """End the processes inside namespaces and remove them; links, bridges and queues go with them."""
    for name in names:
        for pid in processes_in(name):
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, stdin=subprocess.DEVNULL)


def processes_in(name: str) -> list[int]:
    """Numbers of the processes inside a namespace."""
    command = ["ip", "netns", "pids", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return [int(word) for word in done.stdout.split()]


def enter_namespace(name: str) -> None:
    """Move the calling thread, and what it starts from now on, into a namespace.

    Raises
    ------
    OSError
        If the namespace does not exist or the right is missing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with (NETNS_FOLDER / name).open("rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {name}")


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as SIGINT does, so that context managers clean up."""

    def stop(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def namespaces(tag: str, parts: Sequence[str]) -> Iterator[dict[str, str]]:
    """Namespaces by part, for as long as the context lasts.

    Yields
    ------
    dict of str to str
        Name of each part's namespace.
    """
    run, commands = RunNames(f"{tag}{time.monotonic_ns() % 10**6:06d}"), Commands()
    names = {part: run.name(part) for part in parts}
    try:
        commands.run_all(f"ip netns add {name}" for name in names.values())
        yield names
    finally:
        remove_namespaces(run.existing())
