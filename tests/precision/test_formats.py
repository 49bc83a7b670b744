"""Options of a conversion that cannot be meant."""

import pytest

from deploy.errors import UsageError
from deploy.precision.formats import ConvertOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "fp16 or bf16"),
        ({"precision": "bf16", "fp16_io": True}, "`fp16_io` needs the precision fp16"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(UsageError, match=message):
        ConvertOptions(**options)
