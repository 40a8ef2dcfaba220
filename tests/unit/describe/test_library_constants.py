from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim.describe.hardware_library import HardwareLibrary
from moesim.describe.library_constants import expanded_stack
from moesim.errors import FormatError
from moesim.resources import data_directory, profile_directories

STACK = Path("stack.yaml")


def tier(**stated: object) -> dict:
    document = {"collectives": {"scale_up": stated}}
    return expanded_stack(document, profile_directories(), STACK)["collectives"]["scale_up"]


def test_a_tier_gets_the_constants_of_its_library_with_their_source():
    document = json.loads((data_directory("hardware_profiles") / "libraries" / "nccl_hopper.json").read_text())
    found = tier(library="nccl_hopper")
    assert found["round_latency"] == {
        "value": document["constants"]["round_latency"],
        "kind": "fitted",
        "source": document["source"],
        "error_fraction": document["latency_error_fraction"],
    }
    assert found["quick"]["fraction"]["error_fraction"] == document["fraction_error_fraction"]


def test_what_a_tier_states_goes_before_its_library():
    assert tier(library="nccl_hopper", reduce_fraction={"value": 0.5})["reduce_fraction"] == {"value": 0.5}


def test_a_library_of_all_to_alls_replaces_the_quick_protocol_of_the_other_and_leaves_its_reductions():
    both, plain = tier(library="nccl_hopper", all_to_all_library="deepep_normal"), tier(library="nccl_hopper")
    assert "quick_all_to_all" in plain
    assert "quick_all_to_all" not in both
    assert both["reduce_fraction"] == plain["reduce_fraction"]
    assert both["all_to_all_fraction"] != plain["all_to_all_fraction"]


def test_tiers_without_a_library_and_documents_of_another_form_stay_as_they_are():
    document = {"collectives": {"torus": {"round_latency": 1}}}
    assert expanded_stack(document, profile_directories(), STACK) == document
    for odd in ([], {"collectives": 3}, {"collectives": {"scale_up": 3}}):
        assert expanded_stack(odd, profile_directories(), STACK) == odd


def test_an_unknown_library_is_an_error_with_the_nearest_name():
    with pytest.raises(FormatError) as raised:
        tier(library="nccl_hoper")
    problem = raised.value.problems[0]
    assert (problem.code, problem.field) == ("E-SCN-009", "collectives.scale_up.library")
    assert "nccl_hopper" in problem.remedy


def test_a_damaged_library_of_a_user_is_an_error_that_names_its_file(tmp_path):
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / "mine.json").write_text('{"constants": {}, "kind": 3')
    document = {"collectives": {"scale_up": {"library": "mine"}}}
    with pytest.raises(FormatError) as raised:
        expanded_stack(document, [tmp_path], STACK)
    assert raised.value.problems[0].file == str(tmp_path / "libraries" / "mine.json")


def test_libraries_never_measured_say_so_and_allow_a_factor_of_two():
    """0.42 is one standard deviation where 1.645 of them are log 2."""
    folder = data_directory("hardware_profiles") / "libraries"
    for name in ("tcpx", "tcpxo", "slingshot", "pcie_host"):
        document = json.loads((folder / f"{name}.json").read_text())
        assert document["kind"] == "assumed"
        assert "never measured" in document["source"]
        assert document["latency_error_fraction"] >= 0.42


@pytest.mark.parametrize("name", HardwareLibrary().names("stacks"))
def test_every_shipped_stack_has_whole_tiers(name):
    for found in HardwareLibrary().stack(name).collectives.values():
        assert 0 < found.reduce_fraction.value <= 1
        assert 0 < found.all_to_all_fraction.value <= 1
