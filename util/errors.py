"""Texts of other libraries' errors inside our sentences."""


def one_line(error: Exception) -> str:
    """The first line of an error's text, cut to 200 characters; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
