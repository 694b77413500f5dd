"""What graft's engines cost, beside other ways of stepping the same GAN: `python -m benchmarks.engine [--quick] [--json PATH]`.

Every contestant runs in fresh processes of one thread each, on the same networks (dcgan, 32 px gray, as recipes/demo.yaml has
them), batches and losses, images coming from memory. They run in rounds, each of which runs all in turn and begins with another
one; a ratio is the median over the rounds of the ratios within a round. "A core" divides by processor seconds, which is the
figure to trust where other programs share the machine.

- one worker: graft beside a plain torch loop, relativistic loss with R1 and R2;
- two workers: graft beside two independent plain loops that run at the same time, which is the limit of the machine;
- peers: DeepSpeed's GAN tutorial and a Lightning module, the non-saturating loss without penalties that they have; in float32,
  and each at its documented defaults, where graft's is bf16 on processors that have it;
- memory: what a rank's tensors hold between two steps by ZeRO stage, networks eight times as wide, batches of two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.peers.environments import target_of
from benchmarks.steps.job import Job

ROOT = Path(__file__).parents[1]
LIMIT_S = 600


@dataclass(frozen=True)
class Contestant:
    name: str
    program: str
    job: Job
    workers: int = 1
    alone: bool = False  # the workers do not know of each other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few steps: whether all of it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32, help="images of a worker's step")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--parts", default="one,two,peers,defaults,memory")
    parser.add_argument("--json", type=Path, help="write every single measurement there")
    given = parser.parse_args()
    rounds, steps = (1, 5) if given.quick else (given.rounds, given.steps)
    base = Job(penalties=True, precision="fp32", batch=given.batch, pixels=given.pixels, channels=given.channels,
               width=given.width, warm=3 if given.quick else 10, steps=steps)
    print(f"{platform.machine()}, {os.cpu_count()} cores; batch {base.batch} a worker, {base.pixels} px, width {base.width}, "
          f"{steps} steps, {rounds} rounds")
    found = {}
    for part in given.parts.split(","):
        contestants, against = PARTS[part](base)
        found[part] = compare(part, contestants, against, rounds)
    if given.json:
        given.json.write_text(json.dumps({"base": asdict(base), "parts": found}, indent=1))


def one(base: Job) -> tuple[list[Contestant], str]:
    return [Contestant("plain torch", "plain", base), Contestant("graft", "graft", base),
            *(Contestant(f"graft, ZeRO {zero}", "graft", replace(base, kind="deepspeed", zero=zero)) for zero in range(4))
            ], "plain torch"


def two(base: Job) -> tuple[list[Contestant], str]:
    return [Contestant("two plain loops", "plain", base, 2, alone=True),
            Contestant("graft, plain engine", "graft", replace(base, kind="torch"), 2),
            *(Contestant(f"graft, ZeRO {zero}", "graft", replace(base, kind="deepspeed", zero=zero), 2) for zero in range(4))
            ], "two plain loops"


def peers(base: Job) -> tuple[list[Contestant], str]:
    job = replace(base, penalties=False)
    return [Contestant("graft", "graft", job), Contestant("DeepSpeed tutorial", "tutorial", job),
            Contestant("Lightning", "lightning", job), Contestant("graft x 2", "graft", replace(job, zero=2), 2),
            Contestant("DeepSpeed tutorial x 2", "tutorial", job, 2), Contestant("Lightning x 2", "lightning", job, 2)], "graft"


def defaults(base: Job) -> tuple[list[Contestant], str]:
    job = replace(base, penalties=False)
    return [Contestant("graft", "graft", replace(job, precision="auto")), Contestant("DeepSpeed tutorial", "tutorial", job),
            Contestant("Lightning", "lightning", job)], "graft"


def memory(base: Job) -> tuple[list[Contestant], str]:
    job = replace(base, batch=2, width=base.width * 8, warm=1, steps=1, penalties=False)
    return [Contestant("plain torch", "plain", job), *(
        Contestant(f"graft x 2, ZeRO {zero}", "graft", replace(job, kind="deepspeed", zero=zero), 2) for zero in range(4))
            ], "graft x 2, ZeRO 0"


PARTS = {"one": one, "two": two, "peers": peers, "defaults": defaults, "memory": memory}
Figures = dict[str, float]


def compare(part: str, contestants: list[Contestant], against: str, rounds: int) -> list[dict[str, Figures]]:
    """Run all contestants ``rounds`` times and print the medians of their ratios to ``against``."""
    taken: list[dict[str, Figures]] = []
    for index in range(rounds):
        turn = index % len(contestants)
        taken.append({one.name: measure(one) for one in [*contestants[turn:], *contestants[:turn]]})
    print(f"\n{part}: images/s of all workers, and ratios to {against}")
    print(f"  {'':28}{'images/s':>10}{'ratio':>8}{'a core':>8}{'MiB':>8}")
    for contestant in contestants:
        name = contestant.name
        ratio, core = (median(found[name][key] / found[against][key] for found in taken)
                       for key in ("images_per_second", "images_per_cpu_second"))
        speed, peak = (median(found[name][key] for found in taken) for key in ("images_per_second", "state_mib"))
        print(f"  {name:28}{speed:10.0f}{ratio:8.2f}{core:8.2f}{peak:8.0f}", flush=True)
    return taken


def measure(contestant: Contestant) -> Figures:
    """Images/s summed over the workers, images per processor second, and the largest worker's tensors between two steps."""
    port = free_port()
    processes = []
    for rank in range(contestant.workers):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
                       "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, target_of(contestant.program))])}
        if contestant.program != "plain":
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(contestant.workers), "NODE_RANK": "0",
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.steps.{contestant.program}", json.dumps(asdict(contestant.job))], cwd=ROOT,
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    found = []
    for process in processes:
        out, err = process.communicate(timeout=LIMIT_S)
        lines = [line for line in out.splitlines() if line.startswith("{")]
        if process.returncode or not lines:
            raise SystemExit(f"{contestant.name} failed:\n{err[-3000:]}")
        found.append(json.loads(lines[-1]))
    return {"images_per_second": sum(one["images_per_second"] for one in found),
            "images_per_cpu_second": sum(one["images_per_cpu_second"] for one in found) / len(found),
            "state_mib": max(one["state_mib"] for one in found)}


def free_port() -> int:
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


if __name__ == "__main__":
    main()
