"""A language model of the config lm_tiny.yaml, made small, and its text."""

from pathlib import Path

LM_CONFIG = Path(__file__).parents[2] / "configs" / "lm_tiny.yaml"
WORDS = ("the", "cat", "sat", "on", "a", "mat", "some", "dogs", "ran", "after", "one", "bird", "that", "sang", "too")


def story(number: int) -> str:
    """Some hundred words, each story its own."""
    return " ".join(WORDS[(number + i * i + number * i) % len(WORDS)] for i in range(120)) + ".\n"


def small(folder: Path) -> list[str]:
    """Changes to the config that make it a matter of seconds."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for number in range(20):
        (text / f"{number:02d}.txt").write_text(story(number))
    return [
        f"tokenize.corpus={{name: files, path: {text}, heldout_every: 5}}",
        f"data.path={folder}/tokens/train",
        f"data.heldout={folder}/tokens/heldout",
        "data.length=32",
        "model={name: LM-custom-4E2A, width: 32, depth: 2, heads: 2, vocab_size: 320}",
        "train.steps=6",
        "train.batch_size=8",
        "train.warmup_steps=0",
        "train.checkpoint_every=3",
        "train.sample_every=3",
        "sample.max_new_tokens=12",
        'sample.prompts=["the ${name}: #1"]',
        "eval.stride=16",
        "eval.light_every=3",
        "eval.light_documents=2",
    ]
