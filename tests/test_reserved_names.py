"""What a reward, a loss or a backend of the user's own calls its metrics cannot pass for the trainer's."""

from __future__ import annotations

from pathlib import Path

from grpo.backends.own import CheckedBackend
from grpo.config import TrackingConfig
from grpo.report.write import write_report
from grpo.run.log import RunLog
from tests.small_runs import lines, small_run

LOSS = """
from grpo.losses import loss
from grpo.losses.tokens import by_tokens, token_sum

def measure(tokens, options):
    return {name: 99 * tokens.mask_BT.sum() for name in ("kl", "tokens", "loss", "grad_norm", "step", "mine/max")}

@loss(reduce=token_sum, denominator=by_tokens, measure=measure)
def named(tokens, options):
    return -tokens.advantages_B1 * tokens.logps_BT
"""


def test_a_reward_and_a_loss_cannot_overwrite_the_trainers_metrics(
    tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "my_loss.py").write_text(LOSS)
    algorithm = {"loss_type": f"{tmp_path}/my_loss.py:named"}
    reward, run = "logs_the_trainers_names", tmp_path / "run"
    small_run(tiny_model, run, monkeypatch, steps=2, reward=reward, algorithm=algorithm)
    rows = lines(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert 0 <= rows[0]["reward"] <= 1
    assert rows[0]["num_tokens"] != 99
    assert not any(name.startswith("eval/") for name in rows[0])
    assert rows[0][f"rewards/{reward}/mean"] == rows[0]["reward"]
    for name in ("step", "reward", "eval/accuracy", "mean", "num_tokens"):
        assert rows[0][f"rewards/{reward}/logged/{name}"] == 99
    assert 0 < rows[0]["grad_norm"] < 99
    assert "kl" not in rows[0]
    assert rows[0]["loss/kl"] == rows[0]["loss/grad_norm"] == 99
    assert rows[0]["loss/mine/max"] > 99
    assert write_report(run).exists()


def test_a_backend_cannot_overwrite_the_trainers_metrics() -> None:
    class Own:
        def sync(self, policy, version):
            return {"reward": 99, "seconds": 1}

    assert CheckedBackend(Own(), "mine", frozenset()).sync(None, 1) == {"backend/reward": 99, "backend/seconds": 1}


def test_the_log_keeps_its_own_step(tmp_path: Path) -> None:
    with RunLog(tmp_path, TrackingConfig(), recipe_dict={}, total_steps=3) as log:
        log.log(2, {"step": 99, "reward": 1.0})
    assert lines(tmp_path) == [{"step": 2, "reward": 1.0}]
