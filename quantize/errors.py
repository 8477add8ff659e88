"""Errors of making and opening base models. `exit_code` as everywhere in edgetune: 2 asked wrongly, 1 could not be done."""


class QuantizeError(Exception):
    """A model that does not exist, is not supported, or is damaged; the message says what to do."""

    exit_code = 2


class NoRoom(QuantizeError):
    """This machine could not write the result; nothing is left half-written."""

    exit_code = 1
