"""Any sequence of changes against a list of names."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memorizing.memory import MemoryFolder
from memorizing.memory.disk import state
from tests.memory.disk.examples import append, check_holds, make_folder

NAMES = st.sampled_from([f"{letter}{number}" for letter in "abcde" for number in range(5)])


class FolderAgainstList(RuleBasedStateMachine):
    """A folder holds what was appended and not forgotten, in this order, with its own entries."""

    @initialize(dtype=st.sampled_from(["bfloat16", "int8"]), small=st.sampled_from([1, 31, 97]))
    def start(self, dtype: str, small: int) -> None:
        self.place = tempfile.TemporaryDirectory()
        self.usual = state.SMALL_SEGMENT
        state.SMALL_SEGMENT = small
        self.folder = make_folder(Path(self.place.name) / "memory", dtype=dtype)
        self.names: list[str] = []

    @rule(names=st.lists(NAMES, max_size=3, unique=True), keep_text=st.booleans())
    def append(self, names: list[str], keep_text: bool) -> None:
        new = [name for name in names if name not in self.names]
        append(self.folder, new, keep_text=keep_text)
        self.names += new

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        self.folder.forget(name)
        self.names.remove(name)

    @rule()
    def open_again(self) -> None:
        self.folder = MemoryFolder.open(self.folder.path)

    @rule()
    def pack(self) -> None:
        out = self.folder.path.with_name(f"packed {self.folder.path.name}")
        self.folder = MemoryFolder.merge([self.folder.path], out)

    @invariant()
    def the_folder_holds_what_the_list_holds(self) -> None:
        if hasattr(self, "folder"):
            check_holds(self.folder, self.names)

    def teardown(self) -> None:
        if hasattr(self, "place"):
            check_holds(MemoryFolder.open(self.folder.path), self.names)
            self.folder.verify()
            state.SMALL_SEGMENT = self.usual
            self.place.cleanup()


FolderAgainstList.TestCase.settings = settings(
    max_examples=17, stateful_step_count=11, deadline=None, derandomize=True
)
test_a_folder_holds_what_was_appended_and_not_forgotten = FolderAgainstList.TestCase
