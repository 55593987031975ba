"""The web site, built into a temporary folder and read in a headless browser: links, figures, equations, code, order."""
import functools
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from build_site import KATEX, build_site
from docs_filter import duration, filter_notebook
from notebooks import NBS, ROOT, find, read, rooms

SAMPLE = NBS / "1_model" / "12_rope.ipynb"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run", "--disable-dev-shm-usage"]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


class Links(HTMLParser):
    "What a page points to, and the ids that others may point to."

    def __init__(self):
        super().__init__()
        self.links, self.ids = [], set()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found[name] for name in ("href", "src") if found.get(name)]
        self.ids |= {found["id"]} if found.get("id") else set()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    "The site's folder, and the links that the renderer could not resolve."
    out = tmp_path_factory.mktemp("site") / "site"
    return out, build_site(out)


def parsed(page: Path) -> Links:
    "The links and ids of a page."
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    return links


def test_no_link_is_broken(built: tuple[Path, list[str]]):
    site, wrong = built
    assert wrong == [], "links that the renderer could not resolve"
    pages = {p: parsed(p) for p in site.rglob("*.html")}
    assert len(pages) > len(find()), "a page for every notebook, and the root"
    broken = []
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                broken.append(f"{page.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                broken.append(f"{page.relative_to(site)}: {link} (no such heading)")
    assert broken == []


def test_pages_load_nothing_from_elsewhere(built: tuple[Path, list[str]]):
    loads = re.compile(r"<(?:script|img|iframe)[^>]+src=\"https?:[^\"]+\"|<link[^>]+rel=\"stylesheet\"[^>]+href=\"https?:[^\"]+\"|@import[^;]{0,40}https?:")
    found = {p.name: m[0] for p in built[0].rglob("*") if p.suffix in (".html", ".css") and (m := loads.search(p.read_text(encoding="utf-8")))}
    assert found == {}
    assert not any(KATEX.search(p.read_text(encoding="utf-8")) for p in built[0].rglob("*.html"))


def test_filter_shows_exports_and_hides_the_rest():
    cells = filter_notebook(SAMPLE, {"1_model/12_rope.ipynb": 42})["cells"]
    text = "\n".join(c["source"] if isinstance(c["source"], str) else "".join(c["source"]) for c in cells)
    assert "def apply_rope(" in text, "`#| exports` cells are shown"
    assert "default_exp" not in text and "from fastcore.test import" not in text and "#| export" not in text
    assert "| **CPU time** | 42 seconds |" in text, "the fact box shows the measured time"
    assert cells[0]["cell_type"] == "raw" and "title: \"" in cells[0]["source"] and not re.search(r"^# ", cells[1]["source"] if
        isinstance(cells[1]["source"], str) else "".join(cells[1]["source"]), re.M), "the H1 has become the page's title"


def test_durations_are_coarse():
    assert [duration(s) for s in (0, 7.4, 89, 91, 600)] == ["0 seconds", "7 seconds", "89 seconds", "2 minutes", "10 minutes"]


@pytest.fixture(scope="module")
def address(built: tuple[Path, list[str]]):
    "The site, served on a free port of this machine."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built[0])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium of the system."
    sync_api = pytest.importorskip("playwright.sync_api")
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next((found for n in names if n and (found := shutil.which(n))), None)
    if path is None:
        pytest.skip("no Chromium on this machine; install it (apt install chromium) to test the site in a browser")
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def visit(browser, address: str):
    "Open a page of the site without a network; returns it with what went wrong on the way."
    def opened(path: str, size: dict[str, int] = DESKTOP):
        page, wrong = browser.new_page(viewport=size), []
        page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
        page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 and "favicon" not in r.url else None)
        page.route(lambda url: not url.startswith((address, "data:")), lambda route: (wrong.append(f"outside: {route.request.url}"), route.abort()))
        page.goto(f"{address}/{path}", wait_until="load")
        page.wait_for_function("document.fonts.status === 'loaded'")
        return page, wrong
    return opened


def html(name: str) -> str:
    "The page of a notebook."
    return f"nbs/{Path(name).with_suffix('.html').as_posix()}"


FIGURES = "[...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src.slice(0, 80))"
UNSET = "[...document.querySelectorAll('.math')].filter(m => !m.querySelector('.katex')).map(m => m.textContent)"
ERRORS = "[...document.querySelectorAll('.katex-error')].map(m => m.textContent)"
LEFT = "[...document.querySelectorAll('main p, main li, main td')].map(e => e.innerText).filter(t => /\\$\\$|\\\\[a-z]+\\{/.test(t))"


@pytest.mark.parametrize("name", [nb.name for nb in map(read, find())])
def test_page_in_a_browser(visit, name: str):
    nb = read(NBS / name)
    page, wrong = visit(html(name))
    assert wrong == []
    assert page.evaluate(FIGURES) == [], "figures that are not shown"
    drawn = sum(any(k.startswith("image/") for k in o.get("data", {})) for c in nb.cells for o in c.outputs)
    assert page.locator("main img, main svg").count() >= drawn, "a stored figure is missing"
    equations = re.search(r"^\$\$|[^\\]\$[^$\n]+\$", re.sub(r"`[^`]*`|^```.*?^```", "", nb.markdown, flags=re.M | re.S), re.M)
    assert page.evaluate(UNSET) == [] and page.evaluate(ERRORS) == [], "equations that are not set"
    assert page.evaluate(LEFT) == [], "TeX that a reader sees as text"
    assert not equations or page.locator(".katex").count() > 0
    code = page.locator("main").inner_text()
    hidden = [d.name for c in nb.cells if "exports" in c.directives for d in c.definitions
              if not re.search(rf"(def|class) {d.name}\b", code)]
    assert hidden == [], "exported code that a learner cannot read"
    assert "from fastcore.test import" not in code and "default_exp" not in code
    page.close()


def test_sidebar_follows_the_paper(visit):
    page, _ = visit(html("index.ipynb"))
    links = page.evaluate("[...document.querySelectorAll('#quarto-sidebar a.sidebar-link, #quarto-sidebar .sidebar-item a')].map(a => a.href)")
    seen = list(dict.fromkeys(re.search(r"/nbs/(.*)\.html", x)[1] for x in links if "/nbs/" in x))
    wanted = ["index", *(nb.name.removesuffix(".ipynb") for nb in rooms())]
    wanted += [read(p).name.removesuffix(".ipynb") for p in find() if "solutions" in p.parts]
    assert seen == wanted
    page.close()


@pytest.mark.parametrize("name", ["index.ipynb", "1_model/12_rope.ipynb"])
def test_a_phone_does_not_scroll_sideways(visit, name: str):
    page, _ = visit(html(name), PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.close()


def test_answers_are_folded_until_opened(visit):
    page, _ = visit(html("1_model/12_rope.ipynb"))
    folds = page.locator("main details")
    assert folds.count() >= 3 and page.locator("main details[open]").count() == 0
    answer = folds.filter(has_text="Answer").first
    answer.locator("summary").click()
    assert len(answer.inner_text()) > len("Answer") + 10, "a click shows the answer"
    page.close()


def test_the_root_leads_to_the_front_page(visit):
    page, _ = visit("")
    page.wait_for_url("**/nbs/index.html")
    assert page.title().startswith(read(NBS / "index.ipynb").title.split(",")[0])
    page.close()
