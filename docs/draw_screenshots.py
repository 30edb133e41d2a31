"""Take the pictures of docs/looking.md of a comparison's page, in headless Chromium.

    dit-sparse compare --steps 10 -m auto -m adaspa -m window:density=0.3 -o FOLDER
    python docs/draw_screenshots.py FOLDER [--seconds]

Needs chromium, chromedriver and selenium. Seconds are left out unless nothing else ran meanwhile.
"""

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dit_sparse.page import write_page  # noqa: E402

WIDTH, HEIGHT, QUALITY = 1200, 1700, 82
MARGIN = "for (const s of document.querySelectorAll('section')) s.style.padding = '1.5rem'"
SHOTS = {  # picture: (what to do first, the element that is taken)
    "difference": ("setView('difference'); seek(8)", "#player"),
    "wipe": ("setView('wipe'); setWipe(20); seek(8)", "#rows article:nth-of-type(2)"),
    "figures": ("", "section[aria-labelledby=figures-title]"),
    "tradeoff": ("", "#tradeoff"),
    "attention": ("chooseQuantity('density'); choosePlace(6, 3); chooseHead(1)", "#attention"),
}


def without_seconds(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    path = copy / "report.json"
    report = json.loads(path.read_text())
    for entry in [*report["dense"], *report["runs"]]:
        entry["seconds"] = None
    path.write_text(json.dumps(report))
    return copy


def open_browser():
    options = webdriver.ChromeOptions()
    for argument in ("headless=new", f"window-size={WIDTH},{HEIGHT}", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument("--disable-dev-shm-usage")
    if os.geteuid() == 0:  # its sandbox refuses root
        options.add_argument("--no-sandbox")
    options.binary_location = shutil.which("chromium") or ""
    # A driver that is named is not looked for in the network.
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def take(browser, name: str, before: str, selector: str) -> None:
    browser.execute_script(before)
    element = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].scrollIntoView()", element)
    time.sleep(0.5)
    image = Image.open(io.BytesIO(element.screenshot_as_png))
    path = ROOT / "docs" / "pictures" / f"{name}.webp"
    image.convert("RGB").save(path, quality=QUALITY, method=6)
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size >> 10} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "run"
        folder = args.folder if args.seconds else without_seconds(args.folder, copy)
        page = write_page([folder], Path(place) / "report.html")
        browser = open_browser()
        try:
            browser.get(page.as_uri())
            while not browser.execute_script("return document.body.dataset.ready && maps.trace"):
                time.sleep(0.1)
            browser.execute_script(f"setTheme('light'); {MARGIN}; drawAgain()")
            for name, (before, selector) in SHOTS.items():
                take(browser, name, before, selector)
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
