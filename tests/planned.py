"""Sources that are tables alone, without images, and the shards planned of them."""

import pyarrow as pa

from pipelines import plan, sources


def drawn_source(counts: dict[str, int], *, raw: str = "/raw", val: int = 0) -> sources.Source:
    """A source whose class k has counts[k] train images, one after the other in one file."""
    wnids = sorted(counts)
    rows = [
        ("train", f"{wnid}_{n}", f"{wnid}_{n}.JPEG", wnids.index(wnid), wnid, "train.tar")
        for wnid in wnids
        for n in range(counts[wnid])
    ]
    rows += [("val", f"val_{n}", f"val_{n}.JPEG", 0, wnids[0], "val.tar") for n in range(val)]
    columns = [*zip(*rows, strict=True), range(0, 1000 * len(rows), 1000), [900] * len(rows)]
    table = pa.Table.from_arrays(
        [pa.array(column, f.type) for column, f in zip(columns, sources.TABLE, strict=True)],
        schema=sources.TABLE,
    )
    names = tuple(wnids)
    return sources.Source(raw, "ilsvrc2012", table, names, names, {}, (("train.tar", 9),), None, ())


UNEVEN = {"n00000001": 10, "n00000002": 25, "n00000003": 67}


def by_shard(made: plan.Plan) -> dict[str, list[dict[str, object]]]:
    rows = made.table.to_pylist()
    shards = {}
    for shard in made.shards:
        shards[shard.name], rows = rows[: shard.samples], rows[shard.samples :]
    assert rows == []
    return shards
