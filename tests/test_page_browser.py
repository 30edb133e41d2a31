"""The page in a headless Chromium: it plays, scrubs, wipes, subtracts, and shows words as words."""

import importlib.util
import json
import os
import shutil
import time

import pytest
from tiny_report import FRAMES, HOSTILE, save_tiny_report, tiny_frames

from dit_sparse.compare_videos import compare_videos
from dit_sparse.page import write_page
from dit_sparse.video import write_frames

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = [
    name
    for name, found in (
        ("chromium", CHROMIUM),
        ("chromedriver", DRIVER),
        ("the Python package selenium", importlib.util.find_spec("selenium")),
    )
    if not found
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

STATE = """
const shown = [...document.querySelectorAll('#rows canvas')].filter((c) => c.offsetParent);
return {
  frame: player.frame,
  drawn: shown.map((c) => Number(c.dataset.frame)),
  red: shown.map((c) => c.getContext('2d').getImageData(2, 2, 1, 1).data[0]),
};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = save_tiny_report(tmp_path_factory.mktemp("run") / "tiny")
    return write_page([folder], folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def chromium():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "window-size=1400,1000", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    if os.geteuid() == 0:  # its sandbox refuses root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, page):
    """The page, freshly loaded; afterwards no error may stand in the browser's log."""
    chromium.get(page)
    until(lambda: chromium.execute_script("return document.body.dataset.ready === '0'"))
    until(lambda: chromium.execute_script("return Boolean(maps.trace)"))
    yield chromium
    log = chromium.get_log("browser")
    assert [entry["message"] for entry in log if entry["level"] in ("SEVERE", "ERROR")] == []


def until(claim, seconds=20):
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def click(browser, selector):
    browser.find_element("css selector", selector).click()


def press(browser, key):
    browser.find_element("css selector", "body").send_keys(key)


def text(browser, selector):
    return browser.find_element("css selector", selector).text


def frame(browser):
    return browser.execute_script("return player.frame")


def drag(browser, selector, start, end):
    """Drag over an element, from one share of its width to another."""
    from selenium.webdriver import ActionChains

    element = browser.find_element("css selector", selector)
    width = element.size["width"]
    actions = ActionChains(browser, duration=50)
    actions.move_to_element_with_offset(element, round((start - 0.5) * width), 0).click_and_hold()
    actions.move_to_element_with_offset(element, round((end - 0.5) * width), 0).release().perform()


def test_every_canvas_shows_the_same_frame_while_it_plays(browser):
    click(browser, "#play")
    seen = set()

    def played():
        state = browser.execute_script(STATE)
        assert len(state["drawn"]) == 6 and set(state["drawn"]) == {state["frame"]}
        assert state["red"] == [20 * state["frame"]] * 6  # the exact pixels of that frame
        seen.add(state["frame"])
        return len(seen) > 3

    until(played)
    press(browser, " ")
    paused = frame(browser)
    time.sleep(0.3)
    assert frame(browser) == paused


def test_frames_are_stepped_scrubbed_and_sought_on_the_curve(browser):
    from selenium.webdriver import Keys

    press(browser, Keys.ARROW_RIGHT)
    click(browser, "#forward")
    assert frame(browser) == 2 and text(browser, "#counter") == f"3 / {FRAMES}"
    press(browser, Keys.HOME)
    press(browser, Keys.ARROW_LEFT)
    assert frame(browser) == FRAMES - 1
    drag(browser, "#scrub", 0.9, 0.5)
    assert frame(browser) in (3, 4)
    drag(browser, "#curve", 0.5, 0.001)
    assert frame(browser) == 0
    assert "dB" in text(browser, "#readout") and "identical" in text(browser, "#readout")


def test_the_wipe_follows_pointer_and_keys(browser):
    from selenium.webdriver import Keys

    press(browser, "2")
    drag(browser, "#rows .stage", 0.5, 0.25)
    wipe = "return player.wipe"
    assert browser.execute_script(wipe) == pytest.approx(25, abs=1)
    divider = browser.find_element("css selector", "#rows .divider")
    divider.send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script(wipe) == pytest.approx(27, abs=1)
    assert frame(browser) == 0  # the key moved the wipe alone
    clip = "return getComputedStyle(document.querySelector('.sparse canvas')).clipPath"
    assert browser.execute_script(clip).startswith("inset(0px 0px 0px 2")


def test_the_difference_is_that_of_the_pixels_amplified(browser):
    press(browser, "3")
    press(browser, "-")
    difference = "return [...document.querySelectorAll('.difference canvas')].map((canvas) => "
    difference += "[...canvas.getContext('2d').getImageData(35, 6, 1, 1).data])"
    first, second, same = browser.execute_script(difference)
    dense = tiny_frames(0)[0, 6, 35].astype(int)
    assert first[:3] == [60] * 3 and second[:3] == [100] * 3 and same[:3] == [0] * 3, dense
    assert "× 2" in text(browser, ".difference figcaption")


def test_a_layer_is_chosen_in_the_list_and_on_the_map(browser):
    from selenium.webdriver import Keys
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", "block-layer")).select_by_value("2")
    assert "layer 2" in text(browser, "#place")
    kept = "const c = document.getElementById('block-map'); return [...c.getContext('2d')"
    kept += ".getImageData(0, 0, c.width, c.height).data].filter((x, i) => i % 4 === 3 && x).length"
    before = browser.execute_script(kept)
    click(browser, "#heat rect[data-step='3'][data-layer='0']")
    assert text(browser, "#place") == "Step 3, layer 0, cond"
    click(browser, "#map-quantity button[data-quantity='density']")
    assert "key blocks" in text(browser, "#legend")
    assert browser.execute_script(kept) < before  # layer 0 keeps fewer blocks
    browser.find_element("id", "heat").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert text(browser, "#place") == "Step 1, layer 0, cond" and frame(browser) == 0
    assert "search" in text(browser, "#kind")
    click(browser, "#map-branch button:last-child")
    assert "uncond" in text(browser, "#place")
    click(browser, "button.head[data-head='3']")
    assert browser.execute_script("return maps.head") == 3


def test_dark_and_light_are_chosen_and_kept(browser):
    paper = "return getComputedStyle(document.body).backgroundColor"
    press(browser, "t")
    light = browser.execute_script(paper)
    press(browser, "t")
    assert browser.execute_script(paper) != light
    browser.refresh()
    assert browser.execute_script("return document.documentElement.dataset.theme") == "dark"
    press(browser, "t")


def test_words_of_the_data_are_shown_and_never_run(browser):
    assert text(browser, "h1") == HOSTILE
    assert browser.find_elements("css selector", "img") == []
    press(browser, "n")
    assert text(browser, "h1") == "a blue square"
    until(lambda: browser.execute_script("return document.body.dataset.ready === '1'"))
    loaded = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert [name for name in browser.execute_script(loaded) if not name.startswith("data:")] == []


def test_a_report_without_a_finished_clip_says_so(browser, tmp_path):
    folder = save_tiny_report(tmp_path / "none")
    report = json.loads((folder / "report.json").read_text())
    report |= {"runs": [], "complete": False}
    (folder / "report.json").write_text(json.dumps(report))
    browser.get(write_page([folder], folder / "report.html").as_uri())
    assert "No clip" in text(browser, "h1") and "interrupted" in text(browser, ".warning")
    press(browser, " ")


def test_several_reports_and_videos_share_a_page(browser, page, tmp_path):
    folder = save_tiny_report(tmp_path / "again")
    report = json.loads((folder / "report.json").read_text())
    report["runs"] = report["runs"][:1]
    (folder / "report.json").write_text(json.dumps(report))
    write_frames(tmp_path / "a", tiny_frames(0))
    write_frames(tmp_path / "b", tiny_frames(1))
    compare_videos(tmp_path / "a", [tmp_path / "b"], tmp_path / "videos")
    folders = [folder, tmp_path / "videos"]
    browser.get(write_page(folders, tmp_path / "all.html").as_uri())
    until(lambda: browser.execute_script("return document.body.dataset.ready === '0'"))
    press(browser, "n")
    until(lambda: browser.execute_script("return document.body.dataset.ready === '1'"))
    assert text(browser, "h1") == "b against a"
    assert len(browser.find_elements("css selector", "tr.report")) == 2


def test_a_line_joins_methods_of_one_pipeline_alone(browser, tmp_path):
    folders = [save_tiny_report(tmp_path / name) for name in ("a", "again", "other")]
    report = json.loads((folders[2] / "report.json").read_text())
    report["pipeline"]["source"] = "other"
    (folders[2] / "report.json").write_text(json.dumps(report))
    browser.get(write_page(folders, tmp_path / "all.html").as_uri())
    until(lambda: browser.execute_script("return document.body.dataset.ready === '0'"))
    assert len(browser.find_elements("css selector", "#pareto .frontier")) == 2


def test_a_method_with_many_options_does_not_widen_the_page(browser, tmp_path):
    folder = save_tiny_report(tmp_path / "long")
    report = json.loads((folder / "report.json").read_text())
    report["runs"][0]["label"] = "auto:" + ",".join(f"option_{n}=value" for n in range(20))
    (folder / "report.json").write_text(json.dumps(report))
    browser.get(write_page([folder], folder / "report.html").as_uri())
    until(lambda: browser.execute_script("return Boolean(maps.trace)"))
    assert browser.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_method_beyond_the_colours_is_dashed_and_hollow(browser, tmp_path):
    folder = save_tiny_report(tmp_path / "many")
    report = json.loads((folder / "report.json").read_text())
    report["runs"] = [report["runs"][0] | {"label": f"method {n}"} for n in range(18)]
    (folder / "report.json").write_text(json.dumps(report))
    browser.get(write_page([folder], folder / "report.html").as_uri())
    until(lambda: browser.execute_script("return document.body.dataset.ready === '0'"))
    for shape in (".line", ".point", "#figures .swatch"):
        found = browser.find_elements("css selector", shape)
        assert len(found) == 18 and "again" in found[6].get_attribute("class"), shape
    names = browser.find_elements("css selector", "#pareto .name")
    heights = sorted(float(name.get_attribute("y")) for name in names)
    assert heights[-1] < browser.execute_script("return PLOT.height - PLOT.bottom")
    assert min(b - a for a, b in zip(heights, heights[1:])) > 14.9
    style = "return getComputedStyle(document.querySelector('.line.again')).strokeDasharray"
    assert browser.execute_script(style) != "none"


def test_a_real_report_plays_scrubs_wipes_and_shows_a_layer(browser, tmp_path):
    from selenium.webdriver.support.ui import Select
    from test_cli import SMALL, invoke
    from tiny import tiny_folder

    methods = ["-m", SMALL, "-m", "window:block_size=32"]
    done = invoke("compare", "-p", tiny_folder(), *methods, "--steps", 5, "-o", tmp_path, "-q")
    assert done.exit_code == 0, done.output
    browser.get((tmp_path / "report.html").as_uri())
    until(lambda: browser.execute_script("return document.body.dataset.ready === '0'"))
    until(lambda: browser.execute_script("return Boolean(maps.trace)"))
    click(browser, "#play")
    until(lambda: frame(browser) > 0)
    press(browser, " ")
    drag(browser, "#scrub", 0.9, 0.001)
    assert frame(browser) == 0
    click(browser, "#views button[data-view=wipe]")
    drag(browser, "#rows .stage", 0.02, 0.01)
    assert browser.execute_script("return player.wipe") < 50
    layers = Select(browser.find_element("id", "block-layer"))
    layers.select_by_index(len(layers.options) - 1)
    assert f"layer {len(layers.options) - 1}" in text(browser, "#place")
    shown = "return document.getElementById('block-map').width"
    assert browser.execute_script(shown) > 1 and "blocks of queries" in text(browser, "#block-note")
    assert len(browser.find_elements("css selector", "#figures tbody tr")) == 3


def test_keys_are_listed_and_a_small_window_has_everything(browser):
    press(browser, "?")
    assert "wipe" in text(browser, "#keys")
    click(browser, "#keys-close")
    size = browser.get_window_size()
    browser.set_window_size(500, 900)
    try:
        until(lambda: browser.execute_script("return innerWidth") <= 500)
        overflow = "return document.documentElement.scrollWidth - innerWidth"
        until(lambda: browser.execute_script(overflow) <= 0, 3)
    finally:
        browser.set_window_size(size["width"], size["height"])
