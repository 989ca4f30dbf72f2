"""What ends a stage or a command and is no fault of this tool."""

INTERRUPTED = 75  # an exit code, EX_TEMPFAIL of sysexits.h: the same command again goes on


def shown(text: object, longest: int | None = None) -> str:
    """One line of a message: what a terminal obeys or can't show is escaped, as in files' names.

    What is longer is cut off, and ends with an ellipsis.
    """
    line = "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(text))
    return line if longest is None or len(line) <= longest else f"{line[:longest]}…"


def one_line(error: Exception) -> str:
    """What another library's error says, or else its kind, in one line of a message."""
    return shown(" ".join(str(error).split()) or type(error).__name__, longest=300)


def counted(count: int, what: str) -> str:
    """`1 problem`, `2 problems`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


class InputError(ValueError):
    """A parameter, file or machine does not do; the text names it, the rule and the remedy.

    Stages and commands say the text alone. Any other error is a fault of this tool, and shows where
    it happened. Validators of pydantic raise it, too, which is why it is a ValueError.
    """


class Interrupted(BaseException):
    """A signal has asked the process to end, and it has; the text says how to go on.

    As with KeyboardInterrupt, what handles errors is not to take it for one.
    """

    told = False  # whether the log has the text already
