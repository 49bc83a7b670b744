import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import PACKAGE
from deploy.errors import ArtifactError, BackendError, InputError, SessionClosedError
from deploy.runtime.load import open_session
from deploy.runtime.session import SessionOptions


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="session")
def pair_package(pair: Artifact, tmp_path_factory: pytest.TempPathFactory, once: Callable[..., str]) -> Artifact:
    """`pair` as a package of batches 1 to 9."""
    out = tmp_path_factory.mktemp("package") / "pair"
    shapes = ["x=1x4:4x4:9x4"]
    return Artifact.open(once("package-pair", lambda: str(deploy.build_aoti(pair, out, shapes=shapes, device="cpu").path)))


def test_every_batch_of_the_profile_agrees_with_eager(package: Artifact, shared_lenet5: Artifact) -> None:
    with open_session(package) as session, open_session(shared_lenet5, "eager", SessionOptions(device="cpu")) as eager:
        for batch in (1, 2, 3, 8, 31, 32):
            x = images(batch)
            result = session(x)
            torch.testing.assert_close(result, eager(x), rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(session(x.numpy()), result.numpy())


def test_a_batch_beyond_the_profile_is_refused_before_it_runs(package: Artifact) -> None:
    with open_session(package) as session:
        with pytest.raises(InputError, match=r"33x1x28x28 is outside every profile .* build with `deploy build-aoti --shapes`"):
            session(images(33))
        with pytest.raises(InputError, match="outside every profile"):
            session.check({"input": images(33).numpy()})


def test_inputs_of_any_memory_and_outputs_of_all_kinds(pair: Artifact, pair_package: Artifact) -> None:
    assert pair_package.manifest.outputs == pair.manifest.outputs
    with open_session(pair_package) as session, open_session(pair, "eager", SessionOptions(device="cpu")) as eager:
        for batch in (1, 2, 9):
            x = torch.randn(4, batch).T.requires_grad_()  # neither contiguous nor free of gradients
            feed = {"index": torch.arange(2 * batch)[::2], "x": x}
            results, expected = session.run(feed), eager.run({name: tensor.detach() for name, tensor in feed.items()})
            assert list(results) == ["y", "total", "same", "anchors"]
            for name, result in results.items():
                assert (result.dtype, result.requires_grad) == (expected[name].dtype, False)
                torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-6)


def test_writing_to_results_changes_neither_the_input_nor_the_package(pair_package: Artifact) -> None:
    feed = {"x": torch.ones(2, 4), "index": torch.zeros(2, dtype=torch.int64)}
    with open_session(pair_package) as session:
        for _ in range(2):
            results = session.run(feed)
            torch.testing.assert_close(results["same"], torch.ones(2, 4))
            torch.testing.assert_close(results["anchors"], torch.arange(3.0))
            results["same"] += 1
            results["anchors"] += 1
    torch.testing.assert_close(feed["x"], torch.ones(2, 4))


def test_a_tensor_is_taken_without_a_copy(package: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(2)
    seen: list[int] = []
    with open_session(package) as session:
        launch = session._launch  # type: ignore[attr-defined]
        monkeypatch.setattr(session, "_launch", lambda given: seen.append(given[0].data_ptr()) or launch(given))  # type: ignore[func-returns-value]
        session(x)
        session(x.numpy())
    assert seen == [x.data_ptr()] * 2


def test_it_runs_without_the_users_code_and_loads_no_compiler(pair_package: Artifact, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("manifest.json", PACKAGE):
        (alone / name).write_bytes((pair_package.path / name).read_bytes())
    code = f"""
import sys, deploy, numpy
session = deploy.load({str(alone)!r})
print(session.run({{"x": numpy.ones((3, 4), "float32"), "index": numpy.arange(3)}})["anchors"])
print(*sorted(name for name in sys.modules if name.startswith(("deploy.intake", "deploy.models", "pair_net", "sympy", "torch._inductor."))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[0. 1. 2.]\n\n"
    assert done.stderr == ""


def test_a_damaged_package_is_found_before_it_is_loaded(package: Artifact, tmp_path: Path) -> None:
    content = bytearray((package.path / PACKAGE).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / PACKAGE).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model.pt2 is damaged: its SHA-256 is not the one in the manifest"):
        open_session(Artifact(tmp_path, package.manifest))


def test_a_file_that_torch_cannot_load_is_one_line(package: Artifact, tmp_path: Path) -> None:
    (tmp_path / PACKAGE).write_bytes(b"no package")
    manifest = msgspec.structs.replace(package.manifest, files={})
    with pytest.raises(BackendError, match=r"torch .* cannot load .*model.pt2: ") as caught:
        open_session(Artifact(tmp_path, manifest))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SessionOptions(device="cuda"), "was compiled for cpu, not for cuda: build one with `deploy build-aoti --device cuda`"),
        (SessionOptions(variant=("cuda_graph",)), "was compiled for the CPU, which has no CUDA graphs: leave out cuda_graph"),
        (SessionOptions(compute="bf16"), "aoti computes in the precision of the file, not in bf16"),
    ],
)
def test_what_a_package_cannot_do_is_refused(package: Artifact, options: SessionOptions, message: str) -> None:
    backend = ":".join(("aoti", *options.variant))
    with pytest.raises(BackendError, match=message):
        open_session(package, backend, options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_package_for_a_gpu_says_that_there_is_none(package: Artifact) -> None:
    assert package.manifest.package is not None
    target = msgspec.structs.replace(package.manifest.package, device="cuda", gpu="a GPU", compute_capability="9.0")
    with pytest.raises(BackendError, match=r"no cuda here: torch .* sees 0 usable CUDA devices"):
        open_session(Artifact(package.path, msgspec.structs.replace(package.manifest, package=target)))


@pytest.mark.parametrize(("threads", "teams"), [("1", set()), ("3", {"team of 3"})])
def test_threads_are_those_of_the_session_and_not_of_the_build(
    package: Artifact, monkeypatch: pytest.MonkeyPatch, threads: str, teams: set[str]
) -> None:
    monkeypatch.setenv("OMP_DISPLAY_AFFINITY", "TRUE")  # OpenMP prints a line for every thread of a team that it forms
    monkeypatch.setenv("OMP_AFFINITY_FORMAT", "team of %N")
    code = f"""
import sys, deploy, torch, threading
session = deploy.load({str(package.path)!r}, threads=int(sys.argv[1]))
thread = threading.Thread(target=session, args=(torch.zeros(32, 1, 28, 28),))
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code, threads], capture_output=True, text=True, check=True)
    assert set(done.stderr.splitlines()) == teams


def test_an_error_of_the_runner_is_ours(package: Artifact) -> None:
    with open_session(package) as session:
        session._launch = lambda given: session._loader.boxed_run([])  # type: ignore[attr-defined]  # stands for any fault within
        with pytest.raises(BackendError, match=r"aoti failed to run 'lenet5': RuntimeError: ") as caught:
            session(images(1))
    assert "\n" not in str(caught.value)


def test_a_closed_session_runs_no_more(package: Artifact) -> None:
    session = open_session(package)
    session.close()
    with pytest.raises(SessionClosedError):
        session(images(1))
