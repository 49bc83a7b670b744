"""Boxes of a COCO JSON: its categories, its pictures as files beside it, and the boxes in them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy.artifact.image_ops import picture_size
from deploy.errors import DataError
from deploy.words import count_of, printable


class Boxes(NamedTuple):
    """The boxes of one picture: (n, 4) corners x1, y1, x2, y2 in its pixels, (n,) indices of classes, areas, and whether a crowd."""

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of the file. boxes: of its annotations, with the category ids as labels. width, height: in pixels, as stored."""

    path: Path
    width: int
    height: int
    boxes: Boxes


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """What a COCO JSON holds. categories: names by id, in the order of the ids. pictures: in the order of the file."""

    path: Path
    categories: Mapping[int, str]
    pictures: tuple[Picture, ...]


def find_coco(place: Path) -> Path | None:
    """The COCO JSON that `place` is, or that lies in it as the only .json file; None where there is none.

    A folder that has several is none either: the file itself is to be named.
    """
    if place.suffix.lower() == ".json" and place.is_file():
        return place
    found = sorted(place.glob("*.json")) if place.is_dir() else []
    return found[0] if len(found) == 1 else None


def read_coco(path: Path) -> CocoFile:
    """Read a COCO JSON and find its pictures: beside it, in `images/` beside it, or where COCO's own layout has them.

    That layout is `annotations/instances_val2017.json` and `val2017/`. Raises DataError for a file that is damaged or is no COCO
    JSON of boxes, and for pictures that are missing or of another size than it says.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    expected = "expected a COCO JSON: an object with the lists images, annotations and categories"
    if not isinstance(document, dict) or not all(
        isinstance(document.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(f"{path}: {expected}")
    try:
        categories = {int(each["id"]): str(each["name"]) for each in document["categories"]}
        images = {each["id"]: each for each in document["images"]}
        folder = _folder(path, [str(each["file_name"]) for each in images.values()])
        annotations = _by_image(path, document["annotations"], images, categories)
        pictures = [_picture(path, folder, each, annotations.get(each["id"], [])) for each in images.values()]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: {expected}; {type(error).__name__}: {error}") from error
    if len(images) < len(document["images"]):
        raise DataError(f"{path} has two images of one id")
    return CocoFile(path=path, categories=dict(sorted(categories.items())), pictures=tuple(pictures))


def _folder(path: Path, names: Sequence[str]) -> Path:
    """Where the pictures are: the first place that has any of them. Raises DataError where none has, or one is missing."""
    if not names:
        raise DataError(f"{path} lists no images")
    places = [path.parent, path.parent / "images", path.parent.parent / path.stem.rpartition("_")[2]]
    folder = next((place for place in places if any((place / name).is_file() for name in names)), None)
    if folder is None:
        tried = ", ".join(map(str, places))
        raise DataError(f"{path} is of other images: none of its {len(names):,} files, such as {names[0]!r}, is in {tried}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise DataError(f"{path} lists {printable(missing[0])}{more}, which is not in {folder}")
    return folder


def _by_image(
    path: Path, annotations: Sequence[Mapping[str, Any]], images: Mapping[Any, Any], categories: Mapping[int, str]
) -> dict[Any, list[Mapping[str, Any]]]:
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for index, each in enumerate(annotations):
        if each["image_id"] not in images:
            raise DataError(f"{path}: annotation {index} is of the image {each['image_id']}, which it does not list")
        if each["category_id"] not in categories:
            raise DataError(f"{path}: annotation {index} is of the category {each['category_id']}, which it does not list")
        box = np.asarray(each["bbox"], np.float64)
        if box.shape != (4,) or not np.isfinite(box).all() or (box[2:] < 0).any():
            raise DataError(f"{path}: annotation {index} has the box {each['bbox']}; expected x, y, width, height")
        found.setdefault(each["image_id"], []).append(each)
    if not annotations:
        raise DataError(f"{path} has no annotations: there is nothing to find")
    return found


def _picture(path: Path, folder: Path, image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]) -> Picture:
    file = folder / str(image["file_name"])
    width, height, turned = picture_size(file)
    said = (image.get("width", width), image.get("height", height))
    if said not in ((width, height), turned):
        raise DataError(
            f"{path} says that {printable(image['file_name'])} has {said[0]}x{said[1]} pixels, and {file} has {width}x{height}:"
            " it is of other images"
        )
    sides = np.array([each["bbox"] for each in annotations], np.float64).reshape(-1, 4)
    areas = [each.get("area", each["bbox"][2] * each["bbox"][3]) for each in annotations]
    boxes = Boxes(
        np.concatenate([sides[:, :2], sides[:, :2] + sides[:, 2:]], axis=1),
        np.array([each["category_id"] for each in annotations], np.int64),
        np.array(areas, np.float64),
        np.array([bool(each.get("iscrowd", 0)) for each in annotations], bool),
    )
    return Picture(path=file, width=width, height=height, boxes=boxes)


def class_of_category(file: CocoFile, names: Sequence[str] | None, model: str) -> dict[int, int]:
    """The index of the model's class for each category id: by name, or without names of classes in the order of the ids.

    Raises DataError for a category that is no class of `model`.
    """
    if names is None:
        return {category: index for index, category in enumerate(file.categories)}
    unknown = [name for name in file.categories.values() if name not in names]
    if unknown:
        shown = ", ".join(map(repr, list(names)[:3]))
        raise DataError(
            f"{file.path} has the category {unknown[0]!r}{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''}, which is"
            f" no class of {model}; it has {count_of(len(names), 'class')}: {shown}..."
        )
    return {category: list(names).index(name) for category, name in file.categories.items()}
