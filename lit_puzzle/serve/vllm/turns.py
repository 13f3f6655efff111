"""An engine of vLLM's environment that answers step by step, so that several engines can take turns.

The process runs `lit_puzzle.serve.vllm.driver` with the word `turns`: a step (JSON) per line on its standard input, a
line `done <JSON>` on its standard output for each. It ends with its input, and so with the process that started it.
"""

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

DONE = "done "
READY = "ready"
RANDOM_WEIGHTS = "random_weights"  # load format of vLLM that `lit_puzzle.serve.vllm.random_weights` registers


class TurnsEngine:
    """A running engine; ends, with its process group, when the block of its `with` ends.

    Args:
        python: interpreter of vLLM's environment.
        model: folder to serve.
        settings: of `vllm.LLM`.
        log: file for what the engine says.
        variables: environment variables added to this process's.
    """

    def __init__(
        self, python: Path, model: Path, settings: Mapping[str, Any], log: Path, variables: Mapping[str, str]
    ) -> None:
        self.log = log
        self._stream = log.open("w")
        self._process = subprocess.Popen(
            [str(python), "-m", "lit_puzzle.serve.vllm.driver", "turns", str(model), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stream,
            text=True,
            env=os.environ | dict(variables),
            start_new_session=True,  # vLLM may have processes of its own
        )

    def __enter__(self) -> Self:
        """Return the engine; the first step waits until it has started."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the engine."""
        assert self._process.stdin is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stream.close()

    def wait_until_ready(self) -> None:
        """Wait until the engine has started.

        Raises:
            ValueError: it ended; shows the end of its log.
        """
        self._line(READY)

    def step(self, step: Mapping[str, Any]) -> Any:
        """Run one step of the driver and return its result.

        Raises:
            ValueError: the engine ended; shows the end of its log.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(step) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the next line says how
        return json.loads(self._line(DONE))

    def _line(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        code = self._process.wait()
        raise ValueError(f"vLLM ended with code {code}; the end of {self.log}:\n{self.log.read_text()[-3000:]}")
