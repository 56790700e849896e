"""What a data set is made of: which text, how it is split, which vocabulary."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gpt import tokenizer as tokenizers
from gpt.config import Count, Settings
from gpt.corpus import Source
from gpt.tokenizer import Kind


def _as_sources(value: object) -> object:
    """One input or a list of them; a bare string is a path, or a URL with an optional #sha256=..."""
    if not isinstance(value, (list, tuple)):
        value = (value,)
    if not value:
        raise ValueError("it names nothing to read")
    return tuple(as_source(each) if isinstance(each, str) else each for each in value)


def as_source(text: str) -> dict[str, str | None]:
    """The input that a bare string means: a URL, perhaps with #sha256=..., hub:ORG/NAME, or a path."""
    if text.startswith("hub:"):
        return {"hub": text.removeprefix("hub:")}
    if text.startswith(("http://", "https://")):
        url, _, sha256 = text.partition("#sha256=")
        return {"url": url, "sha256": sha256 or None}
    return {"path": text}


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class PrepareConfig(Settings):
    """A recipe: what to read, how to split it, which tokenizer."""

    input: Sources = Field(
        description="what to read: paths, globs, '-', URLs, hub:ORG/NAME, or sections with path, url, hub or python"
    )
    validation: Sources | None = Field(
        None, description="inputs that are the validation split; null: it is cut from `input`"
    )
    split: Literal["auto", "hash", "tail"] = Field(
        "auto",
        description="hash: whole documents, by their content; tail: the end of each; auto: tail below 20 documents",
    )
    val_fraction: float = Field(0.1, gt=0, lt=1, description="part of the bytes that is held out for validation")
    val_tokens: Count = Field(
        10_000_000, ge=1, description="most tokens held out (as the tokenizer's sample predicts them)"
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="documents with the text of an earlier one; they are counted either way"
    )
    kind: Kind = Field(
        "bpe",
        description="vocabulary of byte pairs, of single characters, of words, or of the integers of `ids` inputs",
    )
    vocab_size: Count | None = Field(
        None,
        ge=1,
        description="entries, control tokens included; null: the square root of the corpus's bytes, rounded to a power of "
        "two, from 512 to 65536 (characters: all of them)",
    )
    tokenizer: str | None = Field(
        None,
        description="a tokenizer.json, .tiktoken or SentencePiece file, a directory with GPT-2's two, or a data set, run "
        "(RUN@STEP) or model (hub:ORG/NAME) whose tokenizer to use",
    )
    grow: Count | None = Field(
        None,
        ge=1,
        description="how many tokens to learn on this text beside those of `tokenizer`, which keep their ids",
    )
    add_tokens: str | None = Field(
        None, description="a file of tokens, one a line, to add to those of `tokenizer`, which keep their ids"
    )
    sample_bytes: Count = Field(100_000_000, ge=1, description="bytes of training text that the tokenizer learns from")
    seed: int = Field(1337, description="which text is drawn for that sample")
    on_bad_record: Literal["error", "skip"] = Field(
        "error", description="what to do with text that is not UTF-8 or broken JSON"
    )
    workers: int | None = Field(None, ge=1, description="processes; null: one a core")

    @model_validator(mode="after")
    def _one_vocabulary(self) -> Self:
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError("vocab_size is the tokenizer's own when tokenizer names one; leave one of them out")
        if self.tokenizer is None and (self.grow is not None or self.add_tokens is not None):
            raise ValueError("grow and add_tokens add to an existing vocabulary: name it with tokenizer")
        if self.grow is not None and self.add_tokens is not None:
            raise ValueError(
                "grow and add_tokens are two ways to add to a vocabulary: use one, then the other on its data set"
            )
        sources = (*self.input, *(self.validation or ()))
        if self.split == "tail" and any(source.whole for source in self.input):
            raise ValueError(
                "split tail cuts documents, and what has a prompt, as conversations do, must stay whole; set split=hash"
            )
        if any(source.preference for source in sources) and not all(source.preference for source in sources):
            raise ValueError("a data set of pairs (preference) has nothing else in it; prepare the other inputs apart")
        if self.kind == "ids" and any(source.spoken for source in sources):
            raise ValueError("kind ids has no words for what is said; leave kind out for conversations")
        if self.kind == "ids" and self.vocab_size is None and self.tokenizer is None:
            raise ValueError("kind ids needs vocab_size: how many ids there are, 0 to vocab_size - 1")
        if self.kind == "bpe" and self.vocab_size is not None and self.vocab_size < tokenizers.MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size {self.vocab_size} is below {tokenizers.MIN_VOCAB_SIZE}: the 256 bytes and the control tokens"
            )
        return self
