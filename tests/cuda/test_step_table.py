"""The page with the waits and operations of a step."""

import pytest
import torch
from helpers import step_table
from helpers.cuda_device import HAS_CUDA, ROOT


@pytest.mark.slow
@pytest.mark.skipif(HAS_CUDA, reason="a real device is here")
def test_the_page_has_the_counts():
    """The number of operations belongs to a version of torch."""
    page = (ROOT / "docs" / "results" / "device-steps.md").read_text()
    found = [line for line in page.splitlines() if line.startswith("| absld")]
    rows = step_table.rows()
    if f"torch {torch.__version__}" not in page:
        found, rows = ([row.split("|")[:4] for row in table] for table in (found, rows))
    assert found == rows
