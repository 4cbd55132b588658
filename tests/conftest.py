"""Tests run on one thread: they are small, and spinning threads slow a busy machine down."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """No test reads or writes the user's cache; of the whole session, for module fixtures too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEPROBE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield
