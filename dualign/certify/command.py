"""Recompute certificates from saved answers, or sign one."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from dualign.certify import signature
from dualign.certify.certificate import CERTIFICATES, FILE, alike
from dualign.certify.verification import absent, verify
from dualign.core.artifacts import listed
from dualign.core.errors import DualignError

PROG = "python -m dualign.certify.command"
#: Exit status of `verify` where every certificate holds, and one of them says that no policy is
#: certified.
NONE_CERTIFIED = 4


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """The command, called `prog`: a line for each certificate, and one of what that leaves open.

    Returns 1 if a certificate does not hold, 4 if one certifies no policy.
    """
    command = parser(prog)
    asked = command.parse_args(argv)
    if asked.command == "sign":
        return _sign(asked.folder, asked.key, asked.out)
    if (asked.key is None) != (asked.signature is None):
        command.error(
            "--key and --signature go together: a signature is checked by the key that made it"
        )
    paths = asked.paths or [CERTIFICATES]
    certificates = {
        path: [path] if path.is_file() else [*listed(path, FILE), *listed(path, f"*/{FILE}")]
        for path in paths
    }
    if asked.key is not None and sum(map(len, certificates.values())) != 1:
        command.error("a signature is that of one certificate; name one certificate, or its folder")
    statuses = []
    for path, files in certificates.items():
        if not files:
            sys.stdout.write(
                f"{path}: holds no certificate; run the stage certify first (`dvc repro`)\n"
            )
        statuses += [_tell(file, asked) for file in files] or [1]
    if set(statuses) != {1}:
        sys.stdout.write(_left_open(asked))
    return 1 if 1 in statuses else max(statuses)


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of this command."""
    made = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").split("\n\n")[0],
        epilog="exit status: 0 all hold, 1 one does not, 4 all hold and one certifies no policy",
    )
    commands = made.add_subparsers(required=True, dest="command")
    check = commands.add_parser("verify", help="recompute certificates from saved answers")
    check.add_argument(
        "paths",
        nargs="*",
        type=Path,
        help=f"certificates, or folders of some (default: {CERTIFICATES})",
    )
    check.add_argument(
        "--rescore",
        action="store_true",
        help="run the cost model on the answers again (loads torch)",
    )
    check.add_argument(
        "--tolerance",
        type=_tolerance,
        default=1e-3,
        help="of costs scored again (default: %(default)s)",
    )
    check.add_argument(
        "--cost-model", type=Path, help="its folder, if it no longer lies where it lay"
    )
    check.add_argument(
        "--key", type=Path, help="file of the key that signed the certificate's folder"
    )
    check.add_argument("--signature", type=Path, help="the signature, as `sign` wrote it")
    sign = commands.add_parser("sign", help="sign the files of a certificate's folder with a key")
    sign.add_argument("folder", type=Path, help="folder of a certificate that holds")
    sign.add_argument(
        "--key", type=Path, required=True, help="file of secret bytes; both sides need it"
    )
    sign.add_argument(
        "--out",
        type=Path,
        required=True,
        help="where to write the signature, outside of the folder",
    )
    return made


def _tolerance(text: str) -> float:
    """A tolerance that some difference can exceed."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or above, and finite, got {text}")
    return value


def _tell(path: Path, asked: argparse.Namespace) -> int:
    try:
        if asked.key is not None:
            signature.check(path.parent, asked.key, asked.signature)
        certificate = verify(path)
        message = [certificate.statement]
        missing = absent(path, certificate)
        if asked.rescore:
            from dualign.certify.rescoring import rescore

            largest = rescore(certificate, path, asked.tolerance, asked.cost_model)
            message.append(
                f"costs scored again differ by {largest:.2g} at most, {asked.tolerance:g} is"
                " allowed"
            )
        message += [alike(pair) for pair in certificate.same]
        if missing:
            message.append(f"not compared, since not there: {', '.join(missing)}")
    except DualignError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{path} holds: {'; '.join(message)}\n")
    return 0 if certificate.returned is not None else NONE_CERTIFIED


def _left_open(asked: argparse.Namespace) -> str:
    """What a check like this does not show, in one line."""
    left = [] if asked.rescore else ["that the cost model gave these costs (--rescore)"]
    left += [] if asked.key else ["that no file was made anew (sign, then --key)"]
    left.append("that prompts were unseen, and limits set before")
    return f"This shows that the files agree with each other; it does not show {', '.join(left)}.\n"


def _sign(folder: Path, key: Path, out: Path) -> int:
    try:
        certificate = verify(folder / FILE)
        signature.sign(folder, key, out)
    except DualignError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{out} signs {folder}: {certificate.statement}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
