"""What is wrong with what a user gave."""


class InputError(ValueError):
    """A parameter, file or machine does not do; the text names it, the rule and the remedy.

    Stages and commands say the text alone. Any other error is a fault of this tool, and shows where
    it happened. Validators of pydantic raise it, too, which is why it is a ValueError.
    """
