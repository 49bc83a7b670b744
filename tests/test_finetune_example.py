"""examples/finetune.py and examples/pictures.py, on pictures of two kinds of stripes."""

import importlib.util
import json
import resource
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image, ImageOps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deploy.artifact.artifact import Artifact
from deploy.artifact.preprocess import Preprocess
from deploy.data.image_folder import read_folder
from deploy.errors import DataError

EXAMPLES = Path(__file__).parents[1] / "examples"
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2))
        self.kinds = nn.Linear(32, num_classes)

    def forward(self, x):
        return self.kinds(self.body(self.stem(x)))

def two_heads(num_classes: int = 7) -> Net:
    net = Net(num_classes)
    net.other = nn.Linear(32, num_classes)
    return net

def large(num_classes: int = 7) -> Net:
    net = Net(num_classes)
    net.ballast = nn.Parameter(torch.zeros(200_000))
    return net
"""
OPTIONS = ["--model", "net.py:Net", "--input", "image=1x3x16x16", "--preprocess", "small.json", "--batch-size", 8, "--lr", 0.01]

Tune = Callable[..., int]


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        spec = importlib.util.spec_from_file_location("example_finetune", EXAMPLES / "finetune.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        sys.modules.pop("pictures", None)


def stripes(folder: Path, count: int, seed: int) -> None:
    """`count` pictures of lying and of standing stripes, 24 x 20 pixels with noise."""
    rng = np.random.default_rng(seed)
    for name in ("lying", "standing"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 120, (20, 24, 3), dtype=np.uint8)
            lines = pixels[::4] if name == "lying" else pixels[:, ::4]
            lines += 120
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: pictures/train and pictures/val, net.py, small.json, and seven.pth, weights for seven classes."""
    monkeypatch.chdir(tmp_path)
    stripes(tmp_path / "pictures/train", 12, 0)
    stripes(tmp_path / "pictures/val", 6, 1)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "small.json").write_text(json.dumps({"resize": 18, "crop": 16, "mean": [0.4] * 3, "std": [0.2] * 3}))
    names: dict[str, Any] = {}
    exec(NET, names)
    torch.manual_seed(1)
    torch.save({"state_dict": {f"module.{key}": each for key, each in names["Net"]().state_dict().items()}}, "seven.pth")
    return tmp_path


@pytest.fixture
def tune(program: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    """Runs the program on pictures/ with `OPTIONS` and those given; returns its exit status."""

    def call(*options: object, pictures: object = "pictures", net: list[Any] = OPTIONS) -> int:
        words = [pictures, *net, "--epochs", 3, "--workers", 0, "-o", "run", *options]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, words)])
        try:
            return int(program.main())
        except SystemExit as ended:
            return int(ended.code or 0)

    return call


def interrupt(patch: pytest.MonkeyPatch, program: ModuleType, epoch: int, error: Callable[[], Any]) -> None:
    """Let `error` happen where an epoch is about to be judged."""
    end_epoch = program.Training.end_epoch

    def end(self: Any, trainer: Engine, board: Any) -> None:
        if trainer.state.epoch == epoch:
            error()
        end_epoch(self, trainer, board)

    patch.setattr(program.Training, "end_epoch", end)


def raise_(error: BaseException) -> None:
    raise error


def test_the_lesson_is_short() -> None:
    assert len((EXAMPLES / "finetune.py").read_text().splitlines()) < 250


def test_a_run_ends_with_the_export_that_fits(
    tune: Tune, folder: Path, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = torch.load("seven.pth", weights_only=True)["state_dict"]
    assert tune("--weights", "seven.pth", "--freeze", "stem", "--epochs", 6, "--augment", "flip", "colour") == 0
    out = capsys.readouterr().out
    assert "seven.pth: 14 of 14 tensors loaded by name; from 'state_dict'; prefix 'module.' taken off" in out
    assert "24 images of 2 classes to train on, 12 to judge by; 666 of 906 weights learn" in out
    best = torch.load("run/best.pth", weights_only=True)
    same = {name for name in best if name in {key[7:] for key in frozen} and torch.equal(best[name], frozen[f"module.{name}"])}
    assert same == {name for name in best if name.startswith("stem.")}
    assert best["kinds.weight"].shape == (2, 32)
    (command,) = [line for line in out.splitlines() if line.startswith("deploy ")]
    done = run(*shlex.split(command)[1:])
    assert done.status == 0, done.err
    artifact = Artifact.open(Path("build/run"))
    assert artifact.manifest.classes == ["lying", "standing"]
    assert [each.shape[1:] for each in artifact.manifest.inputs] == [(3, 16, 16)]
    assert f"top-1 {artifact.manifest.accuracy.top1:.2f} %" in out  # type: ignore[union-attr]
    tags = EventAccumulator(str(folder / "run/logs")).Reload().Tags()
    assert {"train/loss", "lr/group_0", "judged/top1", "judged/loss"} <= set(tags["scalars"])
    assert "judged/wrong" in tags["images"]
    assert any("kinds" in name for name in tags["histograms"])
    assert not any("stem" in name for name in tags["histograms"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    tune: Tune, program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    options = ("--optimizer", "sgd", "--workers", workers)
    assert tune(*options, "-o", "whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, program, 2, lambda: raise_(KeyboardInterrupt()))
        assert tune(*options) == 130
    assert capsys.readouterr().err.endswith("stopped: interrupted; --resume goes on after the last whole epoch\n")
    assert torch.load("run/best.pth", weights_only=True)
    assert tune(*options) == 2
    assert "run holds a run: --resume goes on with it" in capsys.readouterr().err
    assert tune(*options, "--lr", 0.5, "--resume") == 2
    assert "run was begun with lr 0.01, and not 0.5" in capsys.readouterr().err
    assert tune(*options, "--resume") == 0
    whole, resumed = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", "run"))
    assert all(torch.equal(resumed["module"][name], tensor) for name, tensor in whole["module"].items())
    assert (resumed["best"], resumed["schedule"], resumed["epoch"]) == (whole["best"], whole["schedule"], 3)
    assert tune(*options, "--resume") == 0  # it is over: the same words again
    assert torch.load("run/last.pt", weights_only=True)["epoch"] == 3
    assert tune(*options, "--seed", 1, "-o", "other") == 0
    assert not torch.equal(
        torch.load("other/last.pt", weights_only=True)["module"]["kinds.weight"], whole["module"]["kinds.weight"]
    )


def test_a_full_disk_leaves_the_best_so_far(
    tune: Tune, program: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept: dict[str, bytes] = {}

    def fill() -> None:
        kept.update({name: (folder / "run" / name).read_bytes() for name in ("best.pth", "last.pt")})
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept["best.pth"]) // 2, limits[1]))  # enough for TensorBoard

    interrupt(monkeypatch, program, 2, fill)
    try:
        assert tune("--model", "net.py:large") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "stopped: [Errno 27] File too large; --resume goes on" in capsys.readouterr().err
    assert {name: (folder / "run" / name).read_bytes() for name in kept} == kept
    assert not list((folder / "run").glob(".*"))


def bad_picture(folder: Path) -> None:
    (folder / "pictures/train/lying/3.png").write_bytes(b"no picture")
    file = folder / "pictures/val/standing/1.png"
    file.write_bytes(file.read_bytes()[:200])


BAD: list[Any] = [
    (lambda folder: (folder / "pictures/train/round").mkdir(), [], 1, "class folders without images: round"),
    (lambda folder: (folder / "pictures/val/lying").rename(folder / "pictures/val/flat"), [], 1, "must have the same classes, and 'flat'"),
    (lambda folder: [(folder / "pictures" / part / "lying").rename(folder / part) for part in ("train", "val")], [], 1, "has one class, 'standing'"),
    (bad_picture, [], 1, "3.png is not an image that Pillow can read"),
    (bad_picture, [], 1, "2 of 36 images: remove them, or put them right"),
    (lambda folder: torch.save({"a.weight": torch.zeros(3, 5)}, "other.pth"), ["--weights", "other.pth"], 1, "other.pth does not fit Net by name"),
    (None, ["--weights", "none.pth"], 1, "no checkpoint at none.pth"),
    (None, ["--freeze", "stam"], 2, "Net has no module or parameter 'stam'; did you mean 'stem'"),
    (None, ["--freeze", "stem", "body", "kinds"], 2, "--freeze leaves nothing to train"),
    (None, ["--weights", "seven.pth", "--head", "kind"], 2, "no linear layer or convolution 'kind'; did you mean 'kinds'?"),
    (None, ["--weights", "seven.pth", "--head", "body.0"], 2, "body.0.weight is [2, 8, 3, 3] with the new head, and [8, 8, 3, 3]"),
    (None, ["--preprocess", "large.json"], 2, "unknown preprocess 'large.json'"),
    (None, ["--input", "image=1x3x32x32"], 2, "does not fit the input"),
    (None, ["--epochs", "0"], 2, "--epochs and --batch-size must be 1 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "options", "status", "said"), BAD, ids=[case[3][:24] for case in BAD])
def test_what_is_wrong_is_said_before_anything_is_trained(
    tune: Tune, folder: Path, capsys: pytest.CaptureFixture[str], spoil: Any, options: list[str], status: int, said: str
) -> None:
    if spoil:
        spoil(folder)
    assert tune(*options) == status
    assert said in capsys.readouterr().err
    assert not (folder / "run").exists()


def test_a_net_with_two_heads_is_told_to_name_both(tune: Tune, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(NET, names)
    torch.save(names["two_heads"]().state_dict(), "two.pth")
    options = ("--model", "net.py:two_heads", "--weights", "two.pth", "--epochs", 1)
    assert tune(*options) == 2
    assert "kinds.weight is [7, 32] with the new head, and [2, 32]" in capsys.readouterr().err
    assert tune(*options, "--head", "kinds", "other") == 0


def test_a_folder_that_is_not_divided_is_split_by_the_seed(program: ModuleType, folder: Path) -> None:
    find = sys.modules["pictures"].find
    source = folder / "pictures/train"
    train, held = find(source, folder / "links", 0)
    assert (len(train.samples), len(held.samples)) == (20, 4)
    everything = {path.resolve() for part in (train, held) for path, _ in part.samples}
    assert everything == {path for path, _ in read_folder(source).samples}
    first = {path.name for path, _ in held.samples}
    assert {path.name for path, _ in find(source, folder / "links", 0)[1].samples} == first
    assert {path.name for path, _ in find(source, folder / "links", 1)[1].samples} != first
    for path in sorted((source / "lying").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match="lying has one image: two are needed"):
        find(source, folder / "links", 0)


def test_to_judge_a_picture_becomes_what_the_artifact_makes_of_it(program: ModuleType, folder: Path) -> None:
    images = read_folder(folder / "pictures/val")
    turned = Image.open(images.samples[0][0])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(images.samples[0][0].with_suffix(".jpg"), exif=exif)
    images = read_folder(folder / "pictures/val")
    preprocess = Preprocess(resize=18, crop=(12, 16), mean=(0.4,) * 3, exif_orientation=True)
    judging, plain = program.Pictures(images, preprocess), program.Pictures(images, preprocess, [])
    for index, (path, label) in enumerate(images.samples):
        expected = preprocess.open(path)
        for dataset in (judging, plain):
            array, found = dataset[index]
            assert found == label
            assert np.array_equal(array.numpy(), expected)


def test_augmentation_changes_pictures_and_keeps_size_and_arithmetic(program: ModuleType, folder: Path) -> None:
    images = read_folder(folder / "pictures/train")
    preprocess = Preprocess(resize=18, crop=(12, 16), mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0), order="bgr")
    torch.manual_seed(0)
    changed = program.Pictures(images, preprocess, program.AUGMENTATIONS, 0.5)
    seen = [changed[0][0] for _ in range(20)]
    assert {tuple(each.shape) for each in seen} == {(3, 12, 16)}
    assert len({each.numpy().tobytes() for each in seen}) == 20
    grey = folder / "grey.png"
    Image.new("RGB", (40, 30), (51, 102, 204)).save(grey)
    crops = program.Pictures(images, preprocess, ["crop"], 0.5)
    crops.samples = ((grey, 0),)
    wanted = torch.tensor([(0.8 - 0.5) / 0.5, (0.4 - 0.25) / 0.5, 0.2])
    torch.testing.assert_close(crops[0][0], wanted[:, None, None].expand(3, 12, 16).to(torch.float32))
    flips = program.Pictures(images, preprocess, ["flip"])
    plain = preprocess.open(images.samples[0][0])
    mirrored = preprocess(ImageOps.mirror(Image.open(images.samples[0][0])))
    assert {each.tobytes() for each in (flips[0][0].numpy() for _ in range(20))} == {plain.tobytes(), mirrored.tobytes()}
