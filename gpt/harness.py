"""Any task of lm-eval on any model here, with the numbers that its own Hugging Face backend gives.

python -m gpt.harness runs/quickstart --tasks hellaswag,lambada_openai --num-fewshot 0
python -m gpt.harness runs/quickstart --tasks mine --include-path my_tasks/ --json

It needs lm-eval: pip install -e '.[eval]'. A task of lm-eval may bring Python of its own, which lm-eval runs: include
only directories that you trust. A task's data set is fetched by lm-eval if it is not a file beside it.
"""

import argparse
import json
import sys
import traceback
from typing import TYPE_CHECKING, Any

from gpt import signals
from gpt.signals import at_least

if TYPE_CHECKING:  # --help and bad flags answer before torch is loaded
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

EXTRA = "lm-eval is not installed ({}): pip install -e '.[eval]'"


def arguments(argv: list[str]) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m gpt.harness", description=__doc__, formatter_class=kind, allow_abbrev=False
    )
    add = parser.add_argument
    source = "a run, RUN@STEP|best|last, a checkpoint, a Hugging Face model directory, or hub:ORG/NAME[@REVISION]"
    add("source", metavar="SOURCE", help=source)
    add(
        "--tasks",
        required=True,
        metavar="NAME[,NAME...]",
        help="tasks, groups and tags of lm-eval; * stands for any text",
    )
    add("--include-path", action="append", metavar="DIR", help="directory of your own tasks (.yaml); may be repeated")
    add("--num-fewshot", type=at_least(0), metavar="N", help="solved examples before each question (the task's own)")
    add("--limit", type=at_least(1), metavar="N", help="the first N questions of each task only")
    add("--start-token", action="store_true", help="a start token before every text, as hf's add_bos_token=True")
    add("--batch-tokens", type=at_least(1), default=8192, metavar="N", help="tokens computed at once (8192)")
    add("--json", action="store_true", help="lm-eval's results as one JSON object instead of its table")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest here)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = arguments(argv)
    with signals.loading():
        from gpt import harness, hf, host, run, runtime

    path, described = run.resolve(args.source)
    sys.stderr.write(described + "\n")
    device = args.device or runtime.best_device()[0]
    runtime.check_device(device)
    runtime.setup(device, host.n_cores())
    model, tokenizer = hf.load(path)
    rules = harness.conventions(path, tokenizer, args.start_token)
    adapter = harness.language_model(model.to(device), tokenizer, rules, args.batch_tokens)
    results = harness.evaluate(
        adapter, args.tasks.split(","), args.include_path or [], num_fewshot=args.num_fewshot, limit=args.limit
    )
    if args.json:
        kept = {key: results[key] for key in ("results", "groups", "versions", "n-shot", "n-samples") if key in results}
        strict = json.loads(json.dumps(kept, default=str), parse_constant=lambda name: None)  # JSON knows no Infinity
        sys.stdout.write(json.dumps(strict) + "\n")
    else:
        sys.stdout.write(harness.table(results))


if __name__ == "__main__":
    signals.run(main)  # does not return: --help answers before the rest of this file, which loads torch, is read

from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

from tokenizers import Tokenizer as Backend  # noqa: E402

from gpt.durable import CorruptError  # noqa: E402
from gpt.likelihood import log_likelihoods  # noqa: E402
from gpt.model import GPT  # noqa: E402
from gpt.tasks import greedy  # noqa: E402
from gpt.tokenizer import Tokenizer  # noqa: E402

# Of a task's generation_kwargs; the last four mean nothing where nothing is drawn.
KNOWN = ("until", "max_gen_toks", "do_sample", "num_beams", "temperature", "top_k", "top_p", "min_p")
MAX_TOKENS = 256  # lm-eval's default for what a task lets a model write


class Conventions(NamedTuple):
    """What transformers puts before every text of a model, and which ids end what it writes."""

    front: list[int]
    ends: set[int]


def conventions(path: Path, tokenizer: Tokenizer, start_token: bool = False) -> Conventions:
    """As the model directory says; with `start_token` that token stands before every text whatever it says."""
    wanted = _beside(path, "tokenizer_config.json").get("add_bos_token")
    if start_token or wanted is True:
        front = [tokenizer.start_id]
    else:
        backend = Backend.from_str(json.dumps(tokenizer.raw))
        front = [] if wanted is False else backend.encode("", add_special_tokens=True).ids
    ends = _beside(path, "generation_config.json").get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int for end in ends):
        raise ValueError(
            f"{path / 'generation_config.json'}: eos_token_id: expected an id or a list of ids, got {ends!r}"
        )
    return Conventions(front, {tokenizer.end_id, *ends})


def _beside(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    try:
        values = json.loads(file.read_bytes()) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{file}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CorruptError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def evaluate(
    adapter: "TemplateLM",
    names: Sequence[str],
    include: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` says of the tasks; ValueError in words for a name that it does not know.

    Its own thousands of tasks are looked through, which takes seconds, only where the directories in `include` do not
    have a name.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(EXTRA.format(error.name)) from None
    for directory in include:
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"{directory}: no such directory; --include-path holds the .yaml files of tasks")
    manager = TaskManager(include_path=list(include), include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=list(include))
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        where = f"lm-eval's own tasks{' or ' + ', '.join(include) if include else ''}"
        raise ValueError(f"--tasks {unknown[0]}: neither a task nor a group nor a tag of {where}")
    try:
        return simple_evaluate(
            adapter,
            tasks=manager.match_tasks(list(names)),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except Exception as error:
        inside = {Path(frame.filename).parent for frame in traceback.extract_tb(error.__traceback__)[1:]}
        if signals.exit_code(error) != signals.BUG or Path(__file__).parent in inside:
            raise
        raise ValueError(
            f"lm-eval cannot do this task: {type(error).__name__}: {error}; --debug shows where"
        ) from error


def table(results: dict[str, Any]) -> str:
    """The results as lm-eval draws them."""
    from lm_eval.utils import make_table

    tables = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    return "\n".join(tables) + "\n"


def language_model(model: GPT, tokenizer: Tokenizer, rules: Conventions, batch_tokens: int) -> "TemplateLM":
    """The model, in eval mode, as lm-eval asks for one. Text is text: none becomes a control token.

    ValueError in words without lm-eval.
    """
    try:
        from lm_eval import utils
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    except ImportError as error:
        raise ValueError(EXTRA.format(error.name)) from None
    context = model.config.max_seq_len
    assert context is not None

    class Adapter(TemplateLM):
        """How lm-eval's pairs of texts become ids is TemplateLM's; what they score is ours."""

        eot_token_id = tokenizer.end_id
        prefix_token_id = tokenizer.start_id  # before a text that nothing stands before

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return [*([] if add_special_tokens is False else rules.front), *tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            # What lm-eval leaves nothing of: a prompt of white space alone, a continuation merged into its prompt's last token.
            blank = [self.prefix_token_id]
            pairs = [(prompt or blank, more or tokenizer.encode(texts[1])) for texts, prompt, more in requests]
            return [(score.logprob, score.greedy) for score in log_likelihoods(model, pairs, batch_tokens)]

        def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
            windows = [
                [utils.make_disjoint_window(window) for window in self._rolled(request.args[0])] for request in requests
            ]
            scores = iter(log_likelihoods(model, [pair for each in windows for pair in each], batch_tokens))
            return [sum(next(scores).logprob for _ in each) for each in windows]

        def _rolled(self, text: str) -> Any:
            return utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, context, 1)

        def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
            written: dict[int, str] = {}
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
            for group in groups.values():
                how = normalize_gen_kwargs(requests[group[0]].args[1], MAX_TOKENS)
                written |= zip(group, self._written([requests[i].args[0] for i in group], how), strict=True)
            return [written[i] for i in range(len(requests))]

        def _written(self, prompts: list[str], how: Any) -> list[str]:
            """Greedy continuations; of a prompt that leaves no room for one the end is read."""
            max_tokens = how["max_gen_toks"]
            if how.get("do_sample") or how.get("num_beams", 1) != 1:
                raise ValueError("the task asks for sampling or beams; only greedy decoding is compared here")
            if unknown := [f"{name}: {value}" for name, value in how.items() if name not in KNOWN]:
                raise ValueError(f"the task's generation_kwargs have {unknown[0]}, which is not offered here")
            if max_tokens >= context:
                raise ValueError(
                    f"the task lets the model write {max_tokens} tokens, and its context is {context}: no room for a"
                    " prompt; set max_gen_toks in the task's generation_kwargs"
                )
            stops = handle_stop_sequences(how.get("until"), None)
            ids = [(self.tok_encode(text) or [self.prefix_token_id])[-(context - max_tokens) :] for text in prompts]
            return greedy(model, tokenizer, ids, max_tokens, [s for s in stops if s], rules.ends, batch_tokens)

    return Adapter()
