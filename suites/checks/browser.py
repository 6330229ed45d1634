"""The system's Chromium for checks of pages: without a network, and what it complains of is kept."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Opened:
    """A page that was loaded."""

    page: Any
    """Playwright's."""
    problems: list[str] = field(default_factory=list)
    """Errors and warnings of its console, exceptions of its scripts, and every request but that for the file itself."""

    def axe(self) -> list[str]:
        """What axe-core finds serious or critical: its rule, and the elements."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        loud = [x for x in found if x["impact"] in ("serious", "critical")]
        return [f"{x['id']}: {[node['html'][:200] for node in x['nodes'][:3]]}" for x in loud]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser, for one module: while Playwright's event loop runs, no other check can start its own."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no Playwright: pip install -e '.[dev]'")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """``browse(html, fragment, **options)`` opens a page as a file; options are those of Playwright's
    ``new_context``: ``viewport``, ``color_scheme``, ``java_script_enabled``."""
    contexts = []

    def opened(html: str, fragment: str = "", **options: Any) -> Opened:
        file = tmp_path / f"page{len(contexts)}.html"
        file.write_text(html, encoding="utf-8", errors="replace")
        context = chromium.new_context(**options)
        contexts.append(context)
        found = Opened(context.new_page())

        def ask(route: Any) -> None:
            if route.request.url.partition("#")[0] == file.as_uri():
                route.continue_()
            else:
                found.problems.append(f"request: {route.request.url[:200]}")
                route.abort()

        context.route("**/*", ask)
        found.page.on("pageerror", lambda error: found.problems.append(f"exception: {error}"))
        found.page.on("console", lambda m: found.problems.append(m.text) if m.type in ("error", "warning") else None)
        found.page.goto(file.as_uri() + fragment)
        return found

    yield opened
    for context in contexts:
        context.close()
