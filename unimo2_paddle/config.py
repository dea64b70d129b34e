"""Run configurations: YAML plus ``key=value`` overrides, typed, locked, with every problem reported at once.

A run config has a ``task`` and groups; each group is a dataclass beside the code that reads it (``Task.sections``). This module only
loads, overrides, checks and explains; it never evaluates code.
"""
import dataclasses
import difflib
import itertools
import math
import os
import types
import typing

import yaml

from unimo2_paddle.errors import ConfigError

SOURCE = "# source: "  # how the header of a run's config.yaml names the file it was made from


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error instead of a silent replacement."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise ConfigError(f"line {line}: a key must be a word, is {key!r}")
            if key in seen:
                raise ConfigError(f"line {line}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse(text):
    """The value of a YAML text; raises ``ConfigError`` when it is not YAML or repeats a key."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        # besides its own errors PyYAML passes on those of int(), of dates that do not exist and of unreadable tags
        text = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError(f"not valid YAML: {text}") from None


def read_yaml(path):
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, repeats a key, or is not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = _parse(file.read())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: {error.strerror}", str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError("not a text file", str(path)) from None
    except ConfigError as error:
        raise ConfigError(error.problems, str(path)) from None
    if not isinstance(values, dict):
        raise ConfigError("must be a mapping with 'task' and groups such as model, data, run", str(path))
    return values


def leading_comments(path):
    """The comment lines above the first key of a YAML file: what a run configuration says about itself."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.rstrip() for line in itertools.takewhile(lambda line: line.startswith("#"), file)]
    except (OSError, UnicodeDecodeError):
        return []


class _Scalar:
    """An overriding number, truth value or date with the text it was read from: a key of type text takes that text."""

    def __init__(self, text, value):
        self.text, self.value = text, value

    def __repr__(self):
        return repr(self.value)


def apply_overrides(values, overrides):
    """Put ``["group.key=value", ...]`` into the nested mapping ``values`` (changed in place); values are read as YAML."""
    problems = []
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            problems.append(f"override {text!r}: write key=value, for example -o train.steps=100")
            continue
        try:
            parsed = _parse(value) if value.strip() else ""
        except ConfigError as error:
            problems.append(f"override {text!r}: {error}; quote the value if it is meant as text")
            continue
        if not isinstance(parsed, (str, list, dict, type(None))):
            parsed = _Scalar(value.strip(), parsed)
        target = values
        for number, key in enumerate(keys[:-1], 1):
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
            if not isinstance(target, dict):
                remedy = "; override the whole list" if isinstance(target, list) else ""
                problems.append(f"override {text!r}: {'.'.join(keys[:number])} is not a group{remedy}")
                break
        else:
            target[keys[-1]] = parsed
    if problems:
        raise ConfigError(problems)
    return values


def _type_name(kind):
    return getattr(kind, "__name__", str(kind).replace("typing.", ""))


def _number(value):
    """A number, or a text that is one (YAML reads 1e-4, without a dot, as text), as finite float; else ``None``."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _convert(value, kind, path, problems):
    """``value`` as type ``kind``; what cannot be converted is added to ``problems`` and returned as it is."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(kind, {} if value is None else value, path, problems)
    if kind is typing.Any:
        return value.value if isinstance(value, _Scalar) else value
    if origin is typing.Union or (origin is not None and origin is getattr(types, "UnionType", None)):
        if value is None and type(None) in arguments:
            return None
        attempts = []
        for option in (a for a in arguments if a is not type(None)):
            trial = []
            converted = _convert(value, option, path, trial)
            if not trial:
                return converted
            attempts.append(_type_name(option))
        problems.append(f"{path}: {value!r} is not {' or '.join(attempts)}")
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            problems.append(f"{path}: {value!r} is not a list")
            return value
        return [_convert(v, arguments[0], f"{path}[{i}]", problems) for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            problems.append(f"{path}: {value!r} is not a mapping")
            return value
        return {str(k): _convert(v, arguments[1], f"{path}.{k}", problems) for k, v in value.items()}
    if isinstance(value, _Scalar):
        value = value.text if kind is str else value.value
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = _number(value)
        if number is not None and kind is float:
            return number
        if number is not None and number.is_integer():
            return value if isinstance(value, int) else int(number)
    elif kind in (str, bool) and isinstance(value, kind):
        return value
    elif kind is str and value is None:
        return ""
    problems.append(f"{path}: {value!r} is not {_type_name(kind)}")
    return value


def build(cls, values, path, problems):
    """An instance of dataclass ``cls`` from a mapping; problems (unknown keys, wrong types, ``cls.problems()``) are appended.

    A field whose metadata has ``collect`` receives all keys that are fields of one of those other dataclasses, as a dict.
    """
    if not isinstance(values, dict):
        problems.append(f"{path}: must be a group of keys, is {values!r}")
        return None
    hints = typing.get_type_hints(cls)
    own = {f.name: f for f in dataclasses.fields(cls)}
    collector = next((f for f in own.values() if "collect" in f.metadata), None)
    collected_hints = {}
    for other in collector.metadata["collect"] if collector else ():
        collected_hints.update(typing.get_type_hints(other))
    arguments, collected, before = {}, {}, len(problems)
    for key, value in values.items():
        place = f"{path}.{key}" if path else str(key)
        if key in own and (collector is None or key != collector.name):
            arguments[key] = _convert(value, hints[key], place, problems)
        elif key in collected_hints:
            collected[key] = _convert(value, collected_hints[key], place, problems)
        else:
            known = [n for n in own if collector is None or n != collector.name] + list(collected_hints)
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(known))}"
            problems.append(f"{place}: unknown key{hint}")
    if collector:
        arguments[collector.name] = collected
    missing = [n for n, f in own.items() if n not in arguments and f.default is dataclasses.MISSING
               and f.default_factory is dataclasses.MISSING]
    problems.extend(f"{path}.{name}: is required" for name in missing)
    if len(problems) > before:
        return None
    instance = cls(**arguments)
    if hasattr(instance, "problems"):
        problems.extend(f"{path}.{text}" for text in instance.problems())
    return instance


class RunConfig:
    """A checked run configuration: ``task`` (name), one attribute per group, and ``values``, the plain mapping it came from."""

    def __init__(self, task, groups, values, source):
        self.task, self.groups, self.values, self.source = task, groups, values, source
        for name, group in groups.items():
            setattr(self, name, group)

    def resolved(self):
        """All groups with every default filled in, as plain Python."""
        return {"task": self.task, **{name: _plain(group) for name, group in self.groups.items()}}

    def header(self):
        """The comment lines of the file it came from, below one that names the file; a run's ``config.yaml`` keeps those it has."""
        lines = leading_comments(self.source)
        return lines if lines and lines[0].startswith(SOURCE) else [SOURCE + str(self.source), *lines]

    def to_yaml(self):
        """The resolved configuration as YAML; loading it again gives the same configuration."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def _plain(group):
    """A group as a mapping with collected keys laid back beside the others."""
    plain = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if "collect" in field.metadata:
            plain.update(value)
        elif dataclasses.is_dataclass(value):
            plain[field.name] = _plain(value)
        elif isinstance(value, list):
            plain[field.name] = [_plain(v) if dataclasses.is_dataclass(v) else v for v in value]
        else:
            plain[field.name] = value
    return plain


def load_run_config(path, overrides=()):
    """Read, override and check a run configuration.

    Args:
        path: YAML file; ``run_configs/...`` also names the project's own where the working directory has none of this name.
        overrides: ``["group.key=value", ...]``.

    Returns:
        :class:`RunConfig`.

    Raises:
        ConfigError: with every problem found.
    """
    from unimo2_paddle.tasks import base

    path = _find_config(os.fspath(path))
    values, source, problems = read_yaml(path), path, []
    try:
        apply_overrides(values, overrides)
    except ConfigError as error:
        problems.extend(error.problems)
    task = values.get("task")
    if not isinstance(task, str) or task not in base.TASKS:
        close = difflib.get_close_matches(str(task), list(base.TASKS), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        problems.append(f"task: {task!r} is not a known task ({', '.join(base.TASKS)}){hint}")
        raise ConfigError(problems, source)
    sections = base.task_class(task).sections
    for key in values:
        if key != "task" and key not in sections:
            close = difflib.get_close_matches(str(key), sections, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known groups: {', '.join(sections)}"
            problems.append(f"{key}: unknown group{hint}")
    groups = {name: _convert(values.get(name), cls, name, problems) for name, cls in sections.items()}
    if not problems:
        task_class, checked = base.task_class(task), types.SimpleNamespace(**groups)
        problems.extend(task_class.wrong_system(checked.model) or task_class.check(checked))
    if problems:
        raise ConfigError(problems, source)
    return RunConfig(task, groups, values, source)


def describe_config(path, overrides=()):
    """The resolved configuration as YAML text, for ``unimo2 validate``."""
    return load_run_config(path, overrides).to_yaml().rstrip()


def bundled_config(name):
    """Path of a run config that comes with the project, for example ``"pretrain/demo.yaml"``.

    Raises:
        ConfigError: this installation has no such run config.
    """
    package = os.path.dirname(os.path.abspath(__file__))
    places = [os.path.join(root, "run_configs", name) for root in (os.path.dirname(package), package)]  # a checkout, an installation
    path = next((place for place in places if os.path.isfile(place)), None)
    if path is None:
        raise ConfigError(f"this installation has no run config {name!r} (neither {' nor '.join(places)}); install the package again")
    return os.path.relpath(path) if not os.path.relpath(path).startswith("..") else path


def _find_config(path):
    """``path``, or the project's own config where ``run_configs/...`` is not in the working directory."""
    parts = os.path.normpath(path).split(os.sep)
    if parts[0] != "run_configs" or os.path.exists(path):
        return path
    try:
        return bundled_config(os.path.join(*parts[1:])) if len(parts) > 1 else path
    except ConfigError:
        return path
