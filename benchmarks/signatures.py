"""Does tuning make a small base model do what it is asked, and what does it forget? From a docstring to a signature.

    python benchmarks/signatures.py [--quick] [--base RUN] [--dir DIRECTORY] [key=value ...]

Makes 2,000 conversations out of the documented functions of Python's standard library (the user gives a docstring, the
assistant answers with one line, the signature), pretrains a base of 11M parameters on the library's text unless --base
names one, and tunes it by configs/sft.yaml and configs/lora.yaml, each with and without a share of the pretraining text,
and what sft.yaml made by configs/dpo.yaml, on pairs of a docstring's own signature and another's.
Prints, for the base and each tuned model, how many of 300 held-out prompts it answers in the format that was trained, and
the bits per byte of the held-out pretraining text; last, one JSON line.
"""

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import chat, config, hf  # noqa: E402
from gpt.conversations import Conversation  # noqa: E402
from gpt.data import DataConfig, open_data  # noqa: E402
from gpt.evaluate import EvalConfig, evaluate, views  # noqa: E402
from gpt.generate import Sampling, complete  # noqa: E402
from gpt.loss import NextToken  # noqa: E402
from gpt.run import resolve  # noqa: E402
from gpt.trainer import TrainConfig  # noqa: E402

HELD_OUT = 300
ANSWERING = Sampling(temperature=0, repetition_penalty=1.1)  # a small model repeats itself without the second
REPLAY = 0.5  # of what is read, by tokens
BASE = ["name=base", "model.d_model=384", "model.n_layer=6", "model.n_head=6", "model.n_kv_head=2", "data.seq_len=256",
        "train.batch_tokens=4096", "train.time=14m"]  # fmt: skip


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for file in sorted(path.rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts or "tests" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def pairs() -> list[tuple[str, str]]:
    """(first paragraph of a docstring, signature) of functions, each docstring once, shuffled."""
    found = {}
    for node in functions(Path(sysconfig.get_path("stdlib"))):
        doc = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        signature = f"def {node.name}({', '.join(argument.arg for argument in node.args.args)}):"
        if 20 <= len(doc) <= 200 and len(signature) <= 80:
            found.setdefault(doc, signature)
    made = sorted(found.items())
    random.Random(1).shuffle(made)
    return made


def is_signature(reply: str) -> bool:
    """The format that was trained: one line, the head of one function with plain arguments."""
    try:
        (node,) = ast.parse(reply + "\n    pass").body
    except (SyntaxError, ValueError):
        return False
    return isinstance(node, ast.FunctionDef) and "\n" not in reply and reply.startswith("def ") and reply.endswith("):")


def write(path: Path, made: list[tuple[str, str]]) -> None:
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}) + "\n"
            for a, b in made
        )
    )


def write_pairs(path: Path, made: list[tuple[str, str]]) -> None:
    """Each docstring with its own signature, which is preferred, and with the next one's."""
    others = [signature for _, signature in made[1:] + made[:1]]
    path.write_text(
        "".join(
            json.dumps({"prompt": doc, "chosen": own, "rejected": other}) + "\n"
            for (doc, own), other in zip(made, others, strict=True)
            if own != other
        )
    )


def run(directory: Path, script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True, cwd=directory)


def scores(source: Path, held_out: list[tuple[str, str]], pretraining: Path) -> dict[str, float]:
    """Shares of replies in the format and equal to the signature; bits per byte of the pretraining text's held-out part."""
    model, tokenizer = hf.load(resolve(str(source))[0])
    asked = [
        chat.encode(tokenizer, Conversation(({"role": "user", "content": doc},)), reply=True).ids for doc, _ in held_out
    ]
    replies, ends = [""] * len(asked), chat.reply_ends(tokenizer)
    for event in complete(model, tokenizer, asked, ANSWERING, 64, seed=1, stop_ids=ends, banned_ids=()):
        replies[event.row] += event.text
    result = evaluate(
        NextToken(model), views(open_data(DataConfig(path=str(pretraining)))), EvalConfig(tokens=100_000), tokenizer,
        seq_len=model.config.max_seq_len or 0, batch_rows=16, device="cpu", dtype="float32",
    )  # fmt: skip
    return {
        "format": sum(map(is_signature, replies)) / len(replies),
        "equal": sum(reply == signature for reply, (_, signature) in zip(replies, held_out, strict=True))
        / len(replies),
        "bits_per_byte": result.val_bpb,
    }


def measure(directory: Path, base: Path | None, quick: bool, settings: list[str]) -> dict[str, dict[str, float]]:
    made = pairs()
    held_out, known = made[:HELD_OUT], made[HELD_OUT : HELD_OUT + 2000]
    write(directory / "chats.jsonl", known)
    pretraining = directory / "data" / "quickstart"
    short = ["train.time=null", "train.steps=20"] if quick else []
    if base is None:
        run(directory, "data/prepare.py", str(ROOT / "data" / "quickstart.yaml"), "--out", str(pretraining))
        run(directory, "train.py", str(ROOT / "configs" / "quickstart.yaml"), f"data.path={pretraining}", *BASE, *short)
        base = directory / "runs" / "base"
    else:
        given = config.load(TrainConfig, resolve(str(base))[0] / "run.yaml").data.path
        assert given is not None, f"{base} was pretrained on a mixture"
        pretraining = Path(given)
        pretraining = pretraining if pretraining.is_absolute() else base.parent.parent / pretraining
    source = {"path": str(directory / "chats.jsonl"), "chat": True}
    (directory / "chats.yaml").write_text(json.dumps({"input": [source], "tokenizer": str(base)}))
    run(directory, "data/prepare.py", "chats.yaml", "--out", "data/chats")
    replayed = json.dumps({"data/chats": 1 - REPLAY, str(pretraining): REPLAY})
    found = {"the base": scores(base, held_out, pretraining)}
    for name, words in (("sft", "everything"), ("lora", "LoRA")):
        for replay in (False, True):
            given = [f"name={name}{'-replay' * replay}", f"init_from={base}", "data.path=data/chats"]
            if replay:
                given[-1:] = ["data.path=null", f"data.mixture={replayed}"]
            run(directory, "train.py", str(ROOT / "configs" / f"{name}.yaml"), *given, *short, *settings)
            case = f"{words}, replay {REPLAY:.0%}" if replay else words
            found[case] = scores(directory / "runs" / given[0].removeprefix("name="), held_out, pretraining)
    write_pairs(directory / "pairs.jsonl", known)
    source = {"path": str(directory / "pairs.jsonl"), "preference": True}
    (directory / "pairs.yaml").write_text(json.dumps({"input": [source], "tokenizer": str(base)}))
    run(directory, "data/prepare.py", "pairs.yaml", "--out", "data/pairs")
    given = ["name=dpo", "init_from=runs/sft", "data.path=data/pairs"]
    run(directory, "train.py", str(ROOT / "configs" / "dpo.yaml"), *given, *short)
    found["everything, then dpo"] = scores(directory / "runs" / "dpo", held_out, pretraining)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 steps each: shows that it runs, not that it learns")
    parser.add_argument("--base", type=Path, metavar="RUN", help="a run to tune, pretrained on data/quickstart")
    parser.add_argument("--dir", type=Path, help="where everything is made (default: a temporary directory)")
    parser.add_argument("settings", nargs="*", help="settings of the tuning runs, as for train.py")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as temporary:
        directory = (args.dir or Path(temporary)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        found = measure(directory, args.base and args.base.absolute(), args.quick, args.settings)
    print(f"{'':<24}{'in the format':>15}{'equal':>10}{'bits/byte of the pretraining text':>36}")
    for case, row in found.items():
        print(f"{case:<24}{row['format']:>15.1%}{row['equal']:>10.1%}{row['bits_per_byte']:>36.4f}")
    base = found["the base"]
    print(
        json.dumps(
            [
                {
                    "case": f"{case}: {name}",
                    "ours": row[name],
                    "peer": base[name],
                    "peer_name": "the base",
                    "unit": "bits per byte" if name == "bits_per_byte" else "share",
                    "ratio": None,
                    "limit_share": None,
                }
                for case, row in found.items()
                for name in row
            ]
        )
    )


if __name__ == "__main__":
    main()
