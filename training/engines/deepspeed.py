"""The DeepSpeed engine, ZeRO 0, 1 and 2. The only file that knows DeepSpeed.

The pattern of calls that gives plain torch's numbers (and whose neighbours lose gradients without a word): forward through
``module``, one backward of one scalar per step, the other network frozen meanwhile. `tests/training/test_engines.py` proves it.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.engines.torch import read_state, write_state
from training.optimizers import OptimizerConfig, make_optimizer
from training.world import World, device

if TYPE_CHECKING:
    from training.engines import OptimizerState


def deepspeed_config(*, zero: int, batch: int) -> dict[str, Any]:
    """DeepSpeed's dict, every default that the library has changed under its users written out."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the library's default became 1.0 in 2026
        "zero_allow_untested_optimizer": True,  # ours are torch's own; DeepSpeed's "Adam" is AdamW and compiles for a minute
        "zero_optimization": {"stage": zero, "round_robin_gradients": False, "overlap_comm": False},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    def __init__(self, module: nn.Module, optimizer: OptimizerConfig, world: World, *, zero: int, batch: int,
                 state: OptimizerState | None = None) -> None:
        _ensure_group()
        # DeepSpeed would compile its shared-memory collectives with g++ here, a minute on first use; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.module = module
        self.world = world
        self.zero = zero
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.client = make_optimizer(self.named.values(), optimizer)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.client,
                                               config=deepspeed_config(zero=zero, batch=batch))
        if state and zero == 0:
            write_state(self.client, self.named, state)
        elif state:
            self._write_shards(state)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, lr: float) -> None:
        for group in self.client.param_groups:
            group["lr"] = lr
        self.engine.step()

    def optimizer_state(self) -> dict[str, Tensor]:
        if self.zero == 0:
            return read_state(self.client, self.named)
        return self._read_shards()

    def close(self) -> None:
        self.engine.destroy()

    # Under ZeRO 1 and 2 the optimizer holds one flat partition a rank; each parameter's `_hp_mapping` says which stretch of
    # the partition (hp) is which stretch of the flattened parameter (lp). Only stretches of this rank are mapped.

    def _flat(self) -> Tensor:
        return self.engine.optimizer.single_partition_of_fp32_groups[0]

    def _read_shards(self) -> dict[str, Tensor]:
        slots = self.client.state[self._flat()]
        state: dict[str, Tensor] = {}
        for slot in sorted(slots):
            shard = slots[slot]
            if shard is None:
                continue
            if shard.dim() == 0:
                state[slot] = shard.detach().float().cpu().clone()
                continue
            whole = {name: torch.zeros(p.numel(), device=shard.device) for name, p in self.named.items()}
            for name, parameter in self.named.items():
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's attribute
                if mapping is not None:
                    hp, lp = mapping.hp_fragment_address, mapping.lp_fragment_address
                    whole[name][lp.start:lp.start + lp.numel] = shard[hp.start:hp.start + hp.numel]
            merged = torch.cat(list(whole.values()))
            dist.all_reduce(merged)  # each stretch is non-zero on one rank only
            parts = merged.split([p.numel() for p in self.named.values()])
            for (name, parameter), part in zip(self.named.items(), parts, strict=True):
                state[f"{name}/{slot}"] = part.view(parameter.shape).cpu().clone()
        return state

    def _write_shards(self, state: OptimizerState) -> None:
        flat = self._flat()
        slots: dict[str, Tensor] = {key: value.clone() for key, value in state.items() if "/" not in key}
        for slot in {key.rpartition("/")[2] for key in state if "/" in key}:
            shard = torch.zeros_like(flat)
            for name, parameter in self.named.items():
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's attribute
                if mapping is not None:
                    hp, lp = mapping.hp_fragment_address, mapping.lp_fragment_address
                    values = state[f"{name}/{slot}"].flatten().to(shard.device)
                    shard[hp.start:hp.start + hp.numel] = values[lp.start:lp.start + lp.numel]
            slots[slot] = shard
        self.client.state[flat] = slots


def _ensure_group() -> None:
    """A group of one where no launcher made one: without it DeepSpeed looks for MPI."""
    if not dist.is_initialized():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("nccl" if device().type == "cuda" else "gloo")
