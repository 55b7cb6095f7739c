"""Interfaces that lead to no other host, and what a user is told of them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mpiddp.config import Config
from mpiddp.launch import Launch, choose_settings, first_words
from mpiddp.launch.deadline import unreached
from mpiddp.launch.interfaces import Interface, interfaces, leading_nowhere, suspects

LOOPBACK, ETHERNET = Interface("lo", "127.0.0.1"), Interface("eth0", "10.0.0.5")
DOCKER, BRIDGE = Interface("docker0", "172.17.0.1", True), Interface("mine", "192.168.9.1", True)


def test_this_host_has_a_loopback() -> None:
    assert LOOPBACK in interfaces() or not Path("/proc/net/dev").read_text().count("lo:")


@pytest.mark.parametrize("name", ["docker0", "virbr0", "br-0123456789ab", "lxdbr0", "podman0", "cni0", "kube-ipvs0"])
def test_known_bridges_lead_nowhere(name: str) -> None:
    assert leading_nowhere([LOOPBACK, ETHERNET, Interface(name, "172.17.0.1")]) == [name]


@pytest.mark.parametrize("name", ["eth0", "enp3s0", "br0", "br-lan", "bond0", "ib0", "docker", "hsn0"])
def test_what_may_lead_to_other_hosts_stays(name: str) -> None:
    assert leading_nowhere([LOOPBACK, ETHERNET, Interface(name, "172.17.0.1")]) == []


def test_something_must_be_left() -> None:
    assert leading_nowhere([LOOPBACK, DOCKER]) == []


def test_mpi_is_told_unless_the_user_chose() -> None:
    def choose(**environ: str) -> str | None:
        settings = choose_settings(
            Config(), environ, (), Launch("open mpi", 0, 2), 8, node_interfaces=[LOOPBACK, ETHERNET, DOCKER]
        )
        return settings.get("OMPI_MCA_btl_tcp_if_exclude")

    assert choose() == "127.0.0.1/8,sppp,docker0"
    assert choose(OMPI_MCA_btl_tcp_if_include="docker0") is None
    assert choose(OMPI_MCA_btl_tcp_if_exclude="lo") is None


def test_a_peer_that_was_looked_for_at_an_own_address(tmp_path: Path) -> None:
    table = tmp_path / "tcp"
    table.write_text("  sl  local_address rem_address   st\n   0: 0500000A:1000 0500000A:2000 02 more\n")
    assert suspects([LOOPBACK, ETHERNET], [table]) == [ETHERNET]
    assert suspects([LOOPBACK, ETHERNET, BRIDGE], []) == [BRIDGE]


def test_the_deadline_names_the_interface_and_the_cure() -> None:
    text = unreached("rank 1", 5, [LOOPBACK, ETHERNET, BRIDGE], "Open MPI v5.0.8")
    assert "rank 1: no answer" in text and "mine (192.168.9.1) may be the wrong one" in text
    assert "--mca btl_tcp_if_include eth0 " in text
    text = unreached("rank 1", 5, [LOOPBACK, ETHERNET], "MPICH Version: 5.0.0")
    assert "-iface eth0 -genv FI_TCP_IFACE eth0 " in text and "mca" not in text.lower()


def test_the_deadline_ends_the_job_only_when_it_is_over() -> None:
    ended = threading.Event()
    with first_words(60, "rank 0", ended.set):
        pass
    assert not ended.is_set()
    with first_words(0.01, "rank 0", ended.set):
        assert ended.wait(10)
