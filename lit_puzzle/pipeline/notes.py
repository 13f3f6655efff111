"""What a pipeline knows of its stages: `pipeline.json` in its folder.

    {"format": 1, "run_dir": "runs/pipeline",
     "stages": {"library": {"values": {...}, "config": "5d1c...", "seconds": 6.2, "cpu_seconds": 4.9, "attempts": 1}}}

`values` are those of the stage's recipe when its latest attempt began, `config` is a hash of the config.yaml that this
attempt left, seconds are those of all attempts since the stage was started anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_puzzle.run.files import read_json, read_text, write_json
from lit_puzzle.run.folder import CONFIG
from lit_puzzle.run.identity import text_hash

NOTES_FILE = "pipeline.json"
FORMAT = 1


@dataclass(frozen=True)
class Note:
    """What is known of a stage.

    Attributes:
        values: of its recipe when the latest attempt began.
        config: hash of the config.yaml that the latest attempt left; None: it has left none, or was killed.
        seconds: of all attempts on the clock.
        cpu_seconds: of all attempts, of the stage's process and those that it waited for.
        attempts: how many there were.
    """

    values: Mapping[str, Any]
    config: str | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    attempts: int = 0

    def after(self, folder: Path, seconds: float, cpu_seconds: float) -> Note:
        """Return the note after an attempt."""
        file = folder / CONFIG
        return replace(
            self,
            config=text_hash(read_text(file)) if file.is_file() else None,
            seconds=round(self.seconds + seconds, 1),
            cpu_seconds=round(self.cpu_seconds + cpu_seconds, 1),
            attempts=self.attempts + 1,
        )


@dataclass
class Notes:
    """The notes of all stages.

    Attributes:
        folder: of the pipeline.
        place: path of this folder when the notes were written: it may have been moved since.
        stages: name -> note.
    """

    folder: Path
    place: Path
    stages: dict[str, Note] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Notes:
        """Read the notes of a pipeline; none if it has not run yet.

        Raises:
            ValueError: the file is damaged or of another version.
        """
        file = folder / NOTES_FILE
        if not file.is_file():
            return cls(folder, folder)
        content = read_json(file)
        try:
            if content["format"] != FORMAT:
                raise KeyError("format")
            stages = {name: Note(**note) for name, note in content["stages"].items()}
            return cls(folder, Path(content["run_dir"]), stages)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged, or of another version ({error!r}). Restore it, or give --overwrite to start anew."
            ) from error

    def keep(self, name: str, note: Note) -> None:
        """Note something about a stage, on disk too."""
        self.stages[name] = note
        self.place = self.folder
        notes = {stage: asdict(each) for stage, each in self.stages.items()}
        write_json(self.folder / NOTES_FILE, {"format": FORMAT, "run_dir": str(self.folder), "stages": notes})
