"""What a failure of a NeuronCore means: whether to try again, to fail the request, or to end the process.

The codes are NRT's status codes: AWS Neuron documentation, Neuron Runtime API, "The API Return Codes", SDK 2.31. What
to do about each is this project's reading of their descriptions; none of it has met a device.
"""

import re
import time

QUEUE_FULL = {7}
BAD_INPUT = {1002, 1006}
NOT_A_NUMBER = {1003}
# After these the core may not be what it was: time-out, failure, completed with other errors, hardware errors.
FATAL = {5, 101, 1004, 1201, 1202, 1203}
KNOWN = QUEUE_FULL | BAD_INPUT | NOT_A_NUMBER | FATAL
# The runtime's own messages: "nrt_execute: status=1004, error message=...", "err: 1004", "'NERR_RESOURCE_NC' (9)".
_STATUS = re.compile(r"\b(?:nrt|nerr|neuron)\w*\b[^\n]*?(?:status(?: code)?\s*[=:]?\s*|err(?:or)?:\s*|\()(\d+)\b", re.I)
TRIES, FIRST_WAIT = 5, 0.02  # seconds; doubled each time


class CoreLost(RuntimeError):
    """The core gave a fatal status: whoever holds it has to end, so that the runtime frees it."""


def status_of(error):
    """The NRT status code that an exception tells of, an int; None where it tells of none that is known here."""
    codes = (int(code) for code in _STATUS.findall(str(error)))
    return next((code for code in codes if code in KNOWN), None)


def on_the_core(call, wait=time.sleep):
    """What ``call()`` returns. Where the core's queue is full it is called `TRIES` times in all, each time later.

    Raises
    ------
    CoreLost
        For a fatal status; every other exception comes through as it is.
    """
    for turn in range(TRIES):
        try:
            return call()
        except RuntimeError as error:
            status = status_of(error)
            if status in FATAL:
                raise CoreLost(f"the NeuronCore gave status {status}: {error}") from error
            if status not in QUEUE_FULL or turn == TRIES - 1:
                raise
            wait(FIRST_WAIT * 2**turn)
