"""Errors that a user can act on: the launcher prints their message as one line.

Anything else that is raised is a bug of ours or of a library and keeps its traceback.
"""


class UserError(ValueError):
    """What the user can put right: the message names the place, the value and the remedy.

    The message is one line, also where a file name in it is not.
    """

    def __str__(self) -> str:
        return escape(super().__str__())


class BadImage(UserError):
    """A file of the data set cannot be used as an image."""


class CheckpointError(UserError):
    """A checkpoint file is damaged, hostile, or not of the kind that is needed."""


class NonFiniteLoss(UserError):
    """Loss or gradients stopped being finite, in more steps than --skip_nonfinite allows."""


def escape(text: str) -> str:
    """Control characters and undecodable bytes (of file names) as Python escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(error: Exception) -> str:
    """The first line of an error's text, cut to 200 characters; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
