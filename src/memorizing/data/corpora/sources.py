"""Where the paper's datasets come from, and how large they are: what to do when one is missing.

Sizes are those that their publishers give, or rounded; they grow.
"""

PG19 = (
    "PG-19 has 28,752 books, 11.5 GB of text: write pg19 to stream it from the hub "
    "(emozilla/pg19), or give a folder with train/, validation/ and test/ as "
    "`gsutil -m cp -r gs://deepmind-gutenberg .` downloads it"
)
C4 = (
    "C4 in English is 305 GB of gzip, 1,024 files: write c4 to stream it from the hub "
    "(allenai/c4), or give a folder with some of its files en/c4-train.*.json.gz (300 MB each)"
)
ARXIV = (
    "arXiv's sources are about 3 TB: files arXiv_src_YYMM_NNN.tar (500 MB each) of the bucket "
    "s3://arxiv/src, whose downloads are paid by the reader, and in the same folder "
    "arxiv-metadata-oai-snapshot.json from kaggle.com/datasets/Cornell-University/arxiv (1.5 GB "
    "zipped). Or write arxiv for the papers on Mathematics up to 2022 in "
    "hoskinson-center/proof-pile on the hub (10 GB, gathered on disk first)"
)
GITHUB = (
    "give a folder of checkouts (`git clone --depth 1` of each repository), or "
    "github:hub:OWNER/NAME/PATTERN for files of a dataset on the hub with the columns repo_name, "
    "path and content or code, such as "
    "github:hub:codeparrot/github-code-clean/data/train-0000?-of-*.parquet (10 of its 880 files, "
    "about 3 GB; in all about 300 GB)"
)
ISABELLE = (
    "download a release of the Archive of Formal Proofs from isa-afp.org/download (afp-*.tar.gz, "
    "about 100 MB) and give it or its folder, or the src folder of an Isabelle distribution"
)
