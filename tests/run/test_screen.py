"""A run on the screen: fixed columns in a log, and on a terminal of any width the step count and a bar first."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from grpo.config import TrackingConfig
from grpo.run.fields import COST, Columns, duration, evaluation_text
from grpo.run.log import RunLog
from grpo.run.screen import WIDTH, open_display

STEP = {
    "reward": 0.3125,
    "completions/mean_length": 1234.5,
    "completions/clipped_ratio": 0.03,
    "frac_reward_zero_std": 0.4,
    "entropy": 1.0234,
    "kl": 0.00123,
    "grad_norm": 0.71234,
    "loss": -1e-9,
    "tokens_per_second": 12345.6,
    "step_time": 4.125,
}
EVALUATION = {
    "eval/accuracy": 0.381,
    "eval/accuracy_low": 0.34,
    "eval/accuracy_high": 0.424,
    "eval/pass@2": 0.5,
    "eval/pass@4": 0.602,
    "eval/completions/mean_length": 99.4,
    "eval/completions/clipped_ratio": 0.02,
}


def test_one_plain_line_a_step_in_fixed_columns(tmp_path, capsys):
    with RunLog(tmp_path, TrackingConfig(), recipe_dict={}, total_steps=100) as run_log:
        run_log.log(0, EVALUATION)
        run_log.log(1, STEP)
        run_log.log(2, STEP | {"reward": -0.5, "entropy": None, "completions/mean_length": 12_345.0, "step_time": 99.0})
        run_log.log(100, STEP | {"completions/clipped_ratio": 1.0, "frac_reward_zero_std": 0.0})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == ("=== eval at step 0/100: accuracy 0.381 [0.340, 0.424]  pass@4 0.602  length 99  cut 2% ===")
    first, *others = printed[1:]
    assert re.match(
        r"step   1/100  eta +\d+s  reward  0.312  length  1234  cut   3%  no-signal  40%  entropy  1.023  kl", first
    )
    assert re.search(r"reward -0.500  length 12.3k  cut   3%  no-signal  40%  entropy      -  kl", others[0])

    def columns(line: str) -> list[int]:
        return [found.start() for found in re.finditer(r"(?<![\w.])[a-z][a-z/-]* ", line)]

    assert all(columns(line) == columns(first) for line in others)
    assert all(len(line) <= WIDTH for line in printed)


def on_terminal(width: int, *, total: int = 100, price: float | None = None, encoding: str = "utf-8") -> tuple:
    """A live display on a terminal of that width, and what is on its screen."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    console = Console(file=file, force_terminal=True, width=width)
    return open_display(total, 0, price=price, console=console), file


def screen_of(file: io.TextIOWrapper) -> list[str]:
    file.flush()
    text = file.buffer.getvalue().decode(file.encoding)
    return [line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").split("\n") if line]


@pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
def test_a_terminal_of_any_width_shows_the_step_count_and_a_bar_first_and_wraps_nothing(width):
    display, file = on_terminal(width, total=200, price=1.2)
    display.log(0, EVALUATION)
    display.log(10, STEP | {COST: 0.5, "cost_usd": 0.4, "health/no_signal": 1.0})
    with display.phase("evaluating", 512) as tell:
        tell(120)
        during = display._lines().plain
    display.close()
    lines = screen_of(file)
    assert all(len(line) <= width for line in [*lines, *during.split("\n")])
    bar, numbers = display._lines().plain.split("\n")
    assert re.match("step 10/200 [━─]{10,24}" if width > 20 else "step 10/200 ", bar)
    assert numbers.startswith("reward 0.312")
    assert ("evaluating 120/512" in during) == (width >= 80)
    assert ("$0.50 of $" in bar) == (width >= 80)
    assert any(line.startswith("step  10/200") for line in lines), "a line that stays"
    if width == 200:
        assert "health: no_signal" in bar
        assert "  80% in steps" in bar
        assert "accuracy 0.381  tok/s 12.3k" in bar
        assert "eval at step 0/200: accuracy 0.381 [0.340, 0.424]  pass@4 0.602  length 99  cut 2%" in lines


def test_what_fails_takes_no_place_from_the_time_left_nor_cents_from_what_matters():
    display, _ = on_terminal(80, price=0.01)
    holding = {f"health/{name}": 1.0 for name in ("accuracy_below_start", "cut_off", "no_signal")}
    display.log(10, STEP | holding | {COST: 0.001})
    with display.phase("evaluating", 512) as tell:
        tell(120)
        during = display._lines().plain.split("\n")[0]
    after = display._lines().plain.split("\n")[0]
    display.close()
    assert "evaluating 120/512  health: 3 rules  eta" in during
    assert "health: 3 rules  eta" in after
    assert "$" not in after


def test_a_terminal_without_unicode_gets_a_bar_of_its_letters():
    display, file = on_terminal(80, encoding="ascii")
    display.log(50, STEP)
    display.close()
    assert any(re.match("step 50/100 #{8}[.]{8} ", line) for line in screen_of(file))


def test_a_line_stays_every_few_steps():
    for total, kept in ((10, 10), (100, 20), (1000, 100)):
        display, file = on_terminal(80, total=total)
        display.live.stop()
        for step in range(1, total + 1):
            display.log(step, STEP)
        assert sum("eta" in line for line in screen_of(file)) in (kept, kept + 1)


def test_a_phase_that_takes_long_is_told_in_a_plain_log(monkeypatch, capsys):
    display = open_display(10, 0, console=Console(file=io.StringIO()))
    now = [0.0]
    monkeypatch.setattr("grpo.run.screen.time.monotonic", lambda: now[0])
    with display.phase("evaluating", 512) as tell:
        for done in range(0, 512, 4):
            now[0] += 1.0
            tell(done)
    assert capsys.readouterr().out.splitlines() == [f"evaluating {done}/512" for done in (116, 236, 356, 476)]


def test_the_least_important_fields_are_dropped_where_a_line_ends():
    lines = {width: Columns(100, width, STEP).line(1, STEP, "5s") for width in (30, 80, 400)}
    assert lines[30] == "step   1/100  eta     5s"
    assert lines[80].endswith("  no-signal  40%")
    assert lines[400].endswith("s/step  4.12  tok/s 12.3k")


def test_time_left_heeds_the_time_limit(capsys):
    display = open_display(10_000, 5, max_seconds=60.0, seconds=50.0, console=Console(file=io.StringIO()))
    display.eta.last -= 8.0  # as if the step had taken eight seconds
    display.log(6, {"reward": 0.0, "step_time": 8.0})
    assert "eta     2s" in capsys.readouterr().out


def test_durations_read_like_durations():
    seconds = (0.4, 42, 372, 3600 * 3 + 300, 86400 * 5 + 7200)
    assert [duration(s) for s in seconds] == ["0s", "42s", "6m12s", "3h05m", "5d02h"]


def test_an_evaluation_without_accuracy_shows_its_loss():
    assert evaluation_text(5, 10, {"eval/loss": 1.5}) == "eval at step 5/10: loss 1.500"
