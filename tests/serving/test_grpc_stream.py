"""The requests of one stream: together, in order, within bounds, and answered when the server stops."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from deploy.errors import UnavailableError
from deploy.serving.grpc_stream import in_order


async def numbers(count: int, taken: list[bytes]) -> AsyncIterator[bytes]:
    for index in range(count):
        taken.append(b"%d" % index)
        yield taken[-1]


def collect(requests: AsyncIterator[bytes], answer: Any, closing: asyncio.Event | None = None, **bounds: int) -> Any:
    options = {"most_bytes": 1 << 20, **bounds}
    return in_order(requests, answer, closing=closing or asyncio.Event(), **options)  # type: ignore[arg-type]


def test_requests_are_under_way_together_and_answered_in_order() -> None:
    async def main() -> None:
        begun: list[bytes] = []
        go = asyncio.Event()

        async def answer(data: bytes) -> bytes:
            begun.append(data)
            await (go.wait() if data == b"0" else asyncio.sleep(0))
            return data

        answers = collect(numbers(5, []), answer)
        first = asyncio.ensure_future(anext(answers))
        await asyncio.sleep(0.05)
        assert (len(begun), first.done()) == (5, False)
        go.set()
        assert [await first, *[each async for each in answers]] == [b"0", b"1", b"2", b"3", b"4"]

    asyncio.run(main())


@pytest.mark.parametrize(("bounds", "most"), [({"most_requests": 3}, 3), ({"most_bytes": 2}, 2), ({"most_bytes": 0}, 1)])
def test_a_stream_is_read_no_faster_than_it_is_answered(bounds: dict[str, int], most: int) -> None:
    async def main() -> None:
        taken: list[bytes] = []
        go = asyncio.Event()

        async def answer(data: bytes) -> bytes:
            await go.wait()
            return data

        answers = collect(numbers(9, taken), answer, **bounds)
        first = asyncio.ensure_future(anext(answers))
        await asyncio.sleep(0.05)
        assert len(taken) == most + 1, "one is read, and waits for room"
        go.set()
        assert len([await first, *[each async for each in answers]]) == 9

    asyncio.run(main())


def test_what_was_taken_is_answered_when_the_server_stops_and_then_the_stream_ends() -> None:
    async def main() -> None:
        closing, heard = asyncio.Event(), []

        async def endless() -> AsyncIterator[bytes]:
            for index in range(3):
                yield b"%d" % index
            await asyncio.Event().wait()

        async def answer(data: bytes) -> bytes:
            await asyncio.sleep(0.05)
            return data

        asyncio.get_running_loop().call_later(0.02, closing.set)
        with pytest.raises(UnavailableError):
            async for each in collect(endless(), answer, closing):
                heard.append(each)
        assert heard == [b"0", b"1", b"2"]

    asyncio.run(main())


def test_a_client_that_leaves_takes_its_requests_with_it() -> None:
    async def main() -> None:
        cancelled: list[bytes] = []

        async def answer(data: bytes) -> bytes:
            try:
                await asyncio.sleep(30 if data != b"0" else 0)
            except asyncio.CancelledError:
                cancelled.append(data)
                raise
            return data

        answers = collect(numbers(4, []), answer)
        assert await anext(answers) == b"0"
        await answers.aclose()
        await asyncio.sleep(0)
        assert sorted(cancelled) == [b"1", b"2", b"3"]

    asyncio.run(main())


def test_an_error_ends_the_stream_in_its_turn() -> None:
    async def main() -> None:
        async def answer(data: bytes) -> bytes:
            if data == b"1":
                raise ValueError("a bug")
            return data

        heard = []
        with pytest.raises(ValueError, match="a bug"):
            async for each in collect(numbers(3, []), answer):
                heard.append(each)
        assert heard == [b"0"]

    asyncio.run(main())
