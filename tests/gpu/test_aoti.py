"""AOTInductor packages on a GPU: built there, and run from streams and threads, from torch and numpy."""

import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError, InputError
from deploy.runtime.load import open_session
from deploy.runtime.session import Session, SessionOptions

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}


def images(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def built(request: pytest.FixtureRequest, shared_lenet5: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """lenet5, compiled for this GPU."""
    precision = None if request.param == "fp32" else request.param
    return deploy.build_aoti(shared_lenet5, tmp_path_factory.mktemp("aoti") / "lenet5", precision=precision, device="cuda")


@pytest.fixture(params=["aoti", "aoti:cuda_graph"])
def session(request: pytest.FixtureRequest, built: Artifact) -> Iterator[Session]:
    with open_session(built, request.param) as session:
        yield session


@pytest.fixture(scope="module")
def expected(shared_lenet5: Artifact) -> Iterator[Any]:
    with deploy.load(shared_lenet5, "eager", "cpu") as eager:
        yield lambda x: eager(x.cpu())


def close(built: Artifact, result: torch.Tensor, reference: torch.Tensor) -> None:
    limit = TOLERANCES[built.manifest.precision]
    torch.testing.assert_close(result.cpu(), reference, rtol=limit, atol=limit)


def test_the_manifest_names_this_gpu_and_the_parity_measured_on_it(built: Artifact) -> None:
    package, parity = built.manifest.package, built.manifest.parity
    assert package is not None
    assert parity is not None
    major, minor = torch.cuda.get_device_capability()
    assert (package.device, package.gpu) == ("cuda", torch.cuda.get_device_name())
    assert package.compute_capability == f"{major}.{minor}"
    assert parity.by.endswith(torch.cuda.get_device_name())
    assert [case.batch for case in parity.cases] == [1, 2, 5, 8]


def test_every_batch_of_the_profile_agrees_with_eager(built: Artifact, session: Session, expected: Any) -> None:
    for batch in (1, 2, 3, 31, 32, 1):
        x = images(batch, seed=batch)
        result = session(x)
        assert (result.device, result.dtype) == (x.device, torch.float32)
        close(built, result, expected(x))
        close(built, torch.from_numpy(session(x.cpu().numpy())), expected(x))
        close(built, session(x.cpu()), expected(x))
    with pytest.raises(InputError, match="outside every profile"):
        session(images(33))


def test_it_runs_on_the_callers_stream_and_waits_for_nothing_else(built: Artifact, session: Session, expected: Any) -> None:
    x = images(8)
    session(x)  # the first run of a shape may wait: kernels are loaded, graphs captured
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        result = session(late)
        assert not stream.query()  # the run was begun, and the caller did not wait for its end
    stream.synchronize()
    close(built, result, expected(x))


def test_the_next_run_is_begun_before_the_last_one_ends(session: Session) -> None:
    x = images(8)
    session(x)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    session(x)
    session(x)
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


def test_threads_on_streams_of_their_own_get_their_own_results(built: Artifact, session: Session, expected: Any) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            x = images(1 + seed % 4, seed)
            reference = expected(x)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.default_stream())
            for turn in range(20):
                with torch.cuda.stream(stream):
                    result = session(x) if turn % 2 else torch.from_numpy(session(x.cpu().numpy()))
                stream.synchronize()
                close(built, result, reference)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


def test_tensors_that_are_not_contiguous_or_not_aligned_are_read_right(built: Artifact, session: Session, expected: Any) -> None:
    x = images(6)
    close(built, session(x[::2]), expected(x[::2]))
    flat = torch.zeros(x.numel() + 1, device="cuda")
    odd = flat[1:].view(x.shape).copy_(x)
    assert odd.data_ptr() % 16
    close(built, session(odd), expected(x))


def test_results_are_the_callers_own(session: Session) -> None:
    x = images(2)
    first = session(x)
    kept = first.clone()
    session(images(2, seed=1))
    torch.testing.assert_close(first, kept)
    x_before = x.clone()
    first += 1
    torch.testing.assert_close(x, x_before)


def test_times_on_the_gpu_are_told(built: Artifact) -> None:
    with open_session(built) as session:
        times = session.device_times({"input": images(8).cpu().numpy()})
    assert times is not None
    assert min(times.h2d_ms, times.gpu_ms, times.d2h_ms) > 0


def test_numpy_feeds_of_a_stream_come_in_order(built: Artifact, expected: Any) -> None:
    feeds = [{"input": images(4, seed).cpu().numpy()} for seed in range(6)]
    with open_session(built, options=SessionOptions(contexts=3)) as session:
        assert session.concurrency == 3
        results = [outputs["logits"] for outputs in session.stream(feeds)]
    for feed, result in zip(feeds, results, strict=True):
        close(built, torch.from_numpy(result), expected(torch.from_numpy(feed["input"])))


@pytest.mark.parametrize("built", ["fp32"], indirect=True)  # which compiles
def test_another_gpu_is_refused_or_built_for(built: Artifact) -> None:
    assert built.manifest.package is not None
    other = msgspec.structs.replace(built.manifest.package, gpu="another GPU", compute_capability="1.0")
    elsewhere = Artifact(built.path, msgspec.structs.replace(built.manifest, package=other))
    with pytest.raises(BackendError, match=r"compiled for another GPU \(compute capability 1.0\), and this is .* rebuild=True"):
        open_session(elsewhere)
    x = np.zeros((3, 1, 28, 28), np.float32)
    with open_session(elsewhere, options=SessionOptions(rebuild=True)) as rebuilt, open_session(built) as session:
        np.testing.assert_allclose(rebuilt(x), session(x), rtol=1e-3, atol=1e-3)


def test_fp32_means_fp32(built: Artifact) -> None:
    before = torch.backends.cudnn.allow_tf32
    with open_session(built):
        assert torch.backends.cudnn.allow_tf32 == (before and built.manifest.precision != "fp32")
    assert torch.backends.cudnn.allow_tf32 == before


def test_max_autotune_is_compiled_and_agrees(
    shared_lenet5: Artifact, tmp_path_factory: pytest.TempPathFactory, expected: Any
) -> None:
    out = tmp_path_factory.mktemp("aoti") / "tuned"
    tuned = deploy.build_aoti(shared_lenet5, out, precision="fp16", max_autotune=True, device="cuda")
    assert tuned.manifest.package is not None
    assert tuned.manifest.package.max_autotune
    x = images(8)
    with open_session(tuned) as session:
        close(tuned, session(x), expected(x))
