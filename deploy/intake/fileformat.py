"""What a file that is given as weights holds, by its content: a format that is read, or one that is named and refused."""

import codecs
import json
import re
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal

from deploy.errors import CheckpointError

Format = Literal["safetensors", "index", "npz", "pickle"]

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".npz")
_INDEX = ".index.json"

_MAGIC = (
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive: unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes"),
    (b"GGUF", "a GGUF file, as llama.cpp reads"),
    (b"\x93NUMPY", "a single numpy array: weights are arrays by name, as numpy.savez writes them"),
    (b"ftrt", "a TensorRT engine"),
)
_ONNX_FIELDS = {1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26}
"""The numbers of the fields of ModelProto (onnx.proto3)."""
_ONNX_GRAPH = 7


def file_format(path: Path) -> Format:
    """The format of the weights in `path`; "pickle" also for what nothing tells apart.

    Raises CheckpointError, which says what the file is, for what holds no weights.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1024)
            onnx = _is_onnx(file)
        if not start:
            raise CheckpointError(f"{path} is empty: copy it again")
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000:  # the limit of safetensors
            return "safetensors"
        if onnx:
            raise CheckpointError(
                f"{path} is not a checkpoint but an ONNX model, whose graph and weights go together: give it as `onnx` alone"
            )
        if start[257:262] == b"ustar":  # many checkpoints are named `.tar`, but this is a real archive
            with tarfile.open(path) as tar:
                raise CheckpointError(f"{path} is a tar archive{_inside(tar.getnames())}")
        if zipfile.is_zipfile(path):
            return _zip_format(path)
        for magic, what in _MAGIC:
            if start.startswith(magic):
                raise CheckpointError(f"{path} is not a checkpoint but {what}")
        return _text_format(path, start)
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def shard_files(index: Path) -> dict[Path, list[str]]:
    """The files that an index of shards names, which lie beside it, each with the names of its tensors.

    Raises CheckpointError for one that is no index, or names files that are not there.
    """
    mapped = _read_json(index)
    mapped = mapped.get("weight_map") if isinstance(mapped, dict) else None
    if not isinstance(mapped, dict) or not mapped:
        raise CheckpointError(f"{index} is not a checkpoint but JSON that names no shards: expected a `weight_map`")
    files: dict[Path, list[str]] = {}
    for name, file in mapped.items():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{index} names {file!r} as a shard: expected a file beside it")
        files.setdefault(index.parent / file, []).append(name)
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise CheckpointError(
            f"{index} is an index of {len(files)} shards, of which {', '.join(lost[:10])} cannot be found beside it"
        )
    return files


def refuse_shard(path: Path) -> None:
    """Raise CheckpointError if `path` is one of the shards of an index beside it, all of which are there."""
    if shard_of(path) is None:
        return
    for index in sorted(path.parent.glob(f"*{_INDEX}")):
        try:
            files = shard_files(index)
        except CheckpointError:
            continue  # of no help
        if path in files and len(files) > 1:
            raise CheckpointError(f"{path} is one of {len(files)} shards: give {index.name}, which names all of them")


def shard_of(path: Path) -> str | None:
    """`shard 1 of 2` if the name of `path` says so."""
    found = re.search(r"-(\d+)-of-(\d+)\.\w+$", path.name)
    return f"shard {int(found[1])} of {int(found[2])}" if found else None


def refuse_folder(path: Path) -> None:
    """Raise CheckpointError for a folder, with the names of the weights in it."""
    if (path / ".metadata").is_file() and any(path.glob("*.distcp")):
        raise CheckpointError(
            f"{path} is a directory of torch.distributed.checkpoint: make one file of it with"
            " torch.distributed.checkpoint.format_utils.dcp_to_torch_save(DIR, FILE)"
        )
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    raise CheckpointError(f"{path} is a directory, not a checkpoint{_give(names, 'in it')}")


def _inside(names: Iterable[str]) -> str:
    given = _give(names, "inside")
    return f": unpack it{given.replace(':', ' and', 1)}" if given else ", with no checkpoint inside"


def _give(names: Iterable[str], where: str) -> str:
    """`: give NAME where` for the files that look like weights; empty if none does."""
    names = [name for name in names if not name.startswith((".", "__MACOSX"))]
    found = [name for name in names if name.endswith(_INDEX)] or [name for name in names if name.endswith(_SUFFIXES)]
    if not found:
        return ""
    return f": give {' or '.join(found[:3])}{' or one more' if len(found) > 3 else ''} {where}"


def _zip_format(path: Path) -> Format:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        raise CheckpointError(
            f"{path} is a TorchScript archive, which carries code: save the state_dict instead,"
            " torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if "models/model.json" in inner or "archive_format" in inner:
        raise CheckpointError(f"{path} is a torch.export archive, not a checkpoint: save the state_dict of the module instead")
    if "data.pkl" in inner:
        return "pickle"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    raise CheckpointError(f"{path} is a zip archive that torch.save did not write{_inside(names)}")


def _text_format(path: Path, start: bytes) -> Format:
    """Index for an index of shards, "pickle" for what is no text. Raises CheckpointError for other text."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)  # whose end may cut a letter in two
    except UnicodeDecodeError:
        return _unknown(path)
    text = text.strip()
    if not text or not all(letter.isprintable() or letter.isspace() for letter in text):
        return _unknown(path)
    if text.startswith("version https://git-lfs"):
        raise CheckpointError(
            f"{path} is not a checkpoint but a Git LFS pointer to it: `git lfs pull` in its repository fetches the file itself"
        )
    if text.startswith("<"):
        title = re.search(r"<title[^>]*>\s*([^<]{1,80})", text, re.IGNORECASE)
        what = "a web page" if re.search(r"<(!doctype\s+html|html|head|body|title)\b", text, re.IGNORECASE) else "an XML document"
        named = f" ({title[1].strip()!r})" if title else ""
        raise CheckpointError(
            f"{path} is not a checkpoint but {what}{named}: the server sent it in place of the file; download the file again"
        )
    if text[0] in "{[":
        if path.suffix == ".json" or '"weight_map"' in text or path.stat().st_size > len(start):
            shard_files(path)
            return "index"
        raise CheckpointError(f"{path} is not a checkpoint but JSON: {_first_line(text)}")
    raise CheckpointError(f"{path} is not a checkpoint but text that begins with {_first_line(text)!r}")


def _unknown(path: Path) -> Format:
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            if file.read(2) not in (b"PK", b"\x80\x02"):  # what torch.save writes may have any name
                raise CheckpointError(f"{path} is damaged or no safetensors file")
    return "pickle"


def _first_line(text: str) -> str:
    line = text.splitlines()[0]
    return line if len(line) <= 60 else f"{line[:60]}..."


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not a checkpoint but damaged JSON: {error}") from error


def _is_onnx(file: BinaryIO) -> bool:
    """Whether the file is a ModelProto from its first byte to its last, by the fields that it is made of."""
    size = file.seek(0, 2)
    file.seek(0)
    seen = set()
    while file.tell() < size:
        tag = _varint(file)
        if tag is None or tag >> 3 not in _ONNX_FIELDS or tag & 7 not in (0, 2):
            return False
        value = _varint(file)
        if value is None:
            return False
        if tag & 7 == 2:
            file.seek(value, 1)
        seen.add(tag >> 3)
    return _ONNX_GRAPH in seen and file.tell() == size


def _varint(file: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
