"""One server and one small world for the tests of faults."""

from collections.abc import Iterator

import pytest

from faults.case import Trials
from faults.commands import Server
from faults.world import World


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The process that runs commands."""
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def world(server: Server, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The small world: parent, child, and runs of stages as they are needed."""
    return World(server, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def trials(server: Server, world: World, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    """What runs cases."""
    return Trials(server, world, tmp_path_factory.mktemp("trials"))
