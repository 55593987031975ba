"""What every test may rely on: the working tree is importable, also in child processes, and no bar or window appears."""
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tools", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

os.environ.setdefault("LLAMA2_QUIET", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)


@pytest.fixture(scope="session")
def root() -> Path:
    "The project's root."
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    "The folder of data made by others; the test skips where it is not named."
    if not os.environ.get("LLAMA2_REAL_DATA"):
        pytest.skip("set LLAMA2_REAL_DATA to the folder of real data to run this")
    return Path(os.environ["LLAMA2_REAL_DATA"])


def pytest_configure(config):
    "Some tests send Ctrl-C to child processes; in a background shell these would inherit that it is ignored."
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread():
    "Models this small are faster on one thread, far faster on a busy machine."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter):
    'Prints what tests want to be read after all: `record_property("summary", line)`.'
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(value)
