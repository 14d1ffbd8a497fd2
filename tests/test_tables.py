from dit_moe.tables import markdown_table


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
