"""The processes that Lightning has started from this one, by rank: their exit codes tell how they ended.

Lightning starts those of a node from its first process; torchrun and SLURM start all themselves. Reads and writes
nothing.
"""

import subprocess
from collections.abc import Mapping
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as FabricLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as TrainerLauncher


def started_by(launcher: Any) -> Mapping[int, "subprocess.Popen[bytes]"]:
    """Return the processes that a launcher of the first process of a run has started; empty for another launcher."""
    if not isinstance(launcher, FabricLauncher | TrainerLauncher):
        return {}
    return dict(enumerate(launcher.procs, start=1))
