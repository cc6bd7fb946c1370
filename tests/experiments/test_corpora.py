import json

import pytest

from memorizing.config import load_config
from memorizing.errors import CorpusError
from tests.experiments.conftest import CORPORA
from tests.experiments.packages import write_table, write_wheel


@pytest.fixture
def table(tmp_path):
    """Two packages of code in `fetched`, and the table of them."""
    (tmp_path / "fetched").mkdir()
    rows = []
    for name in ("small", "other"):
        files = {f"{name}/a.py": f"{name} = 1\n".encode(), f"{name}/b.py": b"b = 2\n"}
        path = write_wheel(tmp_path / "fetched" / f"{name}-1.0-py3-none-any.whl", files)
        rows.append((name, "code", "pypi", "python", path))
    return write_table(tmp_path / "table.toml", rows)


def run(tmp_path, table, *more):
    import build

    arguments = ["code", "--folder", str(tmp_path / "corpora"), "--table", str(table)]
    return build.main([*arguments, "--from", str(tmp_path / "fetched"), *more])


def test_a_family_is_built_once_and_found_complete_after(tmp_path, table, capsys):
    assert run(tmp_path, table) == 0
    place = tmp_path / "corpora" / "code"
    assert (place / "small/small/a.py").read_bytes() == b"small = 1\n"
    assert json.loads((place / ".built.json").read_text())["documents"] == 2
    assert "2 documents" in capsys.readouterr().out
    (tmp_path / "fetched/small-1.0-py3-none-any.whl").unlink()
    assert run(tmp_path, table) == 0
    assert "complete, 2 documents" in capsys.readouterr().out


def test_the_text_is_compared_with_that_of_the_experiments(tmp_path, table, capsys):
    run(tmp_path, table)
    built = json.loads((tmp_path / "corpora/code/.built.json").read_text())
    result = '[result.code]\ndocuments = 2\nbytes = 3\nsha256 = "{}"\n'
    for folder, digest, said in (
        ("second", built["sha256"], ", the text of our experiments"),
        ("third", "0" * 64, "NOT the text of our experiments"),
    ):
        other = tmp_path / f"{folder}.toml"
        other.write_text(table.read_text() + result.format(digest))
        capsys.readouterr()
        assert run(tmp_path, other, "--folder", str(tmp_path / folder)) == 0
        assert said in capsys.readouterr().out


def test_a_file_with_another_hash_is_refused(tmp_path, table, capsys):
    write_wheel(tmp_path / "fetched/other-1.0-py3-none-any.whl", {"other/a.py": b"changed\n"})
    assert run(tmp_path, table) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "corpora").exists()


def test_the_help_has_the_families_with_their_sizes_and_examples(capsys):
    import build

    with pytest.raises(SystemExit) as ended:
        build.main(["--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "proofs HOL Light and Coq libraries 50 documents, 80.1 MB; fetches 157.6 MB" in said
    assert "math LaTeX 219 documents, 14.0 MB; fetches 166.0 MB" in said
    assert "examples: python experiments/corpora/build.py" in said


def test_missing_files_are_all_named(tmp_path, table, capsys):
    for name in ("small", "other"):
        (tmp_path / f"fetched/{name}-1.0-py3-none-any.whl").unlink()
    assert run(tmp_path, table) == 2
    said = capsys.readouterr().err
    assert "small-1.0" in said
    assert "other-1.0" in said


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (CorpusError("unreadable"), 2)]
)
def test_an_interrupted_build_leaves_nothing(tmp_path, table, monkeypatch, error, status):
    from standins import readers

    def read(package, path):
        yield f"{package}/a.py", b"a = 1\n"
        if package == "other":
            raise error

    monkeypatch.setitem(readers.READERS, "python", readers.Reader(read, one_document=True))
    assert run(tmp_path, table) == status
    assert list((tmp_path / "corpora").iterdir()) == []


def test_a_folder_of_other_origin_is_left_alone(tmp_path, table, capsys):
    (tmp_path / "corpora/code").mkdir(parents=True)
    (tmp_path / "corpora/code/mine.py").write_text("mine = 1\n")
    assert run(tmp_path, table) == 2
    assert "was not built from these packages" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "corpora/code").iterdir()] == ["mine.py"]


def test_a_program_that_is_missing_is_named_before_anything_is_fetched(tmp_path, monkeypatch):
    from standins.fetching import fetch_files
    from standins.packages import load_table

    from memorizing.errors import ResourceError

    monkeypatch.setenv("PATH", str(tmp_path))
    packages = load_table(CORPORA / "packages.toml").of_family("web")
    with pytest.raises(ResourceError, match="apt-get.*npm"):
        fetch_files(packages, tmp_path / "downloads")
    assert not (tmp_path / "downloads").exists()


def test_a_version_that_is_gone_is_named_with_what_to_do(tmp_path, monkeypatch):
    from standins.fetching import fetch_files
    from standins.packages import Package

    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\necho 'npm error code ETARGET' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gone = Package("small", "web", "npm", "9.9", "small-9.9.tgz", "0" * 64, 7, "MIT", "factbook")
    with pytest.raises(CorpusError, match=r"small 9\.9 \(npm error code ETARGET\).*npm view small"):
        fetch_files([gone], tmp_path / "downloads", show=lambda line: None)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_what_a_registry_gives_is_verified_and_not_fetched_again(tmp_path, monkeypatch):
    import hashlib

    from standins.fetching import fetch_files
    from standins.packages import Package

    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\nprintf small > small-1.0.tgz\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fields = ("small", "web", "npm", "1.0", "small-1.0.tgz")
    good = Package(*fields, hashlib.sha256(b"small").hexdigest(), 5, "MIT", "factbook")
    path = fetch_files([good], tmp_path / "downloads", show=lambda line: None)[good]
    assert path.read_bytes() == b"small"
    program.unlink()
    assert fetch_files([good], tmp_path / "downloads") == {good: path}
    program.write_text("#!/bin/sh\nprintf other > small-1.0.tgz\n")
    program.chmod(0o755)
    path.write_bytes(b"damaged")
    with pytest.raises(CorpusError, match="SHA-256"):
        fetch_files([good], tmp_path / "downloads", show=lambda line: None)


def test_the_table_is_complete():
    from standins.packages import FAMILIES, load_table
    from standins.readers import READERS

    table = load_table(CORPORA / "packages.toml")
    assert {package.family for package in table.packages} == set(FAMILIES)
    assert {package.reader for package in table.packages} == set(READERS)
    assert set(table.results) == {*FAMILIES, "math_with_stacks"}
    readme = (CORPORA / "README.md").read_text(encoding="utf-8")
    for package in table.packages:
        line = f"| {package.family} | {package.name} | {package.source} | {package.version} | "
        assert line + package.license in readme


@pytest.mark.parametrize("family", ["proofs", "code", "math", "books", "web"])
def test_the_recipe_of_each_family_names_its_corpus_and_what_is_held_out(family):
    config = load_config(CORPORA.parent / "recipes" / f"{family}.toml")
    assert config.data.corpus.split(":")[1].startswith(f"corpora/{family}")
    assert config.data.test
    assert config.data.validation
    assert not set(config.data.test) & set(config.data.validation)
