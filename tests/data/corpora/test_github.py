"""Repositories from rows that lie scattered, and from checkouts."""

import gzip
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pytest
from pyarrow import parquet

from memorizing.config import DataConfig
from memorizing.data import load_corpus
from memorizing.data.text import shuffle_tree
from memorizing.errors import CorpusError

FILES = {
    ("ann/one", "src/a.py"): "A = 1\n",
    ("bob/two", "README"): "two",
    ("ann/one", "src/deep/b.py"): "B = 2\n",
    ("ann/one", "setup.py"): "setup()\n",
    ("bob/two", "lib/x.c"): "int x;\n",
    ("ann/one", "src/deep/c.py"): "C = 3\n",
}


def read(where, **settings):
    corpus = load_corpus(DataConfig(corpus=f"github:{where}", **settings))
    return corpus, {document.name: document for document in corpus.documents()}


def make_rows(**names):
    columns = {"repo": "repo_name", "path": "path", "text": "content", **names}
    return [
        {columns["repo"]: repo, columns["path"]: path, columns["text"]: text, "size": len(text)}
        for (repo, path), text in FILES.items()
    ]


def write_rows(folder, rows):
    """Two Parquet files and a packed JSON lines file, a third of the rows each."""
    folder.mkdir(parents=True, exist_ok=True)
    third = len(rows) // 3
    parquet.write_table(pa.Table.from_pylist(rows[:third]), folder / "train-0.parquet")
    parquet.write_table(pa.Table.from_pylist(rows[third : 2 * third]), folder / "train-1.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in rows[2 * third :])
    (folder / "train-2.json.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def test_rows_of_a_repository_are_brought_together_in_the_order_of_checkouts(tmp_path):
    for (repo, path), text in FILES.items():
        file = tmp_path / "checkouts" / repo.replace("/", "+") / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    _, gathered = read(write_rows(tmp_path / "rows", make_rows()), seed=3)
    assert list(gathered) == ["ann/one", "bob/two"]
    paths = [PurePosixPath(path) for repo, path in FILES if repo == "ann/one"]
    expected = "".join(
        f"# {path}\n{FILES['ann/one', str(path)]}" for path in shuffle_tree(paths, "3/ann/one")
    )
    assert gathered["ann/one"].text == expected
    assert gathered["ann/one"].num_bytes == len(expected.encode())
    _, checked_out = read(tmp_path / "checkouts", seed=3)
    assert {name: sorted(d.text.splitlines()) for name, d in checked_out.items()} == {
        name.replace("/", "+"): sorted(d.text.splitlines()) for name, d in gathered.items()
    }


@pytest.mark.parametrize(
    "names",
    [
        {"text": "code"},
        {"repo": "repository_name"},
        {"repo": "max_stars_repo_name", "path": "max_stars_repo_path"},
        {"path": "file_path", "text": "text"},
    ],
)
def test_the_columns_of_known_datasets_of_code_are_found(tmp_path, names):
    _, documents = read(write_rows(tmp_path, make_rows(**names)))
    assert list(documents) == ["ann/one", "bob/two"]


def test_the_text_may_be_in_any_column(tmp_path):
    folder = write_rows(tmp_path, make_rows(text="body"))
    assert "A = 1" in read(folder, text_column="body")[1]["ann/one"].text
    with pytest.raises(CorpusError, match=r"row 1 of 'train-0.parquet' has no column 'content'"):
        read(folder)


def test_rows_without_a_repository_are_refused(tmp_path):
    folder = write_rows(tmp_path, [{"path": "a", "content": "x"}] * 3)
    with pytest.raises(CorpusError, match=r"none of the columns repo_name, .*it has path, content"):
        read(folder)


def test_broken_files_and_rows_are_left_out_and_named(tmp_path):
    rows = [*make_rows(), {"repo_name": "ann/one", "path": "x.bin", "content": "a\0b", "size": 3}]
    folder = write_rows(tmp_path, rows)
    (folder / "a-broken.parquet").write_bytes((folder / "train-0.parquet").read_bytes()[:-9])
    packed = (folder / "train-2.json.gz").read_bytes()
    (folder / "b-cut.json.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "c-lines.jsonl").write_text('{"repo_name": \n[1]\n\n' + json.dumps(rows[1]) + "\n")
    corpus, documents = read(folder)
    assert set(documents) == {"ann/one", "bob/two"}
    skipped = "\n".join(corpus.skipped)
    assert "a-broken.parquet: cannot be read after row 0" in skipped
    assert "b-cut.json.gz: cannot be read after row 0" in skipped
    assert "c-lines.jsonl:1: not a JSON object" in skipped
    assert "c-lines.jsonl:2: not a JSON object" in skipped
    assert "x.bin in ann/one: binary" in skipped
    assert len(corpus.skipped) == 5


def test_reading_stops_after_so_many_repositories(tmp_path):
    _, documents = read(write_rows(tmp_path, make_rows()), max_documents=1)
    assert list(documents) == ["ann/one"]


def test_a_missing_folder_says_what_to_download_and_how_large_it_is(tmp_path):
    for where in (tmp_path / "missing", tmp_path):
        with pytest.raises(CorpusError, match=r"git clone --depth 1.*github-code-clean.*300 GB"):
            read(where)
    with pytest.raises(
        CorpusError, match="'hub:nameless' names no dataset of the hub; write hub:OWNER/NAME"
    ):
        read("hub:nameless")


def test_a_hub_that_cannot_be_reached_says_what_to_do(tmp_path):
    code = (
        "import sys; from memorizing.config import DataConfig; "
        "from memorizing.data import load_corpus; from memorizing.errors import CorpusError\n"
        "for corpus in sys.argv[1:]:\n"
        "    try: next(load_corpus(DataConfig(corpus=corpus)).documents())\n"
        "    except CorpusError as error: print(error)"
    )
    # Nothing listens on the discard port.
    nowhere = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    words = [sys.executable, "-c", code, "pg19", "c4", "arxiv", "github:hub:owner/name"]
    done = subprocess.run(words, env=nowhere, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    for line in lines:
        assert "from the Hugging Face hub" in line
        assert "connect to the network and try again, or use files on this machine" in line
        assert " GB" in line


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what is asked of the hub about a dataset that is the folder `root`."""

    root: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        file = self.root / path.partition("/resolve/" + "7" * 40 + "/")[2]
        if path.startswith("/api/datasets/owner/code/tree/" + "7" * 40):
            found = [p for p in sorted(self.root.rglob("*")) if p.is_file()]
            self.answer(json.dumps([self.describe(p) for p in found]).encode())
        elif path.startswith("/api/datasets/owner/code"):
            self.answer(json.dumps({"id": "owner/code", "sha": "7" * 40}).encode())
        elif "/resolve/" in path and file.is_file():
            first, last = re.findall(r"\d+", self.headers["Range"])
            self.answer(file.read_bytes()[int(first) : int(last) + 1], 206)
        else:
            self.answer(b"{}", 404)

    def describe(self, path):
        name = path.relative_to(self.root).as_posix()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": name}

    def answer(self, content, status=200):
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_rows_on_the_hub_are_read_as_those_on_this_machine(tmp_path):
    folder = write_rows(tmp_path / "rows", make_rows())
    line = b'{"repo_name": "q", "path": "p", "content": "caf\xe9\xe2\x80\xa8x"}'
    with pa.output_stream(str(folder / "z.jsonl.zst"), compression="zstd") as stream:
        stream.write(line + b"\r\n[1]\n")
    expected, documents = read(folder)
    # What is hidden or describes a dataset is none of it.
    for name in (".hidden/a.jsonl", "dataset_infos.json", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(line)
    handler = type("Handler", (Hub,), {"root": folder})
    code = (
        "import sys; from memorizing.config import DataConfig\n"
        "from memorizing.data import load_corpus\n"
        "corpus = load_corpus(DataConfig(corpus='github:hub:owner/code'))\n"
        "found = {d.name: d for d in corpus.documents()}\n"
        "print(repr((found, corpus.skipped, corpus.num_replaced)))\n"
        "try: load_corpus(DataConfig(corpus='github:hub:owner/other'))\n"
        "except Exception as error: print(error)"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        server.shutdown()
    assert done.stdout, done.stderr
    found, refused = done.stdout.splitlines()
    assert found == repr((documents, expected.skipped, expected.num_replaced))
    assert expected.num_replaced == 1
    assert refused.startswith("the hub has no files ** in the dataset 'owner/other'; give a folder")
