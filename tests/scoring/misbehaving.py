"""Reward functions that misbehave on completions that start with "bad", and give the length of the others."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def _each(completions: Sequence[str], act: Callable[[str], Any]) -> list[Any]:
    return [act(c) if c.startswith("bad") else float(len(c)) for c in completions]


def length(completions, **kwargs):
    return _each(completions, lambda c: 0.0)


# --- exceptions -------------------------------------------------------------------------------------------------------


def raises(completions, **kwargs):
    return _each(completions, lambda c: {}["no such key"])


def system_exit(completions, **kwargs):
    def leave(c):
        raise SystemExit  # not sys.exit(), which wandb replaces

    return _each(completions, leave)


def interrupts(completions, **kwargs):
    def interrupt(c):
        raise KeyboardInterrupt

    return _each(completions, interrupt)


class Rude(BaseException):
    def __str__(self):
        raise RuntimeError("not even its text")


def rude(completions, **kwargs):
    def be(c):
        raise Rude

    return _each(completions, be)


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):  # nothing can be set on it, not even its traceback
    text: str


def frozen(completions, **kwargs):
    def freeze(c):
        raise Frozen("cold")

    return _each(completions, freeze)


def memory(completions, **kwargs):
    return _each(completions, lambda c: len(b"x" * 10**11))


def raises_late(completions, **kwargs):
    return (1 / (not c.startswith("bad")) * len(c) for c in completions)  # a generator


# --- hanging ----------------------------------------------------------------------------------------------------------


def loops(completions, **kwargs):
    def forever(c):
        while True:
            pass

    return _each(completions, forever)


def power_tower(completions, **kwargs):
    return _each(completions, lambda c: eval("99**98**97"))  # holds the GIL in C


def stops(completions, **kwargs):
    return _each(completions, lambda c: os.kill(os.getpid(), signal.SIGSTOP))


def whole(completions, **kwargs):
    loops(completions)
    return [float(len(completions))] * len(completions)


async def awaits(completions, **kwargs):
    await asyncio.sleep(0.3)
    return [float(len(c)) for c in completions]


async def await_forever(completions, **kwargs):
    await asyncio.sleep(1000 if any(c.startswith("bad") for c in completions) else 0.01)
    return [float(len(c)) for c in completions]


async def async_loops(completions, **kwargs):
    await asyncio.sleep(0.01)
    return loops(completions)


async def async_exits(completions, **kwargs):
    await asyncio.sleep(0.01)
    return system_exit(completions)


# --- ending the process, or breaking what it speaks through -----------------------------------------------------------


def exits(completions, **kwargs):
    return _each(completions, lambda c: os._exit(0))


def segfault(completions, **kwargs):
    return _each(completions, lambda c: os.kill(os.getpid(), signal.SIGSEGV))


def killed(completions, **kwargs):
    return _each(completions, lambda c: os.kill(os.getpid(), signal.SIGKILL))


def killed_by_an_odd_signal(completions, **kwargs):
    return _each(completions, lambda c: os.kill(os.getpid(), signal.SIGRTMIN + 6))


def closes_files(completions, **kwargs):
    return _each(completions, lambda c: os.closerange(0, 256))


def takes_the_pipe(completions, **kwargs):
    def take(c):
        os.closerange(3, 256)
        return len([os.open(os.devnull, os.O_RDWR) for _ in range(9)])  # the pipe's number is another file's now

    return _each(completions, take)


def _into_pipe(data: bytes) -> None:
    os.write(int(sys.argv[1]), data)


def killed_while_it_answers(completions, **kwargs):
    def half_an_answer(c):
        _into_pipe(struct.pack("!i", 1000) + b'[0, "Answer", {"rewards": [')
        os.kill(os.getpid(), signal.SIGKILL)

    return _each(completions, half_an_answer)


def stops_while_it_answers(completions, **kwargs):
    def half_an_answer(c):
        _into_pipe(struct.pack("!i", 1000) + b'[0, "Answer", {"rewards": [')
        os.kill(os.getpid(), signal.SIGSTOP)

    return _each(completions, half_an_answer)


def says_what_is_no_message(completions, **kwargs):
    return _each(completions, lambda c: _into_pipe(struct.pack("!i", 5) + b"hello"))


def answers_another_call(completions, **kwargs):
    text = b'[7, "Answer", {"rewards": [1.0]}]'
    return _each(completions, lambda c: _into_pipe(struct.pack("!i", len(text)) + text))


def program_holds_the_pipe(completions, **kwargs):
    import subprocess

    def die_before_it(c):
        subprocess.Popen(["sleep", "25"], close_fds=False, start_new_session=True)
        os.kill(os.getpid(), signal.SIGKILL)

    return _each(completions, die_before_it)


def fork_holds_the_pipe(completions, **kwargs):
    def die_before_it(c):
        if os.fork() == 0:
            os.setsid()
            time.sleep(25)  # longer than a call may take
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    return _each(completions, die_before_it)


def logs_an_endless_integer(completions, log_extra, **kwargs):
    log_extra("n", _each(completions, lambda c: 10**5000))
    return [float(len(c)) for c in completions]


# --- strange, but allowed ---------------------------------------------------------------------------------------------


def forks(completions, **kwargs):
    if os.fork() == 0:
        time.sleep(0.2)  # comes back when the trainer has the next call's answer in mind
        return [-1.0] * len(completions)
    return [float(len(c)) for c in completions]


def prints(completions, **kwargs):
    print('[0, "Answer", {}]')
    sys.stdout.write("half a line")
    os.write(1, b"\x00\xff")
    return [float(len(c)) for c in completions]


def closes_stdout(completions, **kwargs):
    sys.stdout.close()  # may be done twice
    return [float(len(c)) for c in completions]


def changes_the_path(completions, **kwargs):
    sys.path.clear()
    os.chdir("/")
    return [float(len(c)) for c in completions]


def large(completions, log_extra, **kwargs):
    log_extra("large", ["x" * 10_000_000] * len(completions))
    return [float(len(c)) for c in completions]


# --- numbers ----------------------------------------------------------------------------------------------------------


def nan(completions, **kwargs):
    return _each(completions, lambda c: float("nan"))


def infinite(completions, **kwargs):
    return _each(completions, lambda c: 10**400)


def ints_and_none(completions, **kwargs):
    return [None if c.startswith("bad") else True for c in completions]


def pid(completions, **kwargs):
    return [float(os.getpid())] * len(completions)


def torch_here(completions, **kwargs):
    return [float("torch" in sys.modules or "pydantic" in sys.modules)] * len(completions)


def plain(completions, target):  # no **kwargs
    return [t / 2 for t in target]


def too_few(completions, **kwargs):
    return [1.0]


def extra_short(completions, log_extra, **kwargs):
    log_extra("x", [1])
    return [0.0] * len(completions)


def sees(
    prompts,
    completions,
    completion_ids,
    trainer_state,
    log_extra,
    log_metric,
    log_verdict,
    status,
    prefill,
    nums,
    bonus,
    **kwargs,
):
    assert len(prompts) == len(completions) == len(completion_ids) == len(status) == len(prefill) == len(nums)
    nums[0].clear()  # its own copy
    rows = zip(prompts, completions, completion_ids, status, prefill, nums, strict=True)
    log_extra("seen", [f"{p}|{c}|{i}|{s}|{f}|{n}" for p, c, i, s, f, n in rows])
    log_metric("step_seen", trainer_state.global_step + trainer_state.max_steps)
    log_verdict(["fine"] * len(completions))
    return [bonus] * len(completions)
