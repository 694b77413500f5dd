"""Going back to a checkpoint from before an alarm, at lower learning rates. A rollback is a resumption: the newer checkpoints
are removed, and the run begins again from what is then the newest."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from training.checkpoint import checkpoint_problem, images_of, read_state, remove_checkpoint, steps
from training.events import append_event, cut_events, read_events
from training.folders import Folder, inside
from training.health import Alarm, Event, HealthConfig, Unhealthy
from training.world import World, from_rank_0

logger = logging.getLogger("graft")


def roll_back(folder: Folder, alarm: Alarm, config: HealthConfig, world: World) -> None:
    """Make the newest whole checkpoint of at most ``alarm.safe`` images the newest, and note in the log how often this was
    done (``health/rollbacks``) and by how much the learning rates are lower from there (``lr_scale``). A collective.

    Raises:
        Unhealthy: when there is no such checkpoint.
    """
    target = from_rank_0(lambda: _go_back(folder, alarm, config), world)
    if target is not None and world.rank == 0:
        logger.warning("rolled back to %d images; learning rates times %g (training.health.rollback_lr).", target,
                       config.rollback_lr)
    if target is None:
        raise Unhealthy(f"stopped: {alarm}. No checkpoint is from before it, so there is nothing to go back to; lower the "
                        "learning rates or raise r1 and r2, or go on with --set training.health.action=warn.")


def scale_after(events: Sequence[Event], images: int, saved: float) -> float:
    """The factor on all learning rates from a checkpoint at ``images`` on that says ``saved``: a rollback to it lowers it."""
    scales = [float(event["metrics"]["lr_scale"]) for event in events
              if "health/rollbacks" in event["metrics"] and event["images"] == images]
    return scales[-1] if scales else saved


def _go_back(folder: Folder, alarm: Alarm, config: HealthConfig) -> int | None:
    names = steps(folder)
    good = [name for name in names if images_of(name) <= alarm.safe and checkpoint_problem(inside(folder, name)) is None]
    if not good:
        return None
    state = read_state(inside(folder, good[-1]))
    log = inside(folder, "events.jsonl")
    events = read_events(log)
    done = max((int(event["metrics"].get("health/rollbacks", 0)) for event in events), default=0)
    scale = scale_after(events, state["images"], float(state.get("lr_scale", 1.0))) * config.rollback_lr
    # The log is cut last: a run that is killed before it resumes from the good checkpoint and comes to the alarm again.
    for name in reversed(names[names.index(good[-1]) + 1:]):
        remove_checkpoint(inside(folder, name))
    cut_events(log, state["images"])
    append_event(log, stage="pretrain", images=state["images"],
                 metrics={"health/rollbacks": float(done + 1), "lr_scale": scale})
    return int(state["images"])
