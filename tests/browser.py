"""A page in a real browser: what it drew, and what the console said."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PROBE = (
    "<script>addEventListener('load',()=>{const r={"
    "images:[...document.images].map(i=>i.complete&&i.naturalWidth),"
    "charts:[...document.querySelectorAll('svg.chart')].map(s=>s.getBoundingClientRect().width),"
    "wide:document.documentElement.scrollWidth-innerWidth};"
    "document.title='PROBE'+JSON.stringify(r)})</script>"
)


def seen_in_browser(page: Path, scratch: Path) -> dict[str, Any]:
    """images: the width of each, 0 or false if it did not load; charts: their widths; wide: pixels beyond the window.
    Fails if the console says anything; skips the test where there is no Chromium."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here")
    probed = scratch / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{_PROBE}</body>"))
    done = subprocess.run(
        [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,2000"),
            *(f"--user-data-dir={scratch / 'profile'}", "--enable-logging=stderr", "--dump-dom", f"file://{probed}"),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    found = re.search(r"<title>PROBE(.*?)</title>", done.stdout)
    assert found is not None, done.stdout[:500]
    assert ":CONSOLE" not in done.stderr, done.stderr
    return json.loads(found[1])
