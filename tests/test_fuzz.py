"""Random input for the readers; tests/faults/fuzz.py tries thousands of examples."""

import pytest

pytest.importorskip("hypothesis")

from faults.fuzz import READERS, fuzz


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_nothing_but_a_user_error_comes_out(name):
    count = fuzz(name, examples=200)
    assert count["taken"] and count["refused"], "the examples should be of both kinds"
