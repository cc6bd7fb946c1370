"""The paper's Table 8, counted: does the place that memory looks at define the name?

    python experiments/lookups.py runs/demo/memory --use test --max-tokens 16384

Reads documents of a run with its memory and without, and of every token of a name that memory made
at least twice as likely, while a definition of the name could be retrieved, asks whether the place
that all heads together weighed most lies in it; beside it the newest exact match of the token
before, and chance. 95% intervals draw documents, and names in each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from memorizing.analysis import find_uses, inspect_run, rate_lookups
from memorizing.data import load_splits
from memorizing.storage.files import write_json
from memorizing.training import load_model, read_run_config


def main() -> None:
    """Print and write the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with memory")
    parser.add_argument("--use", choices=("validation", "test"), default="test")
    parser.add_argument("--documents", type=int, default=0, help="only the first; 0 is all")
    parser.add_argument("--max-tokens", type=int, default=0, help="of each document; 0 is all")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    loaded, start_s = load_model(options.run), time.monotonic()
    assert loaded.tokenizer is not None, "a run without a tokenizer has no names"
    documents = getattr(load_splits(read_run_config(options.run).data), options.use)
    texts, num_tokens = [], 0
    for document in documents[: options.documents or None]:
        found = inspect_run(
            loaded.model,
            loaded.tokenizer,
            document,
            name=str(options.run),
            max_tokens=options.max_tokens,
        )
        texts.append(find_uses(found))
        num_tokens += found.trace.num_tokens
        print(f"{document.name}: {len(texts[-1]):,} tokens", flush=True)
    result = {
        "documents": len(texts),
        "tokens": num_tokens,
        "lookups": [dataclasses.asdict(one) for one in rate_lookups(texts)],
        "seconds": round(time.monotonic() - start_s),
    }
    print(json.dumps(result, indent=1))
    if options.json is not None:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
