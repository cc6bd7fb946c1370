"""Archives are read as streams, and refused where they are not safe."""

import gzip
import io
import tarfile
import tracemalloc

import pytest

from memorizing.data.reading import archives
from memorizing.data.reading.archives import (
    UnsafeArchiveError,
    check_archive,
    read_members,
    read_packed,
)
from memorizing.errors import CorpusError


def write_tar(path, members, mode="w"):
    """Write an archive of `name -> bytes`, or of ready-made headers without content."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            raw = b"" if isinstance(content, tarfile.TarInfo) else content
            info.name = name
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path


def is_tex(name):
    return name.endswith(".tex")


def is_theory(name):
    return name.lower().endswith(".thy")


def make_header(kind, target=""):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")],
)
def test_files_are_read_in_the_order_of_the_archive(tmp_path, name, mode):
    members = {
        "z/b.thy": b"bee" * 701,
        "z/a.txt": b"no",
        "z/a.THY": b"ay",
        "z/d": make_header(tarfile.DIRTYPE),
    }
    path = write_tar(tmp_path / name, members, mode)
    assert [(str(p), raw) for p, raw in read_members(path, is_theory)] == [
        ("z/b.thy", b"bee" * 701),
        ("z/a.THY", b"ay"),
    ]
    assert len(list(read_members(path, bool))) == 3
    check_archive(path)


@pytest.mark.parametrize(
    ("name", "header", "problem"),
    [
        ("/etc/passwd", None, "leaves the folder"),
        ("a/../../up.thy", None, "leaves the folder"),
        ("..\\up.thy", None, "leaves the folder"),
        ("C:/up.thy", None, "leaves the folder"),
        ("../link.thy", make_header(tarfile.SYMTYPE, "good.thy"), "leaves the folder"),
        ("pipe.thy", make_header(tarfile.FIFOTYPE), "neither a file nor a folder"),
        ("disk.thy", make_header(tarfile.BLKTYPE), "neither a file nor a folder"),
        ("tty.thy", make_header(tarfile.CHRTYPE), "neither a file nor a folder"),
    ],
)
def test_a_member_that_is_not_safe_refuses_the_archive_by_name(tmp_path, name, header, problem):
    path = write_tar(tmp_path / "bad.tar", {"good.thy": b"fine", name: header or b"x"})
    for use in (check_archive, lambda p: list(read_members(p, is_theory))):
        with pytest.raises(UnsafeArchiveError, match="archive 'bad.tar' has the member") as caught:
            use(path)
        assert repr(name) in str(caught.value)
        assert problem in str(caught.value)
        assert isinstance(caught.value, CorpusError)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("link.thy", make_header(tarfile.SYMTYPE, "/etc/passwd")),
        ("hard.thy", make_header(tarfile.LNKTYPE, "good.thy")),
        ("a/._good.thy", b"\0\5\x16\7 of macOS"),
    ],
)
def test_links_and_what_macos_keeps_beside_files_are_passed_over(tmp_path, name, content):
    path = write_tar(tmp_path / "git.tar", {"good.thy": b"fine", name: content, "z.thy": b"z"})
    assert [raw for _, raw in read_members(path, is_theory)] == [b"fine", b"z"]


@pytest.mark.parametrize(("name", "mode"), [("a.tar.gz", "w"), ("a.tgz", "w:bz2"), ("a", "w:xz")])
def test_what_packs_an_archive_is_told_by_its_first_bytes(tmp_path, name, mode):
    path = write_tar(tmp_path / name, {"a.thy": b"ay"}, mode)
    assert [raw for _, raw in read_members(path, is_theory)] == [b"ay"]


def test_lines_packed_by_zstandard_are_read(tmp_path):
    import pyarrow

    with pyarrow.output_stream(str(tmp_path / "a.zst"), compression="zstd") as stream:
        stream.write(b"\xef\xbb\xbfone\ntwo\n")
    with archives.open_packed(tmp_path / "a.zst") as stream:
        assert list(archives.read_lines(stream, 31, "a.zst")) == [b"one\n", b"two\n"]


def test_a_member_that_says_it_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 1009)
    path = write_tar(tmp_path / "a.tar", {"a.thy": b"x" * 1009})
    assert len(list(read_members(path, bool))) == 1
    path = write_tar(tmp_path / "b.tar", {"a.thy": b"x" * 1010})
    with pytest.raises(UnsafeArchiveError, match=r"it has 1,010 bytes \(at most 1,009\)"):
        check_archive(path)


def test_an_archive_that_expands_too_far_is_refused_and_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    path = write_tar(tmp_path / "bomb.tar.gz", {f"{n}.thy": bytes(2**21) for n in range(7)}, "w:gz")
    tracemalloc.start()
    try:
        with pytest.raises(UnsafeArchiveError, match="'bomb.tar.gz' expands to more than"):
            check_archive(path)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    assert check_archive(write_tar(tmp_path / "plain.tar", {"a.thy": bytes(2**21)})) is None


def test_a_header_that_says_it_is_huge_is_refused(tmp_path):
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2**30
    path = tmp_path / "a.tar"
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(4096))
    with pytest.raises(UnsafeArchiveError, match="a header of 1,073,741,824 bytes"):
        check_archive(path)


def test_a_damaged_archive_raises_one_of_the_errors_that_are_named(tmp_path):
    path = write_tar(
        tmp_path / "a.tar.gz", {"a.thy": bytes(range(251)) * 97, "b.thy": b"b"}, "w:gz"
    )
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not gzip", whole[:20] + b"\xff" * 30 + whole[50:]):
        path.write_bytes(damaged)
        with pytest.raises(archives.READ_ERRORS):
            check_archive(path)


def test_a_packed_file_is_its_text_or_the_members_of_its_archive(tmp_path):
    assert read_packed(gzip.compress(b"\\section{one}"), "p.gz", is_tex) == b"\\section{one}"
    assert read_packed(gzip.compress(b"x" * 1013), "p.gz", is_tex) == b"x" * 1013
    path = write_tar(tmp_path / "p.tar", {"a.tex": b"ay", "f.eps": b"no"})
    packed = read_packed(gzip.compress(path.read_bytes()), "p.gz", is_tex)
    assert isinstance(packed, dict)
    assert {str(name): raw for name, raw in packed.items()} == {"a.tex": b"ay"}


def test_a_packed_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    with pytest.raises(UnsafeArchiveError, match="'p.gz' expands to more than"):
        read_packed(gzip.compress(bytes(5 * 2**20)), "p.gz", is_tex)
