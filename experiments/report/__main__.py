"""Rebuild docs/results.md, tables and plots, from the JSON files of the experiments.

    python experiments/report                                    # all there is
    python experiments/report --results FOLDER --output FILE.md  # of other results, elsewhere

What is not run yet is said to be so. The same files give the same page, byte for byte.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from results import load_results
from sections import write_report

from memorizing.errors import MemorizingError
from memorizing.storage.files import write_bytes

EXPERIMENTS = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Write the page and its pictures; the exit status is 2 after an error."""
    options = parse(arguments)
    try:
        results = load_results(options.results, options.others or options.results.parent)
        page, pictures = write_report(results)
        for name, picture in pictures.items():
            write_bytes(options.output.parent / name, picture)
        write_bytes(options.output, page.encode())
    except MemorizingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {len(results.runs)} runs, {len(pictures)} pictures")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="report", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--results", type=Path, default=EXPERIMENTS / "results" / "runs", help="of the queue"
    )
    parser.add_argument(
        "--others", type=Path, help="other JSON files; default: the folder that holds --results"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=EXPERIMENTS.parent / "docs" / "results.md",
        help="pictures are written beside it",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
