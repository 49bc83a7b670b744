"""Modules with which a comparison goes wrong unless one looks: they change their input, draw random numbers, know one size, give zeros."""

import textwrap
from pathlib import Path

import numpy as np
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.summary import summary
from deploy.errors import ExportError, UsageError
from deploy.runtime.batching.batcher import Batcher

HEAD = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n"


def exported(folder: Path, body: str, *inputs: str, **options: object) -> Artifact:
    """The artifact of the module `Net`, whose class body is `body`."""
    (folder / "some_net.py").write_text(f"{HEAD}\n\nclass Net(nn.Module):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n")
    return deploy.export(folder / "out", model=f"{folder / 'some_net.py'}:Net", inputs=list(inputs), **options)  # type: ignore[arg-type]


IN_PLACE = {
    "normalizes its input": "def forward(self, x):\n    x.sub_(0.5).div_(0.25)\n    return x * 2",
    "clamps its input": "def forward(self, x):\n    return F.relu_(x) + 1",
    "writes to a part": "def forward(self, x):\n    x[:, 0] = 0\n    return x.sum((2, 3))",
    "returns its input": "def forward(self, x):\n    y = x + 1\n    return y, x",
}


@pytest.mark.parametrize("body", IN_PLACE.values(), ids=IN_PLACE)
def test_a_module_that_overwrites_its_input_is_exported_right(body: str, tmp_path: Path) -> None:
    artifact = exported(tmp_path, body, "x=1x3x8x8")
    assert artifact.manifest.parity is not None
    assert artifact.manifest.parity.worst.max_abs < 1e-4
    x = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    kept = x.copy()
    for backend in ("onnxruntime", "openvino"):
        with deploy.load(artifact, backend=backend) as session:
            session.run({"x": x})
        np.testing.assert_array_equal(x, kept)


RANDOM = {
    "a function": ("def forward(self, x):\n    return F.dropout(x, 0.5)", ""),
    "noise": ("def forward(self, x):\n    return x + torch.randn_like(x)", ""),
    "a submodule": (
        "def __init__(self):\n    super().__init__()\n    self.body = nn.Sequential(nn.Linear(8, 8), Noise())\n"
        "def forward(self, x):\n    return self.body(x)",
        "first in 'body.1' (Noise)",
    ),
}


@pytest.mark.parametrize(("body", "named"), RANDOM.values(), ids=RANDOM)
def test_a_module_that_differs_from_itself_is_named(
    body: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = "class Noise(nn.Module):\n    def forward(self, x):\n        return x * torch.rand(1)\n"
    monkeypatch.setitem(globals(), "HEAD", HEAD + noise)
    with pytest.raises(ExportError, match="Net gives another result each time it is run") as caught:
        exported(tmp_path, body, "x=1x8")
    assert named in str(caught.value)
    assert "take the random part out" in str(caught.value)
    assert not (tmp_path / "out").exists()


INIT = "def __init__(self):\n    super().__init__()\n    "
STATES = {
    "a counter": (f"{INIT}self.runs = 0\ndef forward(self, x):\n    self.runs += 1\n    return x * self.runs", True),
    "a buffer": (
        f"{INIT}self.register_buffer('last', torch.zeros(8))\ndef forward(self, x):\n    self.last = self.last + x[0]\n"
        "    return x + self.last",
        True,
    ),
    "a source of its own": (f"{INIT}self.rng = np.random.default_rng()\ndef forward(self, x):\n    return x * self.rng.random()", True),
    "a source that is new each time": ("def forward(self, x):\n    return x * np.random.default_rng().random()", False),
}  # fmt: skip


@pytest.mark.parametrize(("body", "kept"), STATES.values(), ids=STATES)
def test_what_a_module_keeps_from_run_to_run_is_not_called_random(
    body: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "HEAD", HEAD + "import numpy as np\n")
    with pytest.raises(ExportError, match="Net gives another result each time it is run") as caught:
        exported(tmp_path, body, "x=1x8")
    assert "random part" not in str(caught.value)
    assert ("its forward changes what the module holds" in str(caught.value)) == kept


def test_a_module_that_runs_at_one_size_alone_is_said_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = (
        "def __init__(self):\n    super().__init__()\n    self.place = nn.Parameter(torch.randn(1, 3, 224, 1))\n"
        "def forward(self, x):\n    return x + self.place"
    )
    try:
        exported(tmp_path, body, "x=1x3xHxW")
    except ExportError as error:
        assert "'H'" in str(error)  # noqa: PT017  # either is right: the exporter may notice before
    else:
        assert "compared at these sizes alone" in caplog.text


def test_what_is_right_at_the_examples_size_alone_is_found(tmp_path: Path) -> None:
    body = "def forward(self, x):\n    return x * SCALES[x.shape[2]] if not torch.compiler.is_exporting() else x * SCALES[224]"
    scales = (
        "class Scales(dict):\n    def __missing__(self, size):\n        return 2.0 if size == 224 else 3.0\nSCALES = Scales()\n"
    )
    (tmp_path / "sizes_net.py").write_text(f"{HEAD}{scales}class Net(nn.Module):\n{textwrap.indent(body, '    ')}\n")
    with pytest.raises(deploy.DeployError, match=r"H 141"):
        deploy.export(tmp_path / "out", model=f"{tmp_path / 'sizes_net.py'}:Net", inputs=["x=1x3xHx8"])
    assert not (tmp_path / "out").exists()


ZEROS = "def __init__(self):\n    super().__init__()\n    self.head = nn.Linear(8, 4)\n    {}\ndef forward(self, x):\n    return self.head(x)"


def test_a_head_of_zeros_gets_random_weights_where_none_are_given(tmp_path: Path) -> None:
    artifact = exported(tmp_path, ZEROS.format("nn.init.zeros_(self.head.weight); nn.init.zeros_(self.head.bias)"), "x=1x8")
    assert artifact.manifest.parity is not None
    assert artifact.manifest.parity.constant == []
    with deploy.load(artifact) as session:
        assert np.ptp(session(np.ones((1, 8), np.float32))) > 0


def test_an_output_that_proves_nothing_is_said_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    state = {"head.weight": torch.zeros(4, 8), "head.bias": torch.zeros(4)}
    torch.save(state, tmp_path / "zeros.pth")
    artifact = exported(tmp_path, ZEROS.format("pass"), "x=1x8", weights=tmp_path / "zeros.pth")
    assert artifact.manifest.parity is not None
    assert artifact.manifest.parity.constant == ["output"]
    assert "proves nothing of output" in summary(artifact)
    assert "the same number everywhere" in caplog.text


def test_an_output_far_below_atol_is_not_called_verified_by_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = "def forward(self, x):\n    return (x * 1e-13 if torch.compiler.is_exporting() else x * 2e-13), x * 3e-13"
    artifact = exported(tmp_path, body, "x=1x8")
    assert artifact.manifest.parity is not None
    wrong, _ = (spec.name for spec in artifact.manifest.outputs)
    assert artifact.manifest.parity.tiny == [wrong]
    assert f"output {wrong} is nowhere above `atol`, 1e-05, and off by more than `rtol`" in caplog.text
    assert f"proves nothing of {wrong}: nowhere above `atol`" in summary(artifact)
    with pytest.raises(deploy.DeployError, match=f"output '{wrong}' is off by"):
        exported(tmp_path, body, "x=1x8", atol=1e-16)


TOKENS = (
    "def __init__(self):\n    super().__init__()\n    self.word = nn.Embedding(100, 8)\n    self.kind = nn.Embedding(2, 8)\n"
    "def forward(self, ids, kinds):\n    return (self.word({}) + self.kind({})).mean(1)"
)


def test_integers_go_as_far_as_the_table_they_look_up(tmp_path: Path) -> None:
    artifact = exported(tmp_path, TOKENS.format("ids", "kinds"), "ids=1x6:int64", "kinds=1x6:int64")
    assert [spec.bounds for spec in artifact.manifest.inputs] == [(0.0, 100.0), (0.0, 2.0)]


def test_integers_that_go_elsewhere_first_need_a_range_or_feeds(tmp_path: Path) -> None:
    body = TOKENS.format("ids", "kinds * 1")
    with pytest.raises(
        ExportError, match=r"it runs where kinds is 0: say the range of the integers, NAME=1x6:int64\[0,100\], or give"
    ):
        exported(tmp_path, body, "ids=1x6:int64", "kinds=1x6:int64")
    ranged = exported(tmp_path, body, "ids=1x6:int64", "kinds=1x6:int64[0,2]")
    assert ranged.manifest.inputs[1].bounds == (0.0, 2.0)
    (tmp_path / "feeds").mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        np.savez(tmp_path / "feeds" / f"{index}.npz", ids=rng.integers(0, 100, (2, 6)), kinds=rng.integers(0, 2, (2, 6)))
    real = exported(tmp_path, body, "ids=1x6:int64", "kinds=1x6:int64", data=tmp_path / "feeds")
    assert real.manifest.parity is not None
    assert {case.data for case in real.manifest.parity.cases} == {"feeds"}


@pytest.mark.parametrize("text", ["x=1x6:int64[5,5]", "x=1x6:int64[a,b]"])
def test_a_range_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="range"):
        exported(tmp_path, "def forward(self, x):\n    return x", text)


@pytest.mark.parametrize(("dtype", "precision"), [("half", "fp16"), ("bfloat16", "bf16"), ("double", "fp64")])
def test_a_module_in_another_precision_is_called_that(dtype: str, precision: str, tmp_path: Path) -> None:
    body = (
        f"def __init__(self):\n    super().__init__()\n    self.conv = nn.Conv2d(3, 4, 3).{dtype}()\n"
        f"def forward(self, x):\n    return self.conv(x.{dtype}()).float().mean((2, 3))"
    )
    artifact = exported(tmp_path, body, "x=1x3x8x8")
    assert artifact.manifest.precision == precision
    with pytest.raises(UsageError, match=rf"{precision}|double"):
        deploy.convert(artifact, tmp_path / "half", precision="fp16")


def test_raw_pixels_are_made_up_where_the_preprocessing_leaves_them(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"scale": 1, "crop": 8}')
    artifact = exported(
        tmp_path, "def forward(self, x):\n    return (x / 255).mean((2, 3))", "x=1x3x8x8", preprocess=str(tmp_path / "p.json")
    )
    assert artifact.manifest.inputs[0].bounds == (0.0, 255.0)


def test_a_batch_behind_the_time_is_the_batch_and_requests_are_not_joined_along_the_time(tmp_path: Path) -> None:
    body = f"{INIT}self.rnn = nn.GRU(6, 8)\ndef forward(self, x, h):\n    return self.rnn(x, h)"
    (tmp_path / "feeds").mkdir()
    for index in range(2):
        np.savez(tmp_path / "feeds" / f"{index}.npz", x=np.ones((9, 6), np.float32), h=np.zeros((1, 8), np.float32))
    artifact = exported(tmp_path, body, "x=TxNx6", "h=1xNx8", data=tmp_path / "feeds")
    assert [spec.shape for spec in artifact.manifest.inputs] == [("T", "N", 6), (1, "N", 8)]
    assert artifact.manifest.parity is not None
    cases = [(case.data, case.batch, case.sizes) for case in artifact.manifest.parity.cases]
    assert cases[:3] == [("random", size, {"T": 224}) for size in (1, 2, 5)]
    assert [(data, batch) for data, batch, _ in cases if data != "random"][:1] == [("feeds", 1)]
    with deploy.load(artifact) as session, Batcher(session) as batcher:
        assert batcher.max_rows is None
        feed = {"x": np.ones((9, 3, 6), np.float32), "h": np.zeros((1, 3, 8), np.float32)}
        assert batcher.run(feed)["output_0"].shape == (9, 3, 8)
