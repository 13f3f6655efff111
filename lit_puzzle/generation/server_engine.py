"""Completions by a running server with OpenAI's interface, by URL: `vllm serve` on another machine, for example.

Prompts are sent as token ids to `/completions`, many at a time; requests that fail or stall are sent again with growing
pauses (the `openai` package does both), and each answer counts once: what was not answered in time is an error, never a
row. A request is drawn with the seed crc32(seed, row): the same server gives the same completion, another engine
another one, except at temperature 0. All settings of sampling are sent, so that none comes from the server's
`generation_config.json`. The server must answer with token ids (`return_token_ids`: vLLM from 0.11 on): texts without
special tokens would lose the channels that answers are graded by.

Reads the end tokens and the context of the checkpoint folder, which must be the model that is served: its name alone
says so. Writes nothing. The key is read from an environment variable and recorded nowhere.
"""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_puzzle.generation.engine import Completion, OnCompletion, check_prompts
from lit_puzzle.generation.progress import Progress
from lit_puzzle.generation.sampling import Sampling, ServerSettings
from lit_puzzle.generation.stop_tokens import end_tokens_of
from lit_puzzle.model.opening import load_tokenizer
from lit_puzzle.run.files import read_json

if TYPE_CHECKING:
    from openai import AsyncOpenAI

RESUME = "Nothing of it was counted. The same command asks for what is missing."
EXTENSIONS: dict[str, Any] = {  # of vLLM to OpenAI's interface
    "return_token_ids": True,
    "skip_special_tokens": False,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
NO_KEY = "none"  # the package wants a key; a server without keys ignores it


class ServerEngine:
    """A server, ready to generate.

    Args:
        settings: where it is, and how patient to be.
        checkpoint: folder of the model that it serves.

    Raises:
        ValueError: the package `openai` is missing, the server does not answer, or serves another model.
    """

    def __init__(self, settings: ServerSettings, checkpoint: Path) -> None:
        try:
            import openai  # noqa: F401
        except ModuleNotFoundError as error:
            raise ValueError(
                f"Engine server needs the package openai ({error}): pip install 'lit-puzzle[server]'."
            ) from error
        self.settings, self.tokenizer = settings, load_tokenizer(checkpoint)
        self.end_ids = end_tokens_of(checkpoint, self.tokenizer)
        config = read_json(checkpoint / "config.json")
        self.context_tokens, self.vocabulary = int(config["max_position_embeddings"]), int(config["vocab_size"])
        self.model = asyncio.run(self._served_model())

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        rows: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Return one completion for each prompt; see `lit_puzzle.generation.engine.Engine`.

        Raises:
            ValueError: what `Engine.generate` names, log-probabilities, or a request that failed every time.
        """
        sampling.refuse_logprobs("A server")
        numbers = check_prompts(prompts, rows, sampling.max_new_tokens, self.context_tokens)
        return asyncio.run(self._generate(prompts, sampling, numbers, on_completion))

    def _client(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI

        settings = self.settings
        return AsyncOpenAI(
            base_url=settings.url,
            api_key=os.environ.get(settings.key_variable, NO_KEY),
            max_retries=settings.retries,
            timeout=settings.request_seconds,
        )

    async def _served_model(self) -> str:
        from openai import OpenAIError

        try:
            async with self._client() as client:
                served = [model.id async for model in client.models.list()]
        except OpenAIError as error:
            raise ValueError(f"The server {self.settings.url} does not list its models: {_line(error)}") from error
        asked = self.settings.model or (served[0] if len(served) == 1 else None)
        if asked not in served:
            raise ValueError(f"The server {self.settings.url} serves {served}; engine.server.model is {asked}.")
        return asked

    async def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        rows: Sequence[int],
        on_completion: OnCompletion | None,
    ) -> list[Completion]:
        started, places = time.monotonic(), asyncio.Semaphore(self.settings.concurrency)
        progress, done = Progress(len(prompts)), list[int]()  # tokens of the completions that have ended
        async with self._client() as client:

            async def one(prompt: Sequence[int], row: int) -> Completion:
                async with places:
                    found = await self._complete(client, prompt, sampling, row, started)
                if on_completion is not None:
                    on_completion(row, found)
                done.append(len(found.token_ids))
                progress.update(len(done), sum(done))
                return found

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(*pair)) for pair in zip(prompts, rows, strict=True)]
            except* Exception as errors:  # the first one has ended the others
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _complete(
        self, client: AsyncOpenAI, prompt: Sequence[int], sampling: Sampling, row: int, started: float
    ) -> Completion:
        from openai import OpenAIError

        try:
            answer = await client.completions.create(
                model=self.model,
                prompt=list(prompt),
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=zlib.crc32(f"{sampling.seed} {row}".encode()) >> 1,
                extra_body=EXTENSIONS | {"stop_token_ids": self.end_ids},
            )
        except (OpenAIError, JSONDecodeError) as error:
            raise ValueError(
                f"The server {self.settings.url} did not answer prompt {row}: {_line(error)} {RESUME}"
            ) from error
        return self._completion(answer, row, sampling.max_new_tokens, time.monotonic() - started)

    def _completion(self, answer: Any, row: int, most_tokens: int, seconds: float) -> Completion:
        """Return an answer as a completion of at most so many tokens.

        Raises:
            ValueError: it is none.
        """
        try:
            (choice,) = answer.to_dict()["choices"]
            finish, ids = choice["finish_reason"], list(choice["token_ids"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The server {self.settings.url} answered prompt {row} without token ids or an end ({error}): "
                f"{str(answer)[:200]}. It must know return_token_ids, as vLLM does."
            ) from error
        wrong = [token for token in ids if type(token) is not int or not 0 <= token < self.vocabulary]
        if finish not in ("stop", "length") or not 0 < len(ids) <= most_tokens or wrong:
            raise ValueError(
                f"The server {self.settings.url} answered prompt {row} with finish_reason {finish!r} and {len(ids)} "
                f"tokens{f', {str(wrong[0])[:40]} among them' if wrong else ''}: that is no completion."
            )
        if finish == "length" and len(ids) < most_tokens:
            raise ValueError(
                f"The server {self.settings.url} cut its answer to prompt {row} after {len(ids)} tokens; asked for "
                f"were {most_tokens}. Give it a longer context, or lower max_new_tokens."
            )
        return Completion(ids, finish, seconds=seconds)


def _line(error: Exception) -> str:
    """Return an error with what the server says, or with its cause."""
    from openai import APIStatusError

    said = error.response.text if isinstance(error, APIStatusError) else error.__cause__
    return " ".join(f"{type(error).__name__}: {error} {said or ''}".split())[:500] + "."
