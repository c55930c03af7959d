"""What a model card says, section by section; markdown and HTML are made from the same sections.

Whatever nobody measured says so, and no number stands in for it.
"""

from collections.abc import Mapping

from training.accuracy import Interval, short
from training.registry import card_text
from training.registry.card_text import Row, Section
from training.registry.facts import Accuracy, Facts

_UNKNOWN = "not measured"
_UNRECORDED = "not recorded"
_SHOWN_CLASSES = 10
_CURVES = ("curves", "Loss and top-1 accuracy over the steps of the training")
_KERNELS = ("conv1_kernels", "The kernels of conv1, each stretched to its own range (figure 3)")
_TOP5 = ("top5", "The five likeliest classes of val pictures, the right one in red (figure 4)")
_USE = """\
import mlflow
mlflow.set_tracking_uri({registry!r})
model = mlflow.pyfunc.load_model("models:/alexnet@champion")
print(model.predict(open("picture.jpg", "rb").read()))"""


def markdown(facts: Facts) -> str:
    """The whole card; its pictures are links from card/ to figures/ of the run."""
    return card_text.markdown(_title(facts), sections(facts), "../figures")


def html(facts: Facts, pictures: Mapping[str, bytes]) -> str:
    """One page that loads nothing; pictures: PNG files by name, such as "curves"."""
    return card_text.page(_title(facts), sections(facts), pictures)


def description(facts: Facts, limit: int) -> str:
    """The card without pictures in at most `limit` characters: sections that do not fit are left
    out, the last ones first, and a line says where all of it is."""
    parts = sections(facts)
    more = "\nThe whole card is card/card.html among the artifacts of the run.\n"
    while len(text := card_text.markdown(_title(facts), parts, None)) + len(more) > limit:
        parts = parts[:-1]
    return text + more


def sections(facts: Facts) -> tuple[Section, ...]:
    """The card in the order of what a reader asks first."""
    return (
        Section("Accuracy", rows=_accuracy(facts)),
        Section("How to use it", code=_USE.format(registry=facts.registry)),
        Section("Model", rows=_model(facts)),
        Section("Data", rows=_data(facts)),
        _gate(facts),
        Section("Known differences from the paper", lines=facts.differences),
        _examples(facts),
        _pairs(facts),
        Section("Training", rows=(*facts.training, *_run(facts)), pictures=(_CURVES,)),
        Section("First layer", pictures=(_KERNELS,)),
    )


def _title(facts: Facts) -> str:
    return f"AlexNet, recipe {facts.recipe}, run {facts.run}"


def _accuracy(facts: Facts) -> tuple[Row, ...]:
    found = facts.accuracy
    if found is None:
        return (("Top-1", _UNKNOWN), ("Top-5", _UNKNOWN), ("Loss", _UNKNOWN))
    by = "the gate, from the registered model" if facts.recomputed else "the training, at its end"
    return (
        ("Top-1", _share(found.correct1, found, found.top1_interval)),
        ("Top-5", _share(found.correct5, found, found.top5_interval)),
        ("Loss", f"{found.loss:.4f} nats"),
        ("Protocol", f"the centre 227×227 of each of {found.images:,} val pictures, once"),
        ("Intervals", "95 %, Wilson; chance of pictures only, not of another training"),
        ("Measured by", by),
    )


def _share(correct: int, found: Accuracy, interval: Interval) -> str:
    low, high = interval
    return f"{correct / found.images:.2%} (95 % interval {low:.2%} to {high:.2%})"


def _model(facts: Facts) -> tuple[Row, ...]:
    what = {
        "ungrouped": "ungrouped: no groups, no local response normalisation",
        "paper": "paper: conv2, conv4, conv5 in two groups, local response normalisation",
    }
    classes = len(facts.class_names)
    some = ", ".join(short(name) for name in facts.class_names[:_SHOWN_CLASSES])
    more = f" and {classes - _SHOWN_CLASSES:,} more" if classes > _SHOWN_CLASSES else ""
    return (
        ("Variant", what.get(facts.variant, facts.variant)),
        ("Parameters", f"{facts.parameters:,}"),
        ("Width", f"{facts.width:g}"),
        ("Batch normalisation", "yes" if facts.batch_norm else "no"),
        ("Classes", f"{classes:,}: {some}{more}"),
        ("Input", facts.geometry),
    )


def _data(facts: Facts) -> tuple[Row, ...]:
    return (
        ("Manifest sha256", facts.manifest_sha256),
        ("Plan", facts.plan_id),
        ("Shards", facts.data),
        ("Train pictures", f"{facts.train:,}"),
        ("Val pictures", f"{facts.val:,}"),
        ("Licence", facts.licence),
    )


def _gate(facts: Facts) -> Section:
    rows = tuple(
        (check.name, check.value, check.limit, "ok" if check.passed else "refused")
        for check in facts.checks
    )
    text = f"The last verdict: {facts.verdict}." if facts.verdict else "Not tried yet."
    return Section("Gate", text, heads=("Check", "Value", "Limit", "") if rows else (), rows=rows)


def _examples(facts: Facts) -> Section:
    heading = "Example predictions"
    if facts.examples is None:
        return Section(heading, f"{_UNKNOWN.capitalize()}: the shards could not be read.")
    rows = tuple(
        (e.key, short(e.true), "; ".join(f"{short(name)} {p:.1%}" for name, p in e.likeliest[:3]))
        for e in facts.examples
    )
    heads = ("Picture", "Is", "Likeliest")
    text = "The first val picture of each of some classes; nobody chose them."
    return Section(heading, text, heads=heads, rows=rows, pictures=(_TOP5,))


def _pairs(facts: Facts) -> Section:
    heading = "Confused most often"
    if facts.pairs is None:
        return Section(heading, f"{_UNKNOWN.capitalize()} yet; the gate does.")
    if not facts.pairs:
        return Section(heading, "No val picture was confused.")
    rows = tuple((short(a), short(b), f"{count:,}") for a, b, count in facts.pairs)
    return Section(heading, heads=("Is", "Taken for", "Val pictures"), rows=rows)


def _run(facts: Facts) -> tuple[Row, ...]:
    rate, hours = facts.throughput, facts.hours
    return (
        ("Hardware", facts.hardware or _UNRECORDED),
        (
            "Throughput",
            _UNKNOWN
            if rate is None
            else f"{rate:,.0f} pictures/s in training, median, all workers",
        ),
        (
            "Time",
            _UNKNOWN
            if hours is None
            else f"{_time(hours)} from the start to the last step, pauses included",
        ),
        ("Run", f"{facts.run} ({facts.run_id})"),
        ("Commit", facts.commit or _UNRECORDED),
        ("Code sha256", facts.code_sha256 or _UNRECORDED),
    )


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
