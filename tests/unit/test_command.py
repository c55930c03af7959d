"""The door of every program: what ends the work is one line with its exit code."""

import errno
import importlib
import os
import pwd
import signal

import pytest

from alexnet.errors import UserError
from pipelines import command


class Defect(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--x 1 is too few"), 2, "error: --x 1 is too few"),
        (Defect("of the\nwork"), 1, "failed: of the\\nwork"),
        (KeyboardInterrupt(), 130, "stopped"),
        (SystemExit(15), 130, "stopped"),  # as Ray answers SIGTERM
        (OSError(errno.EMFILE, "Too many open files"), 2, "error: more than {} open files"),
        (RuntimeError("can't start new thread"), 2, "error: no more processes or threads"),
        (MemoryError(), 2, "error: out of memory"),
    ],
)
def test_what_ends_the_work_is_one_line_with_its_exit_code(error, code, line, capsys):
    def work() -> int:
        raise error

    assert command.answered(work, stopped="stopped", failed={Defect: "failed"}) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(line.split("{")[0])


@pytest.mark.parametrize("error", [Defect("x"), OSError(errno.EIO, "x"), SystemExit(0)])
def test_defects_and_the_end_of_help_pass(error):
    with pytest.raises(type(error)):
        command.answered(lambda: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_the_work_alike_and_leave_the_handlers_as_they_were(number):
    before = signal.getsignal(number)

    def work() -> int:
        os.kill(os.getpid(), number)
        return 0

    assert command.answered(work) == 130
    assert signal.getsignal(number) is before


def test_a_uid_without_an_entry_has_a_name_and_the_home_that_was_given(monkeypatch, tmp_path):
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "LOGNAME", "USER"):
        monkeypatch.setenv(name, "")  # so that what is set here is taken back
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path))
    command._find_home()
    assert os.environ["HOME"] == str(tmp_path) and os.environ["LOGNAME"] == f"uid{os.getuid()}"

    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv("ALEXNET_HOME", "")
    command._find_home()
    with pytest.raises(UserError, match="set ALEXNET_HOME"):
        from pipelines import storage

        storage.write(str(storage.home() / "x"), b"")


@pytest.mark.parametrize(
    ("program", "words", "meant"),
    [
        ("training.evaluate", ["--dta", "x"], "--data"),
        ("training.figures", ["--oot", "x"], "--out"),
        ("training.predict", ["--modle", "3"], "--model"),
        ("training.registry.__main__", ["show", "--dta", "x"], "--data"),
        ("training.registry.__main__", ["promote", "--dry-rum"], "--dry-run"),
        ("benchmarks.scaling", ["--core", "2", "--bach", "2"], "--batch"),
        ("benchmarks.cost_estimate", ["--prise", "2"], "--price"),
        ("training.run", ["smoke", "--wrokers", "2"], "--workers"),
        ("benchmarks.cost", ["--prize", "x"], "--price"),
    ],
)
def test_every_program_names_the_unknown_flag_and_the_one_meant(program, words, meant, capsys):
    assert importlib.import_module(program).main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and words[-1 if "dry" in words[-1] else -2] in line
    assert meant in line
