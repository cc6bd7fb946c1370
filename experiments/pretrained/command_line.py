"""What the scripts of this folder share of their command lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from documents import CORPORA
from smollm import PRECISIONS, add_model_options

from memorizing.errors import MemorizingError


def make_parser(about: str | None) -> argparse.ArgumentParser:
    """With the script's docstring, and `--model`, `--device` and `--corpora`."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--corpora", type=Path, default=CORPORA)
    return parser


def add_precision_option(parser: argparse.ArgumentParser) -> None:
    """`--precision`. In place."""
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="of products")


def add_calibrations_option(parser: argparse.ArgumentParser, default: Path) -> None:
    """`--calibrations`. In place."""
    parser.add_argument(
        "--calibrations",
        type=Path,
        default=default,
        help="folder of what calibrate found, made where it is missing",
    )


def run_command(measure: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Measure; the exit status is 2 after an error, 130 after an interrupt."""
    try:
        measure(options)
    except MemorizingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0
