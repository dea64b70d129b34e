"""Large JSON documents read element by element: VQA's annotation files have hundreds of megabytes in one line."""
import json

from unimo2_paddle.errors import DataError

_SPACES = " \t\r\n"


class JsonArray:
    """The elements of one array of a JSON object, without ever holding the whole document.

    Iterate once over (number, element). Afterwards ``header`` holds the object's other entries.

    Args:
        path: the file; key: the array's key in the top-level object; chunk: characters read at a time.

    Raises:
        DataError: the file cannot be read, is not JSON (with the line), or its top level is not an object with this array.
    """

    def __init__(self, path, key, chunk=1 << 20):
        self.path, self.key, self.chunk = path, key, chunk
        self.header = {}
        self._decoder = json.JSONDecoder()

    def __iter__(self):
        try:
            with open(self.path, encoding="utf-8") as file:
                self._file, self._text, self._at, self._line, self._ended = file, "", 0, 1, False
                yield from self._elements()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{self.path}: not JSON in UTF-8: {error}") from None

    def _elements(self):
        found = False
        if self._peek() != "{":
            raise DataError(f"{self.path}: must be a JSON object with a list {self.key!r}")
        self._at += 1
        empty = closed = self._peek() == "}"
        while not closed:
            name = self._value()
            self._expect(":")
            if name == self.key and self._peek() == "[":
                found = True
                yield from self._array()
            else:
                self.header[name] = self._value()
            closed = self._expect(",}") == "}"
        self._at += empty
        if self._peek():
            self._fail("expected the end of the file")
        if not found:
            raise DataError(f"{self.path}: has no list {self.key!r}; it has {', '.join(map(str, self.header)) or 'nothing'}")

    def _array(self):
        self._at += 1
        number = 0
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            yield number, self._value()
            number += 1
            if self._expect(",]") == "]":
                return

    def _more(self):
        """Read on, dropping what was consumed; False at the end of the file."""
        self._line += self._text.count("\n", 0, self._at)
        read = self._file.read(self.chunk)
        self._text, self._at = self._text[self._at:] + read, 0
        self._ended = not read
        return bool(read)

    def _peek(self):
        """The next character that is not white space, empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACES:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def _expect(self, choices):
        character = self._peek()
        if not character or character not in choices:
            self._fail(f"expected {' or '.join(choices)}")
        self._at += 1
        return character

    def _value(self):
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._more():
                    continue
                self._fail(error.msg)
            # a number that touches the end of what was read may go on
            if end < len(self._text) or self._ended or not self._more():
                self._at = end
                return value

    def _fail(self, problem):
        line = self._line + self._text.count("\n", 0, self._at)
        near = self._text[self._at:self._at + 30]
        raise DataError(f"{self.path}: not JSON at line {line}: {problem}" + (f" near {near!r}" if near else ", the file ends there"))
