"""What a worker process does not inherit."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewards.math.pool import Pool
from rewards.secrets import without_secrets

SECRET = {
    "WANDB_API_KEY": "x",
    "HF_TOKEN": "x",
    "HUGGING_FACE_HUB_TOKEN": "x",
    "AWS_SECRET_ACCESS_KEY": "x",
    "AWS_SESSION_TOKEN": "x",
    "aws_profile": "x",
    "SSH_AUTH_SOCK": "/tmp/agent",
    "OPENAI_API_KEY": "x",
    "GITHUB_TOKEN": "x",
    "MYSECRET": "x",
    "DB_PASS": "x",
    "MLFLOW_TRACKING_PASSWORD": "x",
    "SLACK_WEBHOOK_URL": "x",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key.json",
    "DATABASE_URL": "postgres://me:hunter2@db/rows",
    "https_proxy": "http://me:hunter2@proxy:8080",
    "JUDGE": "sk-abcdefghijklmnopqrstuvwx",
    "MY_LOGIN": "hf_abcdefghijklmnopqrstuvwx",
    "AZURE_SQL_CONNECTION_STRING": "x",
    "CI_JOB_JWT": "x",
    "ROWS_DB": "Server=db;User=me;Password=hunter2;Encrypt=true",
    "JUDGE_CALL": "http://judge/v1?model=x&api_key=hunter2",
    "CLONE_FROM": "https://0123456789abcdef0123@git.example/rows.git",
    "REDIS_URL": "redis://:hunter2@cache/0",
    "JUDGE_HEADER": "Bearer 0123456789abcdef",
    "HOOK": "https://hooks.slack.com/services/T0/B0/hunter2",
}
ORDINARY = {
    "PATH": "/usr/bin",
    "HOME": "/home/me",
    "PWD": "/home/me/project",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "KEYBOARD": "us",
    "HF_HOME": "/data/hf",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "JUDGE_URL": "http://localhost:8000/v1",
    "LANG": "C.UTF-8",
    "REGION": "us-east-1",
    "ROWS_URL": "https://example.org/rows?page=2&tokens=8",
}


@pytest.mark.parametrize("name", SECRET)
def test_what_looks_like_a_secret_is_left_out(name):
    assert without_secrets(ORDINARY | {name: SECRET[name]}) == ORDINARY


def test_a_secret_under_another_name_is_left_out_and_a_short_word_is_not():
    given = ORDINARY | {
        "AWS_DEFAULT_REGION": "us-east-1",
        "X_KEY": "0123456789abcdef0123",
        "AGAIN": "Bearer 0123456789abcdef0123",
    }
    assert without_secrets(given) == ORDINARY


def test_a_variable_that_is_named_stays():
    assert without_secrets(ORDINARY | SECRET, ["OPENAI_API_KEY", "NOT_SET"]) == ORDINARY | {"OPENAI_API_KEY": "x"}


@pytest.mark.slow
def test_math_workers_do_not_inherit_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "nobody-sees-this")
    pool = Pool(1)
    try:
        assert b"nobody-sees-this" not in Path(f"/proc/{pool.pids[0]}/environ").read_bytes()
    finally:
        pool.close()
