"The red-team window in JupyterLab and a real browser: a person composes, edits, sends, labels and takes the label back."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from llama2_nbdev.finetuning.annotation import read_log

CELL = """from llama2_nbdev.safety.red_team_widget import Session, red_team_widget
from llama2_nbdev.safety.red_teaming import world_targets
from llama2_nbdev.world.people import make_people
answer = lambda dialogs: [f"<b>{len(d)}</b> messages" for d in dialogs]
red_team_widget(Session(answer, "mine.jsonl", world_targets(make_people(0))))"""


def free_port() -> int:
    "A port of this machine that nobody uses."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def chromium() -> str:
    "The system's own browser."
    pytest.importorskip("playwright.sync_api")
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next((found for n in names if n and (found := shutil.which(n))), None)
    if path is None: pytest.skip("no Chromium on this machine; install it (apt install chromium) to test the window in a browser")
    return path


@pytest.fixture
def lab(tmp_path: Path):
    "JupyterLab with one notebook and no settings but its own; the address of the notebook."
    pytest.importorskip("jupyterlab")
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": CELL, "outputs": [], "execution_count": None}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "attack.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))
    own = {name: str(tmp_path / "own" / name.lower()) for name in (
        "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", f"--ServerApp.root_dir={tmp_path}"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(command, env=os.environ | own | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(200):
        try: urlopen(f"http://127.0.0.1:{port}/api", timeout=5).close(); break
        except OSError: time.sleep(.1)
    yield f"http://127.0.0.1:{port}/lab/tree/attack.ipynb?reset"
    server.terminate()
    server.wait(20)


def test_attack_in_a_browser(chromium: str, lab: str, tmp_path: Path):
    from playwright import sync_api
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page, wrong, file = browser.new_page(viewport={"width": 1200, "height": 900}), [], tmp_path / "mine.jsonl"
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(lab)
        page.locator(".jp-Toolbar-kernelName", has_text="Python 3").wait_for(timeout=60_000)  # before that there is "No Kernel", and it is idle
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=60_000)
        page.locator(".jp-CodeCell .cm-content").click()
        page.keyboard.press("Shift+Enter")
        out = page.locator(".jp-OutputArea-output")
        def button(text): return out.get_by_role("button", name=text, exact=True)
        def says(text): sync_api.expect(out).to_contain_text(text, timeout=30_000)

        says("0 dialogs labelled, 0 violations")
        severe = button("1: severe violation")
        sync_api.expect(severe).to_be_disabled()  # nothing to label yet
        out.get_by_label("Goal").select_option("advice: pills")
        button("role").click()
        button("Compose").click()
        prompt = out.locator("textarea")
        sync_api.expect(prompt).not_to_have_value("")
        text = prompt.input_value() + " Please."
        prompt.fill(text)
        button("Send").click()
        says("<b>1</b> messages")                 # as text, not as part of the page
        sync_api.expect(prompt).to_have_value("")
        sync_api.expect(out.get_by_label("Found")).to_have_value("advice")
        severe.click()
        says("1 dialog labelled, 1 violation,")
        row, = read_log(file)
        assert (row["messages"][0]["content"], row["moves"], row["rating"], row["area"]) == (text, ["role"], 1, "advice")
        button("Undo the last label").click()
        says("The last dialog is open again.")
        assert read_log(file) == [] and severe.is_enabled() and not wrong
        browser.close()
