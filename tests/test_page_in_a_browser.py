"""The report page as a reader meets it: in a real Chromium, wide and narrow, light and dark.

Skipped where there is no browser, or no playwright to drive one.
"""

import os
import shutil
from pathlib import Path

import pytest
from toy_runs import write_run

from amt.evaluation import runs
from amt.report.document import page

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright, which drives a browser, is missing"
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCHEMES = ("light", "dark")
WIDTHS = (390, 1440)
LEAST_CONTRAST = 4.5  # of text, by WCAG AA

# Every visible piece of text: [the text, its contrast with what is painted below it].
CONTRASTS = """() => {
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (top, below) => [0, 1, 2].map((k) => top[3] * top[k] + (1 - top[3]) * below[k]);
  const luminance = (colour) => {
    const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    return over(parse(getComputedStyle(element).backgroundColor), ground(element.parentElement));
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest("script, svg title")) continue;
    const style = getComputedStyle(element);
    const below = ground(element);
    const above = over(parse(element.closest("svg") ? style.fill : style.color), below);
    const [low, high] = [luminance(above), luminance(below)].sort((a, b) => a - b);
    found.push([text, (high + 0.05) / (low + 0.05)]);
  }
  return found;
}"""

# Texts of drawings that leave their drawing, or that lie on one another.
COLLISIONS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg.panel, svg.heat")) {
    if (!svg.checkVisibility()) continue;
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")];
    const boxes = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([text, box], k) => {
      const across = Math.max(frame.left - box.left, box.right - frame.right);
      if (Math.max(across, frame.top - box.top, box.bottom - frame.bottom) > 1)
        found.push(`${text} leaves its drawing`);
      for (const [other, that] of boxes.slice(0, k)) {
        const wide = Math.min(box.right, that.right) - Math.max(box.left, that.left);
        const high = Math.min(box.bottom, that.bottom) - Math.max(box.top, that.top);
        if (wide > 1 && high > 3) found.push(`${text} lies on ${other}`);
      }
    });
  }
  return found;
}"""

OVERFLOW = "() => document.documentElement.scrollWidth - window.innerWidth"
FIRST_COLUMN = "table => [...table.tBodies[0].rows].map(row => row.cells[0].textContent)"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, BROWSERS)), None) or driver.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no Chromium is installed")
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        launched = driver.chromium.launch(executable_path=found, args=["--no-sandbox"] if root else [])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A page on five runs with everything that makes a page hard to lay out."""
    folder = tmp_path_factory.mktemp("runs")
    evil = "<img src=x onerror=broken=1>"
    long_name = "a_domain_whose_name_is_as_long_as_somebody_could_wish_for"
    how = {"domains": ("mini_signs", "digits", long_name, "<script>broken=1</script>"), "samples": 0}
    written = (
        write_run(folder / "pool", suspect=["digits"], **how),
        write_run(folder / "uniform", strength=0.3, command=evil + " word" * 60, **how),
        write_run(folder / "published", strength=0.8, stamp=f"labelled test episodes {evil}", **how),
        write_run(folder / "pretrained", strength=0.05, adapters=(), seed=1, **how),
        write_run(
            folder / "seen", episodes=8, samples=3, classes=(evil, *"bcde"), finished=False, adapters=(8,)
        ),
    )
    path = folder / "report.html"
    path.write_text(page([runs.load(each) for each in written]), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, report):
    """`opened(width, scheme)` shows the page; what it complained of and asked for is checked at the end."""
    complaints, requests, pages = [], [], []

    def show(width: int, scheme: str, **options):
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(report.as_uri())
        pages.append(tab)
        return tab

    yield show
    for tab in pages:
        assert tab.evaluate("window.broken") is None, "markup from a file was run"
        tab.close()
    assert not complaints
    assert not [url for url in requests if url != report.as_uri() and not url.startswith("data:")]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_everything_fits_and_can_be_read(opened, width, scheme):
    """With every table unfolded: nothing overflows, texts of drawings keep clear of each other, and every
    text stands out from what is below it."""
    tab = opened(width, scheme)
    assert tab.evaluate(OVERFLOW) <= 0
    assert tab.evaluate(COLLISIONS) == []
    tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert tab.evaluate(OVERFLOW) <= 0
    faint = {
        text: round(contrast, 2) for text, contrast in tab.evaluate(CONTRASTS) if contrast < LEAST_CONTRAST
    }
    assert faint == {}


def test_light_and_dark_are_different_and_paper_is_white(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (opened(1440, scheme) for scheme in SCHEMES)
    assert light.evaluate(ground) == "rgb(255, 255, 255)" != dark.evaluate(ground)
    dark.emulate_media(media="print", color_scheme="dark")
    assert dark.evaluate(ground) == "rgb(255, 255, 255)"


def test_it_prints(opened):
    """On paper a table is as wide as it needs to be, the links within the page are gone; a PDF comes out."""
    tab = opened(1032, "light")  # A4 on its side, less its margins
    tab.emulate_media(media="print")
    assert tab.evaluate("document.querySelector('nav').checkVisibility()") is False
    assert tab.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    assert tab.evaluate(OVERFLOW) <= 0
    assert tab.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_tables_sort_by_mouse_and_by_keyboard(opened):
    tab = opened(1440, "light")
    table = tab.locator("table.accuracies")
    clean = "table => [...table.tBodies[0].rows].map(row => Number(row.cells[2].dataset.value))"
    before, averages = table.evaluate(clean), "table => table.tBodies[1].rows.length"
    heading, count = table.locator("thead th").nth(2), table.evaluate(averages)
    assert heading.get_attribute("aria-sort") == "none"
    heading.get_by_role("button").click()
    assert (
        heading.get_attribute("aria-sort") == "ascending"
        and table.evaluate(clean) == sorted(before) != before
    )
    heading.get_by_role("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert table.evaluate(clean) == sorted(before, reverse=True)
    table.get_by_role("button", name="domain").press("Space")
    names = table.evaluate(FIRST_COLUMN)
    assert names == sorted(names, key=str.lower) and len(set(names)) > 1
    assert [h.get_attribute("aria-sort") for h in table.locator("thead th").all()].count("ascending") == 1
    assert heading.get_attribute("aria-sort") == "none"
    assert table.evaluate(averages) == count  # they stay below


def test_what_was_not_measured_stays_at_the_end(opened):
    tab = opened(1440, "light")
    table = tab.locator("table", has=tab.get_by_role("button", name="peak memory"))
    for _ in range(2):
        table.get_by_role("button", name="peak memory").click()
        assert table.evaluate(FIRST_COLUMN)[-1] == "seen"


def test_the_numbers_of_a_figure_unfold(opened):
    tab = opened(390, "dark")
    first = tab.locator("details").first
    assert not first.locator("table").is_visible()
    first.locator("summary").press("Enter")
    assert first.locator("table").is_visible()


def test_every_section_can_be_reached_and_every_drawing_has_a_name(opened):
    tab = opened(1440, "light")
    for link in tab.locator("nav a").all():
        assert tab.locator(link.get_attribute("href")).count() == 1
    drawings = tab.locator("svg[role=img]").all()
    assert len(drawings) > 5
    assert all(drawing.get_attribute("aria-label") for drawing in drawings)
    assert tab.locator("img:not([alt])").count() == 0


def test_nothing_is_lost_without_scripts(opened):
    tab = opened(1440, "light", java_script_enabled=False)
    assert tab.locator("table.accuracies tbody tr").count() > 20
    assert tab.locator("svg.panel").count() > 5
