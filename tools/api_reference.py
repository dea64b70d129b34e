"""The API and command reference as Markdown, written from signatures, docstrings and the argument parser.

`python tools/api_reference.py [api|commands]` prints it; the documentation's site puts it into docs/api.md and docs/commands.md. Own code because
our docstrings say several arguments in one line, which the usual generators read as errors.
"""
import argparse
import dataclasses
import inspect
import re
import sys
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SECTIONS = ("Args", "Returns", "Raises", "Yields", "Attributes")


def public_api():
    """Every public name with its signature, docstring and, of classes, public methods."""
    import unimo2_paddle

    parts = []
    for name in (name for name in unimo2_paddle.__all__ if not name.startswith("__")):
        thing = getattr(unimo2_paddle, name)
        parts += [f"## {name}", "", f"`from unimo2_paddle import {name}`", "", *_entry(name, thing)]
        if inspect.isclass(thing):
            parts += _fields(thing)
            for method, function in _methods(thing):
                parts += [f"### `{name}.{method}`", "", *_entry(method, function)]
    return "\n".join(parts)


def _entry(name, thing):
    """Signature and docstring."""
    if isinstance(thing, property):
        head, text = f"{name}  (property)", inspect.getdoc(thing.fget)
    else:
        head, text = f"{name}{_signature(thing)}", inspect.getdoc(thing)
    return ["```python", head, "```", "", *markdown_of(text or "")]


def _signature(thing):
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        return "(...)"  # its fields follow
    signature = inspect.signature(thing)
    text = str(signature.replace(parameters=[own for own in signature.parameters.values() if own.name not in ("self", "cls")]))
    for spelled, short in (("str, ForwardRef('os.PathLike[str]')", "PathLike"), ("Union[PathLike, NoneType]", "Optional[PathLike]"),
                           ("Union[PathLike]", "PathLike"), ("~Config", "Config")):
        text = text.replace(spelled, short)
    return re.sub(r"\b(?:typing|unimo2_paddle(?:\.\w+)+)\.", "", text)


def _methods(cls):
    """(name, function or property) of the public methods written in this package, those of the class before inherited ones."""
    found = {}
    for owner in cls.__mro__:
        if owner.__module__.startswith("unimo2_paddle"):
            for name, value in vars(owner).items():
                function = getattr(value, "__func__", value)
                written = isinstance(value, property) or (inspect.isfunction(function) and function.__code__.co_filename.endswith(".py"))
                if written and (not name.startswith("_") or name == "__call__") and inspect.getdoc(value):
                    found.setdefault(name, value if isinstance(value, property) else function)
    return found.items()


def _fields(cls):
    """The fields of a dataclass as a table."""
    if not dataclasses.is_dataclass(cls):
        return []
    rows = []
    for field in dataclasses.fields(cls):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        default = "required" if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING else \
            "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        rows.append(f"| `{field.name}` | `{str(field.type if '[' in str(field.type) else kind).replace('typing.', '')}` | {default} |")
    return ["| field | type | default |", "|---|---|---|", *rows, ""]


def markdown_of(docstring):
    """A docstring of this house as lines of Markdown: ``code`` and references as code, Args and the like as lists.

    >>> markdown_of("One.\\n\\nArgs:\\n    a: first; b:\\n        second.\\n\\nReturns:\\n    ``[B]``.")
    ['One.', '', '**Args**', '', '- `a`: first; `b`: second.', '', '**Returns**', '', '- `[B]`.', '']
    """
    text = re.sub(r":(?:class|func|meth|mod|data):`~?([^`]+)`", r"`\1`", docstring)
    text = re.sub(r"``([^`]+)``", r"`\1`", text).replace("::\n", ":\n")
    lines, section, example = [], "", False
    for line in text.splitlines():
        title = re.fullmatch(rf"({'|'.join(SECTIONS)}):", line)
        if title:
            section = title.group(1)
            lines += [f"**{section}**", ""]
        elif not section or (line and not line.startswith(" ")):
            section = "" if line else section
            if line.lstrip().startswith(">>>") and not example:
                lines += ["```python"]
                example = True
            elif example and not line.strip():
                lines += ["```"]
                example = False
            lines.append(line)
        elif not line.strip():
            lines.append("")
        elif line.startswith("     ") and lines[-1]:
            lines[-1] += f" {_arguments(line.strip(), section)}"
        else:
            lines.append(f"- {_arguments(line.strip(), section)}")
    return [*lines, *(["```"] if example else []), ""]


def _arguments(text, section):
    """The names of arguments in a line as code: ``a: first; b: second``."""
    if section not in ("Args", "Attributes"):
        return text
    return re.sub(r"(^|; )(?!default:)(\w+(?:, \w+)*):(?= |$)", lambda found: f"{found.group(1)}`{found.group(2)}`:", text)


def commands():
    """Every command with its options."""
    from unimo2_paddle.cli import build_parser

    return "\n".join(_command(build_parser(), "unimo2"))


def _command(parser, name):
    parts = [f"## {name}", ""] if name.count(" ") < 2 else [f"### {name}", ""]
    if parser.description:
        parts += [parser.description.replace("%%", "%"), ""]
    rows, inner = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, sub in action.choices.items():
                inner += _command(sub, f"{name} {command}")
        elif not isinstance(action, argparse._HelpAction):
            spelled = ", ".join(action.option_strings) or (action.metavar if isinstance(action.metavar, str) else action.dest)
            value = f" {action.metavar or action.dest.upper()}" if action.option_strings and action.nargs != 0 and not action.choices else ""
            choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
            needed = " (required)" if action.required and action.option_strings else ""
            told = "" if action.help in (None, argparse.SUPPRESS) else action.help.replace("%%", "%")
            rows.append(f"| `{spelled}{value}{choices}`{needed} | {told} |".replace("|metavar|", ""))
    if rows:
        rows = [re.sub(r"(?<=\w)\|(?=\w)", "\\|", row) for row in rows]  # a choice such as auto|PATH is no cell's end
        parts += ["| argument | meaning |", "|---|---|", *rows, ""]
    return parts + inner


if __name__ == "__main__":
    print({"api": public_api, "commands": commands}[sys.argv[1] if len(sys.argv) > 1 else "api"]())
