"""The site builds without a warning, has a page for every diagnostic, and asks for nothing beyond its own files."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import opdgeo
from opdgeo.diagnostics import DIAGNOSTICS
from program import run_python

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.needs("mkdocs")


class Fetched(HTMLParser):
    """What a browser fetches for a page: scripts, styles, pictures, fonts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(values.get("src") or "")
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.found.append(values.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it."""
    folder = tmp_path_factory.mktemp("build")
    done = run_python(ROOT / "docs" / "site" / "generate.py", folder / "docs")
    assert done.returncode == 0, done.stderr
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(folder / "docs" / "mkdocs.yml")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(mkdocs, capture_output=True, text=True, env=environment, timeout=900)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"


def test_every_diagnostic_has_a_page_with_its_words_and_a_picture(site: Path) -> None:
    for name, diagnostic in DIAGNOSTICS.items():
        page = (site / "diagnostics" / f"{name}.html").read_text()
        text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split())
        for said in (diagnostic.title, diagnostic.meaning, diagnostic.caveat, diagnostic.source):
            assert said in text, name
        assert "<svg viewBox" in page, name


def test_the_reference_holds_the_front_door(site: Path) -> None:
    page = (site / "api.html").read_text()
    for name in opdgeo.__all__:
        assert f"<code>opdgeo.{name}</code>" in page or re.search(rf'id="opdgeo[\w.]*\.{name}"', page), name


def test_lists_and_tables_are_those_that_github_shows(site: Path) -> None:
    """The two dialects of Markdown differ in how far what lies in a list is indented."""
    github = MarkdownIt("commonmark").enable("table")
    for page in (ROOT / "docs").rglob("*.md"):
        ours = github.render(page.read_text())
        made = page.relative_to(ROOT / "docs").with_name("index" if page.stem == "README" else page.stem)
        theirs = (site / f"{made}.html").read_text()
        theirs = theirs.partition("<article")[2].partition("</article>")[0]
        for tag in ("li", "ol", "table", "pre", "em", "strong", "h2", "h3"):
            found = [len(re.findall(rf"<{tag}[ >]", text)) for text in (ours, theirs)]
            assert found[0] == found[1], f"{page.name}: {found} <{tag}>"


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    for file in site.rglob("*.html"):
        page = Fetched()
        page.feed(file.read_text())
        assert [target for target in page.found if "//" in target] == [], file.name
    for file in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?https?:|@import", file.read_text()), file.name
