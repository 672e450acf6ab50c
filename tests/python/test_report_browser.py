"""The report in a real browser: no error, no request, tables that sort. Screenshots go to out/report."""

import shutil
from pathlib import Path

import pytest
from browser import NAMES, Browser, find_browser

from libqat import html_report

pytest_plugins = ["reporting"]
pytestmark = pytest.mark.skipif(
    find_browser() is None, reason=f"no browser on PATH: looked for {', '.join(NAMES)}"
)
SCREENSHOTS = Path(__file__).resolve().parents[2] / "out" / "report"
TABLE = "document.querySelector('table[data-sortable]')"


@pytest.fixture(scope="module")
def opened(report_data, tmp_path_factory):
    """(a browser, the address of a report)"""
    folder = tmp_path_factory.mktemp("browser")
    path = html_report.save_page(html_report.render(report_data), folder / "report.html")
    browser = Browser(find_browser(), folder / "profile")
    yield browser, path.as_uri()
    browser.close()
    shutil.rmtree(folder / "profile", ignore_errors=True)


def column(browser: Browser, index: int) -> list[str]:
    """A column of the sortable table, from the top."""
    return browser.evaluate(f"[...{TABLE}.tBodies[0].rows].map((row) => row.cells[{index}].textContent)")


def click(browser: Browser, index: int) -> str:
    """Clicks a head; returns the order that it announces."""
    head = f"{TABLE}.tHead.rows[0].cells[{index}]"
    return browser.evaluate(f"{head}.querySelector('button').click(); {head}.getAttribute('aria-sort')")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("name", "width"), [("desktop", 1280), ("phone", 390)])
def test_opens_without_errors_and_without_the_network(opened, name, width, dark):
    browser, address = opened
    browser.open(address, width, 900, dark, mobile=width < 600)
    requests = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert requests == [address]
    said = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert not [event for event in browser.events if event["method"] in said]
    assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 384) is dark
    browser.screenshot(SCREENSHOTS / f"{name}-{'dark' if dark else 'light'}.png")


ATTEMPTS = {
    "script-src-elem": "const s = document.createElement('script'); s.textContent = 'window.ran = true';"
    "document.body.append(s)",
    "connect-src": "fetch('https://example.invalid/').catch(() => 0)",
    "img-src": "new Image().src = 'https://example.invalid/x.png'",
}


@pytest.mark.parametrize("directive", ATTEMPTS)
def test_the_policy_stops_whatever_a_name_might_smuggle_in(opened, directive):
    browser, address = opened
    browser.open(address)
    stopped = browser.evaluate(
        "new Promise((done) => { document.addEventListener('securitypolicyviolation',"
        f"(event) => done(event.effectiveDirective)); {ATTEMPTS[directive]}; }})"
    )
    assert stopped == directive
    assert browser.evaluate("window.ran") is None


def test_tables_sort(opened):
    browser, address = opened
    browser.open(address)
    names, sizes = column(browser, 0), column(browser, 5)
    assert browser.evaluate(f"getComputedStyle({TABLE}.tHead.rows[0].cells[0]).position") == "sticky"

    assert click(browser, 0) == "ascending"
    assert column(browser, 0) == sorted(names)
    assert click(browser, 0) == "descending"
    assert column(browser, 0) == sorted(names)[::-1]

    assert click(browser, 5) == "descending"  # numbers, with separators in the text
    numbers = [int(size.replace(",", "")) for size in column(browser, 5)]
    assert numbers == sorted((int(size.replace(",", "")) for size in sizes), reverse=True)

    assert click(browser, 6) == "descending"  # what has no value stays last, in either order
    assert column(browser, 6)[-1] == "–" != column(browser, 6)[0]
    assert click(browser, 6) == "ascending"
    assert column(browser, 6)[-1] == "–" != column(browser, 6)[0]
    rising = [float(text[:-1]) for text in column(browser, 6) if text != "–"]
    assert rising == sorted(rising)


def test_it_prints(opened, tmp_path):
    browser, address = opened
    browser.open(address, dark=True)
    hidden = "document.querySelector('.tall').scrollHeight - document.querySelector('.tall').clientHeight"
    assert browser.evaluate(hidden) > 20
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes()[:5] == b"%PDF-"
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, background[4:-1].split(","))) > 700  # dark screens print on white
    assert browser.evaluate(hidden) <= 0  # all rows of a table that scrolls on the screen
