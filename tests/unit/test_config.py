"""Settings: read once, checked, with Horovod's names as aliases; and agreement on them."""

from __future__ import annotations

import pytest

from mpiddp import agreement
from mpiddp.config import VARIABLES, Config, ignored_horovod
from mpiddp.errors import ConfigError


def test_defaults_come_from_an_empty_environment() -> None:
    assert Config.from_environ({"PATH": "/bin", "_MPIDDP_WORLD": "x"}) == Config()


def test_values_are_read() -> None:
    config = Config.from_environ({"MPIDDP_BUCKET_MB": "0.5", "MPIDDP_CUDA_AWARE": "1", "MPIDDP_LOG_LEVEL": "debug"})
    assert (config.bucket_nbytes, config.cuda_aware, config.log_level) == (1 << 19, True, "DEBUG")


def test_an_unknown_setting_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"MPIDDP_BUKET_MB.*MPIDDP_BUCKET_MB"):
        Config.from_environ({"MPIDDP_BUKET_MB": "1"})


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda v: v.name)
def test_a_malformed_value_is_an_error_that_names_the_variable(variable) -> None:  # type: ignore[no-untyped-def]
    if variable.parse is str:
        pytest.skip("any text will do")
    with pytest.raises(ConfigError, match=f"{variable.name}='-\\?'"):
        Config.from_environ({variable.name: "-?"})


def test_horovod_variables_are_aliases() -> None:
    environ = {"HOROVOD_FUSION_THRESHOLD": str(3 << 20), "HOROVOD_LOG_LEVEL": "trace", "HOROVOD_CYCLE_TIME": "5"}
    config = Config.from_environ(environ)
    assert (config.fusion_mb, config.log_level) == (3.0, "DEBUG")
    assert Config.from_environ({**environ, "MPIDDP_FUSION_MB": "7"}).fusion_mb == 7.0
    assert ignored_horovod(environ) == ["HOROVOD_CYCLE_TIME"]


def test_what_horovod_s_values_mean() -> None:
    assert Config.from_environ({"HOROVOD_TIMELINE": "DYNAMIC"}).timeline == ""
    assert Config.from_environ({"HOROVOD_TIMELINE": "a.json"}).timeline == "a.json"
    for text, seconds in {"": 60, "0": 60, "false": 60, "No": 60, "1": 0, "true": 0}.items():
        assert Config.from_environ({"HOROVOD_STALL_CHECK_DISABLE": text}).stall_warn_s == seconds, text


def test_every_field_has_a_variable() -> None:
    assert {v.field for v in VARIABLES} == set(Config.__dataclass_fields__)


def test_differences_are_named_with_their_ranks() -> None:
    reports = [{"torch": "2.13", "MPI": "a"}, *[{"torch": "2.12", "MPI": "a"}] * 3, {"torch": "2.13", "MPI": "a"}]
    assert agreement.compare(reports) == {"torch": "torch is '2.13' on rank 0, '2.12' on ranks 1-3"}
    assert agreement.compare([{"x": 1}] * 4) == {}


def test_buckets_are_what_the_user_says() -> None:
    assert Config().bucket_nbytes == 25 << 20
    assert Config(bucket_mb=3).bucket_nbytes == 3 << 20
