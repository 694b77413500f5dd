"""The DeepSpeed engine, ZeRO 0 to 3. The only file that knows DeepSpeed.

The pattern of calls that gives plain torch's numbers (and whose neighbours lose gradients without a word): forward through
``module``, one backward of one scalar per micro-batch, the other network frozen meanwhile. `tests/training/test_engines.py`
proves it.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from training.engines.flat import cut, gather_state, join, lay_out, share_state
from training.optimizers import OptimizerConfig, make_optimizer
from training.world import World, device

if TYPE_CHECKING:
    from training.engines import EngineConfig, OptimizerState


def deepspeed_config(config: EngineConfig, *, zero: int, batch: int, clip: float, bf16: bool,
                     weights: int) -> dict[str, Any]:
    """DeepSpeed's dict, every default that the library has changed under its users written out.

    Args:
        weights: of the network; by default ZeRO 3 sets a buffer of 5e8 values aside, however small the network.
    """
    stage: dict[str, Any] = {"stage": zero, "round_robin_gradients": False, "overlap_comm": False,
                             "reduce_bucket_size": min(max(weights // 16, 1_000_000), 50_000_000)}
    if config.offload_optimizer:
        stage["offload_optimizer"] = {"device": "cpu"}
    if zero == 3:
        stage["stage3_param_persistence_threshold"] = config.persistence_threshold
        if config.offload_parameters:
            stage["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": clip if zero else 0.0,  # the library's default became 1.0 in 2026; without ZeRO we clip ourselves
        "zero_allow_untested_optimizer": True,  # ours are torch's own; DeepSpeed's "Adam" is AdamW and compiles for a minute
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": stage,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    def __init__(self, module: nn.Module, optimizer: OptimizerConfig, world: World, config: EngineConfig, *, zero: int,
                 batch: int, bf16: bool = False, state: OptimizerState | None = None) -> None:
        _ensure_group()
        # DeepSpeed would compile its shared-memory collectives with g++ here, a minute on first use; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Of torch 2.13, about collectives that DeepSpeed 0.19.8 calls: nothing that our user could change.
        warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
        self.module = module
        self.world = world
        self.zero = zero
        self.clip = optimizer.clip
        self.accumulation = config.accumulation
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.slots, self.length = lay_out(self.named)
        self.client = make_optimizer(self.named.values(), optimizer)
        exact = {name: p.detach().cpu().clone() for name, p in self.named.items()} if bf16 else {}
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=self.client,
            config=deepspeed_config(config, zero=zero, batch=batch, clip=self.clip, bf16=bf16,
                                    weights=self.length))
        self.micro_batches = 0
        if zero == 3:
            self._clear_padding()
        if bf16:  # DeepSpeed made its masters from weights that it had rounded
            for master, whole in zip(self.masters(), self.share(exact), strict=True):
                master.data.copy_(whole)
        if state:
            for master, values in zip(self.masters(), share_state(state, self), strict=True):
                self.client.state[master] = values

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self.micro_batches += 1
        if self.micro_batches < self.accumulation:
            self.engine.step()  # only counts the micro-batch
            if self.zero == 3:  # what the engine's own forward does: without it the next gradients overwrite these
                self.engine.optimizer.clear_backward_seen_flag()

    def step(self, lr: float) -> Tensor:
        assert self.micro_batches == self.accumulation, "DeepSpeed steps after its accumulated micro-batches only"
        self.micro_batches = 0
        for group in self.client.param_groups:
            group["lr"] = lr
        if self.zero == 0:
            gradients = [p.grad for p in self.named.values() if p.grad is not None]
            norm = get_total_norm(gradients)
            if not math.isfinite(norm.item()):
                for parameter in self.named.values():
                    parameter.grad = None  # so that this step changes nothing
            elif self.clip:
                clip_grads_with_norm_(self.named.values(), self.clip, norm)
            self.engine.step()
            return norm
        self.engine.step()  # leaves a non-finite step out by itself, and gives inf as its norm
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def masters(self) -> list[Tensor]:
        if self.zero == 0:
            return list(self.named.values())
        if self.zero == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def gather(self, shares: Sequence[Tensor], to: int | None = None) -> dict[str, Tensor]:
        keeps = to in (None, self.world.rank)
        if self.zero == 0:
            return {name: share.detach().float().cpu().clone()
                    for name, share in zip(self.named, shares, strict=True)} if keeps else {}
        found: dict[str, Tensor] = {}
        for group, share in enumerate(shares):
            parts = self._from_all(share.detach().float(), to)
            if keeps and self.zero < 3:
                found |= {name: values.cpu().clone() for name, values in cut(torch.cat(parts), self.slots).items()}
            elif keeps:
                found |= self._whole(group, parts)
        return found

    def share(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        if self.zero == 0:
            return [named[name].to(parameter.device, copy=True) for name, parameter in self.named.items()]
        masters = self.masters()
        if self.zero < 3:
            each = masters[0].numel()  # the flat buffer is padded to equal shares
            flat = join(named, self.slots, each * self.world.size)
            return [flat[self.world.rank * each:(self.world.rank + 1) * each].to(masters[0].device, copy=True)]
        shares = [torch.zeros(master.numel()) for master in masters]
        for group, name, numel, start, each in self._stretches():
            mine = named[name].flatten()[self.world.rank * each:min((self.world.rank + 1) * each, numel)]
            shares[group][start:start + mine.numel()] = mine
        return [share.to(master.device) for share, master in zip(shares, masters, strict=True)]

    def optimizer_state(self, to: int | None = None) -> dict[str, Tensor]:
        return gather_state([self.client.state[master] for master in self.masters()], self, to)

    def close(self) -> None:
        self.engine.destroy()

    def _from_all(self, share: Tensor, to: int | None) -> list[Tensor]:
        """Every rank's share, on the rank ``to`` or on all."""
        if self.world.size == 1:
            return [share]
        mine = share.to(device()).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.world.size)] if to in (None, self.world.rank) else []
        if to is None:
            dist.all_gather(parts, mine)
        else:
            dist.gather(mine, parts or None, dst=to)
        return parts

    # Under ZeRO 3 each parameter is cut into one stretch a rank, the last padded; a group's master is one rank's stretches.

    def _clear_padding(self) -> None:
        """DeepSpeed leaves the padding as the memory was: now and then NaN, which no later step takes away."""
        optimizer = self.engine.optimizer
        for group, _, numel, start, each in self._stretches():
            mine = min(max(numel - self.world.rank * each, 0), each)
            for flat in (optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat):
                flat[group].data[start + mine:start + each] = 0

    def _stretches(self) -> list[tuple[int, str, int, int, int]]:
        """(group, name, numel, start in the group's master, numel of a rank's stretch) of each parameter."""
        names = {id(parameter): name for name, parameter in self.named.items()}
        found = []
        for group, parameters in enumerate(self.engine.optimizer.fp16_groups):
            start = 0
            for parameter in parameters:
                each = parameter.partition_numel()
                found.append((group, names[id(parameter)], parameter.ds_numel, start, each))
                start += each
        return found

    def _whole(self, group: int, parts: list[Tensor]) -> dict[str, Tensor]:
        shapes = {slot.name: slot.shape for slot in self.slots}
        return {name: torch.cat([part[start:start + each] for part in parts])[:numel].view(shapes[name]).cpu()
                for of, name, numel, start, each in self._stretches() if of == group}


def _ensure_group() -> None:
    """A group of one where no launcher made one: without it DeepSpeed looks for MPI."""
    if not dist.is_initialized():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("nccl" if device().type == "cuda" else "gloo")
