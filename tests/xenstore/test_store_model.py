# SPDX-License-Identifier: GPL-2.0-only
"""The tree and its transactions against a model: a dictionary that is copied whole at every step."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyxen.abi.io.xs_wire import XsType
from pyxen.xenstore.daemon import XenstoreDaemon
from pyxen.xenstore.store import is_valid_node_path
from tests.xenstore.peers import Peer

Model = dict[str, tuple[bytes, int]]
"""Path to (value, serial number of its last change); a change of the list of children counts."""

PATHS = [f"/{a}" for a in "ab"] + [f"/{a}/{b}" for a in "ab" for b in "xy"] + ["/a/x/deep", "/a/x/deep/er", "/b/y/1"]
_paths = st.sampled_from(PATHS)


def parent(path: str) -> str:
    return path.rsplit("/", 1)[0] or "/"


def children(model: Model, path: str) -> list[str]:
    return [each for each in model if each != "/" and parent(each) == path]


@dataclass
class Open:
    """A transaction as the model sees it: what it saw (None: absent) and its own copy laid over the tree."""

    seen: dict[str, int | None] = field(default_factory=dict)
    mine: dict[str, bytes | None] = field(default_factory=dict)


class StoreMachine(RuleBasedStateMachine):
    """Random requests, some in one of two transactions; every answer must be the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.service = XenstoreDaemon(None).service
        self.peer = Peer(self.service)
        self.model: Model = {"/": (b"", 0), "/tool": (b"", 0), "/tool/xenstored": (b"", 0)}
        self.serial = 0
        self.open: dict[int, Open] = {}

    # --- the model ---------------------------------------------------------------------------------------------

    def touch(self, path: str, value: bytes | None = None) -> None:
        self.serial += 1
        self.model[path] = (self.model[path][0] if value is None else value, self.serial)

    def view(self, tx: int) -> dict[str, bytes]:
        """What a request sees (looking at everything, which records nothing)."""
        if not tx:
            return {path: value for path, (value, _) in self.model.items()}
        merged: dict[str, bytes | None] = {path: value for path, (value, _) in self.model.items()}
        merged.update(self.open[tx].mine)
        return {path: value for path, value in merged.items() if value is not None}

    def clean(self, tx: int) -> bool:
        """Whether nothing the transaction saw has changed: only then does the model know what it sees."""
        return all(self.model.get(path, (b"", None))[1] == serial for path, serial in self.open[tx].seen.items())

    def look(self, tx: int, path: str) -> None:
        if not tx or path in self.open[tx].mine:
            return
        self.open[tx].seen.setdefault(path, self.model.get(path, (b"", None))[1])
        if path not in self.model:
            above = path
            while above not in self.model:
                above = parent(above)
            self.open[tx].seen.setdefault(above, self.model[above][1])

    def usable(self, tx: int) -> bool:
        return not tx or (tx in self.open and self.clean(tx))

    def pick(self, which: int) -> int:
        """0, or one of the open transactions."""
        idents = sorted(self.open)
        return idents[which % len(idents)] if which and idents else 0

    # --- requests ----------------------------------------------------------------------------------------------

    @rule(which=st.integers(0, 2), path=_paths)
    def read(self, which: int, path: str) -> None:
        tx = self.pick(which)
        if self.usable(tx):
            seen = self.view(tx)
            assert self.peer.ask(XsType.READ, path.encode() + b"\0", tx) == seen.get(path, "ENOENT")
            self.look(tx, path)

    @rule(which=st.integers(0, 2), path=_paths)
    def directory(self, which: int, path: str) -> None:
        tx = self.pick(which)
        if self.usable(tx):
            seen = self.view(tx)
            answer = self.peer.ask(XsType.DIRECTORY, path.encode() + b"\0", tx)
            if path not in seen:
                assert answer == "ENOENT"
            else:
                assert isinstance(answer, bytes)
                expected = {each.rsplit("/", 1)[1].encode() for each in seen if each != "/" and parent(each) == path}
                assert set(answer.split(b"\0")[:-1]) == expected
            self.look(tx, path)

    @rule(which=st.integers(0, 2), path=_paths, value=st.sampled_from([b"", b"1", b"two"]))
    def write(self, which: int, path: str, value: bytes) -> None:
        tx = self.pick(which)
        if not self.usable(tx):
            return
        assert self.peer.ask(XsType.WRITE, path.encode() + b"\0" + value, tx) == b"OK\0"
        seen = self.view(tx)
        self.look(tx, path)
        missing = []
        above = path
        while above not in seen:
            missing.append(above)
            above = parent(above)
            self.look(tx, above)
        if tx:
            self.open[tx].mine.update(dict.fromkeys(missing[1:], b""))
            if missing:
                self.open[tx].mine[above] = seen[above]
            self.open[tx].mine[path] = value
            return
        for each in missing:
            self.model[each] = (b"", 0)
            self.touch(each)
        if missing:
            self.touch(above)
        self.touch(path, value)

    @rule(which=st.integers(0, 2), path=_paths)
    def remove(self, which: int, path: str) -> None:
        tx = self.pick(which)
        if not self.usable(tx):
            return
        seen = self.view(tx)
        answer = self.peer.ask(XsType.RM, path.encode() + b"\0", tx)
        self.look(tx, path)
        if path not in seen:
            assert answer == (b"OK\0" if parent(path) in seen else "ENOENT")
            self.look(tx, parent(path))
            return
        assert answer == b"OK\0"
        gone = [each for each in seen if each == path or each.startswith(path + "/")]
        for each in [*gone, parent(path)]:
            self.look(tx, each)
        if tx:
            self.open[tx].mine.update(dict.fromkeys(gone))
            self.open[tx].mine[parent(path)] = seen[parent(path)]
            return
        for each in gone:
            del self.model[each]
        self.touch(parent(path))

    @precondition(lambda self: len(self.open) < 3)
    @rule()
    def start(self) -> None:
        self.open[self.peer.start()] = Open()

    @precondition(lambda self: self.open)
    @rule(which=st.integers(1, 3), commit=st.booleans())
    def end(self, which: int, commit: bool) -> None:
        tx = self.pick(which)
        clean = self.clean(tx)
        done = self.open.pop(tx)
        answer = self.peer.ask(XsType.TRANSACTION_END, b"T\0" if commit else b"F\0", tx)
        assert answer == (b"OK\0" if clean or not commit else "EAGAIN")
        if commit and clean:
            for path, value in done.mine.items():
                if value is None:
                    self.model.pop(path, None)
                else:
                    self.model.setdefault(path, (b"", 0))
                    self.touch(path, value)

    @invariant()
    def tree_is_the_models(self) -> None:
        found = {path.decode(): node.value for path, node in self.service.store.nodes.items()}
        assert found == {path: value for path, (value, _) in self.model.items()}
        assert list(self.service.store.check()) == []


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@given(st.binary(max_size=12))
def test_a_path_is_valid_exactly_when_its_parts_are(path: bytes) -> None:
    allowed = set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_@")
    expected = path == b"/" or (
        path[:1] == b"/" and all(part and set(part) <= allowed for part in path[1:].split(b"/")))
    assert is_valid_node_path(path) == expected


def test_path_lengths_are_the_c_daemons() -> None:
    assert is_valid_node_path(b"/" + b"a" * 2047)
    assert not is_valid_node_path(b"/" + b"a" * 2048)
    assert is_valid_node_path(b"/local/domain/7/" + b"a" * 2048)
    assert not is_valid_node_path(b"/local/domain/7/" + b"a" * 2049)


def test_a_transaction_costs_no_copy_of_the_tree() -> None:
    service = XenstoreDaemon(None).service
    peer = Peer(service)
    for i in range(2000):
        peer.ask(XsType.WRITE, b"/n/%d/leaf\0v" % i)
    nodes = dict(service.store.nodes)
    tx = peer.start()
    peer.ask(XsType.WRITE, b"/n/5/leaf\0w", tx)
    assert peer.ask(XsType.TRANSACTION_END, b"T\0", tx) == b"OK\0"
    changed = [path for path, node in service.store.nodes.items() if nodes[path] is not node]
    assert changed == [b"/n/5/leaf"]


def test_check_finds_a_broken_tree() -> None:
    store = XenstoreDaemon(None).service.store
    store.create(b"/a/b", b"", 5)
    assert list(store.check()) == []
    node = store.nodes.pop(b"/a/b")
    assert list(store.check())
    store.nodes[b"/a/b"] = node
    del store.nodes[b"/a"]
    assert list(store.check())
