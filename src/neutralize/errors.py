"""The one exception of this library."""


class NeutralizeError(ValueError):
    """Bad input, or a request that cannot be carried out; nothing has been written when it is raised.

    The message names what was expected, what came, and what to do: ``<op>: expected X for <parameter>, got Y; <what to do>``.
    """
