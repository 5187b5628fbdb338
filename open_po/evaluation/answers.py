"""The answers of a model on disk: a line each, kept as they come, so that none is generated twice."""

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

    def known(self) -> dict[str, str]:
        """Answers by key."""
        with disk_faults(str(self.path), _KEPT):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            records = read_json_lines(self.path)
        return {record["key"]: record["answer"] for record in records if "key" in record and "answer" in record}

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
        """Replace the file."""
        lines = "".join(map(_line, records))
        with disk_faults(str(self.path), _KEPT):
            write_atomically(self.path, lambda path: path.write_text(lines, encoding="utf-8"))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
