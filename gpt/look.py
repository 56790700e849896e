"""Look at what training sees, how a tokenizer cuts, and what a model computes; on the terminal, and as one HTML file.

python -m gpt.look data data/quickstart --html look.html
python -m gpt.look data --config configs/quickstart.yaml data.seq_len=512 --step 100
python -m gpt.look tokenizer data/quickstart --compare gpt2/tokenizer.json
python -m gpt.look attention runs/quickstart --text 'def add(a, b):' --layer 2 --head 0 --html look.html
"""

import argparse
import os
import sys
from pathlib import Path

from gpt import signals
from gpt.signals import at_least


def page_file(text: str) -> Path:
    """A file that a page may be written to, checked before any work is done."""
    path = Path(text)
    if path.suffix.lower() not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"'{text}' does not end in .html; nothing else is overwritten")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a directory; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the directory '{path.parent}' does not exist; make it first")
    return path


def arguments(argv: list[str]) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m gpt.look", description=__doc__, formatter_class=kind, allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="data | tokenizer | attention")

    data = verbs.add_parser("data", help="a batch as training gets it, and what the data set holds", allow_abbrev=False)
    data.add_argument("dataset", nargs="?", help="a prepared data set; with --config, instead of the one it names")
    data.add_argument(
        "--config", nargs="+", metavar=("CONFIG.yaml", "section.key=value"), help="the run: its data, batch and seed"
    )
    data.add_argument("--step", type=at_least(1), default=1, metavar="N", help="the update whose batch is shown (1)")
    data.add_argument("--rows", type=at_least(0), default=4, metavar="R", help="rows of the batch to show (4)")
    data.add_argument("--seq-len", type=at_least(1), metavar="T", help="tokens a row, instead of data.seq_len")
    data.add_argument("--split", choices=("train", "val"), default="train", help="val: a batch of the evaluation")

    tokenizer = verbs.add_parser("tokenizer", help="how a tokenizer cuts, alone or beside another", allow_abbrev=False)
    tokenizer.add_argument("source", help="a tokenizer.json, or a data set, checkpoint, model directory or run")
    tokenizer.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 text to cut, instead of the data set's")
    tokenizer.add_argument("--compare", metavar="OTHER", help="a second tokenizer, on the same text")

    attention = verbs.add_parser("attention", help="what a model computes on a text", allow_abbrev=False)
    attention.add_argument("source", help="a run, RUN@STEP|best|last, a checkpoint or a Hugging Face model directory")
    text = attention.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="T", help="the text that it reads")
    text.add_argument("--text-file", metavar="PATH", help="a UTF-8 file with that text; '-' is stdin")
    attention.add_argument(
        "--prompt",
        default="",
        metavar="P",
        help="what it reads before; a prefix-LM sees it both ways, without it the text",
    )
    attention.add_argument("--layer", type=at_least(0), default=0, metavar="L", help="the layer shown, from 0 (0)")
    attention.add_argument("--head", type=at_least(0), default=0, metavar="H", help="its query head, from 0 (0)")
    attention.add_argument(
        "--max-tokens", type=at_least(2), default=1000, metavar="N", help="read N tokens at most (1000)"
    )

    for verb in (data, tokenizer, attention):
        verb.add_argument("--html", type=page_file, metavar="OUT.html", help="write the page there as well")
        verb.add_argument("--debug", action="store_true", help="show tracebacks")
    args, others = parser.parse_known_args(argv)
    if args.verb == "data" and args.config is not None:  # settings may follow flags
        if args.dataset is not None and "=" in args.dataset and not Path(args.dataset).exists():
            others, args.dataset = [args.dataset, *others], None
        args.config += [other for other in others if "=" in other and not other.startswith("-")]
        others = [other for other in others if other not in args.config]
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if args.verb == "data" and args.dataset is None and args.config is None:
        data.error("name a data set, or --config CONFIG.yaml")
    return args


def read_text(args: argparse.Namespace) -> str:
    """What --text or --text-file gives."""
    if args.text is not None:
        return decoded(os.fsencode(args.text), "--text")
    if args.text_file == "-":
        return decoded(sys.stdin.buffer.read(), "stdin")
    return decoded(Path(args.text_file).read_bytes(), args.text_file)


def decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}; convert it (iconv -t utf-8) first") from None


def main(argv: list[str]) -> None:
    args = arguments(argv)
    with signals.loading():
        from rich.console import Console

        from gpt import batches, cuts, durable, gaze, page

    on_page = None  # the same blocks, unless a page has others
    if args.verb == "attention":
        seen = gaze.of_text(
            args.source,
            read_text(args),
            prompt=decoded(os.fsencode(args.prompt), "--prompt"),
            layer=args.layer,
            head=args.head,
            max_tokens=args.max_tokens,
        )
        title, blocks, on_page = seen.title, seen.on_terminal(), seen.as_page
    elif args.verb == "data":
        title, blocks = batches.of_data(
            args.dataset, args.config, step=args.step, rows=args.rows, seq_len=args.seq_len, split=args.split
        )
    else:
        title, blocks = cuts.of_tokenizer(args.source, args.text or [], args.compare)
    console, shown = Console(), []
    page.draw(page.Heading(title), console)
    for block in blocks:
        signals.check()
        page.draw(block, console)
        shown.append(block)
    if args.html is not None:
        durable.write_file(args.html, page.html(title, shown if on_page is None else on_page()))
        page.draw(page.Note(f"written to {args.html}"), console)


if __name__ == "__main__":
    signals.run(main)
