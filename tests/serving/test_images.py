"""Images that are too large, damaged, or none."""

import io
import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from deploy.errors import DataError
from deploy.serving.guard import Limits
from deploy.serving.images import check_image

from .conftest import Server, call


def png_of(width: int, height: int) -> bytes:
    """The head of a PNG that says it is so large, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_images_that_are_bombs_or_none_are_refused(limited: Server, digits: Path) -> None:
    good = (digits / "0.png").read_bytes()
    classify = "/v2/models/digits/classify"
    assert call(limited, classify, good)[0] == 200
    for data, message in (
        (png_of(100_000, 100_000), "pixels"),
        (png_of(2100, 2000), "pixels"),
        (b"GIF89a" + bytes(100), "neither a JPEG nor a PNG"),
        (b"", "neither a JPEG nor a PNG"),
        (good[: len(good) // 2], "cannot be read"),
    ):
        status, document, _ = call(limited, classify, data)
        assert (status, message in document["error"]) == (400, True), document
    for query in ("top=0", "top=x", "top=5000", "priority=-1", "timeout=1e9"):
        assert call(limited, f"{classify}?{query}", good)[0] == 400
    wide = io.BytesIO()
    Image.new("RGB", (40, 40)).save(wide, "JPEG")
    assert call(limited, classify, wide.getvalue())[0] == 200


def test_nothing_is_decoded_to_see_how_large_an_image_is() -> None:
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"too many pixels; 50,000,000 are the most"):
        check_image(png_of(65000, 65000), Limits().image_pixels)
    assert time.perf_counter() - start < 0.5
