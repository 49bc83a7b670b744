"""Everything that the README and the pages show works.

Fenced blocks run as they stand, page by page, each page in a folder of its own:

    console   lines that begin with `$ deploy` or `$ python examples/` run; the lines below one must be in what it prints, `...`
              standing for any text; on the pages of SMALL, whose figures are of more images, a number stands for any number, and
              the list of an image's or a model's classes for any list
    python    runs
    text      directly below a python block: what that prints. Elsewhere a drawing
    sh        installation, and what needs other machines: extras and options are looked up, nothing runs

A python or json block below a line that is only a file name in backticks is the content of that file. Weights, photographs and
artifacts that a line names and nobody made are small stand-ins; images have 32x32 pixels in place of 224x224.
"""

import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Manifest
from deploy.bench.rows import SCHEMA, BenchResult, BenchRow, LayersRow, LoadRow, ScenarioRow
from deploy.runtime.profiling import LayerTime
from tests.servers import check_answers, serving
from tests.stand_ins import STAND_INS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (README, *sorted((ROOT / "docs").glob("*.md")))}
CLI = (
    "doctor", "export", "convert", "quantize", "build-aoti", "build-trt", "inspect", "eval", "predict", "serve", "export-triton", "bench", "verify", "tune",
)  # fmt: skip
STAGES = ("export", "convert", "quantize", "build-trt")
FASTER = {
    ("--arch",): ("--input", "input=1x3x32x32"),
    ("quantize", "--metric"): ("--max-drop", "100"),  # of nets that are hardly trained
    ("bench",): ("--seconds", "0.2", "--batch", "1", "--backend", "onnxruntime"),
    ("bench", "--report"): ("--baseline", "onnxruntime", "--backend", "openvino"),  # the README's line runs eager PyTorch
}
"""Options that make a line with these words cheaper."""
EXAMPLES = {
    "examples/finetune.py": ("--workers", "0"),
    "examples/scenes.py": ("--images", "8,4"),
    "examples/train_scenes.py": ("--steps", "2"),
}
"""Options that make these programs cheaper."""
SMALL = ("your-own-data.md", "tasks.md")
_LIST = re.compile(r"(\\.png:\\ |\\ \\ (?:classes|confusions)\\ +).*?(\\ \\->\\ .*)?$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the last line before it."""

    language: str
    text: str
    above: str

    @property
    def file(self) -> str | None:
        """The file that the block is the content of."""
        named = re.fullmatch(r"`([\w./]+)`:", self.above)
        return named[1] if named else None


@dataclass(frozen=True)
class Line:
    """One command of a console block, and the output that is shown below it."""

    words: tuple[str, ...]
    shown: tuple[str, ...]


def blocks(text: str) -> list[Block]:
    found, above = [], ""
    parts = re.split(r"^```(\w*)\n(.*?)^```\n", text, flags=re.DOTALL | re.MULTILINE)
    for before, language, content in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
        above = next((line for line in reversed(before.splitlines()) if line.strip()), "```")
        found.append(Block(language, content, above))
    return found


def small(text: str) -> str:
    return text.replace("3x224x224", "3x32x32")


def console(text: str) -> list[Line]:
    lines: list[Line] = []
    for line in small(text).replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            words = shlex.split(line.removeprefix("$ "), comments=True)
            example = words[0] == "python" and words[1].startswith("examples/")
            assert words[0] == "deploy" or example, f"{line}: a block that is no session of deploy is not `console`"
            lines.append(Line(tuple(words if example else words[1:]), ()))
        else:
            lines[-1] = Line(lines[-1].words, (*lines[-1].shown, line))
    return lines


LINES = [line for page in PAGES.values() for block in blocks(page) if block.language == "console" for line in console(block.text)]
TASKS = [line for block in blocks(PAGES["tasks.md"]) if block.language == "console" for line in console(block.text)]
STAGED = [line for line in LINES[:8] if line.words[0] in STAGES]
"""The lines of the README that make artifacts: what they make is linked where a page names it, and they run on no page again."""
SERVERS = sorted({line.words for line in LINES if line.words[0] == "serve" and line not in TASKS})
SET_UP = [
    shlex.split(line, comments=True)
    for page in PAGES.values()
    for block in blocks(page)
    if block.language == "sh"
    for line in block.text.splitlines()
]


def check_shown(shown: Sequence[str], printed: str, small_data: bool = False) -> None:
    for line in shown:
        pattern = re.escape(line).replace(re.escape("..."), ".*")
        if small_data:
            pattern = _LIST.sub(r"\1.*\2", pattern)
            pattern = re.sub(r"(?<![\w.])(?:\\-)?\d(?:[\d,]|\\\.(?=\d))*", r"-?[\\d,.]+", pattern)
        assert re.search(rf"^{pattern}$", printed, re.MULTILINE), f"{line!r} is shown, and printed is:\n{printed}"


@pytest.fixture
def readme(tmp_path_factory: pytest.TempPathFactory, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the first lines of the README, the stages, have run: once for all pages."""
    folder = tmp_path_factory.getbasetemp() / "readme"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        monkeypatch.chdir(folder)
        for line in STAGED:
            Shown(folder, folder, run).line(line)
        (folder / "done").touch()
    return folder


class Shown:
    """Runs what a page shows in `folder`. Artifacts that a page does not make itself come from `readme`."""

    def __init__(self, folder: Path, readme: Path, run: Callable[..., Any], digits: Artifact | None = None) -> None:
        self.folder, self.readme, self.run, self.digits = folder, readme, run, digits
        self.advised: list[str] = []

    def line(self, line: Line, small_data: bool = False) -> None:
        for word in line.words:
            self.stand_in(word)
        if line.words[0] == "python":
            printed = run_example(line.words[1:])
            self.advised = shlex.split(printed.splitlines()[-1])[1:] if "finetune" in line.words[1] else []
            check_shown(line.shown, printed, small_data)
            return
        if "--expect-top1" in line.words and self.advised:  # the accuracy is that of the small data
            line = Line(with_value(line.words, "--expect-top1", self.advised), line.shown)
            assert line.words == tuple(self.advised), "the page types what the example advised"
        cheaper = [options for words, options in FASTER.items() if {*words} <= {*line.words}]
        extra = [option for options in cheaper if options[0] != "--input" or "--input" not in line.words for option in options]
        extra = [] if "--compare" in line.words else extra
        finished = self.run(*line.words, *extra)
        assert finished.status == 0, (line.words, finished.err)
        assert finished.out, line.words
        check_shown(line.shown, finished.out, small_data)
        for report in re.findall(r"--report (\S+)", " ".join(line.words)):
            assert "<!doctype html>" in (self.folder / report).read_text()

    def stand_in(self, name: str) -> None:
        """Make what a line or a program reads, unless it is there."""
        top = Path(name).parts[0] if name else ""
        if "examples/" in name and not (self.folder / "examples").exists():
            (self.folder / "examples").symlink_to(ROOT / "examples")
        if name.startswith("build/resnet34") and not (self.folder / name).exists() and (self.readme / name).exists():
            shutil.copytree(self.readme / name, self.folder / name, copy_function=os.link)
        elif name == "build/digits" and not (self.folder / name).exists():
            assert self.digits is not None
            shutil.copytree(self.digits.path, self.folder / name, copy_function=os.link)
        elif name.startswith("build/digits-") and not (self.folder / name).exists() and not self.advised:
            shutil.copytree(self.readme / "build/resnet34-int8", self.folder / name, copy_function=os.link)
        elif top in STAND_INS and not (self.folder / top).exists():
            STAND_INS[top](self.folder)


def run_example(words: Sequence[str]) -> str:
    """What a program of examples/ prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.syspath_prepend(ROOT / "examples")
        patch.setattr(sys, "argv", [*words, *EXAMPLES[words[0]]])
        status: Any = None
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    assert not status, words
    return printed.getvalue()


def with_value(words: tuple[str, ...], option: str, of: Sequence[str]) -> tuple[str, ...]:
    """`words` with the value that `option` has in `of`."""
    at = words.index(option) + 1
    return (*words[:at], of[list(of).index(option) + 1], *words[at + 1 :])


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text)])
def test_what_a_page_shows_runs(
    page: str,
    readme: Path,
    tmp_path: Path,
    run: Callable[..., Any],
    shared_lenet5: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = readme if page == "README.md" else tmp_path
    monkeypatch.chdir(folder)
    shown = Shown(folder, readme, run, shared_lenet5)
    if page != "README.md":
        shown.stand_in("build/resnet34")
    files = [block for block in blocks(PAGES[page]) if block.file]
    for block in files:
        assert block.file is not None
        (folder / block.file).parent.mkdir(exist_ok=True)
        (folder / block.file).write_text(block.text)
    printed: str | None = None
    for block in blocks(PAGES[page]):
        if block in files:
            continue
        if block.language == "console":
            for line in console(block.text):
                if line.words[0] == "serve" and page == "tasks.md":
                    check_answers(line.words, folder)
                elif line.words[0] != "serve" and line not in STAGED:
                    shown.line(line, small_data=page in SMALL)
        elif block.language == "python":
            if 'export("build/digits"' not in block.text:
                shown.stand_in("build/digits")
            for name in STAND_INS:
                if f'"{name}"' in block.text:
                    shown.stand_in(name)
            capsys.readouterr()
            exec(compile(block.text, page, "exec"), {})
            printed = capsys.readouterr().out
            continue
        elif block.language == "text" and printed is not None:
            assert len(printed.splitlines()) == len(block.text.splitlines()), printed
            check_shown(block.text.splitlines(), printed)
        else:
            assert block.language in ("text", "sh"), f"nothing runs a block of {block.language or 'no language'}: {block.text}"
        printed = None


@pytest.mark.parametrize("words", SERVERS, ids=" ".join)
def test_the_servers_on_the_pages_start_and_stop(
    words: tuple[str, ...], readme: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    for word in words:
        Shown(tmp_path, readme, run).stand_in(word)
    with serving(words, tmp_path):
        pass


def commands() -> dict[str, click.Command]:
    modules = {name: importlib.import_module(f"deploy.cli.{name.replace('-', '_')}") for name in CLI}
    return {name: module.command for name, module in modules.items()}


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")}


def test_every_block_is_fenced_and_of_a_language_that_is_checked() -> None:
    for page, text in PAGES.items():
        assert text.count("\n```") == 2 * len(blocks(text)), f"{page}: a fence that is not closed, or not at the margin"
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        indented = re.findall(r"^(?: {4}|\t).*", prose, re.MULTILINE)
        assert indented == [], f"{page}: code that is indented and not fenced runs in no test"


@pytest.mark.parametrize(
    "text", ["```console\n$ deploy fly\n```\n", "```console\n$ deploy doctor\nwill not be printed\n```\n", "```yaml\na: 1\n```\n"]
)
def test_a_block_that_does_not_work_is_noticed(
    text: str, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PAGES, "planted.md", text)
    with pytest.raises(AssertionError):
        test_what_a_page_shows_runs("planted.md", tmp_path, tmp_path, run, None, monkeypatch, capsys)  # type: ignore[arg-type]


def test_the_session_of_the_readme_has_eight_lines() -> None:
    (block,) = [block for block in blocks(PAGES["README.md"]) if block.language == "console"]
    lines = [line.words[0] for line in console(block.text)]
    assert len(lines) == 8
    assert {*STAGES} <= {*lines}


def test_the_readme_stays_short_and_leads_to_every_page() -> None:
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 110, "what is new goes to a page under docs/"
    assert [page for page in PAGES if page != "README.md" and f"](docs/{page})" not in text] == []


def test_lines_of_set_up_name_extras_and_options_that_exist() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "\n".join(PAGES.values())
    named = {name for extras in re.findall(r"pip install '(?:deploy|\.)\[([\w,]+)\]'", text) for name in extras.split(",")}
    assert named <= known.keys()
    assert {"export", "cpu", "serving"} <= named
    table = PAGES["install.md"].partition("## Extras")[2]
    assert [name for name in known if f"`{name}`" not in table] == []
    for program, command, *words in SET_UP:
        assert (program, command) == ("pip", "install") or program == "deploy", "only what nothing can run here is `sh`"
        if program == "deploy":
            commands()[command].make_context(command, words)  # raises for an option or a value that is not taken


def test_every_option_that_is_named_exists_and_every_option_is_named() -> None:
    known = {name: options(command) for name, command in commands().items()}
    lesson = set(re.findall(r'"(--[\w-]+)"', (ROOT / "examples/finetune.py").read_text(encoding="utf-8")))
    every = set().union(*known.values())
    for page, text in PAGES.items():
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)):
            words = code.split()
            taken = known[words[1]] if words[0] == "deploy" and len(words) > 1 and words[1] in known else every | lesson
            assert [
                word for word in words if re.match(r"--\w", word) and word.partition("=")[0] not in {*taken, "--help"}
            ] == [], (page, code)
    for line in (line for line in LINES if line.words[0] != "python"):
        named = {word.partition("=")[0] for word in line.words if re.match(r"--?[a-z]", word)}
        assert named <= known[line.words[0]], line
    shown = set(re.findall(r"(?<![\w-])--[\w-]+", "\n".join(PAGES.values())))
    assert sorted(name for name in every - shown if name.startswith("--")) == []


def test_every_option_of_the_server_is_on_its_page() -> None:
    missing = [name for name in options(commands()["serve"]) if name.startswith("--") and f"`{name}`" not in PAGES["serving.md"]]
    assert sorted(missing) == ["--backend", "--debug", "--device", "--threads"]


def test_the_keys_of_the_json_of_bench_are_documented() -> None:
    text = PAGES["bench.md"]
    assert f"(schema {SCHEMA})" in text
    rows = (BenchRow, LayersRow, LoadRow, ScenarioRow, LayerTime)
    result = BenchResult(conditions={}, results=(), skipped=()).to_json()
    names = {field.name for kind in rows for field in fields(kind)} | result.keys()
    assert sorted(name for name in names if f"`{name}`" not in text) == []


def test_the_keys_of_the_other_json_documents_are_those_that_are_printed(
    readme: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", PAGES["python.md"].partition("## `--json`")[2], re.MULTILINE)
    documented = {name.strip("`"): set(re.findall(r"`(\w+)`", text)) for name, text in rows}
    monkeypatch.chdir(readme)
    Shown(readme, readme, run).stand_in("cat.jpg")
    evaluated = json.loads(run("eval", "build/resnet34", "photographs/val", "--json").out)
    assert evaluated.keys() == documented["deploy eval"]
    predicted = json.loads(run("predict", "build/resnet34", "cat.jpg", "--json").out)
    (image,) = predicted["predictions"]
    assert predicted.keys() | image.keys() | image["classes"][0].keys() == documented["deploy predict"]
    assert documented["deploy doctor"] <= json.loads(run("doctor", "--json").out).keys()
    manifest = json.loads(run("inspect", "build/resnet34", "--json").out)
    keys = {name for first, _ in rows for name in re.findall(r"`(\w+)`", first)}
    assert manifest.keys() == keys == set(Manifest.__struct_fields__)


def test_every_file_and_heading_that_is_linked_is_there() -> None:
    links = 0
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target, _, anchor = link.partition("#")
            path = folder / target if target else folder / page
            assert path.exists(), (page, link)
            if anchor:
                headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in slugs, (page, link)
            links += 1
        for name in re.findall(r"`((?:examples|benchmarks|deploy|docs|tests)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), (page, name)
    assert links > 20
