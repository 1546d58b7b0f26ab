"""The order in which variants are read and made: each after those that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from robustkit.errors import did_you_mean
from robustkit.recipe.document import PathTuple
from robustkit.recipe.reader import Reader

Link = Literal["from", "teacher", "members"]
LINKS: tuple[Link, ...] = ("from", "teacher", "members")
"""The keys by which a variant needs another one."""


@dataclass(frozen=True)
class Draft:
    """A variant as it is written, after its matrix was expanded. `path` is where it stands in the file."""

    label: str
    path: PathTuple
    given: dict[str, Any]
    members: tuple[tuple[str, PathTuple], ...] = ()
    """The variants that answer beside it, by its own defenses, and where each is named."""

    @property
    def parent(self) -> str | None:
        """The label that `from:` names."""
        return self.needed("from")

    @property
    def teacher(self) -> str | None:
        """The label that `teacher:` names."""
        return self.needed("teacher")

    @property
    def needs(self) -> frozenset[str]:
        """The labels of the variants that must be there before this one."""
        return frozenset(label for _, label, _ in self.links)

    @property
    def links(self) -> tuple[tuple[Link, str, PathTuple], ...]:
        """What it needs: by which key, which label, and where that is written."""
        found: list[tuple[Link, str, PathTuple]] = []
        for link in ("from", "teacher"):
            label = self.needed(link)
            if label is not None:
                found.append((link, label, (*self.path, link)))
        return (*found, *(("members", label, path) for label, path in self.members))

    def needed(self, link: str) -> str | None:
        """Return the label that a key names; None where it is not there, or no label."""
        found = self.given.get(link)
        return found if isinstance(found, str) else None


def ordered(reader: Reader, drafts: dict[str, Draft]) -> list[Draft]:
    """Return each after those it needs, else in the order of the file; cycles and missing variants are problems.

    Variants without one that they need come last: what else is wrong with them is to be said as well.
    """
    done: list[Draft] = []
    placed: set[str] = set()
    waiting, lost = dict(drafts), []
    for draft in drafts.values():
        there = [_there(reader, draft, link, drafts) for link in ("from", "teacher")]
        there += [_known(reader, label, path, drafts) for label, path in draft.members]
        if not all(there):
            lost.append(waiting.pop(draft.label))
    while True:
        # One at a time, so that a child follows its parent and the file's order decides the rest.
        first = next((one for one in waiting.values() if placed.issuperset(one.needs)), None)
        if first is None:
            break
        done.append(first)
        placed.add(first.label)
        del waiting[first.label]
    told: set[str] = set()
    for draft in waiting.values():
        links = _cycle(draft, drafts)
        chain = [draft.label, *(label for _, label in links)]
        if links and not told & set(chain):
            told |= set(chain)
            names = " and ".join(f"`{link}`" for link in LINKS if link in {one for one, _ in links})
            where = next(path for link, label, path in draft.links if (link, label) == links[0])
            goes = "goes" if len({link for link, _ in links}) == 1 else "go"
            reader.problem(where, f"{names} {goes} in a circle: {' -> '.join(chain)}")
    return [*done, *lost, *waiting.values()]


def _there(reader: Reader, draft: Draft, link: str, drafts: dict[str, Draft]) -> bool:
    """Say whether the variant that a key names is there, or none is named; else note what is wrong."""
    named = draft.given.get(link)
    if named is None:
        return True
    if isinstance(named, str):
        return _known(reader, named, (*draft.path, link), drafts)
    reader.problem((*draft.path, link), f"`{link}` is the label of one variant")
    return False


def _known(reader: Reader, label: str, path: PathTuple, drafts: dict[str, Draft]) -> bool:
    if label in drafts:
        return True
    reader.problem(path, f"there is no variant {label!r}", did_you_mean(label, drafts))
    return False


def _cycle(draft: Draft, drafts: dict[str, Draft]) -> list[tuple[Link, str]]:
    """Return the shortest way from a variant back to itself, as keys and the labels they name; nothing if none."""
    ways: list[tuple[Draft, list[tuple[Link, str]]]] = [(draft, [])]
    seen: set[str] = set()
    while ways:
        current, way = ways.pop(0)
        for link, label, _ in current.links:
            if label == draft.label:
                return [*way, (link, label)]
            if label in drafts and label not in seen:
                seen.add(label)
                ways.append((drafts[label], [*way, (link, label)]))
    return []
