"""The page of a run that is going on: rewritten by another process, now and then, and loading itself until the end."""

from __future__ import annotations

import pytest

from grpo.report.live import LiveReport
from grpo.report.page import REFRESH
from grpo.report.write import write_report
from tests.report.made_runs import make_run


@pytest.mark.slow
def test_a_page_loads_itself_again_only_while_the_run_goes_on(tmp_path):
    folder = make_run(tmp_path / "run", steps=2, every=1, tasks=2)
    live = LiveReport(folder, on=True)
    with live:
        live.after_step()
        assert live._drawing is None  # no step of a short run waits for it, and it loads no matplotlib
        live._next = 0.0
        live.after_step()
        drawing = live._drawing
        live.after_step()  # goes on while it draws
        assert live._drawing is drawing
        assert drawing.wait(60) == 0
        assert REFRESH in (folder / "report.html").read_text()
        live.after_step()
        assert live._drawing is None
        assert live._next - live._began >= 50 * 0.1  # it takes at most a fiftieth of the time
    assert REFRESH not in (folder / "report.html").read_text()
    assert "and going on" in (folder / "report.html").read_text()
    write_report(folder)
    assert "and going on" not in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_live_report_that_cannot_be_drawn_says_so_once(tmp_path, caplog):
    with LiveReport(tmp_path, on=True) as live:
        live._next = 0.0
        live.after_step()
        live._drawing.wait(60)
        live.after_step()
        live.after_step()
        assert not live.on
    assert "report.html is not rewritten during the run: " in caplog.text
    assert "there is no metrics.jsonl in it" in caplog.text
