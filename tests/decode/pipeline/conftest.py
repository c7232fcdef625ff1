"""A folder with the input of a run that is killed or shared."""

import pytest
from processes import LINES


@pytest.fixture
def source(tmp_path):
    """The folder of src.txt: 60 sentences and two blank lines."""
    (tmp_path / "src.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return tmp_path
