"""Where the points and marks of a chart lie."""

import math

import pytest

from pipeline.pages.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_chart


def test_a_line_reaches_from_corner_to_corner():
    chart = line_chart("Loss", {"loss": [(0, 0), (350, 2), (700, 4)]}, x_label="x", y_label="y")
    middle = (LEFT + WIDTH - RIGHT) / 2
    assert chart.lines[0].points == [
        (LEFT, HEIGHT - BOTTOM),
        (middle, (TOP + HEIGHT - BOTTOM) / 2),
        (WIDTH - RIGHT, TOP),
    ]
    assert [tick.label for tick in chart.x_ticks] == ["0", "200", "400", "600"]
    assert [tick.label for tick in chart.y_ticks] == ["0", "1", "2", "3", "4"]
    assert chart.y_ticks[0].place == HEIGHT - BOTTOM
    assert chart.y_ticks[-1].place == TOP


@pytest.mark.parametrize(
    ("end", "labels"),
    [
        (0.27, ["0", "0.1", "0.2", "0.3"]),
        (1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (80000, ["0", "20000", "40000", "60000", "80000"]),
        (0, ["0", "1"]),
    ],
)
def test_marks_are_round_numbers(end: float, labels: list[str]):
    chart = line_chart("Loss", {"loss": [(1, end)]}, x_label="x", y_label="y")
    assert [tick.label for tick in chart.y_ticks] == labels


def test_what_is_undefined_is_left_out():
    nan = math.nan
    chart = line_chart("Loss", {"a": [(1, nan), (2, 1)], "b": [(1, nan)]}, x_label="", y_label="")
    assert [len(line.points) for line in chart.lines] == [1, 0]
    assert line_chart("Loss", {"a": [(1, nan)]}, x_label="", y_label="") is None
