"""The browser that pages are looked at in, where there is one."""

import shutil

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium was found: apt-get install chromium (.ci/run does)"
)
