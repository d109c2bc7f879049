from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def real_root() -> Path:
    """The data root of tests marked realdata."""
    root = os.environ.get("MI_AT_DATA")
    if not root:
        pytest.skip("MI_AT_DATA is not set: no real data here")
    return Path(root)
