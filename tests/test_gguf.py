"""GGUF files: the reader of the `gguf` package gives back what was written, and llama.cpp computes and cuts what we do."""

import atexit
import io
import json
import random
import unicodedata
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from faults import FAULTS, every_sync_watched, failed, n_operations
from gguf import GGUFReader
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor

from gpt import gguf, vocabularies
from gpt import tokenizer as tokenizers
from gpt.generate import Sampling, generate
from gpt.model import GPT, ModelConfig, init_weights
from gpt.tokenizer import CHATML, Tokenizer

AWKWARD = [
    "Hello, world! It's 12345 o'clock, isn't it?\n\n\tdef f(x):\n    return x  # 1.5e-3\r\n",
    "床前明月光，疑是地上霜。ひらがなカタカナ한국어",
    "  leading, trailing  and   many    spaces   ",
    "e\u0301 café naïve Ünïcödé ÀÉ éÉ ǅ",
    "🙂👩‍👩‍👧 \u200b\u00a0\ufeff\x00\x7f ½ ² Ⅷ ١٢٣",
    "<|endoftext|> <|im_start|>user\n<s></s><unk><0x41>",
    "\n", " ", "   \n  \n", "\t\t", "1", "12345678", "don't DON'T we'Ll", "x=[1,2];y={3:4}", "▁a ▁▁b", "ﬁ ſ K",
    "सभी मनुष्यों", "ทดสอบ", "אבג דהו", "!!!???...", "--\n--\r\n\r\n", "a" * 300, "_snake_case CamelCase", "~`^$+<=>|",
]  # fmt: skip
CORPUS = [*AWKWARD * 3, "the river runs to the sea, and the sea gives it back as rain. 12 34 567 it's we'll " * 20]
SMALL = {"max_seq_len": 64, "n_layer": 2, "d_model": 64, "n_head": 4, "n_kv_head": 2, "d_ff": 96, "init_std": 0.3}
GPT2 = {"norm": "layernorm", "mlp": "gelu_tanh", "position": "learned", "attention_bias": True, "mlp_bias": True}
LONGER = {"factor": 4.0, "original_max_seq_len": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"qk_norm": False}),
    "llama, every bias": ("llama", {"qk_norm": False, "attention_bias": True, "mlp_bias": True}),
    "llama, heads of their own size": ("llama", {"qk_norm": False, "head_dim": 32, "tie_embeddings": False}),
    "llama, one key head": ("llama", {"qk_norm": False, "n_kv_head": 1, "rope_theta": 500_000.0}),
    "llama3": ("llama", {"qk_norm": False, "rope_scaling": {"kind": "llama3", **LONGER}}),
    "linear": ("llama", {"qk_norm": False, "rope_scaling": {"kind": "linear", "factor": 4.0}}),
    "yarn": ("llama", {"qk_norm": False, "rope_scaling": {"kind": "yarn", **LONGER}}),
    "yarn, other ramps": ("qwen3", {"rope_scaling": {"kind": "yarn", **LONGER, "beta_fast": 8.0, "beta_slow": 2.0}}),
    "yarn, a factor of its own": (
        "llama",
        {"qk_norm": False, "rope_scaling": {"kind": "yarn", **LONGER, "attention_factor": 1.5}},
    ),
    "mistral": ("llama", {"qk_norm": False, "window": 64, "norm_eps": 1e-5}),
    "qwen2": ("qwen2", {"qk_norm": False, "attention_bias": "qkv"}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "olmo2": ("olmo2", {"norm_at": "output", "qk_norm": "whole"}),
    "smollm3": ("smollm3", {"qk_norm": False, "n_layer": 5, "nope_layers": (3,)}),
    "gpt2": ("gpt2", {**GPT2, "qk_norm": False, "n_kv_head": None}),
    "gpt2, untied": ("gpt2", {**GPT2, "qk_norm": False, "n_kv_head": None, "tie_embeddings": False, "norm_eps": 1e-5}),
}


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizers.train(CORPUS, "bpe", 420)


def model_of(settings: dict[str, Any], tokenizer: Tokenizer, seed: int = 1) -> GPT:
    """A model with visible weights, gains and biases included; its vocabulary is padded."""
    model = GPT(ModelConfig(**{**SMALL, "vocab_size": tokenizer.padded_size, **settings}))
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def written(path: Path, model: GPT, tokenizer: Tokenizer, dtype: Any = "float32") -> Path:
    file = path / "model.gguf"
    gguf.write(file, model.config, model.state_dict(), tokenizer, dtype)
    return file


def fields(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


# What the gguf package reads


def rows_of_llama_cpp(name: str, state: dict[str, Tensor], config: ModelConfig, pairs: bool) -> Tensor:
    """The tensor that stands under a name of llama.cpp's, written the slow way from ours."""
    outside = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "position_embd": "model.position",
    }
    *block, part, kind = name.split(".")
    if not block:
        return state[f"{outside[part]}.{kind}"]
    where = f"model.layers.{block[1]}"
    ours = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }  # fmt: skip
    if part == "attn_qkv":
        return torch.cat([state[f"{where}.self_attn.{p}_proj.{kind}"] for p in "qkv"])
    tensor = state[f"{where}.{ours[part]}.{kind}"]
    if not (pairs and part in ("attn_q", "attn_k")):
        return tensor
    rows, D = [], config.d_head
    for head in tensor.split(D):
        for i in range(D // 2):
            rows += [head[i], head[i + D // 2]]
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_is_read_back_bit_by_bit(tmp_path: Path, bpe: Tokenizer, kind: str, dtype: str) -> None:
    architecture, settings = MODELS[kind]
    model = model_of(settings, bpe)
    state = model.state_dict()
    reader = GGUFReader(written(tmp_path, model, bpe, dtype))
    assert fields(reader)["general.architecture"] == architecture
    names = [tensor.name for tensor in reader.tensors]
    assert len(names) == len(set(names)) and (
        ("output.weight" in names) != (model.config.tie_embeddings and kind != "olmo2")
    )
    n_parameters = sum(p.numel() for p in model.parameters())
    again = state["lm_head.weight"].numel() if kind == "olmo2" else 0
    factors = model.config.d_head // 2 if kind == "llama3" else 0
    assert sum(int(tensor.n_elements) for tensor in reader.tensors) == n_parameters + again + factors
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        expected = rows_of_llama_cpp(tensor.name, state, model.config, architecture in ("llama", "smollm3"))
        wide = dtype == "float32" or expected.dim() == 1 or tensor.name == "position_embd.weight"
        bits = expected.numpy() if wide else expected.to(torch.bfloat16).view(torch.uint8).numpy()
        assert tensor.tensor_type.name == ("F32" if wide else "BF16"), tensor.name
        assert tuple(tensor.shape)[::-1] == tuple(expected.shape)
        assert np.array_equal(tensor.data, bits), tensor.name


def test_the_tokenizer_is_read_back(tmp_path: Path, bpe: Tokenizer) -> None:
    model = model_of({"vocab_size": 512}, bpe)
    values = fields(GGUFReader(written(tmp_path, model, bpe)))
    names, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(names) == len(set(names)) == len(kinds) == 512
    assert {name: names.index(name) for name in bpe.vocab} == bpe.vocab
    assert {i for i, kind in enumerate(kinds) if kind == gguf.CONTROL} == bpe.control_ids
    assert {i for i, kind in enumerate(kinds) if kind == gguf.UNUSED} == set(range(bpe.size, 512))
    assert [merge.split(" ") for merge in values["tokenizer.ggml.merges"]] == bpe.raw["model"]["merges"]
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "deepseek-v3")
    ids = [values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert ids == [bpe.start_id, bpe.end_id, bpe.pad_id]
    assert values["tokenizer.ggml.add_bos_token"] is True and values["tokenizer.ggml.add_eos_token"] is False
    assert values["tokenizer.chat_template"] == CHATML


def test_a_chat_template_goes_along_as_it_is(tmp_path: Path, bpe: Tokenizer) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }} 床<|im_end|>{% endfor %}"
    with_template = Tokenizer(dict(bpe.raw), {"bos_token": "<|endoftext|>", "chat_template": template})
    values = fields(GGUFReader(written(tmp_path, model_of({}, bpe), with_template)))
    assert values["tokenizer.chat_template"] == template


# The file


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_file_exists_whole_or_not_at_all(tmp_path: Path, bpe: Tokenizer, fault: BaseException) -> None:
    model = model_of({"n_layer": 1, "d_model": 8, "n_head": 1, "n_kv_head": 1, "d_ff": 8}, bpe)
    file = tmp_path / "model.gguf"
    total = n_operations(lambda: written(tmp_path, model, bpe))
    whole = file.read_bytes()
    for k in {1, 2, total // 2, total - 2, total - 1}:
        file.unlink(missing_ok=True)
        assert failed(k, fault, lambda: written(tmp_path, model, bpe))
        assert not file.exists() or file.read_bytes() == whole
    with every_sync_watched():
        written(tmp_path, model, bpe)
    assert file.read_bytes() == whole


def test_a_directory_that_is_not_there_is_told_in_words(tmp_path: Path, bpe: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory; make it first"):
        written(tmp_path / "none", model_of({}, bpe), bpe)


# What llama.cpp makes of it


@pytest.fixture(scope="module")
def llama() -> Any:
    found = pytest.importorskip("llama_cpp", reason="llama.cpp's Python bindings are not installed")
    # Opened by its import and never closed, since its models close themselves with them.
    for name in ("outnull_file", "errnull_file"):
        atexit.register(getattr(found._utils, name).close)
    return found


def opened(llama: Any, file: Path, **options: Any) -> Any:
    """The file in llama.cpp, which computes in float32 with one thread."""
    options = {
        "n_ctx": 64,
        "type_k": 0,
        "type_v": 0,
        "n_threads": 1,
        "n_threads_batch": 1,
        "flash_attn": False,
        "logits_all": True,
    } | options
    return llama.Llama(str(file), verbose=False, **options)


def greedy(model: GPT, prompt: list[int], n_tokens: int) -> list[int]:
    columns = generate(model, [prompt], Sampling(temperature=0), n_tokens, seed=0, n_tokens_valid=1 << 20, stop_ids=())
    return [token for column in columns for token in column.ids if token is not None]


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_the_same_logits_and_greedy_ids(
    tmp_path: Path, llama: Any, bpe: Tokenizer, kind: str
) -> None:
    model = model_of(MODELS[kind][1], bpe)
    with closing(opened(llama, written(tmp_path, model, bpe))) as theirs:
        ids = [bpe.start_id, *torch.randint(bpe.size, (55,), generator=torch.Generator().manual_seed(3)).tolist()]
        theirs.eval(ids)
        with torch.inference_mode():
            ours = model(torch.tensor([ids]))[0].numpy()
        # ggml looks the tanh form of GELU up in a table of half precision
        tolerance = 0.02 if model.config.mlp == "gelu_tanh" else 2e-4
        assert np.abs(np.array(theirs.scores[: len(ids)]) - ours).max() < tolerance
        prompt = [bpe.start_id, *bpe.encode("the river")]
        theirs.reset()
        found = islice(theirs.generate(prompt, temp=0.0, repeat_penalty=1.0), 40)
        assert list(found) == greedy(model, prompt, 40)


def test_bfloat16_is_the_rounded_model(tmp_path: Path, llama: Any, bpe: Tokenizer) -> None:
    model = model_of({"qk_norm": False}, bpe)
    with closing(opened(llama, written(tmp_path, model, bpe, "bfloat16"))) as theirs:
        ids = [bpe.start_id, *range(40, 80)]
        theirs.eval(ids)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter if parameter.dim() == 1 else parameter.bfloat16())
            ours = model(torch.tensor([ids]))[0].numpy()
        # what it multiplies with is rounded, too
        assert np.corrcoef(np.array(theirs.scores[: len(ids)]).ravel(), ours.ravel())[0, 1] > 0.999


def random_texts(count: int) -> list[str]:
    """Mixtures of ASCII with space, digits and marks, and of all that Unicode has below U+3100."""
    rng = random.Random(0)
    ascii_ = "abcXYZ  \n\t\r'12 9.,!?-_[](){}<>|`~^$+=/\\\"sStTdDmM"
    every = [chr(c) for c in range(0x20, 0x3100) if unicodedata.category(chr(c)) != "Cn"] + list(
        "一龥的床ａＺ０가힣🙂👍🏽"
    )
    texts = []
    for _ in range(count):
        share = rng.random()
        texts.append(
            "".join(rng.choice(ascii_ if rng.random() < share else every) for _ in range(rng.randrange(1, 30)))
        )
    return texts


TEXTS = [*AWKWARD, *random_texts(1500)]


@pytest.fixture(scope="module")
def joined() -> dict[str, Any]:
    """A vocabulary that joins whatever stands side by side, so that every difference in splitting shows in its ids."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"], show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([text[i : i + 3] for text in TEXTS for i in range(len(text))], trainer)
    return json.loads(backend.to_str())


def in_llama_cpp(
    llama: Any, tmp_path: Path, tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[dict[str, Any], list[Any]]:
    """What it makes of the file's metadata, and its ids of each text."""
    tiny = {"n_layer": 1, "d_model": 8, "n_head": 1, "n_kv_head": 1, "d_ff": 8}
    with closing(opened(llama, written(tmp_path, model_of(tiny, tokenizer), tokenizer), vocab_only=True)) as theirs:
        return theirs.metadata, [theirs.tokenize(text.encode(), add_bos=False, special=False) for text in texts]


@pytest.mark.parametrize(("patterns", "name", "whole"), gguf.PRE_TOKENIZERS, ids=lambda value: str(value)[:12])
def test_llama_cpp_cuts_every_text_as_we_do(
    tmp_path: Path, llama: Any, joined: dict[str, Any], patterns: tuple[str, ...], name: str, whole: bool
) -> None:
    tokenizer = Tokenizer(split_by(joined, *patterns, ignore_merges=whole), {})
    metadata, ids = in_llama_cpp(llama, tmp_path, tokenizer, TEXTS)
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert ids == tokenizer.encode_batch(TEXTS)


def test_llama_cpp_puts_the_start_token_first_and_decodes_what_it_encodes(
    tmp_path: Path, llama: Any, bpe: Tokenizer
) -> None:
    with closing(opened(llama, written(tmp_path, model_of({}, bpe), bpe), vocab_only=True)) as theirs:
        for text in AWKWARD:
            ids = theirs.tokenize(text.encode(), add_bos=True, special=False)
            assert ids == [bpe.start_id, *bpe.encode(text)]
            if max(map(len, map(bpe.token_bytes, ids))) < 32:  # the bindings cut longer ones
                assert theirs.detokenize(ids[1:]) == text.encode()


def test_added_tokens_of_the_text_are_found_in_it(tmp_path: Path, llama: Any, bpe: Tokenizer) -> None:
    tokenizer = changed(bpe, added_tokens=[*bpe.raw["added_tokens"], added("<mark>", 420), added("床前明", 421)])
    texts = ["a <mark> b<mark>", "x床前明月", "<mar k>", *AWKWARD]
    assert {420, 421} <= set(tokenizer.encode("<mark>床前明"))
    assert in_llama_cpp(llama, tmp_path, tokenizer, texts)[1] == tokenizer.encode_batch(texts)


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_of_sentencepiece_are_cut_as_we_do(tmp_path: Path, llama: Any, prefix: bool) -> None:
    tokenizer = pieces(tmp_path, add_dummy_prefix=prefix)
    metadata, ids = in_llama_cpp(llama, tmp_path, tokenizer, TEXTS)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert ids == tokenizer.encode_batch(TEXTS)


# What is refused


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"position": "none"}, "the nearest is qwen3, without position: none"),
    ({"position": "relative", "qk_norm": False}, "the nearest is llama, without position: relative"),
    ({"position": "sinusoidal", "qk_norm": False}, "without position: sinusoidal"),
    ({"norm_at": "post", "qk_norm": False}, "the nearest is llama, without norm_at: post"),
    ({"logit_softcap": 15.0}, "the nearest is qwen3, without logit_softcap: 15.0"),
    ({"prefix_lm": True}, "without prefix_lm: True"),
    (
        {"embed_norm": True, "norm_gain": False, "mlp": "relu2"},
        "without norm_gain: False; embed_norm: True; mlp: relu2",
    ),
    ({"mlp": "geglu"}, "without mlp: geglu"),
    ({"window": 16, "qk_norm": False}, "the nearest is llama, without window: 16"),
    ({"rotary_dim": 8}, "without rotary_dim: 8"),
    ({"rope_scaling": {"kind": "dynamic", "factor": 2.0}}, "without rope_scaling: dynamic"),
    ({"rope_scaling": {"kind": "llama3", **LONGER}}, "the nearest is qwen3, without rope_scaling: llama3"),
    ({"nope_layers": (0,), "qk_norm": False}, r"without nope_layers: \(0,\)"),
    ({"attention_bias": True}, "the nearest is qwen3, without attention_bias: True"),
    ({**GPT2, "qk_norm": False, "position": "rotary"}, "the nearest is gpt2, without position: rotary"),
    ({**GPT2, "qk_norm": False, "mlp": "relu"}, "the nearest is gpt2, without mlp: relu"),
    ({"rope_scaling": {"kind": "yarn", "factor": 3.0}}, "max_seq_len / factor is 21.33"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_model_that_llama_cpp_lacks_is_refused_by_what_it_lacks(
    tmp_path: Path, bpe: Tokenizer, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        written(tmp_path, model_of(settings, bpe), bpe)
    assert list(tmp_path.iterdir()) == []


def changed(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    """The tokenizer with other parts; `model` is merged into its own."""
    raw = json.loads(json.dumps(tokenizer.raw))
    raw["model"] |= parts.pop("model", {})
    return Tokenizer(raw | parts, {"bos_token": "<|endoftext|>"})


def split(*patterns: str) -> dict[str, Any]:
    """The pre-tokenizer of patterns; GPT-2's is ByteLevel's own, a single digit is Digits'."""
    *_, last = patterns
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": last == vocabularies.GPT2,
    }
    parts: list[dict[str, Any]] = []
    for pattern in patterns[: -1 if level["use_regex"] else None]:
        digits = {"type": "Digits", "individual_digits": True}
        apart = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        parts.append(digits if pattern == r"\p{N}" else apart)
    return {"type": "Sequence", "pretokenizers": [*parts, level]} if parts else level


def split_by(raw: dict[str, Any], *patterns: str, **model: Any) -> dict[str, Any]:
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return raw | {"pre_tokenizer": split(*patterns), "decoder": decoder, "model": raw["model"] | model}


def pieces(directory: Path, **settings: Any) -> Tokenizer:
    """A SentencePiece vocabulary with bytes for what it does not know, which joins across spaces."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\0", "") for text in CORPUS), model_writer=file, model_type="bpe",
        vocab_size=700, byte_fallback=True, normalization_rule_name="identity", allow_whitespace_only_pieces=True,
        split_by_whitespace=False, split_by_number=False, character_coverage=0.98, minloglevel=5,
        **{"remove_extra_whitespaces": False, **settings},
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(file.getvalue())
    return Tokenizer.load(directory / "tokenizer.model")


def test_whole_words_beside_the_merges_are_refused_where_llama_cpp_would_not_take_them(
    tmp_path: Path, bpe: Tokenizer
) -> None:
    entries = dict(bpe.raw["model"]["vocab"])
    for ignore_merges, pattern in ((True, vocabularies.QWEN), (False, vocabularies.QWEN)):
        model = {"ignore_merges": ignore_merges, "vocab": entries}
        merged = changed(bpe, pre_tokenizer=split(pattern), model=model)
        written(tmp_path, model_of({}, merged), merged)
    model = {"ignore_merges": True, "vocab": entries | {"xyzzy": 420}}
    unmerged = changed(bpe, pre_tokenizer=split(vocabularies.QWEN), model=model)
    with pytest.raises(ValueError, match="the entry 'xyzzy' is no result of merges, and the vocabulary takes it"):
        written(tmp_path, model_of({}, unmerged), unmerged)


def test_a_tokenizer_that_normalizes_to_nfc_is_written_with_a_note(tmp_path: Path, bpe: Tokenizer) -> None:
    model = model_of({}, bpe)
    for tokenizer, n_notes in ((bpe, 0), (changed(bpe, normalizer={"type": "NFC"}), 1)):
        notes = gguf.write(tmp_path / "x.gguf", model.config, model.state_dict(), tokenizer, "float32")
        assert len(notes) == n_notes and all("NFC" in note for note in notes)


def test_pieces_whose_spaces_llama_cpp_would_treat_otherwise_are_refused(tmp_path: Path) -> None:
    tokenizer = pieces(tmp_path, remove_extra_whitespaces=True)
    with pytest.raises(
        ValueError, match=r"llama\.cpp treats spaces otherwise than this tokenizer of SentencePiece's kind"
    ):
        written(tmp_path, model_of({}, tokenizer), tokenizer)


def test_pieces_that_no_merge_makes_are_refused(tmp_path: Path) -> None:
    tokenizer = pieces(tmp_path)
    vocab = tokenizer.raw["model"]["vocab"] | {"xyzzy": tokenizer.size}
    more = Tokenizer({**tokenizer.raw, "model": {**tokenizer.raw["model"], "vocab": vocab}}, {"bos_token": "<s>"})
    with pytest.raises(ValueError, match=r"the entry 'xyzzy' is no result of merges; llama\.cpp would take it"):
        written(tmp_path, model_of({}, more), more)


def added(name: str, token: int, **options: bool) -> dict[str, Any]:
    return {"id": token, "content": name, "special": False, "lstrip": False, "rstrip": False, "single_word": False,
            "normalized": False} | options  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"pre_tokenizer": split(r"\s+|\S+")}, "pre-tokenizer has no name that is known to llama.cpp"),
        ({"pre_tokenizer": split(vocabularies.O200K)}, "pre-tokenizer has no name"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}, "no name"),
        ({"pre_tokenizer": None}, "pre-tokenizer has no name"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer, Lowercase, has no name"),
        ({"normalizer": ["Lowercase"]}, "type of normalizer 'None' is not known"),
        ({"pre_tokenizer": ["Whitespace"]}, "type of pre_tokenizer 'None' is not known"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix: '</w>'"),
    ],
    ids=lambda value: str(value)[:70],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_cannot_name_is_refused(
    tmp_path: Path, bpe: Tokenizer, parts: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        written(tmp_path, model_of({}, bpe), changed(bpe, **parts))


@pytest.mark.parametrize("kind", ["char", "word"])
def test_vocabularies_of_characters_and_words_are_refused(tmp_path: Path, kind: Any) -> None:
    tokenizer = tokenizers.train(CORPUS, kind, None)
    with pytest.raises(ValueError, match="no vocabulary of kind WordLevel; it has byte pair encoding"):
        written(tmp_path, model_of({}, tokenizer), tokenizer)


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    with pytest.raises(ValueError, match="the tokenizer has 420 ids, the model's vocab_size is 256"):
        written(tmp_path, model_of({"vocab_size": 256}, bpe), bpe)
