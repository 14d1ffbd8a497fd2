"""Compare images with a reference: FID and other distances, precision and recall, class accuracy, nearest neighbours.

SAMPLES and REFERENCE are each an images.npz, a folder of images, a file of statistics (mu, sigma, mu_s, sigma_s), one
of ADM's reference batches, a folder of latents, a dataset ("digits", "digits/heldout", "{name: image_folder, path: …}")
or a folder of features. SAMPLES may also be a run: then its images are sampled as they are needed and not written.
Several SAMPLES are several sampling seeds. A run alone is compared with the images that it was trained on.

The result is JSON on stdout, and a table on stderr. With --features, or --out, the same command goes on where it
stopped. Started by torchrun or accelerate it uses every process.

    dit-moe eval runs/digits count=450 guidance.scale=1.5 --seeds 3 --out metrics.json
    dit-moe eval seed0.npz seed1.npz digits --metrics fd,kid,precision_recall
    # needs Inception's weights and ADM's reference batch
    dit-moe eval runs/xl VIRTUAL_imagenet256_labeled.npz --recipe adm-50k --sampling dit-cfg1.5 --out fid.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

from dit_moe.cli import split_words
from dit_moe.cli.ending import end
from dit_moe.evaluation.evaluate import evaluate
from dit_moe.evaluation.options import SHORT, EvalOptions, extractor_names
from dit_moe.evaluation.recipes import EVALUATION
from dit_moe.evaluation.report import print_report
from dit_moe.metrics import METRICS
from dit_moe.sampling.recipes import SAMPLING

RECIPES = "; ".join(f"{recipe.name}, {recipe.summary}" for recipe in EVALUATION.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("words", nargs="+", metavar="WORD", help="SAMPLES, and last the REFERENCE: see above")
    names, short = ", ".join(METRICS.names()), ", ".join(f"{key} = {value}" for key, value in SHORT.items())
    what = parser.add_argument_group("what is measured")
    what.add_argument("--metrics", metavar="A,B", help=f"of {names}; {short}; default: those that suit the extractor")
    what.add_argument(
        "--extractor",
        metavar="NAME",
        help=f"feature space: {', '.join(extractor_names())}, {{name: …, option: …}}, or package.module:function of "
        "your own; default: what suits a run and its images, digits_cnn64 for the digits, cifar10_cnn64 for CIFAR-10, "
        "otherwise inception",
    )
    what.add_argument(
        "--weights",
        metavar="FILE",
        help="the extractor's weights; default: downloaded once, of trained_cnn the folder RUN/extractor",
    )
    what.add_argument(
        "--any-weights", action="store_true", help="take weights of another checksum; no number is then called FID"
    )
    what.add_argument("--kid-subset-size", type=int, metavar="N", help="images in a subset of KID; default 1000")
    what.add_argument("--allow-few", action="store_true", help="FID of fewer than 2048 images, mostly sampling error")
    what.add_argument(
        "--recipe", choices=list(EVALUATION), help=f"measure as published numbers are, or refuse: {RECIPES}"
    )

    runs = parser.add_argument_group("runs as SAMPLES")
    runs.add_argument(
        "--seeds", type=int, metavar="N", help="sampling seeds; default: the run's eval.seeds, 1 with --recipe"
    )
    runs.add_argument(
        "--sampling",
        metavar="NAME",
        help=f"sample as a published baseline was, before any key=value: {', '.join(SAMPLING)}",
    )

    reading = parser.add_argument_group("how images are read")
    reading.add_argument(
        "--size", type=int, metavar="N", help="crop and resize to N×N as ADM does; default: as they are"
    )
    reading.add_argument("--channels", type=int, choices=(1, 3), help="3: repeat grey images; 1: grey of colour ones")
    reading.add_argument(
        "--range", dest="value_range", metavar="LOW,HIGH", help="of float images, for instance --range=-1,1"
    )
    reading.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode; default 0")

    where = parser.add_argument_group("where things go")
    where.add_argument("--out", type=Path, metavar="FILE.json", help="write the result here too")
    where.add_argument(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="keep features here, so that the same command goes on where it stopped; default: FILE.features beside the "
        "first file that --out, --save-stats or --save-npz writes",
    )
    where.add_argument("--save-stats", type=Path, metavar="FILE.npz", help="mu, sigma, mu_s, sigma_s of SAMPLES")
    where.add_argument("--save-npz", type=Path, metavar="FILE.npz", help="the images of SAMPLES, as ADM reads them")


def run(args: argparse.Namespace) -> None:
    """Evaluate, print JSON to stdout and a table to stderr. ValueError for bad input, before anything is written."""
    names, overrides = split_words(args.words)
    options = EvalOptions(**{field.name: getattr(args, field.name) for field in fields(EvalOptions)})
    report, made = evaluate(names, overrides, options)
    if report is not None:
        print(json.dumps(report.to_json(), indent=1, allow_nan=False))
        print_report(report)
    elif made is not None:
        print(json.dumps({"saved": str(options.save_stats), "count": made.features.count}, indent=1))
    written = [path for path in (options.out, options.save_stats, options.save_npz) if path is not None]
    end(written, *([("table", options.out)] if options.out else []))
