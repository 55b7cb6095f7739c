"""The command line: arguments, tables, bandwidths, files. No MPI, no measuring."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from mpiddp.cli import command, main
from mpiddp.cli.bench import contenders, gpu, memory, place, plot, reduce, sizes, table, train
from mpiddp.cli.bench.timing import Limits, Timed, Timing, interleaved
from mpiddp.cli.main import commands, parser


def parsed(*arguments: str) -> Any:
    return parser().parse_args(["bench", *arguments])


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said when these arguments end the command with code 2."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_bench_is_a_command_with_a_summary() -> None:
    assert "bench" in [c.name for c in commands()]
    assert all(c.summary and c.description for c in commands())


def test_a_wrong_command_gets_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: mpiddp" in ended(capsys)
    words = ended(capsys, "fly")
    assert "usage: mpiddp" in words and "'fly'" in words and "bench" in words


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["bench", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert not end.value.code
        assert "mpiddp" in capsys.readouterr().out


def test_only_the_first_rank_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "is_first_rank", lambda: False)
    assert ended(capsys, "bench", "--peers", "nccl") == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peers", "gloo,nccl"], "nccl: no such peer; there are gloo, mpi"),
        (["--sizes", "4,many"], "'many' is no size"),
        (["--dtype", "bool"], "there are bfloat16, complex128"),
        (["--rounds", "0"], "'0' is not a positive number"),
        (["--rounds", "1.5"], "'1.5' is not a whole number"),
        (["--rounds", "inf"], "'inf' is not a positive number"),
        (["--models", "bert"], "bert: no such model; there are mlp, gpt, small"),
        (["--train", "--memory", "mpiddp"], "not allowed with"),
        (["--train", "--plot", "x.png"], "--plot draws all-reduces"),
        (["--memory", "ddp", "--models", "mlp,gpt"], "--memory takes one of --models"),
        (["--train", "--device", "cuda"], "--device cuda measures all-reduces"),
        (["--device", "tpu"], "'tpu'"),
    ],
)
def test_wrong_arguments_are_explained(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in ended(capsys, "bench", *arguments)


def test_slurm_starts_a_script_as_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "--nodes", "2", "train.py", "--lr", "1"]) == 0
    assert "\n    python train.py --lr 1\n" in capsys.readouterr().out


def test_arguments() -> None:
    given = parsed("--peers", "mpi", "--sizes", "4,4K,1.5M", "--dtype", "bfloat16", "--rounds", "7", "--csv", "a.csv")
    assert given.peers == ["mpi"] and given.sizes == [4, 4096, 3 << 19] and given.dtype == torch.bfloat16
    assert given.rounds == 7 and given.csv == Path("a.csv") and not given.train
    assert parsed("--peers", "").peers == []
    default = parsed()
    assert default.peers == ["gloo", "mpi"] and default.sizes[0] == 4 and default.sizes[-1] == 256 << 20
    assert {1 << 20, 32 << 20, 100 << 20} <= set(default.sizes) and default.dtype == torch.float32


@pytest.mark.parametrize("text", ["", "K", "0", "1.0001K", "-4", "4X", "nan", "inf"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        sizes.parse_size(text)


def test_sizes_as_people_write_them() -> None:
    assert [sizes.parse_size(text) for text in ("4", "4k", "4KB", "4 KiB", "2G")] == [4, 4096, 4096, 4096, 2 << 30]
    assert [sizes.size_text(n) for n in (4, 4096, 100 << 20, 3 << 29)] == ["4 B", "4 KiB", "100 MiB", "1.5 GiB"]


def test_bandwidths_are_those_of_nccl_tests() -> None:
    assert sizes.algorithm_bandwidth(10**9, 0.5) == 2.0
    assert sizes.bus_bandwidth(10**9, 0.5, 2) == 2.0
    assert sizes.bus_bandwidth(10**9, 0.5, 4) == 3.0
    assert sizes.bus_bandwidth(10**9, 0.5, 1) == 0.0


def test_blocks_shrink() -> None:
    calls = [sizes.calls_in_block(nbytes) for nbytes in sizes.DEFAULT_SIZES]
    assert calls[0] == 200 and calls == sorted(calls, reverse=True)
    assert [sizes.calls_in_block(n << 20) for n in (1, 32, 100, 256)] == [4, 4, 2, 1]


TIMINGS = {
    "mpiddp": Timing(2e-3, 3e-3),
    "mpiddp shared": Timing(0.5e-3, 0.5e-3),
    "gloo": Timing(8e-3, 9e-3),
    "x.add_(y)": Timing(1e-3, 1e-3),
}
OPS = dict.fromkeys(TIMINGS, "sum") | {"x.add_(y)": "add"}


def test_rows_of_all_reduces() -> None:
    own, shared, gloo, add = reduce.rows(TIMINGS, OPS, 1000_000, torch.float32, 4)
    assert (own["size_bytes"], own["count"], own["dtype"], own["ranks"]) == (4_000_000, 1_000_000, "float32", 4)
    assert (own["time_us"], own["mean_us"], own["algbw_GBs"], own["busbw_GBs"]) == (2000.0, 3000.0, 2.0, 3.0)
    assert (own["time_over_mpiddp"], gloo["time_over_mpiddp"], add["time_over_mpiddp"]) == (1.0, 4.0, 0.5)
    assert (own["time_over_shared"], shared["time_over_shared"], gloo["time_over_shared"]) == (4.0, 1.0, 16.0)
    assert add["busbw_GBs"] is None and add["op"] == "add"


def test_rows_of_all_reduces_on_gpus() -> None:
    more = {"copy to host": Timing(4e-4, 4e-4), "p2p staged": Timing(5e-4, 5e-4)}
    base = reduce.rows({**TIMINGS, **more}, {**OPS, **dict.fromkeys(more, "copy")}, 1000_000, torch.float32, 4)
    kernels = {"mpiddp": 1e-4, "mpiddp shared": 2e-5, "gloo": None, "x.add_(y)": 1e-5, **dict.fromkeys(more)}
    own, shared, gloo, add, copy, p2p = gpu.rows(base, kernels, "mapped", True)
    assert (own["kernel_us"], own["kernel_GBs"], shared["kernel_GBs"]) == (100.0, 80.0, 400.0), "8 MB in two shots"
    assert add["kernel_GBs"] == 1200.0 and gloo["kernel_us"] is None and (own["way"], gloo["way"]) == ("mapped", None)
    assert copy["busbw_GBs"] is None and p2p["time_over_copy"] == 1.25 and copy["time_over_copy"] is None
    assert p2p["time_over_mpiddp"] is None and p2p["algbw_GBs"] == 8.0
    assert gpu.rows(base, kernels, "staged", True)[0]["kernel_us"] is None
    assert gpu.rows(base, kernels, "mapped", False)[0]["kernel_us"] is None
    assert gpu.kernel_nbytes("mpiddp", 1 << 10, 4) == 5 << 10


def test_rows_of_training_steps() -> None:
    timings = {"local": Timing(0.1, 0.1), "mpiddp": Timing(0.13, 0.2), "DDP over gloo": Timing(0.2, 0.2)}
    local, own, ddp = train.rows(timings, "mlp", 17, "sgd", 2)
    assert (local["step_ms"], local["over_local"], local["above_local_ms"]) == (100.0, 1.0, None)
    assert (own["above_local_ms"], own["over_local"], own["of_what_ddp_adds"]) == (30.0, 1.3, 0.3)
    assert ddp["of_what_ddp_adds"] is None
    alone = train.rows({name: timings[name] for name in ("local", "mpiddp")}, "mlp", 17, "sgd", 2)
    assert alone[1]["of_what_ddp_adds"] is None, "there is no DDP to compare with"


def test_a_line_has_the_head_s_columns() -> None:
    rows = reduce.rows(TIMINGS, OPS, 1024, torch.float32, 2)
    head, *lines = [table.head(reduce.COLUMNS), *(table.line(reduce.COLUMNS, row) for row in rows)]
    assert "time us" in head and "/ mpiddp" in head
    assert {len(text) for text in (head, *lines)} == {len(head)}
    assert lines[0].split()[:5] == ["4", "KiB", "1024", "float32", "sum"]
    assert " - " in lines[3], "a local addition has no bus bandwidth"


def test_the_csv_file_has_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(table, "say", said.append)
    rows = reduce.rows(TIMINGS, OPS, 1024, torch.float32, 2)
    with table.Report(reduce.COLUMNS, tmp_path / "a.csv", True) as report:
        for row in rows:
            report.add(row)
    with (tmp_path / "a.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["time_us"]) for row in read] == [row["time_us"] for row in rows]
    assert read[3]["busbw_GBs"] == "" and len(said) == 1 + len(rows)
    assert list(read[0]) == [column.name for column in reduce.COLUMNS]


def test_a_csv_file_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--csv .*a\.csv cannot be written: No such file"):
        table.Report(reduce.COLUMNS, tmp_path / "missing" / "a.csv", True)
    table.Report(reduce.COLUMNS, tmp_path / "missing" / "a.csv", False)  # another rank writes nothing


def test_what_is_plotted() -> None:
    rows = [row for n in (1, 1024) for row in reduce.rows(TIMINGS, OPS, n, torch.float32, 2)]
    assert plot.series(rows, "time_us")["gloo"] == ([4, 4096], [8000.0, 8000.0])
    assert "x.add_(y)" not in plot.series(rows, "busbw_GBs")


def test_without_matplotlib_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'mpiddp[plot]'" in str(plot.problem())


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row for n in (1, 1024) for row in reduce.rows(TIMINGS, OPS, n, torch.float32, 2)]
    plot.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


class Alone:
    """The communicator of a world of one."""

    def Barrier(self) -> None:  # noqa: N802
        pass

    def allgather(self, value: Any) -> list[Any]:
        return [value]


def test_everybody_has_a_turn_and_the_order_moves_on() -> None:
    order: list[str] = []

    def timed(name: str) -> Timed:
        return Timed(name, lambda: order.append(name) or [lambda: None] * 3)  # type: ignore[func-returns-value]

    found = interleaved([timed("a"), timed("b")], Limits(rounds=3, seconds=60), Alone())
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"], "one round to warm up and three"
    assert set(found) == {"a", "b"} and all(0 <= timing.median < 1 for timing in found.values())


def test_the_time_limit_leaves_enough_rounds_for_a_median() -> None:
    rounds = []
    interleaved([Timed("a", lambda: rounds.append(1) or [int, int])], Limits(rounds=100, seconds=1e-9), Alone())  # type: ignore[func-returns-value]
    assert len(rounds) == 6


def test_a_wrong_sum_is_noticed() -> None:
    here = place.Place(0, 1, Alone())
    right = contenders.Contender("right", lambda tensor: lambda: None)
    contenders.check(right, here, 10, torch.bfloat16)  # in a world of one the sum is what there was
    wrong = contenders.Contender("wrong", lambda tensor: lambda: tensor[7:].add_(1))
    with pytest.raises(
        RuntimeError, match=r"sum by wrong .* at 3 places: on rank 0 element 7 is 2\.0, it should be 1\.0"
    ):
        contenders.check(wrong, here, 10, torch.float32)


def test_fresh_tensors_and_some_that_are_reused() -> None:
    seen: list[torch.Tensor] = []
    fresh = contenders.Contender("a", lambda tensor: seen.append(tensor) or (lambda: None))  # type: ignore[func-returns-value]
    sweep = torch.zeros(8, dtype=torch.uint8)
    contenders.block_of(fresh, 5, torch.float32, 3, sweep).block()
    assert len({tensor.data_ptr() for tensor in seen}) == 4 and sweep.tolist() == [1] * 8
    reused = contenders.Contender("b", fresh.call, is_fresh=False)
    del seen[:]
    timed = contenders.block_of(reused, 5, torch.float32, 3, None)
    assert len(timed.block()) == 4
    seen[0].fill_(9)
    timed.block()
    assert [a is b for a, b in zip(seen[:4], seen[4:], strict=True)] == [True] * 4 and seen[0].tolist() == [0] * 5


def test_the_machine_is_described(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert place.cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert place.cpu_model(tmp_path / "none")
    for index, size in enumerate(("48K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert place.cache_nbytes(tmp_path) == 32 << 20
    assert place.cache_nbytes(tmp_path / "none") > 0


def test_the_peak_is_seen() -> None:
    with memory.Peak() as peak:
        before = peak.nbytes
        block = torch.zeros(16 << 20, dtype=torch.uint8).fill_(1)
        del block
    assert peak.nbytes >= before
    assert memory.pss_nbytes() > 1 << 20
