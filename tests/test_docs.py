"""What the guides show works as it stands there."""

import re
from dataclasses import fields

import pytest
import torch

from dit_moe.autoencoders.encoder import EncodeConfig
from dit_moe.cli import COMMANDS
from dit_moe.config import build
from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.experiments.image import EvalConfig
from dit_moe.experiments.text import TextEvalConfig, TextSampleConfig
from dit_moe.metrics import METRICS, FeatureSet
from dit_moe.models import DiTConfig, LMConfig
from dit_moe.moe import ROUTERS, MoEConfig, MoELayer
from dit_moe.sampling.generator import SampleConfig
from dit_moe.studies.study import Study, Variant
from dit_moe.text.corpora import CORPORA
from dit_moe.text.objective import NextTokenConfig
from dit_moe.text.sequences import TokensConfig
from dit_moe.text.tokenization import TokenizeConfig
from dit_moe.training import TrainConfig
from tests.shown import GUIDES, ROOT, blocks, entry


def test_the_router_of_the_guide_is_complete_in_its_one_file():
    with entry(blocks(ROOT / "docs" / "extending.md", "python")[0], ROUTERS, "minp"):
        config = build(MoEConfig, {"experts": 4, "target": 2, "router": {"name": "minp", "fraction": 0.3}})
        layer, x = MoELayer(config, 16, 64), torch.randn(2, 5, 16)
        out, routing = layer(x)
        assert out.shape == x.shape and set(routing.aux) == {"balance", "dynamic", "z"}
        prob = layer.router.scores(x.flatten(0, 1)).prob_NE
        assert torch.equal(layer.router.select(prob), prob >= 0.3 * prob.amax(-1, keepdim=True))
        limits = build(MoEConfig, {"experts": 4, "target": 1, "router": {"name": "minp", "max_experts": 1}})
        assert (MoELayer(limits, 16, 64).router.select(prob).sum(-1) == 1).all()


def test_the_metric_of_the_guide_is_complete_in_its_one_file():
    with entry(blocks(ROOT / "docs" / "extending.md", "python")[1], METRICS, "mean_gap"):
        metric = METRICS.build(METRICS.config_class("mean_gap")(power=1.0))
        near, far = (FeatureSet("set", 3, features_ND=torch.eye(3) + shift) for shift in (0.0, 2.0))
        assert metric(near, near) == {"mean_gap": 0}
        assert metric(near, far) == {"mean_gap": pytest.approx(2 * 3**0.5)}
        assert metric.settings() == {"power": 1.0}


def test_every_command_is_in_the_table_of_what_is_for_what():
    table = (ROOT / "docs" / "commands.md").read_text()
    assert set(re.findall(r"`dit-moe ([a-z-]+) ?[^`]*`", table.partition("|")[2])) == set(COMMANDS)


def test_the_site_has_every_guide():
    listed = re.findall(r": (\w[\w-]*\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert set(listed) == {guide.name for guide in GUIDES if guide.parent.name == "docs"} | {"index.md", "reference.md"}


def anchors(guide):
    """The names that a code host and the site give to the headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", guide.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_links_and_pictures_of_a_guide_exist_and_nothing_is_left_to_fill_in(guide):
    text = guide.read_text()
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        assert anchor in anchors(guide.parent / target if target else guide), f"{target}#{anchor}"
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [target for target in targets if "://" not in target and not (guide.parent / target).exists()]
    assert missing == []
    assert "@@" not in text and not re.search(r"\bXX", text)


SECTIONS = (TrainConfig, SampleConfig, EvalConfig, EncodeConfig, LMConfig, DiTConfig, MoEConfig, TokensConfig)
SECTIONS += (
    TokenizeConfig,
    TextSampleConfig,
    TextEvalConfig,
    NextTokenConfig,
    Study,
    Variant,
    HeldoutConfig,
    *map(CORPORA.config_class, CORPORA.names()),
)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_option_is_in_a_guide(section):
    guides = "".join(re.sub(r"```.*?```", "", guide.read_text(), flags=re.DOTALL) for guide in GUIDES)
    named = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`\n]+)`", guides))))
    recorded = {"fingerprint", "sha256"}
    assert {field.name for field in fields(section)} - recorded - named == set()


@pytest.mark.parametrize("path", [*GUIDES, *(ROOT / "dit_moe" / "cli").glob("*.py")], ids=lambda path: path.name)
def test_configs_that_a_guide_or_a_command_names_exist(path):
    commands = [line for line in path.read_text().splitlines() if "dit-moe " in line]
    named = set(re.findall(r"configs/[\w./-]+\.yaml", " ".join(commands)))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_layers_name_every_part_and_guides_name_files_that_exist():
    layers = (ROOT / "docs" / "architecture.md").read_text().partition("## Where do I")[0]
    files = [path.relative_to(ROOT / "dit_moe") for path in (ROOT / "dit_moe").rglob("*.py")]
    parts = {path.parts[0].removesuffix(".py") for path in files} - {"__init__"}
    assert {part for part in parts if not re.search(rf"\b{part}\b", layers)} == set()
    named = {(guide.name, name) for guide in GUIDES for name in re.findall(r"`(dit_moe/[\w/.]+)`", guide.read_text())}
    written_by_readers = {"dit_moe/moe/routers/minp.py", "dit_moe/metrics/mean_gap.py"}
    assert [each for each in named if each[1] not in written_by_readers and not (ROOT / each[1]).exists()] == []


@pytest.mark.parametrize(
    ("marked", "last"), [("free", "`model.recompute`"), ("recorded", ", from the newest checkpoint")]
)
def test_the_guide_lists_the_settings_of_training_that_a_resumed_run_may_change(marked, last):
    text = (ROOT / "docs" / "configuration.md").read_text().partition("What may differ:")[2]
    item = next(each for each in text.split("\n* ") if last in each).partition(last)[0]
    listed = {name.removeprefix("train.") for name in re.findall(r"`([\w.]+)`", item)}
    assert listed == {field.name for field in fields(TrainConfig) if field.metadata.get(marked)}
