"""What files given as weights are, on real files of many kinds under misleading names."""

import contextlib
import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from torch import nn

from deploy.errors import CheckpointError
from deploy.intake.checkpoint import read_state_dict, weights_digest
from deploy.intake.fileformat import file_format

STATE = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def equal(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in STATE.items()})


def shards(folder: Path, names: tuple[str, str] = SHARDS, index: str = "model.safetensors.index.json") -> Path:
    """The tensors in two files by turns, and their index."""
    mapped = {name: names[place % 2] for place, name in enumerate(STATE)}
    for file in names:
        part = {name: STATE[name] for name in STATE if mapped[name] == file}
        if file.endswith(".safetensors"):
            safetensors.torch.save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapped}, indent=2))
    return folder / index


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights", "w.safetensors", "w.npz", "w.pth", "w.onnx"])
@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("pickle", lambda path: torch.save(STATE, path)),
        ("pickle", lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False)),
        ("pickle", lambda path: torch.save({name: tensor.numpy() for name, tensor in STATE.items()}, path)),
        ("safetensors", lambda path: safetensors.torch.save_file(STATE, path)),
        ("npz", npz),
    ],
    ids=["zip", "legacy", "arrays", "safetensors", "npz"],
)
def test_content_tells_the_format_and_not_the_name(tmp_path: Path, name: str, kind: str, write) -> None:
    write(tmp_path / name)
    assert file_format(tmp_path / name) == kind
    assert equal(read_state_dict(tmp_path / name))


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    found = read_state_dict(shards(tmp_path))
    assert equal(found)
    assert not found.ordered
    names = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    assert equal(read_state_dict(shards(tmp_path, names, "pytorch_model.bin.index.json")))


def test_digest_of_shards_is_of_their_content(tmp_path: Path) -> None:
    index = shards(tmp_path)
    before = weights_digest(index)
    assert before == weights_digest(index)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in safetensors.torch.load_file(tmp_path / SHARDS[1]).items()},
                                tmp_path / SHARDS[1])  # fmt: skip
    assert weights_digest(index) != before


def test_shard_is_refused_with_the_index_that_was_found_to_name_it(tmp_path: Path) -> None:
    index = shards(tmp_path)
    for shard in SHARDS:
        with pytest.raises(CheckpointError, match=f"{shard} is one of 2 shards: give model.safetensors.index.json"):
            read_state_dict(tmp_path / shard)
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"is an index of 2 shards, of which {SHARDS[1]} cannot be found"):
        read_state_dict(index)
    read_state_dict(tmp_path / SHARDS[0])  # the index is of no help


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {}}, "names no shards"),
        ({"weight_map": {"a": "../outside.safetensors"}}, "names '../outside.safetensors' as a shard"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd' as a shard"),
        ({"weight_map": {"a": 3}}, "names 3 as a shard"),
        ({"weight_map": {"a": "x.index.json"}}, "is an index of shards: expected a file"),
        ({"weight_map": {"lost": SHARDS[0]}}, "lacks 'lost', which x.index.json says is in it"),
        ({"hidden_size": 768}, "JSON that names no shards"),
        ("{", "damaged JSON"),
    ],
)
def test_index_that_cannot_be_used_is_refused(tmp_path: Path, index: object, message: str) -> None:
    shards(tmp_path)
    (tmp_path / "x.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "x.index.json")


def tar_of(name: str, mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def zip_of(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "")
    return file.getvalue()


def onnx_model() -> bytes:
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [onnx.ValueInfoProto(name="y")]
    )
    return onnx.helper.make_model(graph).SerializeToString()


OTHERS = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer.*git lfs pull"),
    "page": (b"<!DOCTYPE html><html><head><title>Quota exceeded</title>", r"a web page \('Quota exceeded'\)"),
    "page after blanks": (("\ufeff\n <html lang='de'>a" + "ö" * 900).encode(), "a web page"),
    "answer of a bucket": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "json": (b'{"error": "Repository not found"}', "but JSON: .*Repository not found"),
    "text": (b"404: Not Found", "but text that begins with '404: Not Found'"),
    "onnx": (onnx_model(), "an ONNX model.*`onnx`"),
    "tar": (tar_of("run/best.pth"), "is a tar archive: unpack it and give run/best.pth inside"),
    "tar without": (tar_of("readme"), "is a tar archive, with no checkpoint inside"),
    "tar.gz": (tar_of("best.pth", "w:gz"), "compressed with gzip: unpack it first"),
    "gzip": (gzip.compress(b"x"), "compressed with gzip: unpack it first"),
    "zip": (zip_of("run/model.safetensors"), "a zip archive that torch.save did not write: unpack it and give run/model.safe"),
    "zip without": (zip_of("a.txt"), "a zip archive that torch.save did not write, with no checkpoint inside"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(99), "a GGUF file"),
    "array": (b"\x93NUMPY\x01\x00" + bytes(99), "a single numpy array"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", ".npz"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_checkpoint_is_named_under_any_name(tmp_path: Path, kind: str, suffix: str) -> None:
    content, message = OTHERS[kind]
    path = tmp_path / f"given{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"given{suffix} .*{message}") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_onnx_is_told_from_what_begins_like_it(tmp_path: Path) -> None:
    for content in (onnx_model()[:-1], onnx_model() + b"\xff", b"\x08\x07", b"\x08" * 99):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_state_dict(tmp_path / "x")
        assert "ONNX" not in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_damaged_arrays_are_an_error(tmp_path: Path, share: float) -> None:
    npz(tmp_path / "x.npz")
    content = bytearray((tmp_path / "x.npz").read_bytes())
    (tmp_path / "x.npz").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"x\.npz"):
        read_state_dict(tmp_path / "x.npz")
    content[int(len(content) * share) // 2] ^= 0xFF
    (tmp_path / "x.npz").write_bytes(content)
    with contextlib.suppress(CheckpointError):  # where the damage is seen: a tensor's changed name is found when it is loaded
        read_state_dict(tmp_path / "x.npz")


def test_arrays_that_only_a_pickle_could_give_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", weight=np.ones((2, 2)), beside=np.array([{"a": 1}], dtype=object), text=np.array("v1"))
    assert list(read_state_dict(tmp_path / "x.npz")) == ["weight"]
    np.savez(tmp_path / "x.npz", weight=np.zeros(2, dtype="V2"))
    with pytest.raises(CheckpointError, match=r"'weight' as \|V2"):
        read_state_dict(tmp_path / "x.npz")


def test_arrays_of_the_other_byte_order_keep_their_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", weight=np.arange(4, dtype=">f4"))
    assert torch.equal(read_state_dict(tmp_path / "x.npz")["weight"], torch.arange(4.0))


def test_folder_is_refused_with_the_weights_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a directory, not a checkpoint$"):
        read_state_dict(tmp_path)
    safetensors.torch.save_file(STATE, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is a directory, not a checkpoint: give model.safetensors in it"):
        read_state_dict(tmp_path)
    shards(tmp_path)
    with pytest.raises(CheckpointError, match=r": give model.safetensors.index.json in it"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("write", [lambda p: torch.save(STATE, p), lambda p: safetensors.torch.save_file(STATE, "s"), npz])
def test_weights_whose_path_is_not_utf8_are_read(tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(b"caf\xe9"))
    try:
        write(path)
        if not path.exists():
            Path("s").rename(path)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    assert equal(read_state_dict(path))
