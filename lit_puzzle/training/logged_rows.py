"""Makes the rows that Lightning logs those of their update, so that a resumed run logs what an uninterrupted one does.

Two things of Lightning 2.6 are set right: a row repeats old values of metrics that this update did not log; and the row
of an update is logged after its checkpoint, so that a run that is killed in between never logs it. Reads and writes
nothing.
"""

from lightning.pytorch import Trainer

from lit_puzzle.training.loggers import CSV


def begin_row(trainer: Trainer, batch_idx: int) -> None:
    """Forget what earlier updates logged, at the first batch of an update.

    Args:
        trainer: the run's Trainer.
        batch_idx: number of the batch in its epoch.
    """
    if batch_idx % trainer.accumulate_grad_batches:
        return
    results = trainer.fit_loop.epoch_loop._results
    for key in [key for key, metric in results.items() if not metric.meta.on_epoch]:
        del results[key]


def log_row(trainer: Trainer) -> None:
    """Log the update that has just ended. Our loggers, which log a metric once a step, leave out Lightning's row."""
    if trainer.loggers and all(isinstance(logger, CSV) for logger in trainer.loggers):
        trainer._logger_connector.update_train_step_metrics()
