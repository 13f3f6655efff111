"""An exponential moving average of the weights that train, which is what is validated and saved.

    average <- d average + (1 - d) weights, after every update u;  d = min(decay, (1 + u) / (10 + u))
The second bound keeps the initial weights from dominating the average of a short run; u counts from 1.

Averages are buffers of the module that owns them, and so in its checkpoints, sharded as the weights are.
Memory: 4 bytes a trainable parameter, over the processes. Reads and writes nothing.
Source: averaging of iterates, B. T. Polyak and A. B. Juditsky, 1992; the bound is that of TensorFlow's
ExponentialMovingAverage.
"""

import torch
from torch import nn


class WeightAverage(nn.Module):
    """Averages of the trainable parameters of a model, in the order of the parameters.

    Args:
        model: the model, frozen, adapted and sharded as it will be trained.
        decay: largest d, between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for index, parameter in enumerate(self._trained):
            self.register_buffer(f"average_{index}", parameter.detach().clone())

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Add the present weights to the averages.

        Args:
            updates: number of updates done, this one included.
        """
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for average, parameter in zip(self.buffers(), self._trained, strict=True):
            average.lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages; a second call restores both."""
        for average, parameter in zip(self.buffers(), self._trained, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
