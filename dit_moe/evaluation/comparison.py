"""Samples against a reference, from sources to the report, by all processes together.

All that can be known before the work is checked before it: sizes, counts, labels, what each metric needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_moe.distributed import join_processes, on_main
from dit_moe.evaluation.comparability import Reason, conditions_of, reasons_not_comparable, reasons_of_storage
from dit_moe.evaluation.compute import compute_report
from dit_moe.evaluation.extraction import Extraction, temporary_unless
from dit_moe.evaluation.features import ExtractedFeatures, FeatureFolder
from dit_moe.evaluation.report import Report
from dit_moe.evaluation.requirements import plan, require_comparable, summarize
from dit_moe.evaluation.sources.base import EvaluationInput, ReadOptions, Source, Statistics
from dit_moe.evaluation.sources.npz import require_extractor
from dit_moe.extractors import FeatureExtractor
from dit_moe.extractors.base import UNKNOWN_EXTRACTOR
from dit_moe.metrics import METRICS, FeatureSet, configs_of, frechet_distance
from dit_moe.metrics.neighbours import NearestNeighbourConfig

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


def silent(doing: str, images: int) -> AbstractContextManager[Callable[[int], object]]:
    """No progress."""
    return nullcontext(lambda count: None)


class Comparison:
    """A reference, whose features are made once, for samples to be compared with.

    Args:
        reference: images, statistics or both, and held-out images if there are any; None to make features only.
        extractor: on its device.
        metrics: configs of METRICS; None takes those that suit the extractor and that both sides have enough for.
        folder: where features are kept, so that what was interrupted goes on; None keeps none.
        reconstructed: the held-out images once an autoencoder has encoded and decoded them.
        noise: images that are far from all others: their Fréchet distance stands beside that of the samples.
        statistics: read all that a file of statistics holds, whatever the metrics need.
        options: how files of images were read.
        asked: what else the report is to say of what it was asked for.
        allow_few: let the verified Inception make a FID of fewer than 2048 images.
        progress: called with what is being done and the number of images; gives a context with what to call after every
            batch.
    """

    def __init__(
        self,
        reference: EvaluationInput | None,
        extractor: FeatureExtractor,
        metrics: Sequence[object] | None = None,
        *,
        folder: Path | None = None,
        reconstructed: Source | None = None,
        noise: Source | None = None,
        options: ReadOptions = ReadOptions(),  # noqa: B008 (frozen)
        asked: Mapping[str, Any] = {},
        allow_few: bool = True,
        statistics: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.reference, self.extractor, self.metrics = reference, extractor, metrics
        self.folder, self.reconstructed, self.progress, self.allow_few = folder, reconstructed, progress, allow_few
        self.statistics, self.options, self.asked, self.noise = statistics, options, dict(asked), noise
        self._real: dict[str, ExtractedFeatures | None] = {}  # None: another process has it
        self._samples: Sequence[EvaluationInput] | None = None  # that were checked last, and what came of it
        self._planned: list[object] = []
        self._left_out: list[str] = []
        self._no_heldout = "" if reference is None else reference.no_heldout

    def check(self, samples: Sequence[EvaluationInput] = ()) -> None:
        """ValueError unless these can be compared with the reference: before the work."""
        others = [EvaluationInput(source=one) for name, one in self._images().items() if name != "reference"]
        sides = [summarize(one, self.extractor) for one in [*samples, *others]]
        reference = None if self.reference is None else summarize(self.reference, self.extractor, as_reference=True)
        require_comparable(sides, reference, few_for_fid=self.extractor.is_fid and not self.allow_few)
        self._samples = samples
        if reference is not None:
            self._planned, self._left_out = plan(self.metrics, self.extractor, sides, reference)

    def prepare(self) -> None:
        """Make the features of the real images, unless that was done."""
        if self._real:
            return
        if self._samples is None:
            self.check()
        for name, source in self._images().items():
            self._real[name] = self._extract(source, name)
        if self.reference is not None and self.reference.features is not None:
            self._real["reference"] = self._read(self.reference.features)
        if self.noise is not None:
            self._real["noise"] = self._extract(self.noise, "noise")
        on_main(self._require_held_out)

    def _require_held_out(self) -> None:
        """ValueError if all held-out images are in the reference: their distance would be no floor.

        Those of the run's data are then left out.
        """
        heldout, reference = (self._real.get(name) for name in ("heldout", "reference"))
        if heldout is not None and reference is not None and _shared(heldout, reference) == heldout.features.count:
            if self.reference is not None and self.reference.heldout_of_run:
                self._real["heldout"] = None
                self._no_heldout = f"the held-out images of the run, {heldout.described['name']}, are in the reference"
                return
            problem = f"all {heldout.features.count} held-out images, {heldout.described['name']}, are in the reference"
            raise ValueError(f"{problem}; hold out images that are not trained on, or set heldout=null")

    def _in_common(self) -> list[str]:
        heldout, reference = (self._real.get(name) for name in ("heldout", "reference"))
        shared = 0 if heldout is None or reference is None else _shared(heldout, reference)
        if not shared or heldout is None:
            return []
        return [f"{shared} of {heldout.features.count} held-out images are in the reference, so the floor reads low"]

    def features(self, samples: Sequence[EvaluationInput], save_npz: Path | None = None) -> list[ExtractedFeatures]:
        """Of samples, on the main process; empty on the others. `save_npz` gets the images of the first."""
        if self._samples is not samples:
            self.check(samples)
        made: list[ExtractedFeatures | None] = []
        for i, one in enumerate(samples):
            if one.source is not None:
                made.append(self._extract(one.source, f"samples_{i}", None if i else save_npz))
            elif one.features is not None:
                made.append(self._read(one.features))
            else:
                assert one.statistics is not None, "a side is something"
                made.append(self._from_statistics(one.statistics))
        return [one for one in made if one is not None] if join_processes().is_main_process else []

    def report(self, made: Sequence[ExtractedFeatures]) -> Report:
        """Of the features of samples, on the main process after `prepare`; it waits for no other."""
        samples = self._samples or ()
        reference, warnings, statistics_unused = self._reference()
        files = [one.statistics for one in samples if one.source is None and one.statistics is not None]
        warnings += [note for one in files if (note := require_extractor(one, self.extractor))]
        found = compute_report(
            made,
            reference,
            self.extractor,
            self._planned,
            heldout=self._real.get("heldout"),
            reconstructed=self._real.get("reconstruction"),
            noise=self._real.get("noise"),
            space=None if all(one.extractor for one in files) else UNKNOWN_EXTRACTOR,
            device=join_processes().device,
        )
        identical, space = _identical(made, reference), found.provenance.extractor
        conditions = conditions_of(
            samples,
            self.reference or EvaluationInput(),
            self._planned,
            options=self.options,
            extractor=space["name"],
            is_fid=space["is_fid"],
            statistics_unused=statistics_unused,
            identical=identical,
        )
        if self._real.get("heldout") is None:
            warnings.append(f"no floor, the distance of held-out images: {self._no_heldout}")
        texts = [each.text for each in [*identical, *reasons_of_storage(conditions)]]
        reasons = reasons_not_comparable(conditions)
        return replace(
            found,
            provenance=replace(
                found.provenance, identical=[each.text for each in identical], asked=self.asked, reasons=reasons
            ),
            warnings=[*self._left_out, *warnings, *texts, *self._in_common(), *_decoded(made), *found.warnings],
        )

    def evaluate(self, samples: Sequence[EvaluationInput]) -> Report | None:
        """All of it: the report on the main process, None on the others, which do not wait for it."""
        self.check(samples)
        self.prepare()
        made = self.features(samples)
        return self.report(made) if join_processes().is_main_process else None

    def _images(self) -> dict[str, Source]:
        reference = self.reference or EvaluationInput()
        named = {"reference": reference.source, "heldout": reference.heldout, "reconstruction": self.reconstructed}
        return {name: source for name, source in named.items() if source is not None}

    def _needs(self) -> frozenset[str]:
        """The tensors that the metrics will read."""
        configs = configs_of(self.extractor.metrics) if self.metrics is None else self.metrics
        metrics = [METRICS.factory(each) for each in configs]
        needs = {need for metric in metrics for need in metric.needs | metric.needs_of_samples}
        needs |= {"spatial_NS"} if "spatial_moments" in needs or self.statistics else set()
        if any(isinstance(each, NearestNeighbourConfig) for each in configs):
            needs |= {"thumbnails_NP"}  # which it does not insist on
        return frozenset(needs)

    def _extract(self, source: Source, name: str, save_npz: Path | None = None) -> ExtractedFeatures | None:
        with temporary_unless(self.folder and self.folder / name) as folder:
            extraction = Extraction(source, self.extractor, folder, keep_images=save_npz is not None)
            processes, missing = join_processes().num_processes, extraction.images_to_make()
            with self.progress(f"features of {source.name}", missing) as advance:
                # the others are taken to be as quick as this process
                found = extraction.run(lambda count: advance(count * processes), self._needs())
            if save_npz is not None:
                on_main(lambda: extraction.save_npz(save_npz))
        return found

    def _read(self, folder: FeatureFolder) -> ExtractedFeatures | None:
        return on_main(lambda: folder.read(self.extractor))

    def _from_statistics(self, given: Statistics) -> ExtractedFeatures:
        """Statistics, which `check` found to be of this space, in place of images."""
        moments: dict[str, Any] = {"given_moments": given.moments, "given_spatial_moments": given.spatial_moments}
        features = FeatureSet(given.source, given.moments.n, **moments)
        identity = {"kind": "statistics", "sha256": given.sha256, "extractor": given.extractor}
        return ExtractedFeatures(features, identity, identity | {"name": given.source, "count": given.moments.n})

    def _reference(self) -> tuple[ExtractedFeatures, list[str], bool]:
        """With warnings, and whether its statistics are of another network and its images are used instead."""
        assert self.reference is not None
        images, given = self._real.get("reference"), self.reference.statistics
        if given is None:
            assert images is not None, "a reference is images or statistics"
            return images, [], False
        try:
            note = require_extractor(given, self.extractor)
        except ValueError as error:
            if images is None:
                raise
            return images, [f"{error}; its images are used in place of its statistics"], True
        statistics, warnings = self._from_statistics(given), [note] if note else []
        if images is None:
            return statistics, warnings, False
        own = images.features.moments
        assert own is not None
        apart = frechet_distance(own.mean_D, own.covariance(), given.moments.mean_D, given.moments.covariance())
        both = replace(
            images.features,
            given_moments=given.moments,
            given_spatial_moments=given.spatial_moments,
            spatial_NS=None,  # FID and sFID are to be of one reference
        )
        described = images.described | {"statistics": statistics.described | {"distance_of_its_images": apart}}
        return replace(images, features=both, described=described), warnings, False


def _identical(samples: Sequence[ExtractedFeatures], reference: ExtractedFeatures) -> list[Reason]:
    """Why nothing, or less, is learned of images that are the reference's own, or equal to each other."""
    found: list[Reason] = []
    for i, one in enumerate(samples):
        name = one.described["name"]
        if _same(one, reference):
            found.append(Reason.plain(f"{name} and the reference are the same images"))
        elif shared := _shared(one, reference):
            found.append(Reason.of("in the reference", found=shared, count=one.features.count, name=name))
        content_N = one.content_N or ()
        if len(different := set(content_N)) < len(content_N):
            found.append(Reason.of("equal images", found=len(different), count=len(content_N), name=name))
        for other in samples[:i]:
            if _same(one, other):
                found.append(Reason.plain(f"{name} is among the samples twice: the same images"))
            elif shared := _shared(one, other):
                of = {"count": one.features.count, "name": name, "other": other.described["name"]}
                found.append(Reason.of("in other samples", found=shared, **of))
    return found


def _same(a: ExtractedFeatures, b: ExtractedFeatures) -> bool:
    """Whether two sets are the same images, in whatever order."""
    known = a.content_N is not None and b.content_N is not None
    return a.identity == b.identity or (known and sorted(a.content_N or ()) == sorted(b.content_N or ()))


def _shared(one: ExtractedFeatures, other: ExtractedFeatures) -> int:
    """How many images of `one` are also in `other`, as far as is known."""
    content = set(other.content_N or ())
    return sum(each in content for each in one.content_N or ())


def _decoded(samples: Sequence[ExtractedFeatures]) -> list[str]:
    if not any(one.identity.get("kind") == "latents" for one in samples):
        return []
    return ["samples are decoded latents: if of the reference's own images, their floor is 0, not `floor`"]
