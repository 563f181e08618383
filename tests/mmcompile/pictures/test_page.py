"""The page in a real browser: it sorts, it shows its pictures, it asks nothing of any network, and it can be read."""

import io
import re
from html.parser import HTMLParser

import pytest
from playwright.sync_api import Error, expect

from mmcompile.pictures.page import Page, Picture, Section, Table, render

HOSTILE = '<script>document.title = "broken"</script> & "quoted" \'too\''
ROWS = (
    (0, 10, "grid", 0.02),
    (0, 9, "a_shape", None),
    (1, 2, HOSTILE, 0.1),
    (1, 0, "grid", float("nan")),
    (2, 1, "b", 1e-5),
)


def png(width, height):
    from matplotlib.image import imsave
    from numpy import zeros

    target = io.BytesIO()
    imsave(target, zeros((height, width, 3)), format="png")
    return target.getvalue()


@pytest.fixture(scope="module")
def source():
    pictures = [Picture(png(64, 32), 32, 16, f"first {HOSTILE}", "one"), Picture(png(8, 8), 8, 8, "second", HOSTILE)]
    heads = Table("a row a head", ("layer", "head", "pattern", "density"), ROWS)
    sections = [Section("Pictures", ["what is shown"], pictures), Section("Heads", table=heads), Section(HOSTILE)]
    return render(Page(HOSTILE, {"model": HOSTILE}, sections, f"python {HOSTILE}", "abc", {"torch": "2.11"}))


@pytest.fixture
def opened(open_page, source, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(source)
    return open_page(path)


def test_a_click_sorts_numbers_as_numbers_and_a_second_one_turns_them_round(opened):
    assert opened.column(1) == ["10", "9", "2", "0", "1"]
    opened.head("head").get_by_role("button").click()
    assert opened.column(1) == ["0", "1", "2", "9", "10"]
    expect(opened.head("head")).to_have_attribute("aria-sort", "ascending")
    opened.head("head").get_by_role("button").click()
    assert opened.column(1) == ["10", "9", "2", "1", "0"]
    expect(opened.head("head")).to_have_attribute("aria-sort", "descending")


def test_what_is_not_known_stays_last_either_way(opened):
    button = opened.head("density").get_by_role("button")
    button.click()
    assert opened.column(3) == ["1e-05", "0.02", "0.1", "", ""]
    button.click()
    assert opened.column(3) == ["0.1", "0.02", "1e-05", "", ""]


def test_words_sort_as_words_and_rows_stay_whole(opened):
    before = set(zip(*map(opened.column, range(4)), strict=True))
    opened.head("pattern").get_by_role("button").click()
    assert opened.column(2)[1:] == ["a_shape", "b", "grid", "grid"]
    assert opened.column(1)[3:] == ["10", "0"]  # equals keep their order
    assert set(zip(*map(opened.column, range(4)), strict=True)) == before
    expect(opened.head("head")).not_to_have_attribute("aria-sort", re.compile("."))


def test_the_keyboard_sorts_too(opened):
    opened.head("layer").get_by_role("button").focus()
    for key, first in (("Enter", "0"), ("Space", "2")):
        opened.tab.keyboard.press(key)
        assert opened.column(0)[0] == first
    opened.tab.keyboard.press("Tab")
    assert opened.tab.evaluate("document.activeElement.textContent") == "head"


def test_every_picture_loads_and_says_what_it_shows(opened):
    assert opened.pictures() == [[64, 32, f"first {HOSTILE}"], [8, 8, "second"]]


def test_no_request_leaves_the_file(opened):
    for name in ("layer", "density"):
        opened.head(name).get_by_role("button").click()
    opened.tab.wait_for_load_state("networkidle")
    assert opened.asked == [opened.tab.url]
    assert opened.tab.url.startswith("file://")
    loaded = opened.tab.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(url.startswith("data:image/png") for url in loaded)
    assert opened.complaints == []


@pytest.mark.parametrize(
    "attempt",
    [
        "fetch('https://127.0.0.1:9/')",
        "new Promise((load, fail) => Object.assign(new Image(), { onload: load, onerror: fail, src: 'other.png' }))",
        "import('data:text/javascript,0')",
    ],
    ids=["fetch", "image", "script"],
)
def test_the_policy_lets_nothing_in_or_out(opened, attempt):
    opened.tab.wait_for_load_state("networkidle")
    before = len(opened.asked)
    with pytest.raises(Error):
        opened.tab.evaluate(attempt)
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
    assert not any(url.startswith("http") for url in opened.asked[before:])


def test_text_is_text_whatever_it_holds(opened):
    assert opened.tab.title() == HOSTILE
    assert opened.tab.get_by_role("heading", level=1).text_content() == HOSTILE
    assert opened.tab.locator("img").first.get_attribute("alt") == f"first {HOSTILE}"
    assert opened.tab.locator("dd").text_content() == HOSTILE
    assert HOSTILE in opened.column(2)


class Tags(HTMLParser):
    """The start tags of a source, in order."""

    def __init__(self, source):
        super().__init__()
        self.found = []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_browser_has_nothing_to_repair_in_it(opened, source):
    parsed = opened.tab.content()
    assert Tags(parsed).found == Tags(source).found
    ids = [attributes["id"] for _, attributes in Tags(source).found if "id" in attributes]
    named = [a["href"][1:] for _, a in Tags(source).found if "href" in a]
    assert len(ids) == len(set(ids)) and set(named) <= set(ids)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("part", ["h1", "dd", "dt", "a", "td", "th button", "caption", "footer p"])
def test_it_can_be_read_in_light_and_dark(opened, scheme, part):
    opened.tab.emulate_media(color_scheme=scheme)
    ink, ground = opened.tab.locator(part).first.evaluate(
        """(one) => {
            let ground = one;
            while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
            return [getComputedStyle(one).color, getComputedStyle(ground).backgroundColor];
        }"""
    )
    assert contrast(ink, ground) >= 4.5  # WCAG 2, level AA
    assert (luminance(ground) < 0.1) == (scheme == "dark")


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, bright = sorted(map(luminance, (one, other)))
    return (bright + 0.05) / (dark + 0.05)


def test_a_narrow_screen_scrolls_the_table_alone(opened):
    opened.tab.set_viewport_size({"width": 360, "height": 700})
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_pictures_are_within_the_page(source):
    data = re.findall(r'src="([^"]*)"', source)
    assert len(data) == 2 and all(one.startswith("data:image/png;base64,") for one in data)
    assert not re.findall(r'(?:href|src)="(?!#|data:)', source)
