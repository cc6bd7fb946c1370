"""Files are found by folder, name and pattern; what is no text that can be read is named."""

from pathlib import PurePosixPath

from memorizing.data.reading.files import find_files
from memorizing.data.text import ReadLog


def test_hidden_files_and_byte_code_are_not_found(tmp_path):
    for name in (".git/config", "__pycache__/a.pyc", "src/a.py", ".hidden", "left/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    log = ReadLog()
    found = find_files(tmp_path, log, explain=lambda path: "x" if path.name == "left" else "")
    assert found == [PurePosixPath("src/a.py")]
    assert not log.items
