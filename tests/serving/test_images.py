"""Images that are too large, damaged, or none, and what is answered to the others: masks and boxes."""

import base64
import io
import struct
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from PIL import Image

import deploy
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


SEGMENTER = """<ir_version: 10, opset_import: ["": 20]>
g (float[N, 1, H, W] input) => (float[N, 3, H, W] logits) <float[3, 1, 1, 1] w = {0, 4, 8}, float[3] b = {0, -1, -4}>
{ logits = Conv(input, w, b) }"""
DETECTOR = """<ir_version: 10, opset_import: ["": 20]>
g (float[N, 1, 8, 8] input) => (float[N, 1, 4] boxes, float[N, 1, 2] scores)
<float[1, 4] all = {2, 2, 6, 8}, float[2] base = {0, 2}, int64[1] one = {1}, int64[2] sides = {2, 3}, float[1] none = {0}> {
    mean = ReduceMean<keepdims = 0>(input, sides)
    row = Unsqueeze(mean, one)
    zero = Mul(row, none)
    boxes = Add(zero, all)
    scores = Add(zero, base) }"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a segmenter by brightness, and of a detector that finds one box of 8x8 pixels in all pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "grey.json").write_text('{"channels": 1}')
    (folder / "small.json").write_text('{"channels": 1, "resize": [8, 8]}')
    (folder / "classes.txt").write_text("dark\ngrey\nbright\n")
    (folder / "thing.txt").write_text("thing\n")
    for name, text, options in (
        ("segmenter", SEGMENTER, {"preprocess": f"{folder}/grey.json", "classes": folder / "classes.txt"}),
        ("detector", DETECTOR, {"preprocess": f"{folder}/small.json", "classes": folder / "thing.txt", "decode": "ssd"}),
    ):
        onnx.save(onnx.parser.parse_model(text), folder / f"{name}.onnx")
        deploy.export(folder / name, onnx=folder / f"{name}.onnx", **options)
    started = Server([str(folder / "segmenter"), str(folder / "detector")])
    yield started
    started.kill()


def bands(width: int, height: int) -> bytes:
    """A PNG whose upper half is black and whose lower half is white."""
    image, file = Image.new("L", (width, height)), io.BytesIO()
    image.paste(255, (0, height // 2, width, height))
    image.save(file, "PNG")
    return file.getvalue()


def test_a_mask_comes_in_the_size_of_the_image_in_json_or_alone(pictures: Server) -> None:
    status, document, _ = call(pictures, "/v2/models/segmenter/segment", bands(20, 10))
    assert (status, document["model_name"], document["width"], document["height"]) == (200, "segmenter", 20, 10)
    assert document["classes"] == [{"class": "dark", "share": 0.5}, {"class": "bright", "share": 0.5}]
    png = base64.b64decode(document["mask"])
    with Image.open(io.BytesIO(png)) as mask:
        assert (mask.size, mask.mode, mask.getpixel((3, 4)), mask.getpixel((3, 5))) == ((20, 10), "P", 0, 2)
    request = urllib.request.Request(
        f"http://{pictures.http}/v2/models/segmenter/segment", data=bands(20, 10), headers={"Accept": "image/png"}
    )
    with urllib.request.urlopen(request) as answer:
        assert (answer.headers["Content-Type"], answer.read()) == ("image/png", png)


def test_boxes_come_in_the_pixels_of_the_image(pictures: Server) -> None:
    status, document, _ = call(pictures, "/v2/models/detector/versions/1/detect", bands(80, 40))
    assert (status, document["model_version"]) == (200, "1")
    (found,) = document["boxes"]
    assert (found["class"], found["box"]) == ("thing", [20, 10, 60, 40])
    assert found["score"] == pytest.approx(np.exp(2) / (1 + np.exp(2)))
    assert call(pictures, "/v2/models/detector/detect?min_score=0.95", bands(80, 40))[1]["boxes"] == []


def test_a_model_for_something_else_a_wrong_score_and_no_image_are_refused(pictures: Server) -> None:
    for path, data, message in (
        ("segmenter/detect", bands(8, 8), "'segmenter' finds no boxes in images: it is for /segment"),
        ("detector/segment", bands(8, 8), "'detector' segments no images: it is for /detect"),
        ("segmenter/classify", bands(8, 8), "'segmenter' classifies no images: it is for /segment"),
        ("detector/detect?min_score=2", bands(8, 8), "min_score must be a number from 0 to 1, not '2'"),
        ("detector/detect?min_score=nan", bands(8, 8), "min_score must be a number from 0 to 1"),
        ("segmenter/segment", b"none", "neither a JPEG nor a PNG"),
    ):
        status, document, _ = call(pictures, f"/v2/models/{path}", data)
        assert (status, message in document["error"]) == (400, True), document
