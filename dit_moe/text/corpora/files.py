"""Files of text, each of them a document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dit_moe.text.corpora.base import CORPORA, Corpus, SourceConfig, decoded, find_files, fingerprint_of


@dataclass(frozen=True, kw_only=True)
class FilesConfig(SourceConfig):
    """`path` and `heldout`: a file, a pattern such as books/**/*.txt, or a folder of .txt and .md files."""

    path: str
    heldout: str | None = None


@CORPORA.register("files", FilesConfig)
class Files(Corpus):
    """Documents in the order of the files' paths."""

    free = ("path", "heldout")

    def __init__(self, config: FilesConfig, split: str) -> None:
        super().__init__(split, config.heldout_every, config.first)
        self.files = find_files(config, split, (".txt", ".md"))
        self.fingerprint = fingerprint_of(self.files)
        self.size = sum(file.stat().st_size for file in self.files)

    def read(self, start: int) -> Iterator[tuple[str, str]]:
        for file in self.files[start:]:
            yield str(file), decoded(file.read_bytes(), str(file))
