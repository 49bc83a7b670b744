"""Artifacts are written whole or not at all, and can be read wherever they are copied."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from torch import nn

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE, ONNX, WEIGHTS
from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.writer import ArtifactWriter, check_output
from deploy.errors import EngineError, OutputError
from deploy.intake.weightsfile import save_weights

VERSIONS = ("old", "new")

# Replaces `out` by artifacts named old and new in turn, and kills itself at the step that it is told, or goes on for ever.
WRITER = """
import os, shutil, signal, sys
import deploy.artifact.writer as artifact
from deploy.artifact.artifact import Artifact
from deploy.artifact.writer import ArtifactWriter
import msgspec

source, out, fatal = Artifact.open(sys.argv[1]), sys.argv[2], int(sys.argv[3])
steps = 0

def counted(function):
    def call(*args, **kwargs):
        global steps
        steps += 1
        if steps == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        steps += 1
        if steps == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if fatal:
    artifact._sync = counted(artifact._sync)
    artifact._put_in_place = counted(artifact._put_in_place)
    os.rename = counted(os.rename)
    os.unlink = counted(os.unlink)
    shutil.copyfile = counted(shutil.copyfile)
print("ready", flush=True)
turn = 1
while True:
    name = ("old", "new")[turn % 2]
    with ArtifactWriter(artifact.Path(out)) as writer:
        shutil.copyfile(source.path / "model.onnx", writer.path / "model.onnx")
        (writer.path / "extra.bin").write_bytes(name.encode() * 50_000)
        writer.commit(msgspec.structs.replace(source.manifest, name=name, files={}))
    turn += 1
    if fatal:
        print("done", flush=True)
        break
"""


Write = Callable[..., Artifact]


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of this process, several in turn."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check_whole(out: Path) -> str:
    artifact = Artifact.open(out)
    artifact.verify()
    assert artifact.manifest.name in VERSIONS
    return artifact.manifest.name


def test_a_writer_killed_at_any_step_leaves_the_old_artifact_or_the_new_whole(
    made: Artifact, write: Write, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(made.path, source)
    out, seen, step = made.path, [], 0
    while True:
        step += 1
        done = subprocess.run(
            [sys.executable, "-c", WRITER, str(source), str(out), str(step)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        seen.append(check_whole(out))
        if "done" in done.stdout:
            assert done.returncode == 0, done.stderr
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        if seen[-1] == "new":  # killed after the exchange: put the old one back for the next step
            shutil.rmtree(out)
            shutil.copytree(source, out)
    assert step > 8
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert seen.count("new") > 1, "no kill fell between the exchange and the end"
    # The next writer removes what the dead ones left behind.
    write(out)
    assert not [path for path in out.parent.iterdir() if path.name.endswith(".partial")]


def test_a_writer_killed_at_any_time_leaves_a_whole_artifact(made: Artifact, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made.path, source)
    for attempt in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(source), str(made.path), "0"], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.013 * attempt)
        child.kill()
        child.communicate()
        check_whole(made.path)


def test_an_exception_while_writing_leaves_what_stood_there(made: Artifact) -> None:
    with pytest.raises(RuntimeError), ArtifactWriter(made.path) as writer:
        (writer.path / ONNX).write_bytes(b"half")
        raise RuntimeError
    assert check_whole(made.path) == "old"
    assert [path.name for path in made.path.parent.iterdir()] == ["made"]


def test_an_error_while_writing_speaks_of_the_output_and_not_of_the_hidden_directory(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught, ArtifactWriter(tmp_path / "out") as writer:
        raise EngineError(f"cannot parse {writer.path / ONNX}")
    assert str(caught.value) == f"cannot parse {tmp_path / 'out' / ONNX}"
    with pytest.raises(OutputError) as caught_too, ArtifactWriter(tmp_path / "out") as writer:
        raise RuntimeError(f"{writer.path / ONNX}: No space left on device")
    assert ".partial" not in str(caught_too.value)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_leaves_the_directory_of_another_that_is_at_work(made: Artifact) -> None:
    with ArtifactWriter(made.path) as first, ArtifactWriter(made.path) as second:
        assert first.path.is_dir()
        assert second.path.is_dir()
        assert first.path != second.path


def test_where_the_file_system_cannot_exchange_the_artifact_is_replaced_all_the_same(
    made: Artifact, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoExchange:
        def renameat2(self, *_: object) -> int:
            import ctypes
            import errno

            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr("deploy.artifact.writer.ctypes.CDLL", lambda *_, **__: NoExchange())
    write(made.path, "new")
    assert check_whole(made.path) == "new"
    assert [path.name for path in made.path.parent.iterdir()] == ["made"]


def test_an_output_directory_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not an artifact of deploy"):
        ArtifactWriter(foreign)
    assert [path.name for path in foreign.iterdir()] == ["chapter1.tex"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a directory"):
        check_output(tmp_path / "file")


def test_an_empty_directory_may_be_written_to(tmp_path: Path, write: Write) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    check_whole(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_what_stood_there(tmp_path: Path, write: Write) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        write(small / "made")
        with pytest.raises(OutputError, match="No space left on device"), ArtifactWriter(small / "made") as writer:
            (writer.path / ENGINE).write_bytes(bytes(1_000_000))
        assert check_whole(small / "made") == "old"
        assert [path.name for path in small.iterdir()] == ["made"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def check_modes(artifact: Artifact, umask: int) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in artifact.path.iterdir()}
    assert modes.keys() > artifact.manifest.files.keys()
    assert set(modes.values()) == {0o666 & ~umask}, modes
    assert stat.S_IMODE(artifact.path.stat().st_mode) == 0o777 & ~umask


def test_every_file_has_the_mode_that_the_umask_gives(tmp_path: Path, tiny_onnx: Path, umask: int) -> None:
    with ArtifactWriter(tmp_path / "made") as writer:
        save_weights(nn.Linear(2, 2), writer.path / WEIGHTS)  # safetensors writes 0600
        shutil.copyfile(tiny_onnx, writer.path / ONNX)
        for mode in (0o600, 0o444, 0o777):
            (writer.path / f"file-{mode:o}").write_text("")
            (writer.path / f"file-{mode:o}").chmod(mode)
        check_modes(writer.commit(msgspec.structs.replace(open_onnx(tiny_onnx).manifest, files={})), umask)


def test_artifacts_of_every_stage_have_the_mode_that_the_umask_gives(tmp_path: Path, tiny_onnx: Path, umask: int) -> None:
    feeds = [{"input": np.random.default_rng(0).standard_normal((8, 100), dtype=np.float32)}]
    exported = deploy.export(tmp_path / "mlp", arch="mlp")
    check_modes(exported, umask)
    check_modes(deploy.convert(exported, tmp_path / "half", precision="fp16"), umask)
    check_modes(deploy.quantize(exported, tmp_path / "int8", calib=feeds), umask)
    check_modes(deploy.export(tmp_path / "bare", onnx=tiny_onnx), umask)


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o644, 0o664])
def test_a_hard_linked_file_keeps_its_mode_where_it_came_from(tmp_path: Path, tiny_onnx: Path, umask: int, kept: int) -> None:
    original = tmp_path / "kept"
    original.write_bytes(tiny_onnx.read_bytes())
    original.chmod(kept)
    with ArtifactWriter(tmp_path / "made") as writer:
        os.link(original, writer.path / ONNX)
        made = writer.commit(msgspec.structs.replace(open_onnx(tiny_onnx).manifest, files={}))
    check_modes(made, umask)
    made.verify()
    assert stat.S_IMODE(original.stat().st_mode) == kept
    assert original.samefile(made.onnx_path) == (kept == 0o666 & ~umask)


def test_output_under_a_path_that_is_not_utf8_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "caf\udce9"
    for out in (odd, odd / "inside"):
        with pytest.raises(OutputError, match=r"is not UTF-8.*choose another `out`"):
            check_output(out)
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(OutputError, match="is not UTF-8"):
        check_output(Path())
