from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import ERROR_CODES, UnitError
from moesim.units import DIMENSIONS, Dimension, format_quantity, parse_quantity


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("900 GB/s", "bytes_per_s", 9e11),
        ("25 Gb/s", "bytes_per_s", 3.125e9),
        ("100 Gbit/s", "bytes_per_s", 1.25e10),
        ("1 MiB/s", "bytes_per_s", 1048576.0),
        ("31.7 GiB", "bytes", 31.7 * 2**30),
        ("32GB", "bytes", 3.2e10),
        ("0 B", "bytes", 0.0),
        ("15.7 TFLOP/s", "flop_per_s", 1.57e13),
        ("1e3 EFLOP/s", "flop_per_s", 1e21),
        ("2.5 us", "seconds", 2.5e-6),
        ("2.5 \u00b5s", "seconds", 2.5e-6),
        ("2.5 \u03bcs", "seconds", 2.5e-6),
        ("1 d", "seconds", 86400.0),
        ("1.38 GHz", "hertz", 1.38e9),
        ("300 W", "watts", 300.0),
        ("3.06 USD/h", "usd_per_hour", 3.06),
        (".5 ms", "seconds", 5e-4),
        ("5. ms", "seconds", 5e-3),
        ("1E2 ms", "seconds", 0.1),
        ("5 EB/s", "bytes_per_s", 5e18),
        ("5EB/s", "bytes_per_s", 5e18),
    ],
)
def test_text_with_a_unit_becomes_si(text: str, dimension: Dimension, value: float) -> None:
    assert parse_quantity(text, dimension) == value


MALFORMED: list[tuple[object, str, str]] = [
    ("", "E-SCN-005", "'' is empty"),
    ("GB/s", "E-SCN-005", "does not begin with a number"),
    ("x" * 65, "E-SCN-005", "has 65 characters, a quantity has at most 64"),
    (" 5 GB/s", "E-SCN-005", "has spaces around it; write '5 GB/s'"),
    ("5  GB/s", "E-SCN-005", "has more than one space inside; write '5 GB/s'"),
    ("1.2.3 GB/s", "E-SCN-005", "begins with '1.2.3', which is not a number"),
    ("2,5 GB/s", "E-SCN-005", "has a separator in its number; write '25 GB/s', or '2.5 GB/s'"),
    ("nan GB/s", "E-SCN-007", "'nan GB/s' is not a finite number"),
    ("-3 GB/s", "E-SCN-007", "'-3 GB/s' is negative"),
    ("1e300 EB/s", "E-SCN-007", "is too large for a number"),
    ("1e-400 B/s", "E-SCN-007", "is too small for a number"),
    ("900", "E-SCN-005", "'900' has no unit; add a unit, such as '900 GB/s'; the units are B/s, kB/s"),
    (900, "E-SCN-005", "the number 900 has no unit; add a unit, such as '900 GB/s'"),
    (-900, "E-SCN-007", "-900 is negative and has no unit"),
    (math.nan, "E-SCN-007", "nan is not a finite number; write"),
    (True, "E-SCN-006", "found true or false, but a rate of data is needed"),
    (None, "E-SCN-006", "found null"),
    ([], "E-SCN-006", "found a list"),
    ("900 GB", "E-SCN-005", "'900 GB' is an amount of data, a rate such as '900 GB/s' is needed"),
    ("300 W", "E-SCN-005", "'300 W' is a power, a rate such as '900 GB/s' is needed"),
    ("5 gb/s", "E-SCN-005", "write '5 GB/s' or '5 Gb/s': B is a byte, b a bit"),
    ("5 GB/sec", "E-SCN-005", "has the unknown unit 'GB/sec'; did you mean '5 GB/s'?"),
    ("5 GB/s\n", "E-SCN-005", "has spaces around it"),
    ("5 banana", "E-SCN-005", "has the unknown unit 'banana'; the units are"),
]


@pytest.mark.parametrize(("text", "code", "sentence"), MALFORMED)
def test_malformed_text_is_refused_with_its_own_sentence(text: str, code: str, sentence: str) -> None:
    with pytest.raises(UnitError) as caught:
        parse_quantity(text, "bytes_per_s")
    assert sentence in str(caught.value)
    assert caught.value.code == code


def test_no_two_kinds_of_malformed_text_share_a_sentence() -> None:
    assert len({sentence for _, _, sentence in MALFORMED}) == len(MALFORMED)


@pytest.mark.parametrize("number", ["+5", "1e", "1e+", "0x10", "5E", "1.5e3.2"])
def test_what_only_looks_like_a_number_is_named(number: str) -> None:
    with pytest.raises(UnitError, match="which is not a number"):
        parse_quantity(f"{number} GB/s", "bytes_per_s")


@pytest.mark.parametrize("text", ["\uff19\uff10\uff10 GB/s", "\u0663 GB/s", "- 5 GB/s", "\0", "$5"])
def test_only_ascii_digits_begin_a_number(text: str) -> None:
    with pytest.raises(UnitError, match="does not begin with a number"):
        parse_quantity(text, "bytes_per_s")


@pytest.mark.parametrize(
    ("text", "meant"),
    [("100 Gbps", "100 Gb/s"), ("100 GBps", "100 GB/s"), ("5 Gbits/s", "5 Gb/s"), ("5 Gib/s", "5 GiB/s")],
)
def test_advice_never_turns_bits_into_bytes(text: str, meant: str) -> None:
    with pytest.raises(UnitError) as caught:
        parse_quantity(text, "bytes_per_s")
    assert f"'{meant}'" in caught.value.remedy


@pytest.mark.parametrize(("text", "meant"), [("5 TFLOPS", "5 TFLOP/s"), ("5 TFLOPs", "5 TFLOP/s")])
def test_vendors_ways_to_write_flop_rates_are_understood_by_the_advice(text: str, meant: str) -> None:
    with pytest.raises(UnitError, match=f"did you mean '{meant}'"):
        parse_quantity(text, "flop_per_s")


def test_an_amount_of_memory_in_bits_is_refused_with_both_readings() -> None:
    with pytest.raises(UnitError, match="write '2 GB' if bits are meant, '16 GB' if bytes are meant"):
        parse_quantity("16 Gb", "bytes")
    with pytest.raises(UnitError, match="is in bits"):
        parse_quantity("1e99999999999999999999 Gbit", "bytes")


@pytest.mark.parametrize("huge", [10**400, -(10**5000)], ids=["positive", "negative"])
def test_a_huge_bare_integer_has_a_sentence(huge: int) -> None:
    with pytest.raises(UnitError) as caught:
        parse_quantity(huge, "bytes")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "dimension", "text"),
    [
        (0, "seconds", "0 s"),
        (0, "bytes_per_s", "0 B/s"),
        (3.125e9, "bytes_per_s", "3.12 GB/s"),
        (999.96e6, "bytes_per_s", "1 GB/s"),
        (999.4e6, "bytes_per_s", "999 MB/s"),
        (32 * 2**30, "bytes", "32 GiB"),
        (-(2**31), "bytes", "-2 GiB"),
        (512, "bytes", "512 B"),
        (1e-6, "seconds", "1 us"),
        (90, "seconds", "90 s"),
        (7200, "seconds", "120 min"),
        (12345.6, "usd_per_hour", "12300 USD/h"),
        (1e300, "bytes", "8.67e281 EiB"),
        (1e-30, "seconds", "1e-18 ps"),
    ],
)
def test_the_unit_that_reads_best_is_chosen(value: float, dimension: Dimension, text: str) -> None:
    assert format_quantity(value, dimension) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_finite_numbers_are_written(value: float) -> None:
    with pytest.raises(UnitError, match="use a finite number"):
        format_quantity(value, "seconds")


@pytest.mark.parametrize("digits", [0, 18])
def test_digits_beyond_a_double_are_refused(digits: int) -> None:
    with pytest.raises(ValueError, match=f"digits = {digits} is outside 1 to 17"):
        format_quantity(1.0, "seconds", digits=digits)


@settings(max_examples=300)
@given(
    value=st.floats(min_value=1e-300, max_value=1e300) | st.floats(min_value=1e-9, max_value=1e18),
    dimension=st.sampled_from(DIMENSIONS),
    digits=st.integers(1, 17),
)
def test_what_is_written_reads_back_to_the_given_digits(value: float, dimension: Dimension, digits: int) -> None:
    read = parse_quantity(format_quantity(value, dimension, digits=digits), dimension)
    assert math.isclose(read, value, rel_tol=max(0.5000001 * 10.0 ** (1 - digits), 4e-16))


def _check_is_complete(error: UnitError) -> None:
    assert error.code in ERROR_CODES
    assert error.message
    assert error.remedy


@settings(max_examples=300)
@given(
    text=st.text(max_size=80) | st.from_regex(r"[-+]?[0-9.eE,_]{1,9} ?[kKMGTi]{0,2}[bBsW]?(/s)?", fullmatch=True),
    dimension=st.sampled_from(DIMENSIONS),
)
def test_any_text_is_a_quantity_or_has_a_sentence(text: str, dimension: Dimension) -> None:
    try:
        value = parse_quantity(text, dimension)
    except UnitError as error:
        _check_is_complete(error)
    else:
        assert math.isfinite(value)
        assert math.copysign(1.0, value) == 1.0


@given(st.integers(0, 10**6), st.sampled_from(["", "k", "M", "G", "T"]))
def test_eight_bits_are_a_byte_and_binary_prefixes_exceed_decimal_ones(number: int, prefix: str) -> None:
    in_bytes = parse_quantity(f"{number} {prefix}B/s", "bytes_per_s")
    assert parse_quantity(f"{8 * number} {prefix}b/s", "bytes_per_s") == in_bytes
    if prefix and number:
        assert parse_quantity(f"{number} {prefix.upper()}iB/s", "bytes_per_s") > in_bytes
