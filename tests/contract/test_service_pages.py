"""The pages for people: whole in themselves, behind the key, and drawn by a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.teacher_process import TeacherProcess

KEY = "page-key-0123456789abcdef"
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def teacher() -> Iterator[TeacherProcess]:
    with TeacherProcess(keys=f"reader {KEY}\nbusy {KEY}-other") as process:
        headers = {"Authorization": f"Bearer {KEY}-other"}
        for n in range(5):
            body = {"sequences": [[n, 2, 3]] * 4, "top_k": 4}
            assert httpx.post(f"{process.url}/v1/targets", json=body, headers=headers).status_code == 200
        yield process


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_needs_nothing_from_anywhere_else(teacher: TeacherProcess, path: str) -> None:
    response = httpx.get(teacher.url + path, auth=("anyone", KEY))
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    outside = [url for url in re.findall(r"https?://[^\s'\"]+", response.text) if "www.w3.org/2000/svg" not in url]
    assert not outside and '<link rel="stylesheet"' not in response.text and "src=" not in response.text
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert httpx.get(teacher.url + path).status_code == 401


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/", ["scripted", ">ready<", ">busy<", "float32", "15 tokens", "45 tokens"]),
        ("/docs", ["/v1/targets", "Send request", "top_k"]),
    ],
)
def test_a_browser_draws_it(teacher: TeacherProcess, tmp_path: Path, path: str, shown: list[str]) -> None:
    url = teacher.url.replace("//", f"//anyone:{KEY}@") + path
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}",
             "--virtual-time-budget=5000", "--dump-dom"]  # fmt: skip
    assert CHROMIUM is not None
    drawn = subprocess.run([CHROMIUM, *flags, url], capture_output=True, text=True, timeout=120, check=True).stdout
    for text in shown:
        assert text in drawn
