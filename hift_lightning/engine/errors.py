"""The error for what a user can mend."""


class ConfigurationError(ValueError):
    """A value given by the user cannot work; the message names the value, the place and the remedy.

    The application ends with the message alone, without a traceback.
    """
