"""How two processes share the tests (``pytest -n 2``): module by module, in the order of the suite.

Tests that start servers are all for one process: they look at what servers leave on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController


class SharedScheduling(LoadScopeScheduling):
    """Gives out what stands together in the order: a module's fast tests, later its slow ones.

    ``servers``: how the ids of tests begin that belong together.
    """

    def __init__(self, config: pytest.Config, log: Any, servers: tuple[str, ...]) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)
        self._servers = servers
        self._units: dict[str, str] = {}

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        module, unit = "", ""
        for number, test in enumerate(collection):
            if module != (module := test.partition("::")[0]):
                unit = "servers" if module.startswith(self._servers) else f"{number} {module}"
            self._units[test] = unit
        super().add_node_collection(node, collection)

    def _split_scope(self, nodeid: str) -> str:
        return self._units[nodeid]
