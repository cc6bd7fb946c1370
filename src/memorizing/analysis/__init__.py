"""What a memory is worth and where: tables, a plot, retrievals, and the tokens it helped most."""

from memorizing.analysis.examples import Example, Place, explain_helped_tokens
from memorizing.analysis.helped import HelpedToken, find_helped_tokens
from memorizing.analysis.inspecting import inspect_model, inspect_run
from memorizing.analysis.lookups import find_uses, rate_lookups
from memorizing.analysis.page import write_inspection
from memorizing.analysis.plots import plot_capacities, plot_lengths
from memorizing.analysis.rendering import render_examples
from memorizing.analysis.tables import describe_reach, make_position_table, make_result_table
from memorizing.analysis.traces import Trace, trace_document

__all__ = [
    "Example",
    "HelpedToken",
    "Place",
    "Trace",
    "describe_reach",
    "explain_helped_tokens",
    "find_helped_tokens",
    "find_uses",
    "inspect_model",
    "inspect_run",
    "make_position_table",
    "make_result_table",
    "plot_capacities",
    "plot_lengths",
    "rate_lookups",
    "render_examples",
    "trace_document",
    "write_inspection",
]
