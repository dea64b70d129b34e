"""Shell completion written from the argparse tree, so that it knows every command and option there is (``unimo2 completion``)."""
import argparse
import shlex
from typing import Dict, List, NamedTuple, Tuple

BASH = """\
# Completion of unimo2 for bash: eval "$(unimo2 completion bash)"
_unimo2() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} place=unimo2 word known=
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$place $word" in
            {places}) place="$place $word" ;;
        esac
    done
    COMPREPLY=()
    case "$place:$before" in
{values}
        *) case "$place" in
{words}
        esac ;;
    esac
    [ -z "$known" ] || COMPREPLY=($(compgen -W "$known" -- "$current"))
}}
# File names where no word of ours fits.
complete -o default -F _unimo2 unimo2
"""

ZSH = """\
#compdef unimo2
# Completion of unimo2 for zsh: source <(unimo2 completion zsh), after compinit
_unimo2() {{
    local place=unimo2 word
    local -a known
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case "$place $word" in
            {places}) place="$place $word" ;;
        esac
    done
    case "$place:${{words[CURRENT-1]}}" in
{values}
        *) case "$place" in
{words}
        esac ;;
    esac
    (( $#known )) && compadd -a known
    [[ $PREFIX == -* ]] || _files
}}
compdef _unimo2 unimo2
"""


class Place(NamedTuple):
    """What can follow a command: its subcommands, and per option its spellings, choices, help and whether a value follows."""

    commands: List[str]
    options: List[Tuple[List[str], List[str], str, bool]]
    positional: List[str]  # choices of arguments without a name


def command_tree(parser: argparse.ArgumentParser, name: str = "unimo2") -> Dict[str, Place]:
    """Every command's path (``"unimo2 augment index"``) with what can follow it."""
    place, tree = Place([], [], []), {}
    tree[name] = place
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, sub in action.choices.items():
                place.commands.append(command)
                tree.update(command_tree(sub, f"{name} {command}"))
        elif action.option_strings:
            text = "" if action.help in (None, argparse.SUPPRESS) else action.help
            place.options.append((list(action.option_strings), [str(c) for c in action.choices or ()], text, action.nargs != 0))
        elif action.choices:
            place.positional.extend(str(choice) for choice in action.choices)
    return tree


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a shell: ``bash``, ``zsh`` or ``fish``."""
    tree = command_tree(parser)
    if shell == "fish":
        return _fish(tree)
    values, words = [], []
    known = (lambda found: f"known=({' '.join(map(shlex.quote, found))})") if shell == "zsh" else (lambda found: f"known={shlex.quote(' '.join(found))}")
    for name, place in tree.items():
        for spellings, choices, _, valued in place.options:
            if valued:  # without choices: a file name, so nothing of ours
                patterns = "|".join(f'"{name}:{spelling}"' for spelling in spellings)
                values.append(f"        {patterns}) {known(choices) if choices else ':'} ;;")
        options = [spelling for spellings, *_ in place.options for spelling in spellings]
        words.append(f'            "{name}") {known([*place.commands, *place.positional, *options])} ;;')
    places = "|".join(f'"{name}"' for name in tree if " " in name)
    return (ZSH if shell == "zsh" else BASH).format(places=places, values="\n".join(values), words="\n".join(words))


def _fish(tree):
    lines = ["# Completion of unimo2 for fish: unimo2 completion fish | source"]
    for name, place in tree.items():
        seen = [f"__fish_seen_subcommand_from {command}" for command in name.split()[1:]]
        if place.commands:  # one of these once, and no file names
            condition = "; and ".join([*seen, f"not __fish_seen_subcommand_from {' '.join(place.commands)}"])
            lines.append(f"complete -c unimo2 -f -n {shlex.quote(condition)} -a {shlex.quote(' '.join(place.commands))}")
        if place.positional:
            lines.append(f"complete -c unimo2 -f -n {shlex.quote('; and '.join(seen))} -a {shlex.quote(' '.join(place.positional))}")
        for spellings, choices, text, valued in place.options:
            parts = ["complete -c unimo2", *([f"-n {shlex.quote('; and '.join(seen))}"] if seen else [])]
            parts += [f"-l {spelling[2:]}" if spelling.startswith("--") else f"-s {spelling[1:]}" for spelling in spellings]
            parts += [f"-x -a {shlex.quote(' '.join(choices))}"] if choices else ["-r"] if valued else []
            lines.append(" ".join([*parts, f"-d {_fish_text(text)}"]))
    return "\n".join(lines) + "\n"


def _fish_text(text):
    """A text in fish's single quotes, where a backslash protects quotes and itself."""
    return "'" + text.replace("%%", "%").replace("\\", "\\\\").replace("'", "\\'") + "'"
