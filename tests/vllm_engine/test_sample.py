"""`grpo sample` with completions of a real engine: killed, it keeps what it has, and goes on."""

from __future__ import annotations

import json
from pathlib import Path

from tests.launching import run_python
from tests.vllm_engine.conftest import ServerProcess
from tests.vllm_engine.runs import on, recipe


def test_a_server_samples_and_goes_on(tmp_path: Path, tiny_server: ServerProcess) -> None:
    path = recipe(tmp_path / "run", rollout=on(tiny_server, max_completion_length=48))
    output, samples = tmp_path / "rows.jsonl", tmp_path / "rows.samples.jsonl"
    options = ["--n", 4, "--prompts", 8, "--chunk", 4, "--keep", "share_of_small_numbers>=0", "--output", output]
    done = run_python("-m", "grpo", "sample", path, *options)
    assert done.returncode == 0, done.stderr
    whole = samples.read_bytes()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    report = json.loads((tmp_path / "rows.report.json").read_text())
    assert report["completions"] == 32
    ended = report["statuses"]["stop"]
    assert report["rules"][0]["completions"] == ended
    assert len(rows) == report["rows"] > ended // 2  # whose text becomes the engine's tokens again
    samples.write_bytes(whole[: 3 * len(whole) // 4])  # a chunk and a half
    done = run_python("-m", "grpo", "sample", path, *options)
    assert done.returncode == 0, done.stderr
    before, after = ([json.loads(line) for line in text.splitlines()] for text in (whole, samples.read_bytes()))
    assert after[:4] == before[:4]
    assert [group["prompt_id"] for group in after] == [group["prompt_id"] for group in before]
