"""Samples against a reference, from sources to the report, by all processes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dit_moe.evaluation.extraction import Extracted, Extraction, read_features, temporary_unless
from dit_moe.evaluation.image_writer import image_writer
from dit_moe.evaluation.report import WHAT_LACKS, Report, evaluate, lacking, require_two
from dit_moe.evaluation.sources.base import Opened, Source, Statistics
from dit_moe.evaluation.sources.statistics import require_same_space
from dit_moe.extractors import FeatureExtractor, Features
from dit_moe.metrics import METRICS, FeatureSet, frechet_distance
from dit_moe.processes import join_processes, on_main

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


def silent(doing: str, images: int) -> AbstractContextManager[Callable[[int], object]]:
    """No progress."""
    return nullcontext(lambda count: None)


class Comparison:
    """A reference, whose features are made once, for samples to be compared with.

    Args:
        reference: images, statistics or both, and held-out images if there are any; None to make features only.
        extractor: on its device.
        metrics: configs of METRICS; None takes those that suit the extractor.
        folder: where features are kept, so that what was interrupted goes on; None keeps none.
        reconstructed: the held-out images once an autoencoder has encoded and decoded them.
        progress: called with what is being done and the number of images; gives a context with what to call after every
            batch.
    """

    def __init__(
        self,
        reference: Opened | None,
        extractor: FeatureExtractor,
        metrics: Sequence[object] | None = None,
        *,
        folder: Path | None = None,
        reconstructed: Source | None = None,
        progress: Progress = silent,
    ) -> None:
        self.reference, self.extractor, self.metrics = reference or Opened(), extractor, metrics
        self.folder, self.reconstructed, self.progress = folder, reconstructed, progress
        self._real: dict[str, Extracted | None] = {}  # None: another process has it
        self._prepared = False

    def check(self, samples: Sequence[Opened] = ()) -> None:
        """ValueError unless these images can be compared with the reference: before the work."""
        reference = self.reference.source
        if self.reference.statistics is not None and reference is None:
            require_same_space(self.reference.statistics, self.extractor)
        for one in [*(each.source for each in samples), *self._real_sources().values()]:
            if one is None:
                continue
            self.extractor.check(one.image_shape)
            if reference is not None and one.image_shape != reference.image_shape:
                found, wanted = ("×".join(map(str, each.image_shape)) for each in (one, reference))
                problem = f"{one.name} has images of {found} (channels, height, width), the reference {reference.name}"
                raise ValueError(f"{problem} of {wanted}; make them equal, for instance by --size and --channels")

        self._require_needs(samples)

    def _require_needs(self, samples: Sequence[Opened]) -> None:
        """ValueError if there are too few images, or if a metric that was asked for will lack something."""
        counts = {_name(one): len(one.source) for one in [*samples, *self._others()] if one.source is not None}
        require_two(counts)
        reference_count = None if self.reference.source is None else len(self.reference.source)
        sides = [(_name(one), _known(one, self.extractor, False)) for one in [*samples, *self._others()]]
        reference = (_name(self.reference), _known(self.reference, self.extractor, True))
        known = [(name, each) for name, each in sides if each is not None]
        for config in self.metrics or ():
            everything = frozenset(WHAT_LACKS)
            metric, name = METRICS.build(config), METRICS.name_of(config)
            problem = lacking(name, metric, known, (reference[0], everything if reference[1] is None else reference[1]))
            if problem is not None:
                raise ValueError(problem)
            if counts:
                metric.check(min(counts.values()), reference_count)

    def _others(self) -> list[Opened]:
        return [Opened(source=source) for name, source in self._real_sources().items() if name != "reference"]

    def prepare(self) -> None:
        """Make the features of the real images, unless that was done."""
        if self._prepared:
            return
        self.check()
        for name, source in self._real_sources().items():
            self._real[name] = self._extract(source, name)
        if self.reference.features is not None:
            self._real["reference"] = self._read(self.reference.features)
        self._prepared = True

    def features(self, samples: Sequence[Opened], save_npz: Path | None = None) -> list[Extracted]:
        """Of samples, on the main process; empty on the others. `save_npz` gets the images of the first."""
        self.check(samples)
        made: list[Extracted | None] = []
        for i, one in enumerate(samples):
            if one.source is not None:
                made.append(self._extract(one.source, f"samples_{i}", None if i else save_npz))
            elif one.features is not None:
                made.append(self._read(one.features))
            else:
                assert one.statistics is not None, "a side is something"
                made.append(self._stated(one.statistics))
        return [one for one in made if one is not None] if join_processes().is_main_process else []

    def report(self, samples: Sequence[Extracted]) -> Report:
        """Of samples whose features are there, on the main process after `prepare`."""
        reference, notes = self._reference()
        heldout, reconstructed = self._real.get("heldout"), self._real.get("reconstruction")
        found = evaluate(
            samples,
            reference,
            self.extractor,
            self.metrics,
            heldout=heldout,
            reconstructed=reconstructed,
            device=join_processes().device,
        )
        return found | {"warnings": [*notes, *found["warnings"]]}

    def judge(self, samples: Sequence[Opened]) -> Report | None:
        """All of it: the report on the main process, None on the others."""
        self.check(samples)
        self.prepare()
        made = self.features(samples)
        reports: list[Report] = []
        on_main(lambda: reports.append(self.report(made)))
        return reports[0] if reports else None

    def _real_sources(self) -> dict[str, Source]:
        named = {
            "reference": self.reference.source,
            "heldout": self.reference.heldout,
            "reconstruction": self.reconstructed,
        }
        return {name: source for name, source in named.items() if source is not None}

    def _extract(self, source: Source, name: str, save_npz: Path | None = None) -> Extracted | None:
        with temporary_unless(self.folder and self.folder / name) as folder:
            extraction = Extraction(source, self.extractor, folder, keep_images=save_npz is not None)
            processes, missing = join_processes().num_processes, extraction.count(extraction.missing())
            with self.progress(f"features of {source.name}", missing) as advance:
                found = extraction.run(lambda count: advance(count * processes))  # others are as quick, more or less
            if save_npz is not None:
                on_main(lambda: _write_npz(save_npz, extraction))
        return found

    def _read(self, folder: Path) -> Extracted | None:
        read: list[Extracted] = []
        on_main(lambda: read.append(read_features(folder, self.extractor)))
        return read[0] if read else None

    def _stated(self, given: Statistics) -> Extracted:
        """Statistics in place of images. ValueError if they are of another space."""
        note = require_same_space(given, self.extractor)
        moments = {"given_moments": given.moments, "given_spatial_moments": given.spatial_moments}
        features = FeatureSet(given.source, given.moments.n, **moments)  # type: ignore[arg-type]
        said = {"name": given.source, "kind": "statistics", "sha256": given.sha256, "extractor": given.extractor}
        return Extracted(features, said | {"count": given.moments.n} | ({"note": note} if note else {}))

    def _reference(self) -> tuple[Extracted, list[str]]:
        """With what has to be said about it."""
        images, given = self._real.get("reference"), self.reference.statistics
        if given is None:
            assert images is not None, "a reference is images or statistics"
            return images, []
        try:
            stated = self._stated(given)
        except ValueError as error:
            if images is None:
                raise
            return images, [f"{error}; its images are used in place of its statistics"]
        notes = [note] if (note := stated.described.pop("note", None)) else []
        if images is None:
            return stated, notes
        own = images.features.moments
        assert own is not None
        apart = frechet_distance(own.mean_D, own.covariance(), given.moments.mean_D, given.moments.covariance())
        both = replace(images.features, given_moments=given.moments, given_spatial_moments=given.spatial_moments)
        said = images.described | {"statistics": stated.described | {"distance_of_its_images": apart}}
        return Extracted(both, said), notes


def _name(side: Opened) -> str:
    given: Source | Statistics | Path | None = side.source or side.statistics or side.features
    return given.name if isinstance(given, Source) else given.source if isinstance(given, Statistics) else str(given)


def _known(side: Opened, extractor: FeatureExtractor, as_reference: bool) -> frozenset[str] | None:
    """What a FeatureSet of this side will hold; None where that shows only later."""
    if side.features is not None:
        return None
    known: set[str] = set()
    if side.source is not None:
        known |= {"features_ND", "moments", "thumbnails_NP"}
        known |= {"spatial_NS", "spatial_moments"} if extractor.has_spatial else set()
        known |= {"logits_NK"} if extractor.classifies else set()
        known |= {"labels_N"} if side.source.labels_N is not None else set()
    if side.statistics is not None and (as_reference or side.source is None):
        known |= {"moments"}
        if side.statistics.spatial_moments is not None:
            known |= {"spatial_moments"}
    return frozenset(known)


def _write_npz(path: Path, extraction: Extraction) -> None:
    labels_N = extraction.source.labels_N
    with image_writer(path, len(extraction.source), None if labels_N is None else labels_N.numpy()) as add:
        for images_BCHW in extraction.images():
            add(images_BCHW.permute(0, 2, 3, 1).numpy())


class StatedSpace(FeatureExtractor):
    """The feature space of files of statistics, when nothing is left to extract.

    It is what they all say it is; if one does not say, no number of it is called by the name of a network.
    """

    def __init__(self, files: Sequence[Statistics]) -> None:
        first = files[0].extractor
        agreed = first if first is not None and all(one.extractor == first for one in files) else None
        self.name, self.sha256 = ("unverified", "") if agreed is None else (agreed["name"], agreed["sha256"])
        self.is_fid = agreed is not None and bool(agreed.get("is_fid"))
        self.dim, self._identity = len(files[0].moments.mean_D), agreed
        self.metrics = ("fd", "sfd")  # type: ignore[misc]

    def identity(self) -> dict[str, str | int]:
        return (
            super().identity() if self._identity is None else {k: v for k, v in self._identity.items() if k != "is_fid"}
        )

    def check(self, image_shape: tuple[int, int, int]) -> None:
        raise AssertionError("there are no images")

    def __call__(self, images_BCHW: Tensor) -> Features:
        raise AssertionError("there are no images")
