"""A tracker that stands in for TensorBoard's, which may not be installed."""

from typing import ClassVar

import pytest
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType


class FakeTracker(GeneralTracker):
    name, requires_logging_directory, main_process_only = "tensorboard", True, True
    calls: ClassVar[list] = []
    options: ClassVar[list] = []

    def __init__(self, *args, **options):
        super().__init__()
        self.options.append(options)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.calls.append(("config", values))

    def log(self, values, step):
        self.calls.append((step, values))

    def log_images(self, values, step, **layout):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append(("finished", {}))


@pytest.fixture
def tracked(monkeypatch):
    """What the tracker `tensorboard` gets: ("config", values), (step, values) …, ("finished", {})."""
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setattr("dit_moe.training.trackers.TensorBoard", FakeTracker)
    monkeypatch.setattr(FakeTracker, "calls", [])
    monkeypatch.setattr(FakeTracker, "options", [])
    return FakeTracker.calls
