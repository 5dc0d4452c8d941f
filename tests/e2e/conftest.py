from collections.abc import Iterator

import pytest

from tests.service_process import ServiceProcess


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    running = ServiceProcess(tmp_path_factory.mktemp("errata") / "data")
    yield running
    assert running.stop() == 0
