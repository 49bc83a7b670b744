"""Pages in a real browser: what is cut, and what lies on something else, at the widths of a screen and of a phone."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (1200, 390)

_PROBE = """<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, width = page.documentElement.clientWidth, cut = [];
    for (const each of page.querySelectorAll("body *")) {
      const box = each.getBoundingClientRect();
      if (box.width && (box.right > width + 1 || box.left < -1)) cut.push(each.tagName + " " + each.textContent);
      if (each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).overflowX != "visible") cut.push("scrolls");
    }
    for (const figure of page.querySelectorAll("svg")) {
      const whole = figure.getBoundingClientRect(), texts = [...figure.querySelectorAll("text")].map(each => [each, each.getBoundingClientRect()]);
      for (const [each, box] of texts) {
        if (box.right > whole.right + 1 || box.left < whole.left - 1 || box.bottom > whole.bottom + 1) cut.push("outside: " + each.textContent);
        for (const [other, at] of texts)
          if (other != each && at.left < box.right - 1 && box.left < at.right - 1 && at.top < box.bottom - 3 && box.top < at.bottom - 3)
            cut.push(each.textContent + " over " + other.textContent);
      }
    }
    const cells = [...page.querySelectorAll("table")].at(-1).querySelectorAll("td");
    return {width, cut, hidden: [...cells].filter(each => !each.getBoundingClientRect().width).length};
  });
  document.body.dataset.found = JSON.stringify({dark: matchMedia("(prefers-color-scheme: dark)").matches, found});
});
</script>"""


def check_nothing_is_cut(page: str, folder: Path, *, dark: bool) -> None:
    """Fail where the page has something beyond its sides, a figure has one text on another, or the last table hides a cell."""
    frames = "".join(f'<iframe width={width} height=2000 style="border:0" srcdoc="{escape(page)}"></iframe>' for width in WIDTHS)
    (folder / "frames.html").write_text(f"<!doctype html><body>{frames}{_PROBE}</body>", encoding="utf-8")
    done = browse(folder, "--window-size=1300,900", "--dump-dom", f"file://{folder / 'frames.html'}", dark=dark)
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match is not None, done.stderr
    found: dict[str, Any] = json.loads(unescape(match[1]))
    assert found == {"dark": dark, "found": [{"width": width, "cut": [], "hidden": 0} for width in WIDTHS]}


def browse(folder: Path, *options: str, dark: bool) -> "subprocess.CompletedProcess[str]":
    """Run the browser without a network, with its profile in `folder`."""
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}", *options,
    ]  # fmt: skip
    command += ["--blink-settings=preferredColorScheme=0"] * dark
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
