import base64
import io
import re
from html.parser import HTMLParser

from PIL import Image

from deploy.evaluation.evaluate import evaluate
from deploy.evaluation.page import render


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
    assert len(found) == 12
    assert {image.size for image in found} == {(192, 192)}
    assert "http" not in page  # no network


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
