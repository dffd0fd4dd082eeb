"""A worker whose weights a test can make wrong, after they were loaded right."""

from __future__ import annotations

from grpo.backends.vllm.worker import WorkerExtension


class PerturbingWorkerExtension(WorkerExtension):
    def perturb(self, name: str, scale: str) -> None:
        """Multiply one parameter in place."""
        parameter = dict(self.model_runner.get_model().named_parameters())[name]
        parameter.data.mul_(float(scale))
