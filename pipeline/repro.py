"""Check params.yaml and run every stage that is out of date with DVC alone, as `make repro` does.

python -m pipeline.repro [OPTIONS OF dvc repro]
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import yaml_text
from pipeline.errors import PipelineError

PROG = "python -m pipeline.repro"


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """The command, called `prog`: becomes `dvc repro`, if params.yaml is one that stages take."""
    given = sys.argv[1:] if argv is None else list(argv)
    file = Path("params.yaml")
    if not file.is_file() or not Path(".dvc").is_dir():
        sys.stderr.write(
            f"{prog}: {Path.cwd()} lacks params.yaml or .dvc; run this in the root of the"
            " repository\n"
        )
        return 2
    try:
        text = yaml_text.read(file)
    except PipelineError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    check = [sys.executable, "-m", "dualign.params.loading", file.name]
    status = subprocess.run(check, input=text.encode(), check=False).returncode
    if status:
        return status
    # dvc.yaml says `python`: let it be this one.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.execve(
        sys.executable, [sys.executable, "-m", "dvc", "repro", *given], {**os.environ, "PATH": path}
    )


if __name__ == "__main__":
    sys.exit(main())
