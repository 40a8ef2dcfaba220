"""Errors that reach a user: one tree, stable codes, a sentence for people and an object for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

ERROR_CODES: dict[str, str] = {
    "E-SCN-001": "a key that the schema does not know",
    "E-SCN-002": "a required key is missing",
    "E-SCN-003": "the degrees of parallelism do not multiply to the number of devices",
    "E-SCN-004": "one number must divide another and does not",
    "E-SCN-005": "a quantity with a wrong, missing or unknown unit",
    "E-SCN-006": "a value of the wrong type",
    "E-SCN-007": "a number out of range: negative, zero, NaN, infinite, or beyond 64 bits",
    "E-SCN-008": "a precision that the device does not have",
    "E-SCN-009": "a name (device, cluster, stack, preset) that is not in the library",
    "E-SCN-010": "a choice that is not among the legal ones",
    "E-SCN-011": "fields that contradict each other",
    "E-SCN-012": "a malformed --set assignment",
    "E-FMT-001": "a file that cannot be read: missing, a folder, not a regular file, or not permitted",
    "E-FMT-002": "a file without content",
    "E-FMT-003": "a file that is too large",
    "E-FMT-004": "a file that is not UTF-8 text",
    "E-FMT-005": "a YAML syntax error",
    "E-FMT-006": "a document with too many nodes, too deep, or an alias that contains itself",
    "E-FMT-007": "a key that is given twice",
    "E-FMT-008": "a document whose top level is not a mapping",
    "E-FMT-009": "a schema_version that this moesim does not read",
    "E-FMT-010": "a YAML tag that is not one of the plain data types",
    "E-FMT-011": "a key that is not plain, printable text",
    "E-FMT-012": "more than one YAML document in a file",
    "E-FMT-013": "a number or text that cannot be represented",
    "E-FMT-014": "a data file that lacks what it must hold",
    "E-NET-001": "a network in which some devices cannot reach others",
    "E-NET-002": "a link without bandwidth",
    "E-NET-003": "traffic that does not fit the network: ranks, groups or bytes",
    "E-NET-004": "a machine on which the network lab cannot run, or a rank of it that failed",
    "E-OUT-001": "an output that cannot be written",
    "E-CLI-001": "a command line that cannot be understood",
    "E-RUN-001": "processes of a measurement that did not find or lost each other",
    "E-FIT-001": "a configuration that does not fit into the memory of the device",
    "E-DOM-001": "a value outside the range in which the model was calibrated",
    "E-SIM-001": "a defect of moesim itself",
}
"""Every code a :class:`Problem` may carry, with its meaning in one line. Codes are never reused."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, where it is, and what to do about it.

    Parameters
    ----------
    code : str
        A key of :data:`ERROR_CODES`.
    message : str
        What was found and why it cannot be, without a final full stop.
    remedy : str
        What to do: the nearest legal value or the key that was probably meant. Empty if there is nothing to advise.
    file : str, optional
        The file as the user named it, or ``--set`` for a value given on the command line.
    line : int, optional
        Line in that file, counted from 1.
    field : str, optional
        Dotted path of the field, such as ``model.layers.0.count``.
    """

    code: str
    message: str
    remedy: str
    file: str | None = None
    line: int | None = None
    field: str | None = None

    def to_json(self) -> dict[str, str | int | None]:
        """Return the problem as a JSON object with the keys of the contract.

        Examples
        --------
        >>> Problem("E-SCN-002", "the key is missing", "add it", field="devices").to_json()["field"]
        'devices'
        """
        return {
            "code": self.code,
            "file": self.file,
            "line": self.line,
            "field": self.field,
            "message": self.message,
            "remedy": self.remedy,
        }

    def sentence(self) -> str:
        """Return the problem as one line for people; places that are not known are left out.

        Examples
        --------
        >>> Problem("E-SCN-002", "the key is missing", "add it", "a.yaml", 3, "devices").sentence()
        'a.yaml:3: devices: the key is missing; add it'
        """
        place = self.file if self.file is None or self.line is None else f"{self.file}:{self.line}"
        head = "".join(f"{part}: " for part in (place, self.field) if part)
        return head + (f"{self.message}; {self.remedy}" if self.remedy else self.message)


class MoesimError(Exception):
    """Base of every error that moesim raises on purpose.

    Parameters
    ----------
    message : str
        What was found and why it cannot be.
    remedy : str
        What to do about it.
    code : str, optional
        A key of :data:`ERROR_CODES`; each class has its own default.
    """

    default_code: ClassVar[str] = "E-SIM-001"

    def __init__(self, message: str, remedy: str = "", code: str | None = None) -> None:
        self.code = code or self.default_code
        self.message = message
        self.remedy = remedy
        super().__init__(message, remedy, self.code)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that is wrong; at least one problem."""
        return (Problem(self.code, self.message, self.remedy),)

    def __str__(self) -> str:
        """Return the sentence of the only problem, or a list of all."""
        sentences = [problem.sentence() for problem in self.problems]
        if len(sentences) == 1:
            return sentences[0]
        return "\n  ".join([f"{len(sentences)} problems:", *sentences])


class _ProblemListError(MoesimError):
    """An error that lists several problems, each with its own code and place."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        if not problems:
            raise ValueError(f"{type(self).__name__} needs at least one problem")
        first = problems[0]
        super().__init__(first.message, first.remedy, first.code)
        self._problems = tuple(problems)
        self.args = (self._problems,)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that is wrong, in the order of the document."""
        return self._problems


class ScenarioError(_ProblemListError, ValueError):
    """The input can be read, but what it says is wrong. Lists all problems together."""

    default_code = "E-SCN-011"


class FormatError(_ProblemListError, ValueError):
    """A file cannot be read as what it should be. Each problem has a file and, where it applies, a line."""

    default_code = "E-FMT-001"


class InfeasibleError(MoesimError, ValueError):
    """The input is fine, but the machine is too small for it."""

    default_code = "E-FIT-001"


class DomainError(MoesimError, ValueError):
    """A value lies outside the range in which the model was calibrated."""

    default_code = "E-DOM-001"


class UnitError(MoesimError, ValueError):
    """A text is not a quantity of the dimension that is needed."""

    default_code = "E-SCN-005"


class SimulationError(MoesimError, RuntimeError):
    """Moesim contradicts itself: a defect of ours, not of the input.

    Parameters
    ----------
    message : str
        The invariant that broke, with the numbers.
    seed : int, optional
        Seed of the run, so that it can be repeated.
    """

    default_code = "E-SIM-001"

    def __init__(self, message: str, seed: int | None = None) -> None:
        report = "this is a defect of moesim: please report it with the scenario and this message"
        super().__init__(message, report if seed is None else f"{report}, seed {seed}")
        self.seed = seed
        self.args = (message, seed)


def nearest_name(found: str, legal: Iterable[str]) -> str | None:
    """Find the legal name that was probably meant.

    Parameters
    ----------
    found : str
        What was written.
    legal : iterable of str
        What may be written.

    Returns
    -------
    str or None
        The same name in other letter case if there is one, else the most similar, else None.

    Examples
    --------
    >>> nearest_name("exprt", ["expert", "expert_tensor", "data"])
    'expert'
    >>> nearest_name("banana", ["expert", "data"]) is None
    True
    """
    from difflib import get_close_matches

    by_folded: dict[str, str] = {}
    for name in legal:
        by_folded.setdefault(name.casefold(), name)
    # Similarity costs the product of the lengths; no legal name comes near 100 characters.
    close = get_close_matches(found[:100].casefold(), list(by_folded), n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None
