"""The order in which variants are read and made: each after those that it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robustkit.errors import did_you_mean
from robustkit.recipe.document import PathTuple
from robustkit.recipe.reader import Reader


@dataclass(frozen=True)
class Draft:
    """A variant as it is written, after its matrix was expanded. `path` is where it stands in the file."""

    label: str
    path: PathTuple
    given: dict[str, Any]

    @property
    def parent(self) -> str | None:
        """The label that `from:` names."""
        found = self.given.get("from")
        return found if isinstance(found, str) else None


def ordered(reader: Reader, drafts: dict[str, Draft]) -> list[Draft]:
    """Return parents before children, else in the order of the file; cycles and missing parents are problems.

    Variants without a parent that can be had come last: what else is wrong with them is to be said as well.
    """
    done: list[Draft] = []
    placed: set[str] = set()
    waiting, lost = dict(drafts), []
    for draft in drafts.values():
        parent = draft.given.get("from")
        if parent is not None and not isinstance(parent, str):
            reader.problem((*draft.path, "from"), "`from` is the label of one variant")
            lost.append(waiting.pop(draft.label))
        elif parent is not None and parent not in drafts:
            hint = did_you_mean(parent, drafts)
            reader.problem((*draft.path, "from"), f"there is no variant {parent!r}", hint)
            lost.append(waiting.pop(draft.label))
    while True:
        ready = [one for one in waiting.values() if one.parent is None or one.parent in placed]
        if not ready:
            break
        # One at a time, so that a child follows its parent and the file's order decides the rest.
        first = ready[0]
        done.append(first)
        placed.add(first.label)
        del waiting[first.label]
    told: set[str] = set()
    for draft in waiting.values():
        chain = _cycle(draft, drafts)
        if chain and not told & set(chain):
            told |= set(chain)
            reader.problem((*draft.path, "from"), f"`from` goes in a circle: {' -> '.join(chain)}")
    return [*done, *lost, *waiting.values()]


def _cycle(draft: Draft, drafts: dict[str, Draft]) -> list[str]:
    chain = [draft.label]
    current: Draft | None = draft
    while current is not None and current.parent in drafts:
        parent = current.parent
        assert parent is not None
        if parent == draft.label:
            return [*chain, parent]
        if parent in chain:
            return []
        chain.append(parent)
        current = drafts.get(parent)
    return []
