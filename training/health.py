"""Whether a GAN in training is well: rules over the metrics log (`training.vitals` makes the readings).

The rules are pure functions of the log, so that a resumed run, the driver and the page come to the same verdict. Each wants
the same bad reading `HealthConfig.persist` times in a row. docs/HEALTH.md says why these readings and these thresholds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from data_shards.errors import Failure
from training.config import Config, operational

BASELINE = 50  # earlier reports that a gradient's norm is compared with
ENOUGH = 5  # of them, at least
SIGNIFICANT = 4.0  # standard errors that D's gap between training and held-out images must exceed

Event = Mapping[str, Any]
"""A line of the metrics log: "images" seen and "metrics"."""


class HealthConfig(Config):
    """None of these changes the training unless an alarm is acted on; then the checkpoints' `lr_scale` says so."""

    every_images: int = operational(
        8192, "images between two looks at generated images and D's logits, at the next report; 0: none", ge=0)
    images: int = operational(256, "generated, of training and held-out images at each look", ge=16)
    action: Literal["warn", "stop", "rollback"] = operational(
        "warn", "on an alarm: say it; end the run; or go back to the checkpoint before it at lower learning rates")
    persist: int = operational(3, "bad readings in a row that make an alarm", ge=1)
    min_distance_ratio: float = operational(
        0.5, "collapse: mean pairwise distance of generated images / of real ones below this, or that of nearest neighbours",
        ge=0, le=1)
    max_overfitting: float = operational(0.5, "overfitting: ADA's r_v above this; 0 is none, 1 complete", gt=0)
    max_gradient_growth: float = operational(
        10.0, "explosion: gradient norm of a network above this many times its running median", gt=1)
    rollback_lr: float = operational(0.5, "factor on all learning rates at each rollback", gt=0, lt=1)
    max_rollbacks: int = operational(2, "rollbacks after which the run ends instead", ge=1)


@dataclass(frozen=True)
class Alarm:
    """A rule that is broken: since which images; the good reading before that, to which a rollback goes (0: none); why."""

    rule: str
    since: int
    safe: int
    reading: str

    def __str__(self) -> str:
        return f"{self.rule.replace('_', ' ')} since {self.since} images: {self.reading}"


class Unhealthy(Failure):
    """An alarm that ends the run."""


class RollBack(Unhealthy):
    """An alarm on which the run goes back to a checkpoint of at most ``alarm.safe`` images."""

    def __init__(self, alarm: Alarm) -> None:
        super().__init__(str(alarm))
        self.alarm = alarm


# ---- rules: the log so far -> a verdict on each reading in it


@dataclass(frozen=True)
class Readings:
    """Images seen at each reading of a rule, whether it was bad, and the last one in words."""

    images: list[int]
    bad: list[bool]
    said: str = ""


def collapse(events: Sequence[Event], config: HealthConfig) -> Readings:
    """Generated images lie much nearer to each other than real ones, all of them or each to its nearest.

    Before a run was well for the first time, a reading that is better than the one before is not bad: it is learning.
    """
    images, values = _values(events, "health/distance_ratio", "health/nearest_ratio")
    lowest = [min(both) for both in values]
    bad, well = [], False
    for i, value in enumerate(lowest):
        low = value < config.min_distance_ratio
        well = well or not low
        bad.append(low and (well or i == 0 or value <= lowest[i - 1]))
    said = (f"generated images are {values[-1][0]:.2f} times as far apart as real ones and their nearest neighbours "
            f"{values[-1][1]:.2f} times, where {config.min_distance_ratio:g} is the least") if values else ""
    return Readings(images, bad, said)


def overfitting(events: Sequence[Event], config: HealthConfig) -> Readings:
    """D treats held-out real images more like generated ones than like its training images (Karras et al. 2020, eq. 1)."""
    images, values = _values(events, "health/r_v", "health/r_v_z")
    said = (f"the discriminator tells training images from held-out real ones, its r_v is {values[-1][0]:.2f} and "
            f"{config.max_overfitting:g} is the most") if values else ""
    return Readings(images, [r_v > config.max_overfitting and z > SIGNIFICANT for r_v, z in values], said)


def explosion(network: str, events: Sequence[Event], config: HealthConfig) -> Readings:
    """A network's gradient norm has left its running median far behind. The median is of good readings only."""
    images, values = _values(events, f"{network}/grad_norm")
    good: list[float] = []
    bad = []
    for (norm,) in values:
        bad.append(len(good) >= ENOUGH and norm > config.max_gradient_growth * statistics.median(good[-BASELINE:]))
        if not bad[-1]:
            good.append(norm)
    said = (f"the {network}'s gradient norm is {values[-1][0]:.3g}, over {config.max_gradient_growth:g} times its running "
            f"median of {statistics.median(good[-BASELINE:]):.3g}") if good else ""
    return Readings(images, bad, said)


RULES: dict[str, Callable[[Sequence[Event], HealthConfig], Readings]] = {
    "collapse": collapse,
    "overfitting": overfitting,
    "generator_explosion": partial(explosion, "generator"),
    "discriminator_explosion": partial(explosion, "discriminator"),
}


def alarms(events: Sequence[Event], config: HealthConfig) -> dict[str, Alarm]:
    """The rules that were broken ``config.persist`` times in a row at the end of the log."""
    found = {}
    for name, rule in RULES.items():
        readings = rule(events, config)
        begin = _streak(readings.bad)
        if len(readings.bad) - begin >= config.persist:
            found[name] = Alarm(name, readings.images[begin], readings.images[begin - 1] if begin else 0, readings.said)
    return found


def safe_images(events: Sequence[Event], config: HealthConfig) -> int:
    """Until when every rule that has readings found its last one good: a rollback will not go further back than this."""
    ends = []
    for rule in RULES.values():
        readings = rule(events, config)
        if readings.bad:
            begin = _streak(readings.bad)
            ends.append(readings.images[begin - 1] if begin else 0)
    return min(ends, default=0)


def news(before: Mapping[str, Alarm], now: Mapping[str, Alarm]) -> list[str]:
    """One sentence for each rule whose state differs; an alarm that only lasts is no news."""
    return [f"health: {now[name]}" if name in now else f"health: {name.replace('_', ' ')} is over" for name in RULES
            if (name in now) != (name in before)]


def story(events: Sequence[Event], config: HealthConfig) -> list[tuple[int, str]]:
    """All news of a whole log, with the images seen."""
    told, before = [], dict[str, Alarm]()
    for end, event in enumerate(events, 1):
        flags = {name for name in RULES if event["metrics"].get(f"health/{name}")}
        if flags != before.keys():  # the log's own flags say where to look
            now = alarms(events[:end], config)
            told += [(int(event["images"]), sentence) for sentence in news(before, now)]
            before = now
    return told


def _values(events: Sequence[Event], *names: str) -> tuple[list[int], list[tuple[float, ...]]]:
    """Images and values of the reports that have all of the names."""
    having = [event for event in events if all(name in event["metrics"] for name in names)]
    return ([int(event["images"]) for event in having],
            [tuple(float(event["metrics"][name]) for name in names) for event in having])


def _streak(bad: Sequence[bool]) -> int:
    """Where the bad readings at the end begin."""
    begin = len(bad)
    while begin and bad[begin - 1]:
        begin -= 1
    return begin


# ---- what is done about it


@dataclass
class Watch:
    """The log as every rank knows it, and the alarms at its end."""

    config: HealthConfig
    events: list[Event]
    alarms: dict[str, Alarm] = field(default_factory=dict)

    @property
    def rollbacks(self) -> int:
        """So far, of the run."""
        return max((int(event["metrics"].get("health/rollbacks", 0)) for event in self.events), default=0)


def make_watch(config: HealthConfig, events: Sequence[Event]) -> Watch:
    """A watch over a run whose log so far is ``events``; the same on every rank."""
    return Watch(config, list(events), alarms(events, config))


def observe(watch: Watch, images: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """Take a report in: the flags ``health/<rule>`` (1: alarm) that go with it, and the news."""
    watch.events.append({"images": images, "metrics": dict(metrics)})
    now = alarms(watch.events, watch.config)
    said, watch.alarms = news(watch.alarms, now), now
    return {f"health/{name}": float(name in now) for name in RULES}, said


def act(watch: Watch) -> None:
    """What the recipe wants on an alarm that lasts; on every rank alike.

    Raises:
        RollBack: when the run is to go back to a checkpoint before the alarm.
        Unhealthy: when it is to end.
    """
    if not watch.alarms or watch.config.action == "warn":
        return
    alarm = min(watch.alarms.values(), key=lambda alarm: alarm.safe)
    if watch.config.action == "rollback" and watch.rollbacks < watch.config.max_rollbacks:
        raise RollBack(alarm)
    tried = f" after {watch.rollbacks} rollbacks" if watch.config.action == "rollback" else ""
    raise Unhealthy(f"stopped{tried}: {alarm}. The newest checkpoint of at most {alarm.safe} images is from before it; "
                    "lower the learning rates or raise r1 and r2, or go on with --set training.health.action=warn.")
