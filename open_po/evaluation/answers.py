"""The answers of a model on disk: a line each, kept as they come, so that none is generated twice.

Those of the latest evaluation are a file; answers to other prompts, or with other settings, lie in a folder beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from open_po.output.files import disk_faults, read_json_lines, write_atomically

_KEPT = "answers that are on disk are kept; free some space, or choose another --out"


class AnswerFile:
    """`answers/NAME.jsonl`. A line's `key` stands for the model, how it is asked, and the prompt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.earlier = path.parent / "earlier" / path.name

    def known(self) -> dict[str, str]:
        """Answers by key."""
        with disk_faults(str(self.path), _KEPT):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return {str(record["key"]): record["answer"] for record in _answers(self.earlier) + _answers(self.path)}

    def add(self, answers: Mapping[str, str]) -> None:
        """Append answers by key."""
        with disk_faults(str(self.path), _KEPT), open(self.path, "ab+") as file:
            if file.tell():  # a kill may have left half a line
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            for key, answer in answers.items():
                file.write(_line({"key": key, "answer": answer}).encode())

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Make `records` the file; what else it has is kept among the earlier ones."""
        records = list(records)
        with disk_faults(str(self.path), _KEPT):
            there = {str(record["key"]): record for record in _answers(self.earlier)}
            own = {record["key"] for record in records}
            others = {str(record["key"]): record for record in _answers(self.path) if record["key"] not in own}
            if others.keys() - there.keys():
                self.earlier.parent.mkdir(exist_ok=True)
                _write(self.earlier, (there | others).values())
            _write(self.path, records)


def _answers(path: Path) -> list[dict[str, Any]]:
    return [record for record in read_json_lines(path) if "key" in record and "answer" in record]


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    lines = "".join(map(_line, records))
    write_atomically(path, lambda target: target.write_text(lines, encoding="utf-8"))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
