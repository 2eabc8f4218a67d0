"""Makes the pictures of docs/report.md: trains two runs on digits, reports them, and takes pictures of the page.

    python docs/report_figure.py [--folder DOCS]

Replaces report.png and images/report-evaluation.png in the folder. Needs Chromium and selenium, which
`bash launch/setup.sh --dev` installs on Debian. Takes about a minute.
"""

from __future__ import annotations

import argparse
import base64
import os
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ["-m", "hvd_adam.train", "--epochs", "10"]


def main() -> None:
    """Trains, the second run with another learning rate and a resume; then takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="the folder of the pictures")
    folder = parser.parse_args().folder.resolve()
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.browser import Browser

    with tempfile.TemporaryDirectory(prefix="hvd_adam-report-") as name:
        place = Path(name)
        run(place, *TRAIN, "--output-dir", "first")
        second = [*TRAIN, "--lr", "0.004", "--output-dir", "second"]
        run(place, *second, stop_after=150)
        run(place, *second)
        run(place, "-m", "hvd_adam.report", "first", "second")
        with Browser() as browser:
            browser.open(place / "report.html")
            charts, recall, last = (bounds(browser, each) for each in ("#charts", "#recall", "#mistakes"))
            take(browser, folder / "report.png", 0, charts["top"] + 0.66 * charts["height"])
            take(browser, folder / "images/report-evaluation.png", recall["top"], last["top"] + last["height"])


def run(place: Path, *argv: str, stop_after: int = 0) -> None:
    """Runs Python in a folder, with this package; stops a training, as a scheduler does, after some updates."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, *argv], cwd=place, env=environ, stdout=subprocess.PIPE, text=True
    ) as running:
        for line in running.stdout or ():
            if stop_after and f"step {stop_after}/" in line:
                running.terminate()
    if running.returncode != (75 if stop_after else 0):
        raise SystemExit(f"python {' '.join(argv)} ended with code {running.returncode}")


def bounds(browser: Any, selector: str) -> dict[str, float]:
    """Returns the place of an element on the page, in CSS pixels."""
    found: dict[str, float] = browser.run("document.querySelector(arguments[0]).getBoundingClientRect()", selector)
    return found


def take(browser: Any, path: Path, top: float, bottom: float) -> None:
    """Writes a part of the page as a picture with 256 colors."""
    from PIL import Image

    clip = {"x": 0, "y": top, "width": 1280, "height": bottom - top, "scale": 1}
    options = {"clip": clip, "captureBeyondViewport": True}
    data = browser.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
    Image.open(BytesIO(base64.b64decode(data))).convert("RGB").quantize(256).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
