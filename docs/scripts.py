"""A hook of the documentation site: the examples, each with its output. By itself, it runs them and keeps the output.

python docs/scripts.py            # all of them, in some five minutes
python docs/scripts.py gan cli
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, OUTPUTS = ROOT / "examples", ROOT / "docs" / "outputs"


def command(script: Path) -> str:
    """The first command that the docstring of a script names."""
    return next(line for line in script.read_text("utf8").splitlines() if line.startswith("python ")).split("  #")[0]


def section(name: str, purpose: str) -> str:
    """The section of an example: what it shows, its command with the output, and its code."""
    script, output = EXAMPLES / f"{name}.py", (OUTPUTS / f"{name}.txt").read_text("utf8")
    code = script.read_text("utf8")
    shown = f"```console\n$ {command(script)}\n{output}```"
    return f"## {name}.py\n\nIt shows {purpose}.\n\n{shown}\n\n```python\n{code}```\n"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page."""
    rows = re.findall(r"^\| \[`(\w+)\.py`\]\S+ \| (.*) \|$", (EXAMPLES / "README.md").read_text("utf8"), re.MULTILINE)
    sections = "\n".join(section(name, purpose) for name, purpose in rows)
    return markdown.replace("<!-- examples -->", sections.replace("](cli.yaml)", "](loops.md#lightningcli)"))


def main(names: list[str]) -> None:
    """Run the examples that are named, or all, and keep what they print."""
    for script in sorted(EXAMPLES.glob("*.py")):
        if not names or script.stem in names:
            words = [sys.executable, *command(script).split()[1:]]
            done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            (OUTPUTS / f"{script.stem}.txt").write_text(done.stdout.strip("\n") + "\n", "utf8")


if __name__ == "__main__":
    main(sys.argv[1:])
