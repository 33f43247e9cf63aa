"""What a reader sees in a browser: the run report and the docs, in light, in dark, on a phone."""

import os
import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from sera_plugin.tools.report.compare import compare, write
from sera_plugin.tools.report.page import write_report
from sera_plugin.tools.report.reading import Run, find_run
from tests.report_run import WORDS, make_run
from tests.test_report_page import HOSTILE, hostile_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"
)
ARGUMENTS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "no-proxy-server"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    "window-size=1280,900",
)
DESKTOP, PHONE = (1280, 900), (360, 740)


class Browser:
    """A Chromium that nobody sees."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(url)
        self.wait("document.documentElement.clientWidth > 0")

    def ask(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(f"return {script}", *arguments)

    def find(self, selector: str) -> list[webdriver.remote.webelement.WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def click(self, element: webdriver.remote.webelement.WebElement) -> None:
        """At once where it is, however gently the page would scroll there."""
        self.ask("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()

    def wait(self, script: str) -> None:
        WebDriverWait(self.driver, 10).until(lambda _: self.ask(script), script)

    def is_fine(self, where: object = "") -> None:
        """Nothing is wider than the window, and the console has no errors or refused requests."""
        page = "document.documentElement"
        assert self.ask(f"{page}.scrollWidth <= {page}.clientWidth"), where
        assert self.driver.get_log("browser") == [], where

    def contrast(self, selector: str) -> float:
        """Of the first such element's text against what is behind it, as WCAG counts it."""
        return self.ask(
            """(() => {
              const numbers = text => text.match(/[\\d.]+/g).map(Number);
              const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(
                c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
              ).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
              let one = document.querySelector(arguments[0]);
              const colour = one.closest("svg") ? "fill" : "color";
              const ink = light(numbers(getComputedStyle(one)[colour]));
              while (one && /rgba\\(.*, 0\\)/.test(getComputedStyle(one).backgroundColor))
                one = one.parentElement;
              const page = light(numbers(getComputedStyle(one ?? document.body).backgroundColor));
              return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
            })()""",
            selector,
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as environment:
        for name in os.environ:
            if name.lower().endswith("_proxy"):
                environment.delenv(name)
        # With the path of the driver, so that Selenium looks for none and downloads none.
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        yield Browser(driver)
        driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """A run's report, one of a run with hostile texts, and a comparison, as read from disk."""
    directory = tmp_path_factory.mktemp("report")
    scores = {"score_chosen": list(range(60)), "score_rejected": [20.0] * 60}
    scores["source"] = ["web", "book", "forum"] * 20
    run, comparison = directory / "my-run", directory / "comparison.html"
    make_run(run, pairs=60, iterations=4, scores=scores)
    hostile = hostile_run(directory / "<img src=x onerror=alert(1)>")
    write(compare([Run(find_run(path)) for path in (run, hostile)]), comparison)
    make_run(directory / "long", words=["</s>", *("a" * 900 + word for word in WORDS[1:])])
    paths = {
        "report": write_report(run),
        "long": write_report(directory / "long"),
        "hostile": write_report(hostile),
        "comparison": comparison,
    }
    return {name: path.as_uri() for name, path in paths.items()}


def test_the_search_opens_the_folds_in_which_it_finds_something(browser, pages):
    browser.open(pages["long"])
    box, opened = browser.find("#search")[0], "document.querySelectorAll('.more[open]').length"
    assert browser.find(".more")
    assert browser.ask(opened) == 0
    box.send_keys("w8")
    browser.wait(f"{opened} > 0")
    assert {"w8" in one.text for one in browser.find("article:not([hidden]) .more[open]")} == {True}
    box.clear()
    box.send_keys("no such word")
    browser.wait(f"{opened} == 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["report", "hostile", "comparison"])
def test_a_page_reads_well_and_its_texts_stay_texts(browser, pages, name, scheme, size):
    browser.open(pages[name], size, scheme)
    with pytest.raises(NoAlertPresentException):
        _ = browser.driver.switch_to.alert
    browser.is_fine()
    for selector in ("h1", ".lead", "nav a", "td", ".chart svg text", ".facts dt"):
        if name != "comparison" or selector in ("h1", "td", ".facts dt"):
            assert browser.contrast(selector) >= 4.5, selector
    for link in browser.find("nav a"):
        browser.ask("window.scrollTo(0, 0)")
        browser.click(link)
        browser.wait(
            "(({top, bottom}) => top < innerHeight && bottom > 0)"
            "(document.querySelector(':target').getBoundingClientRect())"
        )
    for number, details in enumerate(browser.find("details:not([open]) > summary")):
        browser.click(details)
        browser.is_fine(number)
    assert browser.find("img, iframe, object, b, article script") == []
    if name == "comparison":
        assert "Settings that differ" in browser.find("main")[0].text
    else:
        assert len(browser.find("nav a")) > 8
        assert browser.find(".pair pre")[0].is_displayed()
        assert (HOSTILE[1] in browser.find("#examples")[0].text) == (name == "hostile")
    browser.is_fine()


def test_the_search_finds_examples(browser, pages):
    browser.open(pages["report"], PHONE)
    box, shown = browser.find("#search")[0], browser.find("article.pair")
    # Row r is made of the word w<1 + r % 30>.
    box.send_keys("KEPT w8")
    browser.wait("document.getElementById('found').textContent != ''")
    left = [one for one in shown if one.is_displayed()]
    assert 0 < len(left) < len(shown)
    assert all("w8" in one.text and "kept" in one.text for one in left)
    counted = len([one for one in shown if not one.get_property("hidden")])
    said = browser.ask("document.getElementById('found').textContent")
    assert said.startswith(f"{counted} of {len(shown)}")
    box.clear()
    box.send_keys("no such word")
    assert not any(one.is_displayed() for one in shown)
    browser.is_fine()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_page_of_the_docs_reads_well(browser, site, scheme, size):
    for page in sorted(set(site.glob("*.html")) - {site / "search.html"}):
        browser.open(page.as_uri(), size, scheme)
        assert browser.contrast("article p") >= 4.5, page.name
        browser.is_fine(page.name)
