"""A backend of your own: the plainest sampling loop there is, one prompt at a time, on the trainer's own weights.

    grpo train smoke_cpu rollout.backend=examples/my_backend.py:PlainBackend training.output_dir=runs/my_backend

or, in a recipe, ``rollout: {backend: my_backend.py:PlainBackend}``. Seconds on a CPU.

The trainer makes it once a process, asks it for completions of a policy version, and hands it every new version. What a
completion must hold is in ``grpo/types.py``; ``grpo/backends/base.py`` says what the methods are given.
"""

import torch

from grpo.errors import RunError, UserError
from grpo.prompts.completion_text import CompletionText
from grpo.types import Completion, Status, VersionSpan


class PlainBackend:
    def __init__(self, policy, rollout):
        if policy.sharded or rollout.stop or rollout.top_p < 1 or rollout.top_k or rollout.min_p:
            raise UserError(
                "rollout.backend: PlainBackend knows no sharded weights, stop strings, top_p, top_k or min_p"
            )
        self.policy, self.version = policy, -1
        self.completion_text = CompletionText(policy.tokenizer, policy.stop_token_ids)

    def sync(self, policy, version):
        """The weights are the trainer's own: there is nothing to copy, only their version to note."""
        self.version = version
        return {}

    @torch.no_grad()
    def generate(self, requests, sampling, version, on_group=None):
        if version != self.version:
            raise RunError(f"rollout asked for policy version {version}, the backend holds {self.version}")
        return [self.completions(request, sampling) for request in requests]

    def completions(self, request, sampling):
        """One completion a key. The key alone seeds its draws, so that a resumed run draws the same."""
        generators = [torch.Generator().manual_seed(key % 2**63) for key in request.keys]
        tokens, logprobs = [[] for _ in generators], [[] for _ in generators]
        open_ = set(range(len(generators)))
        ids_BN, cache = torch.tensor([request.prompt.token_ids] * len(generators)), None
        while open_:
            with self.policy.autocast():
                out = self.policy.causal_lm(ids_BN.to(self.policy.device), past_key_values=cache, use_cache=True)
            cache, logits_BV = out.past_key_values, out.logits[:, -1].float().cpu()
            logps_BV = (logits_BV / (sampling.temperature or 1.0)).log_softmax(-1)
            for b in sorted(open_):
                greedy = sampling.temperature == 0  # evaluation may ask for it
                pick = logps_BV[b].argmax() if greedy else logps_BV[b].exp().multinomial(1, generator=generators[b])
                tokens[b].append(int(pick))
                logprobs[b].append(0.0 if greedy else float(logps_BV[b, pick]))
                if tokens[b][-1] in self.policy.stop_token_ids or len(tokens[b]) == sampling.max_completion_length:
                    open_.remove(b)
            ids_BN = torch.tensor([[row[-1]] for row in tokens])  # ended rows go along; their tokens are not used
        return [self.completion(ids, logps) for ids, logps in zip(tokens, logprobs, strict=True)]

    def completion(self, ids, logps):
        text = self.completion_text.of(ids)
        status = Status.STOP if ids[-1] in self.policy.stop_token_ids else Status.LENGTH
        return Completion(ids, logps, status, text, [VersionSpan(0, len(ids), self.version)])

    def close(self):
        pass
