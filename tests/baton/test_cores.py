"""The plan of CPU cores: a table of cases."""

from __future__ import annotations

import pytest

from baton.cores import CorePlan, CoreRequest, WorkerCores, plan_alone, plan_cores
from protocol.errors import ConfigError

NOTHING_ASKED = CoreRequest()


def plan(
    usable: tuple[int, ...], num_prefill: int = 1, num_decode: int = 1, request: CoreRequest = NOTHING_ASKED
) -> CorePlan:
    return plan_cores(usable, num_prefill, num_decode, request)


def cores(shares: tuple[WorkerCores, ...]) -> list[tuple[int, ...]]:
    return [share.cores for share in shares]


def test_two_cores_are_one_each() -> None:
    assert plan((0, 1)) == CorePlan((WorkerCores(1, (0,)),), (WorkerCores(1, (1,)),))


def test_one_core_is_shared_unpinned() -> None:
    assert plan((5,)) == CorePlan((WorkerCores(1),), (WorkerCores(1),))


def test_prefill_takes_the_larger_half() -> None:
    found = plan((0, 1, 2, 3, 4))
    assert found == CorePlan((WorkerCores(3, (0, 1, 2)),), (WorkerCores(2, (3, 4)),))


def test_cores_are_split_by_the_number_of_workers() -> None:
    found = plan(tuple(range(8)), num_prefill=1, num_decode=3)
    assert cores(found.prefill) == [(0, 1)]
    assert cores(found.decode) == [(2, 3), (4, 5), (6, 7)]


def test_every_worker_gets_a_core_when_there_are_just_enough() -> None:
    found = plan((0, 1, 2, 3), num_prefill=3, num_decode=1)
    assert cores(found.prefill) == [(0,), (1,), (2,)]
    assert cores(found.decode) == [(3,)]


def test_with_fewer_cores_than_workers_nobody_is_pinned() -> None:
    found = plan((0, 1), num_prefill=2, num_decode=1)
    assert found == CorePlan((WorkerCores(1),) * 2, (WorkerCores(1),))


def test_cores_that_are_not_ours_are_never_planned() -> None:
    found = plan((3, 7))
    assert cores(found.prefill + found.decode) == [(3,), (7,)]


def test_naming_one_roles_cores_leaves_the_rest_to_the_other() -> None:
    found = plan((0, 1, 2, 3), request=CoreRequest(decode_cores=(3,)))
    assert cores(found.prefill) == [(0, 1, 2)]
    assert cores(found.decode) == [(3,)]


def test_naming_all_cores_for_one_role_shares_them() -> None:
    found = plan((0, 1), request=CoreRequest(prefill_cores=(0, 1)))
    assert cores(found.prefill) == [(0, 1)]
    assert cores(found.decode) == [(0, 1)]


def test_named_cores_may_overlap() -> None:
    found = plan((0, 1, 2), request=CoreRequest(prefill_cores=(0, 1), decode_cores=(1, 2)))
    assert (cores(found.prefill), cores(found.decode)) == ([(0, 1)], [(1, 2)])


def test_a_foreign_core_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match=r"decode-cores: .*\[9\]"):
        plan((0, 1), request=CoreRequest(decode_cores=(1, 9)))


def test_threads_of_a_role_win_over_threads() -> None:
    found = plan((0, 1), request=CoreRequest(threads=4, decode_threads=2))
    assert [share.num_threads for share in found.prefill + found.decode] == [4, 2]


def test_workers_on_a_gpu_are_pinned_only_where_asked() -> None:
    found = plan_cores((0, 1, 2, 3), 1, 1, CoreRequest(decode_cores=(3,)), is_pinned=False)
    assert (cores(found.prefill), cores(found.decode)) == ([()], [(3,)])


def test_a_worker_alone_takes_every_core_unpinned() -> None:
    assert plan_alone((0, 1, 2), None, ()) == WorkerCores(3)
    assert plan_alone((0, 1, 2), None, (1, 2)) == WorkerCores(2, (1, 2))
    assert plan_alone((0, 1, 2), 8, ()) == WorkerCores(8)
    with pytest.raises(ConfigError, match=r"cores: .*\[4\]"):
        plan_alone((0, 1), None, (4,))
