"""Declared adjustment: what a user's causal graph says of the controls.

A graph is a list of arrows, one a line (`typicality -> log_density`), or JSON: a list of pairs, or
`{"edges": [[a, b], …]}`, or a plain list of names, which declares them as the adjustment set and nothing
else. The predictor and the outcome go by their names or by `density` and `outcome`. A control that lies on
a path from density to the outcome is a mediator (holding it fixed takes away part of the effect); one that
density or a consequence of it helps to cause is a consequence; one with two causes, whose holding fixed
opens a path that was closed, is a collider. lmd3 holds none of these fixed silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lmd3.errors import FileMissingError, FormatError, ParameterError

OUTCOME, DENSITY = "outcome", "density"


@dataclass(frozen=True)
class Graph:
    """A declared graph: `edges` (cause, effect); `declared`: a plain list of names without a graph."""

    edges: tuple[tuple[str, str], ...]
    declared: tuple[str, ...] | None = None

    @property
    def nodes(self) -> set[str]:
        """All names."""
        return {node for edge in self.edges for node in edge}

    def children(self, node: str) -> set[str]:
        """Effects of a node."""
        return {b for a, b in self.edges if a == node}

    def parents(self, node: str) -> set[str]:
        """Causes of a node."""
        return {a for a, b in self.edges if b == node}

    def descendants(self, node: str) -> set[str]:
        """All that a node helps to cause, itself left out."""
        return self._reached(node, self.children)

    def ancestors(self, node: str) -> set[str]:
        """All that help to cause a node, itself left out."""
        return self._reached(node, self.parents)

    @staticmethod
    def _reached(node: str, step: Any) -> set[str]:
        found: set[str] = set()
        todo = list(step(node))
        while todo:
            at = todo.pop()
            if at not in found:
                found.add(at)
                todo += step(at)
        return found

    def separated(self, a: str, b: str, given: Iterable[str]) -> bool:
        """Whether `given` d-separates a and b (the moral graph of the ancestors; Lauritzen et al. 1990)."""
        given = set(given)
        kept = {a, b, *given}
        for node in list(kept):
            kept |= self.ancestors(node)
        near: dict[str, set[str]] = {node: set() for node in kept}
        for node in kept:
            causes = sorted(self.parents(node) & kept)
            for cause in causes:
                near[node].add(cause)
                near[cause].add(node)
            for one in causes:
                near[one] |= set(causes) - {one}
        seen, todo = {a}, [a]
        while todo:
            for node in near[todo.pop()] - seen - given:
                seen.add(node)
                todo.append(node)
        return b not in seen

    def without_effects_of(self, node: str) -> Graph:
        """The graph less the arrows that leave a node."""
        return Graph(tuple(edge for edge in self.edges if edge[0] != node))


def read_graph(source: str | Path, predictor: str, outcome: str) -> Graph:
    """Reads a graph from a file; the predictor's and outcome's names become `density` and `outcome`.

    Raises:
        FileMissingError, FormatError: not there, or a line that is no arrow.
        ParameterError: arrows in a circle; no density or no outcome in it.
    """
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileMissingError("no such file", file=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"not a text file: {error}", file=str(path)) from None
    edges: list[tuple[str, str]] = []
    if path.suffix == ".json":
        try:
            value = json.loads(text)
        except ValueError as error:
            raise FormatError(f"not valid JSON: {error}", file=str(path)) from None
        items = value.get("edges") if isinstance(value, dict) else value
        if isinstance(items, list) and items and all(isinstance(i, str) and "->" not in i for i in items):
            return Graph((), tuple(items))
        try:
            for item in items or []:
                names = item.split("->") if isinstance(item, str) else item
                edges.append((str(names[0]).strip(), str(names[1]).strip()))
        except (TypeError, IndexError):
            raise FormatError(
                "not a list of arrows", file=str(path), remedy='for example [["a", "b"]]'
            ) from None
    else:
        lines = [(n, line.split("#")[0].strip().rstrip(";")) for n, line in enumerate(text.splitlines())]
        lines = [(n, line) for n, line in lines if line and not line.startswith(("digraph", "dag", "}", "{"))]
        if lines and not any("->" in line for _, line in lines):
            names = [name.strip() for _, line in lines for name in line.split(",") if name.strip()]
            return Graph((), tuple(names))
        for number, line in lines:
            names = [name.strip().strip('"') for name in line.split("->")]
            if len(names) < 2 or not all(names):
                raise FormatError("a line that is no arrow (a -> b)", file=str(path), row=number)
            edges += list(pairwise(names))
    same = {predictor: DENSITY, "log_density": DENSITY, outcome: OUTCOME, "value": OUTCOME}
    graph = Graph(tuple(dict.fromkeys((same.get(a, a), same.get(b, b)) for a, b in edges)))
    for node in sorted(graph.nodes):
        if node in graph.descendants(node):
            raise ParameterError(f"arrows run in a circle through {node!r}", file=str(path))
    for node in (DENSITY, OUTCOME):
        if node not in graph.nodes:
            raise ParameterError(f"no {node} in the graph", file=str(path), remedy=f"name it {node!r}")
    return graph


def roles(graph: Graph, controls: Sequence[str]) -> dict[str, str]:
    """The part that each control plays in the graph.

    confounder, mediator, consequence, collider, cause of the outcome, cause of density, neutral, or unknown
    (not in the graph).
    """
    after = graph.descendants(DENSITY)
    before_outcome = graph.ancestors(OUTCOME)
    back = graph.without_effects_of(DENSITY)
    found = {}
    for name in controls:
        if name not in graph.nodes:
            found[name] = "unknown"
        elif name in after:
            found[name] = "mediator" if name in before_outcome else "consequence"
        elif _is_collider(back, name, controls):
            found[name] = "collider"
        elif name in graph.ancestors(DENSITY) and name in back.ancestors(OUTCOME):
            found[name] = "confounder"
        elif name in before_outcome and name not in graph.ancestors(DENSITY):
            found[name] = "cause of the outcome"
        elif name in graph.ancestors(DENSITY):
            found[name] = "cause of density"
        else:
            found[name] = "neutral"
    return found


def _is_collider(back: Graph, name: str, controls: Sequence[str]) -> bool:
    """Whether holding it fixed opens a path between density and outcome that is closed without it."""
    others = [c for c in controls if c != name and c in back.nodes and c not in back.descendants(name)]
    causes = [c for c in others if not back.descendants(DENSITY) & {c}]
    return any(
        back.separated(DENSITY, OUTCOME, given) and not back.separated(DENSITY, OUTCOME, [*given, name])
        for given in ([], causes)
    )


def judge(graph: Graph, controls: Sequence[str], available: Sequence[str]) -> dict[str, Any]:
    """What the graph says of a set of controls.

    Returns:
        `roles`, `refused` (control → why it must not be held fixed silently), `sufficient` (whether the
        others close all back doors), `missing` (confounders in the graph that are not among the controls).
    """
    if graph.declared is not None:
        return {
            "roles": {name: "declared" if name in graph.declared else "not declared" for name in controls},
            "refused": {n: "not in the declared adjustment set" for n in controls if n not in graph.declared},
            "sufficient": None,
            "missing": [name for name in graph.declared if name not in controls],
        }
    found = roles(graph, controls)
    why = {
        "mediator": "a mediator: density acts through it, holding it fixed takes part of the effect away",
        "consequence": "a consequence of density",
        "collider": "a collider: holding it fixed opens a path between density and the outcome",
    }
    refused = {name: why[role] for name, role in found.items() if role in why}
    kept = [name for name in controls if name not in refused and name in graph.nodes]
    back = graph.without_effects_of(DENSITY)
    confounders = (graph.ancestors(DENSITY) & back.ancestors(OUTCOME)) - set(controls)
    return {
        "roles": found,
        "refused": refused,
        "sufficient": back.separated(DENSITY, OUTCOME, kept),
        "missing": sorted(confounders),
        "missing_but_known": sorted(confounders & set(available)),
    }
