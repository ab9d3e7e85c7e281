"""Results that DVC's cache holds damaged, by a full disk or a crash; DVC takes them as whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.repo import Repo
from dvc_data.hashfile.hash import file_md5

EMPTY = "d41d8cd98f00b204e9800998ecf8427e"


@dataclass(frozen=True)
class Damage:
    """An object of the cache that is not what its name says, and its output if known."""

    object: Path
    output: str = ""

    @property
    def told(self) -> str:
        """In one line, with the remedy."""
        what = (
            f"{self.output} is damaged in DVC's cache"
            if self.output
            else "an object of DVC's cache is damaged"
        )
        files = " ".join(filter(None, [str(self.object), self.output]))
        return (
            f"{what}, and DVC would take it as it is; rm -rf {files}, then run again (or `dvc"
            " pull`)"
        )


def damages(root: Path, thorough: bool) -> Iterator[Damage]:
    """What is damaged, by size; if `thorough`, by content, a minute for some ten GB."""
    with Repo(str(root)) as repo:
        cache = Path(repo.cache.local.path)
        outputs = {
            Path(out.cache_path): out for out in repo.index.outs if out.hash_info and out.use_cache
        }
        for path in sorted(cache.glob("??/*")):
            out = outputs.get(path)
            if _is_damaged(path, out, repo, thorough):
                yield Damage(path, out.def_path if out is not None else "")


def _is_damaged(path: Path, out: Any, repo: Repo, thorough: bool) -> bool:
    name = f"{path.parent.name}{path.name}"
    size = path.stat().st_size
    listing = name.endswith(".dir")
    if thorough or listing:  # listings are small
        return file_md5(str(path), repo.fs) != name.removesuffix(".dir")
    known = out.meta.size if out is not None and out.meta is not None else None
    return (size == 0 and name != EMPTY) or (known is not None and size != known)
