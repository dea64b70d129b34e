"""The errors this package raises on purpose.

Everything below ``UserInputError`` means that what the user gave is wrong: the command line prints the message
without a traceback and exits with status 2. A message names the thing, the place and the remedy.
"""


class Unimo2Error(Exception):
    """Base of every error raised on purpose."""


class UserInputError(Unimo2Error):
    """The user's input (path, key, file, shape, value) cannot be used."""


class ConfigError(UserInputError):
    """One or several wrong entries in a configuration; all of them are listed at once."""

    def __init__(self, problems, source=""):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        head = f"{source}: " if source else ""
        if len(self.problems) == 1:
            super().__init__(head + self.problems[0])
        else:
            lines = "\n".join(f"  - {p}" for p in self.problems)
            super().__init__(f"{head}{len(self.problems)} problems:\n{lines}")


class CheckpointError(UserInputError):
    """A checkpoint file or directory is missing, damaged, foreign or does not fit the model."""


class ZooError(UserInputError):
    """A name, registry or cache of the model zoo that cannot be used, or something that offline mode forbids."""


class ArchiveError(UserInputError):
    """An archive is damaged, too large, or would write outside the directory it is unpacked into."""


class DownloadError(Unimo2Error):
    """A file could not be fetched, or is not the one the registry describes; not the user's fault, so exit status 1."""


class DataError(UserInputError):
    """A data file is missing, empty, malformed or has too many bad records."""


class ImageError(DataError):
    """A picture cannot be decoded or is too large to be decoded safely."""


class VocabularyError(UserInputError):
    """Vocabulary files are missing, malformed or disagree with each other or with the model."""


class TrainingError(Unimo2Error):
    """Training cannot go on (for example a loss that is not finite)."""


class WorkerError(TrainingError):
    """A process that builds batches died or failed in a way that is not the data's fault."""
