"""What engines are compared with, on a GPU: eager and compile with variants, and ONNX Runtime's execution providers."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import onnxruntime
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError
from deploy.runtime.cuda_graphs import GRAPHS, CudaGraphs
from deploy.runtime.load import open_session
from deploy.runtime.session import Session, SessionOptions

needs_provider = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is not installed"
)
CUDA = SessionOptions(device="cuda")


def images(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(seed)).cuda()


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Call `work` with 0 to `count` - 1 at the same time. The first exception of a thread is raised here."""
    gate = threading.Barrier(count)

    def start(number: int) -> None:
        gate.wait(timeout=60)
        work(number)

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(start, number) for number in range(count)]:
            future.result()


def agree(session: Session, artifact: Artifact, *, tolerance: float) -> None:
    """Compare with eager in FP32 at several batch sizes, each twice, from tensors and from numpy."""
    with open_session(artifact, "eager", SessionOptions(device="cpu")) as reference:
        for batch in (1, 5, 1, 5):
            x = images(batch, seed=batch)
            result, expected = session(x), reference(x.cpu())
            assert (result.device.type, result.dtype) == ("cuda", torch.float32)
            torch.testing.assert_close(result.cpu(), expected, rtol=tolerance, atol=tolerance)
            from_numpy = torch.from_numpy(session(x.cpu().numpy()))
            torch.testing.assert_close(from_numpy, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("backend", "tolerance"),
    [
        ("eager", 1e-4),
        ("eager:cuda_graph", 1e-4),
        ("eager:fp16,channels_last", 1e-2),
        ("eager:fp16,channels_last,cuda_graph", 1e-2),
        ("compile:reduce-overhead", 1e-4),
        ("compile:max-autotune-no-cudagraphs,fp16,channels_last", 1e-2),
    ],
)
def test_variants_agree_with_fp32(lenet5: Artifact, backend: str, tolerance: float) -> None:
    with open_session(lenet5, backend, CUDA) as session:
        agree(session, lenet5, tolerance=tolerance)


@needs_provider
@pytest.mark.parametrize("variant", ["cuda", "tensorrt,tf32"])
def test_execution_providers_agree_with_fp32(lenet5: Artifact, variant: str) -> None:
    try:
        session = open_session(lenet5, f"onnxruntime:{variant}")
    except BackendError as error:
        if "did not load" in str(error):
            pytest.skip(str(error))
        raise
    with session:
        assert set(session.nodes) <= {"TensorrtExecutionProvider", "CUDAExecutionProvider"}  # type: ignore[attr-defined]
        agree(session, lenet5, tolerance=1e-4 if variant == "cuda" else 1e-2)


@needs_provider
def test_onnxruntime_waits_for_what_the_callers_stream_has_yet_to_do(lenet5: Artifact) -> None:
    with open_session(lenet5, "onnxruntime:cuda") as session:
        x = images(8)
        expected = session(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = torch.zeros_like(x)
            torch.cuda._sleep(100_000_000)
            late.copy_(x)
            result = session(late)
        stream.synchronize()
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "backend", ["eager:cuda_graph", "compile:reduce-overhead", pytest.param("onnxruntime:cuda", marks=needs_provider)]
)
def test_many_threads_and_streams_get_their_own_results(lenet5: Artifact, backend: str) -> None:
    with open_session(lenet5, backend, CUDA) as session, open_session(lenet5, "eager", CUDA) as reference:

        def work(seed: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(20):
                    x = images(1 + turn % 3, seed * 100 + turn)
                    torch.testing.assert_close(session(x), reference(x), rtol=1e-3, atol=1e-4)

        in_threads(work, 4)


def test_sessions_with_graphs_of_both_kinds_run_beside_one_another(lenet5: Artifact) -> None:
    names = ["eager:cuda_graph", "compile:reduce-overhead", "compile:reduce-overhead,fp16", "eager:fp16,cuda_graph"]
    with ExitStack() as stack:
        reference = stack.enter_context(open_session(lenet5, "eager", CUDA))
        sessions = [stack.enter_context(open_session(lenet5, name, CUDA)) for name in names]

        def work(number: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(20):
                    x = images(1 + turn % 3, number * 100 + turn)
                    torch.testing.assert_close(sessions[number](x), reference(x), rtol=1e-2, atol=1e-2)

        in_threads(work, len(names))


def test_results_of_a_graph_outlive_the_next_run_and_graphs_are_bounded() -> None:
    graphs = CudaGraphs(lambda inputs: [inputs[0] * 2], torch.device("cuda", torch.cuda.current_device()))
    for size in range(1, GRAPHS + 4):
        x = torch.full((size,), float(size), device="cuda")
        (first,) = graphs(x)
        graphs(x + 1)
        assert first.tolist() == [2.0 * size] * size
    assert len(graphs._captured) == GRAPHS


def test_a_module_that_waits_for_the_gpu_cannot_be_captured() -> None:
    graphs = CudaGraphs(lambda inputs: [inputs[0] * inputs[0].sum().item()], torch.device("cuda", torch.cuda.current_device()))
    with pytest.raises(BackendError, match=r"cannot be captured in a CUDA graph: .*; leave out cuda_graph"):
        graphs(torch.ones(2, device="cuda"))
    assert torch.ones(2, device="cuda").sum().item() == 2  # the device is still good
    assert torch.randn(2, device="cuda").isfinite().all()  # and so are its random numbers


def test_a_failed_capture_leaves_stream_and_allocator_as_they_were() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    graphs = CudaGraphs(lambda inputs: [inputs[0] * inputs[0].sum().item()], device)
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            with pytest.raises(BackendError, match="cannot be captured"):
                graphs(torch.ones(2, device=device))
            assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()
    # A block that another stream has used is kept while torch thinks that a capture is under way.
    blocks = set()
    for _ in range(5):
        block = torch.zeros(8 << 20, device=device)
        block.record_stream(other)
        blocks.add(block.data_ptr())
        del block
        torch.cuda.synchronize()
    assert len(blocks) == 1
    good = CudaGraphs(lambda inputs: [inputs[0] + 1], device)
    assert [good(torch.full((3,), float(turn), device=device))[0].tolist() for turn in range(3)] == [
        [1.0] * 3,
        [2.0] * 3,
        [3.0] * 3,
    ]


def test_bench_compares_on_the_gpu(lenet5: Artifact) -> None:
    from deploy.bench.bench import bench
    from deploy.bench.options import BenchOptions

    found = bench([lenet5], BenchOptions(backends=("eager:fp16,channels_last,cuda_graph",), batches=(8,), seconds=1.0))
    assert found.conditions["device"] == "cuda"
    assert [(row.backend, row.precision) for row in found.results] == [
        ("eager", "fp32"),
        ("eager:fp16,channels_last,cuda_graph", "fp16"),
    ]


def test_cudnn_searches_while_a_session_is_open(lenet5: Artifact) -> None:
    before = torch.backends.cudnn.benchmark
    with deploy.load(lenet5, "eager", "cuda") as session:
        assert torch.backends.cudnn.benchmark
        assert session.device == "cuda:0"
    assert torch.backends.cudnn.benchmark == before


def test_tf32_is_off_while_a_session_is_open(lenet5: Artifact) -> None:
    before = torch.backends.cudnn.allow_tf32
    with deploy.load(lenet5, "eager", "cuda"):
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        with pytest.raises(BackendError, match="another session of this process runs without TF32"):
            deploy.load(lenet5, "eager:tf32", "cuda")
    assert torch.backends.cudnn.allow_tf32 == before
