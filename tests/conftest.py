"""Every test runs seeded, on one thread and off the network."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch):
    """Memory that torch hands out uninitialised holds NaN, so that reading it shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def browser():
    """Chromium, headless; without it these tests skip, and fail in CI. Of a module: playwright's own loop would break
    the asyncio of others."""
    without = pytest.fail if os.environ.get("CI") else pytest.skip
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without("no playwright: pip install playwright")
    with sync_playwright() as playwright:
        found = [path for path in map(shutil.which, BROWSERS) if path]
        found += [path for path in [playwright.chromium.executable_path] if Path(path).exists()]
        if not found:
            without("no Chromium: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield browser
        browser.close()
