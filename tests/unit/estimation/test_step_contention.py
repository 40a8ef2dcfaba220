"""What contention adds to the parts of a step."""

from __future__ import annotations

import numpy as np

from moesim.estimation.step_contention import Contention


def contention(**added_s: float) -> Contention:
    total = sum(added_s.values())
    return Contention(10.0, 10.0 + total, total, 0.0, (), {name: np.array([each]) for name, each in added_s.items()})


def parts(**seconds: float) -> dict[str, np.ndarray]:
    return {name: np.array([[each, 2.0 * each]]) for name, each in seconds.items()}


def test_what_becomes_longer_is_added() -> None:
    found = contention(all_to_all=2.0, host=-0.5).added_to(parts(all_to_all=4.0, host=1.0))
    assert found["all_to_all"].tolist() == [[6.0, 10.0]]
    assert found["host"].tolist() == [[0.5, 1.5]]


def test_waiting_that_is_not_there_cannot_become_shorter() -> None:
    """Only 0.25 of 0.5 can go on the first rank; the other 0.25 comes off what is longer, in proportion."""
    found = contention(all_to_all=1.5, data_parallel=0.5, host=-0.5).added_to(
        parts(all_to_all=4.0, data_parallel=1.0, host=0.25)
    )
    np.testing.assert_allclose(found["host"], [[0.0, 0.0]], atol=1e-15)
    np.testing.assert_allclose(found["all_to_all"][0], [5.5 - 0.75 * 0.25, 9.5])
    np.testing.assert_allclose(found["data_parallel"][0], [1.5 - 0.25 * 0.25, 2.5])
    np.testing.assert_allclose(sum(found.values()), [[5.25 + 1.5, 10.5 + 1.5]])
