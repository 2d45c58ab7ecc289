"""Old names of arguments."""

from __future__ import annotations

import pytest

from shiradelta import ArgumentError
from shiradelta.util.deprecated import renamed_arguments


@renamed_arguments(rate="lr")
def example(lr: float = 1.0) -> float:
    return lr


def test_an_old_keyword_is_taken_with_a_warning_at_the_caller():
    assert example(lr=2.0) == 2.0
    with pytest.warns(DeprecationWarning, match="rate is deprecated; use lr") as caught:
        assert example(rate=3.0) == 3.0
    assert caught[0].filename == __file__


def test_the_old_and_the_new_keyword_together_are_refused():
    with pytest.raises(ArgumentError, match="give lr"):
        example(rate=3.0, lr=2.0)
