import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from deploy.evaluation.evaluate import evaluate
from deploy.evaluation.page import render
from deploy.evaluation.pictures import PALETTE
from tests.browser import CHROMIUM, check_nothing_is_cut


def images(page: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(found))) for found in re.findall(r"data:image/png;base64,([^\"]+)", page)]


def test_the_page_has_the_score_the_classes_the_confusions_and_both_answers_of_what_differs(make_segmenter, scenes, tmp_path):
    one, other = (
        make_segmenter(tmp_path / "one", names=["<dark>", "grey", "bright"]),
        make_segmenter(tmp_path / "two", noise=0.6, names=["<dark>", "grey", "bright"]),
    )
    result = evaluate(one, scenes, metric="miou", against=other)
    page = render(one, result)
    HTMLParser().feed(page)
    assert f"mIoU {result.value:.2f} %" in page
    assert "&lt;dark&gt;" in page
    assert "<dark>" not in page
    assert "Worst confusions" in page
    assert "6 of 6 images" in page or "6 of 6 inputs" in page
    found = images(page)
    assert len(found) == 18  # of each input both answers, and the pixels that differ
    magenta = [(np.asarray(image) == (255, 0, 255)).all(axis=-1).mean() for image in found[2::3]]
    assert magenta == pytest.approx([each.amount for each in result.against.differing])
    assert "and the pixels that differ" in page
    assert {image.size for image in found} == {(192, 192)}
    assert "http" not in page  # no network
    for index, name in enumerate(("&lt;dark&gt;", "grey", "bright")):
        red, green, blue = PALETTE[index]
        assert f'style="background: rgb({red} {green} {blue})"></span>{name}</td>' in page


def test_without_another_artifact_there_is_no_sheet(model, tmp_path, make_folder):
    page = render(model, evaluate(model, make_folder(tmp_path, ant=[0, 1], bee=[1])))
    assert "Where they differ" not in page
    assert images(page) == []
    assert "top-5 100.00 %" in page


def test_boxes_are_drawn_on_the_pictures(make_detector, boxes, tmp_path):
    names = ["grey", "bright"]
    one, other = make_detector(tmp_path / "one", names=names), make_detector(tmp_path / "two", names=names, shift=30)
    result = evaluate(one, boxes, metric="map", against=other)
    found = images(render(one, result))
    assert len(found) == 2 * len(result.against.differing) > 0
    assert {image.size for image in found} == {(192, 96)}


def test_class_maps_of_feeds_are_drawn_alone(make_segmenter, tmp_path):
    one, other = make_segmenter(tmp_path / "one"), make_segmenter(tmp_path / "two", noise=0.6)
    (tmp_path / "feeds").mkdir()
    pixels = np.linspace(0, 1, 256, dtype=np.float32).reshape(1, 1, 16, 16)
    np.savez(tmp_path / "feeds/0.npz", input=pixels, label=np.zeros((16, 16), np.uint8))
    result = evaluate(one, tmp_path / "feeds", metric="miou", against=other)
    first, second, _ = images(render(one, result))
    assert first.size == second.size == (192, 192)
    colours = {tuple(int(part) for part in PALETTE[index]) for index in range(3)}
    assert {tuple(pixel) for pixel in np.asarray(first).reshape(-1, 3).tolist()} == colours
    assert first.tobytes() != second.tobytes()


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_cut(make_segmenter, scenes, tmp_path, dark):
    names = ["a class whose name is long and has no end in sight", "grey", "bright" * 12]
    one = make_segmenter(tmp_path / "one", names=names)
    other = make_segmenter(tmp_path / "an-artifact-with-a-name-of-some-length", noise=0.6, names=names)
    check_nothing_is_cut(render(one, evaluate(one, scenes, metric="miou", against=other)), tmp_path, dark=dark)
