"""The one exception that means: the user can mend this. The command line prints it as one line and exits with 2."""


class UserError(Exception):
    """What was got, what is allowed, what to do next."""
