"""Earlier generated images that a discriminator is shown among the new ones (Shrivastava et al. 2017, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.models.layers import Shape


class History(nn.Module):
    """``size`` images of ``shape`` as buffers, so that they are in the network's checkpoint.

    Every rank holds the same ones: `exchange` is given the whole global batch.
    """

    images: Tensor
    filled: Tensor

    def __init__(self, size: int, shape: Shape) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *shape))
        self.register_buffer("filled", torch.tensor(0))

    @torch.no_grad()
    def exchange(self, made: Tensor, draws: Tensor) -> Tensor:
        """What the discriminator is to see of new images ``made`` (N, *shape).

        While there is room an image is stored, and is shown itself; after that, with probability 1/2, it takes the place of a
        stored one, which is shown instead (the buffer of Zhu et al. 2017, section 4). The images of one call are exchanged at
        once: of two that take the same place both show what was there before, and the later stays.

        Args:
            draws: U[0, 1), (N, 2): whether an image is exchanged, and with which.
        """
        size = len(self.images)
        exchanged, place = draws.to(made.device).unbind(1)
        arrival = self.filled + torch.arange(len(made), device=made.device)
        there_is_room = arrival < size
        places = torch.where(there_is_room, arrival, (place * size).long())
        self._store(made, places, there_is_room)
        old = ~there_is_room & (exchanged < 0.5)
        shown = torch.where(_over_images(old, made), self.images[places].to(made.dtype), made)
        self._store(made, places, old)
        self.filled.copy_((self.filled + len(made)).clamp(max=size))
        return shown

    def _store(self, made: Tensor, places: Tensor, chosen: Tensor) -> None:
        """Without a look at the values, for which the device would be waited for; what is not chosen goes to a place beyond."""
        size = len(self.images)
        numbers = torch.arange(len(made), device=made.device)
        latest = torch.full((size + 1,), -1, device=made.device).scatter_reduce(
            0, torch.where(chosen, places, size), numbers, "amax")[:size]
        stored = made[latest.clamp(min=0)].to(self.images.dtype)
        self.images.copy_(torch.where(_over_images(latest >= 0, made), stored, self.images))


def _over_images(flags: Tensor, images: Tensor) -> Tensor:
    """(N,) -> (N, 1, ...), as many dimensions as ``images`` have."""
    return flags.view(-1, *[1] * (images.dim() - 1))
