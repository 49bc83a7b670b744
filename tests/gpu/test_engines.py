"""Engines on a GPU: what they compute, however the arrays come, and what is said of what cannot be."""

import dataclasses
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, RUNTIME_CACHE
from deploy.engine import cuda
from deploy.engine.compatibility import has_fp8
from deploy.engine.cuda import DeviceMemoryError
from deploy.engine.flavour import load_flavour
from deploy.errors import ArtifactError, BackendError, InputError, SessionClosedError
from deploy.precision.int8.options import QuantizeOptions
from deploy.runtime.load import open_session
from deploy.runtime.session import Session, SessionOptions

VARIANTS = ("", ":cuda_graph")


def images(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def engine(request: pytest.FixtureRequest, shared_lenet5: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """lenet5 in FP32, batches 1 to 32 in two profiles."""
    try:
        load_flavour(request.param)
        shapes = ["input=1x1x28x28:1x1x28x28:4x1x28x28", "input=2x1x28x28:8x1x28x28:32x1x28x28"]
        folder = tmp_path_factory.mktemp(request.param)
        made = deploy.build_trt(shared_lenet5, folder / "engine", flavour=request.param, shapes=shapes, cache=False)
        deploy.load(made).close()
    except BackendError as error:
        pytest.skip(str(error))
    return made


@pytest.fixture(params=VARIANTS)
def session(request: pytest.FixtureRequest, engine: Artifact) -> Iterator[Session]:
    assert engine.manifest.target is not None
    with open_session(engine, engine.manifest.target.flavour + request.param, SessionOptions(contexts=3)) as session:
        yield session


@pytest.fixture(scope="module")
def expected(shared_lenet5: Artifact) -> Iterator[Any]:
    with deploy.load(shared_lenet5, "eager", "cpu") as eager:
        yield eager


def test_the_engine_was_attested_and_compared_here(engine: Artifact) -> None:
    share, parity = engine.manifest.precision_share, engine.manifest.engine_parity
    assert share is not None
    assert share.origin == "engine", f"the inspector names {share.coverage:.0%} of the multiply-accumulates"
    assert share.fp32 == 1
    assert share.time is not None
    assert sum(share.time.values()) == pytest.approx(1)
    assert parity is not None
    assert parity.worst.max_abs < 1e-4  # TF32 is off


def test_numpy_and_tensors_give_what_eager_gives(session: Session, expected: Any) -> None:
    for batch in (1, 5, 32, 1, 5):
        x = images(batch, seed=batch)
        y = expected(x)
        np.testing.assert_allclose(session(x.numpy()), y.numpy(), rtol=1e-3, atol=1e-4)
        result = session(x.cuda())
        assert result.device.type == "cuda"
        torch.testing.assert_close(result.cpu(), y, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(session(x), y, rtol=1e-3, atol=1e-4)


def test_the_callers_stream_orders_the_work(session: Session, expected: Any) -> None:
    x = images(8)
    stream = torch.cuda.Stream()
    source = x.cuda()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(source)
        torch.cuda._sleep(200_000_000)
        late.copy_(source)
        doubled = session(late) * 2
        late.zero_()  # after the run, on the same stream
    stream.synchronize()
    torch.testing.assert_close(doubled.cpu(), expected(x) * 2, rtol=1e-3, atol=1e-4)


def test_inputs_that_are_dropped_at_once_live_until_the_work_is_done(session: Session, expected: Any) -> None:
    results = [session(images(16, seed=seed).cuda()) for seed in range(50)]
    for seed, result in enumerate(results):
        torch.testing.assert_close(result.cpu(), expected(images(16, seed=seed)), rtol=1e-3, atol=1e-4)


def test_arrays_of_other_libraries_go_in_and_come_out(session: Session, expected: Any) -> None:
    x = images(4)

    class Foreign:
        """As CuPy's or pycuda's arrays: nothing but the interface."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            self.shape, self.dtype = tuple(tensor.shape), np.dtype("float32")
            self.__cuda_array_interface__ = tensor.__cuda_array_interface__

    result = session(Foreign(x.cuda()))
    torch.testing.assert_close(torch.as_tensor(result, device="cuda").cpu(), expected(x), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(result.numpy(), torch.as_tensor(result, device="cuda").cpu().numpy())


def test_non_contiguous_tensors_and_those_at_odd_addresses_are_taken(session: Session, expected: Any) -> None:
    x = images(4)
    turned = x.cuda().transpose(2, 3).contiguous().transpose(2, 3)
    odd = torch.cat([torch.zeros(1), x.flatten()]).cuda()[1:].view(4, 1, 28, 28)
    assert not turned.is_contiguous()
    assert odd.data_ptr() % 256
    for given in (turned, odd):
        torch.testing.assert_close(session(given).cpu(), expected(x), rtol=1e-3, atol=1e-4)


def test_many_threads_get_their_own_results(session: Session, expected: Any) -> None:
    wanted = {seed: expected(images(1 + seed, seed)) for seed in range(8)}
    wrong: list[str] = []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream()
        for turn in range(40):
            with torch.cuda.stream(stream):
                x = images(1 + seed, seed)
                result = session(x.cuda()).cpu() if turn % 2 else torch.from_numpy(session(x.numpy()))
            if not torch.allclose(result, wanted[seed], rtol=1e-3, atol=1e-4):
                wrong.append(f"thread {seed}, run {turn}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stream_of_batches_and_futures_give_the_same(session: Session, expected: Any) -> None:
    feeds = [{"input": images(1 + seed % 7, seed).numpy()} for seed in range(20)]
    wanted = [expected(torch.from_numpy(feed["input"])).numpy() for feed in feeds]
    futures = [session.run_async(feed) for feed in feeds]
    for found in (list(session.stream(iter(feeds))), [future.result() for future in futures]):
        for result, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(result["logits"], y, rtol=1e-3, atol=1e-4)


def test_wrong_feeds_are_refused_and_the_session_goes_on(session: Session, expected: Any) -> None:
    with pytest.raises(InputError, match="outside every profile"):
        session(images(33).cuda())
    with pytest.raises(InputError, match="float16"):
        session(images(1).half().cuda())
    if torch.cuda.device_count() > 1:
        with pytest.raises(InputError, match="is on cuda:1; this session is on cuda:0"):
            session(images(1).to("cuda:1"))
    torch.testing.assert_close(session(images(2).cuda()).cpu(), expected(images(2)), rtol=1e-3, atol=1e-4)


def test_out_of_memory_says_what_was_needed_and_the_session_goes_on(session: Session, expected: Any) -> None:
    x = images(32).cuda()
    session(x)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    hog = [torch.empty(free - (8 << 20), dtype=torch.uint8, device="cuda")]
    try:
        while True:
            hog.append(torch.empty(1 << 20, dtype=torch.uint8, device="cuda"))
    except torch.cuda.OutOfMemoryError:
        pass
    kept = []
    with pytest.raises(DeviceMemoryError, match=r"out of GPU memory: \d+ MiB needed, [\d,]+ MiB of [\d,]+ MiB free"):
        for _ in range(1_000_000):
            kept.append(session(x))
    del hog, kept
    torch.testing.assert_close(session(x).cpu(), expected(images(32)), rtol=1e-3, atol=1e-4)


def test_a_closed_session_refuses_to_run(engine: Artifact) -> None:
    session = deploy.load(engine)
    session.close()
    with pytest.raises(SessionClosedError):
        session(images(1).cuda())


def test_tensorrt_rtx_keeps_what_it_compiled(engine: Artifact) -> None:
    assert engine.manifest.target is not None
    deploy.load(engine).close()
    assert (engine.path / RUNTIME_CACHE).is_file() == (engine.manifest.target.flavour == "tensorrt-rtx")
    engine.verify()


def test_an_engine_of_another_machine_is_refused_and_rebuilt(engine: Artifact, expected: Any) -> None:
    assert engine.manifest.target is not None
    for changes, reason in (
        ({"version": "9.9.9"}, "built with .* 9.9.9, and"),
        ({"gpu": "NVIDIA T4", "compute_capability": "7.5", "targets": ["7.5"]}, r"7\.5"),
    ):
        target = msgspec.structs.replace(engine.manifest.target, **changes)  # type: ignore[arg-type]
        other = dataclasses.replace(engine, manifest=msgspec.structs.replace(engine.manifest, target=target))
        with pytest.raises(BackendError, match=rf"does not fit this machine: .*{reason}.*open it with rebuild=True"):
            deploy.load(other)
        with deploy.load(other, rebuild=True) as session:
            torch.testing.assert_close(session(images(3).cuda()).cpu(), expected(images(3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_plan_is_found_before_it_is_loaded(engine: Artifact, damage: str) -> None:
    path = engine.path / ENGINE
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        content[:middle] if damage == "cut" else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    )
    try:
        with pytest.raises(ArtifactError, match=r"engine\.plan"):
            deploy.load(engine)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("library", ["cuda-python", "pycuda"])
def test_engines_run_without_torch(engine: Artifact, expected: Any, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"cuda-python": "cuda.bindings.runtime", "pycuda": "pycuda.driver"}[library])
    monkeypatch.setattr(cuda, "LIBRARIES", {library: cuda.LIBRARIES[library]})
    with deploy.load(engine) as session:
        x = images(5).numpy()
        np.testing.assert_allclose(session(x), expected(images(5)).numpy(), rtol=1e-3, atol=1e-4)
        on_gpu = session.run(session.to_device({"input": x}))["logits"]  # type: ignore[attr-defined]
        np.testing.assert_allclose(on_gpu.numpy(), expected(images(5)).numpy(), rtol=1e-3, atol=1e-4)
        # Tensors of a torch that was imported later go through the same door.
        torch.testing.assert_close(session(images(5).cuda()).cpu(), expected(images(5)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"precision": "fp16", "int8": True}, {"int8": True}])
def test_half_precision_and_int8_are_honoured(
    engine: Artifact, shared_lenet5: Artifact, tmp_path: Path, options: dict[str, Any]
) -> None:
    assert engine.manifest.target is not None
    calib = [{"input": images(8, seed).numpy()} for seed in range(8)] if "int8" in options else None
    made = deploy.build_trt(
        shared_lenet5,
        tmp_path / "engine",
        flavour=engine.manifest.target.flavour,
        calib=calib,
        quantization=QuantizeOptions(include=("conv1", "fc3")) if "int8" in options else None,
        allow_slower="int8" in options,
        **options,
    )
    share = made.manifest.precision_share
    assert share is not None
    assert share.origin == "engine", f"the inspector names {share.coverage:.0%} of the multiply-accumulates"
    assert getattr(share, "int8" if "int8" in options else "fp16") >= 0.9


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}])
def test_fp8_is_honoured_where_the_gpu_has_it_and_refused_by_name_elsewhere(
    engine: Artifact, tmp_path: Path, options: dict[str, Any]
) -> None:
    target = engine.manifest.target
    assert target is not None
    net = deploy.export(tmp_path / "mlp", arch="mlp")
    rng = np.random.default_rng(0)
    calib = [{"input": rng.standard_normal((8, 100)).astype(np.float32)} for _ in range(8)]
    build = partial(deploy.build_trt, net, tmp_path / "engine", flavour=target.flavour, fp8=True, calib=calib, allow_slower=True)
    gpu = cuda.open_device().gpu()
    if not has_fp8(gpu.compute_capability) and target.flavour == "tensorrt":
        with pytest.raises(BackendError, match=r"FP8 needs compute capability 8.9"):
            build(**options)
        return
    share = build(**options).manifest.precision_share
    assert share is not None
    assert share.origin == "engine" or not has_fp8(gpu.compute_capability)
    assert share.fp8 >= 0.9
