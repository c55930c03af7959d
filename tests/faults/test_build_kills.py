"""Commands of pipelines/ that are killed, ended and stopped: the same command ends the work."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from build_set import Undisturbed, unfinished
from made import contents
from mortal import Life

MOST_LIVES = 200
LEAST_HITS = 3
STOPPED = (  # the second one before the first line of the program
    "stopped; what is finished is kept, the same command continues",
    "stopped; nothing was begun",
)


def hits_until_done(
    attack,
    start: Callable[[], Life],
    seconds: float,
    look: Callable[[], None],
    number: int = signal.SIGKILL,
) -> int:
    """Lives of one command, each hit by the signal at a random instant of an undisturbed life,
    until one ends before that; `look` at what each leaves. How many were hit. After 20 lives that
    time grows: the machine may be slower by now than it was undisturbed."""
    for hits in range(MOST_LIVES):
        life = start()
        latest = seconds * max(1, hits / 20)
        life.after(attack.draw.uniform(0, latest), lambda life=life: life.signal(number))
        life.end()
        look()
        if life.status == 0:
            return hits
        if number == signal.SIGKILL:
            assert life.killed, life.errors
        else:
            assert life.status == 130 and life.errors.strip() in STOPPED, life.errors
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
    number, layout, attack, request, tmp_path
):
    whole: Undisturbed = request.getfixturevalue(layout)
    hits = sets = 0
    while hits < LEAST_HITS:
        sets += 1
        out, home = tmp_path / f"out{sets}", tmp_path / f"home{sets}"
        made: dict[Path, int] = {}

        def look(out: Path = out, made: dict[Path, int] = made) -> None:
            whole.check_published(out)
            for path, time_made in made.items():
                assert path.stat().st_mtime_ns == time_made, "what was finished was made again"
            tars = [out / f"{path.stem}.tar" for path in out.glob("_meta/*-*.parquet")]
            made.update({path: path.stat().st_mtime_ns for path in tars})

        def start(out: Path = out, home: Path = home) -> Life:
            return whole.start(out, environment={"ALEXNET_HOME": str(home)})

        hits += hits_until_done(attack, start, whole.seconds, look, number)
        assert set(made) == set(out.glob("*.tar"))
        whole.check_whole(out)
    assert unfinished(tmp_path) == []


def damage(out: Path, draw: random.Random) -> dict[str, bytes]:
    """Flips a bit of one to three files of a finished set, and returns what they are then. Of
    sidecars in their first page: headers and footers of parquet files have no checksum, and no sum
    of these files is kept."""
    names = [name for name in contents(str(out)) if not name.startswith(("_meta/plan", "report/"))]
    found = {}
    for name in draw.sample(names, draw.randint(1, 3)):
        data = bytearray((out / name).read_bytes())
        if data:
            place = 30 if name.startswith("_meta/") else draw.randrange(len(data))
            data[place] ^= 1 << draw.randrange(8)
        found[name] = bytes(data)
        (out / name).write_bytes(data)
    return found


@pytest.mark.parametrize("command", ["verify --repair", "build --retry-quarantined"])
def test_change_of_a_finished_set_killed_again_and_again_ends_as_undisturbed(
    command, attack, folders: Undisturbed, mended: Undisturbed, tmp_path
):
    hits = sets = 0
    while hits < LEAST_HITS:
        sets += 1
        out = shutil.copytree(folders.out, tmp_path / f"out{sets}")
        argv, after = [*mended.argv(out), "--retry-quarantined"], mended
        damaged: dict[str, bytes] = {}
        if command == "verify --repair":
            argv, after = ["verify", str(out), "--full", "--repair"], folders
            damaged = damage(out, attack.draw)

        def look(out: Path = out, after: Undisturbed = after, damaged=damaged) -> None:
            found = contents(str(out))
            for name, data in found.items():
                good = folders.files.get(name), after.files.get(name)
                assert data in (*good, damaged.get(name)), name
            if "manifest.json" in found and command == "verify --repair":
                lost = {name for name in after.files.keys() - found.keys() if name[-4:] == ".tar"}
                assert not lost, "a manifest without its shards"

        def start(argv: list[str] = argv) -> Life:
            return Life("pipelines", argv=argv)

        hits += hits_until_done(attack, start, 1.5 * folders.seconds, look)
        after.check_whole(out)


def test_racing_builders_killed_and_held_up_end_with_one_good_set(
    attack, folders: Undisturbed, tmp_path
):
    """One is stopped for a while, as on a node that hangs; the other killed, or left alone."""
    out, codes = tmp_path / "out", set()
    while codes != {0}:
        pair = [folders.start(out) for _ in range(2)]
        slow, other = attack.draw.sample(pair, 2)
        instants = sorted(attack.draw.uniform(0, folders.seconds) for _ in range(2))
        hits = [(slow, signal.SIGSTOP), (other, signal.SIGKILL)]
        attack.draw.shuffle(hits)
        for instant, (life, number) in zip(instants, hits, strict=True):
            life.after(instant, lambda life=life, number=number: life.signal(number))
        other.end()
        folders.check_published(out)
        slow.signal(signal.SIGCONT)
        codes = {other.status, slow.end()}
        folders.check_published(out)
        assert codes <= {0, -signal.SIGKILL}, slow.errors + other.errors
    folders.check_whole(out)
