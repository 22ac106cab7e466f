"""A tree in the VOC layout, for the tests of all commands."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.voc import write_voc


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("pristine") / "voc", {"trainval": 6, "test": 3})


@pytest.fixture
def tree(pristine: Path, tmp_path: Path) -> Path:
    """A tree that a test may break."""
    return Path(shutil.copytree(pristine, tmp_path / "voc"))
