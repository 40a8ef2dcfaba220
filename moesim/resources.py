"""Files: where profiles and scenarios lie (a checkout or the wheel), and how an output is replaced in one go."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PROFILES, SCENARIOS = "hardware_profiles", "scenarios"


def data_directory(name: str) -> Path:
    """Directory of shipped data: beside the package in a checkout, else in its ``_data``.

    Raises
    ------
    FileNotFoundError
        If neither exists: the installation is damaged.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package.parent / name, package / "_data" / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"moesim's {name} are missing; install moesim again")


def find_scenario(text: str) -> Path:
    """Path of a scenario: as given, or the shipped scenario of that bare name."""
    path = Path(text)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    shipped = data_directory(SCENARIOS) / f"{text}.yaml"
    return shipped if shipped.exists() else path


def shipped_scenarios() -> list[Path]:
    """All shipped scenarios, by name."""
    return sorted(data_directory(SCENARIOS).glob("*.yaml"))


def profile_directories(extra: Sequence[Path] = ()) -> list[Path]:
    """Directories that are searched for profiles: the user's first, then the shipped ones."""
    return [*extra, data_directory(PROFILES)]


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file by way of a new one beside it, so that no reader ever sees half of it.

    Parameters
    ----------
    path : Path
        A regular file or nothing yet; of a link, what it points to is replaced when the block ends without an error.

    Yields
    ------
    BinaryIO
        What to write to.

    Raises
    ------
    OSError
        If that is not possible; it names ``path``, and nothing is left behind.
    """
    try:
        target = _writable_target(path)
        beside = target.with_name(f".moesim-{os.urandom(8).hex()}.tmp")
        try:
            with open(beside, "xb") as stream:
                yield stream
            os.replace(beside, target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _named(error, path) from error


def check_writable(path: Path) -> None:
    """Raise the OSError that writing ``path`` would end with, as far as that can be known without writing it."""
    try:
        target = _writable_target(path)
        folder = target.parent
        if not folder.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _named(error, path) from error


def _named(error: OSError, path: Path) -> OSError:
    """Build the same error about the file that the user named."""
    name = str(path)
    return OSError(error.errno, error.strerror, name if name.isprintable() else repr(name))


def _writable_target(path: Path) -> Path:
    """File behind a path: a regular one, or none yet."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not stat.S_ISREG(target.stat().st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
    except ValueError as error:  # a NUL or a lone surrogate in the name
        raise OSError(errno.EINVAL, "not the name of a file") from error
    return target
