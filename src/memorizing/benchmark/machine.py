"""On what something was measured: part of every report."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from memorizing.training import run_folder

_SEARCH_PACKAGES = ("faiss-cpu", "scann", "usearch")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, device, versions and commit, as plain values for JSON."""
    machine = run_folder.describe_machine()
    versions = {"memorizing": machine["memorizing"], "python": machine["python"]}
    versions |= machine["packages"]
    for name in _SEARCH_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": machine["processor"],
        "cores": machine["cores"],
        "threads": machine["threads"],
        "device": machine["device"],
        "system": machine["system"],
        "versions": versions,
        "commit": machine["commit"],
    }


def summarize_machine(result: dict[str, Any]) -> str:
    """One sentence of what `describe_machine` put into a result, for the line below a table."""
    versions = result["versions"]
    named = [
        f"{name} {versions[name]}" for name in ("torch", *_SEARCH_PACKAGES) if name in versions
    ]
    # Files written before GPUs were named have none.
    device = result.get("device", "cpu")
    gpu = "" if device == "cpu" else f"{device}; "
    threads = f"{result['threads']} {'thread' if result['threads'] == 1 else 'threads'}"
    commit, _, changes = (result["commit"] or "unknown").partition(" ")
    return (
        f"{gpu}{result['processor']}, {result['cores']} cores, {threads}; "
        f"memorizing {versions['memorizing']}, {', '.join(named)}, Python {versions['python']}; "
        f"commit {' '.join([commit[:12], changes]).strip()}"
    )
