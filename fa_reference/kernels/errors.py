"""What can go wrong between CUDA source and a running kernel, told to the person who wrote the source."""


class KernelCompileError(RuntimeError):
    """The source does not compile. `file` and `line` (when known) say where, in the learner's own file."""

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.line = line


class KernelDeadlock(RuntimeError):
    """A barrier wait of a debug build did not end in time: the message says who waited for what."""


class KernelUnavailable(RuntimeError):
    """This machine cannot do what was asked: a package, the driver or a suitable GPU is missing."""
