"""Small packages as registries have them, and a table of them."""

import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path


def make_tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
        for name, to in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE
            member.linkname = to
            archive.addfile(member)
    return target.getvalue()


def write_deb(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    """An `ar` archive of the three members of a Debian package; the first has an odd size."""
    import lzma

    members = {
        "debian-binary": b"2.0",
        "control.tar.xz": lzma.compress(make_tar({"./control": b"Package: small\n"})),
        "data.tar.xz": lzma.compress(make_tar(files, links)),
    }
    raw = b"!<arch>\n"
    for name, content in members.items():
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        raw += content + b"\n" * (len(content) % 2)
    path.write_bytes(raw)
    return path


def write_wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return path


def write_tgz(path: Path, files: dict[str, bytes]) -> Path:
    path.write_bytes(gzip.compress(make_tar(files)))
    return path


def write_table(path: Path, rows: list[tuple[str, str, str, str, Path]]) -> Path:
    """A table of packages from name, family, source, reader, file; each of version 1.0."""
    lines = []
    for name, family, source, reader, file in rows:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        fields = {"name": name, "family": family, "source": source, "version": "1.0"}
        fields |= {"file": file.name, "sha256": digest, "license": "MIT", "reader": reader}
        lines += ["[[package]]", *(f'{key} = "{value}"' for key, value in fields.items())]
        lines += [f"size = {file.stat().st_size}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
