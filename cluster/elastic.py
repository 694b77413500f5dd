"""How many workers Ray Train starts: only numbers that divide the global batch and the streams, as the nodes allow.

Ray's own elastic policy would take any number between its bounds, and would end a running group without a word, so that the
work since the last checkpoint was lost. Here a larger group is asked for by a file, the ranks leave a checkpoint of that
moment (training/stopping.py), and only then the group is replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.network import use_node_interface
from training.stopping import RESIZE_FILE

CHECK_EVERY_S = 5.0  # between two looks at the cluster's nodes, whose list Ray itself renews every 20 s
PLACE_S = 15.0  # a placement that waits longer is asked for again: a node that was just lost still counts for some seconds
CHECKPOINT_S = 120.0  # the ranks' time for a checkpoint before a resize; without one the last periodic one is used


def room_for(nodes: Sequence[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """How many processes that each take ``need`` fit on nodes with these resources."""
    return sum(int(min(node.get(key, 0.0) / amount + 1e-9 for key, amount in need.items() if amount)) for node in nodes)


def largest(sizes: Sequence[int], room: int) -> int:
    """The largest of ``sizes`` that is at most ``room``; 0 when there is none."""
    return max((size for size in sizes if size <= room), default=0)


def make_trainer(worker: Callable[[dict[str, Any]], None], *, sizes: Sequence[int], folder: Path, start_seconds: float,
                 **arguments: Any) -> Any:
    """A `TorchTrainer` over groups of one of ``sizes`` workers (ascending).

    Args:
        folder: where the ranks look for `RESIZE_FILE`.
        start_seconds: how long a group may be without a place before the run ends with `TimeoutError`.
        arguments: `TorchTrainer`'s, with a scaling config over (sizes[0], sizes[-1]) workers.
    """
    import ray
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    class DividingSizes(ElasticScalingPolicy):
        """Lives in Ray Train's controller, which asks it whenever it starts a group and at each poll of a running one."""

        def __init__(self, scaling_config: Any) -> None:
            super().__init__(scaling_config)
            self.waits_since: float | None = None
            self.next: Any = None  # the resize that waits for the ranks' checkpoint
            self.asked = 0.0

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            nodes = [resources for node, resources in reserved_resources.items() if node in alive]
            return largest(sizes, room_for(nodes, self.scaling_config._resources_per_worker_not_none))

        def make_decision_for_non_running_worker_group(self) -> Any:
            self._forget()
            now = time.monotonic()
            self.waits_since = self.waits_since or now
            if now - self.waits_since > start_seconds:
                raise TimeoutError(f"the cluster had no place for {sizes[0]} worker{'s' * (sizes[0] > 1)} "
                                   f"for {start_seconds:g} seconds (cluster.start_seconds)")
            return super().make_decision_for_non_running_worker_group()

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
            self.waits_since = None
            if self.next is None:
                decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
                if isinstance(decision, ResizeDecision):
                    self.next, self.asked = decision, time.monotonic()
                    (folder / RESIZE_FILE).touch()
                return NoopDecision()
            if (folder / RESIZE_FILE).exists() and time.monotonic() - self.asked < CHECKPOINT_S:
                return NoopDecision()
            decision = self.next
            self._forget()
            return decision

        def _forget(self) -> None:
            self.next = None
            (folder / RESIZE_FILE).unlink(missing_ok=True)

    class StartsAgain(DefaultFailurePolicy):
        """A worker or node that is lost while a group starts is a fault like any other; Ray would end the run."""

        starts = 0

        def make_decision(self, training_failed_error: Any) -> Any:
            failure = getattr(training_failed_error, "controller_failure", None)
            if failure is None or isinstance(failure, WorkerGroupStartupTimeoutError | TimeoutError):
                return super().make_decision(training_failed_error)
            self.starts += 1
            return FailureDecision.RETRY if self.starts <= self.failure_config.max_failures else FailureDecision.RAISE

    class Backend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(use_node_interface)
            super().on_start(worker_group, backend_config)

    class Group(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Backend

    class Trainer(TorchTrainer):
        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            return super()._initialize_and_run_controller(**parts | {
                "scaling_policy": DividingSizes(self.scaling_config),
                "failure_policy": StartsAgain(parts["failure_policy"].failure_config)})

    return Trainer(worker, torch_config=Group(), **arguments)
