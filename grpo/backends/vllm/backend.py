"""The vLLM backend, over all training processes of a launch.

Every training process asks the servers for its own share of the completions. A server's *keeper* (``keeper.py``)
hands over weights: the first process keeps servers elsewhere, and the first process of each engine's group keeps a
colocated engine. An error on one process is raised on all, because the others would wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object

from grpo.backends.base import OnGroup, Request, Sampling, Turns
from grpo.backends.sequence import Conversation, SampledSequence
from grpo.backends.vllm import trust
from grpo.backends.vllm.completions import TurnByTurn, adapter_name, generate_payload, logprobs_of, spans_of
from grpo.backends.vllm.keeper import Keeper
from grpo.backends.vllm.pool import Answers, Lost, Pool
from grpo.backends.vllm.process import engine_sleeps, make_engine
from grpo.backends.vllm.scratch import make_scratch
from grpo.backends.vllm.transfer import choose_way, make_sender
from grpo.config import Recipe
from grpo.errors import BackendFailed, RunError, UserError
from grpo.model.devices import DTYPES
from grpo.model.policy import Policy
from grpo.prompts.completion_text import CompletionText
from grpo.types import Completion, Status, TrainedSequence

T = TypeVar("T")

RECOVERIES = 5  # within one rollout; servers that die more often die of the requests


@dataclass
class InFlight:
    """Completions that were asked for; some may have come. With an environment ``episodes`` are how far each has come,
    and ``player`` is what plays them."""

    requests: list[Request]
    sampling: Sampling
    version: int
    answers: Answers
    player: TurnByTurn | None
    episodes: list[SampledSequence]


class VLLMBackend:
    """Generates with the engines of ``rollout.vllm_mode``; see ``base.Backend`` for the protocol."""

    def __init__(self, policy: Policy, recipe: Recipe):
        rollout = self.rollout = recipe.rollout
        self.policy, self.version = policy, -1
        self.served = -1  # the version that the last sync which ended brought
        self.completion_text = CompletionText(policy.tokenizer, policy.stop_token_ids)
        self.rank = policy.accelerator.process_index
        self.dtype = DTYPES[rollout.vllm_dtype or recipe.model.dtype]
        self.adapters = recipe.sends_adapters()
        self.scratch = make_scratch(rollout.vllm_sync_dir)
        self.private = make_scratch(None)  # for sockets, which a disk that is shared may not take
        scratch = Path(self.scratch.name)
        on_gpu = policy.device.type == "cuda"
        urls, engine = rollout.server_urls(), None
        if rollout.vllm_mode == "colocate":
            engine = make_engine(recipe, policy, scratch, Path(self.private.name))
            self._everywhere(engine.start if engine else lambda: None)
            group = self.rank - self.rank % rollout.vllm_tensor_parallel_size
            urls = [gather_object([engine.url if engine else ""])[group]]
        self.pool = Pool(urls, rollout.vllm_generation_timeout)
        keeps = engine is not None if rollout.vllm_mode == "colocate" else self.rank == 0
        servers = self.pool.servers if keeps else []
        way = self._everywhere(lambda: choose_way(recipe, on_gpu=on_gpu) if self.rank == 0 else "")[0]
        sender = make_sender(way, recipe, policy, self.pool, scratch)
        self.keeper = Keeper(recipe, self.pool, servers, engine, sender, scratch, self.rank)
        self.sleeps = rollout.vllm_mode == "colocate" and engine_sleeps(recipe, on_gpu=on_gpu)
        self.asleep = False

    def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        version: int,
        on_group: OnGroup | None = None,
        turns: Turns | None = None,
    ) -> list[list[Completion]]:
        return self.collect(self.submit(requests, sampling, version, turns), on_group)

    def submit(self, requests: list[Request], sampling: Sampling, version: int, turns: Turns | None = None) -> InFlight:
        """Ask for completions and return at once. They go on while the policy trains and while weights are replaced.
        Then an episode's later turns are drawn by newer weights, and say so. ``turns`` is asked from a thread of the
        pool's."""
        if version != self.version:
            raise RunError(f"rollout asked for policy version {version}, the vllm backend holds {self.version}")
        if self.asleep:
            self.sync(self.policy, self.version)  # asleep, an engine has no weights
        if turns is None:
            return InFlight(requests, sampling, version, self.pool.submit(self._payloads(requests, sampling)), None, [])
        player = TurnByTurn(requests, Conversation(sampling, turns), self._payload, self.pool.ask, self.adapters)
        episodes = player.beginnings()
        playing = self.pool.begin([player.play(episode) for episode in episodes])
        return InFlight(requests, sampling, version, playing, player, episodes)

    def collect(self, flight: InFlight, on_group: OnGroup | None = None) -> list[list[Completion]]:
        """Wait for the completions that ``submit`` asked for.

        Requests whose server was lost are asked again, of an episode the turn that was lost. Where no server is left,
        they get ``vllm_server_timeout`` seconds to come back, and get the weights again.
        """
        landing = _Landing(flight.requests, lambda answer: self._completion(answer, flight), on_group)
        asked, coming = list(range(landing.size)), flight.answers
        for _ in range(RECOVERIES):
            errors = [why for why in self._everywhere(partial(landing.land, asked, coming)) if why]
            if not errors:
                break
            self.sync(self.policy, self.version)
            asked = landing.missing()
            coming = self._ask_again(flight, asked)
        else:
            raise BackendFailed(
                f"rank {self.rank}, step {self.version}: vllm servers were lost {RECOVERIES} times within one rollout; "
                f"last error: {errors[0]}"
            )
        return landing.groups

    def _ask_again(self, flight: InFlight, places: list[int]) -> Answers:
        if flight.player is not None:
            return self.pool.begin([flight.player.play(flight.episodes[i]) for i in places])
        payloads = self._payloads(flight.requests, flight.sampling)  # with adapters, payloads name the version
        return self.pool.submit([payloads[i] for i in places])

    def rest(self) -> None:
        """Nothing is asked for until the next sync: colocated engines give their memory to the update."""
        if self.sleeps and not self.asleep:
            self._everywhere(self.keeper.sleep)
            self.asleep = True

    def sync(self, policy: Policy, version: int) -> dict[str, float]:
        """Hand the policy's weights to every server that can be reached, and check that it samples from them.

        Returns how far engine and trainer were apart on the probe.

        Raises:
            BackendFailed: no server came up in time, or one holds other weights or samples from another distribution.
                Raised on every process.
        """
        self.policy, self.version = policy, version
        self._leave_memory()
        for down in gather_object([dict(self.pool.down)]):  # a keeper may not know that others lost its server
            self.pool.lose(down)
        deadline = self._deadline()
        self._everywhere(lambda: self.keeper.reach(version, deadline))
        deadline = self._deadline()
        while True:
            self._everywhere(lambda: self.keeper.hold(self.asleep))
            self._hand_over(policy, version)
            self._leave_memory()
            found = self._everywhere(lambda: self.keeper.open(policy, version, self.asleep))
            probes = [probe for mine in found for probe in mine]
            self.pool.up([probe.url for probe in probes])
            if all(gather_object([bool(self.pool.live())])):
                break
            self._everywhere(lambda: self.keeper.wait_to_retry(version, deadline))
            self._everywhere(lambda: self.keeper.reach(version, deadline))
        self.asleep, self.served = False, version
        return self._check_probes(probes)

    def _hand_over(self, policy: Policy, version: int) -> None:
        """What is gathered for it is let go of when this returns."""
        state = policy.base_state() if self.adapters else policy.full_state(self.dtype)
        adapter = policy.adapter_state() if self.adapters else {}
        self._everywhere(lambda: self.keeper.hand_over(policy, version, state, adapter))

    def _leave_memory(self) -> None:
        """To an engine that sleeps, what torch keeps of the device and does not use."""
        if self.asleep and self.policy.device.type == "cuda":
            torch.cuda.empty_cache()

    def _deadline(self) -> float:
        return time.monotonic() + self.rollout.vllm_server_timeout

    def close(self) -> None:
        self.pool.close()
        self.keeper.close()
        self.scratch.cleanup()
        self.private.cleanup()

    def _payloads(self, requests: list[Request], sampling: Sampling) -> list[dict[str, Any]]:
        return [self._payload(r.prompt.token_ids, key, sampling) for r in requests for key in r.keys]

    def _payload(self, token_ids: list[int], key: int, sampling: Sampling) -> dict[str, Any]:
        """In the pool's thread too, while weights are replaced: with those that servers hold, or have held."""
        adapter = adapter_name(self.served) if self.adapters else None
        stop = self.policy.stop_token_ids
        return generate_payload(token_ids, key, sampling, stop, version=self.served, model=adapter)

    def _completion(self, answer: Any, flight: InFlight) -> Completion:
        if isinstance(answer, SampledSequence):
            token_ids, logprobs, spans = answer.tokens, answer.logprobs, answer.versions
            stopped = answer.stopped
        else:
            token_ids, logprobs, spans = (
                answer["token_ids"],
                logprobs_of(answer),
                spans_of(answer, adapters=self.adapters),
            )
            stopped = answer["finish_reason"] == "stop"
        if stale := [s.version for s in spans if not flight.version <= s.version <= self.version]:
            raise BackendFailed(
                f"rank {self.rank}, step {self.version}: a completion asked of policy version {flight.version} was "
                f"made by version {stale[0]}: something else gives weights to the same server"
            )
        return Completion(
            token_ids=token_ids,
            sampler_logprobs=[0.0] * len(token_ids) if flight.sampling.temperature == 0 else logprobs,
            status=Status.STOP if stopped else Status.LENGTH,
            text=self.completion_text.of(token_ids),
            versions=spans,
        )

    def _check_probes(self, probes: list[trust.Probe]) -> dict[str, float]:
        """Score all engines' probes with the policy, on every process, because its forward pass may need them all."""
        temperature = self.rollout.temperature
        tolerance = self.rollout.vllm_probe_tolerance or trust.TOLERANCE[self.dtype]
        scored = self._score(probes, temperature)
        differences = [trust.probe_difference(p, ours) for p, ours in zip(probes, scored, strict=True)]
        wrong = [i for i, d in enumerate(differences) if not d["mean"] <= tolerance]
        if wrong := sorted({i for on_one in gather_object([wrong]) for i in on_one}):
            first = wrong[0]
            fits = {t: self._score(probes, t)[first] for t in trust.TEMPERATURES}
            raise BackendFailed(
                trust.wrong_distribution(probes[first], differences[first], tolerance, temperature, fits)
            )
        return {
            "sampling/probe_logp_difference/mean": max(d["mean"] for d in differences),
            "sampling/probe_logp_difference/max": max(d["max"] for d in differences),
        }

    @torch.no_grad()
    def _score(self, probes: list[trust.Probe], temperature: float) -> list[list[list[float]]]:
        """The policy's log-probabilities of the probes' tokens, at a temperature."""
        sequences = [
            TrainedSequence(p.prompt_ids, ids, given, advantage=0.0)
            for p in probes
            for ids, given in zip(p.token_ids, p.logprobs, strict=True)
        ]
        batch = self.policy.collate(sequences)
        model = self.policy.model
        was_training = model.training
        model.eval()
        logps_BT = self.policy.logprobs(batch, temperature)[0].cpu()
        model.train(was_training)
        rows = iter(logps_BT[row, : len(s.completion_ids)].tolist() for row, s in enumerate(sequences))
        return [[next(rows) for _ in p.token_ids] for p in probes]

    def _everywhere(self, work: Callable[[], T]) -> list[T]:
        """The results of ``work``, process by process. A RunError or UserError of one is raised on all."""
        value: Any = None
        failure: Exception | None = None
        try:
            value = work()
        except (RunError, UserError) as error:
            failure = error
        outcomes = gather_object([(value, failure)])
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [value for value, _ in outcomes]


class _Landing:
    """Collects the completions of a rollout by request, and calls ``on_group`` with each request that is complete."""

    def __init__(self, requests: list[Request], completion: Callable[[Any], Completion], on_group: OnGroup | None):
        self.places = [(i, g) for i, request in enumerate(requests) for g in range(len(request.keys))]
        self.size = len(self.places)
        self.groups: list[list[Any]] = [[None] * len(request.keys) for request in requests]
        self.left = [len(request.keys) for request in requests]
        self.completion, self.on_group = completion, on_group

    def missing(self) -> list[int]:
        return [n for n, (i, g) in enumerate(self.places) if self.groups[i][g] is None]

    def land(self, asked: list[int], coming: Answers) -> str | None:
        """Wait for the completions that were asked for and put them in their places. If some are lost, returns why."""
        why = None
        for n, answer in coming:
            if isinstance(answer, Lost):
                why = answer.why
                continue
            i, g = self.places[asked[n]]
            self.groups[i][g] = self.completion(answer)
            self.left[i] -= 1
            if self.on_group is not None and not self.left[i]:
                self.on_group(i, self.groups[i])
        return why
