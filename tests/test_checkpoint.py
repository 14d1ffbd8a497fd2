import json
import os

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from dit_moe import checkpoint

PARTS = ("model", "ema", "optimizer")


def save(run, step, keep=10, config_yaml=None, **parts):
    tensors = {"w": torch.full((3, 4), float(step))}
    return checkpoint.save(
        run,
        parts={part: parts.get(part, tensors) for part in PARTS},
        state={"step": step, "images": 32 * step},
        config_yaml=config_yaml or f"train:\n  steps: {step}\n",
        keep=keep,
    )


def same_bits(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    odd = {
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "half": torch.randn(5).bfloat16(),
        "transposed": torch.randn(3, 7).T,
        "slice": torch.randn(10)[2:5],
        "whole": torch.arange(4),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    folder = save(tmp_path, 7, model=odd)
    saved = checkpoint.open_checkpoint(folder)
    assert saved.step == 7
    assert saved.state["images"] == 224
    assert saved.config() == checkpoint.open_checkpoint(tmp_path).config() == {"train": {"steps": 7}}
    loaded = saved.weights("model")
    assert loaded.keys() == odd.keys()
    assert all(same_bits(loaded[name], odd[name]) for name in odd)
    assert all(tensor.device.type == "cpu" for tensor in loaded.values())


def test_every_file_has_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        files = [*save(tmp_path, 7).iterdir()]
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_a_run_folder_means_its_newest_checkpoint(tmp_path):
    folders = [save(tmp_path, step) for step in (9, 10, 100)]
    assert checkpoint.checkpoints(tmp_path) == folders
    assert checkpoint.find(tmp_path) == checkpoint.latest(tmp_path) == folders[-1]
    assert checkpoint.find(folders[0]) == folders[0]
    assert checkpoint.open_checkpoint(tmp_path).weights("ema")["w"][0, 0] == 100
    assert checkpoint.open_checkpoint(folders[0]).weights("model")["w"][0, 0] == 9


def test_a_config_from_elsewhere_reads_neither_the_environment_nor_other_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "other.yaml").write_text("b: 1\n")
    save(tmp_path, 1, config_yaml=f"base: {tmp_path}/other.yaml\na: ${{oc.env:SECRET}}\n")
    assert checkpoint.open_checkpoint(tmp_path).config() == {"base": f"{tmp_path}/other.yaml", "a": "${oc.env:SECRET}"}


def test_a_renamed_checkpoint_is_not_passed_over(tmp_path):
    (tmp_path / "checkpoints" / "step_12").mkdir(parents=True)
    with pytest.raises(ValueError, match="step_12 is not a name of a checkpoint, step_00000012 is; rename or move it"):
        checkpoint.latest(tmp_path)


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_00000004", "step_00000005"]


def test_missing_runs_and_runs_without_checkpoint_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist; name a run folder"):
        checkpoint.find(tmp_path / "nowhere")
    (tmp_path / "DiT-XL-2.pt").touch()
    with pytest.raises(ValueError, match=r"DiT-XL-2.pt is a file, and a run is a folder; name a run folder"):
        checkpoint.find(tmp_path / "DiT-XL-2.pt")
    with pytest.raises(ValueError, match=r"holds no checkpoint; train a run into it first"):
        checkpoint.open_checkpoint(tmp_path).weights("ema")
    assert checkpoint.latest(tmp_path) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def edit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


FILES = [*(f"{part}.safetensors" for part in PARTS), "config.yaml"]


@pytest.mark.parametrize("name", [*FILES, "state.json"])
@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink()], ids=["truncated", "missing"])
def test_damage_is_one_error_with_file_and_remedy_and_never_a_silent_fallback(tmp_path, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = save(tmp_path, 3)
    damage(newest / name)
    with pytest.raises(ValueError, match=rf"step_00000003/{name} .*delete it to go on from step_00000002"):
        checkpoint.open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found_when_the_file_is_read(tmp_path, name):
    edit(save(tmp_path, 3) / name)
    saved = checkpoint.open_checkpoint(tmp_path)
    read = saved.config if name == "config.yaml" else lambda: saved.weights(name.removesuffix(".safetensors"))
    with pytest.raises(ValueError, match=rf"{name} was changed after it was written.*delete it to start anew"):
        read()


FORGED = {
    "": "is empty",
    "[]": "is no file of dit-moe, or damaged",
    '{"format": "1"}': "is no file of dit-moe, or damaged",
    '{"format": 1, "step": 3}': ": files is missing",
    '{"format": 1, "step": 3, "files": 1}': ": files=1 must be an object",
    '{"format": 1, "step": 4, "files": {}}': " is of step 4, not of the one that names the folder",
    '{"format": 1, "step": -1, "files": {}}': ": step=-1 must be from 0 to",
    '{"format": 1, "step": 3, "files": {"../a": {}}}': ": files=../a must be the name of a file",
    '{"format": 1, "step": 3, "files": {"a": {"bytes": 1, "sha256": 2}}}': ": files.a.sha256=2 must be a text",
    '{"format": 1, "step": 3, "files": {}, "class_names": [7]}': r": class_names\[0\]=7 must be a text",
    '{"format": 1, "step": 3, "files": {}, "since_line": {"steps": 1}}': ": since_line.gathered is missing",
}


@pytest.mark.parametrize("text", FORGED)
def test_a_nonsensical_state_is_refused(tmp_path, text):
    (save(tmp_path, 3) / "state.json").write_text(text)
    with pytest.raises(ValueError, match=rf"state.json ?{FORGED[text]}.*; restore .* or delete it to start anew$"):
        checkpoint.open_checkpoint(tmp_path)


def test_a_file_that_the_state_does_not_list_is_not_read(tmp_path):
    path = save(tmp_path, 3) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))
    with pytest.raises(ValueError, match=r"state.json does not list ema.safetensors; restore"):
        checkpoint.open_checkpoint(tmp_path).weights("ema")


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path, 3) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        checkpoint.open_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_earlier_checkpoint_and_no_remains_on_the_full_disk(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def disk_full(tensors, path):
        path.write_bytes(b"half a file")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", disk_full)
        with pytest.raises(OSError, match="No space left on device"):
            save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert checkpoint.open_checkpoint(tmp_path).step == 1
    (tmp_path / "checkpoints" / f"{checkpoint.TEMPORARY}step_00000002").mkdir()  # of a process that was killed
    save(tmp_path, 2, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_what_a_user_has_put_beside_or_into_old_checkpoints_stays(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, keep=9)
    mine = [tmp_path / "checkpoints" / name / "notes.txt" for name in ("step_00000001", f"{checkpoint.TEMPORARY}plans")]
    mine[1].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    save(tmp_path, 3, keep=1)
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]


def test_a_checkpoint_is_never_overwritten(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(FileExistsError, match="step_00000001 exists already"):
        save(tmp_path, 1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("threshold", torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    original, copy = Tied(), Tied()
    state = checkpoint.state_of(original)
    assert set(state) == {"embedding.weight", "threshold"}
    save(tmp_path, 1, model=state)
    checkpoint.load_into(copy, checkpoint.open_checkpoint(tmp_path).weights("model"), tmp_path)
    assert torch.equal(copy.head.weight, original.embedding.weight)
    assert copy.head.weight is copy.embedding.weight


def test_whole_numbers_in_the_place_of_weights_are_refused_and_other_widths_are_not():
    module = nn.Linear(3, 4)
    weights = {name: tensor.detach().bfloat16() for name, tensor in module.state_dict().items()}
    checkpoint.load_into(module, weights, "runs/other")
    weights["bias"] = weights["bias"].to(torch.int32)
    with pytest.raises(ValueError, match=r"runs/other holds another .* \(of another kind: bias int32 for float32\)"):
        checkpoint.load_into(module, weights, "runs/other")


def test_weights_of_another_architecture_are_refused_with_their_first_few_keys_and_nothing_is_loaded():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = module[0].bias.clone()
    weights = {f"1.extra.{i}": torch.zeros(1) for i in range(9)}
    weights |= {"0.weight": torch.zeros(5, 3), "0.bias": torch.ones(4), "1.bias": torch.ones(2)}
    with pytest.raises(ValueError, match="runs/other holds another architecture") as caught:
        checkpoint.load_into(module, weights, "runs/other")
    message = str(caught.value)
    assert "missing: 1.weight;" in message
    assert "unexpected: 1.extra.0, 1.extra.1, 1.extra.2 and 6 more" in message
    assert "0.weight [5, 3] for [4, 3]" in message
    assert "\n" not in message
    assert torch.equal(module[0].bias, before)


def test_gathering_leaves_what_no_process_shares_where_it_is():
    tensors = {"w": torch.ones(3)}
    assert checkpoint.gathered(tensors, keep=True)["w"] is tensors["w"]
    assert checkpoint.gathered(tensors, keep=False) == {}
