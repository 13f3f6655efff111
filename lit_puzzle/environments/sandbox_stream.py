"""Frames to and from the driver in a sandbox, which may lie, stop or flood: it is held to time, memory and output.

A frame is a length of four bytes and JSON (`sandbox_driver.py`). Reads and writes the sandbox's pipes, and `/proc`.
"""

import json
import os
import select
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

from lit_puzzle.environments.sandbox_limits import Outcome, SandboxLimits
from lit_puzzle.run.files import parse_json

START_SECONDS = 300.0  # no program can make the start slow, a busy machine can
WATCH_SECONDS = 0.2  # how often the resident memory is looked at
FRAME_BYTES = 4


class Stream:
    """Frames to and from the driver, which may lie, stop or flood."""

    def __init__(self, process: subprocess.Popen[bytes], limits: SandboxLimits) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process, self._limits = process, limits
        self._to, self._from = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self._to, False)
        self.ended = False

    def ask(self, given: Any, seconds: float) -> Outcome:
        """Send an input and return the outcome."""
        if not self.write({"input": given}, seconds):
            return Outcome("sandbox ended")
        return self.read(seconds)

    def write(self, value: Any, seconds: float = START_SECONDS) -> bool:
        """Send a frame; return whether it was taken."""
        frame = _frame(value)
        deadline = time.monotonic() + seconds
        try:
            while frame and (left := deadline - time.monotonic()) > 0:
                if select.select([], [self._to], [], left)[1]:
                    frame = frame[os.write(self._to, frame) :]
        except OSError:
            frame = b"left"
        self.ended = self.ended or bool(frame)
        return not frame

    def read(self, seconds: float) -> Outcome:
        """Return the next outcome that the driver reports, within so many seconds and the limits."""
        deadline, data, size = time.monotonic() + seconds, bytearray(), FRAME_BYTES
        most = 6 * self._limits.output_bytes + 1000  # in JSON a byte may take six
        while len(data) < size:
            left = deadline - time.monotonic()
            if left <= 0 or resident_bytes(self._process.pid) > self._limits.memory_bytes:
                self.ended = True
                return Outcome("time limit" if left <= 0 else "memory limit")
            if not select.select([self._from], [], [], min(left, WATCH_SECONDS))[0]:
                continue
            part = os.read(self._from, size - len(data))
            data += part
            if len(data) == FRAME_BYTES == size:
                size += struct.unpack(">I", data)[0]
            if not part or size > most:
                self.ended = True
                return Outcome("sandbox ended" if not part else "output limit")
        return self._outcome(bytes(data[FRAME_BYTES:]))

    def _outcome(self, data: bytes) -> Outcome:
        try:
            reply = parse_json(data, "sandbox")
            return Outcome(str(reply["status"]), str(reply["output"]))
        except (ValueError, LookupError, TypeError, RecursionError):  # a program that speaks for the driver
            self.ended = True
            return Outcome("sandbox ended")


def _frame(value: Any) -> bytes:
    data = json.dumps(value).encode()
    return struct.pack(">I", len(data)) + data


def resident_bytes(process: int) -> int:
    """Return the resident memory of a process and all below it; shared pages count in each."""
    total, level = 0, [process]
    while level:
        number = level.pop()
        try:
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            level += map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split())
        except (OSError, ValueError, IndexError):  # it has ended
            continue
    return total
