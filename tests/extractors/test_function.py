"""Functions of the user's as feature spaces, good and bad ones."""

import hashlib

import pytest
import torch

from dit_moe.extractors import EXTRACTORS
from dit_moe.extractors.function import FunctionConfig

CODE = """
import torch
number = 3
def means(images): return images.float().mean((2, 3))
def fid(images): return images.double().mean((2, 3))
def whole(images): return images.long().sum((2, 3))
def grows(images): return torch.ones(len(images), images.shape[3])
def array(images): return images.float().mean((2, 3)).numpy()
def flat(images): return images.float().mean((1, 2, 3))
def short(images): return images[1:].float().mean((2, 3))
def nan(images): return images.float().mean((2, 3)) / 0
def boom(images): return {}["oops"]
def refuses(images): raise ValueError("not so\\ngrey")
"""
IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    path = tmp_path / "own_features.py"
    path.write_text(CODE)
    (tmp_path / "needs_more.py").write_text("import there_is_no_such_module")
    (tmp_path / "unfinished.py").write_text("\ndef f(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


def build(name, module="own_features", **options):
    return EXTRACTORS.build(FunctionConfig(path=f"{module}:{name}", **options))


def test_features_are_what_the_function_returns_and_no_name_of_one_makes_a_fid(module):
    extractor = build("means")
    extractor.check((3, 4, 4))
    assert (extractor.name, extractor.dim) == ("function_own_features_means", 3)
    assert extractor.sha256 == hashlib.sha256(module.read_bytes()).hexdigest()
    assert torch.equal(extractor(IMAGES).features_BD, IMAGES.float().mean((2, 3)))
    assert extractor.logits(extractor(IMAGES).features_BD) is None
    assert build("fid").name == "function_own_features_fid" and not build("fid").is_fid
    dtypes = [build(name)(IMAGES).features_BD.dtype for name in ("fid", "whole")]  # float64 and whole numbers
    assert dtypes == [torch.float64, torch.float32]


def test_its_identity_is_that_of_its_code_and_weights_before_and_after_it_was_called(tmp_path):
    (tmp_path / "other_features.py").write_text(CODE)
    identities = [build("means").identity(), build("means", module="other_features").identity()]
    for content in (b"one", b"two"):
        (tmp_path / "weights").write_bytes(content)
        extractor = build("means", weights=str(tmp_path / "weights"))
        before = extractor.identity()
        extractor.check((3, 4, 4))
        assert extractor.identity() == before
        identities.append(before)
    assert all(identities.count(each) == 1 for each in identities)
    with pytest.raises(ValueError, match=r"none cannot be read .*--weights FILE"):
        build("means", weights=str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["array", "flat", "short", "nan"])
def test_anything_but_a_table_of_finite_features_is_refused_when_tried_and_later(name):
    for look in (lambda: build(name).check((3, 4, 4)), lambda: build(name)(IMAGES)):
        with pytest.raises(ValueError, match=f"own_features:{name} returned .*; it must return a tensor of finite"):
            look()


@pytest.mark.parametrize(
    "name, line, said", [("boom", 12, "KeyError 'oops'"), ("refuses", 13, "ValueError not so grey")]
)
def test_an_error_of_the_function_is_told_in_one_line_with_its_place(name, line, said):
    wanted = (
        f"^--extractor own_features:{name} failed on 2 blank images 1×8×8: {said} .own_features.py:{line}.; mend it$"
    )
    with pytest.raises(ValueError, match=wanted):
        build(name).check((1, 8, 8))


def test_a_width_that_changes_is_refused():
    extractor = build("grows")
    extractor.check((3, 4, 4))
    with pytest.raises(ValueError, match="returned 8 features, and 4 before"):
        extractor(torch.zeros(2, 3, 4, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    "where, name, message",
    [
        ("own_features.deeper", "means", "no module own_features.deeper; put its folder on PYTHONPATH"),
        ("needs_more", "means", r"failed as needs_more was .* ModuleNotFoundError .*such_module' \(needs_more.py:1\)"),
        ("unfinished", "f", r"failed as unfinished was imported: SyntaxError .* \(unfinished.py:2\)"),
        ("own_features", "maens", r"own_features.py has no maens; name a function"),
        ("own_features", "number", r"own_features.py is no function: number; name a function"),
        ("builtins", "len", "builtins has no source file"),
        ("features.py", "", r"path=features.py: must be package.module:function"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_with_a_remedy(where, name, message):
    with pytest.raises(ValueError, match=message):
        build(name, module=where)
