"""``moesim topology show``: figures, JSON, drawing, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_topology_show_prints_links_by_tier_degree_diameter_bisection_and_what_is_assumed(capsys):
    code, out, err = run(capsys, "topology", "show", "h100_sxm_hgx_nodes", "--devices", "512")
    assert (code, err) == (0, "")
    for text in ("scale_up", "scale_out", "links of a device", "diameter", "12.8 TB/s one direction", "Assumed"):
        assert text in out


def test_topology_as_json_is_one_object_with_the_cube_mesh_of_a_dgx_1(capsys):
    code, out, err = run(capsys, "topology", "show", "v100_sxm2_32gb_8", "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["degree"] == {"least": 4, "most": 4}
    assert answer["diameter"] == 2
    assert answer["bisection_bytes_per_s"] == pytest.approx(150e9, rel=1e-5)
    assert answer["links"][0]["total_bytes_per_s"] == pytest.approx(8 * 150e9)
    assert answer["assumptions"] == []


def test_a_slice_of_a_closed_torus_is_open(capsys):
    """64 of 256 chips: 16 x 4, closed along the full axis only, so the cut across it crosses two links per row."""
    code, out, _ = run(capsys, "topology", "show", "tpu_v5e_16x16", "--devices", "64", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["links"][0]["count"] == 2 * (4 * 16 + 3 * 16)
    assert answer["bisection_bytes_per_s"] == pytest.approx(2 * 4 * 45e9, rel=1e-5)


def test_the_drawing_is_one_file_that_says_it_is_a_piece(capsys, tmp_path: Path):
    path = tmp_path / "network.html"
    code, _, _ = run(capsys, "topology", "show", "tpu_v3_32x32", "--out", str(path))
    page = path.read_text(encoding="utf-8")
    assert code == 0
    assert "A piece: " in page
    assert "of 2,048 devices" in page
    assert "src=" not in page.split("</script>")[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["h100_sxm_hgx_node"], "E-SCN-009", "did you mean"),
        (["h100_sxm_8", "--devices", "9"], "E-NET-003", "it has 8"),
        (["h100_sxm_hgx_nodes", "--devices", "12"], "E-NET-003", "whole nodes"),
        (["tpu_v3_8x8", "--devices", "7"], "E-NET-003", "whole chips"),
        (["h100_sxm_8", "--out", "network.pdf"], "E-CLI-001", "ends in .html"),
        (["v100_sxm2_32gb_8", "--devices", "x"], "E-CLI-001", "--devices"),
    ],
)
def test_bad_input_ends_with_code_2_and_a_sentence(capsys, arguments, code, text):
    status, out, err = run(capsys, "topology", "show", *arguments)
    assert (status, out) == (2, "")
    assert code in err
    assert text in err


def test_two_gpus_of_a_cube_mesh_without_a_link_are_cut_off(capsys, tmp_path: Path):
    """A profile whose matrix joins nobody: the topology says who is cut off."""
    from moesim.resources import data_directory

    folder = tmp_path / "clusters"
    folder.mkdir()
    text = (data_directory("hardware_profiles") / "clusters" / "v100_sxm2_32gb_8.yaml").read_text(encoding="utf-8")
    for row, new in (
        ("id: v100_sxm2_32gb_8", "id: cut"),
        ("[2, 0, 0, 0, 0, 1, 1, 2]", "[0, 0, 0, 0, 0, 0, 0, 0]"),
        ("[0, 2, 0, 0, 1, 0, 2, 1]", "[0, 2, 0, 0, 0, 0, 2, 1]"),
        ("[0, 0, 1, 0, 1, 2, 0, 2]", "[0, 0, 1, 0, 0, 2, 0, 2]"),
        ("[0, 0, 0, 1, 2, 1, 2, 0]", "[0, 0, 0, 1, 0, 1, 2, 0]"),
        ("[0, 1, 1, 2, 2, 0, 0, 0]", "[0, 1, 1, 2, 0, 0, 0, 0]"),
    ):
        assert row in text
        text = text.replace(row, new)
    (folder / "cut.yaml").write_text(text, encoding="utf-8")
    status, _, err = run(capsys, "topology", "show", "cut", "--profiles", str(tmp_path))
    assert status == 2
    assert "E-NET-001" in err
    assert "such as device 4" in err
