"""Give a policy away: its folder with a full model card, to the hub or into a folder.

    dualign push certified/dualign --to owner/name
    dualign push aligned/sacpo --to file:///srv/models/sacpo

Whole weights go by default. `--adapter` sends the LoRA adapter alone, on a base that others have:
the run's own where that is a hub id, else the one that `--base` names. The hub's token is read from
where `hf auth login` puts it, or from HF_TOKEN; it is never printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dualign.core.errors import one_line

PROG = "python -m dualign.publishing.command"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog=prog, description="Push a policy of this run with its card."
    )
    made.add_argument("policy", help="a folder under models/, such as certified/dualign")
    made.add_argument("--to", required=True, metavar="WHERE", help="owner/name, or file://FOLDER")
    made.add_argument("--adapter", action="store_true", help="the LoRA adapter alone")
    made.add_argument("--base", metavar="ID", help="the base of the adapter, where others find it")
    made.add_argument("--private", action="store_true", help="a repository that others cannot see")
    made.add_argument("--card", action="store_true", help="print the card and push nothing")
    return made


@one_line
def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Push one policy; returns the exit status."""
    sys.stdout.write(_pushed(parser(prog).parse_args(argv)))
    return 0


def _pushed(asked: argparse.Namespace) -> str:
    """What to print: the card, or where the policy lies now."""
    from dualign.publishing.card import policy_card, published  # for --help to be quick
    from dualign.publishing.push import base_of_adapter, name_at, push

    policy = published(Path.cwd(), asked.policy.removeprefix("models/").strip("/"))
    base = base_of_adapter(policy, asked.base) if asked.adapter else None
    if asked.card:
        return str(policy_card(policy, name_at(asked.to), base))
    return f"{push(policy, asked.to, base, private=asked.private)}\n"


if __name__ == "__main__":
    sys.exit(main())
