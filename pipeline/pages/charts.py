"""Line charts as SVG: here numbers become places, charts.html draws them."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 230  # a phone's width, so that text is no smaller there than written
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 42  # what is around the lines
STEPS = (1, 2, 2.5, 5, 10)

Points = Sequence[tuple[float, float]]


class Tick(NamedTuple):
    """A mark of an axis: where, and what stands there."""

    place: float
    label: str


class Line(NamedTuple):
    """A line by its name, and the points that it goes through."""

    name: str
    points: list[tuple[float, float]]


class Chart(NamedTuple):
    """What the macro `chart` of charts.html draws."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    dots: bool
    diagonal: str | None

    @property
    def frame(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the field of lines."""
        return LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM

    @property
    def box(self) -> str:
        """What the SVG shows: all of WIDTH and HEIGHT."""
        return f"0 0 {WIDTH} {HEIGHT}"


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    unit: bool = False,
    dots: bool = False,
    diagonal: str | None = None,
) -> Chart | None:
    """The chart of some lines, by their names; None without any point.

    Both axes begin at 0, and with `unit` they end at 1. `diagonal` names a line between corners.
    """
    shown = {name: [point for point in points if _finite(point)] for name, points in lines.items()}
    every = [point for points in shown.values() for point in points]
    if not every:
        return None
    width, height = (1.0, 1.0) if unit else (max(values) for values in zip(*every, strict=True))
    width = width or 1.0
    y_steps = _steps(height)
    x_steps = [step for step in _steps(width) if step <= width]
    left, top, right, bottom = LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return round(left + (right - left) * x / width, 1)

    def up(y: float) -> float:
        return round(bottom - (bottom - top) * y / y_steps[-1], 1)

    return Chart(
        title,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[Tick(across(x), f"{x:g}") for x in x_steps],
        y_ticks=[Tick(up(y), f"{y:g}") for y in y_steps],
        lines=[
            Line(name, [(across(x), up(y)) for x, y in points]) for name, points in shown.items()
        ],
        dots=dots,
        diagonal=diagonal,
    )


def _finite(point: tuple[float, float]) -> bool:
    return all(map(math.isfinite, point))


def _steps(end: float) -> list[float]:
    """Round numbers from 0 to the first one that reaches `end`, at most six."""
    if end <= 0:
        return [0, 1]
    size = 10.0 ** math.floor(math.log10(end / 5))
    step = next(size * one for one in STEPS if size * one * 5 >= end * (1 - 1e-9))
    count = math.ceil(end / step - 1e-9)
    return [round(step * number, 12) for number in range(count + 1)]
