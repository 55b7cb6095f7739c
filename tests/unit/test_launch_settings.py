"""What Open MPI is told before it starts."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpiddp import config, launch
from mpiddp.config import Config
from mpiddp.errors import ConfigError
from mpiddp.launch import Launch, choose_settings, mpi_is_wheel

TCP = {"btl_tcp_flags": "313", "btl_tcp_max_send_size": "1048576", "btl_tcp_links": "2"}
LINKS = {f"OMPI_MCA_{name}": value for name, value in TCP.items()}
CHOSEN = dict.fromkeys(LINKS, "4")
FOUR = Launch("open mpi", 0, 4, 0, 4)


def choose(
    config: Config | None = None, environ: dict[str, str] | None = None, files: tuple[Path, ...] = (), cpus: int = 8
) -> dict[str, str]:
    return choose_settings(config or Config(), environ or {}, files, FOUR, cpus)


def test_by_default_the_layer_is_left_to_open_mpi() -> None:
    assert choose() == LINKS


def test_fault_tolerance_wants_ob1() -> None:
    assert choose(Config(fault_tolerant=True)) == {**LINKS, "OMPI_MCA_pml": "ob1"}


def test_cuda_wants_ucx_when_asked_for_and_only_then() -> None:
    ucx = {"OMPI_MCA_pml": "ucx", "OMPI_MCA_opal_common_ucx_tls": "any", "OMPI_MCA_opal_common_ucx_devices": "any"}
    assert choose(Config(cuda_aware=True)) == {**LINKS, **ucx}
    assert choose(Config(cuda_aware=False)) == LINKS
    assert choose_settings(Config(cuda_aware=True), {}, (), FOUR, 8, is_wheel=False) == LINKS, "a site's own MPI"


@pytest.mark.parametrize(("kind", "is_set"), [("open mpi", False), ("slurm", True), ("flux", True), ("pmix", False)])
def test_on_several_nodes_only_where_the_launcher_carries_the_variable(kind: str, is_set: bool) -> None:
    """Under mpirun the other hosts do not know of it: ranks that differ in the layer abort in MPI_Init."""
    found = choose_settings(Config(cuda_aware=True), {}, (), Launch(kind, 0, 8, 0, 4), 8)
    assert ("OMPI_MCA_pml" in found) == is_set
    assert choose_settings(Config(cuda_aware=True), {}, (), Launch("none"), 8)["OMPI_MCA_pml"] == "ucx"


@pytest.mark.parametrize(("kind", "is_set"), [("open mpi", False), ("slurm", True), ("pmix", False)])
def test_fault_tolerance_on_several_nodes(kind: str, is_set: bool) -> None:
    found = choose_settings(Config(fault_tolerant=True), {}, (), Launch(kind, 0, 8, 0, 4), 8)
    assert ("OMPI_MCA_pml" in found) == is_set


def test_ucx_chosen_by_mpirun_gets_what_it_needs() -> None:
    ucx = {"OMPI_MCA_opal_common_ucx_tls": "any", "OMPI_MCA_opal_common_ucx_devices": "any"}
    assert choose(Config(cuda_aware=True), {"OMPI_MCA_pml": "ucx"}) == {**LINKS, **ucx}
    assert choose(Config(), {"OMPI_MCA_pml": "ucx"}) == LINKS


def test_which_mpi_is_the_wheel(tmp_path: Path) -> None:
    assert not mpi_is_wheel({}, tmp_path)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmpi.so.12").touch()
    assert not mpi_is_wheel({}, tmp_path), "MPICH"
    (tmp_path / "lib" / "libmpi.so.40").touch()
    assert mpi_is_wheel({}, tmp_path)
    assert not mpi_is_wheel({"MPI4PY_LIBMPI": "/opt/libmpi.so"}, tmp_path)
    (tmp_path / "conda-meta").mkdir()
    assert not mpi_is_wheel({}, tmp_path), "conda's has CUDA of its own"


@pytest.mark.parametrize("name", ["OMPI_MCA_pml", "OMPI_MCA_btl"])
@pytest.mark.parametrize("asked", [Config(fault_tolerant=True), Config(cuda_aware=True)])
def test_a_choice_of_the_user_stays(name: str, asked: Config) -> None:
    assert choose(asked, {name: "x"}) == LINKS
    assert choose(asked, {name: "x", **CHOSEN}) == {}


def test_a_choice_in_a_file_stays(tmp_path: Path) -> None:
    conf = tmp_path / "openmpi-mca-params.conf"
    conf.write_text("# pml = cm\n  pml = ucx\nbtl_tcp_links=1\n")
    left = {name: value for name, value in LINKS.items() if not name.endswith("links")}
    assert choose(Config(fault_tolerant=True), files=(conf, tmp_path / "none.conf")) == left
    conf.write_text("# pml = cm\n#btl=^openib\n")
    assert choose(Config(fault_tolerant=True), files=(conf,))["OMPI_MCA_pml"] == "ob1"


def test_an_exclusion_is_no_choice(tmp_path: Path) -> None:
    """What Debian's file says."""
    conf = tmp_path / "openmpi-mca-params.conf"
    conf.write_text("mtl = ^ofi\nbtl = ^uct,openib,ofi\npml = ^ucx\n")
    assert choose(Config(fault_tolerant=True), files=(conf,)) == {**LINKS, "OMPI_MCA_pml": "ob1"}
    assert choose(Config(cuda_aware=True), files=(conf,)) == LINKS, "ucx is excluded"
    assert choose(Config(fault_tolerant=True), {"OMPI_MCA_pml": "^ob1"}) == LINKS
    assert choose(Config(cuda_aware=True), {"OMPI_MCA_pml": "cm"}, (conf,)) == LINKS, "the environment goes first"


def test_the_files_that_are_looked_at(tmp_path: Path) -> None:
    environ = {"HOME": "/home/u", "OMPI_MCA_mca_base_param_files": "/site/a.conf:/site/b.conf", "PATH": ""}
    first = [Path("/site/a.conf"), Path("/site/b.conf"), Path("/home/u/.openmpi/mca-params.conf")]
    assert launch.conf_files(environ, tmp_path) == first
    environ["OPAL_PREFIX"] = "/opt/ompi"
    assert launch.conf_files(environ, tmp_path) == [*first, Path("/opt/ompi/etc/openmpi-mca-params.conf")]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmpi.so.40").touch()
    assert launch.conf_files(environ, tmp_path) == [*first, tmp_path / "etc" / "openmpi-mca-params.conf"]


def test_the_file_of_an_installation_that_is_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").touch(0o755)
    (path,) = launch.conf_files({"PATH": str(tmp_path / "bin")}, tmp_path)
    assert path == tmp_path / "etc" / "openmpi-mca-params.conf"
    (path,) = launch.conf_files({"OPAL_PREFIX": "/usr"}, tmp_path)
    assert path == Path("/etc/openmpi/openmpi-mca-params.conf")


def test_more_ranks_than_cpus_give_way() -> None:
    assert choose(cpus=3) == {**LINKS, "OMPI_MCA_mpi_yield_when_idle": "1"}
    assert choose(cpus=4) == LINKS
    assert choose(environ={"OMPI_MCA_mpi_yield_when_idle": "0"}, cpus=1) == LINKS


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No MPI, no settings, no files; the environment given back as it was."""
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith("OMPI_MCA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("mpiddp.launch.settings.conf_files", lambda environ: [])
    monkeypatch.setattr("mpiddp.launch.settings.interfaces", list)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    yield
    os.environ.clear()
    os.environ.update(before)


def running(monkeypatch: pytest.MonkeyPatch, vendor: str) -> None:
    fake = types.SimpleNamespace(Is_initialized=lambda: True, get_vendor=lambda: (vendor, (5, 0, 0)))
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", fake)  # type: ignore[arg-type]


@pytest.mark.usefixtures("clean")
def test_before_mpi_exports() -> None:
    prepared = launch.before_mpi(Config(fault_tolerant=True))
    assert prepared.settings == {**LINKS, "OMPI_MCA_pml": "ob1"} and prepared.lost is None
    assert config.environ()["OMPI_MCA_pml"] == "ob1"
    assert launch.before_mpi(Config(fault_tolerant=True)).settings == {}  # a second init() finds its own


@pytest.mark.usefixtures("clean")
def test_too_late_says_what_is_lost_and_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    running(monkeypatch, "Open MPI")
    prepared = launch.before_mpi(Config(fault_tolerant=True))
    assert prepared.settings == {} and "OMPI_MCA_pml" not in os.environ
    assert prepared.lost is not None
    assert "OMPI_MCA_pml=ob1" in prepared.lost and "from mpi4py import MPI" in prepared.lost
    assert launch.before_mpi(Config()).lost is None, "one node needs no TCP"
    running(monkeypatch, "MPICH")
    assert launch.before_mpi(Config(fault_tolerant=True)).lost is None, "they are Open MPI's settings"


@pytest.mark.usefixtures("clean")
def test_too_late_on_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    running(monkeypatch, "Open MPI")
    for name, value in {"RANK": "0", "SIZE": "8", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    lost = launch.before_mpi(Config()).lost
    assert lost is not None and "OMPI_MCA_btl_tcp_links=2" in lost


@pytest.mark.usefixtures("clean")
def test_fault_tolerance_that_may_not_reach_all_hosts_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "SIZE": "8", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    prepared = launch.before_mpi(Config(fault_tolerant=True))
    assert "OMPI_MCA_pml" not in prepared.settings
    assert "mpirun --mca pml ob1 -x MPIDDP_FAULT_TOLERANT=1" in (prepared.lost or "")
    assert launch.before_mpi(Config()).lost is None
    monkeypatch.setenv("OMPI_MCA_pml", "ob1")
    assert launch.before_mpi(Config(fault_tolerant=True)).lost is None


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    "asked",
    [
        Config(cuda_aware=True, fault_tolerant=True),
        Config(cuda_aware=True, local="nccl"),
        Config(deterministic=True, local="nccl"),
    ],
)
def test_what_excludes_each_other(asked: Config) -> None:
    with pytest.raises(ConfigError, match="nset one"):
        launch.before_mpi(asked)


@pytest.mark.usefixtures("clean")
def test_libucx_is_loaded_before_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setitem(
        sys.modules,
        "libucx",
        types.SimpleNamespace(load_library=lambda: loaded.append("ucx")),  # type: ignore[arg-type]
    )
    monkeypatch.setattr("mpiddp.launch.settings.mpi_is_wheel", lambda environ: True)
    assert launch.before_mpi(Config(cuda_aware=True)).settings["OMPI_MCA_pml"] == "ucx"
    assert loaded == ["ucx"]
    assert launch.before_mpi(Config(cuda_aware=True)).settings == {}, "a second init() finds its own"
    monkeypatch.setattr("mpiddp.launch.settings.mpi_is_wheel", lambda environ: False)
    launch.before_mpi(Config(cuda_aware=True))
    assert loaded == ["ucx", "ucx"], "a site's MPI keeps its own UCX"
