"""How long processes wait for one another: the timeout of the process group, checked. Imports no torch."""

from datetime import timedelta

LEAST_HOURS, MOST_HOURS = 1 / 3600, 24.0 * 366  # a second, a year: what is more overflows somewhere


def patience(where: str, timeout_hours: float) -> timedelta:
    """Return the timeout of a process group.

    Args:
        where: the setting's place in the recipe, for the message.
        timeout_hours: hours that a process waits for another one in a collective.

    Raises:
        ValueError: it is not a number, or not between a second and a year.
    """
    is_number = isinstance(timeout_hours, int | float) and not isinstance(timeout_hours, bool)
    if not is_number or not LEAST_HOURS <= timeout_hours <= MOST_HOURS:
        raise ValueError(
            f"{where}: timeout_hours {timeout_hours!r} was given; allowed are hours from {LEAST_HOURS:.4f} (a second) "
            f"to {MOST_HOURS:.0f} (a year). Leave it out for 24."
        )
    return timedelta(hours=timeout_hours)
