"""What a GPU says of a new engine: the precision of its layers, the time they take, and whether INT8 is worth it."""

import logging
from collections.abc import Mapping

from deploy.artifact import Artifact, PrecisionShare
from deploy.engine.attestation import engine_layers, engine_share
from deploy.engine.flavour import has_gpu
from deploy.errors import BackendError, EngineError
from deploy.runtime.session import Session, SessionOptions, open_session
from deploy.runtime.tensorrt import TensorRTSession
from deploy.tensors import random_feed
from deploy.timing import Ratio, paired_ratio, sample

logger = logging.getLogger(__name__)

ROUNDS, SLICE_S, SAMPLES = 9, 0.1, 2000
_WARMUP = 10


def open_engine(engine: Artifact) -> TensorRTSession | None:
    """A session on a new engine; None where there is no GPU to run it on, or one that tensorrt-rtx does not build for.

    Raises BackendError where a `tensorrt` engine, which was built on this GPU, cannot be loaded.
    """
    if not has_gpu():
        return None
    target = engine.manifest.target
    assert target is not None
    try:
        session = open_session(engine, target.flavour, SessionOptions(contexts=1))
    except BackendError as error:
        if target.flavour == "tensorrt":
            raise
        logger.warning("the engine cannot be loaded on this machine, and is attested from the typed network: %s", error)
        return None
    assert isinstance(session, TensorRTSession)
    return session


def attest(session: TensorRTSession, typed: Mapping[str, str], macs: Mapping[str, int]) -> tuple[PrecisionShare, dict[str, str]]:
    """Share of `macs` in each precision, of layers and of time, and the precision by node, as the engine was built.

    typed: precision by node of the typed network. Raises EngineError.
    """
    feed = random_feed(session.inputs, session.dims())
    return engine_share(engine_layers(session.information()), typed, macs, session.layer_times(feed))


def check_faster(int8: Session, fp16: Session, what: str) -> Ratio:
    """How many times as fast as FP16 INT8 is, at the optimal shapes, measured in turns.

    Raises EngineError when it is slower, beyond the interval of the ratio.
    """
    feed = random_feed(int8.inputs, int8.dims())
    sessions = (fp16, int8)
    for session in sessions:
        session.warmup(feed, _WARMUP)
    rounds: tuple[list[list[float]], list[list[float]]] = ([], [])
    for _ in range(ROUNDS):
        for session, samples in zip(sessions, rounds, strict=True):
            samples.append(sample(lambda session=session: session.run(feed), SLICE_S, SAMPLES))  # type: ignore[misc]
    ratio = paired_ratio(*rounds)
    if ratio.high < 1:
        raise EngineError(
            f"{what}: INT8 is slower than FP16 here, {ratio.value:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f});"
            " build --fp16, leave layers out with --exclude, or keep it with --allow-slower"
        )
    logger.info("INT8 is %.2f times as fast as FP16 (%.2f to %.2f)", ratio.value, ratio.low, ratio.high)
    return ratio
