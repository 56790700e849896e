"""A vocabulary with more entries: every old token keeps its id and its merges, new merges come after the old ones.

Byte pair encoding joins by the rank of its merges. With new merges behind the old, a text is first cut as it always
was, and then some neighbours are joined: text without a new token keeps its ids, and a new token takes the place of a
fixed row of old ones, the mean of whose embeddings it starts from.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from gpt import signals
from gpt.tokenizer import MIN_FREQUENCY, Tokenizer

if TYPE_CHECKING:  # data is prepared without torch
    from torch import Tensor

PRIVATE = 0x10000  # from here on every number is a character, over a million of them: each stands for an old token
LARGEST = 0x110000 - PRIVATE
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def learn(old: Tokenizer, texts: Iterable[str], n: int) -> Tokenizer:
    """`old` and `n` tokens more, learned on `texts` as `old` cuts them; their ids are `old.size` and up.

    ValueError if the vocabulary cannot grow or the texts do not support so many.
    """
    _check_can_grow(old)
    if not 1 <= n <= LARGEST - old.size:
        raise ValueError(f"grow: {n} new tokens; expected 1 to {LARGEST - old.size}")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=old.size + n + n // 8 + 64,  # some are left out below
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=[chr(PRIVATE + token) for token in range(old.size)],
        show_progress=False,
    )
    backend.train_from_iterator(_as_characters(old, texts), trainer)
    learned = json.loads(backend.to_str())["model"]["merges"]
    names = {token: name for name, token in old.vocab.items()}
    entries, usable, merges = set(old.vocab), set(backend.get_vocab()), []
    for left, right in learned:
        pair = tuple("".join(names[ord(char) - PRIVATE] for char in part) for part in (left, right))
        if {left, right} <= usable and (made := "".join(pair)) not in entries:
            entries.add(made)
            merges.append(pair)
        else:  # the old vocabulary has the entry and never reaches it; it must stay so, and what is made of it too
            usable.discard(left + right)
    if len(merges) < n:
        raise ValueError(
            f"grow: {n} new tokens are more than the text supports: it has {len(merges)}, everything that occurs twice"
            f" included; set grow={len(merges)} or less"
        )
    return _grown(old, merges[:n])


def _as_characters(old: Tokenizer, texts: Iterable[str]) -> Iterator[str]:
    """Each text with a private character for each of its old tokens, and a space between pre-tokens."""
    for text in texts:
        signals.check()
        ids, words = old.words(text)
        characters = np.insert(ids + PRIVATE, np.flatnonzero(np.diff(words)) + 1, ord(" "))
        yield characters.astype("<u4").tobytes().decode("utf-32-le")


def add(old: Tokenizer, entries: Sequence[str]) -> Tokenizer:
    """`old` and as many tokens more as it takes until each entry, as a text of its own, is one token.

    Entries that are one already need nothing. The tokens between an entry's old pieces and the whole are new too.
    ValueError names entries that the rules would cut, whatever the vocabulary holds.
    """
    _check_can_grow(old)
    names = {token: name for name, token in old.vocab.items()}
    known = dict(old.vocab)
    rank: dict[tuple[str, str], int] = {}
    impossible = []
    for entry in dict.fromkeys(entries):
        signals.check()
        ids, words = old.words(entry)
        parts = [names[token] for token in ids]
        whole = "".join(parts)
        if not parts or words[0] != words[-1] or (len(parts) > 1 and whole in old.vocab):
            impossible.append(entry)
            continue
        while found := [pair for pair in pairwise(parts) if pair in rank]:
            parts = _joined(parts, min(found, key=rank.__getitem__))
        while len(parts) > 1:
            pair = next((p for p in pairwise(parts) if "".join(p) not in known), None)
            if pair is None:
                impossible.append(entry)
                break
            known["".join(pair)] = old.size + len(rank)
            rank[pair] = len(rank)
            parts = _joined(parts, pair)
    if impossible:
        shown = ", ".join(repr(entry[:40]) for entry in impossible[:5])
        raise ValueError(
            f"{len(impossible)} entries cannot become one token each, as {shown}: they are empty, lie in several of the"
            " pieces that text is cut into first, or are in the vocabulary where its merges never reach them; leave"
            " them out"
        )
    return _grown(old, list(rank))


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """`parts` with every `pair` of neighbours joined, from the left."""
    out, i = [], 0
    while i < len(parts):
        both = tuple(parts[i : i + 2]) == pair
        out.append("".join(pair) if both else parts[i])
        i += 2 if both else 1
    return out


def replaced(old: Tokenizer, new: Tokenizer) -> dict[int, tuple[int, ...]]:
    """Each new id -> the old ids whose place it takes; nothing if `new` is `old`.

    ValueError if `new` is not `old` grown: with its rules, its entries under their ids, and its merges first.
    """
    before, after = _canonical(old), _canonical(new)
    rules = [_rules(raw) for raw in (before, after)]
    if rules[0] != rules[1] or _added(before) != _added(after) or old.control_ids != new.control_ids:
        raise ValueError(f"the tokenizer is not the old one grown: its rules or control tokens differ; {HOW}")
    moved = [name for name, token in old.vocab.items() if new.vocab.get(name) != token]
    if moved:
        raise ValueError(f"the tokenizer is not the old one grown: {moved[0]!r} has another id; {HOW}")
    if old.vocab == new.vocab and before["model"] == after["model"]:
        return {}
    _check_can_grow(old)
    first, then = _merges(before), _merges(after)
    if then[: len(first)] != first:
        raise ValueError(f"the tokenizer is not the old one grown: its first merges are not the old ones; {HOW}")
    pieces: dict[str, tuple[int, ...]] = {name: (token,) for name, token in old.vocab.items()}
    for left, right in then[len(first) :]:
        if (made := left + right) in pieces:
            raise ValueError(f"the tokenizer is not the old one grown: {made!r} has a second merge; {HOW}")
        pieces[made] = pieces[left] + pieces[right]
    new_ids = {name: token for name, token in new.vocab.items() if name not in old.vocab}
    if strange := new_ids.keys() - pieces.keys():
        raise ValueError(f"the tokenizer is not the old one grown: no merge makes {min(strange)!r}; {HOW}")
    return {token: pieces[name] for name, token in sorted(new_ids.items(), key=lambda item: item[1])}


HOW = "grow it with data/prepare.py (grow or add_tokens), or train from scratch"


def table(old: Tokenizer, new: Tokenizer) -> Iterator[str]:
    """Lines for people to read: id, token and the old tokens it takes the place of, between tabs; tokens as JSON."""

    def shown(token: int) -> str:
        return json.dumps(new.piece(token), ensure_ascii=False)

    yield "id\ttoken\ttakes the place of"
    for token, pieces in replaced(old, new).items():
        yield f"{token}\t{shown(token)}\t{' '.join(shown(piece) for piece in pieces)}"


def extend(
    state: "Mapping[str, Tensor]", old: Tokenizer, new: Tokenizer, rows: int | None = None
) -> "dict[str, Tensor]":
    """The model's state for `new`: old rows of the embedding and the head as they are, a new token's the mean of those
    it replaces, `rows` in all (default `new.padded_size`, or as many as there are). Other tensors are not copied.

    What pads the end keeps its values, or has the mean of all rows where there was none.
    """
    places = replaced(old, new)
    out = dict(state)
    for name in (EMBEDDING, HEAD):
        if name in state:
            out[name] = _extended(state[name], old.size, places, rows or max(new.padded_size, len(state[name])))
    if EMBEDDING in state and HEAD in state and state[EMBEDDING].data_ptr() == state[HEAD].data_ptr():
        out[HEAD] = out[EMBEDDING]
    return out


def _extended(weight: "Tensor", n_old: int, places: Mapping[int, tuple[int, ...]], rows: int) -> "Tensor":
    """weight (V, C) -> (rows, C)."""
    top = max(places, default=n_old - 1) + 1
    if rows < max(len(weight), top) or len(weight) < n_old:
        raise ValueError(f"{rows} rows for {top} ids and {len(weight)} rows before; expected as many or more")
    out = weight.new_empty(rows, weight.shape[1])
    out[: len(weight)] = weight
    out[len(weight) :] = weight[:n_old].float().mean(dim=0)
    for token, pieces in places.items():
        out[token] = weight[list(pieces)].float().mean(dim=0)
    return out


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    """A copy of its tokenizer.json."""
    return json.loads(tokenizer.files()["tokenizer.json"])


def _canonical(tokenizer: Tokenizer) -> dict[str, Any]:
    """Its tokenizer.json as the library writes it, defaults included: files of other origins differ in what they say."""
    return json.loads(Backend.from_str(json.dumps(_content(tokenizer))).to_str())


def _rules(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What decides ids and text beside the entries and merges."""
    model = {key: value for key, value in raw["model"].items() if key not in ("vocab", "merges")}
    decoder = raw["decoder"] or {}
    decoder = "ByteLevel" if decoder.get("type") == "ByteLevel" else decoder  # its settings are for other uses
    return {"model": model, "decoder": decoder} | {key: raw[key] for key in ("normalizer", "pre_tokenizer")}


def _added(raw: Mapping[str, Any]) -> list[tuple[str, bool]]:
    return sorted((token["content"], token["special"]) for token in raw.get("added_tokens") or [])


def _merges(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs: older files write them as one string with a space."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in raw["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _check_can_grow(old: Tokenizer) -> None:
    raw = _content(old)
    model = raw["model"]
    why = None
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        why = f"is a vocabulary of kind {model.get('type')}, which has no merges"
    elif (raw.get("decoder") or {}).get("type") != "ByteLevel":
        why = "does not spell its entries in bytes, as SentencePiece's do not"
    elif model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        why = "drops merges at random or marks the inside of words"
    if why:
        raise ValueError(f"the tokenizer cannot grow: it {why}; only byte-level BPE can (GPT-2's, Llama 3's, ours)")


def _grown(old: Tokenizer, merges: Sequence[tuple[str, ...]]) -> Tokenizer:
    raw = _content(old)
    model = raw["model"]
    control = {token["content"]: old.vocab[token["content"]] for token in raw.get("added_tokens") or []}
    # Tokens beside the model's vocabulary would be numbered from its end, which moves: they are written into it.
    model["vocab"] |= control | {left + right: old.size + i for i, (left, right) in enumerate(merges)}
    model["merges"] = [list(pair) for pair in (*_merges(raw), *merges)]
    config = json.loads(old.files()["tokenizer_config.json"])
    return Tokenizer(raw, config, "the grown tokenizer")
