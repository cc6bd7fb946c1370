"""Files in the order in which they build on one another: what is imported comes first."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

_log = logging.getLogger(__name__)


def sort_by_imports(names: Iterable[str], imports: Mapping[str, Iterable[str]]) -> list[str]:
    """The names, each once and after those that it imports (depth first, imports in their order).

    It guarantees:

    - each of `names` comes exactly once; imports that are not among them are passed over, so that
      what a file imports from elsewhere needs no treatment;
    - a name comes after everything it imports, directly or not, unless the two lie on one cycle;
    - of a cycle, the member that is reached first comes last; the import that closes it is passed
      over, and logged as a warning by the logger `memorizing.data.corpora.import_order`;
    - the order depends on the order of `names` and of each entry of `imports` alone, and what a
      name needs comes directly before it where nothing earlier needed it: sort `names` first if
      their order is by chance.

    It takes time in proportion to names and imports, and has no limit of depth.

    Args:
        names: of files, theories, modules; repeated ones count once.
        imports: name -> the names it imports. A name that is not a key imports nothing.
    """
    known = dict.fromkeys(names)
    done: dict[str, None] = {}
    open_names: dict[str, Iterator[str]] = {}  # the path from a root to where the walk is
    for root in known:
        if root in done:
            continue
        open_names[root] = iter(imports.get(root, ()))
        while open_names:
            name = next(reversed(open_names))
            for needed in open_names[name]:
                if needed not in known or needed in done or needed == name:
                    continue
                if needed in open_names:
                    _log.warning("%s imports %s, which imports it: a cycle", name, needed)
                    continue
                open_names[needed] = iter(imports.get(needed, ()))
                break
            else:
                del open_names[name]
                done[name] = None
    return list(done)
