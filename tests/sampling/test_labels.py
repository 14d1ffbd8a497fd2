"""The label of every image of a run: drawn, in turn, or of classes that are named or numbered."""

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.sampling.generator import SampleConfig
from dit_moe.sampling.labels import choose_labels, describe_listed


def test_label_plans_are_stable_under_the_count():
    for labels in ("balanced", "random", "data", (7, 2)):
        few, many = (choose_labels(SampleConfig(labels=labels, count=count), 10, [3] * 10) for count in (5, 50))
        assert torch.equal(few, many[:5])
    assert choose_labels(SampleConfig(count=20), 10).bincount().tolist() == [2] * 10
    assert choose_labels(SampleConfig(count=3, labels=(7, 2)), 10).tolist() == [7, 2, 7]
    with pytest.raises(ConfigError, match=r"labels=\[10\] must lie in 0\.\.9"):
        choose_labels(SampleConfig(labels=(10,)), 10)


SYNSETS = ["n01440764", "n02099601", "n02012849"]  # tench, golden retriever, crane
TWELVE = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, …: folders in the order of texts


@pytest.mark.parametrize(
    "names, labels, rows, said",
    [
        (
            TWELVE,
            (2, 10, "11"),
            [4, 2, 3],
            "labels: 2 is the class 2, row 4, 10 is the class 10, row 2 of",
        ),
        (["cat", "dog"], ("dog", 0), [1, 0], "labels: 0 is the class cat, row 0 of the model's 2 classes"),
        (["3", "7", "9"], (9, 3), [2, 0], "labels: 9 is the class 9, row 2, 3 is"),
        (["3", "7", "9"], (0,), [0], "labels: 0 is the class 3, row 0"),
        (["000", "001", "010"], (10, "001"), [2, 1], "labels: 10 is the class 010, row 2"),
        (["cat", "dog"], "dog", [1], None),
        (["cat", "dog"], "Dog", [1], None),
        (["cat", "random"], ("random",), [1], None),
        (list("0123456789"), 7, [7], None),
        (list("0123456789"), (7, 2), [7, 2], None),
        (SYNSETS, ("golden retriever", "n01440764"), [1, 0], None),
        (SYNSETS, "Tinca tinca", [0], None),
        (SYNSETS, (2,), [2], "labels: 2 is the class n02012849, row 2 of the model's 3 classes"),
        (["tench, Tinca tinca", "goldfish, Carassius auratus"], "goldfish", [1], None),
        (None, "tench", [0], "labels: tench is row 0 in ImageNet's order of the model's 1000 classes"),
        (list(map(str, range(1000))), (7, "n02099601"), [7, 207], "labels: n02099601 is row 207 in"),
        (None, (7, 2), [7, 2], None),
    ],
)
def test_labels_are_names_or_words_of_classes_before_they_are_numbers_of_rows_and_it_is_said(names, labels, rows, said):
    config, classes = SampleConfig(labels=labels, count=len(rows)), len(names or range(1000))
    assert choose_labels(config, classes, class_names=names).tolist() == rows
    found = describe_listed(config, classes, names)
    assert found is None if said is None else found.startswith(said)


@pytest.mark.parametrize(
    "names, labels, message",
    [
        (["cat", "dog"], ("dgo",), r"labels=\[dgo\] must lie in 0\.\.1, .*: dgo is neither; did you mean 'dog'\?"),
        (["3", "7", "9"], (3, 1), r"labels=\[3, 1\] lists names of classes and 1, which is none; known: 3, 7, 9"),
        (["3", "7", "9"], (8,), r"labels=\[8\] must lie in 0\.\.2, .*: 8 is neither; known: 3, 7, 9"),
        (["cat", "dog"], (-1,), r"labels=\[-1\] must lie in 0\.\.1"),
        (
            ["cat", "dog"],
            "dgo",
            r"labels=dgo must lie in 0\.\.1, .*: dgo is neither; did you mean 'dog'\? known: cat",
        ),
        (["cat", "dog"], "blanced", r"did you mean 'balanced'\? known: cat, dog, balanced, random, data"),
        (["cat", "dog"], 2, r"labels=2 must lie in 0\.\.1"),
        (SYNSETS, "golden retreiver", r"did you mean 'golden retriever'\? known: tench, golden retriever, crane"),
        (SYNSETS, "n0209960", r"did you mean 'n02099601'\?"),
        (["n02012849", "n03126707"], "crane", r"crane is a name of 2 classes; .* n02012849, n03126707"),
        (None, "blanced", r"are not known; give their numbers, or one of balanced, random, data"),
        (None, ("cat",), r"labels=\[cat\]: the names of the classes are not known; give their numbers"),
    ],
)
def test_a_label_that_no_class_has_is_refused_with_the_nearest_name(names, labels, message):
    with pytest.raises(ConfigError, match=message):
        choose_labels(SampleConfig(labels=labels), len(names or range(10)), class_names=names)


@pytest.mark.parametrize("word", ["balanced", "random", "data"])
def test_a_word_means_all_classes_also_where_one_is_called_so_and_it_is_said(word):
    config, names = SampleConfig(labels=word, count=2), [word, "cat"]
    assert choose_labels(config, 2, [5, 5], names).tolist() == choose_labels(config, 2, [5, 5]).tolist()
    assert describe_listed(config, 2, names).endswith(f"the class of that name is labels=[{word}]")
    assert choose_labels(SampleConfig(labels=(word,), count=2), 2, [5, 5], names).tolist() == [0, 0]


def test_labels_from_the_data_have_its_class_frequencies():
    plan = SampleConfig(labels="data", count=4000)
    counts = choose_labels(plan, 4, [10, 0, 1_200_000, 400_000]).bincount(minlength=4)
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:] / 4000 == pytest.approx([0.75, 0.25], abs=0.03)  # 4 standard errors
    assert choose_labels(plan, 3, [0, 0, 7]).unique().tolist() == [2]
    uniform = choose_labels(SampleConfig(labels="random", count=50), 10)
    assert torch.equal(choose_labels(SampleConfig(labels="data", count=50), 10, [1] * 10), uniform)
    with pytest.raises(ConfigError, match=r"labels=data needs the class frequencies .*; choose random or balanced"):
        choose_labels(SampleConfig(labels="data"), 10)
