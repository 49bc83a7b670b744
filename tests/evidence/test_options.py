import pytest

from deploy.errors import UsageError
from deploy.evidence.options import ToleranceOptions
from deploy.evidence.parity import TOLERANCES


def test_what_is_not_given_is_that_of_the_precision() -> None:
    found = ToleranceOptions(min_sqnr=3.0, rtol=0.0).tolerance("int8")
    assert (found.min_sqnr, found.rtol) == (3.0, 0.0)
    assert (found.atol, found.min_cosine) == (TOLERANCES["int8"].atol, TOLERANCES["int8"].min_cosine)
    assert ToleranceOptions().tolerance("fp16") == TOLERANCES["fp16"]


def test_limits_that_nothing_can_meet_are_refused() -> None:
    with pytest.raises(UsageError, match="`min_cosine` must be at most 1"):
        ToleranceOptions(min_cosine=1.5).tolerance("fp32")
    with pytest.raises(UsageError, match="0 or more"):
        ToleranceOptions(rtol=-1.0).tolerance("fp16")
