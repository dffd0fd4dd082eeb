"""Nodes for tests: network namespaces with an address each, on a bridge that belongs to them alone.

A node has a host name, a ``/dev/shm``, a ``/etc/hosts`` and processes of its own, and shares the disk; folders can be
hidden from the others. As on Debian, its own name resolves to 127.0.1.1 on it, and the others' to their addresses.
Needs root and Linux.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.launching import environment

PREFIX = "gt"  # of namespaces and interfaces, whose names may have 15 characters; the process's number follows
_number = itertools.count()


@dataclass
class Node:
    """One node: ``start`` runs a command on it. ``kill`` and ``cut`` are its two ways to be lost."""

    name: str
    address: str
    namespace: str
    cable: str
    hosts: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *command: object, env: dict[str, str], hidden: tuple[Path, ...] = ()) -> subprocess.Popen[str]:
        """Start a command, with stderr joined to stdout. ``hidden`` folders are this node's own, and empty."""
        prepare = [
            "ip link set lo up",
            f"hostname {self.name}",
            f"mount --bind {shlex.quote(str(self.hosts))} /etc/hosts",
            *(f"mount -t tmpfs tmpfs {shlex.quote(str(folder))}" for folder in (Path("/dev/shm"), *hidden)),
        ]
        script = " && ".join(prepare) + ' && "$@"; exit $?'
        # The shell is the first process of its own process namespace: when it is killed, the kernel kills them all.
        inside = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *inside, "sh", *map(str, command)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """SIGKILL to everything that was started here. The kernel closes its connections."""
        for process in self.processes:
            process.kill()
            process.wait()

    def cut(self) -> None:
        """Pull the network cable. Nobody's TCP is told."""
        _ip("link", "set", self.cable, "down")


def launch(
    nodes: list[Node],
    kind: list[str],
    *arguments: object,
    per_node: int = 1,
    hidden: tuple[Path, ...] = (),
    but_second: tuple[str, ...] = (),
) -> list[subprocess.Popen[str]]:
    """``accelerate launch`` on each node, as a user types it there; ``per_node`` processes on each. Of ``hidden``
    folders all nodes but the first have others, which are empty. The second node is given arguments more."""
    common = [
        f"--num_machines={len(nodes)}",
        f"--num_processes={per_node * len(nodes)}",
        f"--main_process_ip={nodes[0].name}",
        "--main_process_port=29500",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", *kind, *common]
    return [
        node.start(
            *command,
            f"--machine_rank={rank}",
            *arguments,
            *(but_second if rank == 1 else ()),
            env=environment(),
            hidden=hidden if rank else (),
        )
        for rank, node in enumerate(nodes)
    ]


@contextmanager
def network(*names: str) -> Iterator[list[Node]]:
    """Nodes of these names, which reach each other and nothing else. All of it is gone in the end, whatever happens."""
    if problem := why_not():
        pytest.skip(problem)
    _sweep()
    tag = f"{PREFIX}{os.getpid()}x{next(_number)}"  # another each time: the kernel takes its time to remove them
    with ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory())
        _ip("link", "add", tag, "type", "bridge")
        undo.callback(_ip, "link", "del", tag)
        _ip("link", "set", tag, "up")
        nodes = [
            Node(name, f"10.77.0.{i + 1}", f"{tag}-{i}", f"{tag}h{i}", Path(folder) / name)
            for i, name in enumerate(names)
        ]
        for node in nodes:
            node.hosts.write_text(
                "127.0.0.1 localhost\n"
                + "".join(f"{'127.0.1.1' if other is node else other.address} {other.name}\n" for other in nodes)
            )
            _ip("netns", "add", node.namespace)
            undo.callback(_ip, "netns", "del", node.namespace)
            undo.callback(node.kill)
            inside = f"{tag}n{node.namespace[-1]}"
            _ip("link", "add", node.cable, "master", tag, "type", "veth", "peer", "name", inside)
            undo.callback(_ip, "link", "del", node.cable)
            _ip("link", "set", inside, "netns", node.namespace, "name", "eth0")
            _ip("link", "set", node.cable, "up")
            _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", "eth0")
            _ip("-n", node.namespace, "link", "set", "eth0", "up")
            _ip("-n", node.namespace, "link", "set", "lo", "up")
        yield nodes


@functools.cache
def why_not() -> str | None:
    """Why this machine cannot make nodes, in a sentence; None where it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "several nodes are network namespaces, and only root may make them"
    if missing := [tool for tool in ("ip", "unshare", "hostname") if shutil.which(tool) is None]:
        return f"several nodes are network namespaces, made by {missing[0]}, which is not installed"
    try:
        _ip("netns", "add", f"{PREFIX}{os.getpid()}x-t")
        _ip("link", "add", f"{PREFIX}{os.getpid()}xt", "type", "bridge")
    except RuntimeError as error:
        return f"several nodes are network namespaces, which this machine does not permit ({error})"
    finally:
        subprocess.run(["ip", "netns", "del", f"{PREFIX}{os.getpid()}x-t"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{PREFIX}{os.getpid()}xt"], capture_output=True, check=False)
    return None


def _sweep() -> None:
    """Remove what a test process left that was killed."""
    for kind, listing in (("netns", ["ip", "netns", "list"]), ("link", ["ip", "-o", "link", "show", "type", "bridge"])):
        found = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
        for name, number in set(re.findall(rf"\b({PREFIX}(\d+)x[-\w]*)", found)):
            if not Path(f"/proc/{number}").exists():
                _ip(kind, "del", name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
