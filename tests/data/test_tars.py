"""Images in tar files."""

import gzip
import hashlib
import io
import os
import tarfile

import numpy as np
import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.data import DATASETS, BrokenImages
from dit_moe.data.tar_files import find_tars
from dit_moe.data.tars import TarsConfig
from tests.data.examples import class_files, encoded, keyed_files, pixels, write_tar, write_tree

IMAGE = encoded(pixels(0))


def read(place, split="train", **options):
    return DATASETS.build(TarsConfig(path=str(place), **options), split)


def labels(dataset):
    return dataset.__getitems__(range(len(dataset)))["labels"].tolist()


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "a.tar", keyed_files([1, 0, 2]))


# ------------------------------------------------------------------------------------------------------------- layouts


def test_images_come_in_the_order_they_lie_with_the_labels_beside_them(tar):
    dataset = read(tar)
    rows = dataset.__getitems__([2, 0, 1])
    assert rows["labels"].tolist() == [2, 1, 0] and dataset.class_names == ("0", "1", "2")
    expected = np.stack([pixels(seed) for seed in (2, 0, 1)]).transpose(0, 3, 1, 2)
    assert torch.equal(rows["images"], torch.from_numpy(expected))


def test_labels_may_stand_in_json_and_anywhere_in_the_tar_and_other_fields_are_passed_over(tmp_path):
    files = {
        "x/b.json": b'{"label": 1, "text": "one"}',
        "x/a.png": IMAGE,
        "y/a.PNG": IMAGE,
        "x/b.jpg": IMAGE,
        "y/a.cls": b" 2\n",
        "y/a.json": b"not looked at beside cls",
        "x/a.json": b'{"label": 0}',
    }
    others = {"x/a.seg.png": b"", "x/a.txt": b"", "._x.png": b"", "README": b"", "z.mask.jpg": b""}
    dataset = read(write_tar(tmp_path / "a.tar", files | others))
    assert [dataset.locate(i).split(": ")[1] for i in range(3)] == ["x/a.png", "y/a.PNG", "x/b.jpg"]
    assert labels(dataset) == [0, 2, 1]


def test_without_any_label_file_the_class_folders_are_the_labels(tmp_path):
    files = {f"./set/{name}": content for name, content in class_files(each=2).items()}
    one, other = dict(list(files.items())[:3]), dict(list(files.items())[3:])
    write_tar(tmp_path / "1.tar", other | {"./set/ant/a.b.png": IMAGE})
    dataset = read(tmp_path / "1.tar", class_names=("ant", "bee", "cow"))
    assert dataset.class_names == ("ant", "bee", "cow") and labels(dataset) == [1, 0]
    write_tar(tmp_path / "2.tar", one)
    dataset = read(tmp_path)
    assert dataset.class_names == ("ant", "bee") and labels(dataset) == [1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "folders, names, labels",
    [
        (["ant", "bee/old", "bee/new"], ("ant", "bee"), [0, 1, 1]),
        (["./set/3/x", "./set/10", "./set/3"], tuple(map(str, range(11))), [3, 10, 3]),
        (["/set/ant", "../set/ant/more"], ("ant",), [0, 0]),
        (["all"], ("all",), [0]),
        (["."], ("all",), [0]),
    ],
)
def test_the_outermost_folder_below_those_shared_is_the_class_and_whole_numbers_are_labels(
    tmp_path, folders, names, labels
):
    path = write_tar(tmp_path / "a.tar", {f"{name}/{i}.png": IMAGE for i, name in enumerate(folders)})
    for split in ("train", "heldout"):
        dataset = read(path, split, heldout=str(path))
        assert dataset.class_names == names and dataset.labels_N.tolist() == labels


def test_a_run_that_began_with_the_innermost_folders_as_classes_goes_on_so(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{name}/0.png": b"" for name in ("1", "2/old", "10")})
    before = hashlib.sha256(b"".join(b"%s/0.png\x000\x00-1\x00" % name for name in (b"1", b"2/old", b"10"))).hexdigest()
    assert read(path, size=8).fingerprint != before
    for split in ("train", "heldout"):
        dataset = read(path, split, heldout=str(path), fingerprint=before, size=8)
        assert dataset.class_names == ("1", "10", "old") and dataset.fingerprint == before
        assert dataset.labels_N.tolist() == [0, 2, 1]


def test_tars_joined_by_cat_are_read_to_the_end(tmp_path):
    parts = [write_tar(tmp_path / f"{i}.tar", keyed_files([1, i], first=2 * i)) for i in range(3)]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert (
        labels(read(joined)) == [1, 0, 1, 1, 1, 2]
        and read(joined).fingerprint == read(tmp_path / "{0..2}.tar").fingerprint
    )
    images = [read(place).__getitems__(range(6))["images"] for place in (joined, tmp_path / "{0..2}.tar")]
    assert torch.equal(*images)
    joined.write_bytes(parts[0].read_bytes() + b"signed by me")
    with pytest.raises(ValueError, match=r"joined.tar is cut off or damaged at 00001.cls, or behind it \("):
        read(joined)


def test_devices_are_passed_over_and_a_name_that_is_there_twice_is_refused(tmp_path):
    with tarfile.open(write_tar(tmp_path / "a.tar", class_files()), "a") as tar:
        for name, kind in (
            ("ant/pipe.png", tarfile.FIFOTYPE),
            ("ant/null.png", tarfile.CHRTYPE),
            ("ant", tarfile.DIRTYPE),
        ):
            header = tarfile.TarInfo(name)
            header.type = kind
            tar.addfile(header)
    assert read(tmp_path / "a.tar").passed_over["pipes, sockets or devices"]["count"] == 2
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("ant/000.png"))
    with pytest.raises(ValueError, match=r"a.tar has ant/000.png more than once; keep one of each name"):
        read(tmp_path / "a.tar")


def test_long_names_and_those_of_other_tar_formats_are_read(tmp_path):
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = "d" * 90 + "/" + "ü" * (40 if form == tarfile.USTAR_FORMAT else 90)
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            for suffix, content in ((".png", IMAGE), (".cls", b"0")):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        assert read(tmp_path / "a.tar").locate(0).endswith(f"a.tar: {name}.png")


# -------------------------------------------------------------------------------------------------------- which tars


def test_a_range_a_glob_and_a_folder_name_tars_in_order(tmp_path):
    for number in (8, 9, 10, 11):
        write_tar(tmp_path / f"t-{number:03d}.tar", keyed_files([0, 1], first=number))
    write_tree(tmp_path, {"notes.txt": b""})
    names = [str(tmp_path / f"t-{number:03d}.tar") for number in (8, 9, 10, 11)]
    assert find_tars("path", str(tmp_path))[0] == find_tars("path", str(tmp_path / "t-*.tar"))[0] == names
    assert find_tars("path", str(tmp_path / "t-{008..010}.tar"))[0] == names[:3]
    assert find_tars("path", str(tmp_path / "t-{0..0}{08..11}.tar"))[0] == names
    dataset = read(tmp_path)
    assert len(dataset) == 8 and dataset.locate(3) == f"{names[1]}: 00010.png"


@pytest.mark.parametrize(
    "place, problem",
    [
        ("nowhere", "there is no file .*nowhere"),
        ("t-{0..2}.tar", "there is no file .*t-1.tar"),
        ("no-*.tar", r"there is no file .*no-\*.tar"),
        ("empty", "has no .tar files"),
        ("packed.tar.gz", "packed.tar.gz is compressed, .* unpack it to a plain .tar"),
        ("packed", "packed/x.tgz is compressed"),
        ("t-{0..99999999999}.tar", "names 100,000,000,000 files, more than 100,000; correct the range"),
        ("t-{0..999}{0..999}{1..1}.tar", "names 1,000,000 files"),
        ("t-{2..0}.tar", r"\{2..0\} counts down; write the smaller number first"),
        ("t-{0..}.tar", r"there is no file .*t-\{0..\}.tar; .* a pattern such as train-\{000..146\}.tar"),
    ],
)
def test_tars_that_are_missing_or_compressed_are_refused(tmp_path, place, problem):
    write_tree(
        tmp_path, {"packed.tar.gz": b"", "packed/x.tgz": b"", "packed/y.tar": b"", "t-0.tar": b"", "t-2.tar": b""}
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"^path=.*{problem}"):
        read(tmp_path / place)


def test_the_heldout_split_is_of_other_tars_with_the_classes_of_training(tar, tmp_path):
    other = write_tar(tmp_path / "b.tar", keyed_files([0, 1]))
    assert read(tar, "heldout", heldout=str(other)).class_names == ("0", "1", "2")
    with pytest.raises(ConfigError, match=r"^heldout=None"):
        read(tar, "heldout")
    with pytest.raises(ConfigError, match=r"a.tar: 00002.png has the label 2, but there are 2 classes"):
        read(other, "heldout", heldout=str(tar))


def test_the_fingerprint_is_of_the_content_not_of_the_names_of_tars(tar, tmp_path):
    before = read(tar).fingerprint
    tar.rename(tmp_path / "b.tar")
    assert read(tmp_path / "b.tar").fingerprint == before
    for changed in ([1, 0, 1], [0, 1, 2]):
        assert read(write_tar(tmp_path / "c.tar", keyed_files(changed))).fingerprint != before


# -------------------------------------------------------------------------------------------------------------- classes


def test_classes_can_be_counted_or_named_beyond_those_found(tar):
    assert read(tar, classes=5).class_names == ("0", "1", "2", "3", "4")
    assert read(tar, class_names=("x", "y", "z")).class_names == ("x", "y", "z")


@pytest.mark.parametrize(
    "labels, options, count",
    [([1, 0, 2], {"classes": 2}, 2), ([1, 0, 2], {"class_names": ("x",)}, 1), ([0, 0, 10**9], {}, 3)],
)
def test_a_label_outside_of_the_classes_or_beyond_the_number_of_images_is_refused(tmp_path, labels, options, count):
    tar = write_tar(tmp_path / "a.tar", keyed_files(labels))
    problem = f"a.tar: 00002.png has the label {labels[2]}, but there are {count} classes"
    with pytest.raises(ConfigError, match=problem):
        read(tar, **options)


def test_a_class_folder_that_is_not_named_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", class_files())
    with pytest.raises(ConfigError, match=r"^class_names: .*a.tar: bee/000.png is in the folder bee, which is none"):
        read(tmp_path / "a.tar", class_names=("ant", "cow"))


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"classes": 2, "class_names": ("x", "y")}, "classes=2 is given beside class_names; drop the line"),
        ({"classes": 0}, "classes=0 must be at least 1"),
        ({"class_names": ()}, "class_names=.* must name at least one class, and none twice"),
        ({"class_names": ("x", "x")}, "class_names=.* must name at least one class, and none twice"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, problem):
    with pytest.raises(ConfigError, match=f"^{problem}"):
        TarsConfig(path="a.tar", **options)


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "files, problem",
    [
        (keyed_files([0]) | {"00001.png": IMAGE}, "00001.png has no label; add 00001.cls, or remove the image"),
        (
            keyed_files([0]) | {"00001.cls": b"0"},
            "00001.cls is the label of no image; add 00001.jpg, or remove the label",
        ),
        (keyed_files([0]) | {"00000.jpg": IMAGE}, "00000.jpg is the second image of 00000; keep one"),
        (keyed_files([0]) | {"00000.cls": b"cat"}, "00000.cls holds 'cat'; it must be a whole number from 0 up"),
        (keyed_files([0]) | {"00000.cls": b"-1"}, "00000.cls holds '-1'; it must be"),
        (keyed_files([0]) | {"00000.cls": b""}, "00000.cls holds ''; it must be"),
        ({"a.png": IMAGE, "a.json": b'{"label":' + b"[" * 10**5}, "a.json holds"),
        (keyed_files([0]) | {"00000.cls": b"9" * 20}, "00000.cls holds '9{20}'; it must be"),
        ({"a.png": IMAGE, "a.json": b'{"class": 1}'}, "a.json holds '.*'; it must be .* in json under \"label\""),
        ({"a.png": IMAGE, "a.json": b'{"label": "cat"}'}, "a.json holds"),
        ({"a.png": IMAGE, "a.json": b"[1]"}, "a.json holds"),
        ({"a.png": IMAGE, "a.json": b'{"label": true}'}, "a.json holds"),
        ({"a.png": IMAGE, "b/c.png": IMAGE}, "a.png has neither a label nor a class folder"),
        ({"a.txt": b"", "b.cls.png.txt": b""}, "has no images; known are JPEG"),
        ({}, "has no images"),
    ],
)
def test_a_tar_whose_images_and_labels_do_not_match_is_refused_naming_the_member(tmp_path, files, problem):
    path = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=f"{path}.*{problem}"):
        read(path)


def test_tars_with_and_without_labels_are_not_mixed(tmp_path):
    write_tar(tmp_path / "1.tar", keyed_files([0, 1]))
    write_tar(tmp_path / "2.tar", class_files())
    with pytest.raises(ValueError, match=r"2.tar: ant/000.png has no label, though other tars have files of labels"):
        read(tmp_path)


@pytest.mark.parametrize("cut", ["in the content", "in a header", "at the end of a member", "in the first header"])
def test_a_tar_that_is_cut_off_is_refused_naming_the_last_member(tar, cut):
    with tarfile.open(tar) as whole:
        members = whole.getmembers()
    *_, image, label = members
    end, last = {
        "in the content": (image.offset_data + 300, image.name),
        "in a header": (label.offset + 100, image.name),
        "at the end of a member": (label.offset, image.name),
        "in the first header": (100, "its beginning"),
    }[cut]
    os.truncate(tar, end)
    with pytest.raises(ValueError, match=rf"a.tar is cut off or damaged at {last} \(.*\); fetch it again"):
        read(tar)


def test_a_damaged_header_does_not_end_a_tar(tar):
    with tarfile.open(tar) as whole:
        third = whole.getmembers()[2]
    content = bytearray(tar.read_bytes())
    content[third.offset + 3] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"is cut off or damaged at 00000.cls"):
        read(tar)


def header(name="b.png", size=0, kind=tarfile.REGTYPE, content=b""):
    """A member as its header describes it, which need not be true; `content` is filled up to whole blocks."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * (-len(content) % tarfile.BLOCKSIZE)


def pax(*records, kind=tarfile.XHDTYPE):
    lines = [b" %s=%s\n" % (name, value) for name, value in records]
    content = b"".join(b"%d" % (len(line) + len(str(len(line) + 3))) + line for line in lines)
    return header("pax", len(content), kind, content)


@pytest.mark.parametrize(
    "headers, problem",
    [
        (header(size=-512), "a negative size"),
        (header(size=-512, kind=tarfile.DIRTYPE), "a negative size"),
        (header(size=-1024, kind=tarfile.XHDTYPE) + header(), "a negative size"),
        (pax((b"size", b"-512")) + header(size=4), "-512 bytes are said to follow"),
        (header(size=10**22), "10,000,000,000,000,000,000,000 bytes are said to follow"),
        (header(size=10**10, kind=tarfile.XHDTYPE) + header(), "a header of 10,000,000,000 bytes"),
        (header(size=2**30, kind=tarfile.GNUTYPE_LONGNAME) + header(), "a header of 1,073,741,824 bytes"),
        (pax((b"comment", b"1" * 500_000)) + header(), "a number without end"),
        (pax(kind=tarfile.XGLTYPE) * 2000 + header(), "recursion"),
        (header(size=4, kind=tarfile.GNUTYPE_SPARSE, content=b"abcd"), "a file with holes; pack the tar without --sp"),
        (pax((b"GNU.sparse.size", b"9"), (b"GNU.sparse.major", b"1")) + header(), "a file with holes"),
    ],
)
def test_a_header_that_lies_about_sizes_is_refused_at_once(tmp_path, headers, problem):
    end = tarfile.NUL * 2 * tarfile.BLOCKSIZE
    write_tree(tmp_path, {"x.tar": header("ant/a.png", 4, content=b"text") + headers + end})
    with pytest.raises(
        ValueError, match=rf"x.tar is cut off or damaged at (ant/a|b).png \(.*{problem}.*\); fetch it"
    ) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_header_in_no_known_charset_is_one_sentence(tmp_path):
    """Python 3.11.2 passes over the charset, and then the image has no class; 3.11.7 cannot read it."""
    headers = header("ant/a.png", 4, content=b"text") + pax((b"hdrcharset", b"\xff")) + header()
    write_tree(tmp_path, {"x.tar": headers + tarfile.NUL * 2 * tarfile.BLOCKSIZE})
    with pytest.raises(ValueError, match=r"^\S+x.tar(: b.png has neither a label| is cut off or damaged at )[^\n]*$"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"text" * 1000, gzip.compress(b"0" * 10_000)], ids=["text", "gzip"])
def test_a_file_that_is_no_plain_tar_is_refused(tmp_path, content):
    write_tree(tmp_path, {"a.tar": content})
    with pytest.raises(ValueError, match=r"a.tar is cut off or damaged at its beginning .*unpack it if it is comp"):
        read(tmp_path)


def test_what_stands_in_place_of_a_tar_is_told(tmp_path):
    for content, problem in ((b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1", "run git lfs pull")):
        write_tree(tmp_path, {"a.tar": content})
        with pytest.raises(ValueError, match=f"a.tar {problem}|a.tar is a pointer.*{problem}"):
            read(tmp_path)


def test_a_link_is_refused_since_it_has_no_content(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("ant/a.png")
        member.type, member.linkname = tarfile.SYMTYPE, "b.png"
        tar.addfile(member)
    with pytest.raises(ValueError, match=r"a.tar: ant/a.png is a link; pack the tar with --dereference"):
        read(tmp_path)


def test_a_broken_image_is_named_with_its_tar_and_a_tar_that_changes_is_refused(tmp_path):
    tar = write_tar(tmp_path / "a.tar", keyed_files([0, 1]) | {"00001.png": b"text"})
    dataset = read(tar, size=8)
    with pytest.raises(BrokenImages, match=r"a.tar: 00001.png is not an image that can be read"):
        dataset.__getitems__([0, 1])
    tar = write_tar(tmp_path / "b.tar", keyed_files([0, 1]))
    dataset = read(tar, size=8)
    write_tar(tar, keyed_files([0, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"b.tar has changed since its headers were read; start again"):
        dataset.__getitems__([0])
    dataset = read(tar, size=8)
    tar.unlink()
    with pytest.raises(ValueError, match=r"b.tar cannot be read \(No such file or directory\); restore it") as error:
        dataset.__getitems__([0])
    assert not isinstance(error.value, BrokenImages)  # which one may choose to leave out


def test_few_tars_are_open_at_a_time(tmp_path):
    for number in range(80):
        write_tar(tmp_path / f"{number:02d}.tar", keyed_files([0]))
    dataset = read(tmp_path, size=8)
    before = len(os.listdir("/proc/self/fd"))
    dataset.__getitems__(range(80))
    assert len(os.listdir("/proc/self/fd")) <= before + 64
