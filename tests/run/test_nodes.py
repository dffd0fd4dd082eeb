"""What a launch over several nodes needs of the network; runs over nodes are in tests/several_nodes."""

from __future__ import annotations

import socket

import pytest

from grpo.errors import UserError
from grpo.run import nodes

ETH, DOCKER, FABRIC = {"10.0.0.5": "eth0"}, {"172.17.0.1": "docker0"}, {"fd00::5": "ib0"}


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch):
    """A launch over two nodes, seen from one: its interfaces, and its own address towards others."""
    for name in ("GLOO_SOCKET_IFNAME", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "node-a")

    def chosen(interfaces: dict[str, str], **towards: str) -> str | None:
        names = {"node-a": towards.get("first"), nodes.ELSEWHERE: towards.get("elsewhere")}
        monkeypatch.setattr(nodes, "_interfaces", lambda: interfaces)
        monkeypatch.setattr(nodes, "_address_towards", names.__getitem__)
        nodes.choose_interface()
        return nodes.os.environ.get("GLOO_SOCKET_IFNAME")

    return chosen


def test_gloo_listens_on_the_way_to_the_first_node(launch) -> None:
    assert launch(ETH | DOCKER | FABRIC, first="fd00::5", elsewhere="10.0.0.5") == "ib0"


def test_where_the_first_nodes_name_is_a_loopback_the_default_route_counts(launch) -> None:
    assert launch(ETH | DOCKER, first="127.0.0.1", elsewhere="10.0.0.5") == "eth0"


def test_the_only_network_needs_no_route(launch) -> None:
    assert launch(ETH, first="127.0.0.1") == "eth0"


def test_several_networks_without_a_route_are_told(launch) -> None:
    with pytest.raises(UserError, match=r"It has eth0 \(10\.0\.0\.5\), docker0 \(172\.17\.0\.1\)\. Name the interface"):
        launch(ETH | DOCKER, first="127.0.0.1")


def test_what_the_user_says_counts_and_one_node_needs_nothing(launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    assert launch(ETH, first="10.0.0.5") == "ib7"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch(ETH, first="10.0.0.5") is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")  # unset by the launcher
    assert launch(ETH, first="10.0.0.5") is None


def test_this_machines_own_interfaces() -> None:
    assert nodes._address_towards("127.0.0.1") == "127.0.0.1"
    assert nodes._address_towards("no such host.") is None
    found = nodes._interfaces()
    assert "127.0.0.1" not in found
    assert set(found.values()) <= {name for _, name in socket.if_nameindex()}
