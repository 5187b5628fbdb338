"""The files of the reference cache: what they hold, what is trusted of them, and what a store's key depends on."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_weights
from safetensors.torch import save_file as save_weights
from transformers import AutoModelForCausalLM

import open_po.model_files
from open_po.data.tokenization import KEY_DTYPE
from open_po.errors import UserError
from open_po.model_files import ModelSource, model_identity
from open_po.reference.shards import DamagedShard, Row, find, read_shard, write_shard
from open_po.reference.store import ReferenceStore, StoreKey
from tests import cli, tiny
from tests.packs import sized
from tests.scoring import load
from tests.stores import assert_same, expected_rows, rows_in, stored, stores

Capture = pytest.CaptureFixture[str]


def made_up(count: int, seed: int = 0, *, by_token: bool = False) -> dict[bytes, Row]:
    rng = np.random.default_rng(seed)
    rows = {}
    for _ in range(count):
        parts = rng.normal(-2, 1, rng.integers(1, 9)).astype(np.float32)
        rows[rng.bytes(16)] = Row(float(parts.sum()), len(parts), parts.tolist() if by_token else None)
    return rows


def opened(folder: Path, **named: Any) -> ReferenceStore:
    return ReferenceStore(folder, warn=pytest.fail, **named)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("by_token", [False, True])
def test_a_file_holds_what_the_documentation_says(by_token: bool, tmp_path: Path) -> None:
    rows = made_up(5, by_token=by_token)
    path = write_shard(tmp_path, rows, {"device": "cpu (a kind)"}).path
    assert path.name == f"rows-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.safetensors"
    tensors = load_file(path)
    assert {name: str(array.dtype) for name, array in tensors.items()} == {
        "keys": "uint8",
        "logps": "float32",
        "tokens": "int32",
    } | ({"token_logps": "float32"} if by_token else {})
    keys = [key.tobytes() for key in tensors["keys"]]
    assert keys == sorted(rows)
    assert tensors["tokens"].tolist() == [rows[key].tokens for key in keys]
    assert tensors["logps"].tolist() == [np.float32(rows[key].logp) for key in keys]
    if by_token:
        assert tensors["token_logps"].tolist() == [logp for key in keys for logp in rows[key].token_logps or ()]
    again = read_shard(path)
    assert again.keys.tolist() == keys
    assert again.made["device"] == "cpu (a kind)"


@pytest.mark.parametrize("by_token", [False, True])
def test_no_byte_can_change_unnoticed(by_token: bool, tmp_path: Path) -> None:
    path = write_shard(tmp_path, made_up(3, by_token=by_token), {}).path
    os.utime(path, (0, 0))  # it is not taken for one that another machine is still writing
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << random.randrange(8)
        path.write_bytes(changed)
        os.utime(path, (0, 0))
        with pytest.raises(DamagedShard):
            read_shard(path)
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        os.utime(path, (0, 0))
        with pytest.raises(DamagedShard):
            read_shard(path)


keys = st.binary(min_size=16, max_size=16)


@given(st.lists(st.one_of(keys, st.integers(0, 3).map(lambda n: bytes(15) + bytes([n])))), st.lists(keys, max_size=5))
@settings(max_examples=200, deadline=None)
def test_keys_are_found(held: list[bytes], others: list[bytes]) -> None:
    known = np.frombuffer(b"".join(sorted(held)), dtype=KEY_DTYPE)
    wanted = [*held, *others, bytes(16)]
    places = find(known, np.frombuffer(b"".join(wanted), dtype=KEY_DTYPE)).tolist()
    assert [place >= 0 for place in places] == [key in held for key in wanted]
    assert all(place < 0 or known[place].item() == key for place, key in zip(places, wanted, strict=True))


# --------------------------------------------------------------------------------------------------------------- lookup


@pytest.mark.parametrize("ld_alpha", [1.0, 0.3])
def test_pairs_are_looked_up_in_many_files(ld_alpha: float, tmp_path: Path) -> None:
    """Against sums taken by hand, over files in which rows come twice."""
    dataset = sized([(3, [(2, 5), (4, 4)]), (2, [(7, 1), (1, 1)])])
    rng = np.random.default_rng(0)
    rows: dict[bytes, Row] = {}
    for (pair, side), key in np.ndenumerate(dataset.response_keys):
        length = int((dataset.chosen_lengths, dataset.rejected_lengths)[side][pair])
        parts = rng.normal(-2, 1, length).astype(np.float32)
        rows[key.item()] = Row(float(parts.sum()), length, parts.tolist())
    items = list(rows.items())
    for start in range(0, len(items), 2):
        write_shard(tmp_path, dict(items[start : start + 3]), {})
    store = opened(tmp_path, by_token=True)
    assert len(store.shards) == 4
    found = store.logps_of(dataset, ld_alpha)
    for pair in range(4):
        mine = [rows[key.item()] for key in dataset.response_keys[pair]]
        shorter = min(row.tokens for row in mine)
        for row, logp, tokens in (
            (mine[0], found.chosen[pair], found.chosen_tokens[pair]),
            (mine[1], found.rejected[pair], found.rejected_tokens[pair]),
        ):
            parts = row.token_logps or ()
            assert float(logp) == pytest.approx(sum(parts[:shorter]) + ld_alpha * sum(parts[shorter:]), rel=1e-6)
            assert tokens == row.tokens


def test_of_a_response_that_is_stored_twice_the_older_row_counts(tmp_path: Path) -> None:
    """Whatever others add later, in whatever order files are opened: a run that goes on reads what it read before."""
    key = bytes(range(16))
    written = [write_shard(tmp_path, {key: Row(-float(n), 1, None)}, {}) for n in range(8)]
    for order in (written, written[::-1], written[4:] + written[:4]):
        store = opened(tmp_path / "empty")
        for shard in order:
            store._add(shard)
        assert store.row(int(store.find(np.frombuffer(key, dtype=KEY_DTYPE))[0]))[0] == 0.0
    assert opened(tmp_path).row(int(opened(tmp_path).find(np.frombuffer(key, dtype=KEY_DTYPE))[0]))[0] == 0.0


def test_a_file_that_cannot_be_read_is_left_where_it_is(tmp_path: Path) -> None:
    """A disk's or a network's fault, or another user's rights: nothing says that the file is damaged."""
    path = write_shard(tmp_path, made_up(3), {}).path
    path.unlink()
    path.symlink_to(path)  # reading fails: too many levels of symbolic links
    warned: list[str] = []
    assert not ReferenceStore(tmp_path, warn=warned.append).shards
    assert warned == [f"{path}: cannot be read (Too many levels of symbolic links), its rows count as missing"]
    assert path.is_symlink()


def test_a_file_that_cannot_be_read_for_a_moment_is_read_later(tmp_path: Path) -> None:
    path = write_shard(tmp_path, rows := made_up(3), {}).path
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(path)
    warned: list[str] = []
    store = ReferenceStore(tmp_path, warn=warned.append)
    assert not len(store.refresh())
    path.unlink()
    path.write_bytes(content)
    assert len(store.refresh()) == 3
    assert (store.find(np.frombuffer(b"".join(rows), dtype=KEY_DTYPE)) >= 0).all()
    assert len(warned) == 1


def test_of_two_copies_of_a_file_the_whole_one_serves(tmp_path: Path) -> None:
    rows = made_up(3)
    for name in ("mine", "team"):
        (tmp_path / name).mkdir()
    path = write_shard(tmp_path / "team", rows, {}).path
    damaged = tmp_path / "mine" / path.name
    damaged.write_bytes(path.read_bytes()[:-1])
    os.utime(damaged, (0, 0))
    warned: list[str] = []
    store = ReferenceStore(tmp_path / "mine", beneath=[tmp_path / "team"], warn=warned.append)
    assert (store.find(np.frombuffer(b"".join(rows), dtype=KEY_DTYPE)) >= 0).all()
    assert len(warned) == 1
    assert not damaged.exists()


def test_a_damaged_file_of_a_read_only_cache_stays_as_it_is(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    team = tmp_path / "team"
    cli.train(llama, pairs_file, tmp_path / "first", reference_cache_dir=team, max_train_steps=1)
    (path,) = stores(team)[0].glob("rows-*")
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, (0, 0))
    before = cli.files(team)
    run = cli.train(llama, pairs_file, tmp_path / "run", reference_cache_read_only=team, max_train_steps=1)
    assert cli.summary(run)["reference"]["responses_computed"] == 48
    assert f"{path}: its content does not fit" in capsys.readouterr().out
    assert cli.files(team) == before


def test_rows_that_never_appear_end_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_po.reference.store._VISIBLE_SECONDS", 0.5)
    with pytest.raises(Exception, match=r"log-probs of 2 responses, written by other processes, have not appeared"):
        opened(tmp_path).logps_of(sized([(3, [(2, 5)])]))


# ------------------------------------------------------------------------------------------------ damage, other formats


def test_flipped_bytes_in_every_file_are_found_and_computed_again(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_po.reference.fill._SHARD_SECONDS", 0.0)
    fields = {"max_train_steps": 1, "reference_max_tokens_per_batch": 100}
    cli.train(llama, pairs_file, tmp_path / "first", **fields)
    values = stored(tmp_path / "reference")
    (store,) = stores(tmp_path / "reference")
    files = sorted(store.glob("rows-*"))
    assert len(files) > 5
    rng = random.Random(0)
    for path in files:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        os.utime(path, (0, 0))
    capsys.readouterr()
    again = cli.summary(cli.train(llama, pairs_file, tmp_path / "second", **fields))["reference"]
    assert (again["pairs_computed"], again["responses_computed"]) == (24, 48)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Damaged")]
    assert len(warnings) == 1
    assert f"(and {len(files) - 1} more)" in warnings[0]
    assert stored(tmp_path / "reference") == values
    assert sorted(store.glob("damaged-*")) == [path.with_name(f"damaged-{path.name}") for path in files]


def test_a_cache_of_a_newer_format_is_refused(llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    cli.train(llama, pairs_file, tmp_path / "first", max_train_steps=1)
    (store,) = stores(tmp_path / "reference")
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    before = cli.files(tmp_path / "reference")
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "second"))
    assert f"{store}: was written by a newer open_po (format 99, this one reads up to 2)" in line
    assert cli.files(tmp_path / "reference") == before


def test_a_cache_path_that_is_a_file(llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "reference").write_text("notes")
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "run"))
    assert line == f"error: reference_cache_dir {tmp_path}/reference: is a file"


def test_a_value_that_the_model_does_not_give_stops_the_run(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The file is whole, its number is not what the model gives: as after an upgrade that computes otherwise."""
    cli.train(llama, pairs_file, tmp_path / "first", max_train_steps=1)
    (store,) = stores(tmp_path / "reference")
    (path,) = store.glob("rows-*")
    rows = rows_in(path)
    path.unlink()
    wrong = {key: Row(logp * 1.001, tokens, None) for key, (logp, tokens) in rows.items()}
    write_shard(store, wrong, {"device": "another machine"})
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "second"))
    assert "pairs.jsonl row 1: the reference log-prob of the chosen response is -" in line
    assert f"in {next(store.glob('rows-*'))} (created " in line
    assert "device another machine), but " in line
    assert f"cache prune --key {store.name} --dir {store.parent})" in line
    fields = {"max_train_steps": 1, "verify_reference_rows": 0}
    taken = cli.summary(cli.train(llama, pairs_file, tmp_path / "third", **fields))["reference"]
    assert (taken["pairs_computed"], taken["rows_verified"]) == (0, 0)
    for key in rows:
        write_shard(store, {key: Row(*rows[key], None)}, {"device": "cpu"})
    for path in store.glob("rows-*"):
        if len(read_shard(path)) > 1:
            path.unlink()
    assert (
        cli.summary(cli.train(llama, pairs_file, tmp_path / "fourth", max_train_steps=1))["reference"]["rows_verified"]
        == 4
    )


# ------------------------------------------------------------------------------------------------------ several folders


def test_a_read_only_cache_lies_under_a_writable_one(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Mounted so that nothing can be written there: what it lacks goes into the other."""
    team = tmp_path / "team"
    cli.train(llama, pairs_file, tmp_path / "first", mixer_list=[pairs_file, "10"], reference_cache_dir=team)
    done = subprocess.run(["mount", "--bind", team, team], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", team], check=True)
        fields = {"reference_cache_read_only": [team], "max_train_steps": 1}
        own = cli.summary(cli.train(llama, pairs_file, tmp_path / "second", **fields))["reference"]
        assert (own["pairs_computed"], own["pairs_reused"], own["responses_computed"]) == (14, 10, 28)
        assert len(stored(tmp_path / "reference")) == 28
        assert stored(tmp_path / "reference").keys().isdisjoint(stored(team))
        assert_same(stored(tmp_path / "reference") | stored(team), expected_rows(llama, tiny.text_rows(24)))
        # And alone, as long as nothing is missing.
        fields = {"reference_cache_dir": team, "mixer_list": [pairs_file, "10"], "max_train_steps": 1}
        assert (
            cli.summary(cli.train(llama, pairs_file, tmp_path / "third", **fields))["reference"]["pairs_reused"] == 10
        )
    finally:
        subprocess.run(["umount", team], check=False)


def test_a_read_only_cache_where_something_is_missing(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    cache = tmp_path / "reference"
    cache.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", cache], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    try:
        line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "run"))
        said = "reference log-probs cannot be written (Read-only file system); those written before are kept"
        assert line == f"error: reference_cache_dir {cache}: {said}"
    finally:
        subprocess.run(["umount", cache], check=False)


def test_a_read_only_cache_that_is_not_there(llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    words = cli.arguments(llama, pairs_file, tmp_path / "run", reference_cache_read_only=tmp_path / "nowhere")
    assert cli.failure(capsys, words) == f"error: reference_cache_read_only: {tmp_path}/nowhere is no folder"


# ----------------------------------------------------------------------------------------------------- sums and tokens


def test_log_probs_by_token_serve_all_losses(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    def computed(name: str, **fields: Any) -> int:
        run = cli.train(llama, pairs_file, tmp_path / name, max_train_steps=1, **fields)
        count: int = cli.summary(run)["reference"]["responses_computed"]
        return count

    assert computed("sums") == 48
    assert computed("tokens", ld_alpha=0.5) == 48
    assert computed("tokens again", ld_alpha=0.2) == 0
    assert computed("sums again") == 0
    elsewhere = {"reference_cache_dir": tmp_path / "elsewhere"}
    assert computed("for later", reference_cache_level="token", **elsewhere) == 48
    assert computed("later", ld_alpha=0.5, **elsewhere) == 0


# --------------------------------------------------------------------------------------------------- what a model is


def test_a_key_is_that_of_the_facts() -> None:
    key = StoreKey(model={"a": "1"}, numerics={"dtype": "float32"})
    assert key.digest == StoreKey(model={"a": "1"}, numerics={"dtype": "float32"}).digest
    others = [
        StoreKey(model={"a": "2"}, numerics={"dtype": "float32"}),
        StoreKey(model={"a": "1"}, numerics={"dtype": "x"}),
    ]
    assert len({key.digest, *(other.digest for other in others)}) == 3


def resize_embeddings(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.resize_token_embeddings(loaded.config.vocab_size + 8)
    loaded.save_pretrained(model)


def change_a_weight_and_restore_the_times(model: Path) -> None:
    path = model / "model.safetensors"
    before = path.stat()
    weights = load_weights(path)
    weights["model.norm.weight"][0] += 0.5
    content = path.read_bytes()
    save_weights(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == before.st_size
    assert path.read_bytes() != content
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [resize_embeddings, change_a_weight_and_restore_the_times])
def test_changed_weights_are_computed_anew(
    change: Callable[[Path], None],
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(open_po.model_files, "_SETTLED_NS", 0)  # hashes are remembered at once
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    for name, expected in (("first", 24), ("again", 0)):
        run = cli.train(model, pairs_file, tmp_path / name, max_train_steps=1)
        assert cli.summary(run)["reference"]["pairs_computed"] == expected
    (old,) = stores(tmp_path / "reference")
    change(model)
    run = cli.train(model, pairs_file, tmp_path / "second", max_train_steps=1)
    assert cli.summary(run)["reference"]["pairs_computed"] == 24
    shutil.rmtree(old)
    assert_same(stored(tmp_path / "reference"), expected_rows(model, tiny.text_rows(24)))


def adapters_for(base: Path, folder: Path, seed: int = 0) -> PeftModel:
    """A folder of LoRA adapters that change `base`."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tiny.make_tokenizer(folder)
    return model


def test_adapters_are_a_model_and_so_is_what_they_are_merged_into(
    llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Other adapters, another base and the merged weights are other models, each computed by itself."""
    base = shutil.copytree(llama, tmp_path / "base")
    adapted, merged = tmp_path / "adapted", tmp_path / "merged"
    adapters_for(base, adapted).merge_and_unload().save_pretrained(merged)
    tiny.make_tokenizer(merged)

    def computed(name: str, reference: Path) -> Path:
        cache = tmp_path / f"cache of {name}"
        fields = {"reference_model_name_or_path": reference, "reference_cache_dir": cache, "max_train_steps": 1}
        run = cli.train(llama, pairs_file, tmp_path / "runs" / name, **fields)
        assert cli.summary(run)["reference"]["pairs_computed"] == 24
        return cache

    expected = expected_rows(merged, tiny.text_rows(24))
    first, second = computed("unmerged", adapted), computed("merged", merged)
    assert_same(stored(first), expected)
    assert_same(stored(second), expected)
    assert stores(first)[0].name != stores(second)[0].name
    plain = expected_rows(llama, tiny.text_rows(24))
    assert max(abs(plain[key][0] - expected[key][0]) for key in plain) > 0.1, "the adapters change something"

    identity = model_identity(ModelSource(name=str(adapted)), tmp_path / "nowhere")
    assert {"adapter_config.json", "adapter_model.safetensors", "base/config.json", "base/model.safetensors"} == set(
        identity
    )
    adapters_for(base, adapted, seed=1)
    others = [model_identity(ModelSource(name=str(adapted)), tmp_path / "nowhere")]
    weights = load_weights(base / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_weights(weights, base / "model.safetensors", metadata={"format": "pt"})
    others.append(model_identity(ModelSource(name=str(adapted)), tmp_path / "nowhere"))
    assert [sum(identity[name] != other[name] for name in identity) for other in others] == [1, 2]


def oddly_named(model: Path, folder: Path, factor: float = 1.0) -> Path:
    """A model in files that only its index names."""
    shutil.copytree(model, folder)
    weights = {name: factor * tensor for name, tensor in load_weights(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = {name: f"model_0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)}
    for file in set(names.values()):
        save_weights({name: weights[name] for name in weights if names[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_weight_files_are_those_that_an_index_names(llama: Path, tmp_path: Path) -> None:
    one, two = oddly_named(llama, tmp_path / "one"), oddly_named(llama, tmp_path / "two", 1.5)
    first, second = (model_identity(ModelSource(name=str(folder)), tmp_path / "nowhere") for folder in (one, two))
    assert {name for name in first if first[name] != second[name]} == {
        "model_00001-of-00002.safetensors",
        "model_00002-of-00002.safetensors",
    }
    assert (load(two).base.model.embed_tokens.weight == 1.5 * load(one).base.model.embed_tokens.weight).all()
    (one / "model_00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model_00002-of-00002.safetensors: cannot be read \(No such file"):
        model_identity(ModelSource(name=str(one)), tmp_path / "nowhere")
    index = two / "model.safetensors.index.json"
    index.write_text('{"metadata": {}}')
    with pytest.raises(UserError, match=r"index.json: names no weight files \('weight_map'\); copy or download"):
        model_identity(ModelSource(name=str(two)), tmp_path / "nowhere")


def test_weight_files_that_an_index_names_are_downloaded(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = oddly_named(llama, tmp_path / "repository")
    (repository / "model.fp16.safetensors").write_bytes(b"another variant")
    (repository / "README.md").write_text("its card, for the licence")

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir(exist_ok=True)
        for path in repository.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.setattr(open_po.model_files, "snapshot_download", download)
    folder = ModelSource(name="someone/odd").folder()
    assert {path.name for path in folder.glob("*.safetensors")} == {
        "model_00001-of-00002.safetensors",
        "model_00002-of-00002.safetensors",
    }
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize("base", [None, "", "."])
def test_adapters_name_another_model_as_their_base(base: str | None, llama: Path, tmp_path: Path) -> None:
    adapted = tmp_path / "adapted"
    adapters_for(llama, adapted)
    path = adapted / "adapter_config.json"
    name = str(adapted) if base == "." else base
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    with pytest.raises(UserError, match=r"adapter_config.json: names no base model \(it is "):
        model_identity(ModelSource(name=str(adapted)), tmp_path / "nowhere")


def test_weights_are_not_mistaken_for_adapters_that_lie_beside_them(llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "adapter_model.safetensors").write_bytes(b"left over")
    identity = model_identity(ModelSource(name=str(model)), tmp_path / "nowhere")
    assert set(identity) == {"config.json", "model.safetensors"}


def test_adapters_trained_on_adapters_are_merged_and_others_name_their_base(
    llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """What `adapter/` holds, on the model that it names, is the model that was saved."""
    fields = {"use_lora": True, "lora_rank": 2, "learning_rate": 1e-2, "max_train_steps": 2}
    run = cli.train(llama, pairs_file, tmp_path / "runs" / "plain", **fields)
    named = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(llama)
    merged = model_identity(ModelSource(name=str(run / "adapter")), tmp_path / "nowhere")
    assert "base/model.safetensors" in merged
    scorer = load(run / "adapter")
    for name, weight in load_weights(run / "model.safetensors").items():
        assert (scorer.base.state_dict()[name] - weight).abs().max() < 1e-5, name
    adapters_for(llama, tmp_path / "adapted")
    above = cli.train(tmp_path / "adapted", pairs_file, tmp_path / "runs" / "above", **fields)
    assert not (above / "adapter").exists()
    start, end = load(tmp_path / "adapted").base.state_dict(), load_weights(above / "model.safetensors")
    assert 0 < max(float((start[name] - weight).abs().max()) for name, weight in end.items()) < 0.2


def test_another_revision_is_another_model(
    llama: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the Hub's own cache folder, as it is after two revisions were downloaded."""
    hub = tmp_path / "hub"
    repository = hub / "models--someone--llama"
    other = tiny.make_model_folder(tmp_path / "other", seed=3)
    for revision, folder in (("main", llama), ("v2", other)):
        commit = hashlib.sha1(revision.encode()).hexdigest()
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))

    def reference(name: str, revision: str | None) -> dict[str, Any]:
        fields = {"reference_model_name_or_path": "someone/llama", "reference_model_revision": revision}
        run = cli.train(llama, pairs_file, tmp_path / name, max_train_steps=1, **fields)
        found: dict[str, Any] = cli.summary(run)["reference"]
        return found

    assert reference("main", None)["pairs_computed"] == 24
    assert_same(stored(tmp_path / "reference"), expected_rows(llama, tiny.text_rows(24)))
    assert reference("again", "main")["pairs_computed"] == 0
    (first,) = stores(tmp_path / "reference")
    assert reference("v2", "v2")["pairs_computed"] == 24
    shutil.rmtree(first)
    assert_same(stored(tmp_path / "reference"), expected_rows(other, tiny.text_rows(24)))


def test_files_are_hashed_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    opened_files: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, name: Any) -> Any:
        opened_files.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(open_po.model_files.hashlib, "file_digest", counted)

    def identity() -> dict[str, str]:
        opened_files.clear()
        return model_identity(ModelSource(name=str(model)), tmp_path)

    first = identity()
    assert sorted(opened_files) == ["config.json", "model.safetensors"]
    assert identity() == first
    assert sorted(opened_files) == ["config.json", "model.safetensors"], "too young to be trusted not to change again"
    monkeypatch.setattr(open_po.model_files, "_SETTLED_NS", 0)
    assert identity() == first
    assert identity() == first
    assert opened_files == []
    time.sleep(0.01)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    changed = identity()
    assert opened_files == ["config.json"]
    assert {name for name in first if first[name] != changed[name]} == {"config.json"}
    (tmp_path / "file_hashes.json").write_text("{broken")
    assert identity() == changed


def test_a_reference_with_another_tokenizer_is_refused(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tiny.make_model_folder(tmp_path / "other", seed=3)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    swapped = {vocabulary["y"]: "z", vocabulary["z"]: "y"}
    tokenizer["model"]["vocab"] = {swapped.get(number, token): number for token, number in vocabulary.items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = cli.arguments(llama, pairs_file, tmp_path / "run", reference_model_name_or_path=other)
    line = cli.failure(capsys, words)
    assert f"reference_model_name_or_path: {other} was trained with another tokenizer than the policy, id " in line
    assert "is 'z' there and 'y' here" in line
    for path in other.glob("*token*"):
        path.unlink()
    assert cli.main([*words, "--max_train_steps", "1"]) == 0, "a reference without a tokenizer is taken"
