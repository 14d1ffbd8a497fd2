"""The whole config of a language model's experiment, as `image.py` has that of a model of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from dit_moe import config
from dit_moe.config import ConfigError, Tree, require, section
from dit_moe.data.listing import note
from dit_moe.experiments.image import check_compute_budget, kind_of, with_fingerprint
from dit_moe.models import MODELS
from dit_moe.moe.compute_budget import ComputeBudgetConfig
from dit_moe.plugins import asked
from dit_moe.text.losses import not_comparable
from dit_moe.text.objective import NextTokenConfig
from dit_moe.text.sequences import TokensConfig, TokenSequences, open_shards
from dit_moe.text.token_shards import TokenShards, require_held_out
from dit_moe.text.tokenization import TokenizeConfig
from dit_moe.text.tokenizer import TextTokenizer
from dit_moe.training import TrainConfig

ROUNDING = 64  # of the embedding's rows: GEMMs are faster, and GPT-NeoX's 50,277 tokens become the usual 50,304


@dataclass(frozen=True, kw_only=True)
class TextSampleConfig(ComputeBudgetConfig):
    """How to write text."""

    prompts: tuple[str, ...] = ("",)  # "" begins a document
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the most probable token
    top_k: int | None = None
    top_p: float | None = 0.95
    seed: int = 0
    weights: Literal["ema", "model"] = "ema"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.vary == "layer", self, "vary", "is for images; text has no way from noise to data")
        require(len(self.prompts) >= 1, self, "prompts", "must hold at least one; an empty one begins a document")
        for prompt in self.prompts:  # what a terminal gives for bytes that are no UTF-8
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise ConfigError("prompts", f" holds {prompt!r}, which is not Unicode; write it in UTF-8")
        require(self.max_new_tokens >= 1, self, "max_new_tokens", "must be at least 1")
        require(self.temperature >= 0, self, "temperature", "must be at least 0")
        require(self.top_k is None or self.top_k >= 1, self, "top_k", "must be at least 1, or null for all")
        require(self.top_p is None or 0 < self.top_p <= 1, self, "top_p", "must lie in (0, 1], or be null")
        require(0 <= self.seed < 2**63, self, "seed", "must be a whole number from 0 to 2^63 − 1")


@dataclass(frozen=True, kw_only=True)
class TextEvalConfig:
    """How held-out text is scored."""

    stride: int | None = None  # new tokens of every window; None: data.length, so that windows do not overlap
    batch_size: int = 16  # windows at a time
    max_documents: int | None = None  # of the held-out ones; None: all
    light_every: int | None = None  # steps of training between scores of a few documents; None: none
    light_documents: int = 32

    def __post_init__(self) -> None:
        for name in ("batch_size", "light_documents"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1")
        for name in ("stride", "max_documents", "light_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, self, name, "must be at least 1, or null")


@dataclass(frozen=True, kw_only=True)
class TextExperiment:
    """One training run of a language model and how it is sampled and evaluated. See docs/language.md."""

    model: Annotated[Any, MODELS]
    data: TokensConfig
    objective: NextTokenConfig = field(default_factory=NextTokenConfig)
    tokenize: TokenizeConfig | None = None  # what `dit-moe tokenize` makes `data` of
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: TextSampleConfig = field(default_factory=TextSampleConfig)
    eval: TextEvalConfig = field(default_factory=TextEvalConfig)
    seed: int = 0
    plugins: tuple[str, ...] = field(default_factory=asked)  # modules of the user's that it needs

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, self, "seed", "must be a whole number from 0 to 2^63 − 1")
        if self.eval.stride is not None and self.eval.stride > self.data.length:
            raise ConfigError("eval.stride", f"={self.eval.stride} exceeds data.length={self.data.length}; lower it")
        check_compute_budget(self.sample, self.model)


def load_text_experiment(path: str | Path, overrides: Sequence[str] = ()) -> TextExperiment:
    """Read a config file with its bases and overrides; ConfigError for any mistake in it.

    Fields that follow from the data are still open; see `resolve_text`.
    """
    return text_experiment(config.load(path, overrides))


def text_experiment(tree: Tree) -> TextExperiment:
    """A config as read from a file or a checkpoint. ConfigError for any mistake in it, a model of images among them."""
    if kind_of(tree) != "text":
        raise ConfigError(
            "model", " is a model of images, and this needs a language model; name one, for instance LM-tiny-8E2A"
        )
    return config.build(TextExperiment, tree)


def open_tokens(experiment: TextExperiment, split: str = "train") -> TokenSequences:
    """A split of the experiment's tokens. ValueError if it is not there, or damaged."""
    with section("data"):
        return TokenSequences(experiment.data, split)


def resolve_text(experiment: TextExperiment, dataset: TokenSequences) -> TextExperiment:
    """Fill in what follows from the data, and check that the parts fit; ConfigError names the field that does not."""
    tokenizer, rows = dataset.manifest.tokenizer, experiment.model.vocab_size
    found = tokenizer["vocab_size"]
    if rows is not None and rows < found:
        problem = f"={rows} is below the {found} ids of the tokenizer {tokenizer['name']}"
        raise ConfigError("model.vocab_size", f"{problem}; raise it, or drop the line")
    experiment = replace(experiment, data=with_fingerprint(experiment.data, dataset.fingerprint))
    return resolve_text_without_data(experiment, rows or ROUNDING * -(-found // ROUNDING))


def resolve_text_without_data(experiment: TextExperiment, vocab_size: int | None = None) -> TextExperiment:
    """`resolve_text` for a model section that states its vocabulary itself: needs no data."""
    model, length = experiment.model, experiment.data.length
    if model.max_length not in (None, length):
        problem = f"={model.max_length} contradicts data.length={length}; drop the line"
        raise ConfigError("model.max_length", problem)
    with section("model"):
        model = replace(model, vocab_size=vocab_size or model.need("vocab_size"), max_length=length)
    return replace(experiment, model=model)


def open_heldout(experiment: TextExperiment, tokenizer: TextTokenizer, trained: Tree) -> TokenShards:
    """The tokens of held-out text. ValueError unless they are of this tokenizer, and not of what is trained on.

    `trained` is the `TokenManifest.origin` of that.
    """
    with section("data"):
        shards = open_shards(experiment.data, "heldout")
    made_by = shards.manifest.tokenizer
    if made_by["sha256"] != tokenizer.config.sha256:
        problem = f"={shards.folder} was made by the tokenizer {made_by['name']} ({made_by['sha256'][:12]})"
        other = f"{tokenizer.name} ({(tokenizer.config.sha256 or '')[:12]})"
        raise ConfigError("data.heldout", f"{problem}, not by {other}; use that tokenizer, or tokenise the text anew")
    require_held_out(trained, shards.manifest)
    if shards.manifest.losses is not None:
        for reason in not_comparable(shards.manifest.losses, tokenizer.name):
            note(f"{shards.folder}: {reason}; bits per byte of it are not comparable between tokenizers")
    return shards


def scoring_options(experiment: TextExperiment) -> dict[str, Any]:
    """The arguments of `dit_moe.text.perplexity.score` that an experiment decides."""
    return {
        "length": experiment.data.length,
        "vocab_size": experiment.model.vocab_size,
        "stride": experiment.eval.stride,
        "batch_size": experiment.eval.batch_size,
        "precision": experiment.sample.precision,
    }
