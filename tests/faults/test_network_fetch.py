"""`fetch` over a network that breaks off, from a server that errs: the published files, once."""

from pathlib import Path

from archive_server import IMAGES, Server, images_in, part_of, run
from attacks import Attack

from alexnet.errors import UserError

_MOST_RUNS = 20


def test_an_archive_arrives_whole_through_breaks_and_errors(
    attack: Attack, archives: Server, tmp_path: Path
) -> None:
    draw, raw, size = attack.draw, tmp_path / "raw", len(archives.data)
    archives.ranges = draw.random() < 0.7
    cuts = archives.cut_after = [draw.randrange(size) for _ in range(draw.randint(2, 12))]
    planned, answers = len(cuts), [500, 502, 503, 429, 408, 200]
    archives.statuses = [draw.choice(answers) for _ in range(draw.randint(2, 12))]
    had = 0
    for _ in range(_MOST_RUNS):
        try:
            run(archives, raw)
            break
        except UserError as error:
            assert "5 times in a row" in str(error) and "\n" not in str(error)
            assert not raw.exists(), "half a set"
            have = part_of(raw).stat().st_size if part_of(raw).exists() else 0
            assert have >= had or not archives.ranges, "what came was thrown away"
            had = have
    assert images_in(raw) == IMAGES
    assert not part_of(raw).exists()
    refused = sum(status >= 400 for _, status in archives.seen)
    attack.survived("server: errors, breaks", "fetch", faults=refused + planned - len(cuts))
