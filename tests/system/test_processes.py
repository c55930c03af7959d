"""What needs real processes: signals, pipes that nobody reads, exit codes, what importing loads."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drawn import ROOT
from made import started
from waiting import wait_until

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
        (("pipelines.build",), {"torch"}),
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


def test_ctrl_c_says_how_to_continue_and_exits_130(
    local_ray: str, drawn_raw: str, drawn_shards: str, tmp_path: Path
) -> None:
    flags = ["--raw", drawn_raw, "--samples-per-shard", "1", "--workers", "1"]
    for attempt in range(5):
        out = tmp_path / f"out{attempt}"
        argv = ["build", *flags, "--out", str(out), "--max-rejected", "3%"]
        run = started(argv, tmp_path, {"RAY_ADDRESS": local_ray})
        first = out / "train-000000.tar"
        wait_until(lambda run=run, first=first: first.exists() or run.poll() is not None)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=120)
        if run.returncode != 0:  # a busy machine may be too late for so short a build
            break
    assert run.returncode == 130, errors
    assert "the same command continues" in errors.splitlines()[-1]
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.tmp"))


def test_importing_the_model_loads_no_ray_mlflow_or_boto3():
    code = "import sys, alexnet.model; print({'ray', 'mlflow', 'boto3'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_importing_every_module_makes_no_file_starts_no_ray_and_prints_nothing(tmp_path):
    files = [
        path
        for package in ("alexnet", "pipelines", "training")
        for path in (ROOT / package).rglob("*.py")
    ]
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    modules = [name.removesuffix(".__init__") for name in dotted if not name.endswith("__main__")]
    assert "training.registry.gate" in modules
    code = (
        "import sys, importlib, logging, threading, os\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "path, env = list(sys.path), set(k for k in os.environ if k.startswith('ALEXNET'))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import ray\n"
        "assert not ray.is_initialized()\n"
        "assert [p for p in sys.path if p in path] == path, 'sys.path changed'\n"
        "assert env == set(k for k in os.environ if k.startswith('ALEXNET')), 'env changed'\n"
        "assert not logging.getLogger('training').handlers, 'logging configured'\n"
    )
    home = tmp_path / "home"
    work = tmp_path / "work"
    home.mkdir()
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=work,
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), "MPLCONFIGDIR": str(tmp_path / "mpl")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(work.iterdir()) == []
    assert not (home / ".alexnet").exists()
