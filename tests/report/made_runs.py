"""Run folders as the trainer leaves them, and pages read back, for tests of reports."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "input", "br", "img", "link", "hr", "wbr"}
HOSTILE = '<script>alert("x")</script><think>6 * 3 = 18</think> <answer>6 * 3</answer> & \x00 \x1b[31m</pre>'


def make_run(
    folder: Path,
    *,
    steps: int = 100,
    every: int = 25,
    tasks: int = 60,
    collapsed: bool = False,
    episodes: bool = False,
    seed: int = 0,
) -> Path:
    """A run as the trainer leaves it: accuracy and length rise, entropy falls; or all that is lost. With ``episodes``
    the model calls a tool, ever more often."""
    draw = random.Random(seed)
    (folder / "rollouts").mkdir(parents=True)
    lines = []
    for step in range(steps + 1):
        done = 1 - math.exp(-step / (0.3 * steps))
        accuracy, length = 0.16 + 0.3 * done, 46 + 55 * done
        if collapsed:
            accuracy = 0.0 if step > 8 else 0.9
        if step:
            rollout = 1.6 + length / 60 + draw.gauss(0, 0.1)
            counts = [512 * (accuracy + draw.gauss(0, 0.01)), 512 * (0.6 - 0.3 * done), 40 * (1 - done), 12.0]
            lines.append(
                {
                    "step": step,
                    "loss": draw.gauss(0, 1e-3),
                    "reward": accuracy + 0.1 * done + draw.gauss(0, 0.03),
                    "reward_std": 0.4,
                    "frac_reward_zero_std": 1.0
                    if collapsed and step > 8
                    else max(0.0, 0.5 - 0.2 * done + draw.gauss(0, 0.05)),
                    "frac_unscored": 0.0,
                    "rewards/countdown/mean": accuracy + draw.gauss(0, 0.02),
                    "rewards/format/mean": 0.7 + 0.3 * done + draw.gauss(0, 0.02),
                    "completions/mean_length": length + draw.gauss(0, 3),
                    "completions/clipped_ratio": max(0.0, 0.02 + draw.gauss(0, 0.01)),
                    "entropy": 1.1 - 0.6 * done + draw.gauss(0, 0.02),
                    "grad_norm": abs(0.4 + draw.gauss(0, 0.1)),
                    "kl": 0.02 * done,
                    "clip_ratio/region_mean": 0.004,
                    "learning_rate": 1e-4,
                    "num_tokens": step * 512.0 * length,
                    "tokens_per_second": 9000 + draw.gauss(0, 300),
                    "step_time": rollout + 2.7,
                    "time/rollout": rollout,
                    "time/score": 0.2,
                    "time/train": 2.4,
                    "time/sync": 0.1,
                    **{f"verdicts/countdown/{v}": n for v, n in zip(VERDICTS, counts, strict=True)},
                    **(of_episodes(done) if episodes else {}),
                }
            )
        if step % every == 0:
            half = 0.04
            lines.append(
                {
                    "step": step,
                    "eval/accuracy": accuracy,
                    "eval/accuracy_low": max(0.0, accuracy - half),
                    "eval/accuracy_high": accuracy + half,
                    "eval/pass@4": min(1.0, accuracy + 0.15),
                    "eval/completions/mean_length": length,
                    "eval/completions/clipped_ratio": 0.02,
                    **({f"eval/{name}": value for name, value in of_episodes(done).items()} if episodes else {}),
                }
            )
            rows = [eval_row(step, prompt, accuracy, length) for prompt in range(tasks)]
            rows = [row | {"turns": turns_of(row)} if episodes else row for row in rows]
            write_jsonl(folder / "rollouts" / f"eval_{step:06d}.jsonl", rows)
    write_jsonl(folder / "metrics.jsonl", lines)
    (folder / "recipe.yaml").write_text(
        "stage: grpo\nmodel: {name: data/tiny_base}\ndata: {name: countdown}\nrewards: [{name: countdown}]\n"
        "rollout: {max_completion_length: 128}\n"
        f"training: {{output_dir: runs/demo, max_steps: {steps}, seed: {seed}}}\n"
    )
    environment = {
        "started": "2026-01-01T12:00:00+0000",
        "command": "grpo train recipes/<demo>.yaml",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "transformers": "5.19.0"},
        "source": {"commit": "0123456789abcdef", "modified": True},
        "cpu": {"model": "A Processor", "cores": 2, "memory_gb": 8.0},
        "gpus": [],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


VERDICTS = ("correct", "wrong", "no_answer", "truncated")


def eval_row(step: int, prompt: int, accuracy: float, length: float) -> dict:
    solved = (prompt * 0.618) % 1 < accuracy
    tries = [f"{3 + prompt % 5} + {i % 9} = {3 + prompt % 5 + i % 9} ; no" for i in range(int(length / 8))]
    text = f"<think>{' , '.join(tries)}</think> <answer>{'6 * 3' if solved else '6 + 3'}</answer>"
    return {
        "step": step,
        "prompt_id": 1000 + prompt,
        "sample": 0,
        "prompt": f"numbers 6 3 {prompt % 9 + 1} target 18\nA: <think>",
        "completion": HOSTILE if prompt == 0 else text,
        "status": "stop",
        "num_tokens": int(length),
        "reward": float(solved),
        "rewards": {"countdown": float(solved)},
        "columns": {"nums": [6, 3, prompt % 9 + 1], "target": 18},
    }


def of_episodes(done: float) -> dict[str, float]:
    ended = {"stop": done, "length": 0.1 * (1 - done), "error": 0.0, "environment": 0.0, "turns": 0.9 * (1 - done)}
    return {
        "completions/mean_turns": 4 - 2 * done,
        "completions/max_turns": 4.0,
        "tools/call_frequency": 0.2 + 0.8 * done,
        "tools/failure_frequency": 0.3 - 0.2 * done,
    } | {f"completions/ended/{status}": share for status, share in ended.items()}


def turns_of(row: dict) -> list[dict]:
    """A call that failed, one that did not, and the row's completion; all with what a page must not run."""
    long = "3.14159265358979" * 30
    calls = [
        {"name": "calculator", "arguments": json.dumps({"expression": HOSTILE}), "result": long, "error": ""},
        {"name": "", "arguments": "{" + long, "result": HOSTILE, "error": "malformed"},
    ]
    return [
        {"role": "environment", "text": f"it begins {HOSTILE}", "tokens": 9},
        {"role": "assistant", "text": "<tool_call>", "tokens": 12, "ended": "tool_call", "calls": calls, "reward": 0.1},
        {"role": "environment", "text": "", "tokens": 20},
        {"role": "assistant", "text": row["completion"], "tokens": 5, "ended": "length", "advantage": -0.5},
    ]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """Reads a page strictly: tags must nest. Keeps tags with their attributes, and text by the innermost class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.texts.append((self.open[-1][1] or self.open[-1][0], data))

    def all(self, kind: str) -> list[str]:
        return [text for name, text in self.texts if name == kind]

    def count(self, kind: str) -> int:
        return sum(kind in (attributes.get("class") or "").split() for _, attributes in self.tags)
