"""The report of one run's routing: the run opened, counted on held-out data, drawn, and written into a folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dit_moe.analysis.collect import experts_of, spaced
from dit_moe.analysis.collect_images import IMAGES, TIMES, collect_images
from dit_moe.analysis.collect_text import TOKENS, collect_text
from dit_moe.analysis.page import PAGE, write_page
from dit_moe.analysis.statistics import JSON, NPZ, RoutingStats, write_stats
from dit_moe.config import ConfigError, NotThere
from dit_moe.data.latents import NoLatents
from dit_moe.distributed import join_processes
from dit_moe.experiments.run import open_image_run, open_text_run
from dit_moe.files import require_own
from dit_moe.formats import home_of
from dit_moe.formatting import tell
from dit_moe.json_files import read_object
from dit_moe.locks import exclusive
from dit_moe.progress import work_bar
from dit_moe.tasks import task_of
from dit_moe.tasks.own_samples import OWN_SAMPLES, OwnImages, OwnText
from dit_moe.text.token_shards import NoTokens
from dit_moe.training.curves import router_curves
from dit_moe.training.log import read_log

COUNTS = {"images": ("images", "times"), "text": ("tokens",)}  # the options of `report_routing`, by kind of model


def report_routing(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
    split: str | None = None,
    **counts: int | None,
) -> tuple[RoutingStats, Path] | None:
    """Write the report of a run; returns the statistics and the page. None on all processes but the main one.

    Args:
        path: a run folder, or one of its checkpoint folders.
        overrides: ``key=value`` changes to the sections ``sample`` and ``data``, and to ``eval`` of a language model.
        out: where the files go; None: the folder `routing` in that of the run.
        split: of the data; None: what was held out, or if nothing was, what was trained on. `OWN_SAMPLES` are samples
            that the run makes for it; so they are for None where the data are not there, as of a run that was moved.
        counts: `images` and `times` (noise levels), or `tokens` of text: at most so many; None is the default.

    Raises ValueError for bad input, before the work starts.
    """
    if not join_processes().is_main_process:  # one process is enough, and the others would write the same files
        return None
    kind = task_of(path).kind
    for option, count in counts.items():
        if count is not None and option not in COUNTS[kind]:
            raise ConfigError(f"--{option}", f": {path} is a model of {kind}; leave it out")
        if count is not None and count < 1:
            raise ConfigError(f"--{option}", f"={count} must be at least 1")
    home = home_of(path)
    out = out or home / "routing"
    require_own(out, (PAGE, JSON, NPZ), "pictures" in read_object(out / JSON))
    with exclusive(out, JSON):
        start, log = time.perf_counter(), read_log(home / "log.jsonl")  # before the work, as it may be damaged
        stats = _count(path, kind, overrides, split, {name: count for name, count in counts.items() if count})
        facts = {"device": join_processes().device.type, "seconds": round(time.perf_counter() - start, 1)}
        facts["versions"] = ", ".join(f"{name} {version(name)}" for name in ("dit_moe", "torch", "numpy"))
        training = router_curves(log, stats.facts["step"])
        stats = replace(stats, facts=stats.facts | facts, training=training)
        write_stats(stats, out, pictures=write_page(stats, out))
    return stats, out / PAGE


def _count(path: Path, kind: str, overrides: Sequence[str], split: str | None, counts: dict[str, int]) -> RoutingStats:
    device = join_processes().device
    run: Any
    if kind == "images":
        run = open_image_run(path, overrides, device=device)
    else:
        run = open_text_run(path, overrides, scoring=True, device=device)
    experts_of(run)
    data, split = _open_split(run, kind, overrides, split, counts)
    stats = (_collect_images if kind == "images" else _collect_text)(run, data, **counts)
    return replace(stats, facts=stats.facts | {"split": split})


def _open_split(
    run: Any, kind: str, overrides: Sequence[str], split: str | None, counts: Mapping[str, int]
) -> tuple[Any, str]:
    """What `report_routing` counts on, and what to call it."""
    named = split is not None or any(each.startswith("data.") for each in overrides)
    if split != OWN_SAMPLES:
        try:
            found: tuple[Any, str] = task_of(run.experiment).open_split(run, split)
            return found
        except (NoLatents, NoTokens, NotThere) as error:
            if named:
                raise
            tell(f"note: {error}; the routing shown is that of samples of the run itself")
            split = f"{OWN_SAMPLES} (of the run itself, as its data are not there)"
    return OwnImages(run, counts.get("images")) if kind == "images" else OwnText(run), split


def _collect_images(run: Any, dataset: Any, images: int = IMAGES, times: int = TIMES) -> RoutingStats:
    with work_bar("routing", len(spaced(len(dataset), images)) * times, "images") as on_progress:
        return collect_images(run, dataset, images=images, times=times, on_progress=on_progress)


def _collect_text(run: Any, shards: Any, tokens: int = TOKENS) -> RoutingStats:
    """Of the first documents if the section `eval` limits their number, or else of some, spread over the text."""
    most = run.experiment.eval.max_documents
    documents = shards.documents(stop=most, step=max(1, len(shards) // tokens) if most is None else 1)
    with work_bar("routing", min(tokens, len(shards)), "tokens") as on_progress:
        return collect_text(run, documents, tokens=tokens, on_progress=on_progress)
