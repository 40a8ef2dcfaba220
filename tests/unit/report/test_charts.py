from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly import graph_objects as go

from moesim.describe.hardware_library import HardwareLibrary
from moesim.estimation.loading import LoadedScenario, load
from moesim.report.charts import write_breakdown_chart, write_memory_chart, write_scaling_chart
from moesim.report.pages import Fact, Note, replace_file, write_chart

WRITERS = [write_breakdown_chart, write_memory_chart, write_scaling_chart]
Writer = Callable[[LoadedScenario, Path], None]


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def loaded() -> LoadedScenario:
    return load("m6t_1t_v100x480", library=HardwareLibrary())


@pytest.mark.parametrize("write", WRITERS)
def test_chart_is_one_file_that_loads_nothing(write: Writer, loaded: LoadedScenario, tmp_path: Path) -> None:
    write(loaded, tmp_path / "chart.html")
    assert [path.name for path in tmp_path.iterdir()] == ["chart.html"]
    page = (tmp_path / "chart.html").read_text(encoding="utf-8")
    tags = Tags(page)
    for tag, attributes in tags.found:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert not {"src", "href", "data", "poster"} & set(attributes), (tag, attributes)
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none';", page)
    assert "Plotly.newPlot" in page
    assert "cdn.plot.ly/plotly" not in page


@pytest.mark.parametrize("write", WRITERS)
def test_header_and_notes_say_what_was_asked(write: Writer, loaded: LoadedScenario, tmp_path: Path) -> None:
    write(loaded, tmp_path / "chart.html")
    text = " ".join(Tags((tmp_path / "chart.html").read_text(encoding="utf-8")).text)
    scenario = loaded.scenario
    for expected in (scenario.name, scenario.cluster, scenario.stack, "bounds ", "90 % interval", "W-CAP-001"):
        assert expected in text
    for path, why in scenario.assumed.items():
        assert path in text
        assert why in text


def scaling_text(folder: Path, name: str, *assignments: str) -> str:
    path = folder / "chart.html"
    write_scaling_chart(load(name, assignments=assignments, library=HardwareLibrary()), path)
    return "".join(Tags(path.read_text(encoding="utf-8")).text)


def test_scaling_chart_lists_what_is_left_out(tmp_path: Path) -> None:
    text = scaling_text(tmp_path, "mixtral_8x7b")
    reason = "2 devices do not divide into groups of tensor 1 x context 1 x pipeline 4"
    assert f"1, 2 devices, weak and strong: {reason}" in text
    assert "512, 1024 devices, strong: interleaving needs micro-batches (2) in multiples of the stages (4)" in text
    assert "Left out" not in scaling_text(tmp_path, "m6t_1t_v100x480")


def test_scaling_chart_lists_expert_degrees_that_differ(tmp_path: Path) -> None:
    text = scaling_text(tmp_path, "mixtral_8x7b")
    assert "4, 8, 16 devices: expert degree 1, 2, 4 instead of 8" in text
    assert "Hollow points do not fit in memory" in text
    text = scaling_text(tmp_path, "gshard_600b_2048e_36l")
    assert "1, 2, 4, …, 1024 devices: expert degree 1, 2, 4, …, 1024 instead of 2048" in text
    text = scaling_text(tmp_path, "t5_base")
    assert "instead of" not in text
    assert "Hollow points" not in text


def test_chart_of_what_does_not_fit_says_so(tmp_path: Path) -> None:
    assignments = ("optimizer.kind=adam", "precision.parameters=fp32")
    loaded = load("m6t_1t_v100x480", assignments=assignments, library=HardwareLibrary())
    write_memory_chart(loaded, tmp_path / "chart.html")
    text = " ".join(Tags((tmp_path / "chart.html").read_text(encoding="utf-8")).text)
    assert "Does not fit: the fullest device needs 12.04 GiB more than the 31.74 GiB it can use." in text


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>&"
    figure = go.Figure(layout={"title": {"text": evil}})
    write_chart(
        figure,
        tmp_path / "chart.html",
        title=evil,
        subtitle=evil,
        facts=[Fact(evil, evil, evil)],
        alarm=evil,
        notes=[Note(evil, [(evil, evil)])],
    )
    assert "<script>alert" not in (tmp_path / "chart.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing/chart.html", errno.ENOENT),
        ("", errno.EISDIR),
        ("file/chart.html", errno.ENOTDIR),
        ("a\0b.html", errno.EINVAL),
        ("pipe", errno.EINVAL),
    ],
)
def test_path_that_cannot_be_written_raises_os_error(name: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r".") as caught:
        replace_file(tmp_path / name, "text")
    assert caught.value.errno == expected
    assert ".tmp" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chart.html"
    replace_file(path, "old")

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["chart.html"]


def test_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "chart.html")
    replace_file(tmp_path / "link.html", "text")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "chart.html").read_text() == "text"
