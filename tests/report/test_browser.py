"""The pages in a real browser, at the widths of a desk and a telephone, light and dark. Skipped where there is no
Chromium (Debian: apt-get install chromium)."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from grpo.plan.findings import Finding
from grpo.plan.probe import Probe
from grpo.plan.probe_text import page as page_of_probe
from grpo.report.compare_page import write_comparison
from grpo.report.curves import curves_svg
from grpo.report.page import page
from grpo.run.read import headline, read_run
from tests.plan.test_probe import HEALTHY
from tests.report.made_runs import HOSTILE, make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]

# What sticks out of the window, unless it lies in a box that scrolls; SVG text outside of its picture; the least
# contrast of text with what is behind it (WCAG's ratio).
LOOK = """(() => {
  const right = n => n.getBoundingClientRect().right;
  const shown = [...document.querySelectorAll('body *')].filter(n => n.getClientRects().length);
  const sticks = shown.filter(n => right(n) > innerWidth + 1 && !n.closest('svg') && !n.closest('.wide table'));
  const cut = [...document.querySelectorAll('svg text')].filter(n => right(n) > right(n.closest('svg')) + 1);
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(x => x / 255).map(
      x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = n => { for (; n; n = n.parentElement) { const c = getComputedStyle(n).backgroundColor;
      if (!/, 0\\)|transparent/.test(c)) return light(c); } return 1; };
  const texts = shown.filter(n => !n.closest('.same') && n.tagName != 'style' && [...n.childNodes].some(
      c => c.nodeType == 3 && c.data.trim()));
  const ratio = n => { const a = light(getComputedStyle(n)[n.closest('svg') ? 'fill' : 'color']), b = behind(n);
      return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); };
  const worst = texts.reduce((w, n) => ratio(n) < ratio(w) ? n : w);
  return {width: document.documentElement.scrollWidth, sticks: sticks.map(n => n.outerHTML.slice(0, 80)),
    cut: cut.map(n => n.textContent), contrast: ratio(worst), worst: worst.outerHTML.slice(0, 120),
    dark: behind(document.body) < .5, articles: [...document.querySelectorAll('article')].filter(
      n => n.getClientRects().length).map(n => n.className.split(' ')[0])};
})()"""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    profile = tmp_path_factory.mktemp("profile")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
    command = [str(CHROMIUM), *flags]
    browser = subprocess.Popen([*command, f"--user-data-dir={profile}"], stderr=subprocess.PIPE, text=True)
    try:
        said = next(line for line in browser.stderr or [] if "DevTools listening" in line)
        yield int(said.partition("127.0.0.1:")[2].partition("/")[0])
    finally:
        browser.terminate()
        browser.communicate(timeout=30)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = [make_run(folder / f"run{i}", steps=40, every=20, tasks=30, collapsed=bool(i)) for i in (0, 1)]
    (runs[1] / "recipe.yaml").write_text((runs[0] / "recipe.yaml").read_text() + "optimizer: {learning_rate: 0.1}\n")
    write_comparison(runs, folder / "compare.html")
    with (runs[0] / "recipe.yaml").open("a") as recipe:
        recipe.write("expect: [{metric: eval/accuracy, step: 40, low: 0.3, high: 0.5, source: three seeds}]\n")
    runs.append(make_run(folder / "run2", steps=40, every=20, tasks=30, episodes=True))
    for run in runs:
        record = read_run(run)
        (run / "report.html").write_text(page(record, headline(record), curves_svg(record)))
    with_calls_open = (runs[2] / "report.html").read_text().replace("<details", "<details open")
    (runs[2] / "report.html").write_text(with_calls_open)
    return [*(run / "report.html" for run in runs), folder / "compare.html"]


async def looks(port: int, file: Path) -> list[dict[str, Any]]:
    """What LOOK finds at both widths in both themes, and last with the second button pressed."""
    found = []
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
            url = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
        async with session.ws_connect(url, max_msg_size=0) as socket:

            async def call(method: str, **params: Any) -> dict[str, Any]:
                await socket.send_json({"id": 1, "method": method, "params": params})
                while (message := await socket.receive_json()).get("id") != 1:
                    pass
                return message["result"]

            async def evaluate(text: str) -> Any:
                return (await call("Runtime.evaluate", expression=text, returnByValue=True))["result"].get("value")

            for width, theme in [(1280, "light"), (400, "light"), (400, "dark"), (1280, "dark")]:
                size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                await call("Emulation.setDeviceMetricsOverride", **size)
                features = [{"name": "prefers-color-scheme", "value": theme}]
                await call("Emulation.setEmulatedMedia", features=features)
                await call("Page.navigate", url=file.as_uri())
                while await evaluate("document.readyState") != "complete":
                    await asyncio.sleep(0.02)
                found.append(await evaluate(LOOK) | {"wanted": width, "theme": theme})
            await evaluate("document.querySelector('label[for=kind-1]').click()")
            found.append(await evaluate(LOOK) | {"wanted": 1280, "theme": "dark"})
    return found


def can_be_read(whole: list[dict[str, Any]]) -> None:
    for found in whole:
        assert found["width"] == found["wanted"]
        assert not found["sticks"]
        assert not found["cut"]
        assert found["contrast"] >= 4.5, found["worst"]
        assert found["dark"] == (found["theme"] == "dark")


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["report", "collapsed", "episodes", "comparison"])
def test_nothing_overflows_and_all_can_be_read(port: int, pages: list[Path], which: int) -> None:
    *whole, pressed = asyncio.run(looks(port, pages[which]))
    can_be_read(whole)
    assert all(found["articles"] for found in whole)
    assert set(pressed["articles"]) <= {"gained"} < set(whole[0]["articles"]) | {"gained"}


def test_a_probe_has_the_look_of_a_report(port: int, tmp_path: Path) -> None:
    row = {"prompt": "x" * 300, "completion": HOSTILE, "num_tokens": 9, "status": "length"}
    found = [Finding("all_cut", "90% are cut off", "raise rollout.max_completion_length")]
    rows = [row | {"reward": reward} for reward in (None, 0.0, 1.0)]
    (tmp_path / "probe.html").write_text(page_of_probe(Probe(HEALTHY, found, rows), "Probe of demo_cpu"))
    *whole, _ = asyncio.run(looks(port, tmp_path / "probe.html"))
    can_be_read(whole)
