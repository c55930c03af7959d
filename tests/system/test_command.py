"""The door of every program: its exit codes, and what it does when nobody listens."""

import errno
import importlib
import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drawn import ROOT

from alexnet.errors import UserError
from pipelines import command

# Runs programs, each in a child of its own: what they import is there already. A request and an
# answer are a line of JSON. "gone" is a pipe whose reader has left.
_PROGRAMS = """
import io, json, os, runpy, sys
import benchmarks.__main__, gc, pipelines.cli, pipelines.verify, traceback, training.driver
import training.evaluate, training.figures, training.predict
import training.registry.__main__

def run(words, encoding, folder, closed, to):
    for number, where in to.items():
        if where == "gone":
            end, where = os.pipe()
            os.close(end)
        else:
            where = os.open(where, os.O_WRONLY | os.O_CREAT)
        os.dup2(where, int(number))
        os.close(where)
    for number, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding))
    for number in closed:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    os.chdir(folder)
    if not os.listdir(folder):
        os.rmdir(folder)
    sys.argv = words
    if words[0].endswith(".py"):
        sys.path.insert(0, os.path.dirname(words[0]))
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)

gc.freeze()  # what is here is not looked through in every child
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        sys.stdin.close()
        try:
            run(**json.loads(line))
            code = 0
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        try:  # as Python does at its end, which would take a second for all that is imported
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            code = 120
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """run(*words, stdout=…, stderr=…) -> exit code, what was written to both."""
    folder = tmp_path_factory.mktemp("programs")
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _PROGRAMS],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    stdin, stdout = server.stdin, server.stdout

    def run(
        *words: str,
        to: dict[int, str] | None = None,
        closed: tuple[int, ...] = (),
        encoding: str = "utf-8",
        cwd: Path = ROOT,
    ) -> tuple[int, str, str]:
        files = {number: folder / str(number) for number in (1, 2)}
        for file in files.values():
            file.write_bytes(b"")
        where = {number: str(file) for number, file in files.items()} | (to or {})
        request = {"words": words, "encoding": encoding, "folder": str(cwd), "closed": closed}
        stdin.write(json.dumps(request | {"to": where}) + "\n")
        stdin.flush()
        code = int(stdout.readline())
        return code, *(files[number].read_text(encoding) for number in (1, 2))

    yield run
    server.communicate(timeout=60)


SCRIPT = str(ROOT / "training" / "run.py")
ANSWERS = [
    ("pipelines", "--help"),
    ("pipelines", "plan", "--raw", "RAW"),
    ("pipelines", "verify", "OUT"),
    ("training.registry", "list"),
    ("training.predict", "--help"),
    ("training.evaluate", "--help"),
    ("training.figures", "--help"),
    ("training", "--help"),
    ("benchmarks.scaling",),
    ("benchmarks.cost_estimate",),
    (SCRIPT, "smoke", "--print-config"),
    (SCRIPT, "--help"),
    ("benchmarks", "--help"),
    ("benchmarks.cost",),
    ("benchmarks.summary",),
]


@pytest.mark.parametrize("words", ANSWERS, ids=lambda words: " ".join(words[:2]).split("/")[-1])
def test_an_answer_that_nobody_reads_or_that_finds_no_room_is_silent(
    words: tuple[str, ...], run: Run, drawn_raw: str, drawn_shards: str
) -> None:
    places = {"RAW": drawn_raw, "OUT": drawn_shards}
    words = tuple(places.get(word, word) for word in words)
    assert run(*words, to={1: "gone"}) == (141, "", "")
    assert run(*words, to={1: "/dev/full"}) == (1, "", "")


def test_python_itself_has_nothing_to_add_at_its_end() -> None:
    end, beginning = os.pipe()
    os.close(end)
    words = [sys.executable, "-m", "pipelines", "--help"]
    done = subprocess.run(words, cwd=ROOT, stdout=beginning, stderr=subprocess.PIPE)
    os.close(beginning)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_answer_without_stdout_fails_and_without_stderr_does_not(
    run: Run, drawn_shards: str
) -> None:
    words = ("pipelines", "status", drawn_shards)
    assert run(*words, closed=(1,)) == (1, "", "")
    code, out, err = run(*words, to={2: "gone"})
    assert (code, err) == (0, "") and out


@pytest.mark.parametrize(
    "program", sorted({words[0] for words in ANSWERS}), ids=lambda program: program.split("/")[-1]
)
def test_a_wrong_word_is_one_line_and_2(program: str, run: Run) -> None:
    code, out, err = run(program, "--nonsense")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert "--nonsense" in err or "required" in err


@pytest.mark.parametrize(
    "nowhere",
    [{"to": {2: "/dev/full"}}, {"to": {2: "gone"}}, {"closed": (2,)}, {"closed": (0, 1, 2)}],
)
def test_a_mistake_that_cannot_be_told_is_2_and_not_told_on_stdout(
    nowhere: dict[str, Any], run: Run
) -> None:
    assert run("pipelines", "--nonsense", **nowhere) == (2, "", "")


@pytest.mark.parametrize(
    "nowhere", [{"to": {1: "gone"}}, {"to": {1: "/dev/full"}}, {"closed": [1]}]
)
def test_work_goes_on_and_is_done_whoever_reads(
    nowhere: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    drawn = tmp_path / "raw"
    small = ("--classes", "2", "--per-class", "1", "--val-per-class", "1")
    assert run("pipelines", "demo-raw", str(drawn), *small, **nowhere) == (0, "", "")
    assert (drawn / "demo-raw.json").exists()  # written last


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_a_terminal_has_not_are_escaped(
    encoding: str, run: Run, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "Größe 训练 \udcff")
    escaped = nowhere.encode(encoding, "backslashreplace").decode(encoding)
    code, out, err = run("pipelines", "status", nowhere, encoding=encoding)
    assert (code, out) == (2, "") and escaped.partition("Gr")[2][:6] in err
    assert err.count("\n") == 1 and "\\udcff" in err


def test_a_current_folder_that_was_deleted_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code, out, err = run("pipelines", "status", cwd=tmp_path / "gone")
    assert (code, out) == (2, "")
    assert err == (
        "error: the current folder: No such file or directory; change into one that exists\n"
    )


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


HEAVY = {"torch", "ray", "mlflow", "pandas", "scipy", "matplotlib", "boto3", "PIL"}
AT_ONCE = """
import contextlib, runpy, sys
words = sys.argv = sys.argv[1:]
with contextlib.suppress(SystemExit):
    if words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (("pipelines.command",), HEAVY | {"numpy", "pyarrow"}),
        (("pipelines", "--help"), HEAVY),
        ((SCRIPT, "--help"), HEAVY | {"numpy", "pyarrow"}),
        ((SCRIPT, "--print-config"), HEAVY | {"numpy", "pyarrow"}),
        (("training.registry", "list"), {"torch", "ray", "matplotlib", "boto3"}),
    ],
)
def test_a_quick_answer_imports_nothing_heavy(words, without, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, *words],
        cwd=ROOT,
        env=os.environ | {"ALEXNET_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(done.stderr.splitlines()[-1].split())
    assert "pipelines" in imported and imported & without == set()


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
def test_every_program_names_the_unknown_flag_and_the_one_that_was_meant(
    program: str, words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert importlib.import_module(program).main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and words[-1 if "dry" in words[-1] else -2] in line
    assert meant in line
