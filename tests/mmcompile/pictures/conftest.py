"""A headless browser, and pages opened in it."""

import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Opened:
    """A page in a tab of its own, what it asked for, and what the browser complained about."""

    def __init__(self, browser, path):
        self.asked, self.complaints = [], []
        self.tab = browser.new_page()
        self.tab.set_default_timeout(10_000)
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(path.as_uri())

    def column(self, index, table=0):
        """The texts of a column, as they stand now."""
        return self.tab.locator("table.sortable").nth(table).locator("tbody tr").evaluate_all(
            "(rows, index) => rows.map((row) => row.cells[index].textContent)", index
        )  # fmt: skip

    def head(self, name, table=0):
        """The head of a column."""
        return self.tab.locator("table.sortable").nth(table).get_by_role("columnheader", name=name, exact=True)

    def pictures(self):
        """Width and height of each picture as they were loaded, 0 where they were not, and its alternative text."""
        return self.tab.locator("img").evaluate_all(
            "(all) => all.map((one) => [one.naturalWidth, one.naturalHeight, one.alt])"
        )


@pytest.fixture(scope="session")
def chromium():
    """The browser itself; skips where there is none."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens a file; its tab is closed after the test."""
    pages = []

    def open_file(path):
        pages.append(Opened(chromium, path))
        return pages[-1]

    yield open_file
    for page in pages:
        page.tab.close()
