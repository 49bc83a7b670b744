"""Functions of the user's: what is recorded of them, where they run from, and what is said when they fail."""

import hashlib
import importlib.metadata
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.artifact.usercode import UserFunction, split_spec
from deploy.errors import ArtifactError, UsageError, UserCodeError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, text: str, name: str = "prep.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a/prep.py:f", (Path("a/prep.py"), "f")),
        ("prep.py:Class.f", (Path("prep.py"), "Class.f")),
        ("pkg.mod:f", ("pkg.mod", "f")),
        ("mod:f", ("mod", "f")),
        ("odd:name.py:f", (Path("odd:name.py"), "f")),
    ],
)
def test_a_specification_names_a_file_or_a_module(spec: str, expected: tuple[Path | str, str], folder: Path) -> None:
    source, name = split_spec(spec, "the function", "FUNCTION")
    assert (source, name) == (folder / expected[0] if isinstance(expected[0], Path) else expected[0], expected[1])


@pytest.mark.parametrize("spec", ["prep.py", "prep.py:", ":f", ""])
def test_a_specification_without_both_parts_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=r"cannot read the function .*; expected FILE\.py:FUNCTION or pkg\.mod:FUNCTION"):
        split_spec(spec, "the function", "FUNCTION")


def test_a_file_is_recorded_by_name_and_digest_and_does_not_run(folder: Path) -> None:
    path = written(folder, "1 / 0\ndef f(): ...\n", "code/prep.py")
    function = UserFunction.read("code/prep.py:f")
    assert function == UserFunction(name="f", file="prep.py", sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert str(function) == "prep.py:f"


@pytest.mark.parametrize(
    ("text", "name", "arguments", "expected"),
    [
        ("def f(x):\n    return x + 1\n", "f", (1,), 2),
        ("class C:\n    @staticmethod\n    def f(x):\n        return -x\n", "C.f", (3,), -3),
        ("class C:\n    def __call__(self, x):\n        return [x]\nf = C()\n", "f", (3,), [3]),
        ("import dataclasses\n@dataclasses.dataclass\nclass C:\n    x: 'int'\ndef f(x):\n    return C(x).x\n", "f", (5,), 5),
        ("import functools\nf = functools.partial(max, 4)\n", "f", (2,), 4),
    ],
    ids=["function", "member", "object", "dataclass", "partial"],
)
def test_whatever_can_be_called_runs_from_its_copy(
    text: str, name: str, arguments: tuple[object, ...], expected: object, folder: Path
) -> None:
    original = written(folder, text, "code/prep.py")
    function = UserFunction.read(f"{original}:{name}")
    (folder / "copy").mkdir()
    function.copy(original.parent, folder / "copy")
    original.unlink()
    before = list(sys.path)
    assert function.call(folder / "copy", *arguments) == expected
    assert [path.name for path in (folder / "copy").iterdir()] == ["prep.py"]  # no __pycache__
    assert sys.path == before


def test_the_code_runs_once_for_many_threads(folder: Path) -> None:
    written(
        folder,
        "import time\ntime.sleep(0.05)\nwith open('runs', 'a') as file:\n    file.write('x')\ndef f(x):\n    return x * 2\n",
    )
    function = UserFunction.read("prep.py:f")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda x: function.call(folder, x), range(50))) == [2 * x for x in range(50)]
    assert (folder / "runs").read_text() == "x"


def test_two_files_of_one_name_are_two_modules(folder: Path) -> None:
    for number in (1, 2):
        written(folder, f"def f():\n    return {number}\n", f"{number}/prep.py")
    functions = {number: UserFunction.read(f"{number}/prep.py:f") for number in (1, 2)}
    for _ in range(2):
        assert [functions[number].call(folder / str(number)) for number in (1, 2)] == [1, 2]
    assert "prep" not in sys.modules


@pytest.mark.parametrize("change", ["edited", "removed", "replaced before the first use"])
def test_a_copy_that_is_not_what_was_recorded_does_not_run(change: str, folder: Path) -> None:
    path = written(folder, "open('ran', 'w').close()\ndef f(): ...\n")
    function = UserFunction.read("prep.py:f")
    if change == "removed":
        path.unlink()
    else:
        path.write_text(path.read_text() + "# other\n")
    with pytest.raises(ArtifactError, match=r"prep\.py.*(cannot be read|has changed)"):
        function.call(folder)
    with pytest.raises(ArtifactError):
        function.copy(folder, folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(x):\n    y = 1\n    return x.nothing\n", r"prep\.py:f fails: AttributeError: .* \(.*/prep\.py:3\)"),
        ("import numpy as np\ndef f(x):\n    return np.zeros(2) @ np.zeros(3)\n", r"fails: ValueError: .* \(.*/prep\.py:3\)"),
        ("def g(x):\n    raise KeyError('a')\ndef f(x):\n    return g(x)\n", r"fails: KeyError: 'a' \(.*/prep\.py:2\)"),
        ("def f(x):\n    raise SystemExit(3)\n", r"fails: SystemExit: 3 \(.*/prep\.py:2\)"),
        ("def f():\n    pass\n", r"fails: TypeError: f\(\) takes 0 positional arguments.* \(.*/prep\.py:1\)"),
        ("class C:\n    def __call__(self): ...\nf = C()\n", r"fails: TypeError: .* \(.*/prep\.py:2\)"),
        ("import numpy\nasync def f(x):\n    return x\n", r"prep\.py:f is an async function \(.*/prep\.py:2\)"),
        ("\n1 / 0\n", r"/prep\.py fails when it is imported: ZeroDivisionError: division by zero \(.*/prep\.py:2\)"),
        ("import numpy\nimport not_there_at_all\n", r"ModuleNotFoundError: No module named 'not_there_at_all' \(.*/prep\.py:2\)"),
        ("def ff(x): ...\n", r"prep\.py has no 'f'; did you mean 'ff'\?"),
        ("f = 3\n", r"prep\.py:f is an int; expected a function"),
    ],
)
def test_what_fails_is_named_with_its_line(text: str, message: str, folder: Path) -> None:
    written(folder, text)
    with pytest.raises(UserCodeError, match=message):
        UserFunction.read("prep.py:f").call(folder, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(x):\n    return 1 / x\n", r"ZeroDivisionError: .* \({}/prep\.py:2\)$"),
        ("\nraise KeyError(3)\n", r"^{}/prep\.py fails when it is imported: KeyError: 3 \({}/prep\.py:2\)$"),
        ("def f(): ...\n", r"TypeError: .* \({}/prep\.py:1\)$"),
        (
            "from pathlib import Path\ndef f(x):\n    open(Path(__file__).with_name('beside.txt'))\n",
            r"'{}/beside\.txt' \({}/prep\.py:3\)\nprep\.py alone goes into the artifact",
        ),
    ],
    ids=["body", "import", "call", "beside"],
)
@pytest.mark.parametrize("copies", [1, 2])
def test_what_a_copy_does_wrong_is_said_of_the_users_own_file(text: str, message: str, copies: int, folder: Path) -> None:
    source = written(folder, text, "own/prep.py").parent
    function = UserFunction.read("own/prep.py:f")
    for number in range(copies):
        (folder / f"copy{number}").mkdir()
        function.copy(source if number == 0 else folder / f"copy{number - 1}", folder / f"copy{number}")
    with pytest.raises(UserCodeError, match=message.replace("{}", str(source))) as caught:
        function.call(folder / f"copy{copies - 1}", 0)
    assert str(folder / "copy") not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "import helper",
        "from helper import X",
        "def g():\n    import helper.deep",
        "from . import helper",
        "from .helper import X",
        "import parts",
    ],
)
def test_a_file_that_imports_what_lies_beside_it_is_refused(line: str, folder: Path) -> None:
    written(folder, "X = 1\n", "code/helper.py")
    written(folder, "", "code/parts/inner.py")
    written(folder, f"import numpy, json\n{line}\ndef f(): ...\n", "code/prep.py")
    with pytest.raises(
        UserCodeError, match=r"code/prep\.py:[23] imports '.*' from beside it, and the artifact takes prep\.py alone"
    ):
        UserFunction.read("code/prep.py:f")


def test_what_is_installed_or_of_the_standard_library_may_be_imported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(folder, "import os.path, numpy.linalg, PIL\nfrom collections import abc\nimport deploy\ndef f(): ...\n")
    UserFunction.read("prep.py:f")
    assert not caplog.records


def test_what_is_found_elsewhere_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    written(folder, "", "elsewhere/shared_tools.py")
    written(folder, "import shared_tools\ndef f(): ...\n", "code/prep.py")
    monkeypatch.syspath_prepend(folder / "elsewhere")
    with caplog.at_level(logging.WARNING):
        UserFunction.read("code/prep.py:f")
    assert "imports shared_tools" in caplog.text
    assert "not in the artifact" in caplog.text


def test_a_syntax_error_is_found_before_anything_is_made(folder: Path) -> None:
    written(folder, "x = 1\ndef f(:\n")
    with pytest.raises(UserCodeError, match=r"prep\.py:2: invalid syntax"):
        UserFunction.read("prep.py:f")


@pytest.mark.parametrize("spec", ["gone.py:f", "code/gone.py:f", "./folder:f", "notes.txt/x:f"])
def test_a_file_that_is_not_there_is_named(spec: str, folder: Path) -> None:
    with pytest.raises(UsageError, match="no Python file"):
        UserFunction.read(spec)


def test_an_installed_module_is_recorded_with_its_version(folder: Path) -> None:
    function = UserFunction.read("PIL.ImageOps:exif_transpose")
    assert (function.module, function.file) == ("PIL.ImageOps", None)
    assert function.version == importlib.metadata.version("pillow")
    function.copy(folder, folder)  # nothing to copy
    assert not list(folder.iterdir())


def test_a_module_of_the_current_folder_is_imported_where_it_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(folder, "", "toolbox_of_mine/__init__.py")
    written(folder, "def f(x):\n    return x + 1\n", "toolbox_of_mine/mod.py")
    code = (
        "from deploy.artifact.usercode import UserFunction\nfrom deploy.errors import UserCodeError\nimport os, sys\n"
        "f = UserFunction(name='f', module='toolbox_of_mine.mod', version=None, sha256={sha!r})\n"
        "try: print(f.call(None, 1))\nexcept UserCodeError as error: print(error)\n"
    )
    function = UserFunction.read("toolbox_of_mine.mod:f")
    (folder / "away").mkdir()

    def elsewhere(sha: str | None, where: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code.format(sha=sha)], cwd=where, capture_output=True, text=True, check=True
        )
        return done.stdout + done.stderr

    assert elsewhere(function.sha256, folder) == "2\n"
    assert "the file of toolbox_of_mine.mod:f is another than" in elsewhere("0" * 64, folder)
    assert "no module 'toolbox_of_mine.mod' to import" in elsewhere(function.sha256, folder / "away")


@pytest.mark.parametrize(("spec", "message"), [
    ("no_such_package.mod:f", r"no module 'no_such_package\.mod' to import"),
    ("json.no_such:f", r"no module 'json\.no_such' to import"),
    ("json:dumpz", r"json has no 'dumpz'; did you mean 'dump' or 'dumps'"),
    ("broken_module_here:f", r"fails when it is imported: ZeroDivisionError: .*broken_module_here\.py:1"),
    ("needs_what_is_missing:f", r"needs_what_is_missing fails when it is imported: ModuleNotFoundError: No module named 'is_missing'"),
])  # fmt: skip
def test_a_module_that_cannot_be_used_is_named(spec: str, message: str, folder: Path) -> None:
    written(folder, "1 / 0\n", "broken_module_here.py")
    written(folder, "import is_missing\n", "needs_what_is_missing.py")
    with pytest.raises(UserCodeError, match=message) as caught:
        UserFunction.read(spec)
    assert "artifact" not in str(caught.value)  # there is none yet


def test_a_module_that_an_artifact_names_and_does_not_hold_is_asked_for_with_its_version() -> None:
    function = UserFunction(name="f", module="no_such_package.mod", version="1.2")
    message = r"no module 'no_such_package\.mod' to import, which the artifact names, and does not hold; .* \(version 1\.2\)"
    with pytest.raises(UserCodeError, match=message):
        function.load(None)


@pytest.mark.parametrize(
    "record", [{}, {"file": "a.py", "module": "a"}, {"file": "../a.py"}, {"file": "/etc/a.py"}, {"file": "model.onnx"}]
)
def test_a_record_that_points_out_of_the_artifact_is_refused(record: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="function 'f' must be"):
        UserFunction(name="f", **record)
