"""`memorizing corpus`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memorizing.cli.options import (
    JsonOption,
    flag,
    option,
    prepare_files,
    set_option,
    write_result,
)
from memorizing.errors import ConfigError, CorpusError
from memorizing.terminal import make_console, show, show_progress

if TYPE_CHECKING:
    from memorizing.config import Config
    from memorizing.data import CorpusListing, CorpusStatistics
    from memorizing.data.splits import SplitSize

EXAMPLES = """\b
examples:
  memorizing corpus files:docs
  memorizing corpus small --stats
  memorizing corpus pg19 --set data.max_documents=250 --stats
  memorizing corpus isabelle:afp-current.tar.gz --stats --plot afp.png
  memorizing corpus python:stdlib --stats --set tokenizer.vocab_size=8192
  memorizing corpus c4:en --stats --tokenizer runs/small --json c4.json
"""

_BAR_CHARACTERS = 30
_SKIPPED_SHOWN = 10


def run(
    name: Annotated[
        str,
        typer.Argument(
            metavar="KIND[:WHERE]|RECIPE",
            help="A corpus (`memorizing info corpora`), or that of a recipe by name or file.",
        ),
    ],
    stats: Annotated[
        bool, flag("Read it all: documents, bytes, tokens, lengths.", "--stats")
    ] = False,
    settings: Annotated[
        list[str] | None, set_option("Change a setting of the tables data and tokenizer.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            "PATH",
            "--stats: count by this tokenizer (a file, a folder, or a name on the hub). Default: "
            "one that is trained on the corpus, with tokenizer.vocab_size ids.",
        ),
    ] = None,
    documents: Annotated[
        int, option("N", "Without --stats: list the first N documents.", min=1)
    ] = 20,
    json_file: JsonOption = None,
    plot: Annotated[
        Path | None, option("FILE.png", "--stats: draw the lengths of the documents.")
    ] = None,
) -> None:
    """List the first documents of a corpus, or measure all of it.

    What is left out on the way is counted and named. Where settings hold documents out, as those of
    most recipes do, all are read and the sizes of the splits are shown. A corpus that is not there
    says what to download, and how large it is.
    """
    if not stats and (plot is not None or tokenizer is not None):
        option = "--plot" if plot is not None else "--tokenizer"
        raise ConfigError(f"{option} is given without --stats, which it needs; add --stats")
    config = load_settings(name, settings or [], tokenizer)
    prepare_files(json_file, plot=plot)

    from memorizing.data import choose_tokenizer, list_documents, load_corpus, measure_corpus

    corpus = load_corpus(config.data)
    if not stats:
        listing = list_documents(corpus, documents, config.data)
        print_listing(listing)
        write_result(json_file, listing.to_dict())
        return
    with show_progress("reading") as progress:
        chosen, chosen_name = choose_tokenizer(corpus, config.tokenizer)
        limit = config.data.max_documents
        statistics = measure_corpus(
            corpus,
            chosen,
            chosen_name,
            config.data,
            progress=(lambda done: progress(done, limit)) if limit else None,
        )
    print_statistics(statistics)
    write_result(json_file, statistics.to_dict())
    if plot is not None:
        from memorizing.analysis import plot_lengths

        plot_lengths(statistics, plot)
        show(f"written: {plot}")


def load_settings(name: str, settings: list[str], tokenizer: str | None) -> Config:
    """The settings of a recipe, or the defaults with this corpus; then changed.

    Raises:
        ConfigError: no such recipe file, or a setting that is unknown or out of range.
        CorpusError: neither the name of a recipe nor a corpus of a known kind.
    """
    import dataclasses

    from memorizing.config import Config, list_recipes, load_config

    if name in list_recipes() or name.endswith(".toml"):
        config = load_config(name)
    else:
        require_kind(name)
        data = dataclasses.replace(Config().data, corpus=name)
        config = dataclasses.replace(Config(), data=data)
    wrong = [text for text in settings if not text.strip().startswith(("data.", "tokenizer."))]
    if wrong:
        raise ConfigError(
            f"setting {wrong[0]!r} is not of a corpus; allowed: data.* and tokenizer.*, such as "
            "data.max_documents=100"
        )
    config = config.replace(settings)
    if tokenizer is None:
        return config
    given = dataclasses.replace(config.tokenizer, kind="pretrained", path=tokenizer)
    return dataclasses.replace(config, tokenizer=given)


def require_kind(name: str) -> None:
    """Refuse a corpus of no known kind; it may have been meant as a recipe.

    Raises:
        CorpusError: with the nearest kind and the nearest recipe.
    """
    from memorizing.config import list_recipes
    from memorizing.data.corpora.kinds import find_kind
    from memorizing.settings import find_nearest

    try:
        find_kind(name)
    except CorpusError as error:
        raise CorpusError(
            f"{error}; or give a recipe: a file that ends in .toml, or a name "
            f"({find_nearest(name, list_recipes(), count=1)})"
        ) from None


def print_listing(listing: CorpusListing) -> None:
    """Print names and sizes, and what was left out."""
    show(listing.description)
    width = max((len(f"{item.num_bytes:,}") for item in listing.documents), default=0)
    for item in listing.documents:
        show(f"  {item.num_bytes:>{width},} bytes  {item.name}")
    if listing.is_complete:
        total = sum(item.num_bytes for item in listing.documents)
        show(f"{len(listing.documents):,} documents, {total:,} bytes")
    else:
        more = "" if listing.splits else "; --stats reads them all"
        show(f"the first {len(listing.documents):,} documents{more}")
    print_splits(listing.splits)
    print_left_out(listing.skipped, listing.num_replaced)


def print_statistics(statistics: CorpusStatistics) -> None:
    """Print sums, the histogram of lengths, the longest and shortest documents."""
    from rich.table import Table

    show(statistics.description)
    show(
        f"{statistics.num_documents:,} documents, {statistics.num_bytes:,} bytes, "
        f"{statistics.num_tokens:,} tokens "
        f"({statistics.num_bytes / max(statistics.num_tokens, 1):.2f} bytes each)"
    )
    show(f"tokenizer: {statistics.tokenizer}")
    show(f"a document has {statistics.median_tokens:,} tokens (median)")
    print_splits(statistics.splits)
    table = Table(title="tokens per document", title_justify="left")
    for column in ("from", "to", "documents", "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("documents")
    console = make_console()
    block = "#" if console.options.ascii_only else "█"
    most = max(item.num_documents for item in statistics.histogram)
    for item in statistics.histogram:
        bar = block * -(-item.num_documents * _BAR_CHARACTERS // most)
        numbers = (item.begin, max(item.end - 1, 0), item.num_documents, item.num_tokens)
        table.add_row(*(f"{number:,}" for number in numbers), bar)
    console.print(table)
    for label, sizes in (("longest", statistics.longest), ("shortest", statistics.shortest)):
        show(label)
        for item in sizes:
            show(f"  {item.num_tokens:,} tokens  {item.name}")
    print_left_out(statistics.skipped, statistics.num_replaced)


def print_splits(splits: Sequence[SplitSize]) -> None:
    """Print a line for each split, as training does; nothing where there are none."""
    for split in splits:
        show(split.describe())


def print_left_out(skipped: tuple[str, ...], num_replaced: int) -> None:
    """Print what a corpus left out or replaced; nothing where there is none."""
    if num_replaced:
        show(f"{num_replaced:,} files held bytes that are not UTF-8; replaced by U+FFFD")
    if skipped:
        show("left out")
        for line in skipped[:_SKIPPED_SHOWN]:
            show(f"  {line}")
        if len(skipped) > _SKIPPED_SHOWN:
            show(f"  and {len(skipped) - _SKIPPED_SHOWN:,} more; --json has them all")
