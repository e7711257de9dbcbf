"""``rowlock completion``: a script that knows every command and option, made from the parser that reads them."""

import argparse
import shlex
from collections.abc import Iterable, Iterator

_WORDS = """\
# What may stand next: $1 is the command, if there is one yet, and $2 the word before. After an option, its values.
_rowlock_words() {
    case "$1 $2" in
@CASES@
    esac
}

# The command among the words: the first that is no option.
_rowlock_command() {
    local word
    for word in "$@"; do
        case "$word" in
            -*) ;;
            *) echo "$word"; return ;;
        esac
    done
}
"""

_SHELLS = {
    "bash": """\
# rowlock in bash: . <(rowlock completion bash)

@WORDS@
_rowlock() {
    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    # An equals sign is a word of its own to bash.
    if [[ $current == = ]]; then
        current=
    elif [[ $before == = ]]; then
        before=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    local command=$(_rowlock_command "${COMP_WORDS[@]:1:COMP_CWORD - 1}")
    COMPREPLY=($(compgen -W "$(_rowlock_words "$command" "$before")" -- "$current"))
}

# Where nothing here fits, files do.
complete -o default -F _rowlock rowlock
""",
    "zsh": """\
#compdef rowlock
# rowlock in zsh: . <(rowlock completion zsh), after compinit; or as a file _rowlock in a folder of $fpath

@WORDS@
_rowlock() {
    local before=${words[CURRENT - 1]}
    local -a found
    if [[ $PREFIX == --*=* ]]; then
        before=${PREFIX%%=*}
        compset -P '*='
    fi
    found=(${=$(_rowlock_words "$(_rowlock_command "${(@)words[2, CURRENT - 1]}")" "$before")})
    compadd -a found || _files
}

if [[ $funcstack[1] == _rowlock ]]; then
    _rowlock "$@"
else
    compdef _rowlock rowlock
fi
""",
}


def completion(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for a shell."""
    commands = _commands(parser)
    cases = [case for name, found in commands.items() for case in _values(name, found)]
    cases += [_case(f'"{name} "*', _words(found)) for name, found in commands.items()]
    cases.append(_case('" "*', [*commands, *_options(parser)]))
    return _SHELLS[shell].replace("@WORDS@", _WORDS.replace("@CASES@", "\n".join(cases)))


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Options, and what else may stand there."""
    yield from _options(parser)
    for action in parser._actions:
        if not action.option_strings:
            yield from _values_of(action)


def _values(command: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """A case for each option that takes a value: its values, or none, and then files are offered."""
    for action in parser._actions:
        if action.option_strings and action.nargs != 0:
            yield _case("|".join(f'"{command} {option}"' for option in action.option_strings), _values_of(action))


def _values_of(action: argparse.Action) -> Iterable[str]:
    return map(str, action.choices or getattr(action, "completions", ()))  # type: ignore[arg-type]  # not None, behind or


def _case(pattern: str, words: Iterable[str]) -> str:
    return f"        {pattern}) echo {shlex.join(words)} ;;"
