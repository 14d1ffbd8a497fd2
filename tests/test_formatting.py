import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_moe.formatting import markdown_table, rounded, significant, speed


@pytest.mark.parametrize(
    ("number", "decimals", "digits", "shown"),
    [
        (2.1, 2, 3, "2.10"),
        (0.0291, 2, 3, "0.0291"),
        (0.0999, 1, 1, "0.10"),
        (-0.004, 2, 1, "-0.004"),
        (12345.6, 0, 3, "12346"),
        (1.5e-12, 3, 2, "1.5e-12"),
        (0.0, 2, 3, "0.00"),
        (math.inf, 2, 3, "inf"),
    ],
)
def test_a_number_is_shown_with_its_decimals_and_never_as_nothing(number, decimals, digits, shown):
    assert rounded(number, decimals, digits) == shown


@given(st.floats(-1e300, 1e300), st.integers(0, 4), st.integers(1, 4))
def test_what_is_shown_is_the_number_to_its_digits(number, decimals, digits):
    shown = float(rounded(number, decimals, digits))
    assert shown == pytest.approx(number, rel=0.5 * 10 ** (1 - digits) * 1.001, abs=5e-324)
    assert significant(number, digits) == pytest.approx(number, rel=0.5 * 10 ** (1 - digits) * 1.001, abs=5e-324)


def test_speeds_are_whole_where_they_are_high():
    assert [speed(each) for each in (12345.6, 99.44, 0.0312)] == ["12,346", "99.4", "0.0312"]


def test_columns_line_up_numbers_stand_on_the_right_and_empty_columns_are_left_out():
    columns = {
        "name": ["a|b", "longer"],
        "value": ["1.5", "**−12** [1, 2]"],
        "unknown": ["", ""],
        "floor": ["≈ 2", ""],
        "mixed": ["3", "x"],
    }
    assert markdown_table(columns.items()).splitlines() == [
        "| name   |          value | floor | mixed |",
        "| ------ | -------------: | ----: | ----- |",
        "| a\\|b   |            1.5 |   ≈ 2 | 3     |",
        "| longer | **−12** [1, 2] |     – | x     |",
    ]
