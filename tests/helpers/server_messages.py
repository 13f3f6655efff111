"""A connection whose ends are both here, and messages that a rollout server understands."""

import socket
from dataclasses import asdict
from pathlib import Path

import lit_puzzle
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.wire import Wire
from lit_puzzle.model.checkpoint import fingerprint

CHILD = Path(lit_puzzle.__file__).parent / "assets" / "tiny_child"
LOAD = {
    "call": "load",
    "folder": str(CHILD),
    "fingerprint": fingerprint(CHILD),
    "dtype": "float32",
    "temperature": 1.0,
    "kv_cache_gib": None,
    "context_tokens": None,
}
GENERATE = {"call": "generate", "prompts": [[1, 8, 3]], "sampling": asdict(Sampling(8)), "rows": [0]}


def pair() -> tuple[Wire, Wire]:
    """Return both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        return Wire(client), Wire(listening.accept()[0])
