"""What needs real processes: signals, pipes that nobody reads, exit codes, what importing loads."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drawn import ROOT

# Imports every module, says what that has changed, and runs programs, each in a child of its own:
# what they import is there already. A request and an answer are a line of JSON. "gone" is a pipe
# whose reader has left.
_PROGRAMS = """
import gc, importlib, io, json, logging, os, runpy, sys, traceback

path, environment = list(sys.path), dict(os.environ)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
import ray
print(json.dumps({
    "Ray was started": ray.is_initialized(),
    "sys.path was changed": [place for place in sys.path if place in path] != path,
    "logging was configured": bool(logging.getLogger("training").handlers),
    "environment was changed": [name for name in {*os.environ} | {*environment}
        if name.startswith("ALEXNET") and os.environ.get(name) != environment.get(name)],
}), flush=True)
import benchmarks.__main__, training.registry.__main__

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


def modules() -> list[str]:
    packages = (ROOT / name for name in ("alexnet", "pipelines", "training"))
    files = [path.relative_to(ROOT) for folder in packages for path in folder.rglob("*.py")]
    names = [".".join(path.with_suffix("").parts) for path in files]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Run]]:
    """What importing has changed; run(*words, to=…) -> exit code, what was written to both."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "empty").mkdir()
    env = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "", "ALEXNET_HOME": f"{folder}/home"}
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _PROGRAMS, json.dumps(modules())],
        cwd=folder / "empty",
        env=os.environ | env | {"MPLCONFIGDIR": f"{folder}/matplotlib"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    stdin, stdout = server.stdin, server.stdout
    changed = json.loads(stdout.readline())
    there = [path for name in ("home", "empty") for path in (folder / name).rglob("*")]
    changed["files were made"] = [str(path) for path in there]

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

    yield changed, run
    server.communicate(timeout=60)


@pytest.fixture
def run(programs: tuple[dict[str, Any], Run]) -> Run:
    return programs[1]


def test_importing_every_module_changes_nothing_and_prints_nothing(programs):
    assert "training.registry.gate" in modules()
    assert [*filter(None, programs[0].values())] == []


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
    (SCRIPT, "smoke", "--print-config"),
    (SCRIPT, "--help"),
    ("benchmarks", "--help"),
    ("benchmarks.cost",),
]


@pytest.mark.parametrize("words", ANSWERS, ids=lambda words: " ".join(words[:2]).split("/")[-1])
def test_an_answer_that_nobody_reads_or_that_finds_no_room_is_silent(
    words, run, drawn_raw, drawn_shards
):
    places = {"RAW": drawn_raw, "OUT": drawn_shards}
    words = tuple(places.get(word, word) for word in words)
    assert run(*words, to={1: "gone"}) == (141, "", "")
    assert run(*words, to={1: "/dev/full"}) == (1, "", "")


def test_python_itself_has_nothing_to_add_at_its_end():
    end, beginning = os.pipe()
    os.close(end)
    words = [sys.executable, "-m", "pipelines", "--help"]
    done = subprocess.run(words, cwd=ROOT, stdout=beginning, stderr=subprocess.PIPE)
    os.close(beginning)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_answer_without_stdout_fails_and_without_stderr_does_not(run, drawn_shards):
    words = ("pipelines", "status", drawn_shards)
    assert run(*words, closed=(1,)) == (1, "", "")
    code, out, err = run(*words, to={2: "gone"})
    assert (code, err) == (0, "") and out


@pytest.mark.parametrize(
    "nowhere",
    [{"to": {2: "/dev/full"}}, {"to": {2: "gone"}}, {"closed": (2,)}, {"closed": (0, 1, 2)}],
)
def test_a_mistake_that_cannot_be_told_is_2_and_not_told_on_stdout(nowhere, run):
    assert run("pipelines", "--nonsense", **nowhere) == (2, "", "")


@pytest.mark.parametrize(
    "nowhere", [{"to": {1: "gone"}}, {"to": {1: "/dev/full"}}, {"closed": [1]}]
)
def test_work_goes_on_and_is_done_whoever_reads(nowhere, run, tmp_path):
    drawn = tmp_path / "raw"
    small = ("--classes", "2", "--per-class", "1", "--val-per-class", "1")
    assert run("pipelines", "demo-raw", str(drawn), *small, **nowhere) == (0, "", "")
    assert (drawn / "demo-raw.json").exists()  # written last


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_a_terminal_has_not_are_escaped(encoding, run, tmp_path):
    nowhere = str(tmp_path / "Größe 训练 \udcff")
    escaped = nowhere.encode(encoding, "backslashreplace").decode(encoding)
    code, out, err = run("pipelines", "status", nowhere, encoding=encoding)
    assert (code, out) == (2, "") and escaped.partition("Gr")[2][:6] in err
    assert err.count("\n") == 1 and "\\udcff" in err


def test_a_current_folder_that_was_deleted_is_one_line(run, tmp_path):
    (tmp_path / "gone").mkdir()
    code, out, err = run("pipelines", "status", cwd=tmp_path / "gone")
    assert (code, out) == (2, "")
    assert err == (
        "error: the current folder: No such file or directory; change into one that exists\n"
    )


HEAVY = {"torch", "ray", "mlflow", "pandas", "scipy", "matplotlib", "boto3", "PIL"}


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (("-m", "alexnet.model"), {"ray", "mlflow", "boto3"}),
        (("-m", "pipelines", "--help"), HEAVY),
        (("-m", "pipelines.build"), {"torch"}),
        ((SCRIPT, "--help"), HEAVY | {"numpy", "pyarrow"}),
        ((SCRIPT, "--print-config"), HEAVY | {"numpy", "pyarrow"}),
        (("-m", "training.registry", "list"), {"torch", "ray", "matplotlib", "boto3"}),
    ],
)
def test_a_quick_answer_imports_nothing_heavy(words, without, home):
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(re.findall(r"^import time: .*\| +([^. \n]+)", done.stderr, re.MULTILINE))
    assert "alexnet" in imported and imported & without == set()
