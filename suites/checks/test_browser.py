"""The checks' browser tells what a page does wrong."""

import pytest

from suites.checks.browser import browse, chromium  # noqa: F401

PAGE = "<!doctype html><html lang=en><title>a page</title><main><h1>A page</h1>{}</main></html>"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<p>quiet</p>", []),
        ("<script>console.error('loud')</script>", ["loud"]),
        ("<script>throw new Error('thrown')</script>", ["exception: thrown"]),
        ("<script>fetch('https://example.org/x').catch(() => 0)</script>", ["request: https://example.org/x"]),
        ("<img alt='' src='file:///etc/hostname'>", ["request: file:///etc/hostname"]),
    ],
)
def test_what_a_page_does_wrong_is_told(browse, body, said):  # noqa: F811
    found = browse(PAGE.format(body))
    found.page.wait_for_timeout(50)
    assert [x for x in found.problems if "net::ERR_FAILED" not in x] == said


def test_axe_finds_what_is_serious(browse):  # noqa: F811
    assert browse(PAGE.format("<p>quiet</p>")).axe() == []
    [found] = browse(PAGE.format("<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>")).axe()
    assert found.startswith("image-alt")
