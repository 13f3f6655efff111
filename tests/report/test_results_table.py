"""Every result is in the text once, beside its standard error."""

from lit_puzzle.report.results_table import WIDTH, number_text, results_text


def test_keys_become_rows_and_columns_with_their_errors() -> None:
    results = {
        "accuracy": 0.5,
        "accuracy/low": 0.25,
        "accuracy_se/low": 0.125,
        "tokens/low": 7,
        "accuracy/low/sums": 1.0,
        "reward/first": -0.5,
    }
    assert results_text(results) == [
        "accuracy 0.5",
        "           accuracy       tokens",
        "low        0.25 ± 0.125   7",
        "low/sums   1",
        "        reward",
        "first   -0.5",
    ]
    assert results_text({"a/low/gain": 0.5, "a/low/gain_se": 0.25}) == ["           a", "low/gain   0.5 ± 0.25"]


def test_wide_tables_and_many_keys_are_several_groups_of_lines() -> None:
    results = {f"a_rather_long_name_{index}{end}": index for index in range(40) for end in ("", "/x")}
    lines = results_text(results)
    assert max(map(len, lines)) <= WIDTH
    for index in range(40):
        assert sum(f"a_rather_long_name_{index} " in f"{line} " for line in lines) == 2


def test_an_error_without_its_value_is_a_result() -> None:
    assert results_text({"a_se": 0.5}) == ["a_se 0.5"]


def test_numbers_have_four_digits_and_whole_numbers_all() -> None:
    assert [number_text(x) for x in (0.123456, 12345.6, 1234567, True, "mip", None)] == [
        *("0.1235", "12,346", "1,234,567", "True", "mip", "None")
    ]
