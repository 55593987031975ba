"""Build the web site that `_quarto.yml` describes, with Quarto where it is installed and with smalldocs otherwise.

Use: python tools/build_site.py [OUTPUT]      OUTPUT: default _docs
The notebooks pass tools/docs_filter.py into a temporary folder, and the renderer works there. Pages need no network:
equations are set by the KaTeX in tools/katex/, and themes load no fonts from elsewhere.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import docs_filter
from notebooks import ROOT, find

KATEX = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[^/\"']+/dist")
IMPORTED_FONT = re.compile(r"""@import\s*(url\(\s*)?(?P<q>["']?)https://fonts\.googleapis\.com[^"')]*(?P=q)\s*\)?\s*;?""")
FRONT = "nbs/index.html"


def stage(folder: Path, root: Path = ROOT) -> None:
    "Write the project as the renderer shall see it."
    times = docs_filter.seconds(root / "results" / "times.json")
    shutil.copy(root / "_quarto.yml", folder)
    for path in find(root):
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(docs_filter.filter_notebook(path, times), ensure_ascii=False), encoding="utf-8")
    for extra in ("nbs/images", "data_samples/README.md", "tools/site.css", "tools/katex", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md"):
        if (root / extra).is_dir():
            shutil.copytree(root / extra, folder / extra)
        elif (root / extra).exists():
            (folder / extra).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / extra, folder / extra)


def render(folder: Path) -> list[str]:
    "Render the staged project in place; what is wrong with it (links that lead nowhere)."
    if shutil.which("quarto"):
        done = subprocess.run(["quarto", "render", str(folder), "--no-execute"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"quarto stopped:\n{done.stdout}{done.stderr}")
        return [line for line in done.stderr.splitlines() if "Unable to resolve link" in line]
    from smalldocs.site import build
    site = build(folder, quiet=True)
    return [f"{page}: {target}" for page, target in site.broken]


def finish(site: Path, root: Path = ROOT) -> None:
    "Make the pages independent of the network, and lead the site's root to the front page."
    shutil.copytree(root / "tools" / "katex", site / "site_libs" / "katex")
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        local = os.path.relpath(site / "site_libs" / "katex", page.parent).replace(os.sep, "/")
        page.write_text(KATEX.sub(local, text), encoding="utf-8")
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        if IMPORTED_FONT.search(text):
            sheet.write_text(IMPORTED_FONT.sub("", text), encoding="utf-8")
    if not (site / "index.html").exists():
        (site / "index.html").write_text(
            f'<!DOCTYPE html>\n<meta charset="utf-8">\n<title>llama2_nbdev</title>\n'
            f'<meta http-equiv="refresh" content="0; url={FRONT}">\n<a href="{FRONT}">llama2_nbdev</a>\n', encoding="utf-8")


def build_site(out: Path, root: Path = ROOT) -> list[str]:
    "Build the site into `out`, which is replaced; what is wrong with it."
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp).resolve() / "site"
        folder.mkdir()
        stage(folder, root)
        wrong = render(folder)
        finish(folder / "_docs", root)
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(folder / "_docs", out)
    return wrong


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_docs"
    found = build_site(target)
    for line in found:
        print(f"broken link in {line}", file=sys.stderr)
    print(f"The site is in {os.path.relpath(target)}; open {os.path.relpath(target / FRONT)} or serve the folder:")
    print(f"  python -m http.server --directory {os.path.relpath(target)}")
    sys.exit(1 if found else 0)
