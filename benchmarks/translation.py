"""Does a decoder alone translate? Exact matches on held-out pairs, with and without a prompt that is read both ways.

    python benchmarks/translation.py [--quick] [--dir DIRECTORY] [key=value ...]

Makes pairs of a made-up language (below) as JSON lines, prepares them with the source as the prompt, so that only the
target is learned, trains configs/papers/translation.yaml twice, with model.prefix_lm and without, and lets each write the
targets of pairs that it never saw. Prints a table and, last, one JSON line.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import hf  # noqa: E402
from gpt.generate import Sampling, complete  # noqa: E402
from gpt.run import resolve  # noqa: E402

# English words, their stems in the other language and, of nouns, their gender, which article and adjective agree with.
NOUNS = {
    "cat": ("kat", "m"), "dog": ("hund", "m"), "bird": ("avi", "f"), "child": ("pul", "n"), "teacher": ("mest", "m"),
    "queen": ("regi", "f"), "king": ("reks", "m"), "horse": ("kaval", "m"), "fish": ("pis", "f"), "farmer": ("agrik", "m"),
    "girl": ("fil", "f"), "house": ("dom", "n"), "tree": ("arb", "n"), "poet": ("poet", "m"), "wolf": ("lup", "m"),
}  # fmt: skip
ADJECTIVES = {
    "red": "rud", "small": "parv", "old": "vet", "happy": "fel", "quiet": "tac", "clever": "sol", "white": "alb", "tall": "alt",
}  # fmt: skip
VERBS = {
    "sees": "vid", "loves": "am", "follows": "seq", "finds": "trov", "hears": "aud", "helps": "juv", "calls": "voc",
    "paints": "ping", "fears": "tim",
}  # fmt: skip
VOWELS = {"m": "o", "f": "a", "n": "e"}


@dataclass(frozen=True)
class Noun:
    """A noun phrase: its article, number, adjectives, and what a relative clause says of it."""

    noun: str
    definite: bool
    plural: bool
    adjectives: tuple[str, ...]
    clause: "tuple[str, Noun] | None"  # "that VERB NOUN"

    def source(self) -> list[str]:
        article = "the" if self.definite else "some" if self.plural else "a"
        words = [article, *self.adjectives, self.noun + "s" * self.plural]
        if self.clause is not None:
            verb, other = self.clause
            words += ["that", inflected(verb, self.plural), *other.source()]
        return words

    def target(self, case: str) -> list[str]:
        """The clause before its noun with the verb at its end, then article, noun, adjectives in reverse, all agreeing."""
        stem, gender = NOUNS[self.noun]
        ending = VOWELS[gender] + "s" * self.plural + case
        words = [("il" if self.definite else "un") + ending, stem + ending]
        words += [ADJECTIVES[adjective] + ending for adjective in reversed(self.adjectives)]
        if self.clause is not None:
            verb, other = self.clause
            words = [*other.target("n"), VERBS[verb] + ("nt" if self.plural else "t"), "ke", *words]
        return words


def inflected(verb: str, plural: bool) -> str:
    return verb.removesuffix("s") if plural else verb


def noun_phrase(rng: random.Random, depth: int) -> Noun:
    adjectives = tuple(rng.sample(list(ADJECTIVES), rng.choice((0, 0, 1, 1, 2))))
    clause = (rng.choice(list(VERBS)), noun_phrase(rng, depth - 1)) if depth and rng.random() < 0.4 else None
    return Noun(rng.choice(list(NOUNS)), rng.random() < 0.5, rng.random() < 0.4, adjectives, clause)


def pair(rng: random.Random) -> tuple[str, str]:
    """A sentence, subject verb object, and its translation, subject object verb; negated ones end differently."""
    subject, verb, thing = noun_phrase(rng, 2), rng.choice(list(VERBS)), noun_phrase(rng, 2)
    negated = rng.random() < 0.3
    middle = (
        ["do" if subject.plural else "does", "not", inflected(verb, True)]
        if negated
        else [inflected(verb, subject.plural)]
    )
    source = [*subject.source(), *middle, *thing.source(), "."]
    ending = ("nt" if subject.plural else "t") + ("ne" if negated else "")
    return " ".join(source), " ".join([*subject.target(""), *thing.target("n"), VERBS[verb] + ending])


def pairs(n: int, seed: int) -> Iterator[tuple[str, str]]:
    """Distinct pairs."""
    rng, seen = random.Random(seed), set()
    while len(seen) < n:
        made = pair(rng)
        if made[0] not in seen:
            seen.add(made[0])
            yield made


def write(path: Path, made: list[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"source": a + " ", "target": b}) + "\n" for a, b in made))


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True)


def exact(run_name: str, held_out: list[tuple[str, str]]) -> float:
    """The share of held-out pairs whose target is written exactly, word for word and ended."""
    model, tokenizer = hf.load(resolve(run_name)[0])
    right = 0
    for first in range(0, len(held_out), 100):
        part = held_out[first : first + 100]
        texts = [""] * len(part)
        ended = [False] * len(part)
        for event in complete(model, tokenizer, [a + " " for a, _ in part], Sampling(temperature=0), 80, seed=0):
            texts[event.row] += event.text
            ended[event.row] |= event.finish_reason == "eos"
        right += sum(text == b and end for text, (_, b), end in zip(texts, part, ended, strict=True))
    return right / len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 steps: shows that it runs, not that it learns")
    parser.add_argument(
        "--dir", type=Path, help="where the pairs and data set are kept (default: a temporary directory)"
    )
    parser.add_argument("settings", nargs="*", help="settings of the runs, as for train.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = (args.dir or Path(temporary)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        rows = measure(directory, 2_000 if args.quick else 50_000, ["train.steps=20"] * args.quick + args.settings)
    print(f"{'prompt':<12} {'exact matches on held-out pairs':>32}")
    for row in rows:
        print(f"{row['case']:<12} {row['ours']:>32.2%}")
    print(json.dumps(rows))


def measure(directory: Path, n_pairs: int, settings: list[str]) -> list[dict[str, object]]:
    made = list(pairs(n_pairs + 1_000, seed=1))
    held_out, known = made[:1_000], made[1_000:]
    write(directory / "pairs.jsonl", known)
    data = directory / "set"
    recipe = directory / "pairs.yaml"
    source = {"path": str(directory / "pairs.jsonl"), "prompt": "source", "field": "target"}
    recipe.write_text(json.dumps({"input": [source], "kind": "word"}))
    run(str(ROOT / "data" / "prepare.py"), str(recipe), "--out", str(data))
    rows: list[dict[str, object]] = []
    for case, flag in (("both ways", "true"), ("causal", "false")):
        name = f"translation-{case.replace(' ', '-')}"
        config = str(ROOT / "configs" / "papers" / "translation.yaml")
        given = [f"name={name}", f"data.path={data}", f"model.prefix_lm={flag}", *settings]
        subprocess.run([sys.executable, str(ROOT / "train.py"), config, *given], check=True, cwd=directory)
        share = exact(str(directory / "runs" / name), held_out)
        rows.append(
            {
                "case": case,
                "ours": share,
                "peer": None,
                "peer_name": "none",
                "unit": "exact",
                "ratio": None,
                "limit_share": None,
            }
        )
    return rows


if __name__ == "__main__":
    main()
