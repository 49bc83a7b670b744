"""What comes before and after a batcher, overlapped with it."""

import asyncio
from typing import Any

import numpy as np
import pytest

from deploy.errors import SessionClosedError
from deploy.runtime.batching.batcher import Batcher
from deploy.runtime.batching.pipeline import Pipeline

WAIT_S = 20


def images(rows: int, seed: int) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(seed).standard_normal((rows, 1, 28, 28), dtype=np.float32)}


def test_a_pipeline_overlaps_its_steps_and_an_error_is_of_one_item(session: Any) -> None:
    def before(seed: int) -> dict[str, np.ndarray]:
        if seed == 3:
            raise ValueError("no such image")
        return images(1, seed)

    def after(outputs: dict[str, np.ndarray]) -> int:
        return int(outputs["logits"].argmax())

    with Batcher(session) as batcher, Pipeline(batcher, before, after) as pipeline:
        futures = [pipeline.submit(seed) for seed in range(6)]
        for seed, future in enumerate(futures):
            if seed == 3:
                with pytest.raises(ValueError, match="no such image"):
                    future.result(WAIT_S)
            else:
                assert future.result(WAIT_S) == int(session._session.run(images(1, seed))["logits"].argmax())

        async def main() -> list[int]:
            return await asyncio.gather(*(pipeline.run_async(seed) for seed in (1, 2)))

        assert asyncio.run(main()) == [futures[1].result(), futures[2].result()]
        session.gate.clear()
        held = pipeline.submit(1)
        assert session.inside.acquire(timeout=WAIT_S)
        session.gate.set()
    assert held.result(WAIT_S) is not None
    with pytest.raises(SessionClosedError):
        pipeline.submit(1)


@pytest.mark.timeout(60)
def test_a_session_that_is_closed_under_a_pipeline_fails_every_item_and_nothing_hangs(session: Any) -> None:
    batcher = Batcher(session)
    pipeline = Pipeline(batcher, lambda seed: images(1, seed), lambda outputs: outputs)
    session.gate.clear()
    futures = [pipeline.submit(seed) for seed in range(4)]
    assert session.inside.acquire(timeout=WAIT_S)
    session._session.close()
    session.gate.set()
    pipeline.close()
    batcher.close()
    assert all(isinstance(future.exception(WAIT_S), SessionClosedError) for future in futures)
