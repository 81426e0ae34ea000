"""One run directory with its report, made once for all tests of the page."""

import pytest

from stic_ray.core.rundir import RunDir
from stic_ray.report.write import write_report
from tests.report.builders import Page, write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    made = write_run(tmp_path_factory.mktemp("runs") / "a")
    write_report(made)
    return made


@pytest.fixture(scope="session")
def source(run: RunDir) -> str:
    return (run.location / "report.html").read().decode()


@pytest.fixture(scope="session")
def page(source: str) -> Page:
    return Page(source)
