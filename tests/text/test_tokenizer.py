"""Tokenizers: nothing is lost or added, and the same one is known again wherever it lies."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_moe.config import ConfigError
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer
from tests.folders import contents
from tests.text.tokens import save_bpe, texts

transformers = pytest.importorskip("transformers")

BYTES = open_tokenizer(TokenizerConfig())
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return save_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    BYTES.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@given(text=ANY_TEXT.filter(lambda text: "<|endoftext|>" not in text))
@settings(max_examples=100)
def test_ids_of_the_bytes_tokenizer_are_the_bytes_of_utf8_also_without_our_code(saved_bytes, text):
    assert bytes(BYTES.encode(text)) == bytes(saved_bytes(text)["input_ids"]) == text.encode()
    assert BYTES.decode(BYTES.encode(text)) == saved_bytes.decode(saved_bytes(text)["input_ids"]) == text


def test_every_byte_has_its_token_saved_or_not_and_transformers_4_can_load_it(tmp_path, saved_bytes):
    for byte in range(256):
        [letter] = saved_bytes.convert_ids_to_tokens([byte])
        assert saved_bytes.convert_tokens_to_ids(letter) == byte
        if byte < 128:
            assert saved_bytes.decode([byte]) == BYTES.decode([byte]) == chr(byte)
    every = "".join(map(chr, range(0x800)))  # all one- and two-byte sequences of UTF-8
    assert saved_bytes(every)["input_ids"] == BYTES.encode(every) == list(every.encode())
    assert (saved_bytes.eos_token_id, saved_bytes.pad_token_id, len(saved_bytes)) == (256, 256, 257)
    assert (BYTES.eos, BYTES.vocab_size) == (256, 257)
    BYTES.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_text_that_spells_a_special_token_is_plain_text(name, bpe):
    tokenizer = BYTES if name == "bytes" else open_tokenizer(TokenizerConfig(name=str(bpe)))
    text = "before<|endoftext|><|padding|> after"
    ids = tokenizer.encode(text)
    assert tokenizer.eos not in ids and tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eos]) == "<|endoftext|>"
    assert tokenizer.hf(text)["input_ids"] != ids  # transformers' own way is as it always was


def test_a_tokenizer_of_a_folder_encodes_as_transformers_does(bpe):
    tokenizer, theirs = open_tokenizer(TokenizerConfig(name=str(bpe))), transformers.AutoTokenizer.from_pretrained(bpe)
    for text, ids in zip(texts(), tokenizer.encode_batch(texts()), strict=True):
        assert ids.tolist() == tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == len(theirs) == 300


def test_special_tokens_cutting_and_padding_of_the_folder_add_nothing(tmp_path):
    from tokenizers import Tokenizer, processors

    plain = open_tokenizer(TokenizerConfig(name=str(save_bpe(tmp_path / "plain"))))
    folder = save_bpe(tmp_path / "changed", model_max_length=5)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=50, pad_id=1, pad_token="<|padding|>")
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    changed = open_tokenizer(TokenizerConfig(name=str(folder)))
    assert changed.hf("text")["input_ids"][0] == changed.eos
    assert [changed.encode(text) for text in texts()] == [plain.encode(text) for text in texts()]
    assert changed.config.sha256 == plain.config.sha256


def test_a_slow_tokenizer_works_as_well(tmp_path):
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = open_tokenizer(TokenizerConfig(name=str(tmp_path)))
    text = "naïve </s> and <extra_id_3> 漢字"
    ids = tokenizer.encode(text)
    assert bytes(i - 3 for i in ids) == text.encode()
    assert tokenizer.decode(ids) == text and max(ids) < tokenizer.vocab_size
    again = open_tokenizer(tokenizer.config)
    assert again.config.sha256 == tokenizer.config.sha256 != BYTES.config.sha256


def test_the_identity_outlives_saving_never_changes_and_tells_tokenizers_apart(tmp_path, bpe):
    tokenizer = open_tokenizer(TokenizerConfig(name=str(bpe)))
    tokenizer.save(tmp_path / "copy")
    copy = open_tokenizer(TokenizerConfig(name="elsewhere"), tmp_path / "copy")
    assert copy.config == replace(tokenizer.config, name="elsewhere")
    others = {
        open_tokenizer(TokenizerConfig(name=str(folder))).config.sha256
        for folder in (save_bpe(tmp_path / "a", 301), save_bpe(tmp_path / "b", eos="<|padding|>"))
    }
    assert len({BYTES.config.sha256, tokenizer.config.sha256, *others}) == 4
    assert (
        BYTES.config.sha256 == "181d6cb8d893c15dafaf85c3147fc6604d8fa93e69a4ddabecaeb6b0dce98838"
    )  # as folders hold it


def test_a_tokenizer_that_cannot_be_used_is_refused_in_one_line(tmp_path, bpe, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    endless = save_bpe(tmp_path / "endless", eos=None)
    recorded = BYTES.config.sha256
    cases = [
        (bpe, recorded, f"^name={bpe} has the sha256 .* where {recorded} was .*; use"),
        ("some/tokenizer-that-is-not-here", None, "^name=.* cannot be loaded: .*; name a folder .*offline"),
        ("a" * 5000, None, r"^name=a+… \(5,000 characters\) cannot be loaded: .*; name a folder .*offline"),
        (tmp_path, None, f"^name={tmp_path} holds no tokenizer; name a folder that save_pretrained"),
        (bpe / "tokenizer.json", None, "^name=.*/tokenizer.json is no folder; name the folder that holds"),
        (endless, None, "^name=.* has no end-of-text token, .*; set eos_token in"),
    ]
    for name, sha256, problem in cases:
        with pytest.raises(ConfigError, match=problem) as error:
            open_tokenizer(TokenizerConfig(name=str(name), sha256=sha256))
        assert "\n" not in str(error.value)


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}  # at which the library panics
TEN_FOR_ONE = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10}
WORDS = {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0, "<|endoftext|>": 1}}


@pytest.mark.parametrize(
    "file, changes, problem",
    [
        ("tokenizer", {"model": WORDS | {"vocab": {"a": 10**9}}}, r"has the token id 1000000000 in .*, where at most"),
        (
            "tokenizer",
            {"version": "99.0"},
            r"Unknown tokenizer version.* later version than the installed tok",
        ),
        (
            "tokenizer",
            {"decoder": ""},
            r"cannot be loaded: .*; mend the folder, or name another that holds a",
        ),
        ("tokenizer", {"normalizer": CHARSMAP}, r"cannot be loaded: .*charsmap.*; mend the folder"),
        (
            "tokenizer",
            {"normalizer": {"type": "Sequence", "normalizers": [TEN_FOR_ONE] * 2}},
            r"has a normalizer in tokenizer.json that makes up to 100 characters of one, where at most 64 .*; mend",
        ),
        (
            "tokenizer",
            {"decoder": {"type": "Sequence", "decoders": [TEN_FOR_ONE] * 9}},
            r"has a decoder in tokenizer.json that makes up to 1000000000 characters of one",
        ),
        ("tokenizer", {"model": WORDS}, r"^the tokenizer .* cannot encode the text: .*Missing \[UNK\].*; mend its"),
        (
            "tokenizer_config",
            {"tokenizer_class": "E", "auto_map": {"AutoTokenizer": ["e.E", None]}},
            "is never run",
        ),
    ],
)
def test_a_damaged_or_hostile_folder_is_refused_and_no_code_of_it_runs(tmp_path, bpe, file, changes, problem):
    folder = shutil.copytree(bpe, tmp_path / "folder")
    path = folder / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "e.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass E: pass\n")
    with pytest.raises(ValueError, match=problem) as error:
        open_tokenizer(TokenizerConfig(name=str(folder))).encode("the x")
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_a_tokenizer_json_that_is_no_json_is_refused_before_the_library_reads_it(tmp_path, bpe):
    folder = shutil.copytree(bpe, tmp_path / "folder")
    (folder / "tokenizer.json").write_text('{"model":' + "[" * 10**5)
    with pytest.raises(ConfigError, match=r"^name=.* has tokenizer.json, which has more than 100 levels .*; mend"):
        open_tokenizer(TokenizerConfig(name=str(folder)))


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path, bpe):
    folder = shutil.copytree(bpe, tmp_path / "folder")
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")
    with pytest.raises(ConfigError, match=r"^name=.* has tokenizer_config.json, which is no file; mend"):
        open_tokenizer(TokenizerConfig(name=str(folder)))


def test_a_copy_is_kept_whole_and_takes_the_place_of_none_but_an_earlier_copy(tmp_path, bpe):
    copy = tmp_path / "tokenizer"
    tokenizer = open_tokenizer(TokenizerConfig())
    tokenizer.hf.chat_template = {"default": "a", "other": "b"}  # written as a folder
    tokenizer.keep(copy, replace=False)
    tokenizer.save(tmp_path / "saved")
    wanted = contents(copy)
    assert wanted == contents(tmp_path / "saved") and any("other" in name for name in wanted)

    other = open_tokenizer(TokenizerConfig(name=str(bpe)))
    with pytest.raises(ValueError, match=r"tokenizer is there already and holds additional_chat_templates and 3 more"):
        other.keep(copy, replace=False)
    other.keep(copy, replace=True)
    assert open_tokenizer(TokenizerConfig(), copy).config.sha256 == other.config.sha256

    (copy / "notes.txt").write_text("mine")
    other.keep(copy, replace=True)  # the copy is there: nothing is done
    with pytest.raises(ValueError, match=r"tokenizer is there already and holds notes.txt, which would be lost; move"):
        tokenizer.keep(copy, replace=True)
    assert (copy / "notes.txt").read_text() == "mine"
    (copy / "notes.txt").unlink()
    tokenizer.keep(copy, replace=True)
    assert contents(copy) == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "tokenizer"]
