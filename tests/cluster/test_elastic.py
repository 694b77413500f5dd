"""Which sizes, which workers are hung, which interface: the decisions, without Ray."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.elastic import largest, room_for
from cluster.heartbeat import Heartbeats
from cluster.network import interface_of
from cluster.pretrain import _cause
from cluster.recipe import Recipe
from cluster.run import derived
from data_shards.errors import UserError
from tests.toy import toy_tree
from training.recipe import resolve


def recipe(root: Path, workers: object, **training: object) -> Recipe:
    return resolve(Recipe, toy_tree(root, **training) | {"cluster": {"workers": workers}}, where="here")


@pytest.mark.parametrize(("workers", "batch", "sizes"), [
    (2, 8, [2]), ({"min": 1, "max": 4}, 8, [1, 2, 4]), ({"min": 1, "max": 8}, 24, [1, 2, 3, 4, 6, 8]),
    ({"min": 3, "max": 3}, 24, [3]), ({"min": 5, "max": 12}, 64, [8])])
def test_world_sizes_divide_the_batch_and_the_streams(tmp_path: Path, workers: object, batch: int, sizes: list[int]) -> None:
    found = recipe(tmp_path, workers, batch=batch)
    assert found.world_sizes == sizes
    assert all(batch % size == 0 and found.data.streams % size == 0 for size in sizes)


def test_world_sizes_keep_groups_of_images_whole(tmp_path: Path) -> None:
    assert recipe(tmp_path, {"min": 1, "max": 4}, batch=8, objective={"pack": 4}).world_sizes == [1, 2]
    assert recipe(tmp_path, {"min": 1, "max": 4}, batch=8, engine={"kind": "torch", "accumulation": 4}).world_sizes == [1, 2]


@pytest.mark.parametrize(("workers", "said"), [
    (3, "does not divide over 3 workers; use 6 or 9"), (0, "cluster.workers = 0 is refused"),
    ({"min": 5, "max": 7}, "none of 5-7 workers"), ({"min": 3, "max": 2}, "min = 3 is over max = 2; exchange them"),
    ({"mix": 2}, "did you mean 'cluster.workers.min'"), ("many", "cluster.workers = 'many' is refused")])
def test_workers_that_cannot_be_are_refused_with_the_remedy(tmp_path: Path, workers: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe(tmp_path, workers)


def test_what_is_skipped_is_printed_and_nothing_where_nothing_is(tmp_path: Path) -> None:
    text = "\n".join(derived(recipe(tmp_path, {"min": 1, "max": 6}), tmp_path))
    assert "workers x images: 1 x 8 or 2 x 4 or 4 x 2" in text
    assert "of 1-6 workers, 1, 2, 4 divide the batch of 8 and the 24 streams; 3, 5, 6 are skipped" in text
    assert "  elastic " not in "\n".join(derived(recipe(tmp_path, {"min": 1, "max": 2}), tmp_path))


def test_room_counts_whole_workers_on_each_node() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 8.0}]
    assert room_for(nodes, {"CPU": 1.0}) == 13
    assert room_for(nodes, {"CPU": 2.0}) == 6
    assert room_for(nodes, {"CPU": 1.0, "GPU": 0.25}) == 5
    assert room_for([{"CPU": 1.0}], {"CPU": 0.1}) == 10, "1.0 // 0.1 is 9"
    assert [largest([1, 2, 4], room) for room in range(6)] == [0, 1, 2, 2, 4, 4]


def heard(beats: Heartbeats, rank: int, *, ago: float, images: int | None, step_age: float) -> None:
    beats.beat("group", rank, images, step_age)
    beats.beats[rank].heard = time.monotonic() - ago


def test_the_silent_rank_is_blamed_and_not_those_that_wait_for_it() -> None:
    beats = Heartbeats()
    for rank in range(3):
        beats.join("group", rank, 3, f"pid {rank}", f"actor {rank}")
    for rank, ago in enumerate((0.5, 70.0, 0.2)):
        heard(beats, rank, ago=ago, images=64, step_age=5.0)
    assert [(one.rank, one.actor) for one in beats.hung(60, 300)] == [(1, "actor 1")]
    assert "has not answered for 70 s" in beats.hung(60, 300)[0].why
    assert not beats.hung(80, 300)


def test_among_ranks_that_all_answer_the_ones_furthest_behind_are_blamed() -> None:
    beats = Heartbeats()
    for rank, images in enumerate((72, 64, 72)):
        beats.join("group", rank, 3, "", None)
        heard(beats, rank, ago=0.1, images=images, step_age=61.0)
    assert [one.rank for one in beats.hung(60, 300)] == [1]
    beats.leave("group", 1)
    assert [one.rank for one in beats.hung(60, 300)] == [0, 2]


def test_a_first_step_may_take_longer_and_an_old_group_is_forgotten() -> None:
    beats = Heartbeats()
    beats.join("group", 0, 1, "", None)
    heard(beats, 0, ago=0.1, images=None, step_age=100.0)
    assert not beats.hung(60, 300) and [one.rank for one in beats.hung(60, 90)] == [0]
    beats.join("next", 0, 2, "", None)
    beats.beat("group", 0, 64, 900.0)
    beats.leave("group", 0)
    assert beats.now() == ("next", 2, 1) and not beats.hung(60, 90)


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None


def test_the_cause_is_the_lost_process_and_not_what_it_broke() -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    closed = RuntimeError("Connection closed by peer [10.0.0.2]:123")
    lost = WorkerHealthCheckFailedError("A worker health check failed.", failure=RuntimeError("died"))
    assert _cause({0: closed, 1: lost}) == "rank 1 was lost (the process or its node died)"
    assert _cause({0: closed, 1: ValueError("a line\nthe weights are gone.")}) == "the weights are gone"
