"""The order in which variants are read and made: each after the one it starts from and the one it learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from robustkit.errors import did_you_mean
from robustkit.recipe.document import PathTuple
from robustkit.recipe.reader import Reader

Link = Literal["from", "teacher"]
LINKS: tuple[Link, ...] = ("from", "teacher")
"""The keys by which a variant needs another one."""


@dataclass(frozen=True)
class Draft:
    """A variant as it is written, after its matrix was expanded. `path` is where it stands in the file."""

    label: str
    path: PathTuple
    given: dict[str, Any]

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
        return frozenset(label for link in LINKS if (label := self.needed(link)) is not None)

    def needed(self, link: Link) -> str | None:
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
        wrong = [link for link in LINKS if not _there(reader, draft, link, drafts)]
        if wrong:
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
            goes = "goes" if len({link for link, _ in links}) == 1 else "go"
            reader.problem((*draft.path, links[0][0]), f"{names} {goes} in a circle: {' -> '.join(chain)}")
    return [*done, *lost, *waiting.values()]


def _there(reader: Reader, draft: Draft, link: Link, drafts: dict[str, Draft]) -> bool:
    """Say whether the variant that a key names is there, or none is named; else note what is wrong."""
    named = draft.given.get(link)
    if named is None or (isinstance(named, str) and named in drafts):
        return True
    if isinstance(named, str):
        reader.problem((*draft.path, link), f"there is no variant {named!r}", did_you_mean(named, drafts))
    else:
        reader.problem((*draft.path, link), f"`{link}` is the label of one variant")
    return False


def _cycle(draft: Draft, drafts: dict[str, Draft]) -> list[tuple[Link, str]]:
    """Return the shortest way from a variant back to itself, as keys and the labels they name; nothing if none."""
    ways: list[tuple[Draft, list[tuple[Link, str]]]] = [(draft, [])]
    seen: set[str] = set()
    while ways:
        current, way = ways.pop(0)
        for link in LINKS:
            label = current.needed(link)
            if label == draft.label:
                return [*way, (link, label)]
            if label is not None and label in drafts and label not in seen:
                seen.add(label)
                ways.append((drafts[label], [*way, (link, label)]))
    return []
