"""What the code is like to read, at any commits: the measures by which its style was reviewed.

    python -m bench.house                        # HEAD
    python -m bench.house --at 2dd5df8 HEAD

Everything is read from git, nothing is run. A function counts with its inner ones; a docstring
counts for functions and classes; complexity is McCabe's, as ruff's C901 has it. The second part is
who imports whom: rooms of `dualign/`, and what goes round in a circle.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import numpy as np

FOLDERS = ("dualign", "stages", "pipeline", "bench")
WIDTH = 100
_LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.With, ast.IfExp)
_NESTING = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.Try)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file at a commit."""

    path: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def module(self) -> str:
        return self.path[:-3].replace("/", ".").removesuffix(".__init__")


def sources(commit: str, folders: Sequence[str], root: Path) -> list[Source]:
    """The Python files of `folders` at `commit`."""
    listing = _git(root, "ls-tree", "-r", "--name-only", commit, *folders)
    paths = [path for path in listing.splitlines() if path.endswith(".py")]
    texts = [_git(root, "show", f"{commit}:{path}") for path in paths]
    return [Source(path, text, ast.parse(text)) for path, text in zip(paths, texts, strict=True)]


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def measures(files: Sequence[Source]) -> dict[str, str]:
    """The measures of some files by their heading, as the table shows them."""
    nodes = [node for file in files for node in ast.walk(file.tree)]
    functions = [node for node in nodes if isinstance(node, Function)]
    documented = [node for node in nodes if isinstance(node, Function | ast.ClassDef)]
    lines = [line for file in files for line in file.lines]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    complexities = [complexity(node) for node in functions]
    thousand = len(lines) / 1000
    median, ninetieth, longest = np.percentile(lengths, [50, 90, 100])
    return {
        "files / lines": f"{len(files)} / {len(lines):,}",
        "function median / p90 / longest": f"{median:.0f} / {ninetieth:.0f} / {longest:.0f}",
        "docstrings": _share(ast.get_docstring(node) is not None for node in documented),
        "annotated": _share(_annotated(node) for node in functions),
        "complexity, functions > 10": f"{max(complexities)}, {sum(c > 10 for c in complexities)}",
        "most parameters": str(max(_parameters(node) for node in functions)),
        "nesting": str(max(nesting(node) for node in functions)),
        "files > 400 lines": str(sum(len(file.lines) > 400 for file in files)),
        "packed assignments / kLOC": f"{sum(map(_packed, nodes)) / thousand:.1f}",
        "nested comprehensions / kLOC": f"{sum(map(holds_another, nodes)) / thousand:.1f}",
        "`dict[str, Any]`": str(sum(line.count("dict[str, Any]") for line in lines)),
        f"lines > {WIDTH}": f"{np.mean([len(line) > WIDTH for line in lines]):.0%}",
    }


def _share(yes: Iterator[bool]) -> str:
    return f"{np.mean(list(yes)):.0%}"


def complexity(node: ast.AST) -> int:
    """McCabe's: one, and one for every branch, boolean operator, `case` and comprehension.

    >>> complexity(ast.parse("def f(x):\\n    return 1 if x else [y for y in x if y]"))
    4
    """
    found = 1
    for child in ast.walk(node):
        found += isinstance(child, _BRANCHES) and not isinstance(child, ast.With)
        if isinstance(child, ast.BoolOp):
            found += len(child.values) - 1
        if isinstance(child, ast.match_case):
            found += 1
        if isinstance(child, ast.comprehension):
            found += 1 + len(child.ifs)
    return found


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How deep blocks lie in each other.

    >>> nesting(ast.parse("if a:\\n    for b in c:\\n        pass"))
    2
    """
    deepest = depth
    for child in ast.iter_child_nodes(node):
        deepest = max(deepest, nesting(child, depth + isinstance(child, _NESTING)))
    return deepest


def _annotated(node: Function) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    own = [argument for argument in arguments if argument.arg not in ("self", "cls")]
    return node.returns is not None and all(argument.annotation for argument in own)


def _parameters(node: Function) -> int:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in arguments)


def _packed(node: ast.AST) -> bool:
    """Whether several values are assigned at once by a tuple on both sides."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    )


def holds_another(node: ast.AST) -> bool:
    """Whether a comprehension holds a comprehension."""
    if not isinstance(node, _LOOPS):
        return False
    return any(isinstance(child, _LOOPS) for child in ast.walk(node) if child is not node)


def imports(files: Sequence[Source]) -> nx.DiGraph:
    """Which module imports which, of those given."""
    graph = nx.DiGraph()
    modules = {file.module for file in files}
    graph.add_nodes_from(modules)
    for file in files:
        for name in _imported(file.tree):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != file.module:
                graph.add_edge(file.module, target)
    return graph


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(graph: nx.DiGraph) -> nx.DiGraph:
    """The same between packages: `dualign.search`, or a module at the root by its own name."""
    found = nx.DiGraph()
    for left, right in graph.edges:
        ends = [".".join(name.split(".")[:2]) for name in (left, right)]
        if ends[0] != ends[1]:
            found.add_edge(*ends)
    return found


def picture(graph: nx.DiGraph) -> list[str]:
    """The rooms in the order in which they build on each other, and the circles, if any."""
    between = rooms(graph)
    circles = [part for part in nx.strongly_connected_components(between) if len(part) > 1]
    modules = [part for part in nx.strongly_connected_components(graph) if len(part) > 1]
    widest = max(graph.nodes, key=graph.out_degree)
    lines = [
        f"Circles between modules: {len(modules)}; between rooms: {len(circles)}"
        + "".join(f" ({', '.join(sorted(part))})" for part in circles)
        + f". Most imports: `{widest}`, {graph.out_degree(widest)} modules.",
        "",
    ]
    if circles:
        return lines
    layers = enumerate(nx.topological_generations(between.reverse()))
    return lines + [f"{k}. `{'`, `'.join(sorted(own))}`" for k, own in layers]


def page(commits: Sequence[str], root: Path) -> str:
    """All measures, a row for every commit and folder."""
    rows: list[tuple[str, dict[str, str]]] = []
    pictures: list[str] = []
    for commit in commits:
        name = _git(root, "rev-parse", "--short", commit).strip()
        for folder in (*FOLDERS, "tests"):
            rows.append((f"{name} {folder}/", measures(sources(commit, [folder], root))))
        three = sources(commit, FOLDERS[:3], root)
        rows.append((f"{name} dualign + stages + pipeline", measures(three)))
        pictures += [f"### {name}", "", *picture(imports(three)), ""]
    head = list(rows[0][1])
    table = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    table += [f"| {name} | {' | '.join(row.values())} |" for name, row in rows]
    parts = [
        "# What the code is like to read",
        f"    python -m bench.house --at {' '.join(commits)}",
    ]
    return "\n".join(
        itertools.chain(*([part, ""] for part in parts), table, ["", "## Imports", ""], pictures)
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.house", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--at", nargs="+", default=["HEAD"], metavar="COMMIT")
    asked = parser.parse_args(argv)
    sys.stdout.write(page(asked.at, Path.cwd()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
