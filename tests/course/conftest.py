"""What the course's own tests share."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from fa_reference.course import ROOT
from fa_reference.grading.answer import Answer, Workshop


@pytest.fixture(scope="session")
def committed_chapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """chapters/ as last committed, so that a learner who has solved chapters still sees these tests pass.

    Outside a git checkout (a downloaded archive) it is chapters/ as it is.
    """
    packed = subprocess.run(["git", "archive", "HEAD", "chapters"], cwd=ROOT, capture_output=True, check=False)
    if packed.returncode:
        return ROOT / "chapters"
    folder = tmp_path_factory.mktemp("committed")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "chapters"


@pytest.fixture(scope="module")
def workshop():
    """Preloaded child processes, shared by the tests of a file."""
    workshop = Workshop()
    yield workshop
    workshop.close()


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A learner's folder with the whole solution in it: a copy of the test file's SOLUTION."""
    solution = request.module.SOLUTION
    return Path(shutil.copytree(solution, tmp_path / solution.name, ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture
def answer(workshop: Workshop, folder: Path):
    """The answer in that folder."""
    answer = Answer(workshop, folder)
    yield answer
    answer.close()
