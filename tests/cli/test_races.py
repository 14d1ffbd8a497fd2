"""An output is of one command: it replaces nothing of a user's, and two with the same one mix or damage nothing."""

from pathlib import Path

import pytest

from tests.cli.conftest import CONFIG, cli
from tests.scripts import in_use, said

AUTOENCODER, LATENTS = (Path(CONFIG).with_name(f"{name}.yaml") for name in ("autoencoder_digits", "digits_latent"))
SCRIPT = Path(__file__).with_name("race_script.py")


def ended(command: str, run: Path, out: Path) -> int:
    return cli(*(word.replace("RUN", str(run)).replace("OUT", str(out)) for word in command.split()))


def test_what_lies_there_after_a_race_is_whole_and_of_a_command_that_ended_well(finished_run, tmp_path):
    """Of the command whose files are written longest."""
    assert said(SCRIPT, finished_run, tmp_path, 3)


@pytest.mark.parametrize(
    "held, command",
    [
        ("sample.json", "sample RUN --out OUT"),
        ("images.npz", "sample RUN --out OUT --save npz"),
        ("metrics.json", "eval RUN digits --out OUT/metrics.json"),
        ("metrics.features", "eval RUN digits --save-npz OUT/metrics.npz"),
        ("routing.json", "routing RUN --out OUT"),
        ("table.csv", "table --out OUT/table.md --csv OUT/table.csv"),
        ("", "dial RUN --out OUT"),
        ("", f"train {CONFIG} --run OUT"),
        ("", f"quickstart {CONFIG} --run OUT"),
        ("autoencoder", f"train-autoencoder {AUTOENCODER} --run OUT"),
        ("", f"encode {LATENTS} data.path=OUT"),
    ],
)
def test_an_output_in_use_is_refused_before_anything_is_computed(finished_run, tmp_path, held, command, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with in_use(out, held):
        assert ended(command, finished_run, out) == 2
    assert f"error: {out / held} is in use by another process; wait for it, or" in capsys.readouterr().err
    assert not any(out.iterdir())


@pytest.mark.parametrize(
    "name, command",
    [
        ("grid.png", "sample RUN --out OUT"),
        ("report.html", "routing RUN --out OUT"),
        ("dial.md", "dial RUN --out OUT"),
        ("metrics.json", f"quickstart {CONFIG} --run OUT"),
        ("manifest.json", f"encode {LATENTS} data.path=OUT"),
        ("study.yaml", "compare digits --out OUT"),
        ("loss_vs_flops.png", "compare digits --report --out OUT"),
    ],
)
def test_a_file_of_a_user_is_not_replaced_and_nothing_is_computed(finished_run, tmp_path, name, command, capsys):
    (tmp_path / name).write_text("mine")
    assert ended(command, finished_run, tmp_path) == 2
    told = f"error: {tmp_path / name} is there already, and nothing says that dit-moe wrote it; move it away, or name"
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"
