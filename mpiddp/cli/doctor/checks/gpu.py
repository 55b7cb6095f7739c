"""GPUs: whether PyTorch can use them, whose is which, and how gradients leave them."""

from __future__ import annotations

from collections.abc import Iterator

from ..facts import Facts, Job
from ..finding import Finding, note, on_ranks, warning

__all__ = ["CHECKS"]


def pytorch_sees_them(job: Job) -> Iterator[Finding]:
    """GPUs in the machine, and none for PyTorch."""
    found: dict[str, list[int]] = {}
    for each in job.ranks:
        if each.machine.has_gpu_files and not each.gpu.seen.gpus and each.gpu.seen.why:
            found.setdefault(each.gpu.seen.why, []).append(each.rank)
    for why, ranks in found.items():
        cure = "see `nvidia-smi`, and CUDA_VISIBLE_DEVICES of these ranks"
        if "built without CUDA" in why:
            cure = "install PyTorch's CUDA build, without the index of the CPU build"
        yield warning("gpu-unusable", f"there are GPUs, and none to use {on_ranks(ranks)}: {why}", cure)


def every_rank_has_one(job: Job) -> Iterator[Finding]:
    """Ranks without a GPU on a node where others have one; ranks that share one."""
    for ranks in job.nodes().values():
        having = [each for each in ranks if each.gpu.index is not None]
        lacking = [each.rank for each in ranks if each.gpu.index is None]
        if having and lacking:
            yield warning(
                "gpu-missing",
                f"{on_ranks(lacking)[3:]} see no GPU on {ranks[0].host}, the others do",
                "give each rank one: under Slurm `--gpus-per-task=1 --gpu-bind=none`; look at CUDA_VISIBLE_DEVICES",
            )
        for uuid, users in _users(having).items():
            if len(users) > 1:
                yield warning(
                    "gpu-shared",
                    f"{on_ranks(users)[3:]} share GPU-{uuid} on {ranks[0].host} and take turns on it",
                    "start as many ranks on a node as it has GPUs "
                    + ("(`mpirun --map-by ppr:N:node`)" if job.is_open_mpi else "(`mpiexec -ppn N`)"),
                )


def _users(ranks: list[Facts]) -> dict[str, list[int]]:
    users: dict[str, list[int]] = {}
    for each in ranks:
        if each.gpu.gpu is not None:
            users.setdefault(each.gpu.gpu.uuid, []).append(each.rank)
    return users


def they_reach_each_other(job: Job) -> Iterator[Finding]:
    """GPUs of one node that cannot read each other's memory, or that no rank can know of."""
    for ranks in job.nodes().values():
        placed = [each for each in ranks if each.gpu.index is not None]
        if len(_users(placed)) < 2:
            continue
        blind = [each for each in placed if len(each.gpu.seen.gpus) == 1]
        if blind:
            yield note(
                "gpu-one-visible",
                f"on {ranks[0].host} {on_ranks(e.rank for e in blind)[3:]} see one GPU each, so whether GPUs reach "
                "each other's memory cannot be told here, and opening it may be refused",
                "show all GPUs to all ranks (under Slurm `--gpu-bind=none`); mpiddp.local_device() finds each its own",
            )
            continue
        apart = _apart(placed)
        if apart:
            yield note(
                "gpu-no-peer-access",
                f"on {ranks[0].host} GPUs of ranks {', '.join(f'{a} and {b}' for a, b in apart[:6])} cannot read each "
                "other's memory: exchanges between them go by way of the host",
                "where NVLink or one PCIe root should join them: `nvidia-smi topo -p2p r`, and IOMMU or ACS settings",
            )


def _apart(ranks: list[Facts]) -> list[tuple[int, int]]:
    """Pairs of ranks whose GPUs do not reach each other. Each sees all, so one side's list tells of both."""
    found = []
    for index, one in enumerate(ranks):
        number = {gpu.uuid: n for n, gpu in enumerate(one.gpu.seen.gpus)}
        for other in ranks[index + 1 :]:
            own, theirs = one.gpu.gpu, other.gpu.gpu
            if own and theirs and own.uuid != theirs.uuid and number.get(theirs.uuid) not in own.peers:
                found.append((one.rank, other.rank))
    return found


def mpi_takes_their_memory(job: Job) -> Iterator[Finding]:
    """CUDA-aware or not, and why."""
    with_gpu = [each for each in job.ranks if each.gpu.index is not None]
    answer = job.ranks[0].cuda_aware
    if not with_gpu or not answer.why:
        return
    if answer.yes:
        yield note("cuda-aware", f"MPI takes GPUs' memory as it is: {answer.why}")
        return
    kind = warning if job.ranks[0].settings.get("cuda_aware") else note
    which = "tensors on GPUs go by way of host memory where ranks do not map each other's"
    for way in ("CUDA IPC", "NCCL"):
        if job.pairs and all(way in pair.way for pair in job.pairs):
            which = f"large tensors on GPUs go by {way} (and MPI does not take them)"
    yield kind("cuda-aware", f"{which}: {answer.why}", answer.cure)


def nccl_is_used(job: Job) -> Iterator[Finding]:
    """Asked for, and not followed."""
    if job.ranks[0].settings.get("local") != "nccl":
        return
    near = [pair for pair in job.pairs if len({job.ranks[rank].node for rank in pair.ranks}) == 1]
    apart = [pair.ranks for pair in near if "GPUs:" in pair.way and "GPUs: NCCL" not in pair.way]
    if apart:
        yield warning(
            "nccl-unused",
            f"MPIDDP_LOCAL=nccl is not followed between ranks {', '.join(f'{a} and {b}' for a, b in apart[:6])}; the "
            "warning above says why",
            "a GPU for each rank, cupy (the extra cuda12 or cuda13) and its libnccl.so.2 on all; or unset MPIDDP_LOCAL",
        )


CHECKS = (pytorch_sees_them, every_rank_has_one, they_reach_each_other, mpi_takes_their_memory, nccl_is_used)
