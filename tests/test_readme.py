"""What README.md claims of pipelines follows from the code."""

import diffusers
import pytest
from support_table import README, updated_readme

from dit_sparse import supported_pipelines

PIPELINES = [name for names in supported_pipelines().values() for name in names]


def test_readme_has_the_current_table():
    assert README.read_text() == updated_readme(), "stale: run python tests/support_table.py"


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_of_the_table_is_in_this_diffusers(name):
    """Under `make test-matrix`, in the oldest one too."""
    assert hasattr(diffusers, name)
