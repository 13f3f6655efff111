"""What a program in a sandbox may use, and what comes of it. Reads and writes nothing."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of one program.

    Attributes:
        cpu_seconds: CPU time of a process on one input.
        wall_seconds: wall clock on one input.
        total_seconds: wall clock on all inputs.
        memory_bytes: address space of a process, and resident memory of all processes together.
        processes: processes and threads at a time.
        output_bytes: of standard output on one input.
        file_bytes: of a file; `/tmp` holds four times as much.
        open_files: open at a time in a process.
    """

    cpu_seconds: int = 6
    wall_seconds: float = 12.0
    total_seconds: float = 120.0
    memory_bytes: int = 1 << 30
    processes: int = 8
    output_bytes: int = 4 << 20
    file_bytes: int = 16 << 20
    open_files: int = 64

    def __post_init__(self) -> None:
        wrong = [name for name, value in asdict(self).items() if not value > 0]
        if wrong:
            raise ValueError(f"sandbox limits: {wrong[0]} is {asdict(self)[wrong[0]]}; a number above 0 is needed.")


@dataclass(frozen=True)
class Outcome:
    """What came of a program on one input.

    Attributes:
        status: `ok`, `time limit`, `output limit`, `memory limit`, `exit code N`, `signal N`, or `sandbox ended`: the
            program has killed the driver.
        output: what it printed, or the JSON of what its function returned.
    """

    status: str
    output: str = ""
