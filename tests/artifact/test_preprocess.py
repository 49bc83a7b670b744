import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from deploy.artifact.preprocess import INTERPOLATIONS, PRESETS, Preprocess, preset
from deploy.artifact.usercode import UserFunction
from deploy.errors import DataError, UsageError, UserCodeError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth shades with noise upon them, so that every interpolation gives another result."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[0:height, 0:width]
    shades = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    return Image.fromarray(np.clip(shades + rng.normal(0, 30, shades.shape), 0, 255).astype(np.uint8)).convert(mode)


def by_torchvision(image: Image.Image, resize: object, crop: object, interpolation: str = "bilinear") -> np.ndarray:
    steps: list[object] = []
    if resize is not None:
        steps.append(transforms.Resize(resize, interpolation=InterpolationMode(interpolation)))
    if crop is not None:
        steps.append(transforms.CenterCrop(crop))
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose(steps)(image).numpy()


SIZES = [(33, 57), (57, 33), (64, 64), (65, 64), (1, 1), (3, 200), (223, 224), (500, 333)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("resize", "crop"),
    [(64, 56), (57, 57), (40, None), (None, 49), (None, 50), ((30, 47), None), ((30, 47), (31, 40)), (256, 224), (None, None)],
)
def test_resize_and_crop_are_those_of_torchvision_bit_for_bit(size, resize, crop):
    image = picture(*size)
    result = Preprocess(resize=resize, crop=crop, mean=MEAN, std=STD)(image)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, by_torchvision(image, resize, crop))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(91, 67), (20, 31)], ids=["down", "up"])
def test_every_interpolation_is_that_of_torchvision(interpolation, size):
    image = picture(*size)
    result = Preprocess(resize=48, crop=40, mean=MEAN, std=STD, interpolation=interpolation)(image)
    np.testing.assert_array_equal(result, by_torchvision(image, 48, 40, interpolation))


def test_no_two_interpolations_are_the_same():
    results = [Preprocess(resize=48, interpolation=name)(picture(91, 67)).tobytes() for name in INTERPOLATIONS]
    assert len(set(results)) == len(INTERPOLATIONS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_colour_mode_becomes_the_rgb_and_the_grey_that_pillow_makes_of_it(mode):
    image = picture(40, 30).convert("RGB").convert("P").convert(mode) if mode == "PA" else picture(40, 30, mode)
    colour = Preprocess(resize=32, crop=28, mean=MEAN, std=STD)(image)
    np.testing.assert_array_equal(colour, by_torchvision(image.convert("RGB"), 32, 28))
    grey = Preprocess(resize=32, crop=28, channels=1)(image)
    steps = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor()])
    np.testing.assert_array_equal(grey, steps(image.convert("L")).numpy())


@pytest.mark.parametrize("transparency", [3, bytes(range(256))], ids=["index", "bytes"])
def test_a_palette_with_transparency_keeps_its_colours(transparency, tmp_path):
    image = picture(20, 20).convert("P")
    image.save(tmp_path / "p.png", transparency=transparency)
    with Image.open(tmp_path / "p.png") as read:
        assert (read.mode, type(read.info["transparency"])) == ("P", type(transparency))
    np.testing.assert_array_equal(Preprocess().open(tmp_path / "p.png"), Preprocess()(image.convert("RGB")))
    np.testing.assert_array_equal(Preprocess(channels=1).open(tmp_path / "p.png"), Preprocess(channels=1)(image.convert("L")))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_of_sixteen_bit_grey_the_high_byte_counts(suffix, tmp_path):
    values = np.array([[0, 255, 256, 1000], [30000, 65280, 65535, 32768]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    result = Preprocess(channels=1, scale=1.0).open(tmp_path / f"deep.{suffix}")
    np.testing.assert_array_equal(result, (values >> 8)[None])
    colour = Preprocess(scale=1.0).open(tmp_path / f"deep.{suffix}")
    np.testing.assert_array_equal(colour, np.repeat((values >> 8)[None], 3, axis=0))


def test_sixteen_bit_grey_in_pillows_older_mode_is_read_alike():
    values = np.array([[0, 1000, 65535]], dtype=np.int32)
    image = Image.fromarray(values)
    assert image.mode == "I"
    image.format = "PNG"
    np.testing.assert_array_equal(Preprocess(channels=1, scale=1.0)(image), [[[0, 3, 255]]])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode, tmp_path):
    Image.new(mode, (4, 4), 7).save(tmp_path / "range.tif")
    with pytest.raises(DataError, match=rf"range\.tif: 32-bit pixels \(mode '{mode}'\).*convert"):
        Preprocess().open(tmp_path / "range.tif")


def test_a_colour_space_that_pillow_cannot_convert_is_refused():
    with pytest.raises(DataError, match="'LAB' cannot be converted to L"):
        Preprocess(channels=1)(Image.new("LAB", (4, 4)))


def test_bgr_turns_the_channels_round_and_takes_mean_and_std_in_that_order():
    image = picture(8, 8)
    rgb = Preprocess(mean=(0.1, 0.2, 0.3), std=(1, 2, 4))(image)
    bgr = Preprocess(mean=(0.3, 0.2, 0.1), std=(4, 2, 1), order="bgr")(image)
    np.testing.assert_array_equal(bgr, rgb[::-1])


def test_layout_hwc_has_the_channels_last():
    image = picture(9, 7)
    result = Preprocess(layout="hwc")(image)
    assert result.shape == (7, 9, 3)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result.transpose(2, 0, 1), Preprocess()(image))


def test_scale_multiplies_the_pixels_before_mean_and_std():
    result = Preprocess(scale=1.0, mean=(127, 127, 127), std=(128, 128, 128))(picture(8, 8))
    expected = (np.asarray(picture(8, 8), dtype=np.float64).transpose(2, 0, 1) - 127) / 128
    np.testing.assert_allclose(result, expected, atol=1e-7)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_follow_the_size_of_the_input(name):
    channels = 1 if name == "mnist" else 3
    for size in [(28, 28), (33, 65), (224, 224)]:
        for shape in [(100, 40), (40, 100), (300, 300)]:
            assert preset(name, size)(picture(*shape)).shape == (channels, *size)


def test_the_imagenet_preset_is_torchvisions():
    reference = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    image = picture(300, 411)
    for size in [(224, 224), None]:
        np.testing.assert_array_equal(preset("imagenet", size)(image), reference(image).numpy())


def test_an_oblong_input_is_not_padded():
    white = Image.new("RGB", (300, 300), "white")
    assert preset("imagenet", (64, 256))(white).min() > 2


def test_the_mnist_preset_normalizes_one_channel():
    image = picture(28, 28, "L")
    expected = (torch.from_numpy(np.asarray(image).copy()).float().div(255) - 0.1307) / 0.3081
    np.testing.assert_array_equal(preset("mnist", (28, 28))(image)[0], expected.numpy())


def test_presets_leave_the_size_where_the_input_is_dynamic():
    assert preset("cifar10", None)(picture(31, 17)).shape == (3, 17, 31)


def test_an_unknown_preset_is_named():
    with pytest.raises(UsageError, match="unknown preprocess 'imagnet'; expected one of imagenet, mnist, cifar10, none"):
        preset("imagnet", None)
    with pytest.raises(UsageError, match=r"unknown preprocess 'imagnet'.*or a JSON file"):
        Preprocess.load("imagnet", None)


def test_the_json_form_is_read_from_a_file(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"resize": 256, "crop": 224, "mean": list(MEAN), "std": list(STD)}))
    assert Preprocess.load(str(tmp_path / "p.json"), (10, 10)) == preset("imagenet", (224, 224))


def test_the_json_form_takes_every_option():
    value = {
        "resize": [30, 40], "crop": [20, 30], "mean": 10, "std": [2], "scale": 1, "interpolation": "bicubic",
        "channels": 1, "order": "bgr", "layout": "hwc", "resize_mode": "letterbox", "position": "top-left", "fill": [9],
        "exif_orientation": True,
    }  # fmt: skip
    expected = Preprocess(
        resize=(30, 40), crop=(20, 30), mean=(10.0,), std=(2.0,), scale=1.0, interpolation="bicubic", channels=1,
        order="bgr", layout="hwc", resize_mode="letterbox", position="top-left", fill=(9,), exif_orientation=True,
    )  # fmt: skip
    found = Preprocess.from_json(value)
    assert found == expected
    assert Preprocess.from_json(json.loads(json.dumps(found.to_json()))) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"size": 3}, "unknown 'size'; expected channels, crop"),
        ({"resize": "big"}, "resize is 'big': expected a number of pixels or"),
        ({"resize": 12.5}, "resize is 12.5"),
        ({"crop": [1, 2, 3]}, r"crop is \[1, 2, 3\]"),
        ({"crop": True}, "crop is True"),
        ({"crop": 0}, "crop must be 1 or more"),
        ({"resize": [0, 5]}, "resize must be 1 or more"),
        ({"mean": [0.5]}, "mean has 1 values for 3 channels"),
        ({"mean": [0.5, 0.5], "channels": 1}, "mean has 2 values for 1 channels"),
        ({"mean": ["a", 0, 0]}, "mean is .*expected a number"),
        ({"mean": "123"}, "mean is '123'"),
        ({"std": [1, 0, 1]}, "std must not be 0"),
        ({"std": [1, float("nan"), 1]}, "std must be finite"),
        ({"scale": 0}, "scale must be more than 0"),
        ({"scale": None}, "scale is None"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; expected one of nearest, bilinear"),
        ({"interpolation": ["bicubic"]}, "unknown interpolation"),
        ({"channels": 4}, "channels must be 1 or 3, not 4"),
        ({"channels": True}, "channels must be 1 or 3, not True"),
        ({"order": "brg"}, "order must be rgb or bgr"),
        ({"layout": "nchw"}, "layout must be chw or hwc"),
        ({"resize": 8, "resize_mode": "pad"}, "resize_mode must be shorter, stretch or letterbox, not 'pad'"),
        ({"resize_mode": "letterbox"}, "resize_mode letterbox needs resize"),
        ({"resize": [8, 9], "resize_mode": "shorter"}, r"shorter takes one number as resize, not \(8, 9\)"),
        ({"resize": 8, "resize_mode": "letterbox", "position": "left"}, "position must be center or top-left"),
        ({"resize": 8, "position": "top-left"}, "position is of resize_mode letterbox"),
        ({"resize": 8, "resize_mode": "letterbox", "fill": 256}, "fill must be a number of 0 to 255, or 3 of them, not 256"),
        ({"resize": 8, "resize_mode": "letterbox", "fill": [1, 2]}, r"fill must be .*, not \(1, 2\)"),
        ({"crop": 8, "fill": 0.5}, "fill must be"),
        ({"crop": 8, "fill": "grey"}, "fill must be"),
        ({"resize": 8, "fill": 114}, "fill is the padding of"),
        ({"exif_orientation": "yes"}, "exif_orientation must be true or false"),
        ({"function": {"name": "f", "file": "f.py"}}, "unknown 'function'; expected channels"),
    ],
)
def test_a_wrong_option_is_named(value, message):
    with pytest.raises(UsageError, match=message):
        Preprocess.from_json(value)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "must hold a JSON object, not list")])
def test_a_file_that_is_no_json_object_is_refused(text, message, tmp_path):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        Preprocess.load(str(tmp_path / "p.json"), None)


@pytest.mark.parametrize("original", [*PRESETS.values(), preset("imagenet", (64, 96)), preset("mnist", (28, 28))])
def test_the_manifest_gives_back_an_equal_object(original):
    original(picture(30, 30))  # using it must not change what is written
    text = json.dumps(msgspec.to_builtins(original))
    assert msgspec.convert(json.loads(text), Preprocess) == original
    assert set(json.loads(text)) == set(original.to_json())


def test_an_exif_orientation_is_left_as_torchvisions_imagefolder_leaves_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    picture(20, 30).save(tmp_path / "turned.jpg", exif=exif)
    assert Preprocess().open(tmp_path / "turned.jpg").shape == (3, 30, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_exif_orientation_is_applied_where_that_is_asked_for(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    picture(20, 30).save(path, kind, exif=exif)
    with Image.open(path) as image:
        image.load()
        expected = Preprocess()(ImageOps.exif_transpose(image))
    for preprocess in (Preprocess(exif_orientation=True), Preprocess.from_json({"exif_orientation": True})):
        np.testing.assert_array_equal(preprocess.open(path), expected)
        np.testing.assert_array_equal(preprocess.open(path.read_bytes()), expected)
    # Pillow turns TIFF files itself.
    assert Preprocess().open(path).shape == (expected.shape if kind == "TIFF" else (3, 30, 20))


def test_stretch_is_torchvisions_resize_to_a_pair_and_one_number_is_a_square():
    image = picture(91, 67)
    expected = transforms.Compose([transforms.Resize((40, 40)), transforms.ToTensor()])(image).numpy()
    for preprocess in (
        {"resize": [40, 40]},
        {"resize": [40, 40], "resize_mode": "stretch"},
        {"resize": 40, "resize_mode": "stretch"},
    ):
        np.testing.assert_array_equal(Preprocess.from_json(preprocess)(image), expected)
        assert Preprocess.from_json(preprocess).shape == (3, 40, 40)
    shorter = Preprocess.from_json({"resize": 40, "resize_mode": "shorter"})
    np.testing.assert_array_equal(shorter(image), Preprocess(resize=40)(image))
    assert shorter.shape is None


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize(("resize", "inner"), [(48, (24, 48)), ((64, 40), (20, 40)), ([30, 100], (30, 60))])
def test_a_letterbox_holds_the_resized_image_whole(resize, inner, interpolation):
    image = picture(80, 40)
    box = {"resize": resize, "resize_mode": "letterbox", "fill": 114, "position": "top-left", "interpolation": interpolation}
    result = Preprocess.from_json(box)(image)
    assert result.shape == Preprocess.from_json(box).shape
    expected = Preprocess(resize=inner, interpolation=interpolation)(image)
    np.testing.assert_array_equal(result[:, : inner[0], : inner[1]], expected)
    assert np.unique(result[:, inner[0] :]).tolist() in ([], [np.float32(114) / np.float32(255)])
    assert np.unique(result[:, :, inner[1] :]).tolist() in ([], [np.float32(114) / np.float32(255)])


def test_fill_is_in_the_order_of_the_channels():
    white = Image.new("RGB", (4, 8), "white")
    for order in ("rgb", "bgr"):
        boxed = Preprocess(resize=8, resize_mode="letterbox", fill=(1, 2, 3), scale=1.0, order=order)(white)
        np.testing.assert_array_equal(boxed[:, 0, 0], [1, 2, 3])
    cropped = Preprocess(crop=10, fill=7, scale=1.0, channels=1)(white)
    assert cropped[0, 0, 0] == 7


def test_the_yolo_preset_is_a_letterbox_of_grey():
    result = preset("yolo", (96, 160))(Image.new("RGB", (200, 200), "white"))
    assert result.shape == (3, 96, 160)
    assert (result[:, :, 32:128] == 1).all()
    assert (result[:, :, :32] == np.float32(114) / np.float32(255)).all()
    assert preset("yolo", None).shape == (3, 640, 640)


def test_a_function_makes_the_array_of_the_image_as_it_was_read(tmp_path):
    (tmp_path / "prep.py").write_text(
        "import numpy as np\ndef f(image):\n    return np.array([*image.size, len(image.getbands()), image.getexif().get(274, 0)])\n"
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(20, 30).convert("L").save(tmp_path / "x.jpg", exif=exif)
    loaded = Preprocess.load(f"{tmp_path / 'prep.py'}:f", (8, 8))
    assert loaded.shape is None
    assert loaded.pixel_range() is None
    assert loaded.within(tmp_path).open(tmp_path / "x.jpg").tolist() == [20, 30, 1, 6]
    assert replace(loaded, exif_orientation=True).within(tmp_path).open(tmp_path / "x.jpg").tolist() == [30, 20, 1, 0]
    assert msgspec.convert(json.loads(json.dumps(msgspec.to_builtins(loaded.within(tmp_path)))), Preprocess) == loaded
    with pytest.raises(UsageError, match=r"prep\.py:f is in a file of an artifact"):
        loaded.open(tmp_path / "x.jpg")


@pytest.mark.parametrize("text", ["return image", "return None", "return [[1.0]]"])
def test_a_function_that_returns_no_array_is_named_with_its_line(text, tmp_path):
    (tmp_path / "prep.py").write_text(f"x = 1\n\ndef f(image):\n    {text}\n")
    picture(4, 4).save(tmp_path / "x.png")
    with pytest.raises(UserCodeError, match=r"x\.png: prep\.py:f returns a \w+ \(.*/prep\.py:3\); expected a numpy array"):
        Preprocess.load(f"{tmp_path / 'prep.py'}:f", None).within(tmp_path).open(tmp_path / "x.png")


def test_what_would_have_no_effect_beside_a_function_is_refused():
    function = UserFunction(name="f", module="prep")
    with pytest.raises(UsageError, match="prep:f makes the whole array; leave out resize, std"):
        Preprocess(function=function, resize=8, std=(2.0, 2.0, 2.0))
    assert Preprocess(function=function, exif_orientation=True).function == function


def test_a_python_file_without_its_function_is_said(tmp_path):
    (tmp_path / "prep.py").write_text("def f(image): ...")
    with pytest.raises(UsageError, match=r"name the function in it, .*prep\.py:FUNCTION"):
        Preprocess.load(str(tmp_path / "prep.py"), None)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(crop=8),
        Preprocess(resize=16, crop=(8, 10), channels=1),
        Preprocess(resize=(6, 9), layout="hwc"),
        Preprocess(resize=(6, 9), crop=5, channels=1, layout="hwc"),
    ],
)
def test_the_shape_is_that_of_every_result(preprocess):
    for size in ((12, 20), (31, 17)):
        assert preprocess(picture(*size)).shape == preprocess.shape


@pytest.mark.parametrize("preprocess", [Preprocess(), Preprocess(resize=16)])
def test_there_is_no_shape_where_images_keep_sizes_of_their_own(preprocess):
    assert preprocess.shape is None
    assert preprocess(picture(12, 20)).shape != preprocess(picture(31, 17)).shape
