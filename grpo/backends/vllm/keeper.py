"""One process's care for its servers: wait for them, restart an engine, hand over weights, check them."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grpo.backends.base import Sampling
from grpo.backends.vllm import trust
from grpo.backends.vllm.api import Server, ServerGone
from grpo.backends.vllm.completions import adapter_name, generate_payload, logprobs_of
from grpo.backends.vllm.pool import Pool
from grpo.backends.vllm.process import EngineProcess, adapters_held
from grpo.backends.vllm.transfer import HttpSender, Sender, on_each, servers_elsewhere
from grpo.config import Recipe
from grpo.errors import BackendFailed, UserError
from grpo.model.devices import DTYPES
from grpo.model.policy import Policy
from grpo.randomness import Stream, key

log = logging.getLogger("grpo")

SECONDS_BETWEEN_TRIES = 0.5

State = dict[str, torch.Tensor]


class Keeper:
    """Gives weights to ``servers``. A process that keeps none still takes part in gathering the weights.

    ``engine`` is the process of a colocated engine, which is then the only server.
    """

    def __init__(
        self,
        recipe: Recipe,
        pool: Pool,
        servers: list[Server],
        engine: EngineProcess | None,
        sender: Sender,
        scratch: Path,
        rank: int,
    ):
        self.recipe, self.rollout, self.rank = recipe, recipe.rollout, rank
        self.pool, self.servers, self.engine, self.sender, self.scratch = pool, servers, engine, sender, scratch
        self.dtype = DTYPES[self.rollout.vllm_dtype or recipe.model.dtype]
        self.adapters = recipe.sends_adapters()
        self.uploads = isinstance(sender, HttpSender) or servers_elsewhere(recipe)
        self.reached: list[Server] = []  # servers of this hand-over; the pool has them up after it
        self.has_base: set[str] = set()  # servers that hold the frozen weights (with adapters)
        # Asleep, an engine keeps only weights that the next sync does not bring.
        self.level = 1 if self.adapters else 2
        self.met = False  # all servers have been up once

    # ---------------------------------------------------------------- up and down

    def reach(self, version: int, deadline: float) -> None:
        """Wait until a server answers, the first time until all do, and check the settings of those that are back.

        Raises:
            BackendFailed: the deadline passed, an engine ended while it started, or a server came back with settings
                that training cannot use.
            UserError: a server has such settings the first time.
        """
        if not self.servers:
            return
        where = f"rank {self.rank}, step {version}"
        if self.engine is not None and not self.met:
            log.info("waiting for the vllm engine to start; its log is %s", self.engine.log)
        self._restart_hung_engine()
        while True:
            self._watch_engine(where)
            answering = [server for server in self._answering() if self._fits(server)]
            if len(answering) >= (1 if self.met else len(self.servers)):
                break
            limit, key = self._limit(deadline)
            if time.monotonic() > limit:
                missing = ", ".join(s.url for s in self.servers if s not in answering)
                raise BackendFailed(
                    f"{where}: vllm server {missing} did not answer within rollout.{key} "
                    f"({getattr(self.rollout, key):g} s); last error: {self.pool.last_error()}{self._log_tail()}"
                )
            time.sleep(SECONDS_BETWEEN_TRIES)
        for server in answering:
            if server.url in self.pool.down:
                self.has_base.discard(server.url)
                if self.met:
                    log.warning("vllm server %s is back; it gets the weights of step %d", server.url, version)
        self.reached = answering

    def wait_to_retry(self, version: int, deadline: float) -> None:
        """After a hand-over that left a process without servers. Raises BackendFailed past the deadline."""
        if self.servers and not self.reached and time.monotonic() > deadline:
            urls = ", ".join(server.url for server in self.servers)
            raise BackendFailed(
                f"rank {self.rank}, step {version}: vllm server {urls} answers but did not take the weights within "
                f"rollout.vllm_server_timeout ({self.rollout.vllm_server_timeout:g} s); last error: "
                f"{self.pool.last_error()}{self._log_tail()}"
            )
        time.sleep(SECONDS_BETWEEN_TRIES)

    def sleep(self) -> None:
        """Have the servers give up their memory. ``hold`` and ``open`` wake them."""
        self._on(self._live(), lambda server: server.sleep(self.level, self.rollout.vllm_sync_timeout))

    def close(self) -> None:
        if self.engine is not None:
            self.engine.stop()

    def _limit(self, deadline: float) -> tuple[float, str]:
        """When to give up on who does not answer, and the key that says so: an engine that starts gets longer."""
        if self.engine is not None and self.engine.starting:
            return self.engine.started + self.rollout.vllm_start_timeout, "vllm_start_timeout"
        return deadline, "vllm_server_timeout"

    def _answering(self) -> list[Server]:
        failed = self.pool.run(on_each(self.servers, lambda server: server.check_health()))
        for server in self.servers:
            if server.url in failed and server.url in self.pool.down:
                self.pool.down[server.url] = failed[server.url]
        answering = [server for server in self.servers if server.url not in failed]
        if self.engine is not None and answering:
            self.engine.starting = False
        return answering

    def _watch_engine(self, where: str) -> None:
        """Restart a colocated engine that has ended. Raises BackendFailed if it never answered."""
        code = self.engine.exit_code() if self.engine else None
        if self.engine is None or code is None:
            return
        if self.engine.starting:
            raise BackendFailed(
                f"{where}: the vllm engine ended with code {code} while starting (rollout.backend: hf samples without "
                f"one){self._log_tail()}"
            )
        log.warning("%s: the vllm engine ended with code %d; starting it again", where, code)
        self.engine.start()

    def _restart_hung_engine(self) -> None:
        """Restart an engine that runs but does not answer: it will not come back by itself."""
        engine = self.engine
        if engine is None or not self.met or not self.pool.down or engine.starting or engine.exit_code() is not None:
            return
        if not self._answering():
            log.warning("the vllm engine of rank %d does not answer; starting it again", self.rank)
            engine.stop()
            engine.start()

    def _log_tail(self) -> str:
        return f". The end of {self.engine.log}:\n{self.engine.last_lines()}" if self.engine else ""

    # ---------------------------------------------------------------- weights

    # In three calls, between which processes hear of each other's errors: within ``hand_over`` they exchange handles.
    # Servers that fail are marked down.

    def hold(self, asleep: bool) -> None:
        """Stop the servers that were reached. Where they are ``asleep``, they take memory back, for weights alone."""
        timeout = self.rollout.vllm_sync_timeout

        async def stop(server: Server) -> None:
            if asleep:
                await server.wake_weights(timeout)
            await server.pause(timeout)

        self._on(self.reached, stop)

    def hand_over(self, policy: Policy, version: int, state: State, adapter: State) -> None:
        """Give weights to the servers, label and check them."""
        timeout = self.rollout.vllm_sync_timeout
        targets = [s for s in self.reached if s.url not in self.has_base]
        self._drop(self.sender.send(targets, state, self.dtype))
        if self.adapters:
            self.has_base |= {s.url for s in targets if s in self.reached}
            self._give_adapter(policy, version, adapter)

        async def look(server: Server) -> list[dict[str, Any]]:
            await server.label(0 if self.adapters else version)
            await server.forget_prefixes()
            return await server.fingerprint(timeout)

        for server, found in self._on(self.reached, look).items():
            self._check_weights(server, version, found, state)

    def open(self, policy: Policy, version: int, asleep: bool) -> list[trust.Probe]:
        """Let the servers sample, and return their probes. Where they were ``asleep``, they take memory back for keys
        and values first: until now the trainer had it for the weights and their comparison."""
        timeout = self.rollout.vllm_sync_timeout

        async def probe(server: Server) -> trust.Probe:
            if asleep:
                await server.wake_cache(timeout)
            await server.resume()
            return await self._probe(server, policy, version)

        probes = list(self._on(self.reached, probe).values())
        self.met = self.met or bool(probes)
        return probes

    def _give_adapter(self, policy: Policy, version: int, adapter: State) -> None:
        """Load this version's adapter. Those that completions in flight may still use stay: ``adapters_held`` in all.

        A server may hold an adapter of this name already, from before it was lost or from a run that is resumed.
        """
        if not self.reached:
            return
        name, before = adapter_name(version), adapter_name(version - adapters_held(self.rollout))
        timeout = self.rollout.vllm_sync_timeout
        shutil.rmtree(self.scratch / before, ignore_errors=True)
        folder = policy.save_adapter(self.scratch / name, adapter, self.dtype)

        async def load(server: Server) -> list[dict[str, Any]]:
            await server.unload_adapter(before)
            await server.unload_adapter(name)
            if self.uploads:
                await server.forget_upload(before)
            there = await server.upload(folder, timeout) if self.uploads else str(folder)
            await server.load_adapter(name, there, timeout)
            return await server.adapter_fingerprint(timeout)

        lora = self.recipe.model.lora
        assert lora is not None
        for server, found in self._on(self.reached, load).items():
            if different := trust.adapter_problems(found[0], adapter, lora.lora_alpha / lora.r, self.dtype):
                raise BackendFailed(trust.different_weights(server.url, version, different, len(adapter)))

    def _live(self) -> list[Server]:
        return [server for server in self.servers if server.url not in self.pool.down]

    def _on(self, servers: list[Server], work: Callable[[Server], Any]) -> dict[Server, Any]:
        """The results of ``work`` by server. Servers that break off are marked down."""
        results: dict[Server, Any] = {}

        async def keep(server: Server) -> None:
            results[server] = await work(server)

        self._drop(self.pool.run(on_each(servers, keep)))
        return results

    def _drop(self, failed: dict[str, str]) -> None:
        for server in self.servers:
            if server.url in failed:
                self.pool.mark_down(server, failed[server.url])
                self.has_base.discard(server.url)
        self.reached = [server for server in self.reached if server.url not in failed]

    # ---------------------------------------------------------------- trust

    def _fits(self, server: Server) -> bool:
        """Whether a server that is new or back tells its settings. Raises if training cannot use them."""
        if server.url not in self.pool.down:
            return True

        async def ask() -> tuple[str, dict[str, Any]]:
            return await server.version(), await server.settings()

        try:
            version, settings = self.pool.run(ask())
        except ServerGone as why:
            self.pool.down[server.url] = str(why)
            return False
        dtype, length = str(self.dtype).removeprefix("torch."), self.recipe.longest_sequence()
        if problems := trust.settings_problems(version, settings, dtype=dtype, length=length, adapters=self.adapters):
            cure = "launch/vllm_serve.sh starts one that fits"
            raise (BackendFailed if self.met else UserError)(
                "\n".join(f"vllm server {server.url}: {problem}. {cure}" for problem in problems)
            )
        return True

    def _check_weights(self, server: Server, version: int, found: list[dict[str, Any]], state: State) -> None:
        different, unknown = trust.fingerprint_problems(found, state, self.dtype)
        if different:
            compared = len(found[0]) - len(unknown)
            raise BackendFailed(trust.different_weights(server.url, version, different, compared))
        if unknown and not self.met:
            shown = ", ".join(unknown[:3])
            log.warning("%d of %d engine parameters cannot be compared by name: %s", len(unknown), len(found[0]), shown)

    async def _probe(self, server: Server, policy: Policy, version: int) -> trust.Probe:
        """Sample as rollouts do, but past any end, and without truncation, which scoring a probe leaves out."""
        length = self.recipe.longest_sequence()
        prompt_ids = policy.tokenizer.encode(trust.PROBE_TEXT, add_special_tokens=False)[: length // 2]
        sampling = Sampling(min(trust.PROBE_TOKENS, length - len(prompt_ids)), temperature=self.rollout.temperature)
        adapter = adapter_name(version) if self.adapters else None
        answers = await asyncio.gather(
            *(
                server.generate(
                    generate_payload(
                        prompt_ids,
                        key(self.recipe.training.seed, Stream.PROBE.value, version, i),
                        sampling,
                        [],
                        version=version,
                        model=adapter,
                    ),
                    self.rollout.vllm_sync_timeout,
                )
                for i in range(trust.PROBES)
            )
        )
        token_ids, logprobs = [answer["token_ids"] for answer in answers], [logprobs_of(answer) for answer in answers]
        return trust.Probe(server.url, prompt_ids, token_ids, logprobs)
