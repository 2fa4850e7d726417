"""The page in a browser: what a person does with it, with the mouse, the keyboard, a phone and a printer."""

from __future__ import annotations

import base64
import csv
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfReader
from selenium import webdriver
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from lighten.report.render import write_report

from .sample import with_failure

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and its driver: apt install chromium chromium-driver"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NAMES = ["baseline", "gptq-int4", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "nf4"]


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made = with_failure()
    earlier = [made.model_copy(update={"version": f"v{number}"}) for number in (1, 2)]
    write_report(made.model_copy(update={"machine": {"cpu": "another"}}), folder, earlier)
    return folder / "report.html"


Open = Callable[..., Chrome]


@pytest.fixture
def page(chrome: Chrome, file: Path) -> Iterator[Open]:
    """Returns a function that opens the report at a width, in light or dark, with or without its script."""

    def opened(width: int = 1280, scheme: str = "light", script: bool = True) -> Chrome:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        chrome.get(file.as_uri())
        return chrome

    yield opened
    said = [entry["message"] for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"]  # type: ignore[no-untyped-call]
    chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    chrome.get(file.as_uri())
    chrome.execute_script("localStorage.clear()")
    assert said == []


def rows(chrome: Chrome) -> list[str]:
    """Names of the rows that can be seen, from the top."""
    heads = chrome.find_elements(By.CSS_SELECTOR, ".compare tbody th")
    return [head.text for head in heads if head.is_displayed()]


def head(chrome: Chrome, column: str) -> WebElement:
    return chrome.find_element(By.CSS_SELECTOR, f".compare thead th[data-name={column}]")


def ground(chrome: Chrome) -> str:
    return str(chrome.execute_script("return getComputedStyle(document.body).backgroundColor"))


def pdf(chrome: Chrome) -> PdfReader:
    done: dict[str, Any] = chrome.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    return PdfReader(io.BytesIO(base64.b64decode(done["data"])))


def words(reader: PdfReader) -> str:
    return " ".join(" ".join(sheet.extract_text() for sheet in reader.pages).split())


def test_a_click_on_a_heading_sorts(page: Open) -> None:
    chrome = page()
    assert rows(chrome) == NAMES
    head(chrome, "decode").find_element(By.TAG_NAME, "button").click()
    assert head(chrome, "decode").get_attribute("aria-sort") == "descending", "the fastest first"
    assert rows(chrome) == ["baseline", "gguf-q4_k_m", "gguf-q8_0", "gguf-f16", "gptq-int4", "nf4"]
    head(chrome, "decode").find_element(By.TAG_NAME, "button").click()
    assert head(chrome, "decode").get_attribute("aria-sort") == "ascending"
    assert rows(chrome) == ["baseline", "gptq-int4", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "nf4"]


def test_the_keyboard_sorts_and_reads_what_a_heading_means(page: Open) -> None:
    chrome = page()
    chrome.find_element(By.CSS_SELECTOR, ".downloads a:last-child").send_keys(Keys.TAB)
    ActionChains(chrome).send_keys(Keys.TAB, *[Keys.TAB] * 3).perform()
    assert chrome.execute_script("return document.activeElement.closest('th').dataset.name") == "size"
    assert "All files of the artifact" in chrome.find_element(By.ID, "tip").text
    ActionChains(chrome).send_keys(Keys.ENTER).perform()
    assert head(chrome, "size").get_attribute("aria-sort") == "ascending"
    assert rows(chrome)[1:5] == ["gguf-q4_k_m", "gptq-int4", "gguf-q8_0", "gguf-f16"]
    ActionChains(chrome).send_keys(Keys.ESCAPE).perform()
    assert not chrome.find_element(By.ID, "tip").is_displayed()


def test_every_column_sorts_by_its_numbers(page: Open) -> None:
    chrome = page()
    for each in chrome.find_elements(By.CSS_SELECTOR, ".compare thead th[data-better=lower]"):
        each.find_element(By.TAG_NAME, "button").click()
        index = chrome.execute_script("return arguments[0].cellIndex", each)
        cells = chrome.find_elements(
            By.CSS_SELECTOR, f".compare tbody tr:not(.failed):not(.baseline) > :nth-child({index + 1})"
        )
        values = [float(value) for cell in cells if (value := cell.get_attribute("data-value"))]
        assert len(values) == 4 and values == sorted(values), each.text


def test_a_column_is_hidden_and_comes_back(page: Open) -> None:
    chrome = page()
    assert head(chrome, "kl").is_displayed()
    chrome.find_element(By.CSS_SELECTOR, "#columns summary").click()
    box = chrome.find_element(By.CSS_SELECTOR, "#columns input[value=kl]")
    box.click()
    cells = chrome.find_elements(By.CSS_SELECTOR, ".compare .kl")
    assert len(cells) == 6 and not any(cell.is_displayed() for cell in cells)
    box.click()
    assert all(cell.is_displayed() for cell in cells)
    ActionChains(chrome).send_keys(Keys.ESCAPE).perform()
    assert not box.is_displayed()


def test_the_search_keeps_the_rows_that_match(page: Open) -> None:
    chrome = page()
    search = chrome.find_element(By.ID, "search")
    search.send_keys("GGUF q")
    assert rows(chrome) == ["gguf-q8_0", "gguf-q4_k_m"]
    assert chrome.find_element(By.ID, "count").text == "2 of 6"
    search.send_keys("zzz")
    assert rows(chrome) == [] and chrome.find_element(By.ID, "count").text == "No variant matches"
    search.clear()
    search.send_keys("signal 9")
    assert rows(chrome) == ["nf4"], "the reason of a failure is found too"


def test_a_point_says_its_figures_to_the_mouse_and_to_the_keyboard(page: Open) -> None:
    chrome = page()
    point = chrome.find_element(By.CSS_SELECTOR, "#quality-size-point-3")
    tip = chrome.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(chrome).move_to_element(point).perform()
    said = tip.text
    for figure in (
        "gguf-q8_0",
        "Size 145 MB (54 %)",
        "Perplexity 25.62 ± 0.44",
        "+0.05 % [−0.03, +0.13]",
        "78.4 tok/s",
    ):
        assert figure in said
    assert chrome.find_element(By.CSS_SELECTOR, "tr.lit").get_attribute("data-name") == "gguf-q8_0"
    ActionChains(chrome).move_to_element_with_offset(point, 50, -40).perform()
    assert not tip.is_displayed()
    chrome.execute_script("document.getElementById('quality-size-point-2').focus()")
    ActionChains(chrome).send_keys(Keys.TAB).perform()
    named = chrome.execute_script("return document.activeElement.getAttribute('aria-label')")
    assert tip.is_displayed() and named.splitlines()[0] == tip.text.splitlines()[0]
    box, width = tip.rect, chrome.execute_script("return innerWidth")
    assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_the_history_says_its_figures_too(page: Open) -> None:
    chrome = page()
    point = chrome.find_elements(By.CSS_SELECTOR, "svg.spark .point[data-name='gguf-q8_0']")[-1]
    chrome.execute_script("arguments[0].focus()", point)
    said = chrome.find_element(By.ID, "tip").text
    for words in (
        "gguf-q8_0 in v3",
        "Decode, tok/s 78.4",
        "Not to be compared with the version before another machine",
    ):
        assert words in said


def test_dark_and_light(page: Open) -> None:
    chrome = page()
    white = ground(chrome)
    assert white == "rgb(255, 255, 255)"
    chrome.find_element(By.ID, "theme").click()
    dark = ground(chrome)
    assert sum(map(int, dark[4:-1].split(","))) < 100
    assert chrome.find_element(By.ID, "theme").get_attribute("aria-label") == "Switch to light"
    page(scheme="dark")
    chrome.execute_script("localStorage.clear()")
    page(scheme="dark")
    assert ground(chrome) == dark, "as the system says"
    chrome.find_element(By.ID, "theme").click()
    assert ground(chrome) == white
    page(scheme="dark")
    assert ground(chrome) == white, "the choice is kept"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_does_not_scroll_sideways(page: Open, width: int, scheme: str) -> None:
    chrome = page(width, scheme)
    chrome.execute_script("for (const item of document.querySelectorAll('details')) item.open = true")
    assert chrome.execute_script("return innerWidth") == width
    assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
    chooser = chrome.find_element(By.CSS_SELECTOR, "#columns fieldset").rect
    assert chooser["x"] >= 0 and chooser["x"] + chooser["width"] <= width
    table = chrome.find_element(By.CSS_SELECTOR, ".compare").rect["width"]
    assert (table > width) == (width == 390), "a phone scrolls the table in its box, a screen shows it whole"


def test_the_downloads_are_the_table(page: Open) -> None:
    chrome = page()
    links = {link.text: link for link in chrome.find_elements(By.CSS_SELECTOR, ".downloads a")}
    assert links["CSV"].get_attribute("download") == "quickstart-v3.csv"
    url = links["CSV"].get_attribute("href") or ""
    table = list(csv.DictReader(io.StringIO(base64.b64decode(url.partition("base64,")[2]).decode())))
    assert [row["variant"] for row in table] == ["baseline", "gptq-int4", "nf4", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m"]
    assert float(table[4]["perplexity"]) == 25.6161 and int(table[4]["size_bytes"]) == 144_811_904
    url = links["Markdown"].get_attribute("href") or ""
    assert "| gguf-q8_0 | gguf |" in base64.b64decode(url.partition("base64,")[2]).decode()


def test_print_has_everything_and_nothing_to_press(page: Open) -> None:
    chrome = page(scheme="dark")
    chrome.find_element(By.ID, "theme").click()
    chrome.find_element(By.ID, "theme").click()
    reader = pdf(chrome)
    text = words(reader)
    assert 2 <= len(reader.pages) <= 20
    for name in NAMES:
        assert name in text
    for number in ("25.62", "144", "78.4", "[−0.03, +0.13]", "killed by signal 9", "damp_percent", "name: quickstart"):
        assert number in text, number
    for button in ("Search", "Columns ▾", "Click a heading", "Hover over"):
        assert button not in text
    assert chrome.execute_script("return document.querySelectorAll('details[open]').length") == 0, "closed again"


def test_without_script_everything_is_there(page: Open) -> None:
    chrome = page(script=False)
    assert rows(chrome) == NAMES
    for item in ("#search", "#theme", "#columns", "#tip"):
        assert not chrome.find_element(By.CSS_SELECTOR, item).is_displayed()
    assert chrome.find_element(By.CSS_SELECTOR, ".downloads a").is_displayed()
    titles = chrome.find_elements(By.CSS_SELECTOR, ".point > title")
    assert any((title.get_attribute("textContent") or "").startswith("gguf-q8_0\nSize: 145 MB") for title in titles)
    assert "Kullback" in (head(chrome, "kl").find_element(By.TAG_NAME, "button").get_attribute("title") or "")
    text = words(pdf(chrome))
    for number in (*NAMES, "damp_percent", "name: quickstart", "Kullback"):
        assert number in text, number


def test_the_page_is_whole_without_a_network(page: Open) -> None:
    chrome = page()
    fetched = chrome.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
