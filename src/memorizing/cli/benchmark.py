"""`memorizing benchmark`: one verb below it for everything that is timed."""

from __future__ import annotations

import typer

from memorizing.cli import (
    benchmark_decode,
    benchmark_read,
    benchmark_record,
    benchmark_search,
    benchmark_step,
)

VERBS = {
    "search": benchmark_search,
    "step": benchmark_step,
    "decode": benchmark_decode,
    "read": benchmark_read,
    "record": benchmark_record,
}
"""Name -> module with `run` and `EXAMPLES`."""

app = typer.Typer(help="Measure speed on this machine.", rich_markup_mode=None)


@app.callback()
def _set_up() -> None:
    """Measure speed on this machine."""


for name, verb in VERBS.items():
    app.command(name, epilog=verb.EXAMPLES)(verb.run)
