"""Commands of pipelines/ that are killed, ended and stopped: the same command ends the work."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import Attack
from build_lives import Life, Lives
from build_set import Undisturbed, damage, one_line, unfinished
from made import contents

pytest_plugins = ["build_fixtures"]
MOST_LIVES = 200
LEAST_HITS = 3
STOPPED = (  # the second one before the first line of the program
    "stopped; what is finished is kept, the same command continues",
    "stopped; nothing was begun",
)


def attacked(
    attack: Attack, start: Callable[[], Life], seconds: float, number: int, look: Callable[[], None]
) -> int:
    """Lives of one command, each hit by the signal at a random instant of an undisturbed life,
    until one ends before that; `look` at what each leaves. How many were hit. After 20 lives that
    time grows: the machine may be slower by now than it was undisturbed."""
    for hits in range(MOST_LIVES):
        life = start()
        latest = seconds * max(1, hits / 20)
        life.after(attack.draw.uniform(0, latest), lambda life=life: life.signal(number))
        code = life.end()
        look()
        if code == 0:
            return hits
        if number == signal.SIGKILL:
            assert code == -number, life.errors
        else:
            assert code == 130, life.errors
            one_line(life, STOPPED)
    raise AssertionError(f"not done after {MOST_LIVES} lives")


@pytest.mark.parametrize(
    ("number", "layout"),
    [
        pytest.param(signal.SIGKILL, "folders", marks=pytest.mark.first),
        (signal.SIGKILL, "tars"),
        (signal.SIGTERM, "folders"),
        (signal.SIGINT, "folders"),
    ],
)
def test_build_hit_again_and_again_ends_with_the_same_bytes(
    number: signal.Signals,
    layout: str,
    lives: Lives,
    attack: Attack,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    whole: Undisturbed = request.getfixturevalue(layout)
    hits = sets = 0
    started = time.monotonic()
    while hits < LEAST_HITS:
        sets += 1
        out = tmp_path / f"out{sets}"
        made: dict[Path, int] = {}

        def look(out: Path = out, made: dict[Path, int] = made) -> None:
            whole.check_published(out)
            for path, time_made in made.items():
                assert path.stat().st_mtime_ns == time_made, "what was finished was made again"
            tars = [out / f"{path.stem}.tar" for path in out.glob("_meta/*-*.parquet")]
            made.update({path: path.stat().st_mtime_ns for path in tars})

        def start(out: Path = out, home: Path = tmp_path / f"home{sets}") -> Life:
            return lives.start(*whole.argv(out), environment={"ALEXNET_HOME": str(home)})

        hits += attacked(attack, start, whole.seconds, number, look)
        assert set(made) == set(out.glob("*.tar"))
        whole.check_whole(out)
    lost = max(0.0, time.monotonic() - started - sets * whole.seconds)
    assert unfinished(tmp_path) == []
    attack.survived(number.name, f"build ({layout})", faults=hits, seconds_lost=lost)


def test_repair_killed_again_and_again_ends_with_the_same_bytes(
    lives: Lives, attack: Attack, folders: Undisturbed, tmp_path: Path
) -> None:
    hits = sets = 0
    while hits < LEAST_HITS:
        sets += 1
        out = shutil.copytree(folders.out, tmp_path / f"out{sets}")
        damaged = damage(out, attack.draw)

        def look(out: Path = out, damaged: dict[str, bytes] = damaged) -> None:
            found = contents(str(out))
            for name, data in found.items():
                assert data in (folders.files[name], damaged.get(name))
            if "manifest.json" in found:
                lost = {name for name in folders.files.keys() - found.keys() if name[-4:] == ".tar"}
                assert not lost, "a manifest without its shards"

        def start(out: Path = out) -> Life:
            return lives.start("verify", str(out), "--full", "--repair")

        hits += attacked(attack, start, 1.5 * folders.seconds, signal.SIGKILL, look)
        folders.check_whole(out)
    attack.survived("SIGKILL", "verify --repair", faults=hits)


def test_taking_in_mended_images_killed_again_and_again_ends_as_undisturbed(
    lives: Lives, attack: Attack, folders: Undisturbed, mended: Undisturbed, tmp_path: Path
) -> None:
    hits = sets = 0
    while hits < LEAST_HITS:
        sets += 1
        out = shutil.copytree(folders.out, tmp_path / f"out{sets}")

        def look(out: Path = out) -> None:
            for name, data in contents(str(out)).items():
                assert data in (folders.files.get(name), mended.files.get(name))

        def start(out: Path = out) -> Life:
            return lives.start(*mended.argv(out), "--retry-quarantined")

        hits += attacked(attack, start, mended.seconds, signal.SIGKILL, look)
        mended.check_whole(out)
    attack.survived("SIGKILL", "build --retry-quarantined", faults=hits)


def test_drawing_and_report_killed_again_and_again_end_as_undisturbed(
    lives: Lives, attack: Attack, folders: Undisturbed, tmp_path: Path
) -> None:
    drawing = ["--classes", "2", "--per-class", "3", "--val-per-class", "2"]
    out = shutil.copytree(folders.out, tmp_path / "out")
    for place, argv, result in (
        ("demo-raw", ["demo-raw", str(tmp_path / "raw"), *drawing], tmp_path / "raw"),
        ("report", ["report", str(out)], out),
    ):
        started = time.monotonic()
        lives.run(*argv)
        seconds = time.monotonic() - started
        whole = contents(str(result))
        hits = 0

        def look(result: Path = result, whole: dict[str, bytes] = whole) -> None:
            found = contents(str(result))
            assert all(whole[name] == data for name, data in found.items() if name[-5:] != ".json")

        while hits < LEAST_HITS:
            shutil.rmtree(tmp_path / "raw" if place == "demo-raw" else out / "report")
            start = lambda argv=argv: lives.start(*argv)  # noqa: E731
            hits += attacked(attack, start, seconds, signal.SIGKILL, look)
            assert contents(str(result)) == whole
            assert unfinished(result) == []
        attack.survived("SIGKILL", place, faults=hits)


def test_racing_builders_killed_and_held_up_end_with_one_good_set(
    lives: Lives, attack: Attack, folders: Undisturbed, tmp_path: Path
) -> None:
    """One is stopped for a while, as on a node that hangs; the other killed, or left alone."""
    out, faults = tmp_path / "out", 0
    for _ in range(MOST_LIVES):
        pair = [lives.start(*folders.argv(out)) for _ in range(2)]
        slow, other = attack.draw.sample(pair, 2)
        instants = sorted(attack.draw.uniform(0, folders.seconds) for _ in range(2))
        hits = [(slow, signal.SIGSTOP), (other, signal.SIGKILL)]
        attack.draw.shuffle(hits)
        for instant, (life, number) in zip(instants, hits, strict=True):
            life.after(instant, lambda life=life, number=number: life.signal(number))
        killed = other.end()
        folders.check_published(out)
        slow.signal(signal.SIGCONT)
        codes = {killed, slow.end()}
        folders.check_published(out)
        faults += 1 + (killed == -signal.SIGKILL)
        assert codes <= {0, -signal.SIGKILL}, slow.errors + other.errors
        if codes == {0}:
            break
    folders.check_whole(out)
    attack.survived("SIGKILL, SIGSTOP", "two builders", faults=faults)
