"""The model card says what the run recorded, and nothing else."""

import base64
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser

import numpy as np
import pytest
from drawn import jpeg
from gated import enter_whole_copy
from mlflow.tracking import MlflowClient
from registered import GOOD, GOOD_CONFIG, MLFLOW_WARNINGS
from shard_sets import write_shard_set
from small_training import BY_HEART, Record, fit, small_config

from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec
from pipelines.shards import Manifest, load_manifest
from training import figures, tracking
from training.accuracy import Scored
from training.config import AugmentConfig, ModelConfig, TrainConfig
from training.network import load_model
from training.recipes import RECIPES
from training.registry import card, card_page, card_text
from training.registry.card_text import Section
from training.registry.differences import differences
from training.registry.facts import Facts, licence
from training.registry.verdict import Check
from training.registry.versions import NAME

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]
CONFIG = small_config(**BY_HEART, name="carded")
NASTY = '<img src=x onerror=alert(1)> | *a* `b` "c" [d](e) \u202e'


@dataclasses.dataclass(frozen=True)
class Written:
    client: MlflowClient
    run_id: str
    manifest: Manifest
    network: AlexNet
    text: str

    def read(self, name: str) -> str:
        found = card.read_artifact(self.client, self.run_id, f"card/{name}")
        assert found is not None
        return found.decode()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Record]:
    folder = tmp_path_factory.mktemp("card")
    data = write_shard_set(folder / "set", train=(8, 8), val=(7, 6))
    return data, fit(CONFIG, data, folder / "run")


@pytest.fixture(scope="module")
def written(learned, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """The card of a run in a registry of its own, as a registration writes it; a test that changes
    a card makes another run."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALEXNET_HOME", str(home))
        # MLflow sets this itself, for its child processes; here it must not outlive the tests.
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
        yield _write(*learned)


def _write(data: str, record: Record) -> Written:
    manifest, model = load_manifest(data), load_model(str(record.last))
    assert isinstance(model.network, AlexNet)
    client = tracking.connect(tracking.tracking_uri())
    run_id = tracking.open_run(client, CONFIG, manifest, data).info.run_id
    tracker = tracking.Tracker(tracking.tracking_uri(), run_id)
    tracker.tag("hardware", "a slide rule")
    for step, metrics in record.logged[-6:]:
        tracker.log(metrics, step)
    kernels = figures.conv1_kernels(model.network.conv1.weight)
    client.log_figure(run_id, kernels, "figures/conv1_kernels.png")
    text = card.write(client, run_id, model.network, model.input_spec, manifest, CONFIG)
    client.create_registered_model(NAME)
    return Written(client, run_id, manifest, model.network, text)


def _other_run(written: Written, name: str, data: str) -> str:
    config = dataclasses.replace(CONFIG, name=name)
    run = tracking.open_run(written.client, config, written.manifest, data)
    return str(run.info.run_id)


class Page(HTMLParser):
    """Raises for a page that is not well-formed, or that could load or run anything."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.images: list[bytes] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
        assert not [name for name, _ in attrs if name.startswith("on") or name == "href"]
        if tag == "img":
            kind, _, data = str(dict(attrs)["src"]).partition(",")
            assert kind == "data:image/png;base64"
            self.images.append(base64.b64decode(data, validate=True))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        else:
            self.words.append(data)


def test_card_says_what_was_trained_on_what_and_how_well(written, learned):
    told, run = written.read("card.md"), written.client.get_run(written.run_id)
    count = sum(weight.numel() for weight in written.network.parameters())
    assert f"| Parameters | {count:,} |" in told
    assert run.data.metrics["val_correct1"] == 13  # learned by heart
    # Wilson by hand: 13 of 13, z² = 3.8415: 13 / (13 + z²) to 1.
    assert "| Top-1 | 100.00% (95 % interval 77.19% to 100.00%) |" in told
    assert "each of 13 val pictures" in told and "| Measured by | the training" in told
    for fact in (written.manifest.digest, written.manifest.plan_id, tracking._code_sha256()):
        assert fact in told
    assert "| Train pictures | 16 |" in told and "| Classes | 4: colour 0, colour 1" in told
    rates = [m["images_per_second"] for _, m in learned[1].logged[-6:] if "images_per_second" in m]
    assert f"| Throughput | {np.median(rates):,.0f} pictures/s" in told
    assert "| Hardware | workers on a slide rule |" in told


def test_examples_are_in_the_card_and_among_the_figures(written):
    told = written.read("card.md")
    assert r"| val\_0000 | colour 0 | colour 0 " in told and r"| val\_0007 | colour 3 |" in told
    png = card.read_artifact(written.client, written.run_id, "figures/top5.png")
    assert png is not None and png.startswith(b"\x89PNG")
    assert "](../figures/top5.png)" in told


def test_page_stands_alone_and_embeds_the_pictures_of_the_run(written):
    page = Page(written.read("card.html"))
    kept = [
        card.read_artifact(written.client, written.run_id, f"figures/{name}.png")
        for name in ("top5", "conv1_kernels")
    ]
    assert page.images == kept
    assert any("No picture: Loss and top-1" in words for words in page.words)


def test_description_is_the_card_without_pictures(written):
    assert len(written.text) <= 5000 and "](" not in written.text
    assert "## Accuracy" in written.text and "card/card.html" in written.text


def test_facts_come_back_as_they_were_written(written):
    text = written.read("facts.json")
    facts = Facts.from_json(text)
    assert facts.to_json() == text
    assert facts == dataclasses.replace(facts) and isinstance(hash(facts), int)


def test_gate_fills_in_mistakes_accuracy_and_verdict(written):
    client = written.client
    facts = dataclasses.replace(
        Facts.from_json(written.read("facts.json")), run_id=_other_run(written, "judged", "/x")
    )
    client.log_text(facts.run_id, facts.to_json(), "card/facts.json")
    version = client.create_model_version(NAME, "file:///nowhere", facts.run_id)
    judged = dataclasses.replace(written, run_id=facts.run_id)
    labels = np.array([0, 0, 0, 1, 2, 3], dtype=np.int32)
    predicted = np.array([1, 1, 0, 1, 3, 3], dtype=np.int32)
    wrong = (labels != predicted).astype(np.int32)
    loss, share = np.full(6, 0.5), np.full((6, 1), 0.9, dtype=np.float32)
    scored = Scored(tuple("abcdef"), 4, labels, wrong, loss, predicted[:, None], share)
    checks = [{"name": "top-1", "value": "0.5", "limit": "0.9", "passed": False}]
    verdict = {
        "passed": False,
        "forced": True,
        "reason": NASTY,
        "at": "2030-01-01",
        "checks": checks,
    }
    card.update(client, version, scored, verdict)
    told = judged.read("card.md")
    assert "| colour 0 | colour 1 | 2 |\n| colour 2 | colour 3 | 1 |" in told
    assert "| Top-1 | 50.00% (95 % interval 18.76% to 81.24%) |" in told
    assert "| Loss | 0.5000 nats |" in told and "| Measured by | the gate" in told
    assert "| top-1 | 0.5 | 0.9 | refused |" in told and "forced past the gate" in told
    assert "<img" not in Page(judged.read("card.html")).open
    assert client.get_model_version(NAME, version.version).description.startswith("# AlexNet")
    assert (
        "| colour 0 | colour 1 | 2 |" in client.get_model_version(NAME, version.version).description
    )


def test_version_without_a_card_is_left_as_it_is(written):
    client = written.client
    version = client.create_model_version(NAME, "file:///nowhere", description="mine")
    card.update(client, version, None, {})
    assert client.get_model_version(NAME, version.version).description == "mine"


def test_lost_shards_leave_out_the_examples_alone(written, tmp_path):
    client, manifest = written.client, written.manifest
    spec = InputSpec(227, 227, (1.0,) * 3, (1.0,) * 3, ((1.0,) * 3,) * 3)
    run_id = _other_run(written, "lost", str(tmp_path / "gone"))
    text = card.write(client, run_id, written.network, spec, manifest, CONFIG)
    assert "Not measured: the shards could not be read" in text
    assert "| Top-1 | not measured |" in text and "| Throughput | not measured |" in text
    assert "| Hardware | not recorded |" in text and manifest.digest in text


def test_names_cannot_write_markup(written):
    facts = Facts.from_json(written.read("facts.json"))
    checks = (Check(NASTY, NASTY, NASTY, True),)
    facts = dataclasses.replace(
        facts, run=NASTY, class_names=(NASTY,) * 4, pairs=((NASTY, NASTY, 1),), checks=checks
    )
    page = Page(card_page.html(facts, {}))
    assert page.images == []
    assert any('<img src=x onerror=alert(1)> | *a* `b` "c"' in words for words in page.words)
    told = card_page.markdown(facts)
    assert "\u202e" not in told and r"\<img src=x onerror=alert(1)\> \| \*a\* \`b\`" in told
    assert NASTY[:8] not in told.replace("\\<", "")


def test_long_description_is_cut_between_sections(written):
    facts = Facts.from_json(written.read("facts.json"))
    whole = card_page.description(facts, 100_000)
    short = card_page.description(facts, 2500)
    assert len(short) <= 2500 < len(whole)
    kept = short.rpartition("\nThe whole card")[0]
    assert whole.startswith(kept) and whole[len(kept) :].lstrip().startswith("##")


def test_table_rows_have_as_many_cells_as_heads():
    section = Section("a", heads=("x", "y"), rows=(("1|2", "3"), ("4", "5")))
    assert card_text.markdown("t", [section], None) == (
        "# t\n\n## a\n\n| x | y |\n| --- | --- |\n| 1\\|2 | 3 |\n| 4 | 5 |\n"
    )


# Differences from the paper, and terms


@pytest.fixture(scope="module")
def small_set(learned) -> Manifest:
    return load_manifest(learned[0])


def as_imagenet(manifest: Manifest) -> Manifest:
    wnids = tuple(f"n{i:08d}" for i in range(1000))
    return dataclasses.replace(manifest, wnids=wnids, resize=256, crop=256)


def test_paper_recipe_differs_as_its_source_does_and_no_further(small_set):
    together = "; ".join(differences(RECIPES["paper"](), as_imagenet(small_set)))
    for absent in ("no local", "no groups", "He init", "batches of", "momentum", "bfloat16"):
        assert absent not in together
    assert "fixed epochs (25, 51, 79)" in together and "0.03" in together
    assert "biases learn at 2 times" in together and "91 epochs" in together
    assert "rate of biases never falls" in together and "no colour noise from epoch 67" in together
    assert "conv1 learns at a tenth from epoch 67; in the source from 67" in together
    assert "conv1 is frozen from epoch 72; in the source from 72" in together


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("baseline", ["no local response", "no groups", "He init", "bfloat16", "cosine"]),
        ("fast", ["batch normalisation", "LARS", "batches of 4096", "smoothed", "averaged"]),
        ("smoke", ["0.25 times", "only the centre view in training", "no colour noise"]),
    ],
)
def test_differences_of_a_recipe_are_named(small_set, recipe, expected):
    together = "; ".join(differences(RECIPES[recipe](), as_imagenet(small_set)))
    for words in expected:
        assert words in together


def test_automatic_crop_depends_on_the_stored_pictures(small_set):
    config = TrainConfig(model=ModelConfig(), augment=AugmentConfig(crop="auto"))
    assert any("random area" in line for line in differences(config, small_set))
    assert not any("random area" in line for line in differences(config, as_imagenet(small_set)))


def test_licence_says_only_what_holds_for_the_set(small_set):
    assert licence(small_set).startswith("The terms of this set's pictures are not recorded")
    assert "if it is from there: ImageNet gives access" in licence(small_set)
    own = dataclasses.replace(small_set, wnids=("cat", "dog"))
    assert "ImageNet" not in licence(own)
    document = small_set.document | {"official": True}
    official = dataclasses.replace(small_set, document=document)
    assert licence(official).startswith("The official ILSVRC archives. ImageNet gives access to")


def test_code_of_the_card_answers_where_nothing_else_is_set(
    registered_models, home, tmp_path, monkeypatch
):
    client = enter_whole_copy(registered_models, home, monkeypatch)
    client.set_registered_model_alias(NAME, "champion", GOOD)
    run = client.get_run(client.get_model_version(NAME, GOOD).run_id)
    network = load_model("champion").network
    assert isinstance(network, AlexNet)
    manifest = load_manifest(registered_models.data)
    facts = card.gather(client, run.info.run_id, network, manifest, GOOD_CONFIG)
    [code] = re.findall(r"```python\n(.+?)```", card_page.markdown(facts), re.DOTALL)
    (tmp_path / "picture.jpg").write_bytes(jpeg())
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "ALEXNET_"))}
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "probabilities" in done.stdout
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("ml")] == []
