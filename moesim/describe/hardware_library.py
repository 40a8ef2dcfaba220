"""Find and read hardware profiles by name; a user's directory goes before the shipped ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from moesim.describe.documents import problems_from_validation, read_document
from moesim.describe.hardware import Cluster, Device, HierarchicalFabric, Stack
from moesim.errors import FormatError, Problem, ScenarioError, nearest_name
from moesim.resources import profile_directories

ProfileKind = Literal["devices", "clusters", "stacks"]
Profile = TypeVar("Profile", Device, Cluster, Stack)


class HardwareLibrary:
    """Profiles of some directories, read when asked for and then kept."""

    def __init__(self, extra_directories: Sequence[Path] = ()) -> None:
        for directory in extra_directories:
            if not directory.is_dir():
                raise FormatError(
                    [
                        Problem(
                            code="E-FMT-001",
                            message=f"{directory} is not a folder",
                            remedy="give a folder with devices/, clusters/ or stacks/ inside",
                            file=str(directory),
                        )
                    ]
                )
        self._directories = profile_directories(extra_directories)
        self._read_already: dict[Path, Device | Cluster | Stack] = {}
        self._surfaces: dict[tuple[str, str], dict[str, Any] | None] = {}

    def names(self, kind: ProfileKind) -> list[str]:
        """Names of all profiles of a kind, sorted."""
        return sorted({path.stem for directory in self._directories for path in (directory / kind).glob("*.yaml")})

    def path(self, kind: ProfileKind, name: str) -> Path | None:
        """File of a profile; None if there is none of that name."""
        candidates = (directory / kind / f"{name}.yaml" for directory in self._directories)
        return next((path for path in candidates if path.is_file()), None)

    def device(self, name: str) -> Device:
        """Read a device profile.

        Raises
        ------
        ScenarioError
            If there is none of that name.
        FormatError
            If its file is wrong.
        """
        return self._read("devices", name, Device, "device")

    def cluster(self, name: str) -> Cluster:
        """Read a cluster profile; raises as ``device``."""
        return self._read("clusters", name, Cluster, "cluster")

    def stack(self, name: str) -> Stack:
        """Read a software stack profile; raises as ``device``."""
        return self._read("stacks", name, Stack, "stack")

    def surface(self, operator: str, device: str) -> dict[str, Any] | None:
        """Fitted surface of an operator on a device, as its JSON object; None where nothing was fitted."""
        key = (operator, device)
        if key not in self._surfaces:
            self._surfaces[key] = self._read_surface(operator, device)
        return self._surfaces[key]

    def _read_surface(self, operator: str, device: str) -> dict[str, Any] | None:
        for directory in self._directories:
            path = directory / "surfaces" / f"{operator}_{device}.json"
            if path.is_file():
                document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                return document
        return None

    def surface_devices(self, operator: str) -> list[str]:
        """Devices with a fitted surface of an operator, sorted."""
        prefix = f"{operator}_"
        paths = (path for one in self._directories for path in (one / "surfaces").glob(f"{prefix}*.json"))
        return sorted({path.stem.removeprefix(prefix) for path in paths})

    def transfer_document(self) -> dict[str, Any]:
        """Rules by which surfaces are carried to devices without one, as their JSON object.

        Raises
        ------
        FormatError
            If no directory has them.
        """
        for directory in self._directories:
            path = directory / "surfaces" / "transfer.json"
            if path.is_file():
                document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                return document
        message, remedy = "no profile directory has surfaces/transfer.json", "install moesim again"
        raise FormatError([Problem(code="E-FMT-001", message=message, remedy=remedy)])

    def _read(self, kind: ProfileKind, name: str, model: type[Profile], field: str) -> Profile:
        path = self.path(kind, name)
        if path is None:
            raise ScenarioError([self.unknown_name(kind, name, field)])
        if path not in self._read_already:
            self._read_already[path] = _read_profile(path, model)
        profile = self._read_already[path]
        assert isinstance(profile, model)
        return profile

    def unknown_name(self, kind: ProfileKind, name: str, field: str) -> Problem:
        """Problem for a name no profile has, with the nearest that exists."""
        near = nearest_name(name, self.names(kind))
        return Problem(
            code="E-SCN-009",
            message=f"no {field} is called {name!r}",
            remedy=f"did you mean {near!r}?" if near else f"see moesim hardware list for the {kind} there are",
            field=field,
        )


def _read_profile(path: Path, model: type[Profile]) -> Profile:
    document = read_document(path)
    try:
        profile: Profile = model.model_validate(document.data)
    except ValidationError as error:
        raise FormatError(list(problems_from_validation(document, error, model))) from None
    if profile.id != path.stem:
        text = f"id {profile.id!r} differs from the file's name {path.stem!r}"
        raise FormatError([document.problem("E-SCN-011", "id", text, "make them the same")])
    if isinstance(profile, Cluster):
        _check_sizes(profile, path)
    return profile


def _check_sizes(cluster: Cluster, path: Path) -> None:
    fabric = cluster.fabric
    sizes = [level.size for level in fabric.levels] if isinstance(fabric, HierarchicalFabric) else fabric.dimensions
    product = 1
    for size in sizes:
        product *= size
    lengths_agree = isinstance(fabric, HierarchicalFabric) or len(fabric.dimensions) == len(fabric.wraparound)
    if lengths_agree and cluster.device_count % product == 0:
        return
    message = f"the fabric's sizes multiply to {product}, device_count is {cluster.device_count}"
    if not lengths_agree:
        message = "dimensions and wraparound differ in length"
    problem = Problem(code="E-SCN-011", message=message, remedy="make them agree", file=str(path), field="fabric")
    raise FormatError([problem])
