"""Letterbox and padding against independent arithmetic; orientation against Pillow's own pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from deploy.artifact.image_ops import center_crop, letterbox, upright
from deploy.artifact.preprocess import Preprocess
from deploy.errors import DataError

NEAREST = Image.Resampling.NEAREST


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def ultralytics_borders(height: int, width: int, wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, inner height and inner width as in `LetterBox.__call__` with auto=False, scale_fill=False, scaleup=True, center=True."""
    ratio = min(wanted[0] / height, wanted[1] / width)
    inner = round(width * ratio), round(height * ratio)
    dw, dh = (wanted[1] - inner[0]) / 2, (wanted[0] - inner[1]) / 2
    return round(dh - 0.1), round(dw - 0.1), inner[1], inner[0]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (100, 100), (333, 77), (77, 333), (50, 31)])
@pytest.mark.parametrize("wanted", [(64, 64), (48, 80), (97, 33)])
def test_a_letterbox_has_the_borders_of_ultralytics(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    white = Image.new("RGB", size, "white")
    boxed = np.asarray(letterbox(white, *wanted, NEAREST, fill=114, centred=True))
    top, left, height, width = ultralytics_borders(size[1], size[0], wanted)
    expected = np.full((*wanted, 3), 114, dtype=np.uint8)
    expected[top : top + max(height, 1), left : left + max(width, 1)] = 255
    np.testing.assert_array_equal(boxed, expected)


@pytest.mark.parametrize("size", [(1, 400), (400, 1)])
def test_of_the_thinnest_image_one_pixel_stays(size: tuple[int, int]) -> None:
    boxed = np.asarray(letterbox(Image.new("L", size, 255), 9, 9, NEAREST, fill=0, centred=True))
    assert (boxed == 255).sum() == 9


@pytest.mark.parametrize(("size", "wanted"), [((40, 20), (40, 40)), ((20, 40), (40, 60)), ((40, 40), (40, 40))])
def test_at_the_top_left_the_padding_is_below_and_on_the_right(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    image = picture(*size)
    boxed = np.asarray(letterbox(image, *wanted, NEAREST, fill=(1, 2, 3), centred=False))
    assert boxed.shape == (*wanted, 3)
    np.testing.assert_array_equal(boxed[: size[1], : size[0]], np.asarray(image))
    outside = np.ones(wanted, dtype=bool)
    outside[: size[1], : size[0]] = False
    assert (boxed[outside] == [1, 2, 3]).all()


def test_a_grey_letterbox_is_filled_with_one_number() -> None:
    boxed = np.asarray(letterbox(picture(40, 20, "L"), 40, 40, NEAREST, fill=7, centred=True))
    assert (boxed[:10] == 7).all()
    assert (boxed[30:] == 7).all()


def test_a_crop_of_a_small_image_is_padded_with_the_fill() -> None:
    image = picture(4, 4)
    cropped = np.asarray(center_crop(image, 8, 6, 9))
    np.testing.assert_array_equal(cropped[2:6, 1:5], np.asarray(image))
    assert (cropped[:2] == 9).all()
    assert (cropped[:, 0] == 9).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone(orientation: int) -> None:
    straight = np.asarray(picture(6, 4))
    turned = {
        1: straight, 2: straight[:, ::-1], 3: straight[::-1, ::-1], 4: straight[::-1], 5: straight.transpose(1, 0, 2),
        6: np.rot90(straight, 1), 7: straight[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(straight, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(turned))
    image.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(upright(image)), straight)


def test_damaged_exif_data_is_an_error_of_the_image() -> None:
    image = picture(4, 4)
    image.info["exif"] = b"Exif\x00\x00not a header at all"
    with pytest.raises(DataError, match="EXIF orientation cannot be read"):
        upright(image)


def test_the_first_frame_of_several_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "tif"):
        frames[0].save(tmp_path / f"frames.{suffix}", save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(Preprocess().open(tmp_path / f"frames.{suffix}")[:, 0, 0], [1, 0, 0])


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no image at .*gone\.png"):
        Preprocess().open(tmp_path / "gone.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_image_is_named(kind, tmp_path):
    path = tmp_path / "half.img"
    content = encoded(picture(64, 64), kind)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"half\.img (cannot be read: .|is not an image)"):
        Preprocess().open(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_what_is_no_image_is_named(content, tmp_path):
    (tmp_path / "fake.png").write_bytes(content)
    with pytest.raises(DataError, match=r"fake\.png"):
        Preprocess().open(tmp_path / "fake.png")
    with pytest.raises(DataError, match="the image"):
        Preprocess().open(content)


def test_a_folder_in_place_of_an_image_is_named(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        Preprocess().open(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_files_and_their_bytes_give_the_same_array(kind, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded(picture(20, 30), kind))
    with Image.open(path) as image:
        expected = Preprocess(crop=8)(image.convert("RGB"))
    for source in (path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(Preprocess(crop=8).open(source), expected)
