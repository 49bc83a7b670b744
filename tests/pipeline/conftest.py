from pathlib import Path

import pytest


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of the user's with a module in `net.py`, the current folder."""
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, width=4, num_classes=3):\n"
        "        super().__init__()\n"
        "        self.body = torch.nn.Linear(6, width)\n"
        "        self.head = torch.nn.Linear(width, num_classes)\n"
        "    def forward(self, x):\n"
        "        hidden = torch.relu(self.body(x))\n"
        "        return self.head(hidden), hidden\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when the ONNX export, the slow part, begins."""
    monkeypatch.setattr("deploy.pipeline.export.export_graph", lambda *args, **options: pytest.fail("the export began"))
