"""``switchyard completion``: scripts for shells, made from the command line's own table of commands and options."""

import argparse
from collections.abc import Mapping, Sequence

DESCRIPTION = """\
Print a script that completes commands, options, and the workers and shards of the running cluster.

  source <(switchyard completion bash)                                    in ~/.bashrc
  source <(switchyard completion zsh)                                     in ~/.zshrc, after compinit
  switchyard completion fish > ~/.config/fish/completions/switchyard.fish
"""

Words = Mapping[str, Sequence[str]]

# What the positional arguments of a command are, asked of the running cluster when Tab is pressed.
_WORKERS = "switchyard status --json 2>/dev/null | grep -o 'experts-[0-9]*-[0-9a-f]*' | sort -u"
_SHARDS = "switchyard status --json 2>/dev/null | grep -o 'experts-[0-9]*-' | cut -d- -f2 | sort -u"
_ASKED = {"drain": _WORKERS, "restart": _WORKERS, "scale": _SHARDS}
_KNOWN = {"completion": ("bash", "zsh", "fish")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(_SCRIPTS))


def run(arguments: argparse.Namespace) -> int:
    from ops.cli import COMMANDS, options_of

    print(_SCRIPTS[arguments.shell]({name: [*_KNOWN.get(name, ()), *options_of(name)] for name in COMMANDS}))
    return 0


def bash(words: Words) -> str:
    """A completion function for bash."""
    cases = "\n".join(f"        {name}) words='{' '.join(words[name])}{_asking(name)}' ;;" for name in words)
    return f"""\
_switchyard() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W '{" ".join(words)}' -- "$word"))
        return
    fi
    case ${{COMP_WORDS[COMP_CWORD - 1]}} in
        --config | --model | --token-file) COMPREPLY=($(compgen -f -- "$word")); return ;;
    esac
    case ${{COMP_WORDS[1]}} in
{cases}
        *) return ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _switchyard switchyard"""


def _asking(name: str) -> str:
    """Ends the quoted list of words, to add what a command prints."""
    return f" '\"$({_ASKED[name]})\"'" if name in _ASKED else ""


def zsh(words: Words) -> str:
    """zsh runs bash's function."""
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash(words)}"


def fish(words: Words) -> str:
    """`complete` lines for fish."""
    lines = ["complete -c switchyard -f", f"complete -c switchyard -n __fish_use_subcommand -a '{' '.join(words)}'"]
    for name, each in words.items():
        here = f"complete -c switchyard -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{here} -l {word[2:]}" for word in each if word.startswith("--")]
        lines += [f"{here} -a {word}" for word in each if not word.startswith("-")]
        if name in _ASKED:
            lines.append(f'{here} -a "({_ASKED[name]})"')
    return "\n".join(lines)


_SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
