"""The options of requests, inputs and outputs: done or refused, never ignored."""

from typing import Any

import pytest

from deploy.errors import InputError
from deploy.runtime.batching.queue import NORMAL_PRIORITY
from deploy.serving.request import (
    Place,
    Wanted,
    check_options,
    check_outputs,
    elements,
    place_of_input,
    priority_of,
    timeout_of,
    wanted_output,
)


@pytest.mark.parametrize("shape", [[1] * 33, [2, -1], [2**30, 2**30]])
def test_shapes_that_no_tensor_has_are_refused(shape: list[int]) -> None:
    with pytest.raises(InputError):
        elements(shape, "x")


def test_none_and_zero_are_the_usual_priority_and_no_timeout() -> None:
    assert [priority_of(value) for value in (None, 0, 3)] == [NORMAL_PRIORITY, NORMAL_PRIORITY, 3]
    assert [timeout_of(value) for value in (None, 0, 500_000)] == [None, None, 0.5]


def test_options_of_outputs_are_read() -> None:
    assert wanted_output("y", {}, binary=True) == Wanted(name="y", binary=True)
    assert wanted_output("y", {"binary_data": False, "classification": 3}, binary=True) == Wanted(name="y", classes=3)
    there = {"shared_memory_region": "r", "shared_memory_byte_size": 8, "shared_memory_offset": 4}
    assert wanted_output("y", there, binary=False).place == Place(region="r", offset=4, size=8)
    assert place_of_input({"content_type": "np"}, "x") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"binary": True}, "'binary', which is not supported"),
        ({"binary_data": 1}, "true or false"),
        ({"classification": -1}, "classification of 'y' must be"),
        ({"classification": True}, "classification of 'y' must be"),
        ({"shared_memory_offset": 4}, "no shared_memory_region"),
        ({"shared_memory_region": "r"}, "shared_memory_byte_size of 'y' must be"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": -1}, "shared_memory_byte_size of 'y' must be"),
        ({"shared_memory_region": 7, "shared_memory_byte_size": 1}, "must be a string"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 1, "classification": 1}, "cannot be both"),
    ],
)
def test_options_that_cannot_be_done_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wanted_output("y", options, binary=False)


def test_unknown_options_of_requests_and_inputs_are_refused() -> None:
    check_options({"priority": 1, "triton_enable_empty_final_response": True})
    with pytest.raises(InputError, match="'sequence_id', which is not supported"):
        check_options({"sequence_id": 1})
    with pytest.raises(InputError, match="content_type of input 'x' is 'pd'"):
        place_of_input({"content_type": "pd"}, "x")
    with pytest.raises(InputError, match="asked for twice"):
        check_outputs([Wanted(name="y"), Wanted(name="y", classes=1)])
