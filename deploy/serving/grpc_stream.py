"""The requests of one stream, answered together and in order."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

from deploy.errors import UnavailableError

Answer = TypeVar("Answer")

MOST_REQUESTS = 256
"""How many requests of one stream are under way at a time; the others stay with the client."""


async def in_order(
    requests: AsyncIterator[bytes],
    answer: Callable[[bytes], Awaitable[Answer]],
    *,
    closing: asyncio.Event,
    most_bytes: int,
    most_requests: int = MOST_REQUESTS,
) -> AsyncGenerator[Answer, None]:
    """The answers to `requests`, in their order. Requests are taken on while others are answered, so that they share batches.

    most_bytes: of requests that are under way together; one alone may be larger. Ends when all requests are answered: those of the
    stream, or those that were taken before `closing` was set, and then with UnavailableError. Raises what `answer` raises, in its turn.
    """
    taken: asyncio.Queue[tuple[asyncio.Task[Answer], int] | None] = asyncio.Queue()
    under_way = held = 0
    room = asyncio.Event()

    async def take() -> None:
        nonlocal under_way, held
        try:
            async for data in requests:
                while under_way and (under_way >= most_requests or held + len(data) > most_bytes):
                    room.clear()
                    await room.wait()
                under_way, held = under_way + 1, held + len(data)
                taken.put_nowait((asyncio.ensure_future(answer(data)), len(data)))
        finally:
            taken.put_nowait(None)

    taking = asyncio.create_task(take())
    watching = asyncio.create_task(_cancel_when(closing, taking))
    try:
        while (each := await taken.get()) is not None:
            try:
                yield await each[0]
            finally:
                each[0].cancel()
            under_way, held = under_way - 1, held - each[1]
            room.set()
        await asyncio.wait([taking])
        if taking.cancelled():
            raise UnavailableError("the server is stopping")
        taking.result()  # the error of reading, if there was one
    finally:
        taking.cancel()
        watching.cancel()
        while not taken.empty():
            if (left := taken.get_nowait()) is not None:
                left[0].cancel()


async def _cancel_when(event: asyncio.Event, task: "asyncio.Task[None]") -> None:
    await event.wait()
    task.cancel()
