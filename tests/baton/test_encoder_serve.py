"""What `baton serve` starts for a model that only embeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.config import serve_config, usable_cores, without_decode
from baton.cores import CoreRequest, WorkerCores, plan_prefill
from baton.settings import merge
from protocol.errors import ConfigError


def test_prefill_workers_share_every_core() -> None:
    request = CoreRequest()
    assert plan_prefill([0, 1, 2], 2, request).prefill == (WorkerCores(2, (0, 1)), WorkerCores(1, (2,)))
    assert plan_prefill([0, 1], 1, request, is_pinned=False).prefill == (WorkerCores(2),)
    assert plan_prefill([0], 3, CoreRequest(threads=2)).prefill == (WorkerCores(2),) * 3
    assert plan_prefill([0, 1], 1, CoreRequest(prefill_cores=(1,))).prefill == (WorkerCores(1, (1,)),)
    with pytest.raises(ConfigError, match="prefill-cores"):
        plan_prefill([0], 1, CoreRequest(prefill_cores=(7,)))


def test_options_of_decode_workers_are_refused(tmp_path: Path) -> None:
    config = without_decode(serve_config(merge("serve", {"model": "minilm", "prefill": "1"}, {}, None)))
    assert config.cores is not None and config.cores.decode == () and len(config.cores.prefill) == 1
    assert config.cores.prefill[0].num_threads == len(usable_cores())
    for wrong in ({"decode": "1"}, {"decode_threads": "1"}, {"mode": "colocated"}):
        settings = merge("serve", {"model": "minilm", **wrong}, {}, None)
        with pytest.raises(ConfigError, match="embeds"):
            without_decode(serve_config(settings))
