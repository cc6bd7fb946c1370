"""Pages that need no network: a template, its style and script, and the data, in one file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from memorizing import __version__
from memorizing.analysis.charts import draw_along, draw_lines, embed_figure
from memorizing.analysis.inspection import MARKED, Inspection, Source, name_distances
from memorizing.analysis.lookups import find_uses, rate_lookups
from memorizing.analysis.traces import NUM_AGES
from memorizing.metrics import compare_token_nats
from memorizing.storage.files import write_output

_MOST_FOUND = 2_400_000
"""Bytes of what was retrieved, on a page; a third more as text."""
_MOST_SOURCES = 800_000
"""Characters of documents, on a page, besides the text itself: those that were used most."""
_MOST_PLACES = 8
_NUM_EXAMPLES = 12
_APART = 64
"""Tokens between two examples."""


def render_page(template: str, *, script: str = "", data: Any = None, **values: Any) -> bytes:
    """A page of a template in `pages/`, with everything that it needs.

    Args:
        template: name of the file.
        script: name of the script's file, which finds `data` in the page.
        data: for the script.
        values: for the template, which escapes them, but for charts.
    """
    pages = Environment(
        loader=PackageLoader("memorizing.analysis", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )

    def load(name: str) -> str:
        assert pages.loader is not None
        return pages.loader.get_source(pages, name)[0]

    code = load(script) if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    # "<" in JSON is only ever in strings.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = pages.get_template(template).render(
        css=load("page.css"),
        script=code,
        # Nothing else may run, whatever the text holds.
        script_hash=f"'sha256-{digest}'" if script else "'none'",
        data=text,
        version=__version__,
        **values,
    )
    return page.encode("utf-8", errors="replace")


def write_inspection(found: Inspection, path: Path) -> Path:
    """Write the page of an inspection, and beside it, with the ending .json, the data behind it.

    Returns:
        The path of the data.

    Raises:
        IndexUnavailableError: matplotlib is not installed.
        ResourceError: a file cannot be written.
    """
    data_path = path.with_suffix(".json")
    trace = found.trace
    totals, baseline = (found.sum_nats(nats) for nats in (trace.nats, found.baseline_nats))
    change = compare_token_nats([trace.nats], [found.baseline_nats], block_len=512)
    has_interval = change.num_blocks > 1
    low, high = change.perplexity_interval
    tables = {
        "by_class": found.count_classes(),
        "by_earlier": found.count_earlier(),
        "by_distance": found.count_distances() if trace.heads else [],
        "by_passage": found.count_passages() if found.sights else [],
    }
    lookups, heads = rate_lookups([find_uses(found)]), _describe_heads(found)
    is_varying = _is_varying(found)
    page = render_page(
        "inspect.html",
        script="inspect.js",
        data=_pack(found, is_varying),
        title=f"{found.text.name}: what the memory does",
        model=found.model,
        text_name=found.text.name,
        num_tokens=trace.num_tokens,
        is_cut=found.num_bytes is None,
        memory=found.memory,
        baseline=found.baseline,
        totals=totals,
        baseline_totals=baseline,
        change=change,
        interval=f"95% interval {low:+.1%} to {high:+.1%}" if has_interval else "",
        helped_share=float((found.gains >= MARKED).mean()),
        hurt_share=float((found.gains <= -MARKED).mean()),
        along=embed_figure(draw_along(found.gains), "along"),
        **tables,
        heads=heads,
        heads_note=_NOTES[is_varying],
        gate_name="share from memory" if is_varying else "gate",
        gates=_draw_gates(found),
        **_draw_reach(found),
        recall=found.recall,
        index=found.index,
        lookups=lookups,
        looked_at=_choose_examples(found),
        data_file=data_path.name,
    )
    write_output(path, page)
    summary = {
        "model": found.model,
        "text": found.text.name,
        "memory": found.memory,
        "baseline": found.baseline,
        "perplexity": totals.perplexity,
        "baseline_perplexity": baseline.perplexity,
        "bits_per_byte": totals.bits_per_byte if totals.bytes else None,
        "change": change.to_dict(),
        "recall": found.recall,
        **{name: [asdict(row) for row in rows] for name, rows in tables.items()},
        "heads": heads,
        "lookups": [asdict(one) for one in lookups],
    }
    data = json.dumps({**summary, **_list_data(found)}, separators=(",", ":"), allow_nan=False)
    write_output(data_path, data.encode("utf-8", errors="replace"))
    return data_path


_NOTES = {
    False: "A gate says how much of a head's output comes from the memory: 1 is all of it.",
    True: "What a head takes from the memory is another share for every token: of one softmax over "
    "local and retrieved entries, or of the prediction, where what it retrieves also points at "
    "tokens.",
}


def _is_varying(found: Inspection) -> bool:
    """Whether gates differ from token to token, where something was retrieved."""
    gates = found.trace.gates
    return bool(gates.size) and any(np.ptp(part[part > 0]) > 1e-6 for part in gates.T if part.any())


def _describe_heads(found: Inspection) -> list[dict[str, Any]]:
    trace, described = found.trace, []
    now = np.arange(trace.num_tokens)
    for number, (layer, head) in enumerate(trace.heads):
        gates, places = trace.gates[:, number], trace.places[:, number]
        weights = trace.weights[:, number]
        is_open, is_own = gates > 0, trace.is_own(places[:, 0])
        distances = (now - places[:, 0])[is_open & is_own]
        ages = trace.by_age[number]
        retrieved = float((gates[:, None] * weights).sum(dtype=np.float64))
        others = float((gates[:, None] * weights)[places > trace.num_tokens].sum(dtype=np.float64))
        described.append(
            {
                "layer": layer,
                "head": head,
                "gate": float(gates[is_open].mean()) if is_open.any() else 0.0,
                "weight": float(weights[is_open, 0].mean()) if is_open.any() else 0.0,
                "distance": float(np.median(distances)) if len(distances) else None,
                "newest": float(ages[0] / ages.sum()) if ages.sum() else 0.0,
                "others": others / retrieved if retrieved else 0.0,
            }
        )
    return described


def _draw_gates(found: Inspection) -> str | None:
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for step, layers in found.gates:
        for layer, gates in layers.items():
            for head, gate in enumerate(gates):
                steps, values = lines.setdefault(f"layer {layer}, head {head}", ([], []))
                steps.append(step)
                values.append(gate)
    if not lines:
        return None
    return embed_figure(draw_lines(lines, "step", "gate"), "gates")


def _draw_reach(found: Inspection) -> dict[str, str | None]:
    trace = found.trace
    if not trace.by_age.sum():
        return {"distances": None, "ages": None}
    tenths = [f"{10 * i} to {10 * (i + 1)}%" for i in range(NUM_AGES)]
    sums = {"distances": (trace.by_distance, name_distances()), "ages": (trace.by_age, tenths)}
    drawn: dict[str, str | None] = {}
    for name, (values, labels) in sums.items():
        used = int(np.flatnonzero(values.sum(0))[-1]) + 1
        lines = {
            f"layer {layer}, head {head}": (labels[:used], (part / part.sum()).tolist()[:used])
            for (layer, head), part in zip(trace.heads, values, strict=True)
            if part.sum()
        }
        x_label = {"distances": "tokens before", "ages": "age, of what was read so far"}[name]
        figure = draw_lines(lines, x_label, "share of its weight", marker="o")
        drawn[name] = embed_figure(figure, name)
    return drawn


def _choose_examples(found: Inspection) -> list[tuple[int, int]]:
    """Tokens that gained most and the place looked at, apart and of different texts."""
    places, text = found.pooled[0], found.text
    assert text.text is not None
    chosen: dict[str, int] = {}
    for token in np.argsort(-found.gains, kind="stable").tolist():
        if found.gains[token] <= 0 or len(chosen) == _NUM_EXAMPLES:
            break
        piece = text.text[text.ends[token - 1] if token else 0 : text.ends[token]].strip()
        is_near = any(abs(token - other) < _APART for other in chosen.values())
        is_new = any(c.isalnum() for c in piece) and piece not in chosen
        if is_new and not is_near and (places[token] >= 0 or found.sights):
            chosen[piece] = token
    return [(token, int(places[token])) for token in chosen.values()]


def _encode(values: NDArray[Any]) -> dict[str, str]:
    """Numbers for the script, in as few bytes as hold them; little-endian."""
    if values.dtype.kind == "f":
        kind = "f4"
    else:
        most = int(values.max(initial=0))
        kind = "u1" if most < 2**8 else "u2" if most < 2**16 else "u4"
    packed = values.astype(f"<{kind}").tobytes()
    return {"kind": kind, "bytes": base64.b64encode(packed).decode()}


def _pack(found: Inspection, is_varying: bool) -> dict[str, Any]:
    """What the page's script shows."""
    trace = found.trace
    kept, first, firsts = [], 0, {}
    for source, is_whole in _choose_sources(found):
        firsts[source.first] = first
        lens = np.diff(_count_units(source), prepend=0)
        kept.append(
            {
                "name": source.name,
                "first": first,
                "text": source.text if is_whole else None,
                "lens": _encode(lens) if is_whole else None,
            }
        )
        first += source.num_tokens + 1

    def move(places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places as the page numbers them, which leaves out what was not retrieved."""
        old = np.array(sorted(firsts))
        new = np.array([firsts[number] for number in sorted(firsts)])
        index = np.searchsorted(old, places, side="right") - 1
        return np.where(places < 0, -1, places - old[index] + new[index])

    packed: dict[str, Any] = {
        "nats": _encode(trace.nats),
        "baseline": _encode(found.baseline_nats),
        "memoryName": found.memory,
        "baselineName": found.baseline,
        "first": int(found.gains.argmax()),
        "sources": kept,
        "sights": [
            {
                "first": sight.first,
                "passages": [
                    {"place": int(move(np.array(place))), "len": length, "score": score}
                    for place, length, score in sight.passages
                ],
            }
            for sight in found.sights
        ],
        "shape": None,
    }
    if not trace.heads:
        return packed
    num_tokens, num_heads, most = trace.places.shape
    bytes_each = 2 if first < 2**16 else 4
    # A token's heads, those that took most where there is no room for all, each with its best.
    room = _MOST_FOUND / num_tokens
    num_kept = max(1, min(num_heads, int(room / (bytes_each + 8))))
    per = max(1, min(most, _MOST_PLACES, int((room / num_kept - 4) / (bytes_each + 4))))
    arrays = [move(trace.places[..., :per]) + 1, trace.weights[..., :per], trace.scores[..., :per]]
    gates = trace.gates
    found_arrays: dict[str, NDArray[Any]] = {}
    if num_kept < num_heads:
        taken = gates * trace.weights[..., 0]
        which = np.argpartition(-taken, num_kept - 1, axis=1)[:, :num_kept]
        which.sort(axis=1)
        arrays = [np.take_along_axis(part, which[..., None], 1) for part in arrays]
        gates = np.take_along_axis(gates, which, 1)
        found_arrays["which"] = which
    places, weights, scores = arrays
    low, high = (float(bound) for bound in (scores.min(), scores.max()))
    span = (high - low) or 1.0
    found_arrays |= {
        "places": places,
        "weights": np.rint(weights * 65535).astype(np.int64),
        "scores": np.rint((scores - low) / span * 65535).astype(np.int64),
        "gates": np.rint(gates * 65535).astype(np.int64),
    }
    shape = {"heads": trace.heads, "kept": num_kept, "per": per, "low": low, "high": low + span}
    return packed | {
        "shape": shape | {"varying": is_varying},
        "found": {name: _encode(part.ravel()) for name, part in found_arrays.items()},
    }


def _count_units(source: Source) -> NDArray[np.int64]:
    """Where tokens end, as JavaScript counts: characters beyond U+FFFF are two."""
    codes = np.frombuffer((source.text or "").encode("utf-32-le", "surrogatepass"), "<u4")
    return source.ends + np.r_[0, (codes > 0xFFFF).cumsum()][source.ends]


def _choose_sources(found: Inspection) -> list[tuple[Source, bool]]:
    """The text, and what was retrieved from, most used first; whether its text is on the page."""
    trace = found.trace
    firsts = np.array([source.first for source in found.sources])
    mass = np.zeros(len(firsts))
    if trace.heads:
        numbers = np.searchsorted(firsts, trace.places, side="right") - 1
        weights = np.where(trace.places >= 0, trace.weights * trace.gates[..., None], 0.0)
        np.add.at(mass, numbers.clip(min=0).ravel(), weights.ravel())
    for sight in found.sights:
        for place, _, score in sight.passages:
            mass[np.searchsorted(firsts, place, side="right") - 1] += score
    chosen, left = [(found.text, True)], _MOST_SOURCES
    for number in np.argsort(-mass[1:], kind="stable") + 1:
        source = found.sources[number]
        if mass[number] > 0:
            is_whole = source.text is not None and len(source.text) <= left
            left -= len(source.text or "") if is_whole else 0
            chosen.append((source, is_whole))
    return chosen


def _list_data(found: Inspection) -> Mapping[str, Any]:
    """Columns of everything that was kept: of tokens, and of what was retrieved for them."""
    trace, text = found.trace, found.text
    assert text.text is not None
    begins = [0, *text.ends.tolist()]
    data: dict[str, Any] = {
        "tokens": {
            "text": [text.text[a:b] for a, b in zip(begins, begins[1:], strict=False)],
            "nats": trace.nats.tolist(),
            "baseline_nats": found.baseline_nats.tolist(),
        },
        "sources": [
            {"name": one.name, "first": one.first, "num_tokens": one.num_tokens}
            for one in found.sources
        ],
        "passages": [asdict(sight) for sight in found.sights],
    }
    if trace.heads:
        data["retrieved"] = {
            "heads": trace.heads,
            "places": trace.places.tolist(),
            "weights": _round(trace.weights, 4),
            "scores": _round(trace.scores, 4),
            "gates": _round(trace.gates, 4),
        }
    return data


def _round(values: NDArray[np.float32], digits: int) -> list[Any]:
    """Lists of Python's floats, which JSON writes as short as they are."""
    return values.astype(np.float64).round(digits).tolist()
