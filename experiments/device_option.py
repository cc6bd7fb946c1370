"""`--device` of the experiments' scripts."""

from __future__ import annotations

import argparse

import torch

from memorizing.cli.pretrained import choose_device
from memorizing.errors import ConfigError


def add_device_option(
    parser: argparse.ArgumentParser,
    default: str = "auto",
    about: str = "cpu, cuda; auto is cuda where there is one",
) -> None:
    """Add `--device`, which becomes a torch device. In place."""
    parser.add_argument("--device", type=_parse_device, default=default, help=about)


def _parse_device(name: str) -> torch.device:
    try:
        return choose_device(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
