"""Settings of generation, as recipes hold them: how tokens are drawn, and what runs the model. Imports no torch.

    p(next token) = softmax(logits / temperature), restricted to the smallest set of most likely tokens with
                    mass >= top_p; temperature 0 takes the most likely token.

Each sampled token depends on (seed, row, position) only; see `lit_puzzle.generation.draws`. Reads and writes nothing.
"""

import math
from dataclasses import dataclass
from typing import Literal

EngineName = Literal["auto", "transformers", "vllm", "server"]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: cap on the tokens of a completion, its end token included.
        temperature: divides the logits; 0 is greedy.
        top_p: mass of the most likely tokens that are drawn from.
        seed: of the random numbers, from 0 to 2^64 - 1.
        logprobs: whether completions carry the log-probability of each of their tokens.
    """

    max_new_tokens: int = 96
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens}, temperature {self.temperature}, top_p {self.top_p} were given; "
                "needed are at least 1, at least 0 and finite, and above 0 up to 1."
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed} was given; needed is a whole number from 0 to 2^64 - 1.")

    def refuse_logprobs(self, who: str) -> None:
        """Check that no log-probabilities are asked for, where they would be thrown away.

        Raises:
            ValueError: they are.
        """
        if self.logprobs:
            raise ValueError(f"sampling.logprobs: true was given. {who} writes no log-probabilities: leave it out.")


@dataclass(frozen=True)
class ServerSettings:
    """A running server with OpenAI's interface, vLLM's for example.

    Args:
        url: its address, up to and including `/v1`.
        model: its name for the model; null: the only one that it serves.
        concurrency: requests that are sent at a time.
        retries: how often a request that failed or stalled is sent again, with growing pauses.
        request_seconds: longest time in which a request has to be answered.
        key_variable: environment variable with the key, for servers that want one.
    """

    url: str
    model: str | None = None
    concurrency: int = 64
    retries: int = 5
    request_seconds: float = 3600.0
    key_variable: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"engine.server.url {self.url!r} was given; it begins with http:// or https://.")
        if self.concurrency < 1 or self.retries < 0 or not 0 < self.request_seconds < math.inf:
            raise ValueError(
                f"engine.server: concurrency {self.concurrency}, retries {self.retries}, request_seconds "
                f"{self.request_seconds} were given; needed are 1 or more, 0 or more, and a positive, finite time."
            )


@dataclass(frozen=True)
class EngineSettings:
    """What runs the model.

    Args:
        name: `transformers`, `vllm`, `auto`: vLLM where it is installed and there is a GPU; or `server`: one that runs.
        dtype: of the weights.
        batch_size: completions decoded together by transformers; vLLM chooses for itself.
        tensor_parallel: GPUs that share the weights, with vLLM.
        data_parallel: engines that share the prompts, each in a process of its own with its own GPUs
            (`tensor_parallel` of them); `auto`: as many as there are GPUs for, one on a CPU.
        server: the server, where `name` is `server`.
    """

    name: EngineName = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 128
    tensor_parallel: int = 1
    data_parallel: int | Literal["auto"] = 1
    server: ServerSettings | None = None

    def __post_init__(self) -> None:
        engines = 1 if self.data_parallel == "auto" else self.data_parallel
        if min(self.batch_size, self.tensor_parallel, engines) < 1:
            raise ValueError(
                f"batch_size {self.batch_size}, tensor_parallel {self.tensor_parallel}, data_parallel "
                f"{self.data_parallel} were given; 1 or more is needed."
            )
        if (self.name == "server") != (self.server is not None):
            raise ValueError(
                f"engine.name {self.name} was given {'with' if self.server else 'without'} engine.server: name: server "
                "needs server: {url: http://HOST:PORT/v1}, the other engines need none."
            )
        if self.server is not None and (engines > 1 or self.tensor_parallel > 1 or self.data_parallel == "auto"):
            raise ValueError("engine.name server was given several engines or GPUs: the server decides that itself.")

    def refuse_server(self, where: str) -> None:
        """Check that no running server, which has one model, is asked to measure several folders.

        Raises:
            ValueError: it is.
        """
        if self.name == "server":
            raise ValueError(
                f"{where}.name: server was given; a running server has one model, and folders are measured that do "
                "not exist yet. Use name: vllm, or transformers."
            )

    def refuse_tensor_parallel(self) -> None:
        """Check that transformers, which runs the model on one GPU, is not asked to share it.

        Raises:
            ValueError: it is.
        """
        if self.tensor_parallel > 1:
            raise ValueError(
                f"engine.tensor_parallel {self.tensor_parallel} was given; transformers uses one GPU. Use engine vllm "
                "(name: auto chooses it where it is installed and there is a GPU), or leave tensor_parallel out."
            )
