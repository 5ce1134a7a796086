"""The commands, one line each.

python -m jaxsft
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from jaxsft import cli


def commands() -> dict[str, str]:
    """What `python -m` takes, and the first line of its docstring: read, for importing them all would take a minute."""
    root = Path(__file__).parent.parent
    found = {}
    for file in sorted([*root.glob("jaxsft/**/*.py"), *root.glob("convert/__main__.py")]):
        text = file.read_text(encoding="utf-8")
        if file != Path(__file__) and text.endswith('if __name__ == "__main__":\n    cli.run(main)\n'):
            name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__main__")
            found[name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def main() -> None:
    known = commands()
    asked = sys.argv[1:]
    if asked and asked[0] not in ("-h", "--help"):
        name = asked[0].removeprefix("jaxsft.")
        what = f"python -m jaxsft takes no command, and was given {asked[0]!r}"
        names = {command.removeprefix("jaxsft."): command for command in known}
        if name in names:
            raise cli.UserError(what, f"give it as `python -m {names[name]}`")
        raise cli.UserError(what, cli.nearest(name, list(names)))
    cli.say("Fine-tune a torchvision model in JAX. The commands, each with --help:")
    for name, meaning in known.items():
        cli.say(f"  python -m {name:20} {meaning}")


if __name__ == "__main__":
    cli.run(main)
