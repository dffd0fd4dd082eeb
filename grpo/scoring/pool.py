"""The worker processes of a run: a job goes to the next free one."""

from __future__ import annotations

import pickle
import queue
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

from grpo.config import ScoringConfig
from grpo.errors import RunError, UserError
from grpo.scoring.call import Call, FunctionSpec, LoadError, RewardFunction
from grpo.scoring.messages import Job, Outcome
from grpo.scoring.process import FunctionsNotLoaded, WorkerFailed, WorkerProcess
from grpo.scoring.worker import Setup


class Pool:
    """``scoring.workers`` processes, each with all functions loaded; none without functions. ``signatures`` says what
    each function asks for.

    Functions whose places are in ``run_here`` have processes of their own. Threads of this process call them.

    Raises:
        UserError: functions cannot be loaded; each of them is named with its file and cause.
    """

    def __init__(
        self, functions: Sequence[FunctionSpec], scoring: ScoringConfig, max_steps: int, run_here: Collection[int] = ()
    ) -> None:
        self._max_steps = max_steps
        self._run_here = {index: _function_here(functions[index]) for index in run_here}
        limit = scoring.memory_limit_gb
        setup = Setup(list(functions), None if limit is None else int(limit * 2**30), max_steps)
        wanted = scoring.workers if functions else 0
        self._workers = [WorkerProcess(setup, scoring.environment) for _ in range(wanted)]
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(scoring.workers, "scoring")
        try:
            self.signatures = next(iter(list(self._threads.map(WorkerProcess.start, self._workers))), [])
        except WorkerFailed as why:
            self.close()
            raise UserError(_not_loaded(functions, why)) from None
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            self._idle.put(worker)

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def submit(self, job: Job, timeout: float) -> Future[list[Outcome]]:
        """Have a job done, from any thread; the outcomes are in the order of its requests.

        ``timeout`` is how many seconds may pass between two answers. The future raises WorkerFailed where a worker has
        ended and cannot be started again.

        Raises:
            RunError: the pool was closed.
        """
        try:
            if job.function in self._run_here:
                return self._threads.submit(self._call_here, job)
            return self._threads.submit(self._call_in_worker, pickle.dumps(job), len(job.requests), timeout)
        except RuntimeError:
            raise RunError("scoring was closed") from None

    def close(self) -> None:
        """End the workers, whatever they are doing. May be called twice."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _call_in_worker(self, job: bytes, requests: int, timeout: float) -> list[Outcome]:
        worker = self._idle.get()
        try:
            return worker.run(job, requests, timeout)
        finally:
            self._idle.put(worker)

    def _call_here(self, job: Job) -> list[Outcome]:
        state = SimpleNamespace(global_step=job.step, max_steps=self._max_steps)
        return [Call(self._run_here[job.function], request, state).run() for request in job.requests]


def _function_here(spec: FunctionSpec) -> RewardFunction:
    try:
        return RewardFunction(spec)
    except LoadError as why:
        raise UserError(f"{spec.where} ({spec.source}): {why}") from None


def _not_loaded(functions: Sequence[FunctionSpec], why: WorkerFailed) -> str:
    if isinstance(why, FunctionsNotLoaded):
        found = zip(functions, why.causes, strict=True)
        return "\n".join(f"{spec.where} ({spec.source}): {cause}" for spec, cause in found if cause)
    sources = ", ".join(spec.source for spec in functions)
    return f"rewards ({sources}): {why}; if memory is short, raise scoring.memory_limit_gb or set it to null"
