"""An engine in this process instead of a process of its own: transformers' model, fed with weights as vLLM is.

It stands for `EngineProcess`: gets the same calls and reads the same files, so that everything around vLLM can be
tested without it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.trained_weights import completed
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.model.checkpoint import Checkpoint


class LocalEngine:
    """Answers the calls of an engine's process at once."""

    spoil: Callable[[str, Any], Any] = staticmethod(lambda name, answer: answer)  # a test's way to damage answers

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.calls = name, [""]
        self.answer: Any = None
        self.engine: TransformersEngine
        self.folder = Path()

    def send(self, name: str, *arguments: Any) -> None:
        self.calls.append(name)
        self.answer = getattr(self, name)(*arguments)

    def receive(self, silent_seconds: float | None = None) -> Any:
        return self.spoil(self.calls[-1], self.answer)

    def load(self, settings: Any, folder: Path, options: Any, temperature: float, tells: bool) -> None:
        assert settings.name == "vllm" and temperature == 1.0 and tells
        self.folder, self.engine = folder, TransformersEngine(*load_policy(folder, settings.dtype), batch_size=64)

    def generate(self, *arguments: Any) -> Any:
        return self.engine.generate(*arguments)

    @torch.no_grad()
    def read_trained(self, weights: Path) -> None:
        for name, tensor in completed(weights, self.folder):
            self.engine.model.get_parameter(name).copy_(tensor)

    @torch.no_grad()
    def read_folder(self, folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        for name in checkpoint.tensors:
            self.engine.model.get_parameter(name).copy_(checkpoint.read(name))

    def close(self) -> None:
        self.calls.append("close")

    def end(self, patience_seconds: float) -> None:
        self.calls.append("end")
