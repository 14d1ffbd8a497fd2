"""What differs between models of images and of text, one module for each; chosen once, where a config or run is loaded.

A new modality is one file: a module `dit_moe/tasks/KIND.py` with the functions of the protocol `Task`, where KIND is
what the config classes of its models say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dit_moe import checkpoint
from dit_moe.config import Tree
from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.experiments.image import Experiment, kind_of
from dit_moe.experiments.run import Run
from dit_moe.experiments.text import TextExperiment
from dit_moe.formats import open_model
from dit_moe.training import Hook, Unit
from dit_moe.training.data_loader import Prepare
from dit_moe.training.step import Objective

AnyExperiment = Experiment | TextExperiment
Report = dict[str, Any]  # JSON-ready


@dataclass(frozen=True, kw_only=True)
class TrainingParts:
    """The arguments of `Trainer` that come by these names."""

    objective: Objective
    prepare_batch: Prepare
    facts: Mapping[str, Any]
    hooks: Sequence[Hook]
    unit: Unit
    keep_inputs: Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The options of `dit-moe sample`."""

    out: Path | None = None  # folder; None: the run folder
    save: str | None = None  # of images: kinds of output, "npz,grid"
    recipe: str | None = None  # of images: the settings of a published baseline
    prompts: Sequence[str] | None = None  # of text: in place of those of the section `sample`


@dataclass(frozen=True, kw_only=True)
class HeldoutResult:
    """What a run does on held-out data, per image or token."""

    loss: float
    terms: dict[str, float]  # of the loss and beside it, by name
    active: float | None  # mean active experts a token; None in a dense model
    active_by_layer: list[float | None] | None
    flops: float  # of the forward pass, with so many experts


class Task(Protocol):
    """All that the rest of the package needs to know of a modality. `experiment` is the whole typed config."""

    kind: str
    """The KIND of its models' configs, "images" for one."""

    unit: str
    """What it counts, "images" for one."""

    scored_by: str
    """The command that measures how good a run is."""

    sample_files: tuple[str, ...]
    """What `sample` leaves in the run folder."""

    # ------------------------------------------------------------------------------------------- the config, the data

    def build_experiment(self, tree: Tree) -> Any:
        """A config, as read from a file or a checkpoint, typed and checked; what follows from the data is still open.

        ConfigError for any mistake in it.
        """

    def make_data(self, experiment: Any, *, skip_broken: bool = False) -> None:
        """Encode or tokenise what is trained on, if the config says so; goes on where it stopped."""

    def make_missing_data(self, experiment: Any) -> None:
        """The same of all splits, where the config says of what; finished data are kept, and not looked into."""

    def open_data(self, experiment: Any, split: str = "train") -> Any:
        """A split of the data. ValueError if it is not there, or damaged."""

    def heldout_fingerprint(self, experiment: Any) -> str | None:
        """Of the held-out split; None if code makes it. ValueError if there is none."""

    def resolve(self, experiment: Any, dataset: Any) -> Any:
        """Fill in what follows from the data, and check that all parts fit; ConfigError names a field that does not."""

    def resolve_without_data(self, experiment: Any) -> Any:
        """The same for a config that states itself what follows from the data."""

    # ----------------------------------------------------------------------------------------------------- the training

    def training_parts(
        self, experiment: Any, dataset: Any, folder: Path, earlier: checkpoint.Checkpoint | None
    ) -> TrainingParts:
        """Objective, batch, hooks and unit for a run in `folder` that goes on, or starts, from `earlier`.

        ValueError if that cannot be gone on from.
        """

    def check_parts(self, experiment: Any, dataset: Any, start: checkpoint.Checkpoint | None) -> None:
        """ValueError for what training and evaluation would be refused for later, as far as nothing need be made.

        Args:
            dataset: to train on; None where it is yet to be made.
            start: what a new run takes its weights from.
        """

    def objective_name(self, experiment: Any) -> str:
        """What is trained: losses can only be compared of one objective."""

    # --------------------------------------------------------------------------------------------------- a trained run

    def open_run(self, path: str | Path, overrides: Sequence[str] = (), *, experiment: Any = None) -> Run:
        """Open a run folder, or a checkpoint folder, on this process's device.

        Args:
            overrides: ``key=value`` changes to the section ``sample``.
            experiment: says how it is sampled and evaluated, in place of the checkpoint's config.
        """

    def sample(self, path: Path, overrides: Sequence[str], options: SampleOptions) -> Report | None:
        """Sample from a run; returns what sample.json holds, None on all processes but the main one.

        ValueError for bad input, an option of other tasks among them, before anything is written.
        """

    def require_heldout(self, experiment: Any) -> None:
        """ValueError if there are no held-out data that a run of `experiment` can be scored on."""

    def open_split(self, run: Any, split: str | None) -> tuple[Any, str]:
        """A split of the data of a run, to go through without training, and what to call it.

        None: what was held out, or if nothing was, what was trained on. Raises what opening it raises.
        """

    def heldout_loss(self, run: Any, config: HeldoutConfig) -> HeldoutResult:
        """The loss on held-out data; `config` is for models of images."""

    # ------------------------------------------------------------------------------------------------- the quick start

    def check_quickstart(self, experiment: Any, *, skip_broken: bool = False) -> None:
        """ConfigError for what `dit-moe quickstart` could not do, before it makes the data."""

    def without_broken(self, experiment: Any) -> Any:
        """The experiment with images that cannot be read left out, wherever they are read."""

    def describe_evaluation(self, experiment: Any) -> str | None:
        """What will be chosen for the evaluation of a new run, if the config leaves that open.

        ConfigError if nothing can be.
        """

    def evaluation(self, experiment: Any, folder: Path) -> Callable[[], Report | None]:
        """Checks, before the training, what is needed after it. Returns what samples and evaluates the run in `folder`.

        That returns the report; None on all processes but the main one.
        """

    def print_report(self, report: Report) -> None:
        """What `evaluation` found, to be read."""


def task_of(source: str | Path | Tree | AnyExperiment) -> Task:
    """The task of a run folder, of a config, typed or not. ValueError if it is none."""
    if isinstance(source, str | Path):
        source = open_model(source).config()
    kind = kind_of(source) if isinstance(source, dict) else source.model.KIND
    task: Task = import_module(f"dit_moe.tasks.{kind}")
    return task


if TYPE_CHECKING:
    from dit_moe.tasks import images, text

    _images: Task = images
    _text: Task = text
