"""What ends a rank: in small processes with a recording in the place of MPI's abort."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mpiddp import errors

# The package without its root, which would import torch in each of these processes.
PRELUDE = f"""
import os, signal, sys, threading, time, types
sys.modules["mpiddp"] = types.ModuleType("mpiddp")
sys.modules["mpiddp"].__path__ = [{str(Path(errors.__file__).parent)!r}]
from mpiddp import failure

def abort(code):
    os.write(1, b"abort(%d)\\n" % code)
    os._exit(90)

pushing = False
def is_pushing():
    return pushing
"""
INSTALL = "failure.install(1, 3, abort, is_pushing)\n"
ABORTED = 90


def run(script: str, before: str = "", install: str = INSTALL, stdin: str = "") -> subprocess.CompletedProcess[str]:
    code = PRELUDE + textwrap.dedent(before) + install + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", code], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("sys.exit(3)", 3, "exits with code 3; the job ends"),
        ("raise SystemExit(5)", 5, "exits with code 5"),
        ("raise SystemExit('no such file')", 1, "exits with code 1: no such file"),
        ("sys.exit('no such file')", 1, "no such file"),
        ("sys.exit(-1)", 255, "code 255"),
        ("sys.exit((1, 2))", 1, "(1, 2)"),
        ("exit(4)", 4, "code 4"),
        ("import argparse; argparse.ArgumentParser().parse_args(['--x'])", 2, "code 2"),
        ("class Stop(SystemExit): pass\nraise Stop(6)", 6, "code 6"),
        ("try:\n  sys.exit(7)\nfinally:\n  print('last')", 7, "code 7"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("def f():\n  raise ValueError('deep')\nf()", 1, "in f"),
        ("raise KeyboardInterrupt", 130, "was interrupted at <string>"),
        ("threading.Thread(target=lambda: 1 / 0, name='mpiddp-x').start(); time.sleep(30)", 1, "in thread mpiddp-x of"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(30)", 130, "was interrupted"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", 143, ""),
    ],
)
def test_ends_the_job(script: str, code: int, words: str) -> None:
    done = run(script)
    assert done.returncode == ABORTED, done
    assert done.stdout.splitlines()[-1] == f"abort({code})"
    assert words in done.stderr and (not words or "rank 1 of 3 on host " in done.stderr)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("pass", 0),
        ("sys.exit()", 0),
        ("sys.exit(0)", 0),
        ("sys.exit(256)", 0),
        ("raise SystemExit", 0),
        ("raise SystemExit(False)", 0),
        ("try:\n  sys.exit(3)\nexcept SystemExit as e:\n  assert e.code == 3", 0),
        ("try:\n  raise SystemExit(3)\nexcept BaseException as e:\n  kept = e", 0),
        ("e = SystemExit(3)\ne.code = 4\nassert e.code == 4\ndel e.code\nassert e.code is None", 0),
        ("threading.Thread(target=lambda: sys.exit(3)).start()", 0),
        ("threading.Thread(target=lambda: sys.exit(3), name='mpiddp-x').start()", 0),
        ("threading.Thread(target=lambda: 1 / 0).start()", 0),
        ("failure.uninstall()\nsys.exit(3)", 3),
        ("failure.uninstall()\n1 / 0", 1),
        ("failure.uninstall()\nos.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", -signal.SIGTERM),
        ("os._exit(3)", 3),
    ],
)
def test_ends_nothing_but_itself(script: str, code: int) -> None:
    done = run(script)
    assert done.returncode == code and "abort" not in done.stdout, done


@pytest.mark.parametrize("script", ["sys.exit(3)", "1 / 0", "raise SystemExit('text')", "raise KeyboardInterrupt"])
def test_a_world_of_one_is_ordinary_python(script: str) -> None:
    alone = run(script, install="failure.install(0, 1, abort, is_pushing)\n")
    plain = run(script, install="\n")
    assert (alone.returncode, alone.stdout) == (plain.returncode, plain.stdout)
    assert alone.stderr == plain.stderr


def test_the_users_excepthook_is_called_before_the_end() -> None:
    done = run("1 / 0", before="sys.excepthook = lambda *error: print('mine', error[0].__name__)\n")
    assert done.stdout.splitlines() == ["mine ZeroDivisionError", "abort(1)"]
    assert "uncaught exception on rank 1 of 3" in done.stderr


def test_an_excepthook_that_raises_does_not_save_the_job() -> None:
    done = run("1 / 0", before="def hook(*error): raise RuntimeError\nsys.excepthook = hook\n")
    assert done.returncode == ABORTED and "abort(1)" in done.stdout


def test_a_hook_set_later_has_its_way() -> None:
    done = run("sys.excepthook = lambda *error: print('theirs')\nfailure.uninstall()\n1 / 0")
    assert done.returncode == 1 and done.stdout == "theirs\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_users_signal_handler_decides(name: str) -> None:
    before = f"signal.signal(signal.{name}, lambda number, frame: print('mine', number))\n"
    done = run(f"os.kill(os.getpid(), signal.{name})\nprint('went on')", before=before)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"mine {int(getattr(signal, name))}", "went on"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_ignored_signal_stays_ignored(name: str) -> None:
    before = f"signal.signal(signal.{name}, signal.SIG_IGN)\n"
    assert run(f"os.kill(os.getpid(), signal.{name})\nprint('went on')", before=before).stdout == "went on\n"


def test_ctrl_c_can_be_caught() -> None:
    done = run(
        "try:\n  os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\nexcept KeyboardInterrupt:\n  print('saved')"
    )
    assert (done.returncode, done.stdout) == (0, "saved\n")


def test_a_signal_during_a_push_waits_for_its_end() -> None:
    done = run("""
        pushing = True
        os.kill(os.getpid(), signal.SIGINT)
        assert failure.pending()
        print("push goes on")
        pushing = False
        try:
            failure.act_on_pending()
        except KeyboardInterrupt:
            print("acted", failure.pending())
    """)
    assert done.stdout.splitlines() == ["push goes on", "acted False"], done


def test_another_thread_passes_a_pending_signal_to_the_main_thread() -> None:
    done = run("""
        pushing = True
        os.kill(os.getpid(), signal.SIGTERM)
        pushing = False
        threading.Thread(target=failure.act_on_pending).start()
        time.sleep(30)
    """)
    assert done.stdout == "abort(143)\n", done


def test_sigterm_runs_the_finally_clauses() -> None:
    done = run("try:\n  os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)\nfinally:\n  print('tidy')")
    assert done.stdout.splitlines() == ["tidy", "abort(143)"]


def test_a_script_that_swallows_sigterm_ends_all_the_same() -> None:
    began = time.monotonic()
    done = run("""
        while True:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
            except BaseException:
                time.sleep(30)
    """)
    assert done.stdout == "abort(143)\n" and time.monotonic() - began < 20


def test_an_abort_that_hangs_is_cut_off() -> None:
    before = "def abort(code): time.sleep(60)\n"
    began = time.monotonic()
    assert run("1 / 0", before=before).returncode == -signal.SIGALRM
    assert time.monotonic() - began < 20


def test_a_signal_while_the_rank_ends_changes_nothing() -> None:
    """The launcher sends SIGTERM to all ranks when another one has failed as well."""
    before = """
        def abort(code):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            os.write(1, b"abort(%d)" % code)
            os._exit(90)
    """
    for script in ("1 / 0", "sys.exit(3)", "raise KeyboardInterrupt"):
        done = run(script, before=before)
        assert done.returncode == ABORTED and "143" not in done.stdout + done.stderr, done
    done = run("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", before=before)
    assert done.stdout == "abort(143)" and not done.stderr, done


def test_an_abort_that_fails_ends_the_process() -> None:
    assert run("sys.exit(3)", before="def abort(code): raise RuntimeError('finalized')\n").returncode == 3


@pytest.mark.parametrize("how", ["1 / 0", "sys.exit(3)", "os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)"])
def test_a_forked_child_ends_alone(how: str) -> None:
    done = run(f"""
        pid = os.fork()
        if not pid:
            {how}
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print("child", status)
    """)
    assert done.returncode == 0 and "abort" not in done.stdout, done
    assert done.stdout.splitlines()[-1].split()[0] == "child" and not done.stdout.endswith("child 0\n")


def test_a_child_that_is_stuck_in_c_can_be_terminated() -> None:
    """A Python handler would wait for ever for its turn: a fork has the handlers of before."""
    done = run("""
        lock = threading.Lock()
        lock.acquire()
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            lock.acquire()
        time.sleep(0.3)
        os.kill(pid, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)
    assert done.stdout == f"{-signal.SIGTERM}\n", done


def test_outside_the_main_thread_signals_stay_as_they_were() -> None:
    install = "t = threading.Thread(target=failure.install, args=(1, 3, abort, is_pushing)); t.start(); t.join()\n"
    done = run("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", install=install)
    assert done.returncode == -signal.SIGTERM
    assert run("1 / 0", install=install).returncode == ABORTED


def test_at_a_prompt_an_exception_goes_back_to_the_user() -> None:
    code = PRELUDE + INSTALL
    done = subprocess.run(
        [sys.executable, "-i", "-c", code],
        input="1 / 0\nprint('went on')\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "went on" in done.stdout and "abort" not in done.stdout


def test_the_last_words_are_one_write() -> None:
    before = """
        class Stderr:
            writes = []
            def write(self, text):
                self.writes.append(text)
            def flush(self):
                pass
        sys.stderr = Stderr()
        def abort(code):
            os.write(1, str(len([w for w in sys.stderr.writes if "ZeroDivision" in w and "rank 1" in w])).encode())
            os._exit(90)
    """
    assert run("1 / 0", before=before).stdout == "1"


def test_the_last_words_are_read_before_the_end() -> None:
    """The reader of the pipe is slow, and abort() takes what it has not read away."""
    done = run("""
        import threading, time
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        heard = []
        def listen():
            time.sleep(0.2)
            heard.append(os.read(reading, 1 << 16).decode())
        threading.Thread(target=listen, daemon=True).start()
        def abort(code):
            os.write(1, b"heard" if heard and "ZeroDivisionError" in heard[0] else b"lost")
            os._exit(90)
        failure.install(1, 3, abort, is_pushing)
        1 / 0
    """)
    assert done.stdout == "heard", done


def test_no_stderr_is_no_trouble() -> None:
    assert "abort(1)" in run("sys.stderr = None\n1 / 0").stdout
