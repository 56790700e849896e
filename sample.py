"""Continue text with a trained model, or talk to it.

    python sample.py runs/quickstart --prompt 'def fibonacci(n):'
    python sample.py runs/quickstart@1000 --prompt-file start.txt --num-samples 4 --json
    python sample.py runs/assistant --chat

stdout has the text and nothing else; notes go to stderr.
"""

import argparse
import json
import math
import os
import secrets
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt import signals

if TYPE_CHECKING:  # --help and bad flags answer before torch is loaded
    from gpt.conversations import Message
    from gpt.generate import Event, Past, Sampling
    from gpt.model import GPT
    from gpt.tokenizer import Tokenizer

CHAT_HELP = "/system TEXT  /set NAME=VALUE  /undo  /reset  /help  /quit (or Ctrl-D); Ctrl-C stops a reply"


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """A parser of numbers from `low` (exclusive with `above`) to `high`, for flags and /set."""
    bounds = f"{'above' if above else 'at least'} {low}" + ("" if high == math.inf else f" and at most {high}")
    what = {int: "a whole number", float: "a number"}[kind]

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value != math.inf and not (above and value == low)):
            raise argparse.ArgumentTypeError(f"expected {what} {bounds}, got '{text}'")
        return value

    return parse


OPTIONS: dict[str, tuple[Callable[[str], Any], Any, str]] = {
    "max_tokens": (number(int, 1), 256, "most tokens to write"),
    "temperature": (number(float, 0), 0.8, "0 always takes the likeliest token"),
    "top_k": (number(int, 1), None, "draw from the K likeliest tokens"),
    "top_p": (number(float, 0, 1, above=True), 0.95, "draw from the fewest tokens holding this probability"),
    "min_p": (number(float, 0, 1), None, "draw from tokens at least this fraction as likely as the likeliest"),
    "repetition_penalty": (number(float, 0, above=True), 1.0, "above 1 avoids tokens already in the text"),
    "seed": (number(int, 0, 2**62), None, "sample i uses SEED + i; drawn and printed if not given"),
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "source", help="a run, RUN@STEP|best|last, a checkpoint, a Hugging Face model directory or hub:ORG/NAME"
    )
    parser.add_argument("--prompt", action="append", help="text to continue; several make one batch")
    parser.add_argument("--prompt-file", metavar="PATH", help="file with the text to continue; '-' is stdin")
    for name, (parse, default, text) in OPTIONS.items():
        shown = "" if default is None else f" (default {default})"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=parse, default=default, help=text + shown, metavar=name[0].upper())
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--num-samples", type=number(int, 1), default=1, metavar="N", help="samples a prompt (default 1)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line and sample")
    parser.add_argument("--chat", action="store_true", help=f"talk: {CHAT_HELP}")
    parser.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the fastest here)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        words = "" if unknown[0].startswith("-") else "; put quotes around a prompt of several words"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{words}")
    if args.prompt and args.prompt_file:
        parser.error("--prompt and --prompt-file are two sources of the same text; give one")
    if args.chat and (args.json or args.num_samples > 1 or args.prompt or args.prompt_file):
        parser.error(
            "--chat reads its messages from stdin; it goes with no --json, --num-samples, --prompt, --prompt-file"
        )
    if args.system is not None and not args.chat:
        parser.error("--system is part of a chat; add --chat")
    if "" in args.stop:
        parser.error("--stop is empty; leave it out or give it at least one character")
    if args.seed is None:
        args.seed = secrets.randbelow(2**31)
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The texts to continue: from flags, a file or piped stdin; on a terminal without them the empty one."""
    if args.prompt:
        return [decode(os.fsencode(prompt), "--prompt") for prompt in args.prompt]
    if args.prompt_file not in (None, "-"):
        return [decode(Path(args.prompt_file).read_bytes(), args.prompt_file)]
    if args.prompt_file == "-" or not sys.stdin.isatty():
        return [decode(sys.stdin.buffer.read(), "stdin")]
    return [""]


def decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}; convert it (iconv -t utf-8) first") from error


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sampling(args: argparse.Namespace) -> "Sampling":
    from gpt.generate import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return Sampling(**{name: getattr(args, name) for name in names})


def write(model: "GPT", tokenizer: "Tokenizer", prompts: list[str], args: argparse.Namespace) -> None:
    """Continue every prompt `num_samples` times in one batch; a single sample is shown while it grows."""
    from gpt.generate import complete

    if split := tokenizer.split_characters("".join(prompts)):
        more = f" and {len(split) - 20} more" if len(split) > 20 else ""
        note(f"note: the vocabulary splits into bytes: {' '.join(map(repr, split[:20]))}{more}")
    note(f"seed: {args.seed}")
    texts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    rows: list[list[Event]] = [[] for _ in texts]
    stream = len(texts) == 1 and not args.json
    told = complete(
        model, tokenizer, texts, sampling(args), args.max_tokens, seed=args.seed, stop=args.stop, logprobs=args.json
    )
    for event in told:
        signals.check()
        if stream:
            print(event.text if rows[0] else texts[0] + event.text, end="", flush=True)
        rows[event.row].append(event)
    if stream:
        print()
    for i, (text, events) in enumerate(zip(texts, rows, strict=True)):
        if args.json:
            print(json.dumps(record(tokenizer, text, events, args.seed + i), ensure_ascii=False))
        elif not stream:
            print("---\n" * (i > 0) + text + "".join(event.text for event in events))


def record(tokenizer: "Tokenizer", prompt: str, events: "list[Event]", seed: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": "".join(event.text for event in events),
        "ids": [event.id for event in events],
        "tokens": [tokenizer.piece(event.id) for event in events],
        "logprobs": [event.logprob for event in events],
        "finish_reason": events[-1].finish_reason,
        "seed": seed,
    }


def talk(model: "GPT", tokenizer: "Tokenizer", args: argparse.Namespace) -> None:
    """A conversation from stdin, a message a line; a line that begins with / is a command."""
    from gpt.chat import reply_ends
    from gpt.generate import Past

    ends = reply_ends(tokenizer)  # a template that cannot be used is refused before anything is typed
    note(f"chat template: {'ChatML' if tokenizer.chat_template is None else 'the one of its tokenizer'}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a conversation Ctrl-C stops a reply, not the program
    terminal = sys.stdin.isatty()
    if terminal:
        note(CHAT_HELP)
    messages: list[Message] = []
    if args.system is not None:
        messages = [{"role": "system", "content": decode(os.fsencode(args.system), "--system")}]
    past = Past()
    while True:
        try:
            line = input("> " if terminal else "")
            line.encode()  # half a character is left alone in it where the line was not UTF-8
        except EOFError:
            return
        except UnicodeError:
            note("error: this line is not UTF-8 and was left out; type it again")
            continue
        signals.check()
        if line.strip() in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            note(command(line, messages, args))
        elif line.strip():
            asked = [*messages, {"role": "user", "content": line}]
            messages[:] = answer(model, tokenizer, asked, ends, past, args) or messages


def command(line: str, messages: "list[Message]", args: argparse.Namespace) -> str:
    """Carry out a /command on the conversation or the options; what to tell the user."""
    name, _, rest = line.strip().partition(" ")
    has_system = bool(messages) and messages[0]["role"] == "system"
    if name == "/system" and rest:
        messages[:has_system] = [{"role": "system", "content": rest}]
        return "system message set"
    if name == "/undo":
        if len(messages) == has_system:
            return "nothing to undo"
        del messages[-2:]
        return "the last exchange is forgotten"
    if name == "/reset":
        del messages[has_system:]
        return (
            "the conversation is forgotten, the system message stays" if has_system else "the conversation is forgotten"
        )
    if name == "/set":
        option, _, value = (part.strip() for part in rest.partition("="))
        option = option.replace("-", "_")
        if option not in OPTIONS:
            return f"/set NAME=VALUE knows {', '.join(OPTIONS)}"
        try:
            setattr(args, option, OPTIONS[option][0](value))
        except argparse.ArgumentTypeError as error:
            return f"{option}: {error}"
        return f"{option} = {getattr(args, option)}"
    return CHAT_HELP


def answer(
    model: "GPT",
    tokenizer: "Tokenizer",
    asked: "list[Message]",
    ends: set[int],
    past: "Past",
    args: argparse.Namespace,
) -> "list[Message] | None":
    """Stream a reply to `asked`, of which only what `past` has not is read. The conversation that it makes, whose oldest
    exchanges go when the context is full; None, with an error shown, for a message that does not fit."""
    from gpt.chat import drop_oldest, encode
    from gpt.conversations import Conversation
    from gpt.generate import complete

    context, now = model.config.max_seq_len or 0, datetime.now()
    said, kept = "", Conversation(tuple(asked))
    try:
        room = context - min(args.max_tokens, context // 2)
        kept = drop_oldest(tokenizer, kept, room, now=now)
        if n_dropped := len(asked) - len(kept.messages):
            note(f"(the oldest {n_dropped} messages no longer fit the context of {context} tokens: dropped)")
        prompt = encode(tokenizer, kept, reply=True, now=now).ids
        seed = args.seed + len(asked)  # another draw for each turn
        for event in complete(
            model,
            tokenizer,
            [prompt],
            sampling(args),
            args.max_tokens,
            seed=seed,
            stop=args.stop,
            stop_ids=ends,
            past=past,
            logprobs=False,
        ):
            said += event.text
            print(event.text, end="", flush=True)
            signals.check()
    except ValueError as error:
        note(f"error: {error}")
        return None
    except KeyboardInterrupt:
        note(" (stopped)")
        if not said:
            return None
    print()
    return [*kept.messages, {"role": "assistant", "content": said}]


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    prompts = [] if args.chat else read_prompts(args)

    with signals.loading():
        from gpt import run

    path, description = run.resolve(args.source)
    note(description)

    with signals.loading():
        from gpt import hf, host, inference, runtime

    device = args.device or runtime.best_device()[0]
    runtime.check_device(device)
    runtime.setup(device, host.n_cores())
    model, tokenizer = hf.load(path)
    note(f"computed in {inference.ready(model, device)}")
    if args.chat:
        with suppress(KeyboardInterrupt):  # Ctrl-C at the prompt ends the conversation
            talk(model, tokenizer, args)
    else:
        write(model, tokenizer, prompts, args)
    return 0


if __name__ == "__main__":
    signals.run(main)
