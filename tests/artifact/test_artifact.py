"""Artifacts are whole or not there, and say so when they are damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from deploy.artifact.artifact import Artifact, standing
from deploy.artifact.manifest import ENGINE, MANIFEST, ONNX, Parent, Stage
from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.writer import ArtifactWriter, check_output
from deploy.errors import ArtifactError, EngineError, OutputError

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


@pytest.fixture
def made(tiny_onnx: Path, tmp_path: Path) -> Artifact:
    """An artifact of the tiny ONNX file at `tmp_path / "made"`."""
    return write(tmp_path / "made", tiny_onnx)


def write(out: Path, onnx_file: Path, name: str = "old") -> Artifact:
    bare = open_onnx(onnx_file)
    with ArtifactWriter(out) as writer:
        shutil.copyfile(onnx_file, writer.path / ONNX)
        return writer.commit(msgspec.structs.replace(bare.manifest, name=name, files={}))


def check_whole(out: Path) -> str:
    artifact = Artifact.open(out)
    artifact.verify()
    assert artifact.manifest.name in VERSIONS
    return artifact.manifest.name


def test_what_is_written_is_what_is_read(made: Artifact) -> None:
    opened = Artifact.open(made.path)
    opened.verify()
    assert opened == made
    assert set(opened.manifest.files) == {ONNX}
    assert [path.name for path in made.path.parent.iterdir()] == ["made"]


def test_a_writer_killed_at_any_step_leaves_the_old_artifact_or_the_new_whole(made: Artifact, tmp_path: Path) -> None:
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
    write(out, source / ONNX)
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
    made: Artifact, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoExchange:
        def renameat2(self, *_: object) -> int:
            import ctypes
            import errno

            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr("deploy.artifact.writer.ctypes.CDLL", lambda *_, **__: NoExchange())
    write(made.path, tiny_onnx, "new")
    assert check_whole(made.path) == "new"
    assert [path.name for path in made.path.parent.iterdir()] == ["made"]


def test_a_flipped_byte_in_the_payload_is_found(made: Artifact) -> None:
    content = bytearray(made.onnx_path.read_bytes())
    content[len(content) // 2] ^= 1
    made.onnx_path.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=r"model\.onnx is damaged"):
        Artifact.open(made.path).verify()


def test_a_truncated_payload_is_found_by_its_size(made: Artifact) -> None:
    made.onnx_path.write_bytes(made.onnx_path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bytes; the manifest says"):
        Artifact.open(made.path).verify()


def test_a_missing_payload_is_found(made: Artifact) -> None:
    made.onnx_path.unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        Artifact.open(made.path).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other"}, "was edited"),
        ({"kind": "engin"}, r"kind"),
        ({"inputs": [{"name": "x", "dtype": "float99", "shape": [1]}]}, "float99"),
        ({"surprise": 1}, "surprise"),
        ({"format": 99}, "format 99"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused(made: Artifact, change: dict[str, object], message: str) -> None:
    manifest = json.loads((made.path / MANIFEST).read_text())
    (made.path / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(made.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\x00\xff"])
def test_a_manifest_that_is_no_manifest_is_refused(made: Artifact, text: str) -> None:
    (made.path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Artifact.open(made.path)


def test_what_is_no_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact at"):
        Artifact.open(tmp_path / "missing")
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        Artifact.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="expected a directory"):
        Artifact.open(tmp_path / "file")


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


def test_an_empty_directory_may_be_written_to(tmp_path: Path, tiny_onnx: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", tiny_onnx)
    check_whole(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_what_stood_there(tmp_path: Path, tiny_onnx: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        write(small / "made", tiny_onnx)
        with pytest.raises(OutputError, match="No space left on device"), ArtifactWriter(small / "made") as writer:
            (writer.path / ENGINE).write_bytes(bytes(1_000_000))
        assert check_whole(small / "made") == "old"
        assert [path.name for path in small.iterdir()] == ["made"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def child_of(parent: Artifact, out: Path, onnx_file: Path) -> Artifact:
    with ArtifactWriter(out) as writer:
        shutil.copyfile(onnx_file, writer.path / ONNX)
        record = Parent(path=os.path.relpath(parent.path, out), digest=parent.manifest.digest)
        return writer.commit(msgspec.structs.replace(parent.manifest, name="child", files={}, parent=record))


def test_a_parent_is_found_after_both_moved_together(made: Artifact, tiny_onnx: Path, tmp_path: Path) -> None:
    child = child_of(made, tmp_path / "child", tiny_onnx)
    assert child.parent() == made
    assert child.root() == made
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    made.path.rename(moved / "made")
    child.path.rename(moved / "child")
    assert Artifact.open(moved / "child").root().path == moved / "made"


def test_a_parent_that_is_gone_or_replaced_is_an_error_that_says_what_is_missing(
    made: Artifact, tiny_onnx: Path, tmp_path: Path
) -> None:
    child = child_of(made, tmp_path / "child", tiny_onnx)
    replaced = write(made.path, tiny_onnx, "other")
    with pytest.raises(
        ArtifactError, match=f"has digest {replaced.manifest.digest[:12]}, and {made.manifest.digest[:12]} was used"
    ):
        child.parent()
    shutil.rmtree(made.path)
    with pytest.raises(ArtifactError, match=r"parent of .*child cannot be used: no artifact at .*made"):
        child.root()


def test_an_artifact_stands_only_for_the_same_request_and_undamaged(made: Artifact) -> None:
    assert standing(made.path, made.manifest.stage) == made
    assert standing(made.path, Stage(name="onnx", request="another")) is None
    made.onnx_path.write_bytes(b"")
    assert standing(made.path, made.manifest.stage) is None
