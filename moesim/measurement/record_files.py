"""Files of results: one JSON object per line, appended whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from moesim.errors import FormatError, Problem, ScenarioError

Json: TypeAlias = str | int | float | bool | list["Json"] | dict[str, "Json"] | None
Record = dict[str, Json]

SCHEMA_VERSION = 1
KINDS = ("session", "result", "skip", "end")
FINISHED = ("result", "skip")
_BEGIN = b'{"record": "'


@dataclass(frozen=True, slots=True)
class RecordFile:
    """A file that grows line by line and survives a kill at any moment."""

    path: Path

    def append(self, record: Mapping[str, Json]) -> None:
        """Append one line by a single write, and wait until it is on the disk.

        Parameters
        ----------
        record : mapping
            Its first key is ``record``, one of :data:`KINDS`.

        Raises
        ------
        ScenarioError
            If the disk is full or the file cannot be written.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                written = os.write(file, line)
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise _unwritable(self.path, error.strerror or str(error)) from error
        if written < len(line):
            raise _unwritable(self.path, f"only {written} of {len(line)} bytes could be written; is the disk full")

    def recover(self) -> list[Record]:
        """Read what an earlier run left, and drop a last line that was torn when it was killed.

        Returns
        -------
        list of dict
            The records in their order; empty for a new file, which is then created.

        Raises
        ------
        FormatError
            If the file is something else than results; it is left as it is.
        ScenarioError
            If it cannot be written.
        """
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o644)
        except OSError as error:
            raise _unwritable(self.path, error.strerror or str(error)) from error
        with os.fdopen(file, "r+b", buffering=0) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise _unwritable(self.path, "not a regular file")
            text = opened.readall()
            whole, _, torn = text.rpartition(b"\n")
            records = [_record(self.path, number, line) for number, line in enumerate(whole.splitlines(), 1)]
            if torn:
                if torn[: len(_BEGIN)] != _BEGIN[: len(torn)]:
                    raise _alien(self.path, len(records) + 1)
                opened.truncate(len(text) - len(torn))
                os.fsync(opened.fileno())
        return records


def finished_cases(records: list[Record], session: str) -> set[str]:
    """Names of the cases that a session has results of, or gave up.

    Examples
    --------
    >>> finished_cases([{"record": "result", "session": "a", "case": "x"}, {"record": "end", "session": "a"}], "a")
    {'x'}
    """
    return {
        str(record["case"])
        for record in records
        if record["record"] in FINISHED and record.get("session") == session and "case" in record
    }


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:  # neither UTF-8 nor JSON
        raise _alien(path, number) from error
    if not isinstance(record, dict) or record.get("record") not in KINDS:
        raise _alien(path, number)
    return record


def _alien(path: Path, line: int) -> FormatError:
    problem = Problem(
        "E-FMT-013",
        "the file exists and this line is no record of a measurement",
        "choose another --out, or remove the file",
        str(path),
        line,
    )
    return FormatError([problem])


def _unwritable(path: Path, why: str) -> ScenarioError:
    remedy = "choose a file in a folder that exists and may be written"
    return ScenarioError([Problem("E-OUT-001", f"{str(path)!r} cannot be written: {why}", remedy, field="--out")])
