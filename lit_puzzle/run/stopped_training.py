"""The error of a training that cannot go on although its state is whole; needs no torch. Reads and writes nothing."""


class TrainingStoppedError(ValueError):
    """A training stops before its next update: the state that it has is saved, and the same command resumes."""
