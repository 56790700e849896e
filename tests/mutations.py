"""Syncs, checks and branches that the promises stand on, each taken away in a copy of the tree: a named test must fail.

python tests/mutations.py           all of them
python tests/mutations.py durable   those of a room, or with a word in their name

An entry whose text no longer stands in the source once is a failure itself: it proves nothing any more.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from proving import Row

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60  # for one test; one that does not end has failed


class Mutant(NamedTuple):
    """`old` stands once in gpt/`room`.py and becomes `new`; then the tests `caught_by` of tests/test_`room`.py fail."""

    room: str
    name: str
    old: str
    new: str
    caught_by: str


def _of(room: str, *entries: tuple[str, str, str, str]) -> list[Mutant]:
    return [Mutant(room, *entry) for entry in entries]


MUTANTS = [
    *_of(
        "durable",
        (
            "a sync is one of the system",
            "        os.fsync(fd)\n",
            "        pass\n",
            "a_sync_is_one_of_the_operating_system",
        ),
        ("a new file is never one that exists", "os.O_EXCL | ", "", "a_temporary_that_exists_is_not_written_into"),
        (
            "a file is synced",
            "        fs.fsync(fd)\n    finally:\n        os.close(fd)\n    return digest",
            "        pass\n    finally:\n        os.close(fd)\n    return digest",
            "everything_is_synced_before_it_is_renamed",
        ),
        (
            "a file's name is synced",
            "    _sync_directory(path.parent)\n    return digest",
            "    return digest",
            "everything_is_synced_before_it_is_renamed",
        ),
        (
            "a failed file is cleared away",
            "        _discard(temporary)\n        raise",
            "        raise",
            "a_file_is_old_or_new_whatever_operation_fails",
        ),
        (
            "a file appears by a rename",
            "        fs.rename(temporary, path)\n",
            "        shutil.copy(temporary, path)\n",
            "a_file_is_old_or_new_whatever_operation_fails",
        ),
        (
            "a short write goes on",
            "view = view[fs.write(fd, view[:BLOCK]) :]",
            "fs.write(fd, view[:BLOCK]), (view := view[BLOCK:])",
            "a_write_that_is_cut_short_goes_on",
        ),
        (
            "every part is hashed",
            "            digest.update(view)\n",
            "            pass\n",
            "a_file_is_replaced_whole_and_its_hash_returned",
        ),
        (
            "a directory is not written over",
            "        if self.path.exists():\n            raise FileExistsError",
            "        if False:\n            raise FileExistsError",
            "a_directory_that_exists_is_never_written_over",
        ),
        (
            "a directory's files are plain",
            "        if not is_plain(name):\n",
            "        if False:\n",
            "a_name_that_could_leave_its_directory",
        ),
        (
            "a directory is synced",
            "                _sync_directory(self._temporary)\n",
            "",
            "everything_is_synced_before_it_is_renamed",
        ),
        (
            "a directory's name is synced",
            "        if kind is None:\n            _sync_directory(self.path.parent)",
            "        if kind is None:\n            pass",
            "everything_is_synced_before_it_is_renamed",
        ),
        (
            "a failed directory does not appear",
            "            if kind is None:\n                _sync",
            "            if True:\n                _sync",
            "an_error_while_content_is_made",
        ),
        (
            "a failed directory is cleared away",
            "        finally:\n            _discard(self._temporary)\n",
            "        finally:\n            pass\n",
            "a_directory_is_whole_or_absent_whatever_operation_fails",
        ),
        (
            "a made directory's name is synced",
            "            _sync_directory(directory.parent)\n",
            "            pass\n",
            "everything_is_synced_before_it_is_renamed",
        ),
        (
            "two may make a directory",
            "            with suppress(FileExistsError):  #",
            "            with suppress():  #",
            "a_directory_that_another_process_makes_first",
        ),
        (
            "a directory is renamed before it is deleted",
            "    fs.rename(path, doomed)\n",
            "    doomed = path\n",
            "a_removed_directory_is_whole_or_absent",
        ),
        (
            "a directory is gone before it is deleted",
            "    _sync_directory(path.parent)\n    _discard(doomed)",
            "    _discard(doomed)",
            "everything_is_synced_before_it_is_renamed",
        ),
        ("published work is synced", "    _sync_directory(work)\n", "", "everything_is_synced_before_it_is_renamed"),
        (
            "a failed publication brings the old one back",
            "        if replaces:\n            fs.rename(old, target)\n        raise",
            "        raise",
            "publishing_leaves_the_old_or_the_new_directory_whole",
        ),
        (
            "a published name is synced",
            "    _sync_directory(target.parent)\n",
            "",
            "everything_is_synced_before_it_is_renamed",
        ),
        ("what was replaced goes", "    _discard(old)\n", "    pass\n", "when_everything_is_replaced_nothing_is_left"),
        (
            "a sweep takes temporaries alone",
            "        if TEMPORARY.fullmatch(path.name):\n",
            "        if path.name.startswith('.'):\n",
            "sweeping_deletes_temporaries_and_nothing_else",
        ),
        ("a plain name has no directory", "Path(name).name == name and ", "", "a_name_that_could_leave_its_directory"),
        ("a plain name is not hidden", ' and not name.startswith(".")', "", "a_name_that_could_leave_its_directory"),
        (
            "a found file is no link",
            "    if file.is_symlink() and (blobs",
            "    if False and (blobs",
            "a_link_is_not_followed_but_where_the_hub_made_it",
        ),
        ("space is counted", "    if free < n_bytes:\n", "    if False:\n", "space_is_checked_in_words"),
        (
            "a lock locks",
            "fcntl.flock(self._file, kind | fcntl.LOCK_NB)",
            "pass",
            "a_held_lock_says_who_holds_it or a_lock_is_free_after",
        ),
        (
            "a lock on a deleted file is none",
            "                if os.path.samestat(path.stat(), os.fstat(self._file.fileno())):\n                    break",
            "                if True:\n                    break",
            "a_lock_whose_file_was_deleted_while_it_was_waited_for",
        ),
        (
            "a lock without a disk says so",
            'except OSError as error:\n                self._file.close()\n                raise ValueError(f"{path} cannot',
            'except KeyError as error:\n                self._file.close()\n                raise ValueError(f"{path} cannot',
            "a_disk_without_locks_is_named",
        ),
    ),
    *_of(
        "checkpoint",
        ("weights are finite", "    if broken:\n", "    if False:\n", "a_weight_that_is_not_finite_is_not_saved"),
        (
            "a dtype is known",
            "        if tensor.dtype not in DTYPES:\n",
            "        if False:\n",
            "a_dtype_that_the_format_lacks",
        ),
        (
            "tensors begin aligned",
            "key=lambda item: -item[1].element_size()",
            "key=lambda item: item[0]",
            "header_and_tensors_begin_where",
        ),
        ("data begin aligned", '    text += b" " * (-len(text) % 8)\n', "", "header_and_tensors_begin_where"),
        (
            "a manifest is no link",
            "    if manifest.is_symlink():\n",
            "    if False:\n",
            "a_manifest_that_is_a_link_is_not_followed",
        ),
        (
            "a manifest's format is known",
            "    if version != FORMAT:\n",
            "    if False:\n",
            "another_format_of_checkpoint_is_named",
        ),
        (
            "a manifest names what is needed",
            "    if forgotten:\n",
            "    if False:\n",
            "a_manifest_that_vouches_for_less",
        ),
        (
            "the optimizer is needed",
            '        needed |= _numbered(OPTIMIZER, files, 0) or {"optimizer-00000-of-00001.safetensors"}\n',
            "",
            "every_file_that_resume_needs_is_vouched_for",
        ),
        (
            "all files of the optimizer are needed",
            '        needed |= _numbered(OPTIMIZER, files, 0) or {"optimizer-00000-of-00001.safetensors"}\n',
            '        needed |= set() if any(map(OPTIMIZER.fullmatch, files)) else {"optimizer-00000-of-00001.safetensors"}\n',
            "a_manifest_that_forgets_a_file",
        ),
        (
            "all files of the weights are needed",
            "({INDEX, *split} if split else",
            "({INDEX} if split else",
            "a_manifest_that_forgets_a_file",
        ),
        (
            "a written manifest is the one that was meant",
            "        if team.first and _manifest(path) != files_of_all:\n",
            "        if False:\n",
            "a_manifest_that_the_disk_changed",
        ),
        (
            "weights are told from what is none",
            "        if weights_file != ADAPTER_WEIGHTS:\n",
            "        if len(files) > 1:\n",
            "an_index_keeps_others",
        ),
        (
            "the state is needed",
            "needed = {STATE, SETTINGS} |",
            "needed = {SETTINGS} |",
            "every_file_that_resume_needs_is_vouched_for",
        ),
        (
            "a manifest's names are plain",
            "not durable.is_plain(name) or file.is_symlink()",
            "file.is_symlink()",
            "no_name_in_a_manifest_leaves_its_directory",
        ),
        (
            "a manifest's files are no links",
            "not durable.is_plain(name) or file.is_symlink()",
            "not durable.is_plain(name)",
            "no_name_in_a_manifest_leaves_its_directory",
        ),
        (
            "a manifest's files are there",
            "        if not file.is_file():\n",
            "        if False:\n",
            "every_changed_file_is_named",
        ),
        (
            "a manifest's hashes are right",
            "        if sums[name] != sha256:\n",
            "        if False:\n",
            "every_changed_file_is_named",
        ),
        (
            "the newest is verified",
            "        verify(self.path(step), team)\n        return",
            "        return",
            "a_corrupt_latest_checkpoint_is_an_error",
        ),
        (
            "the newest is the newest",
            "team.told(max(self.steps(), default=None))",
            "team.told(min(self.steps(), default=None))",
            "the_latest_checkpoint_is_the_highest_whole_step",
        ),
        ("the best is kept", " if step not in (best, *besides)]", "]", "the_newest_and_the_best_are_kept"),
        ("the newest are kept", "steps[: -self.keep]", "steps[: -1]", "the_newest_and_the_best_are_kept"),
        (
            "nothing goes before the newest is whole",
            "        if doomed and steps[-1] != whole:\n",
            "        if False:\n",
            "nothing_is_deleted_while_the_newest_is_not_whole",
        ),
    ),
    *_of(
        "saving",
        (
            "weights are finite before they are copied",
            "            check_finite(path, weights)\n",
            "            pass\n",
            "a_weight_that_is_not_finite_is_found_before",
        ),
        (
            "what is written is a copy",
            "                weights, optimizer = self._copies(weights, optimizer)\n",
            "                self._copies(weights, optimizer)\n",
            "what_is_saved_is_the_state_of_the_step",
        ),
        (
            "one write waits for another",
            "        self.wait()\n        with self.team.together():\n            check_finite",
            "        with self.team.together():\n            check_finite",
            "one_write_waits_for_another",
        ),
        (
            "copies of neighbours count",
            "here = sum(self.team.gather(more)[first : first + each])",
            "here = [more for _ in self.team.gather(more)][0]",
            "ranks_of_one_machine_share_its_memory",
        ),
        (
            "what is logged is on the disk first",
            "            before()\n",
            "            pass\n",
            "what_one_rank_meets_all_raise",
        ),
        (
            "others go only afterwards",
            "        save(path, self._aside, weights=weights, optimizer=optimizer, **rest)\n"
            "        with self._aside.together():\n            if self.team.first:\n                after()\n",
            "        with self._aside.together():\n            if self.team.first:\n                after()\n"
            "        save(path, self._aside, weights=weights, optimizer=optimizer, **rest)\n",
            "written_beside_the_training_or_not",
        ),
        (
            "what a write met is kept",
            "            self._error = error\n",
            "            pass\n",
            "what_a_write_met_is_raised_by_the_next_check",
        ),
        (
            "a failed write is heard while others go on",
            " or any(failed for _, failed in told):\n",
            " and False:\n",
            "what_a_write_met_is_raised_by_the_next_check",
        ),
        (
            "what the last write met is raised",
            "        if kind is None:\n            self.wait()\n",
            "        if kind is None:\n            self._join()\n",
            "what_one_rank_meets_all_raise",
        ),
        (
            "a write in flight is finished whatever happens",
            "there is nobody to talk to\n            self._join()\n",
            "there is nobody to talk to\n            pass\n",
            "the_write_in_flight_is_finished",
        ),
    ),
    *_of(
        "slices",
        (
            "a block lies in its whole",
            "        if all(type(n) is type(o) is int and",
            "        if True or all(type(n) is type(o) is int and",
            "a_block_that_does_not_lie_in_its_whole",
        ),
        (
            "blocks are of one tensor",
            "            if first.shape != shape or (first.pieces and first.pieces[0].stored.dtype != entry.dtype):\n",
            "            if False:\n",
            "do_not_hold_every_element_once",
        ),
        (
            "no element stands twice",
            "            if overlap(piece.offset, shape, other.offset, other.stored.shape) is not None:\n",
            "            if False:\n",
            "do_not_hold_every_element_once",
        ),
        (
            "no element is missing",
            "    if there != needed:\n",
            "    if False:\n",
            "do_not_hold_every_element_once",
        ),
        (
            "every tensor is looked at",
            "        _check(name, each)\n",
            "        pass\n",
            "do_not_hold_every_element_once",
        ),
        (
            "a part of a block is found in it",
            "inside = tuple(at - start for at, start in zip(common[0], begin, strict=True))",
            "inside = tuple(0 for _ in begin)",
            "what_any_ranks_wrote_any_ranks_read",
        ),
        (
            "another dtype is converted",
            '(target.dtype, target.device.type) == (dtype, "cpu")',
            'target.device.type == "cpu"',
            "what_any_ranks_wrote_any_ranks_read",
        ),
    ),
    *_of(
        "shards",
        (
            "written ids are in the vocabulary",
            "    low, high = ids.min(), ids.max()\n    if low < 0 or high >= vocab_size:\n",
            "    low, high = ids.min(), ids.max()\n    if False:\n",
            "a_wrong_document_is_refused_and_nothing_written",
        ),
        (
            "written arrays are in the vocabulary",
            "default=0)\n    if low < 0 or high >= vocab_size:\n",
            "default=0)\n    if False:\n",
            "arrays_outside_the_vocabulary_are_refused",
        ),
        (
            "written spans are inside",
            "        if not 0 <= span.start < span.end <= len(ids):\n",
            "        if False:\n",
            "a_wrong_document_is_refused_and_nothing_written",
        ),
        (
            "a shard is no link",
            "        if not plain:\n",
            "        if False:\n",
            "a_missing_or_linked_shard_is_refused",
        ),
        (
            "a shard is one",
            '        if header["magic"] != MAGIC:\n',
            "        if False:\n",
            "a_file_that_is_no_shard_is_said_to_be_none",
        ),
        (
            "a shard's version is known",
            '        if header["version"] != VERSION:\n',
            "        if False:\n",
            "other_format_versions_are_named",
        ),
        (
            "a header is whole",
            '        if header["checksum"] != _header_checksum(header):\n',
            "        if False:\n",
            "a_changed_header_is_found_at_open",
        ),
        (
            "ids fit the vocabulary",
            '        if header["token_bytes"] != token_dtype(vocab_size).itemsize or header["max_id"] >= vocab_size:\n',
            "        if False:\n",
            "a_shard_sealed_again_with_other_numbers",
        ),
        (
            "a shard's tokenizer is the set's",
            '        if header["tokenizer"] != tokenizer_sha256.encode(errors="surrogatepass"):\n',
            "        if False:\n",
            "a_shard_of_another_data_set_is_refused",
        ),
        (
            "a shard's counts are the manifest's",
            "        if found != named:\n",
            "        if False:\n",
            "a_shard_sealed_again_with_other_numbers",
        ),
        (
            "a shard's size is right",
            "        if size != expected:\n",
            "        if False:\n",
            "a_cut_or_lengthened_shard_is_refused_at_open",
        ),
        (
            "a short read is an error",
            "        if len(data) != count:\n",
            "        if False:\n",
            "a_shard_cut_off_while_open_is_an_error",
        ),
        (
            "blocks are verified before they are read",
            "            for block in blocks:\n                self._verify(block)\n",
            "            pass\n",
            "every_flipped_byte_of_a_shard_is_found",
        ),
        (
            "a block's hash is right",
            "            if hashlib.sha256(data).digest() != self._hashes[32 * block : 32 * block + 32]:\n",
            "            if False:\n",
            "every_flipped_byte_of_a_shard_is_found",
        ),
        (
            "a bad block stays unread",
            '                raise self._corrupt(f"bytes {start} to',
            '                self.verified[block] = 1\n                raise self._corrupt(f"bytes {start} to',
            "a_block_is_hashed_once_and_damage_elsewhere",
        ),
        (
            "documents follow one another",
            "        if bounds[0] != 0 or np.any(np.diff(bounds) <= 0):\n",
            "        if False:\n",
            "a_shard_whose_index_or_spans_make_no_sense",
        ),
        (
            "spans are inside",
            "        if not inside.all() or np.any(np.diff(starts) < 0):\n",
            "        if False:\n",
            "a_shard_whose_index_or_spans_make_no_sense",
        ),
        (
            "the index agrees with the manifest",
            '            if part["n_bytes"].sum() != entry.n_bytes or np.any(part["source"] >= len(self.sources)):\n',
            "            if False:\n",
            "a_shard_whose_index_or_spans_make_no_sense",
        ),
        (
            "reads are inside the split",
            "        if start < 0 or count < 0 or start + count > self.n_tokens:\n",
            "        if False:\n",
            "reading_outside_the_split_is_refused",
        ),
        (
            "rows are inside the split",
            "        if starts.min() < 0 or starts.max() + width > self.n_tokens:\n",
            "        if False:\n",
            "rows_read_together_are_those_read_alone",
        ),
        (
            "rows are of verified blocks",
            "        known = n_bytes <= BLOCK and bool(",
            "        known = True or bool(",
            "damage_and_truncation_are_found_when_rows",
        ),
        (
            "short rows are an error",
            "            if len(data) == n * n_bytes:",
            "            data = data.ljust(n * n_bytes, bytes(1))\n            if True:",
            "damage_and_truncation_are_found_when_rows",
        ),
        (
            "a whole shard's hash is right",
            "            if sha256_file(self.path / entry.file) != entry.sha256:\n",
            "            if False:\n",
            "a_block_is_hashed_once_and_damage_elsewhere",
        ),
        (
            "a data set's manifest is no link",
            "    if file.is_symlink():\n",
            "    if False:\n",
            "a_manifest_that_is_a_link_is_not_followed",
        ),
        (
            "a manifest is sealed",
            "    if not whole or not typed:\n",
            "    if not typed:\n",
            "every_flipped_byte_of_a_manifest_is_found",
        ),
        (
            "a manifest's values are typed",
            "    if not whole or not typed:\n",
            "    if not whole:\n",
            "a_manifest_that_makes_no_sense_is_refused",
        ),
        (
            "a manifest's version is known",
            "    if version != VERSION:\n",
            "    if False:\n",
            "other_format_versions_are_named",
        ),
        (
            "an entry's counts are numbers",
            "    if not all(type(n) is int and n >= 0 for n in counts) or ",
            "    if ",
            "a_manifest_that_makes_no_sense_is_refused",
        ),
        (
            "an entry's file is in the directory",
            "    if not is_plain(entry.file):\n",
            "    if False:\n",
            "a_manifest_that_makes_no_sense_is_refused",
        ),
    ),
]


def mutated(mutant: Mutant) -> str:
    """The room's text with the mutant in it; ValueError if the entry does not fit it any more."""
    text = (ROOT / "gpt" / f"{mutant.room}.py").read_text(encoding="utf-8")
    if (n := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.room}: {mutant.name}: its text stands {n} times in the source; expected once")
    text = text.replace(mutant.old, mutant.new)
    ast.parse(text)
    return text


def _copied(tree: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", ".*", "runs")
    for name in ("gpt", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tree)


def _failed(tree: Path, room: str, words: str) -> bool | None:
    """Whether tests of the copy with `words` in their names fail; None if none ran.

    In a child that has what they import loaded already, all but the copy itself.
    """
    child = os.fork()
    if child == 0:
        code = 99
        try:
            out = os.open(tree / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(out, 1), os.dup2(out, 2)
            os.chdir(tree)
            sys.path[:0] = [str(tree), str(tree / "tests")]
            sys.dont_write_bytecode = True
            import pytest

            file = str(tree / "tests" / f"test_{room}.py")
            flags = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"-otimeout={PATIENCE_S}"]
            flags += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
            places = [f"--rootdir={tree}", f"--basetemp={tree / 'tmp'}"]
            code = int(pytest.main([file, "-k", words, *places, *flags]))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return {0: False, 1: True}.get(os.waitstatus_to_exitcode(status))


def _preloaded() -> None:
    """What every test imports, once, before the forks: nothing of this project."""
    import hypothesis  # noqa: F401
    import jinja2.sandbox  # noqa: F401
    import numpy  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch.nn.attention.flex_attention  # noqa: F401
    import yaml  # noqa: F401


def attempts(mutants: Sequence[Mutant]) -> Iterator[tuple[str, bool, float, str]]:
    """(name, whether it is caught, seconds, what is wrong if not) of each, from a process that knows nothing of the tree."""
    command = [sys.executable, __file__, "--child", json.dumps(mutants)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as child:
        assert child.stdout is not None
        yield from (tuple(json.loads(line)) for line in child.stdout)
    if child.returncode:
        raise RuntimeError(f"the process ended: {child.returncode}")


def _attempts(mutants: Sequence[Mutant]) -> Iterator[tuple[str, bool, float, str]]:
    """First that the named tests pass without a mutant, then each."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        tree.mkdir()
        _copied(tree)
        _preloaded()
        for room in dict.fromkeys(mutant.room for mutant in mutants):
            began = time.monotonic()
            words = " or ".join(dict.fromkeys(each.caught_by for each in mutants if each.room == room))
            if (failed := _failed(tree, room, words)) is not False:
                wrong = (tree / "said").read_text()[-2000:] if failed else "no test ran"
                yield f"{room}: as it is", False, time.monotonic() - began, wrong
                return
        for mutant in mutants:
            began, name = time.monotonic(), f"{mutant.room}: {mutant.name}"
            file = tree / "gpt" / f"{mutant.room}.py"
            before = file.read_text(encoding="utf-8")
            try:
                file.write_text(mutated(mutant), encoding="utf-8")
                failed = _failed(tree, mutant.room, mutant.caught_by)
                wrong = {True: "", False: f"no test fails ({mutant.caught_by})", None: "no test ran"}
                yield name, failed is True, time.monotonic() - began, wrong[failed]
            except (ValueError, SyntaxError) as error:
                yield name, False, time.monotonic() - began, str(error)
            finally:
                file.write_text(before, encoding="utf-8")


def prove(scale: float, say: Callable[[str], None]) -> list[Row]:
    """Every mutant; below scale 1 an even choice of them."""
    n = max(1, round(min(scale, 1) * len(MUTANTS)))
    chosen = [MUTANTS[i * len(MUTANTS) // n] for i in range(n)]
    began, caught = time.monotonic(), 0
    for name, is_caught, seconds, wrong in attempts(chosen):
        caught += is_caught
        say(f"{'caught' if is_caught else 'NOT CAUGHT'}  {name}  {seconds:.1f} s  {wrong}".rstrip())
    return [Row("G2 G3", "syncs, checks and branches removed", len(chosen), caught, time.monotonic() - began)]


def main(words: list[str]) -> None:
    chosen = [mutant for mutant in MUTANTS if all(word in f"{mutant.room}: {mutant.name}" for word in words)]
    began = time.monotonic()
    results = list(attempts(chosen))
    for name, is_caught, seconds, wrong in results:
        print(f"{'caught' if is_caught else 'NOT CAUGHT':10} {name:56} {seconds:5.1f} s  {wrong}".rstrip())
    print(f"{sum(row[1] for row in results)} of {len(chosen)} caught, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        for row in _attempts([Mutant(*each) for each in json.loads(sys.argv[2])]):
            print(json.dumps(row), flush=True)
    else:
        main(sys.argv[1:])
