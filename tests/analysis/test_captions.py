"""What is said below each picture is what the numbers say: statistics made by hand, and what must be said of them."""

# L layers, E experts, T noise levels, C classes, S positions

from dataclasses import replace

import numpy as np
import pytest

from dit_moe.analysis.page import figures_of
from dit_moe.analysis.statistics import Examples, RoutingStats, Target, TokenKinds
from dit_moe.training.curves import RouterCurves

TRAINING = RouterCurves(
    step_U=np.arange(1, 5),
    active_U=np.array([3.0, 2.5, 2.1, 2.0]),
    active_LU=np.array([[3.0, 2.5, 2.1, 1.5], [3.0, 2.5, 2.1, 2.5]]),
    p_LU=np.array([[0.9, 0.8, 0.7, 0.4]] * 2),
    theta_LU=np.array([[1.0, 1.1, 1.2, 1.5], [1.0, 1.0, 1.0, 0.75]]),
)
LOAD = np.array([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]])
BASE = RoutingStats(
    kind="images",
    facts={},
    layers_L=[0, 2],
    experts=4,
    target=Target(1.5),
    trained_target=Target(2.0),
    active_L=np.array([1.25, 1.75]),
    active_std_L=np.array([0.43, 0.5]),
    share_LE=np.array([[0.75, 0.25, 0, 0], [0.25, 0.75, 0, 0]]),
    load_LE=LOAD,
    together_LEE=np.array(
        [
            [[0.5, 0.2, 0.0, 0], [0.2, 0.25, 0.05, 0], [0.0, 0.05, 0.25, 0], [0, 0, 0, 0]],
            np.full((4, 4), 0.1) + 0.3375 * np.eye(4),
        ]
    ),
    active_LS=np.array([[1.0] * 4 + [2.0] + [1.0] * 4, [1.75] * 9]),
)
SEEN = replace(
    BASE,
    times_T=np.array([0.25, 0.75]),
    active_LT=np.array([[1.0, 1.5], [1.5, 2.0]]),
    load_LTE=np.array([[[0.75, 0.0, 0.25, 0.0], [0.25, 0.5, 0.25, 0.0]], [[0.25] * 4] * 2]),
    class_names_C=["cat", "dog"],
    images_C=np.array([12, 20]),
    active_LC=np.array([[1.0, 1.5], [1.5, 2.0]]),
    load_LCE=np.array([[[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]], [[0.25] * 4] * 2]),
    shuffled_LCE=np.array([[[0.5, 0.25, 0.25, 0]] * 2, [[0.5, 0.5, 0, 0], [0.0, 0.5, 0.5, 0]]]),
    training=TRAINING,
)
READ = replace(
    BASE,
    kind="text",
    active_LS=np.array([[2.0, 1.0, 1.0, 2.0, 4.0], [2.0, 1.0, 1.0, 2.0, 4.0]]),
    position_S=np.arange(5) * 8,
    tokens_S=np.array([40, 40, 30, 10, 1]),
    tokens=TokenKinds(
        tokens_V=["␣", ","],
        count_V=np.array([90, 31]),
        active_LV=np.array([[1.0, 1.5], [1.0, 2.5]]),
        load_LVE=np.array([[[1.0, 0, 0, 0], [0, 1.0, 0, 0]], [[0.25] * 4] * 2]),
    ),
)
NOMINAL = replace(SEEN, target=Target(2.0, held=False), trained_target=Target(2.0, held=False))
UNEVEN = np.array([[[1.0, 0, 0, 0], [np.nan] * 4, [0, 1.0, 0, 0]], [[0.25] * 4] * 3])
SKIPPING = replace(  # the experts of layer 0 serve no comma
    READ,
    tokens_S=READ.tokens_S[::-1],
    tokens=TokenKinds(
        tokens_V=["␣", ",", "e"],
        count_V=np.array([90, 31, 30]),
        active_LV=np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]),
        load_LVE=UNEVEN,
    ),
)
DEAD = replace(  # no token uses an expert of layer 0
    SEEN,
    load_LE=np.array([[np.nan] * 4, [0.25] * 4]),
    load_LTE=np.stack([np.full((2, 4), np.nan), SEEN.load_LTE[0]]),
    load_LCE=np.full((2, 2, 4), np.nan),
    shuffled_LCE=np.full((2, 2, 4), np.nan),
    together_LEE=np.stack([np.zeros((4, 4)), BASE.together_LEE[1]]),
)
MAPS = replace(
    SEEN,
    examples=Examples(
        times_T=np.array([0.25, 0.75]),
        images_MHWC=np.zeros((1, 2, 2, 1), np.uint8),
        noisy_MTHWC=np.zeros((1, 2, 2, 2, 1), np.uint8),
        active_MTLS=np.array([[[[1, 1, 2, 1], [1, 1, 1, 1]], [[1, 3, 1, 1], [2, 4, 2, 2]]]]),
        classes_M=["cat"],
    ),
)


@pytest.mark.parametrize(
    "stats, name, sentence",
    [
        (SEEN, "active_per_token", "Layer 2 uses the most experts, 1.75 a token, layer 0 the fewest, 1.25."),
        (SEEN, "active_per_token", "Tokens differ the most in layer 2: 1.75 ± 0.50. In layer 0, 75 % of the tokens"),
        (
            replace(SEEN, share_LE=np.array([[0.75, 0.25, 0, 0], [0.25, 0.5, 0, 0]])),
            "active_per_token",
            "of the tokens use only one. In layer 2, 25 % use none.",
        ),
        (SEEN, "active_by_layer_and_time", "Blue cells use fewer experts than 1.5 (target), red ones more."),
        (
            NOMINAL,
            "active_by_layer_and_time",
            "than 1.5 (mean), red ones more. The farthest from it is layer 0 at t = 0.25,",
        ),
        (SEEN, "active_over_time", "from noise (t = 0.75) to data (t = 0.25) the mean of the layers goes from 1.75 to"),
        (SEEN, "active_over_time", "to 1.25 experts a token. Layer 0 changes the most: between 1.00 and 1.50."),
        (MAPS, "maps", "At t = 0.75 patches take between 1.50 and 3.50, at t = 0.25 between 1.00 and 1.50."),
        (MAPS, "maps_by_layer", "Patches differ the most in layer 0: by 1.5 experts from the cheapest"),
        (SEEN, "active_by_position", "Patches at the image's edge use 1.38 experts, those inside 1.88 (mean of"),
        (SEEN, "active_by_position", "Positions differ the most in layer 0, by up to 1.00 experts."),
        (READ, "active_by_position", "The first 8 tokens use 2.00 experts (mean of the layers), those from 16 on"),
        (READ, "active_by_position", "by up to 1.00 experts. Positions that few windows reach are left out."),
        (SEEN, "active_by_class", "The most experts are used by class dog, 1.75 (mean of the layers), the fewest by"),
        (SEEN, "active_by_class", "by class cat, 1.25: 40 % apart."),
        (SEEN, "active_by_class", "Counted on 12 to 20 images a class."),
        (READ, "active_by_token", "token “,”, 2.00 (mean of the layers), the fewest by token “␣”, 1.00: 100 %"),
        (SEEN, "load", "The least balanced layer, 0, has a load worth 2.8 evenly used experts of 4"),
        (SEEN, "load", "The busiest expert, 0 of layer 0, gets 2.0 times an even share; 1 of 8 gets less than a tenth"),
        (SEEN, "together", "0 and 1 of layer 0 are together 2.00 times as often as their loads make it, 0 and 2 of"),
        (SEEN, "together", "0 and 2 of layer 0 0.00 times. 1× is what experts chosen by load alone would have"),
        (SEEN, "specialisation", "between classes in layer 0, 1.000 of at most 1 bits; between noise levels in"),
        (SEEN, "specialisation", "With 12 to 20 images a class some of it is chance: dashed, 0.500 bits at most"),
        (READ, "specialisation", "frequent tokens in layer 0, 1.000 of at most 1 bits."),
        (READ, "specialisation", "A token seldom met looks special by chance; the rarest of these was met 31 times."),
        (SKIPPING, "active_by_position", "Tokens 8 to 15 use 1.00 experts (mean of the layers), those from 24 on"),
        (SKIPPING, "active_by_token", "the fewest by token “,”, 0.00. Right, how much"),
        (SKIPPING, "specialisation", "frequent tokens in layer 0, 1.000 of at most 1.58 bits."),
        (SKIPPING, "experts_by_token", "expert 0 of layer 0, 2.00 times as often as on average for token “␣”."),
        (DEAD, "load", "layer, 0, has a load worth 0.0 evenly used experts of 4"),
        (DEAD, "load", "4 of 8 get less than a tenth"),
        (DEAD, "specialisation", "noise levels in layer 2"),
        (SEEN, "experts_by_time", "expert 1 of layer 0, 2.00 times as often as on average at t = 0.75."),
        (SEEN, "experts_by_class", "expert 0 of layer 0, 2.00 times as often as on average for class cat."),
        (READ, "experts_by_token", "expert 0 of layer 0, 2.00 times as often as on average for token “␣”."),
        (SEEN, "training", "tokens used 2.000 ± 0.000 experts (target 2). The threshold p went from 0.90 to 0.40."),
        (SEEN, "training", "θ ended between 0.75 (layer 2) and 1.50 (layer 0)."),
        (NOMINAL, "training", "tokens used 2.000 ± 0.000 experts (nominal 2)."),
    ],
)
def test_a_caption_says_what_the_numbers_say(stats, name, sentence):
    (caption,) = [picture.caption for picture in figures_of(stats) if picture.name == name]
    assert sentence in caption


def test_every_kind_of_picture_has_its_sentence():
    described = {row[1] for row in test_a_caption_says_what_the_numbers_say.pytestmark[0].args[1]}
    assert {picture.name for stats in (MAPS, READ) for picture in figures_of(stats)} <= described


def test_pictures_of_experts_that_serve_nothing_can_be_drawn():
    drawn = ("load", "together", "specialisation", "experts_by_time", "experts_by_token")
    for picture in (*figures_of(DEAD), *figures_of(SKIPPING)):
        if picture.name in drawn:
            picture.draw().draw_without_rendering()


def test_captions_of_text_speak_of_no_classes_or_images():
    for picture in figures_of(READ):
        assert not any(word in picture.caption for word in ("class", "image", "patch", "noise")), picture.name
