"""Makes the rows that Lightning logs those of their update, so that a resumed run logs what an uninterrupted one does.

Three things of Lightning 2.6 are set right: the number of a row is one behind after a resume from a checkpoint that a
validation came before; a row repeats old values of metrics that this update did not log; and the row of an update is
logged after its checkpoint, so that a run that is killed in between never logs it. Reads and writes nothing.
"""

from lightning.pytorch import Trainer

from lit_puzzle.training.loggers import CSV


def begin_row(trainer: Trainer, batch_idx: int) -> None:
    """Begin the row of an update, at the first of its batches.

    Args:
        trainer: the run's Trainer.
        batch_idx: number of the batch in its epoch.
    """
    if batch_idx % trainer.accumulate_grad_batches:
        return
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = trainer.global_step
    for key in [key for key, metric in loop._results.items() if not metric.meta.on_epoch]:
        del loop._results[key]


def log_row(trainer: Trainer) -> None:
    """Log the update that has just ended. Our loggers, which log a metric once a step, leave out Lightning's row."""
    if trainer.loggers and all(isinstance(logger, CSV) for logger in trainer.loggers):
        trainer._logger_connector.update_train_step_metrics()
