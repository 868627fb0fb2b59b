"""The one exception that the command line turns into a sentence and exit status 2."""


class UserError(Exception):
    """Something that the person at the keyboard can put right; its text is one clear sentence."""
