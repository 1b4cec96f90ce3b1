"""The two ways in which a request ends badly; `eagle.entry` turns them into messages and exit codes."""


class RequestError(ValueError):
    """The user asked for something that cannot be done. Says the value, what was expected and the fix."""


class WorkError(RuntimeError):
    """Work had begun and failed: a worker died, the disk filled up, a file is damaged."""


class FailedElsewhere(WorkError):
    """Another process of the group failed, and its own message is the one that says why: it goes before this one."""
