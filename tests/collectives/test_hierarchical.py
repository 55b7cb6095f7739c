"""Two levels: equal to the naive result for any shape of the world, with and without shared memory in the nodes, and
each node sends each byte once."""

from __future__ import annotations

import pytest
import torch

from mpiddp.collectives import ReduceOp, hierarchical, select
from mpiddp.dtypes import REDUCIBLE
from mpiddp.transport.among import Among
from mpiddp.transport.base import Levels
from tests.collectives.test_allreduce import OPS, contribution, expected
from tests.simulated_node import nodes
from tests.simulation import Network, SimulatedLink, run

WORLDS = [(2, 2), (2, 3), (3, 2), (4, 2), (2, 4)]


def layered(network: Network, node_count: int, local_size: int, has_memory: bool) -> list[SimulatedLink]:
    """Ranks go round over the nodes, as a scheduler may place them."""
    links = network.links()
    local = {number: [r for r in range(network.size) if r % node_count == number] for number in range(node_count)}
    memories = {number: nodes(local_size) if has_memory else [None] * local_size for number in local}
    for link in links:
        number, place = link.rank % node_count, link.rank // node_count
        cross = [members[place] for members in local.values()]
        link.levels = Levels(Among(link, local[number], memories[number][place]), Among(link, cross))
    return links


def check(
    shape: tuple[int, int], has_memory: bool, numel: int, dtype: torch.dtype, op: ReduceOp, scale: float, seed: int
) -> Network:
    size = shape[0] * shape[1]
    network = Network(size, seed)
    flats = [contribution(rank, numel, dtype) for rank in range(size)]
    run(
        network,
        [
            hierarchical.allreduce(link.levels, flats[link.rank], op, 7, scale, segment_nbytes=64, part_nbytes=512)
            for link in layered(network, *shape, has_memory)
            if link.levels is not None
        ],
    )
    assert network.idle()
    want = expected(size, numel, dtype, op, scale)
    for rank, flat in enumerate(flats):
        assert torch.equal(flat, want), f"rank {rank}, {shape}, {numel} x {dtype}, {op.name}"
    return network


@pytest.mark.parametrize("has_memory", [True, False])
@pytest.mark.parametrize("shape", WORLDS)
def test_every_length(shape: tuple[int, int], has_memory: bool) -> None:
    for numel in (0, 1, 5, 64, 127, 128, 129, 500, 1000):
        check(shape, has_memory, numel, torch.float32, ReduceOp.SUM, 0.5, seed=numel)


@pytest.mark.parametrize("dtype", sorted((d for d in REDUCIBLE if not d.is_complex), key=str), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_op_and_dtype(op: ReduceOp, dtype: torch.dtype) -> None:
    check((2, 2), True, 700, dtype, op, 1.0, seed=3)


@pytest.mark.parametrize("seed", range(20))
def test_any_schedule(seed: int) -> None:
    check(WORLDS[seed % len(WORLDS)], seed % 2 == 0, 900, torch.float64, ReduceOp.SUM, 1.0, seed)


@pytest.mark.parametrize("shape", WORLDS)
def test_every_node_sends_each_byte_once(shape: tuple[int, int]) -> None:
    count, local_size = shape
    numel = 128 * count * local_size
    network = check(shape, True, numel, torch.float32, ReduceOp.SUM, 1.0, 0)
    by_node = [sum(network.sent_elements[number::count]) for number in range(count)]
    assert sum(by_node) == 2 * numel * (count - 1)
    assert max(by_node) - min(by_node) <= 0.02 * numel  # chunks of segments differ by an element


def test_exchanges_one_after_the_other_in_one_slot_and_several_at_once() -> None:
    network = Network(4, 11)
    links = layered(network, 2, 2, has_memory=True)
    rounds = [[contribution(rank, 300 + k, torch.float32) for rank in range(4)] for k in range(6)]

    def several(link: SimulatedLink, tags: list[int]):  # type: ignore[no-untyped-def]
        assert link.levels is not None
        for k, tag in enumerate(tags):
            yield from hierarchical.allreduce(
                link.levels, rounds[k][link.rank], ReduceOp.SUM, tag, segment_nbytes=64, part_nbytes=256
            )

    run(network, [several(link, [0, 32, 64, 1, 33, 0]) for link in links])
    for k, flats in enumerate(rounds):
        assert all(torch.equal(flat, expected(4, 300 + k, torch.float32, ReduceOp.SUM, 1.0)) for flat in flats)


def test_when_it_is_chosen() -> None:
    def chosen(nbytes: int, wanted: str = "", is_shared: bool = False, is_layered: bool = True) -> str:
        return select.allreduce_by(nbytes, is_shared, wanted, is_layered)

    assert (chosen(1 << 20), chosen(1 << 10), chosen(1 << 10, "hierarchical")) == (
        "hierarchical",
        "doubling",
        "hierarchical",
    )
    assert (chosen(1 << 20, "ring"), chosen(1 << 20, "ordered"), chosen(1 << 20, is_layered=False)) == (
        "ring",
        "ordered",
        "ring",
    )
