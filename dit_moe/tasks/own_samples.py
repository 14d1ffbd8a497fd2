"""What a run makes itself, in the form of a split of its data: to look at the network where the data are not there."""

# N images, B images of a batch

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dit_moe.experiments.run import ImageRun, TextRun
from dit_moe.text.tokenizer import Document

OWN_SAMPLES = "samples"  # what options and results call the split
PASSAGES = 16


class OwnImages:
    """Images that a run samples by its section `sample`, rows as of a data set of images.

    Args:
        count: how many; None: as many as that section says.
    """

    def __init__(self, run: ImageRun, count: int | None = None) -> None:
        sample = run.experiment.sample
        sample = replace(sample, count=count or sample.count)
        self.labels_N = run.labels(sample)
        self.images_N = torch.cat(list(run.generator(sample).batches(range(sample.count), self.labels_N)))
        classes = run.experiment.model.num_classes
        self.class_names = run.class_names or [str(label) for label in range(classes)]

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """{"images": uint8 [B, C, H, W], "labels": int64 [B]}."""
        return {"images": self.images_N[indices], "labels": self.labels_N[indices]}


class OwnText:
    """Passages that a language model writes behind the prompts of its section `sample`, as documents of tokens.

    ValueError if it ends all of them before the first token.
    """

    def __init__(self, run: TextRun) -> None:
        from dit_moe.interop.generation import generate_text  # imports transformers, which takes seconds

        sample = run.experiment.sample
        prompts = (sample.prompts * PASSAGES)[: max(PASSAGES, len(sample.prompts))]
        experiment = replace(run.experiment, sample=replace(sample, prompts=prompts))
        written = generate_text(replace(run, experiment=experiment))
        texts = [text for text in map("".join, zip(prompts, written, strict=True)) if text]
        if not texts:
            raise ValueError(f"{run.folder} ends each text before its first token; give sample.prompts, or data.path")
        ids = run.tokenizer.encode_batch(texts)
        self._documents = [Document(each.tolist(), len(text.encode())) for each, text in zip(ids, texts, strict=True)]

    def __len__(self) -> int:
        """Tokens."""
        return sum(len(document.ids) for document in self._documents)

    def documents(self, stop: int | None = None, step: int = 1) -> Iterator[Document]:
        """As `TokenShards.documents` gives those of a split."""
        return iter(self._documents[:stop:step])
