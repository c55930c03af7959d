"""Sources that are tables alone, without images, and the shards planned of them."""

from dataclasses import replace

import pyarrow as pa

from pipelines import plan, sources

UNEVEN = {"n00000001": 10, "n00000002": 25, "n00000003": 67}


def drawn_source(counts: dict[str, int], val: int = 0) -> sources.Source:
    """A source whose class k has counts[k] train images, one after the other in one file."""
    wnids = sorted(counts)
    rows = [
        ("train", f"{wnid}_{n}", f"{wnid}_{n}.JPEG", wnids.index(wnid), wnid, "train.tar")
        for wnid in wnids
        for n in range(counts[wnid])
    ]
    rows += [("val", f"val_{n}", f"val_{n}.JPEG", 0, wnids[0], "val.tar") for n in range(val)]
    columns = [*zip(*rows, strict=True), range(0, 1000 * len(rows), 1000), [900] * len(rows)]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, sources.TABLE, strict=True)]
    table, names = pa.Table.from_arrays(arrays, schema=sources.TABLE), tuple(wnids)
    containers = (("train.tar", 9),)
    return sources.Source("/raw", "ilsvrc2012", table, names, names, {}, containers, None, ())


def changed(source: sources.Source, column: str, values: list[object]) -> sources.Source:
    """With other values of a column in the first rows."""
    table = source.table
    values = values + table[column].to_pylist()[len(values) :]
    number = table.schema.get_field_index(column)
    array = pa.array(values, sources.TABLE.field(column).type)
    return replace(source, table=table.set_column(number, column, array))


def by_shard(made: plan.Plan) -> dict[str, list[dict[str, object]]]:
    rows, shards = made.table.to_pylist(), {}
    for shard in made.shards:
        shards[shard.name], rows = rows[: shard.samples], rows[shard.samples :]
    assert rows == []
    return shards
