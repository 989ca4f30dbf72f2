"""Row 28: what users give names to is shown in pages, and never run there."""

import re
from pathlib import Path

import pytest

from pipeline.evaluation.comparison import compare, gather
from pipeline.pages.comparison import comparison_page
from pipeline.pages.labels import Suspect, labels_page
from pipeline.prediction.labels import Doubt
from tests.unit.test_comparison import result
from tests.unit.test_report_page import LIVE, page

ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;"


@pytest.mark.parametrize("num_classes", [2, 13])
def test_no_name_in_a_report_is_html(num_classes: int, tmp_path: Path):
    """Row 28: neither of an image, nor of a class or a parameter."""
    found = page(tmp_path, num_classes)
    assert LIVE not in found
    assert re.search(rf"\d {re.escape(ESCAPED)}", found)  # an image's
    assert found.count("<script>") == 1  # that of the slider
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 1" in found
    assert not re.findall(r'(?:src|href)="(?!data:)', found)  # nothing is fetched


def test_no_name_in_a_comparison_is_html():
    """Row 28: neither of an image, nor of a class, a result or a parameter."""
    names = [f"{number} {LIVE}" for number in range(3)]
    groups = dict(
        zip(
            "AB",
            gather(
                [
                    result(LIVE, right, {"names": names, "lr": lr}, classes=["sea", LIVE])
                    for right, lr in (([10, 20, 30], "0.1"), ([50, 20, 90], LIVE))
                ]
            ),
            strict=True,
        )
    )
    found = comparison_page(groups, {"B": compare(groups["A"], groups["B"])}, None)
    assert LIVE not in found
    assert f"2 {ESCAPED}" in found


def test_no_name_on_the_page_of_labels_is_html():
    """Row 28: neither of an image, nor of a class."""
    doubt = Doubt(0.1, 0.5, 4, box=(0, 0, 2, 2), label=LIVE, prediction=LIVE)
    found = labels_page([Suspect(f"1 {LIVE}", doubt, {})], 1, [(LIVE, (1, 2, 3))])
    assert LIVE not in found
    assert found.count(ESCAPED) >= 4
